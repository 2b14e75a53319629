"""The requests of one model that come most often, and the inputs of the hottest: what is re-warmed. Pure.

A table of fixed length (space-saving: Metwally et al. 2005): who is new takes the place of whoever was seen least, and
inherits that count as its possible error. So a flood of inputs that never come again displaces nothing but each other.
Counts are halved now and then. Inputs are copied only of what was surely seen twice, and only where they are wanted;
their bytes are counted and bounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.infer.tensors import InferRequest

#: Requests that are told apart; the inputs of so many are kept at most.
MOST = 64
#: Counts are halved after so many sightings.
_HALVED_EVERY = 2048
#: What an unkept favourite takes is not counted; a kept one takes this beside its arrays.
KEPT_BYTES = 1024


@dataclass(slots=True)
class Favourite:
    """One request. ``uses`` may be too high by ``error``; ``saved_us`` is what its last run took."""

    digest: bytes
    uses: float
    error: float
    seen_at: float
    saved_us: int = 0
    request: InferRequest | None = None
    size: int = 0

    @property
    def worth(self) -> float:
        """Compute time that its answers have saved, as far as one can be sure."""
        return (self.uses - self.error) * max(1, self.saved_us)


class Favourites:
    """``room``: bytes of inputs that may be kept, 0 for none. Who is not seen for ``remember_s`` is forgotten."""

    def __init__(self, room: int, remember_s: float) -> None:
        self.size = 0
        self._room = room
        self._remember_s = remember_s
        self._table: dict[bytes, Favourite] = {}
        self._heap: list[tuple[float, float, bytes]] = []
        self._seen = 0

    def __len__(self) -> int:
        return len(self._table)

    def seen(self, digest: bytes, now: float) -> Favourite:
        """That request came."""
        self._seen += 1
        if self._seen >= _HALVED_EVERY:
            self._halve()
        favourite = self._table.get(digest)
        if favourite is None:
            favourite = self._admit(digest, now)
        favourite.uses += 1.0
        favourite.seen_at = now
        return favourite

    def offer(self, favourite: Favourite, size: int, copy: Callable[[], InferRequest]) -> bool:
        """Keep its inputs, of ``size`` bytes, if it is worth it; whether anything changed."""
        size += KEPT_BYTES
        if favourite.request is not None or size > self._room or favourite.uses - favourite.error < 2:
            return False
        kept = sorted((one for one in self._table.values() if one.request is not None), key=lambda one: one.uses)
        lesser: list[Favourite] = []
        for other in kept:
            if self.size - sum(one.size for one in lesser) + size <= self._room or other.uses >= favourite.uses:
                break
            lesser.append(other)
        if self.size - sum(one.size for one in lesser) + size > self._room:
            return False
        for other in lesser:
            self._let_go(other)
        favourite.request, favourite.size = copy(), size
        self.size += size
        return True

    def hottest(self) -> list[Favourite]:
        """All that are known, the worthiest first."""
        return sorted(self._table.values(), key=lambda one: (-one.worth, one.digest))

    def forget(self, now: float) -> float | None:
        """Who has not been seen for long goes; when the next one is due, None without one."""
        for favourite in list(self._table.values()):
            if favourite.seen_at + self._remember_s <= now:
                self._remove(favourite)
        self._order()
        first = min((favourite.seen_at for favourite in self._table.values()), default=None)
        return None if first is None else first + self._remember_s

    def resize(self, room: int, remember_s: float) -> None:
        """Other limits hold from now on."""
        self._room, self._remember_s = room, remember_s
        for favourite in reversed(self.hottest()):
            if self.size > room:
                self._let_go(favourite)

    def clear(self) -> None:
        """Everything goes."""
        self._table.clear()
        self._heap.clear()
        self.size = 0

    def drop_inputs(self) -> int:
        """Kept inputs go, counts stay. Returns how many bytes went."""
        before = self.size
        for favourite in self._table.values():
            self._let_go(favourite)
        return before

    def _admit(self, digest: bytes, now: float) -> Favourite:
        uses = 0.0
        if len(self._table) >= MOST:
            least = self._least()
            uses = least.uses
            self._remove(least)
        favourite = self._table[digest] = Favourite(digest, uses, uses, now)
        heapq.heappush(self._heap, (uses, now, digest))
        return favourite

    def _least(self) -> Favourite:
        """Who was seen least, of a table that is full. Counts only rise, so a place in the heap is never too low."""
        while True:
            uses, seen_at, digest = self._heap[0]
            favourite = self._table.get(digest)
            if favourite is None:
                heapq.heappop(self._heap)
            elif (favourite.uses, favourite.seen_at) != (uses, seen_at):
                heapq.heapreplace(self._heap, (favourite.uses, favourite.seen_at, digest))
            else:
                return favourite

    def _order(self) -> None:
        self._heap = [(one.uses, one.seen_at, one.digest) for one in self._table.values()]
        heapq.heapify(self._heap)

    def _remove(self, favourite: Favourite) -> None:
        self._let_go(favourite)
        del self._table[favourite.digest]

    def _let_go(self, favourite: Favourite) -> None:
        self.size -= favourite.size
        favourite.request, favourite.size = None, 0

    def _halve(self) -> None:
        self._seen = 0
        for favourite in self._table.values():
            favourite.uses /= 2
            favourite.error /= 2
        self._order()
