"""When two latencies are different, and when the difference is noise.

A digits-sized network runs in 20 µs, and two identical copies of it differ in every single trial. So a difference
counts only when it is larger than both a floor, which stands for what never averages out (code and heap placement of
one process), and the uncertainty of the median of the round-by-round ratios, which rounds do average out.

The uncertainty is distribution-free: the sign-test interval of the median, made of order statistics of the log ratios
(W. R. Thompson 1936; David and Nagaraja, "Order Statistics", 7.1). It holds for heavy tails, drift common to both and
bursts, asks for no normal distribution, and at ``LEVEL`` errs once in a thousand comparisons of equal candidates even
where the floor does not already absorb it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

#: Relative difference below which two candidates are alike however long one measures.
FLOOR = 0.03
#: The same in milliseconds: a request over the socket costs some 20 times that, so nobody could tell.
FLOOR_MS = 0.002
#: Across sessions nothing cancels: another temperature, another clock, other neighbours.
UNPAIRED_FLOOR = 0.10
#: Two-sided confidence of the interval around the median ratio.
LEVEL = 0.999
#: Fewer rounds than this cannot give an interval of that level (2 * 0.5**11 = 0.001).
ROUNDS_FOR_LEVEL = 11


@dataclass(frozen=True, slots=True)
class Comparison:
    """One candidate against another: ``ratio`` of latencies (1.2 = takes 20 % longer), and the noise in it.

    ``low``/``high`` enclose the true ratio at ``LEVEL``. ``noise`` is the relative difference up to which the two are
    a tie, ``floor`` the part of it that no further round lowers; ``rounds`` the pairs of rounds behind it, 0 when the
    two were never measured together.
    """

    ratio: float
    low: float
    high: float
    noise: float
    floor: float
    rounds: int

    @property
    def tie(self) -> bool:
        """Whether the difference is within the noise, in either direction."""
        return abs(math.log(self.ratio)) <= math.log1p(self.noise)

    @property
    def slower(self) -> bool:
        """Whether the first takes longer, beyond the noise."""
        return self.ratio > 1 and not self.tie

    @property
    def faster(self) -> bool:
        """Whether the first takes less time, beyond the noise."""
        return self.ratio < 1 and not self.tie


def compare_rounds(mine: Sequence[float | None], other: Sequence[float | None]) -> Comparison | None:
    """``mine`` against ``other``, round by round (ms; None = did not run); None when they share no round."""
    pairs = [(a, b) for a, b in zip(mine, other, strict=False) if a and b]
    if not pairs:
        return None
    logs = sorted(math.log(a / b) for a, b in pairs)
    middle = median(logs)
    low, high = _median_interval(logs)
    floor = max(FLOOR, FLOOR_MS / median(b for _, b in pairs))
    # Only the side that faces equality matters: a burst that once made the slower one slower still is no doubt of it.
    facing = middle - low if middle > 0 else high - middle
    return Comparison(
        ratio=math.exp(middle),
        low=math.exp(low),
        high=math.exp(high),
        noise=max(floor, math.expm1(facing)),
        floor=floor,
        rounds=len(pairs),
    )


def compare_unpaired(mine_ms: float, other_ms: float) -> Comparison:
    """Latencies of different sessions: only large differences count."""
    ratio = mine_ms / other_ms
    noise = max(UNPAIRED_FLOOR, FLOOR_MS / other_ms)
    return Comparison(ratio, ratio / (1 + noise), ratio * (1 + noise), noise, noise, 0)


def _median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The interval of ``LEVEL`` around the median; wider than the data where the rounds are too few for that level."""
    count = len(ordered)
    rank = _sign_test_rank(count)
    if rank > 0:
        return ordered[rank - 1], ordered[count - rank]
    # Too few for the level: the range, stretched by how much of the level is missing. One round tells nothing at all.
    if count == 1:
        return -math.inf, math.inf
    spread = (ordered[-1] - ordered[0]) * ROUNDS_FOR_LEVEL / count
    middle = median(ordered)
    return min(ordered[0], middle - spread), max(ordered[-1], middle + spread)


@lru_cache(maxsize=256)
def _sign_test_rank(count: int) -> int:
    """The largest *k* with P(Binomial(count, 1/2) < k) <= (1 - LEVEL) / 2; 0 when even the extremes are too close."""
    allowed = (1 - LEVEL) / 2 * (1 + 1e-9)
    tail, rank = 0.0, 0
    for k in range(count // 2):
        tail += math.comb(count, k) / 2.0**count
        if tail > allowed:
            break
        rank = k + 1
    return rank
