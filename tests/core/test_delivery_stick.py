"""A device that reaches neither broker nor mirror: it is enrolled by hand, and updated from a stick."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import X, bundle
from tests.fleet.conftest import edge_fleet

DEVICE, NAME = "barn-1", "m"


class Operator:
    """``edge-fleet`` without a broker."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder / "fleet", folder
        self.ok("init", "--tenant", "acme", "--broker", "nowhere.example", "--no-password")
        self.ok("repository", "init", "--no-password")

    def ok(self, *arguments: str) -> Any:
        done = edge_fleet(self.folder, *arguments, "--json")
        assert done.status == 0, done.err
        return done.json

    def stick(self, version: str, seed: int, grant_key: str, to: Path) -> None:
        """A version, and the job that installs it."""
        data = onnx_models.linear(seed)
        path = bundle(self.scratch / "next.edgemodel", {"fp32": ("fp32", data)}, golden_from=data, version=version)
        self.ok("publish", str(path), "--to", str(to))
        self.ok(
            "job", "model.install", f"model={NAME}", f"version={version}", "-d", DEVICE, "--grant-key", grant_key,
            "--to-file", str(to / "job.json"),
        )  # fmt: skip


def identity(agent: Agent) -> dict[str, Any]:
    fleet: dict[str, Any] = agent.json("status")["fleet"]
    return fleet


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path)


@pytest.mark.slow
def test_a_stick_is_enough(agent: Agent, operator: Operator, tmp_path: Path) -> None:
    """What the owner carries: from the device its two public keys, to the device trust.toml, root.json and sticks."""
    shutil.copy(operator.folder / "image" / "trust.toml", agent.folder)
    shutil.copy(operator.folder / "image" / "root.json", agent.folder)
    agent.config.write_text(
        "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n[probation]\nseconds = 1\n"
        'max_latency_ratio = 100.0\n[clock]\ntrust = "always"\n'
    )
    agent.start()
    shown = identity(agent)
    out = tmp_path / "by-hand"
    operator.ok("approve", DEVICE, "--manual", "--identity", shown["identity"], "--yes", "-o", str(out))
    shutil.copy(out / "trust.toml", agent.folder)
    agent.restart()
    assert identity(agent)["device"] == DEVICE

    for version, seed in (("1.0.0", 1), ("2.0.0", 2)):
        stick = tmp_path / f"stick-{version}"
        operator.stick(version, seed, shown["grant"][0], stick)
        done = agent.json("deliver", stick)
        assert done["job"]["state"] == "succeeded" and done["refused"] == [], (done, agent.log.read_text())
        with agent.client() as client:
            answer = client.infer(NAME, {"x": X})
        assert answer.model_version == version
        expected = onnxruntime.InferenceSession(onnx_models.linear(seed)).run(None, {"x": X})[0]
        np.testing.assert_allclose(answer["y"], expected, rtol=1e-4)
        # A stick that comes again, or of another time, changes nothing.
        assert agent.json("deliver", stick)["job"]["state"] == "succeeded"

    again = agent.cli("deliver", tmp_path / "stick-1.0.0", status=1)
    assert "old_generation" in again.stderr + again.stdout
    assert agent.stop() == 0
