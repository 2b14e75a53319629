"""What all tests share: a quiet runtime, patient property tests, short folders for sockets, the recorded boards."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports ONNX Runtime: some tests use it directly, and it would write to the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A shell without job control starts what runs in the background with SIGINT ignored, and so would be every program that
# the tests start and end as Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Where the interpreter matters little: daemons and brokers for nearly every test, kills at every step, long searches.
#: On the Pythons beside the main one a few of these suffice.
_MAIN_ONLY = (
    "tests/core/",
    "tests/deploy/",
    "tests/docs/",
    "tests/fleet/",
    "tests/fuzz/",
    "tests/link/",
    "tests/operations/test_forms.py",
    "tests/selection/test_choice.py::test_twenty_trials",
    "tests/store/test_power.py",
    "tests/systemd/",
    "tests/vm/",
    "tests/work/test_kills.py",
)
_EVERYWHERE = (
    "tests/core/test_daemon.py::test_a_b",
    "tests/core/test_fleet_jobs.py",
    "tests/fleet/test_commands.py",
    "tests/fleet/test_keys.py",
    "tests/link/test_link.py",
    "tests/link/test_outbox.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the main Python alone."""
    for item in items:
        name = f"{item.path.relative_to(ROOT).as_posix()}::{item.name}"
        if name.startswith(_MAIN_ONLY) and not name.startswith(_EVERYWHERE):
            item.add_marker(pytest.mark.main_only)


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
