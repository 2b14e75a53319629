"""Ending a run early: when its deadline has passed, when nobody waits for it any more, when it holds up the event loop.

How long a run takes may follow from the values that an app sends (a loop's count, an output's length), whatever the
trial has measured. A run that nobody can end would hold its thread, or the whole daemon, for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Halt:
    """Asks one run to end. ``bind`` is the runtime's, ``request`` anybody's, from any thread, at any time."""

    __slots__ = ("_act", "requested", "since")

    def __init__(self) -> None:
        self.requested = False
        self.since = time.monotonic()
        self._act: Callable[[], None] | None = None

    def bind(self, act: Callable[[], None]) -> None:
        """``act`` ends the run; called at once when that was asked for before."""
        self._act = act
        if self.requested:
            act()

    def request(self) -> None:
        """End the run as soon as its runtime can: at its next operator."""
        self.requested = True
        if self._act is not None:
            self._act()


class LoopGuard:
    """Ends what runs on the event loop's thread when it takes longer than ``limit_s``.

    A thread looks now and then while there is something to look at, and sleeps otherwise.
    """

    def __init__(self, limit_s: float = 0.1) -> None:
        self._limit_s = limit_s
        self._now: Halt | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> Halt:
        """A run begins on this thread; ``end`` must follow."""
        halt = self._now = Halt()
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="guard", daemon=True)
                self._thread.start()
        return halt

    def end(self) -> None:
        """The run is over."""
        self._now = None

    def _look(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            for _ in range(20):  # as long again as runs keep coming
                time.sleep(self._limit_s / 2)
                halt = self._now
                if halt is not None and time.monotonic() - halt.since > self._limit_s:
                    halt.request()
