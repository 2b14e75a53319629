"""The answers of one model that are kept: bounded in bytes and in time. Pure; time is an argument.

Invariants: the entries and what is ``reserved`` beside them never hold more than the limit; an entry is never handed
out at or after the end of its time; what goes for want of room is what is worth least: the compute time that it saves
times how often it was wanted, over its bytes, on top of an age that rises with each eviction, so that old favourites go
in the end (GreedyDual-Size with frequency; Cherkasova 1998).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Generic, TypeVar

from agent.infer.shelf import CacheLimits

#: What an entry takes beside its arrays: key, tables, the objects around the arrays.
ENTRY_BYTES = 1024
#: Stale places in the heap that are borne with beside as many good ones.
_STALE = 64

_T = TypeVar("_T")


@dataclass(slots=True)
class Counts:
    """What became of the requests of one model since the start."""

    hits: int = 0
    misses: int = 0
    #: Waited for an equal request under way, and took its answer.
    joined: int = 0
    #: Not looked up: it did not pay, or the inputs are too large.
    bypassed: int = 0
    evicted: int = 0
    expired: int = 0
    #: Computed again after a change, from the hottest inputs.
    rewarmed: int = 0
    #: Compute time that was not spent.
    saved_us: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requests looked up that were not computed."""
        found = self.hits + self.joined
        return found / (found + self.misses) if found else 0.0


@dataclass(slots=True)
class Entry(Generic[_T]):
    """A kept answer. ``size`` counts all that it takes; ``saved_us`` is what each hit saves."""

    value: _T
    size: int
    saved_us: int
    born: float
    expires: float
    uses: int
    score: float = 0.0
    stamp: int = 0


class Cache(Generic[_T]):
    """Entries by key. The caller's clock never goes back."""

    def __init__(self, limits: CacheLimits) -> None:
        self.limits = limits
        self.counts = Counts()
        self.size = 0
        self.reserved = 0
        self._entries: dict[bytes, Entry[_T]] = {}  # in the order of storing, which is that of their ends
        self._heap: list[tuple[float, int, bytes]] = []
        self._age = 0.0
        self._stamps = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes, now: float) -> Entry[_T] | None:
        """The entry of that key, if its time is not over. It counts as used."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            self.expire(now)
            return None
        entry.uses += 1
        entry.score = self._worth(entry)  # the heap learns of it when the entry comes to its top
        self.counts.hits += 1
        self.counts.saved_us += entry.saved_us
        return entry

    def put(self, key: bytes, value: _T, size: int, saved_us: int, now: float, uses: int = 1) -> bool:
        """Keep an answer whose arrays take ``size`` bytes; False where it is larger than all the room there is."""
        self.expire(now)
        self._drop(key)
        size += ENTRY_BYTES
        room = self.limits.size - self.reserved
        if size > room:
            return False
        self.shrink(room - size)
        self._stamps += 1
        entry = Entry(value, size, saved_us, now, now + self.limits.ttl_s, max(1, uses), stamp=self._stamps)
        entry.score = self._worth(entry)
        self._entries[key] = entry
        self.size += size
        heapq.heappush(self._heap, (entry.score, entry.stamp, key))
        return True

    def resize(self, limits: CacheLimits, reserved: int) -> None:
        """Other limits hold from now on. What is kept goes: its time was another."""
        self.clear()
        self.limits, self.reserved = limits, reserved

    def reserve(self, size: int) -> None:
        """So many bytes of the limit are taken by something else."""
        self.reserved = size
        self.shrink(self.limits.size - size)

    def shrink(self, size: int) -> int:
        """Let the least worthy go until no more than ``size`` bytes are held. Returns how many bytes went."""
        before = self.size
        while self.size > size and (key := self._least()) is not None:
            self._age = max(self._age, self._entries[key].score)
            self._drop(key)
            self.counts.evicted += 1
        self._tidy()
        return before - self.size

    def clear(self) -> int:
        """Let everything go. Returns how many entries there were."""
        count = len(self._entries)
        self._entries.clear()
        self._heap.clear()
        self.size = 0
        return count

    def expire(self, now: float) -> float | None:
        """Let go of what is over; when the next entry's time ends, None without one."""
        for key in list(self._over(now)):
            self._drop(key)
            self.counts.expired += 1
        self._tidy()
        first = next(iter(self._entries.values()), None)
        return None if first is None else first.expires

    def least_rate(self, now: float) -> float | None:
        """What the least worthy entry saves: microseconds a byte and second since it is here. None without one."""
        key = self._least()
        if key is None:
            return None
        entry = self._entries[key]
        return entry.uses * max(1, entry.saved_us) / entry.size / max(1.0, now - entry.born)

    # -- within -------------------------------------------------------------------------------------------------------

    def _worth(self, entry: Entry[_T]) -> float:
        return self._age + entry.uses * max(1, entry.saved_us) / entry.size

    def _over(self, now: float) -> list[bytes]:
        over = []
        for key, entry in self._entries.items():
            if entry.expires > now:
                break
            over.append(key)
        return over

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= entry.size

    def _least(self) -> bytes | None:
        """The least worthy, left at the top of the heap. Scores only rise, so what is below has not become less."""
        while self._heap:
            score, stamp, key = self._heap[0]
            entry = self._entries.get(key)
            if entry is None or entry.stamp != stamp:
                heapq.heappop(self._heap)
            elif entry.score != score:
                heapq.heapreplace(self._heap, (entry.score, stamp, key))
            else:
                return key
        return None

    def _tidy(self) -> None:
        """What expired leaves its place in the heap behind."""
        if len(self._heap) > 2 * len(self._entries) + _STALE:
            self._heap = [(entry.score, entry.stamp, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)
