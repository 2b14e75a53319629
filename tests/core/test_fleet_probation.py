"""A version that the fleet has installed: on probation as part of its job, over kills, and taken back by itself."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests import onnx_models
from tests.core.fleet_device import FleetDevice, connected
from tests.core.test_daemon import bundle
from tests.core.test_probation import LIVE, asking, until

CONFIG = "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n[probation]\nlocal = false\nrequests = 150"


@pytest.fixture
def device():
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    try:
        with connected(folder, config=CONFIG) as found:
            yield found
            assert "Traceback" not in found.logs()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def two(device: FleetDevice, second: bytes) -> None:
    """1.0.0 answers, 2.0.0 is on the device."""
    for version, data in (("1.0.0", onnx_models.linear(1)), ("2.0.0", second)):
        path = bundle(device.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version=version)
        device.cli("models", "add", path)
    device.cli("models", "activate", "m", "1.0.0")


def active(device: FleetDevice) -> str:
    return str(device.admin_get("/v1/models/m")["active"])


def install(device: FleetDevice, **args: object) -> str:
    return device.fleet.give("model.install", {"model": "m", "version": "2.0.0", **args})


@pytest.mark.slow
def test_one_that_is_slow_with_live_requests_fails_its_job_and_no_request(device: FleetDevice) -> None:
    two(device, onnx_models.slow_at(2))
    with asking(device) as load:
        until(lambda: load.answered > 50, "apps get answers")
        job = install(device)
        device.fleet.running(job, "probation")
        assert active(device) == "2.0.0"
        ended = device.fleet.ended(job)
        assert active(device) == "1.0.0"
    assert load.failures == []
    assert load.versions == {"1.0.0", "2.0.0"}
    assert (ended["state"], ended["error"]["code"]) == ("failed", "undone")
    text = ended["error"]["text"]
    assert "it is worse than 1.0.0 here: p50 " in text
    assert "3 x is allowed" in text
    assert text.endswith("1.0.0 answers again")
    until(lambda: device.fleet.heard("up/alert/probation"), "the fleet is told")
    assert "m 2.0.0 was taken back" in device.fleet.last("up/alert/probation")["text"]
    assert device.admin_get("/v1/models/m")["previous"] is None


@pytest.mark.slow
def test_a_good_one_stays_and_the_job_says_what_was_seen(device: FleetDevice) -> None:
    two(device, onnx_models.linear(2))
    with asking(device) as load:
        until(lambda: load.answered > 50, "apps get answers")
        job = install(device)
        device.fleet.running(job, "probation")
        # Whoever looks after the device is not kept waiting by it.
        assert device.json("models", "verify", "m")["ok"]
        ended = device.fleet.ended(job)
    assert load.failures == []
    assert ended["state"] == "succeeded"
    assert ended["result"]["probation"]["requests"] >= 150
    assert ended["attempt"] == 1
    assert active(device) == "2.0.0"


def test_kill_9_in_the_middle_of_a_probation_and_the_job_goes_on(device: FleetDevice) -> None:
    two(device, onnx_models.linear(2))
    job = install(device)
    device.fleet.running(job, "probation")
    with device.client() as client:
        for _ in range(100):
            client.infer("m", {"x": LIVE})
    kept = device.state / "probation.json"
    until(lambda: json.loads(kept.read_text())["cases"][0]["course"]["new"]["answered"] == 100, "it is on the disk")
    device.restart(signal.SIGKILL)
    device.wait_until_known()
    assert device.status()["probation"]["m"]["requests"] == 100
    assert device.fleet.state(job) == "running"
    with device.client() as client:
        for _ in range(50):
            client.infer("m", {"x": LIVE})
    ended = device.fleet.ended(job)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    assert ended["result"]["probation"]["requests"] == 150
    assert active(device) == "2.0.0"


@pytest.mark.slow
def test_cancelled_while_it_waits_the_version_before_answers(device: FleetDevice) -> None:
    two(device, onnx_models.linear(2))
    job = install(device)
    device.fleet.running(job, "probation")
    device.fleet.cancel(job)
    assert device.fleet.ended(job)["state"] == "cancelled"
    assert active(device) == "1.0.0"
    assert device.status()["probation"] == {}


@pytest.mark.slow
def test_the_owner_lets_a_third_version_answer_meanwhile(device: FleetDevice) -> None:
    two(device, onnx_models.linear(2))
    job = install(device)
    device.fleet.running(job, "probation")
    data = onnx_models.linear(3)
    path = bundle(device.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version="3.0.0")
    device.cli("models", "add", path)
    ended = device.fleet.ended(job)
    assert ended["state"] == "failed"
    assert "another version answers now" in ended["error"]["text"]
    assert active(device) == "3.0.0"


@pytest.mark.slow
def test_slower_in_its_trial_it_never_answers_unless_the_job_says_so(device: FleetDevice) -> None:
    data = onnx_models.slow_always(2)
    path = bundle(device.folder / "next.edgemodel", {"fp32": ("fp32", onnx_models.linear(1))}, version="1.0.0")
    device.cli("models", "add", path)
    path = bundle(device.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version="2.0.0")
    device.cli("models", "add", path, "--accept-slower")
    device.cli("models", "activate", "m", "1.0.0")
    ended = device.fleet.ended(install(device))
    assert ended["state"] == "failed"
    assert "x as long as 1.0.0 here" in ended["error"]["text"]
    assert active(device) == "1.0.0"
    job = install(device, accept_slower=True)
    device.fleet.running(job, "probation")
    with device.client() as client:
        for _ in range(150):
            client.infer("m", {"x": LIVE})
    assert device.fleet.ended(job)["state"] == "succeeded"
    assert active(device) == "2.0.0"
