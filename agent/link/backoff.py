"""When to connect: splayed first, decorrelated jitter after failures, long after a fight over the session. Pure.

A fleet whose broker comes back must not arrive at once. So the first attempt, and the first one after a connection
that was stable, are drawn from the operator's splay; each later one comes half a splay after "decorrelated jitter" (M.
Brooker, Exponential Backoff And Jitter, 2015) from half a splay to three times the one before: neighbours drift apart
for good.

The planned rate is one attempt for each device and splay. It holds at every moment, however long the broker is away:
the first moment is drawn evenly from a splay, and no device that failed comes again within one.
"""

from __future__ import annotations

from collections.abc import Callable

#: Draws a number between two; ``random.uniform`` in earnest.
Draw = Callable[[float, float], float]

BASE_S = 1.0
CAP_S = 300.0
#: A connection that held this long was a good one: the next pause is short again.
STABLE_S = 60.0
#: Two clients with one identity throw each other out for ever. Brokers say so (0x8E); mosquitto before 2.1 just closes
#: the connection, and then it takes one more to believe it. So often in so long a time is an alarm.
TAKEOVERS = 3
CLOSINGS = 4
TAKEOVER_WINDOW_S = 900.0
TAKEOVER_PAUSE_S = (300.0, 900.0)


class Backoff:
    """The pause before the next attempt to connect. ``splay_s`` may change with the settings."""

    def __init__(self, draw: Draw, *, base_s: float = BASE_S, cap_s: float = CAP_S) -> None:
        self._draw = draw
        self._base_s = base_s
        self._cap_s = cap_s
        self._last_s = 0.0
        self._takeovers: list[float] = []
        self._closings: list[float] = []
        #: Somebody else uses this device's identity.
        self.contested = False

    def next_pause(self, splay_s: float) -> float:
        """Seconds to wait before the next attempt; each call is one attempt."""
        if self.contested:
            return self._draw(*TAKEOVER_PAUSE_S)
        # Sooner than after a splay, they would come among those whose first turn it is: half as many again as planned.
        rest_s = splay_s / 2
        least_s = max(self._base_s, rest_s)
        if not self._last_s:
            self._last_s = least_s
            return self._draw(0.0, splay_s)
        cap_s = max(self._cap_s, 2 * splay_s)
        self._last_s = min(cap_s, self._draw(least_s, max(least_s, 3 * self._last_s)))
        return rest_s + self._last_s

    def lost(self, held_s: float, now: float, *, takeover: bool = False, closed: bool = False) -> None:
        """A connection ended after ``held_s`` seconds.

        ``takeover``: the broker says that another client has the same identity; ``closed``: it says nothing and closes.
        """
        if takeover:
            self._takeovers = _recent(self._takeovers, now)
        elif closed and held_s < STABLE_S:
            self._closings = _recent(self._closings, now)
        self.held(held_s)
        self.contested = self.contested or len(self._takeovers) >= TAKEOVERS or len(self._closings) >= CLOSINGS
        if held_s >= STABLE_S:
            self.reset()

    def held(self, held_s: float) -> None:
        """A connection holds since ``held_s`` seconds: after long enough nobody contests it any more."""
        if held_s >= TAKEOVER_WINDOW_S:
            self.contested = False
            self._takeovers, self._closings = [], []

    def reset(self) -> None:
        """The next attempt is a first one: new settings, or the last connection was a good one."""
        self._last_s = 0.0


def _recent(moments: list[float], now: float) -> list[float]:
    return [moment for moment in moments if now - moment < TAKEOVER_WINDOW_S] + [now]
