"""Counters of one model: cheap enough for every request, read by statistics and metrics."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field

#: Upper bounds of the latency histogram in seconds (Prometheus ``le``), doubling from 50 µs to 26 s.
BOUNDS_S = tuple(50e-6 * 2**step for step in range(20))


@dataclass(slots=True)
class ModelStatistics:
    """Counts since start; times in whole microseconds.

    Written from worker threads without a lock: each step is one bytecode-sized addition, and a count lost in a race
    would be off by one in a monitor, never in an answer.
    """

    success: int = 0
    failures: int = 0
    queue_us: int = 0
    compute_us: int = 0
    last_inference_ms: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))

    def answered(self, queue_us: int, compute_us: int) -> None:
        """Count an answer."""
        self.success += 1
        self.queue_us += queue_us
        self.compute_us += compute_us
        self.last_inference_ms = int(time.time() * 1e3)
        self.buckets[bisect_left(BOUNDS_S, (queue_us + compute_us) / 1e6)] += 1

    def failed(self) -> None:
        """Count a run that raised."""
        self.failures += 1
