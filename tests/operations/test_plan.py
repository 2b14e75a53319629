"""The maintenance plan: when a task is due, what a doubtful clock does to that, and what is kept of a run."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from agent.base.clock import TrustedClock
from agent.base.config import MaintenanceConfig
from agent.base.errors import DamagedError, NotFoundError, TryLaterError
from agent.operations.plan import SETTLE_S, Outcome, Plan, Result, ResultsFile, Task

NOON = datetime(2026, 12, 1, 12, 0, tzinfo=timezone.utc)
HOUR = 3600.0


class Time:
    """Both clocks, moved by hand. ``trusted``: whether the kernel vouches for the date."""

    def __init__(self) -> None:
        self.at = NOON
        self.seconds = 5000.0
        self.trusted = True

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        self.seconds += seconds


class Device:
    """A plan of three tasks: ``disk`` every 6 h, ``scrub`` every 168 h, ``clock`` never."""

    def __init__(self, folder: Path, **config: object) -> None:
        self.path = folder / "maintenance.json"
        self.time = Time()
        self.config = MaintenanceConfig(**{"clock_h": 0.0, **config})
        self.ran: list[str] = []
        self.outcome: Result | Exception = Result(True, "good", {"n": 1})
        self.start()

    def start(self) -> None:
        """A new start of the agent."""
        trusted = TrustedClock(self.time, "auto", datetime(2026, 11, 1, tzinfo=timezone.utc), lambda: self.time.trusted)
        tasks = [
            Task("disk", "free space", lambda c: c.disk_h, lambda go_on: self._run("disk")),
            Task("scrub", "every file", lambda c: c.scrub_h, lambda go_on: self._run("scrub")),
            Task("clock", "the clock", lambda c: c.clock_h, lambda go_on: self._run("clock")),
        ]
        self.plan = Plan(tasks, ResultsFile(self.path), lambda: self.config, trusted, self.time.monotonic)

    def _run(self, name: str) -> Result:
        self.ran.append(name)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def run_what_is_due(self) -> list[str]:
        found = []
        while (name := self.plan.due()) is not None:
            self.plan.run([name], lambda: None)
            found.append(name)
        return found


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_nothing_in_the_first_minutes_then_everything_once_then_by_interval(device: Device) -> None:
    assert device.plan.due() is None
    device.time.pass_(SETTLE_S - 1)
    assert device.plan.due() is None
    device.time.pass_(1)
    assert device.run_what_is_due() == ["disk", "scrub"]
    device.time.pass_(6 * HOUR - 1)
    assert device.run_what_is_due() == []
    device.time.pass_(1)
    assert device.run_what_is_due() == ["disk"]
    device.time.pass_(7 * 24 * HOUR)
    assert device.run_what_is_due() == ["disk", "scrub"]


def test_a_restart_forgets_nothing(device: Device) -> None:
    device.time.pass_(SETTLE_S)
    device.run_what_is_due()
    device.start()
    device.time.pass_(SETTLE_S)
    assert device.run_what_is_due() == []
    assert [row["ok"] for row in device.plan.table()] == [True, True, None]


def test_a_restart_loop_is_no_maintenance_loop(device: Device) -> None:
    for _ in range(50):
        device.start()
        device.time.pass_(SETTLE_S / 2)
        assert device.plan.due() is None


def test_an_interval_of_zero_is_never(device: Device) -> None:
    device.config = MaintenanceConfig(disk_h=0.0, scrub_h=0.0, clock_h=0.0)
    device.time.pass_(10_000 * HOUR)
    assert device.plan.due() is None
    assert device.plan.run(["clock"], lambda: None)[0]["ok"] is True  # on request it runs all the same


def test_a_clock_that_nobody_vouches_for_counts_from_the_start(device: Device) -> None:
    """Dates of earlier runs say nothing then; neither a jump to 1970 nor one to 2099 makes work or keeps from it."""
    device.time.pass_(SETTLE_S)
    device.run_what_is_due()
    device.time.trusted = False
    for date in (datetime(1970, 1, 1, tzinfo=timezone.utc), datetime(2099, 1, 1, tzinfo=timezone.utc)):
        device.time.at = date
        device.start()
        device.time.pass_(SETTLE_S)
        assert device.plan.due() is None
        device.time.pass_(6 * HOUR)
        assert device.run_what_is_due() == ["disk"]


def test_a_result_of_the_future_does_not_keep_a_task_from_running(device: Device) -> None:
    device.time.at = NOON + timedelta(days=900)
    device.time.pass_(SETTLE_S)
    device.run_what_is_due()
    device.time.at = NOON
    device.start()
    device.time.pass_(SETTLE_S)
    assert device.plan.due() is None
    device.time.pass_(6 * HOUR)
    assert device.run_what_is_due() == ["disk"]


def test_only_in_the_window(tmp_path: Path) -> None:
    device = Device(tmp_path, window="0 2 * * *", duration_s=3600, tz="Europe/Berlin")  # 01:00 to 02:00 in UTC
    device.time.pass_(SETTLE_S)
    assert device.plan.due() is None
    device.time.pass_((datetime(2026, 12, 2, 1, 0, tzinfo=timezone.utc) - device.time.at).total_seconds())
    assert device.plan.due() == "disk"
    device.time.trusted = False
    assert device.plan.due() is None
    device.time.trusted = True
    device.time.pass_(HOUR)
    assert device.plan.due() is None
    assert device.plan.run(["disk"], lambda: None)[0]["ok"] is True


def test_a_failure_is_an_outcome_and_waits_its_turn(device: Device) -> None:
    device.outcome = DamagedError("cannot read: the disk is gone")
    device.time.pass_(SETTLE_S)
    assert device.run_what_is_due() == ["disk", "scrub"]
    row = device.plan.table()[0]
    assert (row["ok"], row["text"], row["data"]) == (False, "cannot read: the disk is gone", {})
    assert row["ended_at"] == "2026-12-01T12:15:00Z"


def test_a_stop_is_no_outcome(device: Device) -> None:
    device.outcome = TryLaterError("cannot go on: the agent is stopping")
    stopping = False

    def go_on() -> None:
        if stopping:
            raise TryLaterError("cannot go on: the agent is stopping")

    stopping = True
    with pytest.raises(TryLaterError):
        device.plan.run(["disk"], go_on)
    assert device.plan.table()[0]["ok"] is None
    assert not device.path.exists()


def test_a_name_that_is_none_runs_nothing(device: Device) -> None:
    with pytest.raises(NotFoundError, match="no such task") as refused:
        device.plan.run(["disk", "no-such"], lambda: None)
    assert "scrub" in refused.value.hint
    assert device.ran == []


# What is kept.


def test_what_cannot_be_read_counts_as_never_done(tmp_path: Path) -> None:
    path = tmp_path / "maintenance.json"
    for data in (
        b"",
        b"{",
        b"[]",
        b'{"disk": 1}',
        b'{"disk": {"no": 1}}',
        b"\xff",
        b'{"disk": {"ended_at": 5}}',
        b'{"disk": {"data": []}}',
        b'{"disk": {"ok": "yes"}}',
        b'{"disk": {"text": null}}',
        b"x" * (2 << 20),
    ):
        path.write_bytes(data)
        assert ResultsFile(path).tasks() == {}
    path.unlink()
    path.mkdir()
    assert ResultsFile(path).tasks() == {}


def test_outcomes_are_kept_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "maintenance.json"
    results = ResultsFile(path)
    results.put("disk", Outcome("2026-12-01T00:00:00Z", "2026-12-01T00:00:05Z", True, "good", {"n": 1}))
    results.put("scrub", Outcome("2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z", False, "bad"))
    again = ResultsFile(path)
    assert again.tasks() == results.tasks()
    assert again.latest() == datetime(2026, 12, 1, 0, 0, 5, tzinfo=timezone.utc)
    again.put("disk", Outcome())
    assert json.loads(path.read_bytes())["disk"]["ok"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["maintenance.json"]


def test_dates_that_are_none_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "maintenance.json"
    path.write_text(json.dumps({"disk": {"ended_at": "yesterday", "ok": True}, "scrub": {"ended_at": "2026"}}))
    results = ResultsFile(path)
    assert results.latest().year == 1970
    device = Device(tmp_path)
    device.time.pass_(SETTLE_S)
    assert device.run_what_is_due() == ["disk", "scrub"]


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "gone" / "maintenance.json")
    with pytest.raises(TryLaterError, match="cannot keep what came of maintenance"):
        results.put("disk", Outcome())
