"""The other two ways of a model to a device: through its broker, and on a stick. Everything is real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.base.errors import AgentError
from agent.client import Client
from tests import onnx_models
from tests.core.test_daemon import X, bundle
from tests.core.test_delivery_story import DEVICE, NAME, Site, answer
from tests.fleet.conftest import Fleet, fleet
from tests.fleet.test_whole_way import RealAgent
from tests.fleet.waiting import until
from tests.link.mirror_server import Mirror

__all__ = ["fleet"]

CONFIG = '[clock]\ntrust = "always"\n[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n'


class Device(RealAgent):
    """Without any mirror. It has joined the fleet once it is made."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        config = self.folder / "etc" / "config.toml"
        config.write_text(config.read_text() + CONFIG)
        self.fleet = fleet

    def join(self) -> None:
        fleet = self.fleet
        fleet.claims.start()
        self.start()
        until(lambda: fleet.ok("approve")["announced"], f"it asks to be enrolled\n{self.log.read_text()}")
        (asking,) = fleet.ok("approve")["announced"]
        fleet.ok("approve", DEVICE, "--keyid", asking["keyid"], "--yes", "--wait", "60s")
        until(lambda: (fleet.ok("devices", "show", DEVICE)["info"] or {}).get("grant"), "it says to whom to seal", 60)

    def answers(self, version: str) -> None:
        """An app is answered by this version."""
        with Client(str(self.folder / "run" / "infer.sock"), timeout=60) as client:
            found = client.infer(NAME, {"x": X})
        assert found.model_version == version
        np.testing.assert_allclose(found["y"], answer(version), rtol=1e-4)

    def is_up(self) -> bool:
        try:
            with Client(str(self.folder / "run" / "infer.sock"), timeout=5) as client:
                return client.ready()
        except AgentError:
            return False


@pytest.fixture
def device(fleet: Fleet) -> Iterator[Device]:
    fleet.ok("repository", "init", "--no-password")
    made = Device(fleet)
    made.join()
    try:
        yield made
    finally:
        made.stop()
    assert "Traceback" not in made.log.read_text()


def publish(fleet: Fleet, version: str, seed: int) -> None:
    data = onnx_models.linear(seed)
    path = fleet.scratch / f"{version}.edgemodel"
    fleet.ok("publish", str(bundle(path, {"fp32": ("fp32", data)}, golden_from=data, version=version)))


@pytest.mark.slow
def test_a_device_with_nothing_but_its_broker_is_updated(fleet: Fleet, device: Device) -> None:
    publish(fleet, "1.0.0", 1)
    site = fleet.folder / "repository" / "public"
    words = ("job", "model.install", f"model={NAME}", "version=1.0.0", "-d", DEVICE, "--wait", "--timeout", "120s")
    server = fleet.start("serve-blocks", str(site), stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None and "serving" in server.stderr.readline()
        done = fleet.run(*words, "--json")
        assert done.status == 0, (done.out, done.err, device.log.read_text())
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert f"{DEVICE} has had targets/" in server.stderr.read()
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
    device.answers("1.0.0")


@pytest.mark.slow
def test_what_waits_for_its_bytes_keeps_nobody_from_adding(fleet: Fleet, device: Device, tmp_path: Path) -> None:
    publish(fleet, "1.0.0", 1)
    fleet.ok("job", "model.install", f"model={NAME}", "version=1.0.0", "-d", DEVICE, "--id", "slow")

    until(lambda: step(device) == "refresh", "it asks for the repository's metadata, which nobody brings", 60)
    path = tmp_path / "other.onnx"
    path.write_bytes(onnx_models.linear(5))
    device.edge_agent("models", "add", str(path), "--name", "other")
    device.edge_agent("store", "verify")
    (looked,) = json.loads(device.edge_agent("maintenance", "--run", "repository", "--json"))["tasks"]
    assert looked["ok"] and "too_many" in looked["text"], "one at a time reads the metadata"
    assert step(device) == "refresh"
    assert status(device)["under_way"] is None
    server = fleet.start("serve-blocks", str(fleet.folder / "repository" / "public"), stderr=subprocess.PIPE)
    try:
        until(lambda: heard(fleet, "slow") == "succeeded", f"it comes\n{device.log.read_text()}", 120)
    finally:
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()
    device.answers("1.0.0")


@pytest.mark.slow
def test_an_installation_that_hangs_goes_on_once_the_fleet_names_another_mirror(fleet: Fleet, device: Device) -> None:
    publish(fleet, "1.0.0", 1)
    fleet.ok("job", "model.install", f"model={NAME}", "version=1.0.0", "-d", DEVICE, "--id", "stuck")

    until(lambda: step(device) == "refresh", "it asks for the repository's metadata, which nobody brings", 60)
    with Mirror({}, fleet.scratch / "mirror") as mirror:
        mirror.files = Site(fleet.folder / "repository" / "public")  # type: ignore[assignment]
        where = f"delivery.mirrors={json.dumps([mirror.base])}", f"delivery.ca_file={json.dumps(mirror.ca)}"
        fleet.ok("desired", "set", *where, "--device", DEVICE)
        until(lambda: heard(fleet, "stuck") == "succeeded", f"it comes\n{device.log.read_text()}", 120)
        assert mirror.asked
    device.answers("1.0.0")


@pytest.mark.slow
def test_a_device_without_any_network_is_updated_by_a_stick(fleet: Fleet, device: Device, tmp_path: Path) -> None:
    publish(fleet, "1.0.0", 1)
    device.stop()
    fleet.broker.stop()
    device.start()
    until(device.is_up, "core is up", 60)

    stick = tmp_path / "stick"
    fleet.ok("export", str(stick), "--model", NAME, "--version", "1.0.0")
    job = str(stick / "job.json")
    words = ("job", "model.install", f"model={NAME}", "version=1.0.0", "-d", DEVICE, "--to-file", job)
    damaged = next(path for path in (stick / "targets").rglob("*") if path.parent.name == "payload")
    data = damaged.read_bytes()
    damaged.write_bytes(data[: len(data) // 2])
    fleet.ok(*words, "--id", "by-stick")
    report = deliver(device, stick)
    assert report["job"]["state"] == "failed" and report["refused"], report

    damaged.write_bytes(data)
    fleet.ok(*words, "--id", "again")
    report = deliver(device, stick)
    assert report["job"]["state"] == "succeeded" and not report["refused"], report
    device.answers("1.0.0")

    fleet.broker.start()
    until(lambda: heard(fleet, "again") == "succeeded", f"the operator hears of it\n{device.log.read_text()}", 60)


def status(device: Device) -> dict[str, Any]:
    return dict(json.loads(device.edge_agent("status", "--json")))


def step(device: Device) -> str | None:
    """What its normal job is at."""
    found: str | None = status(device)["jobs"].get("normal", {}).get("step")
    return found


def heard(fleet: Fleet, job: str) -> str:
    """What the operator knows of a job, having listened."""
    fleet.run("devices", "list")
    return fleet.states(job)[DEVICE]


def deliver(device: Device, stick: Path) -> dict[str, Any]:
    """``edge-agent deliver``, whatever comes of it."""
    command = [sys.executable, "-m", "agent.cli.device", "deliver", str(stick), "--json"]
    done = subprocess.run(command, env=device._environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))
