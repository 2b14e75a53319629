"""The choice: measurements and a policy in, one winner and the story of each candidate out.

The policy names the first criterion; what is alike within the measured noise goes on to the next criterion of the
chain, and what is alike to the end is decided by the prior, so that the same device answers the same every time. At
each step candidates are compared with the best of that step only: adding a worse one changes nothing, order of input
neither.

Hard limits come first: a trial's rejection, ``min_quality`` and ``max_latency_ms`` (held against the 95th percentile)
exclude, and when they exclude all there is no winner.
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

Status = Literal["winner", "lost", "excluded", "rejected", "untried"]
QualitySource = Literal["declared", "measured"]


@dataclass(frozen=True, slots=True)
class QualityValue:
    """A quality, higher is better, and where it comes from. ``max_abs`` is turned round: -0.01 is better than -0.1."""

    value: float
    metric: str
    source: QualitySource


@dataclass(frozen=True, slots=True)
class Gap:
    """How much worse than the best of its step a candidate is (``worse_by`` 0.2 = 20 %), and the noise in that."""

    criterion: Criterion
    worse_by: float
    noise: float
    rounds: int = 0

    @property
    def tie(self) -> bool:
        """Whether the difference is within the noise."""
        return self.worse_by <= self.noise


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate's part in the decision. ``gaps`` holds one entry for each step that it took part in.

    ``vs_winner`` compares its latency with the winner's, whatever the policy prefers.
    """

    candidate_id: str
    status: Status
    measurement: Measurement | None = None
    quality: QualityValue | None = None
    gaps: tuple[Gap, ...] = ()
    reasons: tuple[str, ...] = ()
    vs_winner: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """``winner`` is a candidate id, None when nothing may run; ``ties`` are alike with it on the policy's criterion.

    ``decided_by`` is the criterion that left one candidate, ``prior`` when none did, ``only`` when there was one.
    """

    winner: str | None
    decided_by: str
    rows: tuple[Row, ...]
    ties: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def row(self, candidate_id: str) -> Row:
        """That candidate's row; KeyError when it took no part."""
        for row in self.rows:
            if row.candidate_id == candidate_id:
                return row
        raise KeyError(candidate_id)


@dataclass(slots=True)
class _Entry:
    """A candidate while the choice is being made."""

    id: str
    measurement: Measurement
    rank: int
    quality: QualityValue | None = None
    gaps: list[Gap] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def choose(policy: Policy, measurements: Sequence[Measurement], priors: Sequence[Prior] = ()) -> Decision:
    """The best candidate by ``policy`` among what was measured.

    ``priors`` is best first (``rank_by_prior``): it gives the declared qualities and breaks the last tie; candidates in
    it without a measurement become rows ``untried``. Of two measurements of one candidate the last counts.
    """
    entries = _entries(measurements, priors)
    running = [entry for entry in entries if entry.measurement.ok]
    _give_qualities(running, priors)
    for entry in running:
        entry.reasons.extend(_limits_broken(policy, entry))
    allowed = [entry for entry in running if not entry.reasons]
    left, decided_by, ties = _narrow(CHAINS[policy.prefer], allowed)
    winner = left[0] if left else None
    measured = {entry.id for entry in entries}
    rows = [_row(entry, winner) for entry in entries]
    rows += [
        Row(prior.candidate.id, "untried", reasons=("not measured",))
        for prior in priors
        if prior.candidate.id not in measured
    ]
    return Decision(
        winner=winner.id if winner else None,
        decided_by=decided_by,
        rows=tuple(rows),
        ties=tuple(entry.id for entry in ties if entry is not winner),
        reasons=_reasons(policy, entries, running, winner, decided_by),
    )


def _entries(measurements: Sequence[Measurement], priors: Sequence[Prior]) -> list[_Entry]:
    """One entry a candidate, in the prior's order, then by name: the order of the input never matters."""
    ranks = {prior.candidate.id: rank for rank, prior in enumerate(priors)}
    latest = {measurement.candidate_id: measurement for measurement in measurements}
    entries = [_Entry(name, measurement, ranks.get(name, len(ranks))) for name, measurement in latest.items()]
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
            stands = seen if seen and said.metric == metric else QualityValue(said.value, said.metric, "declared")
            bases.setdefault((0, said.metric), {})[name] = stands
    if not bases:
        return {}
    return bases[min(bases, key=lambda basis: (-len(bases[basis]), basis))]


