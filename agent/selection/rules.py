"""Candidates, and what the rules say of each before anything runs.

A candidate is rejected for what is known to be missing, with every reason that applies. What is unknown rejects
nothing: it becomes a note, and the trial decides. So an unreadable file costs a trial, never a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agent.bundles.manifest import Manifest, Precision, Quality, Requires, Runtime, Variant
from agent.hardware.facts import Facts
from agent.hardware.profiles import Profile, memory_budget_mb
from agent.selection.inventory import (
    CPU_PROVIDER,
    DRIVER_COMES_WITH_SYSTEM,
    PROVIDERS,
    REMOTE_PROVIDERS,
    InstalledRuntime,
    RuntimeInventory,
    effective_arch,
    runs_on,
)
from agent.selection.versions import satisfies

#: Memory that a loaded model takes, from its file's size: the decrypted file, its weights once more as the runtime lays
#: them out, and what the runtime and the activations add. Measured with ONNX Runtime 1.32, file excluded: a
#: MobileNetV2 of 14 MB 57 MB, its int8 of 3.8 MB 26 MB, an MLP of 105 MB 177 MB.
NEED_FACTOR, NEED_BASE_MB = 2.5, 30
#: fp16 weights become fp32 on a CPU that computes in fp32: 7 MB of MobileNetV2 took 72 MB.
NEED_FACTOR_FP16_CPU = 5.0

#: Other spellings of what ``uname -m`` says.
_ARCH_ALIASES = {
    "arm64": "aarch64",
    "amd64": "x86_64",
    "x64": "x86_64",
    "armhf": "armv7l",
    "armv7": "armv7l",
    "arm": "armv7l",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant on one execution provider of its runtime: the thing that is tried, measured and chosen.

    ``scheme`` is how it was quantized where the manifest says so (``quantization_scheme``), else empty.
    ``reduce_range`` is None when the manifest does not tell. ``declared`` is the packer's own quality figure.
    """

    variant_id: str
    runtime: Runtime
    provider: str
    precision: Precision
    scheme: str = ""
    reduce_range: bool | None = None
    digest: str = ""
    size: int = 0
    declared: Quality | None = None

    @property
    def id(self) -> str:
        """Stable name, ``int8-static@CPUExecutionProvider``: what measurements and quarantine are kept under."""
        return f"{self.variant_id}@{self.provider}"

    @property
    def on_cpu(self) -> bool:
        """Whether its provider computes on the CPU; an unknown provider does not."""
        traits = PROVIDERS.get(self.provider)
        return traits is not None and traits.on_cpu


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of a candidate. ``reasons`` is empty exactly when it is accepted; ``notes`` never reject."""

    candidate: Candidate
    accepted: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    need_mb: int = 0


@dataclass(frozen=True, slots=True)
class _Case:
    """One variant on one provider, with all that the rules look at."""

    variant: Variant
    candidate: Candidate
    facts: Facts
    installed: InstalledRuntime | None
    inventory: RuntimeInventory
    headroom_mb: int | None
    quarantined: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Note:
    """Something worth saying that rejects nothing."""

    text: str


_Findings = Iterator[str | _Note]


def candidates(
    manifest: Manifest,
    facts: Facts,
    providers: Sequence[str],
    inventory: RuntimeInventory,
    headroom_mb: int | None,
    quarantined: Mapping[str, str] | None = None,
) -> tuple[Verdict, ...]:
    """A verdict for each variant on each provider that makes sense, in the manifest's and the providers' order.

    ``providers`` is the profile's order: its providers are judged even when they are missing, so that the reader learns
    what an installation lacks; other installed ones follow. ``headroom_mb`` as ``memory_headroom_mb`` has it, None when
    unknown. ``quarantined`` maps candidate ids to reasons.
    """
    verdicts = []
    for variant in manifest.variants:
        for provider in _providers_for(variant, providers, inventory):
            candidate = candidate_of(variant, provider)
            installed = inventory.get(variant.runtime)
            case = _Case(variant, candidate, facts, installed, inventory, headroom_mb, quarantined or {})
            verdicts.append(_judge(case))
    return tuple(verdicts)


def candidate_of(variant: Variant, provider: str) -> Candidate:
    """The candidate for ``variant`` on ``provider``."""
    return Candidate(
        variant_id=variant.id,
        runtime=variant.runtime,
        provider=provider,
        precision=variant.precision,
        scheme=quantization_scheme(variant),
        reduce_range=_reduce_range(variant),
        digest=variant.file.sha256,
        size=variant.file.size,
        declared=variant.quality,
    )


def quantization_scheme(variant: Variant) -> str:
    """``qdq``, ``dynamic``, ``qoperator`` or ``qoperator-s8`` from the techniques; empty when untold.

    Understood are texts among the parameters, in any case: ``QDQ``, ``static``, ``dynamic``, ``QOperator``,
    ``uint8``; QOperator without unsigned activations is ``-s8``. Anything else is no error: the parameters are free.
    """
    said = {str(value).lower() for technique in variant.technique for value in technique.parameters.values()} | {
        technique.name.lower() for technique in variant.technique
    }
    if "dynamic" in said:
        return "dynamic"
    if "qoperator" in said:
        return "qoperator" if said & {"uint8", "quint8"} else "qoperator-s8"
    return "qdq" if said & {"qdq", "static"} else ""


def _reduce_range(variant: Variant) -> bool | None:
    for technique in variant.technique:
        if isinstance(value := technique.parameters.get("reduce_range"), bool):
            return value
    return None


def estimated_need_mb(variant: Variant, *, on_cpu: bool = True) -> int:
    """Memory that ``variant`` takes once loaded, in MB: the packer's figure or the estimate, whichever is more."""
    factor = NEED_FACTOR_FP16_CPU if variant.precision == "fp16" and on_cpu else NEED_FACTOR
    return max(variant.requires.min_memory_mb, NEED_BASE_MB + round(variant.file.size * factor / (1 << 20)))


