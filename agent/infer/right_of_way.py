"""Requests have the right of way: children that measure stand still while one is answered.

The lowest priority alone does not do: an idle task that has got a processor keeps it until the next tick of the clock,
which is longer than many a model takes, and it empties the caches. So children are stopped as soon as a request comes
and go on when none is left. Where requests never end, children get a little time now and then (``breathe``), so that a
busy device can be updated, too; what they measure then is known to have met requests.

Any thread may call. A process is told nothing once it has been taken out, which is before it is reaped.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable

#: Stopped for so long a child may run for a little, in seconds.
_HELD_S, _BREATH_S = 0.2, 0.02


class RightOfWay:
    """``watch(True)`` is called when requests begin to matter, in the thread that starts a child; False at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present: set[subprocess.Popen[bytes]] = set()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._held = False
        self._since = 0.0
        self.watch: Callable[[bool], None] = lambda on: None

    # -- children -----------------------------------------------------------------------------------------------------

    def add(self, child: subprocess.Popen[bytes]) -> None:
        """It is there, and runs."""
        with self._lock:
            first = not self._present
            self._present.add(child)
            self._running.add(child)
        if first:
            self.watch(True)

    def take_out(self, child: subprocess.Popen[bytes]) -> None:
        """It is to end. Harmless when repeated."""
        with self._lock:
            last = self._present == {child}
            self._present.discard(child)
            self._running.discard(child)
        if last:
            self.watch(False)
            self.let_go()

    def run(self, child: subprocess.Popen[bytes]) -> None:
        """It has something to do: it runs whenever no request does."""
        with self._lock:
            if child in self._present:
                self._running.add(child)
                if not self._held:
                    child.send_signal(signal.SIGCONT)

    def rest(self, child: subprocess.Popen[bytes]) -> None:
        """It has nothing to do."""
        with self._lock:
            if child in self._present:
                self._running.discard(child)
                child.send_signal(signal.SIGSTOP)

    def breathe(self) -> None:
        """Let children run for a moment where requests have held them for long. Blocking, for who waits for a child."""
        with self._lock:
            if not self._held or time.monotonic() - self._since < _HELD_S:
                return
            self._tell(signal.SIGCONT)
        time.sleep(_BREATH_S)
        with self._lock:
            if self._held:
                self._since = time.monotonic()
                self._tell(signal.SIGSTOP)

    # -- requests -----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """A request has come."""
        with self._lock:
            if not self._held:
                self._held, self._since = True, time.monotonic()
                self._tell(signal.SIGSTOP)

    def let_go(self) -> None:
        """No request is left."""
        with self._lock:
            if self._held:
                self._held = False
                self._tell(signal.SIGCONT)

    def _tell(self, number: signal.Signals) -> None:
        for child in self._running:
            child.send_signal(number)


#: That of this process: whatever child it has.
RIGHT_OF_WAY = RightOfWay()
