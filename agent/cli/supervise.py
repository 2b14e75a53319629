"""``edge-agent run``: core and link as two processes under one, for development and containers.

Under systemd each is a unit of its own; here the parent stands in for it: what ends is started again, with a pause that
grows while it keeps ending, and a stop ends link before core, so that the last word of core still goes out.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.base.paths import Paths

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
#: A process that ran for so long is not in a loop.
_SETTLED_S = 30.0
#: Above [server] drain_s and what follows it.
_STOP_S = 45.0


@dataclass(slots=True)
class _Child:
    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    again_at: float = field(default=0.0)

    def start(self) -> None:
        """Begin, in a session of its own group: a terminal's Ctrl-C comes to the parent alone."""
        self.process = subprocess.Popen(self.command, start_new_session=True)
        self.began = time.monotonic()

    def look(self) -> None:
        """Start it again when it has ended and its pause is over."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            if now - self.began > _SETTLED_S or self.process.returncode == 0:
                self.pause_s = _FIRST_PAUSE_S
            self.again_at = now + self.pause_s
            self.pause_s = min(_LONGEST_PAUSE_S, self.pause_s * 2)
            print(f"{self.name} ended with status {self.process.returncode}", file=sys.stderr)
            self.process = None
        if self.process is None and now >= self.again_at:
            self.start()

    def reload(self) -> None:
        """Let it read its configuration anew."""
        if self.process is not None:
            self.process.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        """Ask it to end, wait; its exit status."""
        if self.process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            return self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def supervise(paths: Paths, options: Sequence[str]) -> int:
    """Run both until SIGTERM or SIGINT; the exit status of core."""
    base = [sys.executable, "-m", "agent.cli.device"]
    core, link = _Child("core", [*base, "core", *options]), _Child("link", [*base, "link", *options])
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    signal.signal(signal.SIGHUP, lambda *_: core.reload())
    core.start()
    if core.process is not None and _failed_at_once(core.process, ended):
        return core.process.returncode
    link.start()
    while not ended.wait(0.2):
        core.look()
        link.look()
    link.stop()
    return core.stop()


def _failed_at_once(process: subprocess.Popen[bytes], ended: threading.Event) -> bool:
    """Whether core cannot start here at all (a lock that another one holds, say): no use to repeat it."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and not ended.is_set():
        if process.poll() is not None:
            return process.returncode != 0
        time.sleep(0.05)
    return False