def _give_qualities(entries: Sequence[_Entry], priors: Sequence[Prior]) -> None:
    known = qualities([entry.measurement for entry in entries], priors)
    for entry in entries:
        entry.quality = known.get(entry.id)


def _limits_broken(policy: Policy, entry: _Entry) -> list[str]:
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


def _narrow(chain: Sequence[Criterion], entries: Sequence[_Entry]) -> tuple[list[_Entry], str, list[_Entry]]:
    """Who is left (winner first), the criterion that decided, and who was alike on the first that could tell."""
    left, ties = list(entries), list(entries)
    if len(left) <= 1:
        return left, "only" if left else "nothing", ties
    first = True
    for criterion in chain:
        stayed = _COMPARE[criterion](left)
        if stayed is None:
            continue
        if first:
            ties, first = stayed, False
        left = stayed
        if len(left) == 1:
            return left, criterion, ties
    return left, "prior", ties


def _latency_step(entries: list[_Entry]) -> list[_Entry] | None:
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
            entry.reasons.append("its latency is not known")
            continue
        seen = compare_latency(entry.measurement, best.measurement)
        if _note(entry, best, Gap("latency", seen.ratio - 1, seen.noise, seen.rounds)):
            stayed.append(entry)
    return stayed


def compare_latency(mine: Measurement, other: Measurement) -> Comparison:
    """``mine`` against ``other``: round by round within one session, else by p50 with a wide margin.

    ValueError when one of them has no latency.
    """
    if not mine.p50_ms or not other.p50_ms:
        raise ValueError("cannot compare latencies: one was not measured")
    paired = compare_rounds(mine.round_ms, other.round_ms) if mine.session == other.session else None
    return paired or compare_unpaired(mine.p50_ms, other.p50_ms)


def _energy_step(entries: list[_Entry]) -> list[_Entry] | None:
    """Who takes as little energy as the best; None when not all were measured or all estimated: nothing to compare."""
    sources = {entry.measurement.energy_source for entry in entries}
    if len(sources) != 1 or not all(entry.measurement.joules and entry.measurement.p50_ms for entry in entries):
        return None
    best = min(entries, key=lambda e: (e.measurement.joules or 0, e.rank, e.id))

    def gap(entry: _Entry) -> Gap:
        seen = compare_latency(entry.measurement, best.measurement)
        # An estimate is watts x time: its noise is the latency's, and the watts' ratio is exact. A sensor integrates
        # over the same time, with a resolution of its own.
        if sources == {"estimated"}:
            return Gap("energy", seen.ratio * _watts(entry) / _watts(best) - 1, seen.noise, seen.rounds)
        worse_by = (entry.measurement.joules or 0) / (best.measurement.joules or 1) - 1
        return Gap("energy", worse_by, max(ENERGY_FLOOR, seen.noise), seen.rounds)

    return [entry for entry in entries if _note(entry, best, gap(entry))]


def _watts(entry: _Entry) -> float:
    return (entry.measurement.joules or 0) / (entry.measurement.p50_ms or 1)


def _memory_step(entries: list[_Entry]) -> list[_Entry] | None:
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
            entry.reasons.append("its memory is not known")
        elif _note(entry, best, Gap("memory", peak / least - 1, noise)):
            stayed.append(entry)
    return stayed


def _accuracy_step(entries: list[_Entry]) -> list[_Entry] | None:
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
            entry.reasons.append("its quality is not known")
        elif _note(entry, best, Gap("accuracy", (top - entry.quality.value) / scale, QUALITY_FLOOR)):
            stayed.append(entry)
    return stayed


_COMPARE: Mapping[Criterion, Callable[[list[_Entry]], list[_Entry] | None]] = {
    "latency": _latency_step,
    "accuracy": _accuracy_step,
    "energy": _energy_step,
    "memory": _memory_step,
}


def _note(entry: _Entry, best: _Entry, gap: Gap) -> bool:
    """Write the gap down; whether the candidate stays in."""
    if entry is best:
        gap = replace(gap, worse_by=0.0)
    entry.gaps.append(gap)
    return gap.tie


