"""When memory that sessions have freed goes back to the system.

Not at once: the next session takes it over faster than fresh pages could be had, and giving back stops everybody who
wants memory meanwhile (5 to 10 ms for 100 MB). So it waits until no session has been closed for a while, but not for
ever where they come and go all the time. For the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

#: The longest that it waits while sessions come and go: until then the process weighs more than its budget knows.
_MOST_S = 1.0


class Returning:
    """Calls ``give_back`` so long (``every``, seconds) after the last session was closed, and not more often."""

    def __init__(
        self, every: Callable[[], float], give_back: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every = every
        self._give_back = give_back
        self._clock = clock
        self._given_at = self._freed_at = self._by = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def freed(self, *, much: bool = False) -> None:
        """Something was freed; ``much`` that nobody will want soon: it goes back now."""
        now, every = self._clock(), self._every()
        self._freed_at = now
        if much:
            self.cancel()
            self._by = now
            self._wait(0.0)
        elif self._timer is None:
            self._by = now + max(_MOST_S, every)
            self._wait(max(every, self._given_at + every - now))

    def cancel(self) -> None:
        """Give nothing back any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._due)

    def _due(self) -> None:
        self._timer = None
        now = self._clock()
        left = min(self._freed_at + self._every(), self._by) - now
        if left > 0:
            self._wait(left)
        else:
            self._given_at = now
            self._give_back()
