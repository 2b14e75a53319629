"""Apps say whether answers were right, and the device keeps count; results of golden sets are kept, too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest

from agent.base.errors import NotFoundError, PeerError, TooLargeError
from agent.client import AsyncClient
from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import X, bundle

CONFIG = "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n"


def add(agent: Agent, version: str = "1.0.0", seed: int = 1) -> None:
    data = onnx_models.linear(seed)
    path = bundle(agent.folder / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version=version)
    agent.cli("models", "add", path)


def quality(agent: Agent, version: str = "1.0.0") -> dict:
    found: dict = agent.json("models", "show", "m")["versions"][version]["quality"]
    return found


@pytest.fixture
def device(agent: Agent) -> Agent:
    agent.config.write_text(CONFIG)
    agent.start()
    add(agent)
    return agent


def test_an_app_says_what_was_right(device: Agent) -> None:
    with device.client() as client:
        answer = client.infer("m", {"x": X}, id="r1")
        assert client.feedback("m", correct=True, id=answer.id, version=answer.model_version)
        assert not client.feedback("m", correct=False, id=answer.id, version=answer.model_version)
        assert client.feedback("m", label=3, predicted=4)
        assert client.feedback("m", label="cat", predicted="cat")
        (row,) = client.statistics("m")
        assert row["feedback_stats"] == {"correct": 2, "wrong": 1}

    async def later() -> bool:
        async with AsyncClient(str(device.run / "infer.sock")) as apart:
            return await apart.feedback("m", correct=False)

    assert asyncio.run(later())
    today = datetime.now(timezone.utc)
    days = {(today - timedelta(seconds=back)).strftime("%Y-%m-%d") for back in (0, 60)}
    (day,) = quality(device)["feedback"]
    assert day in days
    assert quality(device)["feedback"][day] == {"correct": 2, "wrong": 2}
    assert "feedback  2 of 4 right in 1 days" in device.cli("models", "show", "m").stdout


def test_what_is_wrong_is_said_and_not_counted(device: Agent) -> None:
    with device.client() as client:
        with pytest.raises(NotFoundError, match="no such model"):
            client.feedback("nothing", correct=True)
        with pytest.raises(NotFoundError, match="no version"):
            client.feedback("m", correct=True, version="9.0.0")
        with pytest.raises(PeerError, match="'label' must be"):
            client.feedback("m", label="x" * 500, predicted="x")
        with pytest.raises(TooLargeError):
            client.feedback("m", label="x" * 5000, predicted="x")
        with pytest.raises(PeerError, match="'label' must be"):
            client.feedback("m")
    assert quality(device)["feedback"] == {}


def test_an_orderly_stop_keeps_it_and_a_damaged_file_costs_it(device: Agent) -> None:
    with device.client() as client:
        client.feedback("m", correct=True)
    device.restart()
    assert list(quality(device)["feedback"].values()) == [{"correct": 1, "wrong": 0}]
    device.stop(signal.SIGKILL)
    kept = device.state / "quality.json"
    kept.write_text(kept.read_text()[:-3])
    device.start()
    assert quality(device)["feedback"] == {}


def test_worse_than_in_its_first_days_raises_an_alert(device: Agent) -> None:
    days = {f"2026-01-{day:02}": [95, 5] if day < 4 else [60, 40] for day in range(1, 7)}
    first = {day: days[day] for day in sorted(days)[:3]}
    row = {"model": "m", "version": "1.0.0", "golden": [], "days": days, "first": first}
    device.stop()
    (device.state / "quality.json").write_text(json.dumps({"versions": [row]}))
    device.start()
    (finding,) = [row for row in device.json("doctor")["findings"] if row["check"] == "quality"]
    assert finding["level"] == "warning"
    assert finding["text"] == "m 1.0.0: 60.0% of its answers are right over 3 days, 95.0% were at first"


def test_results_of_the_golden_set_are_kept(device: Agent) -> None:
    for _ in range(2):
        device.cli("maintenance", "--run", "golden")
    device.restart(signal.SIGKILL)
    results = quality(device)["golden"]
    assert [(row["metric"], row["value"], row["ok"]) for row in results] == [("top1", 1.0, True)] * 2
    assert "golden    top1 1 ok" in device.cli("models", "show", "m").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_whoever_may_not_use_a_model_may_not_judge_it(agent: Agent) -> None:
    agent.config.write_text(CONFIG + "[access.models.m]\nuids = [4711]\n")
    agent.start()
    add(agent)
    for path in (agent.folder, agent.run):
        path.chmod(0o755)
    os.chmod(agent.run / "infer.sock", 0o666)
    for uid, said in ((4711, "True"), (4712, "RefusedError")):
        done = subprocess.run(
            [
                sys.executable, "-c",
                "import os, sys; from agent.client import Client; from agent.base.errors import RefusedError\n"
                "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
                "try:\n print(Client(sys.argv[1]).feedback('m', correct=True))\n"
                "except RefusedError as error:\n print(type(error).__name__)",
                str(agent.run / "infer.sock"), str(uid),
            ],
            env=agent.environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == said
    assert list(quality(agent)["feedback"].values()) == [{"correct": 1, "wrong": 0}]
