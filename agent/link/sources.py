"""Where bytes may come from, and which of the places is asked next. Pure, but for ``Pace``, which sleeps.

A place that fails is left alone for a while, longer each time; one that answers counts again at once. The order is that
of the configuration, so that all of a refresh comes from one mirror while that one answers: files of two states of a
repository do not fit together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from agent.base.errors import TryLaterError
from agent.link.backoff import Draw

Word = Literal["not_found", "too_slow", "unreachable"]

#: In place of a mirror's URL: blocks through the broker.
BLOCKS = "blocks"
_PAUSE_S = (1.0, 120.0)
#: What brought bytes that were refused is asked last for so long.
_BLAMED_S = 1800.0
#: A piece goes through the limiter as a whole, and is to take no longer than this.
_PIECE_S = 0.5
MOST_PIECE = 256 << 10
_LEAST_PIECE = 4 << 10


class SourceError(TryLaterError):
    """A place did not bring what was asked for; ``code`` is what core would be told."""

    def __init__(self, code: Word, text: str) -> None:
        super().__init__(text)
        self.code: Word = code


@dataclass(slots=True)
class _Standing:
    failures: int = 0
    not_before: float = 0.0
    blamed_until: float = 0.0


class Sources:
    """The places that are configured, and how they did. ``now`` is in seconds of any one clock."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._standing: dict[str, _Standing] = {}

    def configure(self, names: Iterable[str]) -> None:
        """These are the places now, in order; what is known of those that stay is kept."""
        self._standing = {name: self._standing.get(name, _Standing()) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """All places, in order."""
        return tuple(self._standing)

    def choose(self, but: Iterable[str], now: float) -> tuple[str, float] | None:
        """Whom to ask next, and in how many seconds; None when there is nobody but those."""
        left = [(name, standing) for name, standing in self._standing.items() if name not in set(but)]
        if not left:
            return None
        waits = {name: max(0.0, standing.not_before - now) for name, standing in left}
        name, _ = min(left, key=lambda item: (waits[item[0]] > 0, item[1].blamed_until > now, waits[item[0]]))
        return name, waits[name]

    def failed(self, name: str, now: float) -> None:
        """It did not answer, or not as it should."""
        standing = self._standing.get(name)
        if standing is not None:
            longest = min(_PAUSE_S[1], _PAUSE_S[0] * 2**standing.failures)
            standing.failures = min(standing.failures + 1, 16)
            standing.not_before = now + self._draw(longest / 2, longest)

    def worked(self, name: str) -> None:
        """It brought something."""
        standing = self._standing.get(name)
        if standing is not None:
            standing.failures, standing.not_before = 0, 0.0

    def refused(self, name: str, now: float) -> None:
        """What it brought was not what was wanted."""
        standing = self._standing.get(name)
        if standing is not None:
            standing.blamed_until = now + _BLAMED_S


class Pace:
    """No more than so many bytes a second, of all transfers together; 0 = as fast as they come."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rate = 0.0
        self._due = 0.0

    def limit(self, bytes_per_s: float) -> None:
        """From now on."""
        self._rate = bytes_per_s

    @property
    def piece(self) -> int:
        """How much to read at once: with a low rate less, so that it still comes evenly."""
        return MOST_PIECE if not self._rate else int(min(MOST_PIECE, max(_LEAST_PIECE, self._rate * _PIECE_S)))

    async def spend(self, count: int) -> None:
        """Wait until so many bytes more are allowed."""
        if not self._rate:
            return
        now = self._now()
        self._due = max(self._due, now) + count / self._rate
        if self._due > now:
            await asyncio.sleep(self._due - now)
