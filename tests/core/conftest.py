"""A real daemon for each test that asks for one: ``edge-agent core`` as a process, driven by the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.base.errors import AgentError
from agent.client import AdminClient, Client

ROOT = Path(__file__).resolve().parents[2]


class Agent:
    """One device: its folders, its daemon when it runs, and the command line. ``python``: of another environment."""

    def __init__(self, folder: Path, python: Path | str = sys.executable) -> None:
        self.folder = folder
        self.python = str(python)
        self.state, self.run = folder / "state", folder / "run"
        self.config = folder / "config.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "core.log"

    @property
    def environment(self) -> dict[str, str]:
        own = {"EDGE_AGENT_STATE_DIR": str(self.state), "EDGE_AGENT_RUN_DIR": str(self.run)}
        if self.config.exists():
            own["EDGE_AGENT_CONFIG"] = str(self.config)
        return {**os.environ, **own, "PYTHONPATH": str(ROOT)}

    def start(self, *, ready: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "agent.cli.device", "core"], env=self.environment, stderr=log, cwd=self.folder
            )
        if ready:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process is None or self.process.poll() is None, self.log.read_text()
            try:
                with Client(str(self.run / "infer.sock"), timeout=5) as client:
                    if client.ready():
                        return
            except AgentError:
                time.sleep(0.02)
        raise AssertionError(f"not ready within 30 s: {self.log.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self.process = None
        return status

    def restart(self, number: int = signal.SIGTERM) -> None:
        self.stop(number)
        self.start()

    def cli(
        self, *arguments: object, status: int | None = 0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``edge-agent ARGUMENTS``; fails the test when the exit status is another (None: any will do)."""
        done = subprocess.run(
            [self.python, "-m", "agent.cli.device", *map(str, arguments)],
            env=self.environment, input=stdin, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert status in (None, done.returncode), f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: object, status: int | None = 0):
        return json.loads(self.cli(*arguments, "--json", status=status).stdout)

    def client(self) -> Client:
        return Client(str(self.run / "infer.sock"), timeout=60)

    def admin(self) -> AdminClient:
        return AdminClient(str(self.run / "admin.sock"))


@pytest.fixture
def agent(short_dir):
    """A device whose daemon is not started yet; it is killed at the end."""
    device = Agent(short_dir)
    yield device
    if device.process is not None:
        device.process.kill()
        device.process.wait()


@pytest.fixture
def running(agent):
    """A device with a running daemon."""
    agent.start()
    return agent
