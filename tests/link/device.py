"""The link as a process of its own, for tests: started, killed, watched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.link.broker import PATIENCE_S, ROOT

#: As ``edge-agent link`` does it, but for the pauses: at most 0.3 s, or a test of many cuts would take hours.
_PROGRAM = """
import random, sys
from pathlib import Path
from agent.base.systemd import take_environment
from agent.link.main import run_link
longest = float(sys.argv[3])
run_link(Path(sys.argv[1]), Path(sys.argv[2]), take_environment(), draw=lambda a, b: min(longest, random.uniform(a, b)))
"""


class LinkProcess:
    """``start`` it, and ``stop`` or kill it."""

    def __init__(self, socket: Path, folder: Path, longest_pause_s: float = 0.3) -> None:
        self._arguments = [sys.executable, "-c", _PROGRAM, str(socket), str(folder), str(longest_pause_s)]
        self.folder = folder
        self.log = folder.with_name("link.log")
        self.process: subprocess.Popen[bytes] | None = None

    def amend(self, program: str) -> None:
        """Run this first, with ``link`` being the module ``agent.link.link``."""
        self._arguments[2] = f"from agent.link import link\n{program}\n{self._arguments[2]}"

    def start(self, **environment: str) -> LinkProcess:
        known = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._arguments, stderr=log, env=known)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_S)
        self.process = None
        return status

    def rss_mb(self) -> float:
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def cpu_s(self) -> float:
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def link(short_dir: Path) -> Iterator[LinkProcess]:
    """A link that is not started yet; it asks at ``admin.sock`` of the short folder."""
    process = LinkProcess(short_dir / "admin.sock", short_dir / "link")
    yield process
    print(process.log.read_text() if process.log.exists() else "no log")
    if process.process is not None:
        with contextlib.suppress(ProcessLookupError):
            process.process.kill()
        process.process.wait()
