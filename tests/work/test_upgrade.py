"""A journal of the version before is carried over, at any kill point; one of a later version is left alone.

``journal-1.sql`` is a journal of schema 1 as ``sqlite3 journal.db .dump`` writes it: jobs queued, running, interrupted,
being taken back and ended, a desired state, refusals, maintenance, a fact.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from agent.base.errors import DamagedError, UnsupportedError
from agent.work.jobs import Ending, Failure, Refusal, WindowSpec
from agent.work.journal import Journal
from agent.work.runner import Runner
from agent.work.schema import VERSIONS
from agent.work.steps import Step
from tests.work.simulation import Handed, SimulatedClock, order

DUMP = Path(__file__).with_name("journal-1.sql")


@pytest.fixture
def old(folder: Path) -> Path:
    path = folder / "journal.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(DUMP.read_text())
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA journal_mode = WAL")
    path.chmod(0o600)
    return path


def test_everything_is_there(old: Path, clock: SimulatedClock) -> None:
    with Journal(old, clock) as journal:
        states = {status.job_id: (status.state, status.phase, status.rev) for status in journal.jobs()}
        assert states == {
            "queued": ("queued", None, 1),
            "waiting": ("running", "waiting_window", 2),
            "interrupted": ("running", "installing", 3),
            "going-back": ("running", "trying", 4),
            "succeeded": ("succeeded", None, 3),
            "rejected": ("rejected", None, 1),
        }
        assert [status.job_id for status in journal.unpublished()] == [
            "interrupted", "going-back", "queued", "waiting", "rejected",
        ]  # fmt: skip
        assert all(journal.job(job_id).intact for job_id in states)
        assert journal.job("waiting").order.window == WindowSpec("0 22 * * *", 3600, "Europe/Berlin")
        assert journal.terminal("succeeded").result == {"freed_bytes": 4096}
        assert journal.terminal("rejected").error == Failure("bad_args", "cannot take arguments: model", "name it")
        going_back = journal.job("going-back").progress
        assert going_back.begun == ("a", "b") and going_back.notes == {"before": "1.0.0"}
        assert going_back.ending == Ending("failed", Failure("failed", "cannot do b: no"))
        assert (going_back.stalled, journal.job("queued").progress.stalled) == (1, 0)
        assert journal.last() == (2, 9, 8)
        assert journal.desired() == (4, b"the desired state")
        assert journal.refusals() == {"bad_signature": 7, "expired": 1}
        assert journal.maintenance.tasks()["scrub"].data == {"blobs": 3}
        assert journal.facts.get("clock-floor") == "2026-03-01T00:00:00+00:00"


def test_jobs_go_on(old: Path, clock: SimulatedClock) -> None:
    log: list[str] = []

    def step(name: str) -> Step:
        return Step(
            name,
            "installing",
            lambda turn: log.append(f"{turn.job.job_id} do {name}"),
            undo=lambda turn: log.append(f"{turn.job.job_id} undo {name}"),
        )

    todo = []
    with Journal(old, clock) as journal:
        runner = Runner(
            journal,
            {"program": lambda args: [step("a"), step("b")]},
            Handed(lambda lane, name, work: todo.append(work)),
            clock=clock,
            clock_trusted=clock.trusted,
            boot_nonce="0",
            verify=lambda order: None,
        )
        clock.pass_time(9 * 3600)
        while runner.wake() is None and todo:
            while todo:
                todo.pop()()
        ends = {status.job_id: status.state for status in journal.jobs()}
        assert ends == {
            "queued": "succeeded", "waiting": "succeeded", "interrupted": "succeeded", "going-back": "failed",
            "succeeded": "succeeded", "rejected": "rejected",
        }  # fmt: skip
        assert [line for line in log if "interrupted" in line] == ["interrupted do b"]
        assert [line for line in log if "going-back" in line] == ["going-back undo b", "going-back undo a"]
        with pytest.raises(Refusal):
            journal.accept(order(8, epoch=2), epoch=2, generation=9, document=b"other")
        assert journal.accept(order(9, epoch=2), epoch=2, generation=10, document=b"10") == "accepted"


def test_the_same_tables_as_a_new_one(old: Path, folder: Path, clock: SimulatedClock) -> None:
    def tables(path: Path) -> set[tuple[str, str]]:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (len(VERSIONS),)
            return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))

    for path in (old, folder / "new.db"):
        Journal(path, clock).open().close()
    assert tables(old) == tables(folder / "new.db")


def test_killed_while_carrying_over(old: Path, clock: SimulatedClock) -> None:
    class Killed(BaseException):
        pass

    def step(name: str) -> None:
        if name == "before: carry the journal over":
            raise Killed

    with pytest.raises(Killed):
        Journal(old, clock, step=step).open()
    with contextlib.closing(sqlite3.connect(old)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    test_everything_is_there(old, clock)
    test_everything_is_there(old, clock)


def later(path: Path, *statements: str, oldest: int = 0) -> None:
    """What a release to come leaves behind; ``oldest``: which may go on with it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(VERSIONS) + 1}")
        connection.execute(f"PRAGMA application_id = {oldest}")
        connection.commit()


