"""How fast the disk is: whether the latest writes and reads took far longer than even a poor memory card needs.

A worn card, a full flash translation layer or a network behind the folder shows here first: nothing fails, all waits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

_log = logging.getLogger("agent.store")

#: Chosen for this project: cards of the slowest class write 2 MB/s one after another, and pause for a second now and
#: then while they tidy up.
SLOWEST_BYTES_S = 1 << 20
LONGEST_PAUSE_S = 3.0


def is_slow(size: int, seconds: float) -> bool:
    """Whether ``size`` bytes in that time are too slow for any disk in order. Pure."""
    return seconds > LONGEST_PAUSE_S + size / SLOWEST_BYTES_S


class Pace:
    """What takes or took too long, the latest of each kind; a quick one takes the word back. Thread-safe."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._slow: dict[str, str] = {}
        self._under_way: dict[object, tuple[str, int, float]] = {}

    @contextlib.contextmanager
    def timed(self, doing: str, size: int = 0) -> Iterator[None]:
        """Time the block, which moves ``size`` bytes; a block that fails tells nothing."""
        start, key = self._monotonic(), object()
        self._under_way[key] = (doing, size, start)
        try:
            yield
        finally:
            del self._under_way[key]
        self.note(doing, size, self._monotonic() - start)

    def note(self, doing: str, size: int, seconds: float) -> None:
        """``doing`` moved ``size`` bytes in so many seconds."""
        if is_slow(size, seconds):
            self._slow[doing] = f"{doing} took {_amount(size, seconds)}"
            _log.warning("store: the disk is slow: %s", self._slow[doing])
        else:
            self._slow.pop(doing, None)

    def slow(self) -> tuple[str, ...]:
        """What took too long, and what has not ended after too long, in words."""
        now = self._monotonic()
        told = [
            f"{doing} has taken {_amount(size, now - start)} until now"
            for doing, size, start in list(self._under_way.values())
            if is_slow(size, now - start)
        ]
        return (*self._slow.copy().values(), *told)


def _amount(size: int, seconds: float) -> str:
    return f"{seconds:.1f} s" + (f" for {size / 1e6:.1f} MB" if size else "")
