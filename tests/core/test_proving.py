"""The trial of a release: a core of its own comes up, the device's store opens, models answer; nothing is changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import bundle

CONFIG = "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n"


def prove(state: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent.core.proving", "--state-dir", state],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120, **options,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


@pytest.fixture
def proven(agent: Agent, tmp_path: Path) -> Agent:
    """A core that serves a model with a golden set, of which the trial knows nothing but its folder."""
    agent.config.write_text(CONFIG)
    agent.start()
    data = onnx_models.linear()
    agent.cli("models", "add", bundle(tmp_path / "m.edgemodel", {"fp32": ("fp32", data)}, golden_from=data))
    return agent


def blobs(agent: Agent) -> list[Path]:
    return sorted(path for path in (agent.state / "store/blobs").iterdir() if path.suffix != ".header")


@pytest.mark.slow
def test_beside_the_core_that_runs_and_without_a_trace(proven: Agent) -> None:
    before = {path: path.stat().st_mtime_ns for path in proven.state.rglob("*") if "journal" not in path.name}
    done = prove(proven.state)
    assert (done.returncode, done.stdout) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_device_without_a_store_yet(tmp_path: Path) -> None:
    assert prove(tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_does_not_open_is_told(proven: Agent) -> None:
    for path in blobs(proven):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    done = prove(proven.state)
    assert done.returncode == 1 and "error: cannot read m 1.0.0" in done.stdout


@pytest.mark.slow
def test_a_store_that_this_release_cannot_read_is_told(proven: Agent) -> None:
    assert proven.stop() == 0
    for path in (proven.state / "store/catalog").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    done = prove(proven.state)
    assert done.returncode == 1 and "error: cannot" in done.stdout
