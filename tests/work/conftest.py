"""A folder in memory, a clock that stands still, a journal in its first enrolment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.work.journal import Journal
from tests.work.simulation import SimulatedClock


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edge-agent-test-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def journal(folder: Path, clock: SimulatedClock) -> Iterator[Journal]:
    with Journal(folder / "journal.db", clock, clock_trusted=clock.trusted) as opened:
        opened.begin_epoch(1)
        yield opened