def memory_headroom_mb(facts: Facts, profile: Profile) -> int | None:
    """What a model may take now: the smaller of MemAvailable and the profile's share of what RAM and cgroups allow.

    Never MemTotal alone: a board of "8 GB" with 300 MB available has 300 MB. None when nothing is known.
    """
    known = [bound for bound in (facts.mem_available_mb, memory_budget_mb(facts, profile)) if bound is not None]
    return min(known) if known else None


def _providers_for(variant: Variant, providers: Sequence[str], inventory: RuntimeInventory) -> list[str]:
    runtime = variant.runtime
    wanted = [name for name in providers if runs_on(runtime, name)]
    installed = inventory.get(runtime)
    # An installed provider that neither this table nor the profile knows is left alone: a new one is a line in a
    # profile.
    others = [name for name in (installed.providers if installed else ()) if name in PROVIDERS]
    every = [name for name in dict.fromkeys([*wanted, *others]) if name not in REMOTE_PROVIDERS]
    accelerator = variant.requires.accelerator
    if accelerator is not None:
        every = [name for name in every if name not in PROVIDERS or accelerator in PROVIDERS[name].serves]
    return every or [CPU_PROVIDER[runtime]]


def _judge(case: _Case) -> Verdict:
    need = estimated_need_mb(case.variant, on_cpu=case.candidate.on_cpu)
    findings = [finding for rule in _RULES for finding in rule(case)]
    reasons = tuple(finding for finding in findings if isinstance(finding, str))
    notes = tuple(finding.text for finding in findings if isinstance(finding, _Note))
    return Verdict(case.candidate, not reasons, reasons, notes, need)


def _machine(case: _Case) -> _Findings:
    facts = case.facts
    if not facts.supported:
        yield f"this machine ({facts.arch or 'unknown architecture'}) is not supported"
    if facts.emulated:
        yield _Note("instructions are emulated: times here say little about a real board")


def _architecture(case: _Case) -> _Findings:
    wanted = [_ARCH_ALIASES.get(name, name) for name in case.variant.requires.arch]
    arch = effective_arch(case.facts)
    if not wanted or arch in wanted:
        return
    if arch is None:
        yield _Note(f"needs {' or '.join(wanted)}, the architecture is unknown")
    elif arch != case.facts.arch:
        yield f"needs {' or '.join(wanted)}, the userland is 32-bit ({arch}) on a kernel of {case.facts.arch}"
    else:
        yield f"needs {' or '.join(wanted)}, this is {arch}"


def _features(case: _Case) -> _Findings:
    requires, features = case.variant.requires, case.facts.features
    missing = [name for name in requires.all_features if features.get(name) is False]
    unknown = [name for name in requires.all_features if features.get(name) is None]
    if missing:
        yield f"needs the CPU feature{_s(missing)} {', '.join(missing)}"
    if unknown:
        yield _Note(f"needs {', '.join(unknown)}, which detection cannot tell: the trial decides")
    yield from _any_feature(requires, features)


