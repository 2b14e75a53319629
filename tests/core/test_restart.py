"""A restart of core under clients that ask without a pause: connections wait in sockets that somebody else holds."""

from __future__ import annotations

import asyncio
import fcntl
import signal
import socket
import subprocess
import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest

from agent.base.errors import AgentError
from agent.client import Client
from agent.core.link_api import NoFleet
from tests import onnx_models
from tests.core.conftest import Agent

CLIENTS = 8
X = np.ones((1, 16), np.float32)


class Activated(Agent):
    """A device whose sockets are held outside of core, as the service manager holds them."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.run.mkdir()
        self.sockets = [self._listen(name) for name in ("infer", "admin")]

    def _listen(self, name: str) -> int:
        with closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(str(self.run / f"{name}.sock"))
            listener.listen(1024)
            return fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD_CLOEXEC, 40)

    def start(self, *, ready: bool = True) -> None:
        passed = " ".join(f"{3 + number}<&{fd}" for number, fd in enumerate(self.sockets))
        script = f'LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=infer:admin exec "$@" {passed}'
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script, "bash", self.python, "-m", "agent.cli.device", "core"],
                env=self.environment, stderr=log, cwd=self.folder, pass_fds=self.sockets,
            )  # fmt: skip
        if ready:
            self.wait_until_ready()


class Asker(threading.Thread):
    """Asks until it is told to end; with ``kept`` False on a new connection each time."""

    def __init__(self, path: str, wanted, *, kept: bool) -> None:
        super().__init__(daemon=True)
        self._path, self._wanted, self._kept = path, wanted, kept
        self.answers = 0
        self.failures: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        client = Client(self._path, timeout=60)
        while not self.ended.is_set():
            try:
                found = client.infer("linear", {"x": X})["y"]
            except AgentError as error:
                self.failures.append(repr(error))
            else:
                if not np.allclose(found, self._wanted):
                    self.failures.append(f"wrong answer {found}")
                self.answers += 1
            if not self._kept:
                client.close()
        client.close()


class Waiting(threading.Thread):
    """Link, which always has a question that waits to be answered: nobody is to wait for that."""

    def __init__(self, device: Activated) -> None:
        super().__init__(daemon=True)
        self._device = device
        self.asked, self.ended = threading.Event(), threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            with suppress(AgentError), self._device.admin() as admin:
                admin.call("GET", "/v1/link/settings")
                self.asked.set()
                admin.call("GET", "/v1/link/outgoing?wait_s=60")


@pytest.fixture
def activated(short_dir):
    device = Activated(short_dir)
    yield device
    if device.process is not None:
        device.process.kill()
        device.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["a restart", "a crash"])
def test_nobody_fails_while_core_restarts(activated, number):
    activated.start()
    path = activated.folder / "linear.onnx"
    path.write_bytes(onnx_models.linear())
    activated.cli("models", "add", path)
    with activated.client() as client:
        wanted = client.infer("linear", {"x": X})["y"]
    infer = activated.run / "infer.sock"
    before = infer.stat().st_ino
    askers = [Asker(str(infer), wanted, kept=number % 2 == 0) for number in range(CLIENTS)]
    for asker in askers:
        asker.start()
    waiting = Waiting(activated)
    waiting.start()
    for _ in range(3):
        answered(askers)
        waiting.asked.wait(30)
        waiting.asked.clear()
        activated.stop(number)
        activated.start(ready=False)
        answered(askers)
    for asker in (*askers, waiting):
        asker.ended.set()
    for asker in askers:
        asker.join(60)
    assert [failure for asker in askers for failure in asker.failures] == []
    assert infer.stat().st_ino == before


def test_a_stop_does_not_wait_for_a_link_that_waits(monkeypatch):
    monkeypatch.setattr("agent.core.link_api._NOTHING_S", 1e6)

    async def stopped() -> tuple[str, list]:
        nobody = NoFleet()
        question = asyncio.ensure_future(nobody.outgoing("7", 1e6))
        await asyncio.sleep(0)
        nobody.stop()
        return await asyncio.wait_for(question, 60)

    assert asyncio.run(stopped()) == ("7", [])


def answered(askers: list[Asker]) -> None:
    """Wait until each has had some answers more."""
    wanted = [asker.answers + 5 for asker in askers]
    end = time.monotonic() + 60
    while any(asker.answers < most for asker, most in zip(askers, wanted, strict=True)):
        assert time.monotonic() < end, [asker.failures[-1:] for asker in askers]
        time.sleep(0.01)
