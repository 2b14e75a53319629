"""What one expects of each candidate before it has run, and which candidates are worth a trial.

A prior is a rank with a reason, never a verdict: published figures for one model on one board differ several-fold, so
they are good for the order of trials and for breaking a tie, and for nothing else. The speeds are relative to fp32 on
the same device's CPU. Where the board's profile says something it wins over what the CPU's features suggest.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from agent.bundles.manifest import Policy, Precision
from agent.hardware.facts import Facts
from agent.hardware.profiles import FALLBACK, Profile
from agent.selection.inventory import PROVIDERS
from agent.selection.rules import Candidate


@dataclass(frozen=True, slots=True)
class Prior:
    """An expectation: ``score`` is the expected speed relative to fp32 on the CPU (1.5 = 1.5 times as fast)."""

    candidate: Candidate
    score: float
    why: str


#: int8 over fp32 by core, middle of what is published (library by library these differ: measure).
_GAIN_BY_CORE: Mapping[str, float] = {
    "Cortex-A53": 1.5,
    "Cortex-A57": 1.5,
    "Cortex-A72": 1.5,
    "Cortex-A73": 1.5,
    "Cortex-A55": 0.8,
    "Cortex-A76": 0.9,
    "Cortex-A78": 1.1,
    "Cortex-A78AE": 1.1,
    "Carmel": 0.5,
}
_GAIN_VNNI, _GAIN_AMX, _GAIN_I8MM, _GAIN_DOTPROD = 2.0, 2.5, 1.8, 1.1
#: AVX2 alone multiplies 8-bit numbers by way of 16-bit sums: Zen 3 took 2 to 3 times as long as with fp32.
_GAIN_X86_PLAIN = 0.4
_GAIN_ARM_PLAIN = 1.4
#: Where nothing is known the exact one goes first.
_GAIN_UNKNOWN = 0.95
#: What is left of the gain when activations are quantized anew in each run; good for matrices, bad for convolutions.
_DYNAMIC = 0.8
_QOPERATOR = 0.9

#: Speed over fp32 on the CPU by provider; the order matters, not the size.
_ACCELERATED: Mapping[str, float] = {"TensorrtExecutionProvider": 6.0, "CUDAExecutionProvider": 4.0}
_NPU = 5.0
#: On a GPU: fp16 runs on tensor cores; int8 only where the engine fuses QDQ, and it needs evidence of its accuracy.
_GPU_PRECISION: Mapping[str, float] = {"fp16": 1.7, "bf16": 1.5, "mixed": 1.4, "fp32": 1.0, "int8": 0.4, "int4": 0.4}
_TENSORRT_INT8 = 1.6


def rank_by_prior(candidates: Sequence[Candidate], facts: Facts, profile: Profile) -> list[Prior]:
    """Priors of ``candidates``, best first. Equal expectations: as the profile orders providers, small files, name."""
    priors = [_expect(candidate, facts, profile) for candidate in candidates]
    by_provider: dict[str, list[Prior]] = {}
    for prior in priors:
        by_provider.setdefault(prior.candidate.provider, []).append(prior)
    ordered = [prior for group in by_provider.values() for prior in _in_profile_order(group, profile)]
    places = {name: place for place, name in enumerate(profile.providers)}

    def place(prior: Prior) -> tuple[float, int, int, str]:
        # Of two networks of one precision the smaller one mostly has less to compute.
        candidate = prior.candidate
        return -prior.score, places.get(candidate.provider, len(places)), candidate.size, candidate.variant_id

    return sorted(ordered, key=place)


def _expect(candidate: Candidate, facts: Facts, profile: Profile) -> Prior:
    if candidate.on_cpu:
        speed, why = _on_cpu(candidate, facts, profile)
    else:
        speed, why = _on_accelerator(candidate)
        # A profile that lists the CPU first has a reason: the accelerator there is slower than it sounds.
        before = profile.providers[: _place(candidate.provider, profile)]
        if any((traits := PROVIDERS.get(name)) is not None and traits.on_cpu for name in before):
            speed, why = min(speed, 0.9), f"{why}; the profile {profile.id} puts the CPU first"
    return Prior(candidate, speed, why)


def _on_cpu(candidate: Candidate, facts: Facts, profile: Profile) -> tuple[float, str]:
    precision = candidate.precision
    if precision == "fp32":
        return 1.0, "fp32 on the CPU is what the others are compared with"
    if precision in ("fp16", "bf16"):
        return 1 / profile.fp16_cpu_penalty, f"{precision} is computed in fp32 on a CPU, with casts around every node"
    gain, why = int8_gain(facts, profile)
    if precision == "mixed":
        return (1 + gain) / 2, f"partly int8: {why}"
    if precision == "int4":
        return min(gain, 1.0) * 0.9, "int4 weights are unpacked in each run"
    factor, remark = _scheme(candidate, facts, gain)
    return gain * factor, f"{why}{remark}"


def _scheme(candidate: Candidate, facts: Facts, gain: float) -> tuple[float, str]:
    """What the way of quantizing leaves of the gain."""
    if candidate.scheme == "dynamic":
        return _DYNAMIC, "; dynamic: activations are quantized anew in each run"
    if candidate.scheme.startswith("qoperator"):
        return _QOPERATOR, "; QOperator leaves less to the optimizer than QDQ"
    if facts.arch == "x86_64" and gain < 1 and candidate.reduce_range is False:
        return 0.95, "; without reduce_range its 16-bit sums may overflow"
    return 1.0, ""


def int8_gain(facts: Facts, profile: Profile) -> tuple[float, str]:
    """Expected speed of int8 over fp32 on this CPU, and why. A profile's gain of 1.0 says nothing."""
    if profile.int8_gain != 1.0:
        return profile.int8_gain, f"int8 runs at about {profile.int8_gain:g}x of fp32 (profile {profile.id})"
    return _gain_x86(facts) if facts.arch in ("x86_64", "i686") else _gain_arm(facts)


