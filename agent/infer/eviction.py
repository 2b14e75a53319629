"""What goes when room is needed: whatever is worth least for its bytes. Pure.

The worth of a byte is what its loss would cost: the measured seconds to get it back, times how often it is asked for,
over its size, on top of an age that rises with each eviction, so that what is no longer used goes in the end
(GreedyDual-Size with frequency; Cherkasova 1998). docs/decisions/eviction-order.md has the figures beside other orders.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from agent.infer.tiers import Name

#: Counts of uses are halved every so many uses: what was popular last week is not for ever.
_HALVED_EVERY = 4096
#: Even what costs nothing is worth something: then the order is that of the last use.
_LEAST_COST_S = 1e-6


class Held(Protocol):
    """Something that can be let go of: a session or a plaintext."""

    score: float
    used_at: float


_H = TypeVar("_H", bound=Held)


class Worth:
    """Scores of what is held. ``used`` at each use, ``lost`` for what was evicted."""

    def __init__(self) -> None:
        self._age = 0.0
        self._uses: dict[Name, float] = {}
        self._counted = 0

    def used(self, name: Name) -> None:
        """One more use."""
        self._uses[name] = self._uses.get(name, 0.0) + 1.0
        self._counted += 1
        if self._counted >= _HALVED_EVERY:
            self._counted = 0
            self._uses = {key: uses / 2 for key, uses in self._uses.items() if uses > 0.1}

    def score(self, name: Name, cost_s: float, size: int) -> float:
        """What a byte of it is worth now; ``cost_s`` to have it back."""
        return self._age + self._uses.get(name, 0.0) * max(cost_s, _LEAST_COST_S) / max(size, 1)

    def lost(self, score: float) -> None:
        """Something of that worth was let go of: whatever is used from now on counts for more than it did."""
        self._age = max(self._age, score)

    def forget(self, name: Name) -> None:
        """It is no longer installed."""
        self._uses.pop(name, None)


def choose(
    candidates: Iterable[_H],
    short: int,
    size_of: Callable[[_H], int],
    behind: Callable[[_H], _H | None],
    users_of: Callable[[_H], int],
) -> list[_H]:
    """The least worthy that free ``short`` bytes, in the order of going, without any that is not needed.

    Everything that there is when that is too little. ``behind`` tells what a candidate uses, which can go only after
    all of its users.
    """
    heap = [(held.score, held.used_at, index, held) for index, held in enumerate(candidates)]
    heapq.heapify(heap)
    chosen: list[_H] = []
    users: Counter[int] = Counter()
    freed, pushed = 0, len(heap)
    while freed < short and heap:
        held = heapq.heappop(heap)[3]
        chosen.append(held)
        freed += size_of(held)
        if (then := behind(held)) is not None:
            users[id(then)] += 1
            if users[id(then)] == users_of(then):
                heapq.heappush(heap, (then.score, then.used_at, pushed, then))
                pushed += 1
    return _needed(chosen, freed - short, size_of, behind)


def _needed(chosen: list[_H], spare: int, size_of: Callable[[_H], int], behind: Callable[[_H], _H | None]) -> list[_H]:
    """Without those that the spare bytes make superfluous, the worthiest first."""
    needed = list(chosen)
    for held in sorted(chosen, key=lambda one: (one.score, one.used_at), reverse=True):
        then = behind(held)
        if size_of(held) <= spare and not any(other is then for other in needed):
            spare -= size_of(held)
            needed = [other for other in needed if other is not held]
    return needed
