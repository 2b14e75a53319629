"""The choice: measurements and a policy in, one winner and the story of each candidate out.

The policy names the first criterion; what is alike within the measured noise goes on to the next criterion of the
chain, and what is alike to the end is decided by the prior, so that the same device answers the same every time. At
each step candidates are compared with the best of that step only: adding a worse one changes nothing, order of input
neither.

Hard limits come first: a trial's rejection, ``min_quality`` and ``max_latency_ms`` (held against the 95th percentile)
exclude, and when they exclude all there is no winner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agent.bundles.manifest import Policy
from agent.selection.criteria import (
    CHAINS,
    STEPS,
    Contestant,
    Criterion,
    Gap,
    QualityValue,
    compare_latency,
    contestants,
    far_behind,
    give_qualities,
    limits_broken,
)
from agent.selection.measurements import Measurement
from agent.selection.noise import Comparison
from agent.selection.prior import Prior

Status = Literal["winner", "lost", "excluded", "rejected", "untried"]


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


def choose(policy: Policy, measurements: Sequence[Measurement], priors: Sequence[Prior] = ()) -> Decision:
    """The best candidate by ``policy`` among what was measured.

    ``priors`` is best first (``rank_by_prior``): it gives the declared qualities and breaks the last tie; candidates in
    it without a measurement become rows ``untried``. Of two measurements of one candidate the last counts.
    """
    entries = contestants(measurements, priors)
    running = [entry for entry in entries if entry.measurement.ok]
    give_qualities(running, priors)
    for entry in running:
        entry.broken = limits_broken(policy, entry)
    allowed = [entry for entry in running if not entry.broken]
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
        reasons=_reasons(entries, running, winner, decided_by),
    )


def _narrow(
    chain: Sequence[Criterion], entries: Sequence[Contestant]
) -> tuple[list[Contestant], str, list[Contestant]]:
    """Who is left (winner first), the criterion that decided, and who was alike on the first that could tell."""
    left, ties = list(entries), list(entries)
    if len(left) <= 1:
        return left, "only" if left else "nothing", ties
    first = True
    for criterion in chain:
        stayed = STEPS[criterion](left)
        if stayed is None:
            continue
        if first:
            ties, first = stayed, False
        left = stayed
        if len(left) == 1:
            return left, criterion, ties
    return left, "prior", ties


def _row(entry: Contestant, winner: Contestant | None) -> Row:
    measurement = entry.measurement
    status: Status = "winner" if entry is winner else "excluded" if entry.broken else "lost"
    reasons = (*entry.broken, *entry.unknown)
    if not measurement.ok:
        status, reasons = "rejected", (measurement.reason or "rejected by the trial",)
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
    entries: Sequence[Contestant], running: Sequence[Contestant], winner: Contestant | None, decided_by: str
) -> tuple[str, ...]:
    """The decision in a sentence or two."""
    if winner is None:
        if not entries:
            return ("nothing was measured",)
        if not running:
            return ("no candidate passed its trial",)
        closest = min(running, key=lambda entry: (len(entry.broken), entry.measurement.p95_ms or 0, entry.id))
        return (f"no candidate keeps the policy's limits; closest is {closest.id}: {'; '.join(closest.broken)}",)
    if decided_by == "only":
        return ("the only candidate that runs within the policy",)
    alike = [gap.criterion for gap in winner.gaps if gap.criterion != decided_by]
    first = "first by the prior" if decided_by == "prior" else f"best in {decided_by}"
    return (f"{first} after a tie in {', '.join(alike)}" if alike else first,)


#: Rounds before anything is decided.
FEWEST_ROUNDS = 11
#: Share of the latency limit below which a 95th percentile will not come to exceed it by mere noise.
WELL_WITHIN = 0.8


def contenders(policy: Policy, measurements: Sequence[Measurement], priors: Sequence[Prior] = ()) -> frozenset[str]:
    """The candidates that may still win, by id: a trial spares itself further rounds of the others.

    Only what no further round is likely to change drops out: a rejection, a quality below the limit, a median over the
    latency limit, and being beaten by a candidate that is well within the limits: for latency and energy surely
    ``FAR_BEHIND`` it, for accuracy and memory, whose figures do not depend on rounds, beaten at all.
    """
    entries = [entry for entry in contestants(measurements, priors) if entry.measurement.ok]
    give_qualities(entries, priors)
    limit = policy.max_latency_ms or math.inf
    good_enough = policy.model_copy(update={"max_latency_ms": None})
    left = [e for e in entries if not limits_broken(good_enough, e) and (e.measurement.p50_ms or 0) <= limit]
    safe = [entry for entry in left if (entry.measurement.p95_ms or 0) <= WELL_WITHIN * limit]
    if not safe:
        return frozenset(entry.id for entry in left)
    if policy.prefer in ("latency", "energy"):
        timed = [entry.measurement for entry in safe if entry.measurement.p50_ms]
        fastest = min(timed, key=lambda m: (m.p50_ms or 0, m.candidate_id), default=None)
        stay = [entry for entry in left if fastest is None or not far_behind(entry.measurement, fastest)]
    else:
        beaten_by_none = STEPS[policy.prefer]
        stay = [entry for entry in left if entry in (beaten_by_none([*safe, entry]) or left)]
    return frozenset(entry.id for entry in stay)


def more_rounds_needed(
    measurements: Sequence[Measurement],
    done: int,
    max_rounds: int,
    policy: Policy | None = None,
    priors: Sequence[Prior] = (),
) -> bool:
    """Whether another round could change the choice: asked by the trial after each round.

    No, once ``max_rounds`` are done, or when each candidate that may still win is either surely slower than the fastest
    by more than the floor, or surely not. ``FEWEST_ROUNDS`` always run.
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
    return any(_unsettled(compare_latency(m, best)) for m in timed if m.key != best.key)


def _unsettled(seen: Comparison) -> bool:
    """The interval reaches across the line that separates slower from alike: another round may move it to one side."""
    return seen.low <= 1 + seen.floor <= seen.high
