"""A new version on a device in use: one that does worse with live requests is taken back, by the agent itself."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest

from agent.base.errors import AgentError
from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import bundle

CONFIG = "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n[probation]\nseconds = 300\n"
#: What apps ask: one number is far beyond those of the golden sets.
LIVE = np.zeros((1, 16), np.float32)
LIVE[0, 3] = 5000.0
PATIENCE_S = 90.0


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def add(agent: Agent, version: str, data: bytes, *options: str, status: int = 0) -> str:
    path = bundle(agent.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version=version)
    done = agent.cli("models", "add", path, *options, status=status)
    return done.stdout + done.stderr


def active(agent: Agent) -> str:
    return str(agent.json("models", "show", "m")["active"])


def outcome(agent: Agent, version: str) -> dict | None:
    record: dict | None = agent.json("models", "show", "m")["versions"][version]["probation"]
    return record


def status(agent: Agent) -> dict:
    with agent.admin() as admin:
        found: dict = admin.call("GET", "/v1/status")
    return found


class Load:
    """Apps that ask all the time. ``versions`` have answered, ``failures`` were told."""

    def __init__(self, agent: Agent, apps: int) -> None:
        self.answered = 0
        self.versions: set[str] = set()
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._agent = agent
        self._threads = [threading.Thread(target=self._ask) for _ in range(apps)]

    def _ask(self) -> None:
        with self._agent.client() as client:
            while not self._stop.is_set():
                try:
                    self.versions.add(client.infer("m", {"x": LIVE}).model_version)
                    self.answered += 1
                except AgentError as error:
                    self.failures.append(str(error))
                time.sleep(0.01)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def asking(agent: Agent, apps: int = 3):
    load = Load(agent, apps)
    load.start()
    try:
        yield load
    finally:
        load.stop()


@pytest.fixture
def device(agent: Agent) -> Agent:
    """1.0.0 answers."""
    agent.config.write_text(CONFIG)
    agent.start()
    add(agent, "1.0.0", onnx_models.linear(1))
    return agent


def test_one_that_is_slow_with_live_requests_goes_and_no_request_fails(device: Agent) -> None:
    """Its golden set is as quick as that of the version before: no trial can see it."""
    with asking(device) as load:
        until(lambda: load.answered > 100, "apps get answers")
        add(device, "2.0.0", onnx_models.slow_at(2))
        until(lambda: active(device) == "1.0.0", "the version before answers again")
        answered = load.answered
        until(lambda: load.answered > answered + 50, "apps get answers")
    assert load.failures == []
    assert load.versions == {"1.0.0", "2.0.0"}
    record = outcome(device, "2.0.0")
    assert record is not None
    assert (record["state"], record["code"], record["before"]) == ("rolled_back", "latency", "1.0.0")
    assert "3 x is allowed" in record["text"]
    found = status(device)
    assert found["probation"] == {}
    (finding,) = [row for row in device.json("doctor")["findings"] if row["check"] == "probation"]
    assert finding["level"] == "warning"
    assert "m 2.0.0 was taken back, 1.0.0 answers: p50 " in finding["text"]
    # Nobody gets to it by going back, and it can be named.
    assert "no previous version" in device.cli("models", "rollback", "m", status=1).stderr
    device.cli("models", "activate", "m", "2.0.0")
    assert active(device) == "2.0.0"
    assert [row for row in device.json("doctor")["findings"] if row["check"] == "probation"] == []


@pytest.mark.slow
def test_one_that_fails_on_live_requests_goes(device: Agent) -> None:
    with asking(device) as load:
        until(lambda: load.answered > 100, "apps get answers")
        add(device, "2.0.0", onnx_models.fails_at(2))
        until(lambda: active(device) == "1.0.0", "the version before answers again")
        failed, answered = len(load.failures), load.answered
        until(lambda: load.answered > answered + 50, "apps get answers")
        assert len(load.failures) <= failed + 3  # those that were under way
    assert all("ONNX Runtime" in failure for failure in load.failures)
    record = outcome(device, "2.0.0")
    assert record is not None
    assert (record["state"], record["code"]) == ("rolled_back", "errors")


@pytest.mark.slow
def test_one_that_does_well_stays(device: Agent) -> None:
    with asking(device) as load:
        until(lambda: load.answered > 100, "apps get answers")
        add(device, "2.0.0", onnx_models.linear(2))
        until(lambda: outcome(device, "2.0.0") is not None, "it has passed")
    assert load.failures == []
    record = outcome(device, "2.0.0")
    assert record is not None
    assert record["state"] == "passed"
    assert record["seen"]["requests"] >= 200
    assert active(device) == "2.0.0"
    shown = device.cli("models", "show", "m").stdout
    assert "probation passed" in shown


@pytest.mark.slow
def test_a_wrong_request_is_no_fault_of_the_version(device: Agent) -> None:
    add(device, "2.0.0", onnx_models.linear(2))
    with device.client() as client:
        for _ in range(30):
            with pytest.raises(AgentError, match="shape"):
                client.infer("m", {"x": np.zeros((1, 3), np.float32)})
        for _ in range(200):
            client.infer("m", {"x": LIVE})
    until(lambda: outcome(device, "2.0.0") is not None, "it has passed")
    record = outcome(device, "2.0.0")
    assert record is not None
    assert (record["state"], record["seen"]["failed"]) == ("passed", 0)


@pytest.mark.slow
def test_kill_9_in_the_middle_and_it_goes_on(device: Agent) -> None:
    add(device, "2.0.0", onnx_models.linear(2))
    with device.client() as client:
        for _ in range(100):
            client.infer("m", {"x": LIVE})
    kept = device.state / "probation.json"

    def written() -> int:
        (row,) = json.loads(kept.read_text())["cases"]
        return int(row["course"]["new"]["answered"])

    until(lambda: written() == 100, "what was seen is on the disk")
    assert "on probation: 2.0.0, 100 of 200 requests" in device.cli("models", "show", "m").stdout
    device.restart(signal.SIGKILL)
    assert status(device)["probation"]["m"]["requests"] == 100
    with device.client() as client:
        for _ in range(99):
            client.infer("m", {"x": LIVE})
        assert active(device) == "2.0.0"
        assert outcome(device, "2.0.0") is None
        client.infer("m", {"x": LIVE})
    until(lambda: outcome(device, "2.0.0") is not None, "it has passed")
    assert active(device) == "2.0.0"


@pytest.mark.slow
def test_a_version_that_brings_the_agent_down_again_and_again_goes(device: Agent) -> None:
    add(device, "2.0.0", onnx_models.linear(2))
    device.restart(signal.SIGTERM)  # an orderly stop counts for nothing
    for _ in range(3):
        device.restart(signal.SIGKILL)
        assert active(device) == "2.0.0"
    device.restart(signal.SIGKILL)
    assert active(device) == "1.0.0"
    record = outcome(device, "2.0.0")
    assert record is not None
    assert (record["state"], record["code"]) == ("rolled_back", "interrupted")
    with device.client() as client:
        assert client.infer("m", {"x": LIVE}).model_version == "1.0.0"


@pytest.mark.slow
def test_the_owner_decides_otherwise_meanwhile(device: Agent) -> None:
    add(device, "2.0.0", onnx_models.linear(2))
    assert set(status(device)["probation"]) == {"m"}
    device.cli("models", "rollback", "m")
    until(lambda: status(device)["probation"] == {}, "nothing is on probation")
    assert active(device) == "1.0.0"
    assert outcome(device, "2.0.0") is None


@pytest.mark.slow
def test_a_file_that_was_cut_off_costs_what_was_seen_and_no_start(device: Agent) -> None:
    add(device, "2.0.0", onnx_models.linear(2))
    device.stop(signal.SIGKILL)
    kept = device.state / "probation.json"
    kept.write_bytes(kept.read_bytes()[:-20])
    device.start()
    assert status(device)["probation"] == {}
    assert active(device) == "2.0.0"
    assert "what was on probation is lost" in device.log.read_text()


@pytest.mark.slow
def test_a_device_may_have_none_of_it(agent: Agent) -> None:
    agent.config.write_text(CONFIG + "local = false\n")
    agent.start()
    for version in ("1.0.0", "2.0.0"):
        add(agent, version, onnx_models.linear(1))
    assert status(agent)["probation"] == {}
    assert active(agent) == "2.0.0"


# -- beside the active version, in the trial ---------------------------------------------------------------------------


def test_one_that_is_slower_in_the_trial_is_not_taken_unless_somebody_wants_it(device: Agent) -> None:
    slow = onnx_models.slow_always(2)
    said = add(device, "2.0.0", slow, status=1)
    assert "x as long as 1.0.0 here" in said
    assert "--accept-slower" in said
    assert list(device.json("models", "show", "m")["versions"]) == ["1.0.0"]
    add(device, "2.0.0", slow, "--accept-slower")
    shown = device.json("models", "show", "m")
    assert shown["active"] == "2.0.0"
    beside = shown["versions"]["2.0.0"]["beside"]
    assert (beside["version"], beside["how"], beside["worse"]) == ("1.0.0", "measured together", "")
    assert beside["latency"]["ratio"] > 1.5
    assert beside["agreement"]["new_on_active_golden"] is not None
    assert "beside 1.0.0 (measured together): p50 " in device.cli("models", "explain", "m").stdout


@pytest.mark.slow
def test_the_packer_may_say_that_a_slower_one_is_meant(device: Agent) -> None:
    data = onnx_models.slow_always(2)
    path = bundle(
        device.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version="2.0.0",
        accept_slower=True,
    )  # fmt: skip
    device.cli("models", "add", path)
    assert active(device) == "2.0.0"


@pytest.mark.slow
def test_one_that_keeps_to_its_own_limit_may_be_slower(device: Agent) -> None:
    data = onnx_models.slow_always(2)
    path = bundle(
        device.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version="2.0.0",
        max_latency_ms=10_000.0,
    )  # fmt: skip
    device.cli("models", "add", path)
    assert active(device) == "2.0.0"


# -- answers of both versions, compared --------------------------------------------------------------------------------


def shadowed(agent: Agent, second: bytes) -> dict:
    """What came of 2.0.0, with every answer compared that the device finds the time for."""
    agent.config.write_text(CONFIG.replace("seconds = 300", "seconds = 15\nrequests = 100000\nshadow = 1.0"))
    agent.start()
    add(agent, "1.0.0", onnx_models.linear(1))
    generator = np.random.default_rng(3)
    with agent.client() as client:
        client.infer("m", {"x": LIVE})
        add(agent, "2.0.0", second)
        while (record := outcome(agent, "2.0.0")) is None:
            for _ in range(10):
                client.infer("m", {"x": generator.standard_normal((1, 16)).astype(np.float32)})
                time.sleep(0.02)
    return record


@pytest.mark.slow
def test_one_that_answers_otherwise_goes_where_somebody_compares(agent: Agent) -> None:
    record = shadowed(agent, onnx_models.linear(2))
    assert (record["state"], record["code"]) == ("rolled_back", "agreement")
    assert "it agrees by 0." in record["text"]
    assert active(agent) == "1.0.0"


@pytest.mark.slow
def test_one_that_answers_alike_stays(agent: Agent) -> None:
    record = shadowed(agent, onnx_models.linear(1))
    assert (record["state"], record["seen"]["agreement"]) == ("passed", 1.0)
    assert record["seen"]["compared"] >= 20
