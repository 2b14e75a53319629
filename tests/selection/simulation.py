"""A device that exists only as numbers: candidates with true latencies, and everything that disturbs measuring them.

What is imitated, because each has fooled a benchmark somewhere: a level that drifts (heat, clock), bursts of a foreign
process that hit whoever runs just then, heavy tails of single runs, a placement bias that a process keeps for its life,
and throttling that makes everything slower from some round on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.bundles.manifest import Policy
from agent.selection.choice import Decision, choose, contenders, more_rounds_needed
from agent.selection.measurements import Measurement, estimated_joules, measurement_key
from agent.selection.prior import Prior


def key(digest: str = "d", **changes: Any) -> Any:
    """A measurement key; what is not named is the same for all."""
    usual: dict[str, Any] = {
        "variant_digest": digest,
        "runtime": "onnx",
        "runtime_version": "1.32.0",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "features": {"avx2": True, "avx512_vnni": False},
    }
    return measurement_key(**{**usual, **changes})


@dataclass(frozen=True)
class Truth:
    """A candidate as it really is: undisturbed latency (ms), peak memory (MB), agreement, watts while it runs."""

    id: str
    ms: float
    peak_mb: float = 50.0
    agreement: float = 0.99
    watts: float = 4.0


@dataclass(frozen=True)
class Disturbance:
    """How unfriendly the device is; shares are of the latency, chances are a round's or a run's."""

    run: float = 0.02
    tail: float = 0.05
    round: float = 0.008
    drift: float = 0.01
    burst: float = 0.08
    placement: float = 0.01
    throttled_from: int | None = None


CALM = Disturbance(run=0.005, tail=0.01, round=0.002, drift=0.001, burst=0.0, placement=0.003)
USUAL = Disturbance()
ROUGH = Disturbance(run=0.05, tail=0.15, round=0.015, drift=0.03, burst=0.2, placement=0.02, throttled_from=8)


@dataclass
class Device:
    """A device that runs candidates in interleaved rounds, each process anew every ``process_rounds`` rounds."""

    truths: Sequence[Truth]
    seed: int
    disturbance: Disturbance = USUAL
    process_rounds: int = 6
    runs: int = 9
    least: int = 12
    most: int = 48
    level: float = field(default=0.0, init=False)
    rounds: dict[str, list[list[float] | None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self.rounds = {truth.id: [] for truth in self.truths}
        self._bias: dict[str, float] = {}

    def run_round(self, ids: frozenset[str]) -> None:
        """One round of every candidate in ``ids``; the others sit it out."""
        rng, how = self._rng, self.disturbance
        done = len(next(iter(self.rounds.values())))
        if done % self.process_rounds == 0:
            self._bias = {truth.id: rng.gauss(0, how.placement) for truth in self.truths}
        self.level += rng.gauss(0, how.drift)
        if how.throttled_from is not None and done == how.throttled_from:
            self.level += 0.4
        order = list(self.truths)
        turn = done % len(order)
        for truth in order[turn:] + order[:turn]:
            self.rounds[truth.id].append(self._samples(truth) if truth.id in ids else None)

    def _samples(self, truth: Truth) -> list[float]:
        rng, how = self._rng, self.disturbance
        burst = rng.expovariate(2.0) if rng.random() < how.burst else 0.0
        level = self.level + self._bias[truth.id] + rng.gauss(0, how.round) + burst
        samples = []
        for _ in range(self.runs):
            tail = rng.paretovariate(2.0) - 1 if rng.random() < how.tail else 0.0
            samples.append(truth.ms * math.exp(level + abs(rng.gauss(0, how.run))) * (1 + tail))
        return samples

    def measurements(self) -> list[Measurement]:
        """What has been measured so far, as the trial gives it."""
        made = []
        for truth in self.truths:
            rounds = self.rounds[truth.id]
            common = {"peak_mb": truth.peak_mb, "agreement": truth.agreement, "agreement_metric": "cosine"}
            plain = Measurement.from_samples(truth.id, key(truth.id), "s", rounds, **common)
            joules = estimated_joules(truth.watts, plain.p50_ms or 0)
            made.append(
                Measurement.from_samples(
                    truth.id, key(truth.id), "s", rounds, **common, joules=joules, energy_source="estimated"
                )
            )
        return made

    def trial(self, policy: Policy, priors: Sequence[Prior] = ()) -> list[Measurement]:
        """Rounds until the choice is clear, as a real trial runs them; candidates that are out sit the rest out."""
        ids = frozenset(truth.id for truth in self.truths)
        for _ in range(self.least):
            self.run_round(ids)
        done = self.least
        while more_rounds_needed(self.measurements(), done, self.most, policy, priors):
            self.run_round(contenders(policy, self.measurements(), priors))
            done += 1
        return self.measurements()


def chosen(truths: Sequence[Truth], policy: Policy, seed: int, disturbance: Disturbance = USUAL) -> Decision:
    """One trial on a fresh device, and what is chosen after it."""
    return choose(policy, Device(truths, seed, disturbance).trial(policy))


def regret(winner: Truth, truths: Sequence[Truth], policy: Policy) -> float:
    """How much worse than the truly best the winner is by the policy's own measure, as a share.

    Candidates outside the policy's limits do not count as best; a winner outside them is infinitely wrong.
    """
    allowed = [
        truth for truth in truths
        if (policy.min_quality is None or truth.agreement >= policy.min_quality)
        and (policy.max_latency_ms is None or truth.ms <= policy.max_latency_ms)
    ]  # fmt: skip
    if winner not in allowed:
        return math.inf
    if policy.prefer == "accuracy":
        best = max(truth.agreement for truth in allowed)
        return (best - winner.agreement) / best
    cost = {
        "latency": lambda truth: truth.ms,
        "memory": lambda truth: truth.peak_mb,
        "energy": lambda truth: truth.ms * truth.watts,
    }[policy.prefer]
    return cost(winner) / min(cost(truth) for truth in allowed) - 1
