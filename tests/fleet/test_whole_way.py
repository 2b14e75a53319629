"""The whole way with nothing simulated: the agent with its link, the brokers as shipped, the operator's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.conftest import ROOT, Fleet, edge_fleet
from tests.fleet.waiting import until


class RealAgent:
    """``edge-agent run`` with the image that ``edge-fleet init`` made, in a folder instead of /etc."""

    def __init__(self, fleet: Fleet) -> None:
        self.folder = fleet.scratch / "device"
        etc = self.folder / "etc"
        shutil.copytree(fleet.folder / "image", etc)
        config = etc / "config.toml"
        config.write_text(config.read_text().replace("/etc/edge-agent", str(etc)) + "splay_s = 0\n")
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "EDGE_AGENT_CONFIG": str(config),
            "EDGE_AGENT_STATE_DIR": str(self.folder / "state"),
            "EDGE_AGENT_RUN_DIR": str(self.folder / "run"),
        }
        self.log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "agent.cli.device", "run"]
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, cwd=self.folder)

    def edge_agent(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "agent.cli.device", *arguments]
        return subprocess.run(
            command, env=self._environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)
            self._process = None


@pytest.fixture
def agent(fleet: Fleet) -> Iterator[RealAgent]:
    fleet.claims.start()
    made = RealAgent(fleet)
    made.start()
    yield made
    made.stop()


@pytest.mark.slow
def test_a_device_joins_is_commanded_and_leaves(fleet: Fleet, agent: RealAgent, tmp_path: Path) -> None:
    theirs = tmp_path / "bob"
    assert edge_fleet(theirs, "keys", "add", "bob", "--classes", "destroy", "--no-password").status == 0
    public = edge_fleet(theirs, "keys", "export", "bob").out.strip()
    fleet.ok("keys", "add", "bob", "--classes", "destroy", "--public", public)

    (asking,) = until(lambda: fleet.ok("approve")["announced"], f"it asks to be enrolled\n{agent.log.read_text()}")
    keyid = asking["keyid"]
    words = " ".join(keyid[start : start + 4] for start in range(0, 32, 4))
    assert words in agent.edge_agent("status")  # what the operator compares is what the device shows
    assert fleet.ok("approve", "door-7", "--keyid", keyid[:8], "--yes", "--wait", "60s")["epoch"] == 1

    (row,) = fleet.ok("devices", "list")["devices"]
    assert row["online"] is True and row["profile"] and row["agent"]
    assert fleet.ok("rpc", "ping", "--device", "door-7")["result"] is not None
    assert fleet.ok("rpc", "status", "--device", "door-7")["result"]["version"] == row["agent"]
    bundle = str(ROOT / "deploy" / "demo" / "digits.onnx")
    (fits,) = fleet.ok("fit", bundle)["devices"]
    assert fits["runs"], fits["reasons"]

    agent.edge_agent("models", "add", bundle, "--name", "digits")
    waiting = ("--device", "door-7", "--wait", "--timeout", "90s")
    for words_ in (["store.scrub"], ["model.pin", "model=digits", "pinned=false"], ["logs.tail", "lines=5"]):
        (done,) = fleet.ok("job", *words_, *waiting)["devices"]
        assert done["state"] == "succeeded", done
    wrong = fleet.run("job", "model.activate", "model=digits", "version=9.9.9", *waiting)
    assert wrong.status == 1 and "9.9.9" in wrong.out

    fleet.ok("desired", "set", "log.level=debug", "--device", "door-7")
    until(lambda: fleet.ok("desired", "show")["devices"][0]["there"], "the device has become what it should be")

    file = tmp_path / "remove.job"
    fleet.ok("job", "model.remove", "model=digits", "--device", "door-7", "--export", str(file), "--yes")
    assert edge_fleet(theirs, "keys", "sign", str(file), "--yes").status == 0
    (done,) = fleet.ok("job", "submit", str(file), "--wait", "--timeout", "60s")["devices"]
    assert done["state"] == "succeeded" and "digits" not in agent.edge_agent("models", "list")

    given = fleet.run("devices", "show", "door-7")
    assert "refused" not in given.out and "not believed" not in given.out, given.out
    agent.stop()
    away = fleet.run("rpc", "ping", "--device", "door-7")
    assert away.status == 1 and "it is offline" in away.err