MORE = (
    "ALTER TABLE jobs ADD COLUMN rung INTEGER NOT NULL DEFAULT 7",
    "ALTER TABLE facts ADD COLUMN since TEXT",
    "ALTER TABLE refusals ADD COLUMN last TEXT",
    "CREATE TABLE bells (name TEXT PRIMARY KEY)",
    "INSERT INTO bells VALUES ('door')",
)


def test_the_release_before_goes_on_with_what_a_later_one_only_added_to(old: Path, clock: SimulatedClock) -> None:
    """An update was taken back: its journal is the one that there is, and no job of it is lost."""
    with Journal(old, clock):
        pass  # carried over to the present version
    later(old, *MORE, oldest=len(VERSIONS))
    with Journal(old, clock) as journal:
        assert len(journal.jobs()) == 6
        assert journal.last() == (2, 9, 8)
        journal.facts.put("clock-floor", "2026-04-01T00:00:00+00:00")
        journal.refused("bad_signature")
    with contextlib.closing(sqlite3.connect(old)) as connection:
        assert connection.execute("SELECT DISTINCT rung FROM jobs").fetchall() == [(7,)]
        assert connection.execute("SELECT * FROM bells").fetchall() == [("door",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(VERSIONS) + 1,)
        assert connection.execute("PRAGMA application_id").fetchone() == (len(VERSIONS),)
    with Journal(old, clock) as journal:
        assert journal.facts.get("clock-floor") == "2026-04-01T00:00:00+00:00"


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE jobs ADD COLUMN must TEXT NOT NULL DEFAULT ''; ALTER TABLE facts RENAME COLUMN value TO worth",
        "DROP TABLE maintenance",
        "DROP TABLE facts; CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL)",
        "DROP TABLE refusals; CREATE TABLE refusals (code TEXT PRIMARY KEY, count INTEGER NOT NULL, why TEXT NOT NULL)",
    ],
    ids=["renamed", "gone", "another type", "must be given"],
)
def test_a_later_version_that_changed_more_than_it_says(old: Path, clock: SimulatedClock, statement: str) -> None:
    with Journal(old, clock):
        pass
    later(old, *statement.split("; "), oldest=1)
    with pytest.raises(DamagedError, match="not those of a job journal"):
        Journal(old, clock).open()


def test_a_later_version_that_only_its_next_of_kin_may_use(old: Path, clock: SimulatedClock) -> None:
    with Journal(old, clock):
        pass
    later(old, *MORE, oldest=len(VERSIONS) + 1)
    with pytest.raises(UnsupportedError, match="this agent knows"):
        Journal(old, clock).open()


def test_a_later_version(old: Path, clock: SimulatedClock) -> None:
    with contextlib.closing(sqlite3.connect(old)) as connection:
        connection.execute(f"PRAGMA user_version = {len(VERSIONS) + 1}")
    before = old.read_bytes()
    with pytest.raises(UnsupportedError, match=f"is of version {len(VERSIONS) + 1}, this agent knows") as caught:
        Journal(old, clock).open()
    assert "run the agent that wrote it" in caught.value.hint
    assert old.read_bytes() == before
