"""The criteria by which candidates are compared, each with its own notion of "alike".

A step takes the contestants that are left, finds the best of them and keeps those that are alike with it; it writes the
gap down for every one of them. A criterion that says nothing about anybody is skipped (None), and who lacks a figure
that others have is beaten by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agent.bundles.manifest import Policy
from agent.selection.measurements import Measurement
from agent.selection.noise import Comparison, compare_rounds, compare_unpaired
from agent.selection.prior import Prior

Criterion = Literal["latency", "accuracy", "energy", "memory"]

#: What decides when the criterion before it is a tie. Accuracy follows latency since among equally fast variants there
#: is no reason for the worse answer; energy is last where it is mostly latency seen through an estimate.
CHAINS: dict[str, tuple[Criterion, ...]] = {
    "latency": ("latency", "accuracy", "memory", "energy"),
    "accuracy": ("accuracy", "latency", "memory", "energy"),
    "energy": ("energy", "latency", "accuracy", "memory"),
    "memory": ("memory", "latency", "accuracy", "energy"),
}

#: Relative differences that no repetition confirms: allocator and page granularity, a sensor's resolution.
MEMORY_FLOOR, MEMORY_FLOOR_MB = 0.03, 1.0
ENERGY_FLOOR = 0.04
#: A quality is compared as measured or declared; only what rounding would swallow is a tie.
QUALITY_FLOOR = 0.001
#: How many times as long as the fastest a candidate must surely take to be measured no more.
FAR_BEHIND = 1.25

QualitySource = Literal["declared", "measured"]


@dataclass(frozen=True, slots=True)
class QualityValue:
    """A quality, higher is better, and where it comes from. ``max_abs`` is turned round: -0.01 is better than -0.1."""

    value: float
    metric: str
    source: QualitySource


@dataclass(frozen=True, slots=True)
class Gap:
    """How much worse than ``best``, the best of its step, a candidate is (0.2 = 20 %), and the noise in that."""

    criterion: Criterion
    best: str
    worse_by: float
    noise: float
    rounds: int = 0

    @property
    def tie(self) -> bool:
        """Whether the difference is within the noise."""
        return self.worse_by <= self.noise


@dataclass(slots=True)
class Contestant:
    """A candidate while the choice is made: its ``rank`` in the prior, limits that it breaks, figures that it lacks."""

    id: str
    measurement: Measurement
    rank: int
    quality: QualityValue | None = None
    gaps: list[Gap] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def contestants(measurements: Sequence[Measurement], priors: Sequence[Prior]) -> list[Contestant]:
    """One entry a candidate, in the prior's order, then by name: the order of the input never matters."""
    ranks = {prior.candidate.id: rank for rank, prior in enumerate(priors)}
    latest = {measurement.candidate_id: measurement for measurement in measurements}
    entries = [Contestant(name, measurement, ranks.get(name, len(ranks))) for name, measurement in latest.items()]
    return sorted(entries, key=lambda entry: (entry.rank, entry.id))


def qualities(measurements: Sequence[Measurement], priors: Sequence[Prior]) -> dict[str, QualityValue]:
    """Comparable qualities of the accepted ``measurements`` by candidate id.

    A declared quality whose metric is the golden set's is superseded by what was measured here: int8 differs between
    processors, so the packer's figure is about another machine. Candidates are compared on one basis: the declared
    metric that most of them have, or the measured agreement where that covers more. Who lacks it has no quality.
    """
    declared = {prior.candidate.id: prior.candidate.declared for prior in priors if prior.candidate.declared}
    bases: dict[tuple[int, str], dict[str, QualityValue]] = {}
    for measurement in measurements:
        name, metric = measurement.candidate_id, measurement.agreement_metric
        said = declared.get(name)
        seen: QualityValue | None = None
        if measurement.agreement is not None and metric:
            value = -measurement.agreement if metric == "max_abs" else measurement.agreement
            seen = QualityValue(value, metric, "measured")
            bases.setdefault((1, ""), {})[name] = seen
        if said:
            stands = (
                seen
                if seen and said.metric in (metric, f"{metric}_agreement")
                else QualityValue(said.value, said.metric, "declared")
            )
            bases.setdefault((0, said.metric), {})[name] = stands
    if not bases:
        return {}
    return bases[min(bases, key=lambda basis: (-len(bases[basis]), basis))]


def give_qualities(entries: Sequence[Contestant], priors: Sequence[Prior]) -> None:
    known = qualities([entry.measurement for entry in entries], priors)
    for entry in entries:
        entry.quality = known.get(entry.id)


def limits_broken(policy: Policy, entry: Contestant) -> list[str]:
    """Which hard limits of the policy this candidate breaks, in words."""
    broken = []
    if policy.min_quality is not None:
        if entry.quality is None:
            broken.append(f"quality is not known, the policy asks for at least {policy.min_quality:g}")
        elif entry.quality.value < policy.min_quality - 1e-9:
            broken.append(
                f"{entry.quality.metric} {entry.quality.value:.4g} is below min_quality {policy.min_quality:g}"
            )
    p95 = entry.measurement.p95_ms
    if policy.max_latency_ms is not None and p95 is not None and p95 > policy.max_latency_ms:
        broken.append(f"p95 {p95:.3g} ms is over max_latency_ms {policy.max_latency_ms:g}")
    return broken


