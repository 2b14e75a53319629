"""What all tests share: a quiet runtime, patient property tests, short folders for sockets, the recorded boards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports ONNX Runtime: some tests use it directly, and it would write to the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A busy machine is no failure: no example has a deadline, and generation may be slow. deploy/test.sh asks for fewer
# examples on every Python but the main one: there the question is the interpreter, not the property.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=int(os.environ.get("EDGE_AGENT_TEST_EXAMPLES", "100")),
)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own variables would point a test at the files of whoever runs it."""
    for name in ("EDGE_AGENT_CONFIG", "EDGE_AGENT_STATE_DIR", "EDGE_AGENT_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """An empty folder with a short name: the path of a socket has 107 bytes at most, and ``tmp_path`` may be long."""
    path = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def boards() -> Path:
    """The recorded boards, read in place."""
    named = os.environ.get("EDGE_AGENT_BOARDS")
    places = [Path(named)] if named else [ROOT.parent / "shared" / "boards", ROOT / "shared" / "boards"]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"no recorded boards at {places[0]}: set EDGE_AGENT_BOARDS")
