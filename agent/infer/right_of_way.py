"""Requests have the right of way: children that measure stand still while one is answered, and while more will come.

The lowest priority alone does not do: **measured**, one in fifteen answers of 2 ms came 3 ms later while a child ran in
the gaps between requests. Whoever wakes up waits until the next tick of the clock for a processor that somebody else
has just got, however little that one weighs, and its caches are cold. So children are stopped as soon as a request
comes. Where requests take little of the time, children go on when none is left; else when it has been quiet for longer
than such a wait could matter. Where it does not get quiet, they go on between requests all the same for a tenth of the
time: **measured** at half load, one in a hundred requests was late while it was a fifth. Through requests they go on
only where these leave no gap at all (``breathe``), so that such a device can be updated, too. What is measured
meanwhile is known to have met requests.

Any thread may call. A process is told nothing once it has been taken out, which is before it is reaped.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable

#: After so many seconds without a request children run. Answers that come further apart take longer than that at half
#: load, and a tick late is not late for them.
_QUIET_S = 0.025
#: Stopped for so long, in seconds, children go on between requests for so long; where these left no gap then, for a
#: moment through them. In a twentieth of the time it meets few.
_HELD_S, _LOOSE_S, _BREATH_S = 0.36, 0.04, 0.02
#: Requests that take a smaller share than that of the time, of late, leave enough of it: of how late, in seconds.
_LIGHT, _LATE_S = 0.25, 0.2


class RightOfWay:
    """``watch(True)`` is called when requests begin to matter, in the thread that starts a child; False at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present: set[subprocess.Popen[bytes]] = set()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._busy = self._held = False
        self._since = self._busy_since = self._quiet_since = 0.0
        self._load = 0.0
        #: Until then children go on between requests; whether these left any gap then.
        self._loose_until, self._gaps = 0.0, True
        self.watch: Callable[[bool], None] = lambda on: None

    # -- children -----------------------------------------------------------------------------------------------------

    def add(self, child: subprocess.Popen[bytes]) -> None:
        """It is there, and runs unless requests hold the others."""
        with self._lock:
            first = not self._present
            self._present.add(child)
            self._running.add(child)
            if first:  # what requests took before is not known: as if all the time, until they are seen to take less
                self._load, self._busy_since = 1.0, time.monotonic()
                self._quiet_since = self._busy_since
            if self._held:
                child.send_signal(signal.SIGSTOP)
        if first:
            self.watch(True)

    def take_out(self, child: subprocess.Popen[bytes]) -> None:
        """It is to end. Harmless when repeated."""
        with self._lock:
            last = self._present == {child}
            self._present.discard(child)
            self._running.discard(child)
            if last:
                self._busy = self._held = False
        if last:
            self.watch(False)

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
        """Let children go on where it has become quiet, or for a while where requests have held them for long.

        May block for a moment; for who waits for a child, now and then.
        """
        with self._lock:
            now = time.monotonic()
            if not self._held:
                return
            if not self._busy and now - self._quiet_since >= _QUIET_S:
                self._release()
                return
            if now - self._since < _HELD_S:
                return
            if self._gaps:
                self._since = self._loose_until = now + _LOOSE_S
                self._gaps = not self._busy
                if self._gaps:
                    self._release()
                return
            self._gaps = True  # there may be some the next time
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
            if self._busy:
                return
            now = time.monotonic()
            took, passed = self._quiet_since - self._busy_since, now - self._busy_since
            self._load += (took / passed - self._load) * min(1.0, passed / _LATE_S) if passed > 0 else 0.0
            self._busy, self._busy_since = True, now
            if not self._held:
                self._held, self._since = True, max(now, self._loose_until)
                self._tell(signal.SIGSTOP)

    def let_go(self) -> None:
        """No request is left."""
        with self._lock:
            self._busy, self._quiet_since = False, time.monotonic()
            if self._held and (self._load < _LIGHT or self._quiet_since < self._loose_until):
                self._gaps = True
                self._release()

    def _release(self) -> None:
        self._held = False
        self._tell(signal.SIGCONT)

    def _tell(self, number: signal.Signals) -> None:
        for child in self._running:
            child.send_signal(number)


#: That of this process: whatever child it has.
RIGHT_OF_WAY = RightOfWay()
