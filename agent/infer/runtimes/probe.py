"""Which runtimes work here: each is imported in a confined child first, since an import may crash (SIGILL on a Pi)."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from agent.base.errors import UnsupportedError
from agent.base.files import read_bounded
from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.infer.runtimes.base import Runtime, load_runtime

#: Runtime -> distributions that may bring it; builds for Jetson or GPUs carry names of their own.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-qnn", "onnxruntime-directml"),
    "tflite": ("ai-edge-litert", "tflite-runtime"),
}
#: Runtime -> the modules of which one is imported.
MODULES: Mapping[str, tuple[str, ...]] = {"onnx": ("onnxruntime",), "tflite": ("ai_edge_litert", "tflite_runtime")}
_MAX_SOURCE = 1 << 17


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """A runtime as it was found: version and providers, or the reason why it cannot be used, and what mends it.

    ``installed``: something is there, whether it works or not.
    """

    name: str
    version: str = ""
    providers: tuple[str, ...] = ()
    reason: str = ""
    mend: str = ""
    installed: bool = True

    @property
    def usable(self) -> bool:
        return not self.reason


def installed_version(name: str) -> str | None:
    """The version of the installed distribution by its metadata, without importing it."""
    from importlib import metadata  # noqa: PLC0415 - brings in e-mail and zip files; a runtime that works tells itself

    for distribution in DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def source_version(name: str) -> str:
    """The version that the installed package says of itself in its source; empty where it is not there, or says none.

    Read without importing the package, or anything else: a start asks before anything is served.
    """
    for module in MODULES[name]:
        try:
            spec = find_spec(module)
            text = read_bounded(Path(spec.origin), _MAX_SOURCE).decode("utf-8") if spec and spec.origin else ""
        except (ImportError, OSError, UnicodeDecodeError, ValueError):
            continue
        if found := re.search(r"""^__version__ = ["']([^"']{1,64})["']""", text, re.MULTILINE):
            return found[1]
    return ""


def probe_runtime(name: str) -> RuntimeState:
    """Import the runtime in a child and ask it. Never raises for a runtime that is missing or broken."""
    if not any(find_spec(module) for module in MODULES[name]):
        return RuntimeState(name, reason="not installed", installed=False)
    try:
        # A request may wait for it: the first one after a start.
        with ChildProcess({"model": None, "golden": None}, ChildLimits(memory_mb=512), urgent=True) as child:
            child.greet()
            answer = child.call("prepare", 60, runtime=name)
    except ChildError as error:
        reason = str(error).removeprefix(f"cannot load runtime '{name}': ")
        if error.kind != "refused":  # it did not live to say why
            reason = f"its import {reason}"
        return RuntimeState(name, version=installed_version(name) or "", reason=reason, mend=error.hint)
    return RuntimeState(name, str(answer["version"]), tuple(str(provider) for provider in answer["providers"]))


class Runtimes:
    """The runtimes of this process: probed once each, imported at first use."""

    def __init__(self, probe: Callable[[str], RuntimeState] = probe_runtime) -> None:
        self._probe = probe
        self._states: dict[str, RuntimeState] = {}
        self._loaded: dict[str, Runtime] = {}

    def states(self) -> dict[str, RuntimeState]:
        """Every runtime that the agent knows, probed now where it has not been yet (up to a second each)."""
        return {name: self.state(name) for name in DISTRIBUTIONS}

    def state(self, name: str) -> RuntimeState:
        """One runtime's state."""
        if name not in self._states:
            known = name in DISTRIBUTIONS
            self._states[name] = (
                self._probe(name) if known else RuntimeState(name, reason="not supported", installed=False)
            )
        return self._states[name]

    def load(self, name: str) -> Runtime:
        """The imported runtime; UnsupportedError with the reason where the probe failed."""
        if name not in self._loaded:
            state = self.state(name)
            if not state.usable:
                raise UnsupportedError(f"cannot load runtime '{name}': {state.reason}")
            self._loaded[name] = load_runtime(name)
            gc.freeze()  # tens of thousands of objects that stay: full collections need not walk them
        return self._loaded[name]