def _row(entry: _Entry, winner: _Entry | None) -> Row:
    measurement = entry.measurement
    status: Status = "lost"
    reasons = tuple(entry.reasons)
    if not measurement.ok:
        status, reasons = "rejected", (measurement.reason or "rejected by the trial",)
    elif entry is winner:
        status = "winner"
    elif not entry.gaps and reasons:
        status = "excluded"
    comparable = winner is not None and winner.measurement.p50_ms and measurement.p50_ms
    return Row(
        entry.id,
        status,
        measurement,
        entry.quality,
        tuple(entry.gaps),
        reasons,
        compare_latency(measurement, winner.measurement) if winner and comparable else None,
    )


def _reasons(
    policy: Policy, entries: Sequence[_Entry], running: Sequence[_Entry], winner: _Entry | None, decided_by: str
) -> tuple[str, ...]:
    """The decision in a sentence or two."""
    if winner is None:
        if not entries:
            return ("nothing was measured",)
        if not running:
            return ("no candidate passed its trial",)
        closest = min(running, key=lambda entry: (len(entry.reasons), entry.measurement.p95_ms or 0, entry.id))
        return (f"no candidate keeps the policy's limits; closest is {closest.id}: {'; '.join(closest.reasons)}",)
    if decided_by == "only":
        return (f"{winner.id} is the only candidate that may run",)
    alike = [gap.criterion for gap in winner.gaps if gap.criterion != decided_by]
    after = f" after a tie in {' and '.join(alike)}" if alike else ""
    if decided_by == "prior":
        return (f"policy {policy.prefer}: {winner.id} comes first by the prior{after}",)
    return (f"policy {policy.prefer}: {winner.id} is best in {decided_by}{after}",)


#: Rounds before anything is decided, and rounds after which a candidate that is far behind need not run any more.
FEWEST_ROUNDS = 9
FAR_BEHIND = 1.25


def contenders(policy: Policy, measurements: Sequence[Measurement], priors: Sequence[Prior] = ()) -> frozenset[str]:
    """The candidates that may still win, by id: a trial spares itself further rounds of the others.

    Only what no further round can change drops out: a rejection, a quality below the limit, and with a policy for
    latency or energy being surely ``FAR_BEHIND`` the fastest of those left. With a policy for accuracy or memory, whose
    figures do not depend on rounds, it is being beaten in that.
    """
    entries = [entry for entry in _entries(measurements, priors) if entry.measurement.ok]
    _give_qualities(entries, priors)
    no_latency_limit = policy.model_copy(update={"max_latency_ms": None})
    left = [entry for entry in entries if not _limits_broken(no_latency_limit, entry)]
    if policy.prefer in ("latency", "energy"):
        timed = [entry for entry in left if entry.measurement.p50_ms]
        within = [entry for entry in timed if not _limits_broken(policy, entry)]
        if within:
            best = min(within, key=lambda e: (e.measurement.p50_ms or 0, e.rank, e.id)).measurement
            left = [
                e for e in left if not e.measurement.p50_ms or compare_latency(e.measurement, best).low < FAR_BEHIND
            ]
    elif policy.max_latency_ms is None:
        left = _COMPARE[policy.prefer](left) or left
    return frozenset(entry.id for entry in left)


def more_rounds_needed(
    measurements: Sequence[Measurement],
    done: int,
    max_rounds: int,
    policy: Policy | None = None,
    priors: Sequence[Prior] = (),
) -> bool:
    """Whether another round could change the choice: asked by the trial after each round.

    No, once ``max_rounds`` are done, or when each candidate that may still win is either surely slower than the fastest
    by more than the floor, or known to be alike with it as precisely as the floor asks. ``FEWEST_ROUNDS`` always run.
    """
    if done >= max_rounds:
        return False
    if done < FEWEST_ROUNDS:
        return True
    policy = policy or Policy()
    still = contenders(policy, measurements, priors)
    timed = [m for m in measurements if m.candidate_id in still and m.p50_ms]
    if len(timed) < 2:
        return False
    best = min(timed, key=lambda m: (m.p50_ms or 0, m.candidate_id))
    return any(_unsettled(compare_latency(m, best)) for m in timed if m is not best)


def _unsettled(seen: Comparison) -> bool:
    """Neither surely different nor surely alike: the interval reaches across the line that separates the two."""
    surely_slower = seen.low > 1 + seen.floor
    surely_alike = seen.noise <= seen.floor and seen.high <= 1 + 2 * seen.floor
    return not surely_slower and not surely_alike