def _gain_x86(facts: Facts) -> tuple[float, str]:
    features = facts.features
    if features.get("amx_int8"):
        return _GAIN_AMX, "AMX multiplies int8 tiles"
    if features.get("avx512_vnni") or features.get("avx_vnni"):
        return _GAIN_VNNI, "VNNI has int8 dot products"
    if features.get("avx512_vnni") is None and features.get("avx_vnni") is None:
        return _GAIN_UNKNOWN, "whether there is VNNI is not known"
    return _GAIN_X86_PLAIN, "no VNNI: int8 takes longer than fp32"


def _gain_arm(facts: Facts) -> tuple[float, str]:
    if facts.features.get("i8mm"):
        return _GAIN_I8MM, "i8mm multiplies int8 matrices"
    for name in facts.big_core_types or tuple(kind for kind, _ in facts.core_types or ()):
        if name in _GAIN_BY_CORE:
            return _GAIN_BY_CORE[name], f"{name}: int8 runs at about {_GAIN_BY_CORE[name]:g}x of fp32"
    if facts.features.get("dotprod") is None:
        return _GAIN_UNKNOWN, "the CPU's features are not known"
    if facts.features["dotprod"]:
        return _GAIN_DOTPROD, "has int8 dot products"
    return _GAIN_ARM_PLAIN, "no dot products, but a quarter of the bytes to move"


def _on_accelerator(candidate: Candidate) -> tuple[float, str]:
    base = _ACCELERATED.get(candidate.provider)
    if base is None:
        if candidate.precision == "int8":
            return _NPU, f"{candidate.provider} is made for int8"
        return 0.5, f"{candidate.provider} leaves most of {candidate.precision} to the CPU"
    factor = _GPU_PRECISION[candidate.precision]
    why = f"{candidate.precision} on the GPU"
    if candidate.precision == "int8" and candidate.scheme != "dynamic" and candidate.provider.startswith("Tensorrt"):
        factor, why = _TENSORRT_INT8, "TensorRT fuses QDQ int8; fp16 first, since int8 needs evidence of its accuracy"
    elif candidate.precision == "int8":
        why = "int8 has few kernels there: most of it is converted back"
    return base * factor, why


def _in_profile_order(priors: Sequence[Prior], profile: Profile) -> list[Prior]:
    """Expectations of one provider, bent where they contradict the profile's order of precisions."""
    order = profile.cpu_precisions if priors[0].candidate.on_cpu else profile.gpu_precisions
    if order == FALLBACK.cpu_precisions:  # the default: this profile has no order of its own
        return list(priors)
    best: dict[str, float] = {}
    for prior in priors:
        best[prior.candidate.precision] = max(best.get(prior.candidate.precision, 0.0), prior.score)
    bent = list(priors)
    listed = [precision for precision in order if precision in best]
    for before, after in itertools.pairwise(listed):
        if best[after] < best[before]:
            continue
        factor = 0.99 * best[before] / best[after]
        best[after] *= factor
        bent = [_bend(p, factor, before, profile) if p.candidate.precision == after else p for p in bent]
    return bent


def _bend(prior: Prior, factor: float, before: str, profile: Profile) -> Prior:
    return replace(
        prior, score=prior.score * factor, why=f"{prior.why}; the profile {profile.id} puts {before} before it"
    )


def _place(provider: str, profile: Profile) -> int:
    return profile.providers.index(provider) if provider in profile.providers else len(profile.providers)


# -- which to try -----------------------------------------------------------------------------------------------------

_FINEST: tuple[Precision, ...] = ("fp32", "mixed", "fp16", "bf16", "int8", "int4")


def to_try(policy: Policy, priors: Sequence[Prior], count: int, but: Collection[str] = ()) -> tuple[Candidate, ...]:
    """The ``count`` candidates that are worth a trial under ``policy``, most promising first; none of the ids in
    ``but``.

    When none of a first lot may run, the next lot is ``to_try`` with the first one's ids in ``but``.

    Latency and energy follow the prior, memory the file's size, accuracy the declared quality or else the precision.
    From three on, the finest precision and the first one on the CPU are among them: when the fast ones turn out to
    answer wrongly, or the accelerator fails, there is something to fall back to.
    """
    ranked = sorted(enumerate(priors), key=lambda pair: (_promise(policy, pair[1]), pair[0]))
    ordered = [prior for _, prior in ranked if prior.candidate.id not in but]
    chosen = ordered[:count]
    if 3 <= count < len(ordered):
        finest = min(ordered, key=lambda prior: _FINEST.index(prior.candidate.precision))
        on_cpu = next((prior for prior in ordered if prior.candidate.on_cpu), finest)
        missing = [prior for prior in dict.fromkeys((finest, on_cpu)) if prior not in chosen]
        chosen = chosen[: count - len(missing)] + missing
    return tuple(prior.candidate for prior in chosen)


def _promise(policy: Policy, prior: Prior) -> tuple[float, ...]:
    """Less is more promising."""
    candidate = prior.candidate
    if policy.prefer == "memory":
        return (candidate.size * (2.0 if candidate.precision == "fp16" and candidate.on_cpu else 1.0),)
    if policy.prefer == "accuracy":
        declared = candidate.declared.value if candidate.declared else float("-inf")
        return (-declared, float(_FINEST.index(candidate.precision)))
    return (-prior.score,)
