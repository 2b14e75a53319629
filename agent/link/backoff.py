"""When to connect: splayed first, decorrelated jitter after failures, long after a fight over the session. Pure.

A fleet whose broker comes back must not arrive at once. So the first attempt, and the first one after a connection
that was stable, are drawn from the operator's splay; each later one comes after half a splay to three times the pause
before it ("decorrelated jitter", M. Brooker, Exponential Backoff And Jitter, 2015): neighbours drift apart for good.
"""

from __future__ import annotations

from collections.abc import Callable

#: Draws a number between two; ``random.uniform`` in earnest.
Draw = Callable[[float, float], float]

BASE_S = 1.0
CAP_S = 300.0
#: A connection that held this long was a good one: the next pause is short again.
STABLE_S = 60.0
#: Two clients with one identity would throw each other out for ever: after this many in this time it is an alarm.
TAKEOVERS = 3
TAKEOVER_WINDOW_S = 600.0
TAKEOVER_PAUSE_S = (300.0, 900.0)


class Backoff:
    """The pause before the next attempt to connect. ``splay_s`` may change with the settings."""

    def __init__(self, draw: Draw, *, base_s: float = BASE_S, cap_s: float = CAP_S) -> None:
        self._draw = draw
        self._base_s = base_s
        self._cap_s = cap_s
        self._last_s = 0.0
        self._takeovers: list[float] = []
        #: Somebody else uses this device's identity.
        self.contested = False

    def next_pause(self, splay_s: float) -> float:
        """Seconds to wait before the next attempt; each call is one attempt."""
        if self.contested:
            return self._draw(*TAKEOVER_PAUSE_S)
        # Attempts of a fleet that fail must come at the planned rate too: one for each device and splay.
        least_s = max(self._base_s, splay_s / 2)
        if not self._last_s:
            self._last_s = least_s
            return self._draw(0.0, splay_s)
        cap_s = max(self._cap_s, 2 * splay_s)
        self._last_s = min(cap_s, self._draw(least_s, max(least_s, 3 * self._last_s)))
        return self._last_s

    def lost(self, held_s: float, now: float, *, takeover: bool) -> None:
        """A connection ended after ``held_s`` seconds, ``takeover``: because another client has the same identity."""
        if takeover:
            self._takeovers = [moment for moment in self._takeovers if now - moment < TAKEOVER_WINDOW_S] + [now]
            self.contested = self.contested or len(self._takeovers) >= TAKEOVERS
        elif held_s >= TAKEOVER_WINDOW_S:
            self.contested = False
        if held_s >= STABLE_S:
            self.reset()

    def held(self, held_s: float) -> None:
        """A connection holds since ``held_s`` seconds: after long enough nobody contests it any more."""
        if held_s >= TAKEOVER_WINDOW_S:
            self.contested = False

    def reset(self) -> None:
        """The next attempt is a first one: new settings, or the last connection was a good one."""
        self._last_s = 0.0
