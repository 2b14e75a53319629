"""Whether the parts of the link get on: what the service manager's watchdog is fed from. Pure.

Each part says by when it will be back. A part that hangs, and a loop that no longer turns, is overdue; a part that
waits for an absent broker or core, and tries again and again, is not: a restart would help neither.
"""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """``now`` gives monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._due: dict[str, float] = {}

    def expect(self, part: str, within_s: float) -> None:
        """``part`` will say something again within so many seconds."""
        self._due[part] = self._now() + within_s

    def end(self, part: str) -> None:
        """``part`` has come to its end."""
        self._due.pop(part, None)

    def overdue(self) -> list[str]:
        """The parts that have not said anything in time."""
        now = self._now()
        return sorted(part for part, due in self._due.items() if due < now)
