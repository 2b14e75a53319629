"""What the process weighs beyond what its sessions were measured to take: arenas, fragments, bodies of requests."""

from __future__ import annotations

from agent.base.memory import resident_mb

_MIB = 1 << 20


class Scales:
    """What the process weighs beyond its sessions; what it weighed before them is not theirs."""

    def __init__(self) -> None:
        self._before_mb = resident_mb()
        self._last = 0.0
        self._extra_before = 0

    def imported(self, before_mb: float) -> None:
        """A runtime was imported; it came to weigh the difference."""
        self._before_mb += max(0.0, resident_mb() - before_mb)

    def due(self, now: float, every: float) -> bool:
        """Whether it is time to weigh again."""
        if now - self._last < every:
            return False
        self._last = now
        return True

    def beyond(self, sessions: int) -> int:
        """Bytes beyond ``sessions``, of this time or the last, whichever is less: a request's body comes and goes."""
        extra = int((resident_mb() - self._before_mb) * _MIB) - sessions
        least, self._extra_before = min(extra, self._extra_before), extra
        return least
