"""Which runtimes there are, with their versions and execution providers; and what each provider runs on.

On the live device the inventory is asked of the installed runtimes (after a probe import in a child). For a recorded
board there is nothing to ask: ``assumed_inventory`` says what an installation there would have, and is marked so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from agent.hardware.facts import Facts

#: What ONNX Runtime's release for the oldest supported Python is: assumed where nothing can be asked.
ASSUMED_ONNX_VERSION = "1.23.2"
#: TFLite by architecture: LiteRT has wheels for 64-bit machines, its predecessor the last one for 32-bit ARM.
ASSUMED_TFLITE: Mapping[str, str] = MappingProxyType(
    {
        "aarch64": "2.3.0 (ai-edge-litert)",
        "x86_64": "2.3.0 (ai-edge-litert)",
        "armv7l": "2.14.0 (tflite-runtime)",
    }
)


@dataclass(frozen=True, slots=True)
class ProviderTraits:
    """``needs``: the accelerator without which it cannot work. ``serves``: accelerators that it can use."""

    needs: str | None = None
    serves: frozenset[str] = frozenset()

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU."""
        return self.needs is None


_CPU = ProviderTraits()
#: Providers by name; ``cpu`` and ``edgetpu`` are TFLite's. Sources: ONNX Runtime, "Execution Providers"; Coral, "Edge
#: TPU".
PROVIDERS: Mapping[str, ProviderTraits] = MappingProxyType(
    {
        "CPUExecutionProvider": _CPU,
        "XnnpackExecutionProvider": _CPU,
        "ACLExecutionProvider": _CPU,
        "ArmNNExecutionProvider": _CPU,
        "DnnlExecutionProvider": _CPU,
        "OpenVINOExecutionProvider": ProviderTraits(serves=frozenset({"intel-igpu"})),
        "TensorrtExecutionProvider": ProviderTraits("cuda", frozenset({"cuda", "dla"})),
        "CUDAExecutionProvider": ProviderTraits("cuda", frozenset({"cuda"})),
        "VSINPUExecutionProvider": ProviderTraits("vsi-npu", frozenset({"vsi-npu"})),
        "RknpuExecutionProvider": ProviderTraits("rknpu", frozenset({"rknpu"})),
        "TIDLExecutionProvider": ProviderTraits("tidl", frozenset({"tidl"})),
        "cpu": _CPU,
        "edgetpu": ProviderTraits("edgetpu", frozenset({"edgetpu"})),
    }
)
#: In every build of ONNX Runtime, and sends the tensors to a server: never a candidate.
REMOTE_PROVIDERS = frozenset({"AzureExecutionProvider"})
#: Accelerators whose driver comes with the board's own system: a recording without its device nodes tells nothing.
DRIVER_COMES_WITH_SYSTEM = frozenset({"cuda", "dla"})
#: The provider of a runtime that computes on the CPU and is always there.
CPU_PROVIDER: Mapping[str, str] = MappingProxyType({"onnx": "CPUExecutionProvider", "tflite": "cpu"})


@dataclass(frozen=True, slots=True)
class InstalledRuntime:
    """A runtime that can be imported here: its version and the providers in this build of it."""

    version: str
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuntimeInventory:
    """Runtimes by name. ``absent`` tells why one cannot be used (may be empty), ``broken`` names those that are
    installed all the same; ``assumed``: nobody looked."""

    runtimes: Mapping[str, InstalledRuntime] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    broken: Collection[str] = ()
    assumed: bool = False

    def get(self, runtime: str) -> InstalledRuntime | None:
        """That runtime, None when it is not there."""
        return self.runtimes.get(runtime)


def inventory_document(inventory: RuntimeInventory) -> dict[str, Any]:
    """The inventory as plain JSON values, for whoever judges this device from afar."""
    return {
        "runtimes": {
            name: {"version": runtime.version, "providers": list(runtime.providers)}
            for name, runtime in inventory.runtimes.items()
        },
        "absent": dict(inventory.absent),
        "broken": sorted(inventory.broken),
        "assumed": inventory.assumed,
    }


def runs_on(runtime: str, provider: str) -> bool:
    """Whether ``provider`` is a name of that runtime's: ONNX Runtime's names end in ``ExecutionProvider``."""
    return provider.endswith("ExecutionProvider") == (runtime == "onnx")


def effective_arch(facts: Facts) -> str | None:
    """The architecture that programs here are compiled for: a 32-bit userland on a 64-bit kernel is the 32-bit one."""
    if facts.user_bits == 32:
        return {"aarch64": "armv7l", "x86_64": "i686"}.get(facts.arch or "", facts.arch)
    return facts.arch


def install_hint(runtime: str, facts: Facts) -> str:
    """The command that installs a runtime on that machine, or what can be had in its place."""
    if effective_arch(facts) == "armv7l":  # the one runtime that is published for it
        return "pip install 'edge-agent[tflite]'"
    return f"pip install 'edge-agent[{'litert' if runtime == 'tflite' else runtime}]'"


def assumed_inventory(
    facts: Facts, providers: Sequence[str], runtimes: Collection[str] = ("onnx", "tflite")
) -> RuntimeInventory:
    """What an installation on a recorded board would have: ``providers`` is the profile's order, ``runtimes`` what the
    agent supports. Providers that need an accelerator are assumed only where the board has it."""
    arch = effective_arch(facts)
    kinds = {a.kind for a in facts.accelerators if a.usable is not False or a.kind in DRIVER_COMES_WITH_SYSTEM}
    present: dict[str, InstalledRuntime] = {}
    absent: dict[str, str] = {}
    if "onnx" in runtimes and arch in ("aarch64", "x86_64"):
        named = [name for name in providers if runs_on("onnx", name)]
        usable = [name for name in named if (traits := PROVIDERS.get(name)) and (traits.needs or "") in {"", *kinds}]
        ordered = dict.fromkeys([*usable, CPU_PROVIDER["onnx"]])
        present["onnx"] = InstalledRuntime(ASSUMED_ONNX_VERSION, tuple(ordered))
    elif "onnx" in runtimes:
        absent["onnx"] = f"it is not published for {arch or 'an unknown architecture'}"
    if "tflite" in runtimes and (version := ASSUMED_TFLITE.get(arch or "")) is not None:
        present["tflite"] = InstalledRuntime(version, (CPU_PROVIDER["tflite"],))
    elif "tflite" in runtimes:
        absent["tflite"] = f"it is not published for {arch or 'an unknown architecture'}"
    return RuntimeInventory(present, absent, assumed=True)