def _latency_step(entries: list[Contestant]) -> list[Contestant] | None:
    """Who is as fast as the fastest. The fastest is who has the lowest p50 and is not beaten round by round."""
    timed = sorted(
        (e for e in entries if e.measurement.p50_ms), key=lambda e: (e.measurement.p50_ms or 0, e.rank, e.id)
    )
    if not timed:
        return None
    best = timed[0]
    for entry in timed[1:]:
        if compare_latency(entry.measurement, best.measurement).faster:
            best = entry
    stayed = []
    for entry in entries:
        if not entry.measurement.p50_ms:
            entry.unknown.append("its latency is not known")
            continue
        other, seen = _clearest(entry, best, timed)
        if _note(entry, other, Gap("latency", other.id, seen.ratio - 1, seen.noise, seen.rounds)):
            stayed.append(entry)
    return stayed


def _clearest(entry: Contestant, best: Contestant, timed: Sequence[Contestant]) -> tuple[Contestant, Comparison]:
    """``entry`` against ``best``, or against another one that it is surely far behind where ``best`` leaves it open.

    A trial drops who is far behind. Such a candidate shares few rounds with a best that shows only later, and must not
    come back for want of rounds.
    """
    seen = compare_latency(entry.measurement, best.measurement)
    if seen.tie:
        for other in timed:
            if far_behind(entry.measurement, other.measurement):
                return other, compare_latency(entry.measurement, other.measurement)
    return best, seen


def far_behind(mine: Measurement, other: Measurement) -> bool:
    """Whether ``mine`` surely takes ``FAR_BEHIND`` times as long as ``other``; not when one of them was never timed."""
    if not mine.p50_ms or not other.p50_ms:
        return False
    seen = compare_latency(mine, other)
    return seen.low >= FAR_BEHIND and not seen.tie


def compare_latency(mine: Measurement, other: Measurement) -> Comparison:
    """``mine`` against ``other``: round by round within one session, else by p50 with a wide margin.

    ValueError when one of them has no latency.
    """
    if not mine.p50_ms or not other.p50_ms:
        raise ValueError("cannot compare latencies: one was not measured")
    paired = compare_rounds(mine.round_ms, other.round_ms) if mine.session == other.session else None
    return paired or compare_unpaired(mine.p50_ms, other.p50_ms)


def _energy_step(entries: list[Contestant]) -> list[Contestant] | None:
    """Who takes as little energy as the best; None when not all were measured or all estimated: nothing to compare."""
    sources = {entry.measurement.energy_source for entry in entries}
    if len(sources) != 1 or not all(entry.measurement.joules and entry.measurement.p50_ms for entry in entries):
        return None
    ordered = sorted(entries, key=lambda e: (e.measurement.joules or 0, e.rank, e.id))

    def compare(entry: Contestant) -> tuple[Contestant, Gap]:
        best, seen = _clearest(entry, ordered[0], ordered)
        # An estimate is watts x time: its noise is the latency's, and the watts' ratio is exact. A sensor integrates
        # over the same time, with a resolution of its own.
        if sources == {"estimated"}:
            worse_by = seen.ratio * _watts(entry) / _watts(best) - 1
            return best, Gap("energy", best.id, worse_by, seen.noise, seen.rounds)
        worse_by = (entry.measurement.joules or 0) / (best.measurement.joules or 1) - 1
        return best, Gap("energy", best.id, worse_by, max(ENERGY_FLOOR, seen.noise), seen.rounds)

    return [entry for entry in entries if _note(entry, *compare(entry))]


def _watts(entry: Contestant) -> float:
    return (entry.measurement.joules or 0) / (entry.measurement.p50_ms or 1)


def _memory_step(entries: list[Contestant]) -> list[Contestant] | None:
    """Who peaks as low as the lowest; candidates without a figure are beaten by those with one."""
    known = [entry.measurement.peak_mb for entry in entries if entry.measurement.peak_mb is not None]
    if not known:
        return None
    least = max(min(known), 1e-6)
    noise = max(MEMORY_FLOOR, MEMORY_FLOOR_MB / least)
    best = next(entry for entry in entries if entry.measurement.peak_mb == min(known))
    stayed = []
    for entry in entries:
        peak = entry.measurement.peak_mb
        if peak is None:
            entry.unknown.append("its memory is not known")
        elif _note(entry, best, Gap("memory", best.id, peak / least - 1, noise)):
            stayed.append(entry)
    return stayed


def _accuracy_step(entries: list[Contestant]) -> list[Contestant] | None:
    """Who answers as well as the best; candidates without a quality are beaten by those with one."""
    known = [entry.quality.value for entry in entries if entry.quality]
    if not known:
        return None
    top = max(known)
    scale = max(abs(top), 1e-12)
    best = next(entry for entry in entries if entry.quality and entry.quality.value == top)
    stayed = []
    for entry in entries:
        if entry.quality is None:
            entry.unknown.append("its quality is not known")
        elif _note(entry, best, Gap("accuracy", best.id, (top - entry.quality.value) / scale, QUALITY_FLOOR)):
            stayed.append(entry)
    return stayed


STEPS: Mapping[Criterion, Callable[[list[Contestant]], list[Contestant] | None]] = {
    "latency": _latency_step,
    "accuracy": _accuracy_step,
    "energy": _energy_step,
    "memory": _memory_step,
}


def _note(entry: Contestant, best: Contestant, gap: Gap) -> bool:
    """Write the gap down; whether the candidate stays in."""
    if entry is best:
        gap = replace(gap, worse_by=0.0)
    elif entry.measurement.key == best.measurement.key:
        # One file under two names: whatever difference shows between them is noise by definition.
        gap = replace(gap, noise=max(gap.noise, gap.worse_by))
    entry.gaps.append(gap)
    return gap.tie