def _any_feature(requires: Requires, features: Mapping[str, bool | None]) -> _Findings:
    states = [features.get(name) for name in requires.any_features]
    if not states or True in states:
        return
    names = ", ".join(requires.any_features)
    if None in states:
        yield _Note(f"needs one of {names}, which detection cannot tell: the trial decides")
    else:
        yield f"needs one of the CPU features {names}"


def _runtime(case: _Case) -> _Findings:
    runtime, installed, inventory = case.variant.runtime, case.installed, case.inventory
    if installed is None:
        why = inventory.absent.get(runtime)
        state = "does not work here" if runtime in inventory.broken else "is not installed"
        yield f"the runtime {runtime} {state}{f': {why}' if why else ''}"
        return
    if inventory.assumed:
        yield _Note(f"assumes {runtime} {installed.version} with {', '.join(installed.providers)}")
    if case.candidate.provider not in installed.providers:
        yield f"{case.candidate.provider} is not in the installed {runtime} {installed.version}"
    wanted = case.variant.requires.runtime_version
    if wanted is None:
        return
    try:
        if not satisfies(installed.version, wanted):
            yield f"needs {runtime} {wanted}, {installed.version} is {'assumed' if inventory.assumed else 'installed'}"
    except ValueError as error:
        yield f"requires.runtime_version cannot be read: {error}"


def _accelerator(case: _Case) -> _Findings:
    traits = PROVIDERS.get(case.candidate.provider)
    wanted = case.variant.requires.accelerator
    if traits is None:
        yield _Note(f"{case.candidate.provider} is known to the profile only: the trial decides")
    elif wanted is not None and wanted not in traits.serves:
        yield f"needs the accelerator {wanted}, which {case.candidate.provider} does not use"
    kinds = dict.fromkeys(kind for kind in (traits.needs if traits else None, wanted) if kind)
    for kind in kinds:
        yield from _has_accelerator(kind, case.facts, assumed=case.inventory.assumed)


def _has_accelerator(kind: str, facts: Facts, *, assumed: bool) -> _Findings:
    found = [accelerator for accelerator in facts.accelerators if accelerator.kind == kind]
    if not found:
        yield f"this machine has no {kind}"
    elif assumed and kind in DRIVER_COMES_WITH_SYSTEM:
        yield _Note(f"assumes that the driver of the {kind} is there: the board's own system brings it")
    elif all(accelerator.usable is False for accelerator in found):
        yield f"the {kind} is there, its driver is not"
    elif not any(accelerator.usable for accelerator in found):
        yield _Note(f"whether the {kind} works is not known: the trial decides")


def _memory(case: _Case) -> _Findings:
    need = estimated_need_mb(case.variant, on_cpu=case.candidate.on_cpu)
    declared = case.variant.requires.min_memory_mb
    basis = "as the manifest asks" if need == declared else f"estimated from a file of {_megabytes(case.variant)} MB"
    if case.headroom_mb is None:
        yield _Note(f"needs about {need} MB ({basis}), how much is free is not known")
    elif need > case.headroom_mb:
        yield f"needs about {need} MB of memory ({basis}), {max(0, case.headroom_mb)} MB may be used"


def _known_bad(case: _Case) -> _Findings:
    candidate = case.candidate
    if case.facts.arch in ("x86_64", "i686") and candidate.scheme == "qoperator-s8" and candidate.on_cpu:
        # Measured: 22.5 ms against 2.0 ms as QDQ. Signed activations have no fast kernel on x86.
        yield "signed int8 in QOperator form is 5 to 10 times slower on x86 than QDQ"
    if candidate.provider == "edgetpu" and candidate.precision != "int8":
        yield "the Edge TPU runs int8 only"


def _quarantine(case: _Case) -> _Findings:
    if why := case.quarantined.get(case.candidate.id):
        yield f"quarantined: {why}"


#: The order in which reasons are told: what cannot be changed first.
_RULES = (_machine, _architecture, _features, _accelerator, _runtime, _memory, _known_bad, _quarantine)


def accepted(verdicts: Iterable[Verdict]) -> tuple[Candidate, ...]:
    """The candidates that may be tried."""
    return tuple(verdict.candidate for verdict in verdicts if verdict.accepted)


def _megabytes(variant: Variant) -> str:
    size = variant.file.size / (1 << 20)
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) > 1 else ""
