"""What the journal takes, refuses, keeps and tells."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.base.errors import ConflictError, TryLaterError
from agent.work import journal as module
from agent.work.jobs import Failure, Order, Progress, Refusal, WindowSpec, move
from agent.work.journal import Journal
from tests.work.simulation import SimulatedClock, order


def accept(journal: Journal, number: int, job: Order | None = None, **more: Any) -> str:
    """Document ``number`` with the job of that number."""
    return journal.accept(
        job or order(number), **{"epoch": 1, "generation": number, "document": b"document %d" % number} | more
    )


def code_of(journal: Journal, number: int, job: Order | None = None, **more: Any) -> str:
    """The reason code with which it is refused; nothing else changes."""
    before = (journal.last(), journal.jobs())
    with pytest.raises(Refusal) as caught:
        accept(journal, number, job, **more)
    assert (journal.last(), journal.jobs()) == before
    return caught.value.code


def end(journal: Journal, job_id: str, state: str = "succeeded") -> int:
    """As a runner would; the last ``rev``."""
    record = journal.job(job_id)
    after = move(record.progress, state=state, attempt=1)
    assert journal.save(record.key, record.progress, after)
    return after.rev


# -- what is taken ----------------------------------------------------------------------------------------------------


def test_accepted_and_there_after_a_restart(journal: Journal, folder: Path, clock: SimulatedClock) -> None:
    given = order(
        1,
        args={"model": "digits", "nested": {"list": [1, 2.5, None, True, "ü"]}},
        lane="rescue",
        priority=9,
        not_after="2026-12-24T18:00:00Z",
        window=WindowSpec("0 3 * * *", 600, "Europe/Berlin"),
    )
    assert accept(journal, 1, given) == "accepted"
    journal.close()
    with Journal(folder / "journal.db", clock) as again:
        record = again.job("job-1")
        assert record.order == given and record.intact
        assert record.progress == Progress()
        assert [status.state for status in again.unpublished()] == ["queued"]
        assert again.last() == (1, 1, 1)


def test_the_same_document_again_is_published_again(journal: Journal) -> None:
    accept(journal, 1)
    journal.published("job-1", end(journal, "job-1"))
    assert journal.unpublished() == []
    assert accept(journal, 1) == "duplicate"
    assert [status.state for status in journal.unpublished()] == ["succeeded"]
    assert journal.last() == (1, 1, 1)


def test_a_known_job_in_a_new_document(journal: Journal) -> None:
    accept(journal, 1)
    assert accept(journal, 2, order(1)) == "duplicate"
    assert accept(journal, 3, replace(order(1), envelope=b"signed by another")) == "duplicate"
    assert journal.last() == (1, 3, 1)
    assert len(journal.jobs()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"op": "other"}, {"args": {"a": 1}}, {"lane": "rescue"}, {"priority": 1}, {"seq": 9}, {"kind": "destroy"},
        {"not_after": "2030-01-01T00:00:00Z"}, {"step_timeout_s": 1.0}, {"total_timeout_s": 1.0},
        {"window": WindowSpec("0 3 * * *", 600)},
    ],
    ids=str,
)  # fmt: skip
def test_another_job_of_a_known_id(journal: Journal, change: dict[str, Any]) -> None:
    accept(journal, 1)
    assert code_of(journal, 2, order(1, **change)) == "job_id_taken"


def test_what_was_said_before(journal: Journal) -> None:
    accept(journal, 5, order(5))
    assert code_of(journal, 4, order(6)) == "old_generation"
    assert code_of(journal, 5, order(6), document=b"another") == "old_generation"
    assert code_of(journal, 6, order(7, seq=5)) == "old_sequence"
    assert code_of(journal, 6, order(4)) == "old_sequence"
    assert code_of(journal, 6, order(6, epoch=0), epoch=0) == "old_epoch"
    assert code_of(journal, 6, order(6, epoch=2), epoch=2) == "future_epoch"
    assert accept(journal, 6, order(60)) == "accepted"


def test_a_document_is_taken_whole_or_not_at_all(journal: Journal) -> None:
    """A refused job takes with it what its document cancels."""
    accept(journal, 1)
    assert code_of(journal, 2, order(2, seq=1), cancel=["job-1"]) == "old_sequence"
    assert journal.job("job-1").progress.state == "queued"


def test_a_document_that_only_cancels(journal: Journal) -> None:
    accept(journal, 1)
    verdict = journal.accept(None, epoch=1, generation=2, document=b"cancel", cancel=["job-1", "unknown"])
    assert verdict == "accepted"
    status = journal.terminal("job-1")
    assert (status.state, status.rev, status.error.code) == ("cancelled", 2, "cancelled")
    assert journal.accept(None, epoch=1, generation=2, document=b"cancel", cancel=["job-1"]) == "duplicate"
    assert journal.terminal("job-1") == status


def test_a_document_that_cancels_its_own_job(journal: Journal) -> None:
    """What it cancels was before it; and when it comes again it cancels nothing."""
    accept(journal, 1, cancel=["job-1"])
    assert accept(journal, 1, cancel=["job-1"]) == "duplicate"
    assert journal.job("job-1").progress.state == "queued"


@pytest.mark.parametrize(
    ("change", "trusted", "code"),
    [
        ({"window": WindowSpec("0 3 30 2 *", 600)}, True, "bad_args"),
        ({"window": WindowSpec("nonsense", 600)}, True, "bad_args"),
        ({"window": WindowSpec("0 3 * * *", 600, "Mars/Olympus")}, True, "bad_args"),
        ({"window": WindowSpec("0 3 * * *", 600)}, False, "clock_untrusted"),
        ({"not_after": "2030-01-01T00:00:00Z"}, False, "clock_untrusted"),
        ({"not_after": "2026-03-28T11:59:59Z"}, True, "expired"),
        ({"not_after": "2026-02-30T00:00:00Z"}, True, "bad_args"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_run_is_written_down_as_rejected(
    journal: Journal, clock: SimulatedClock, change: dict[str, Any], trusted: bool, code: str
) -> None:
    """So that the fleet learns why; it has used its number up."""
    clock.is_trusted = trusted
    assert accept(journal, 1, order(1, **change)) == "accepted"
    status = journal.terminal("job-1")
    assert (status.state, status.error.code, status.clock_trusted) == ("rejected", code, trusted)
    assert journal.unpublished() == [status] and journal.waiting() == []
    assert accept(journal, 1, order(1, **change)) == "duplicate"
    assert code_of(journal, 2, order(2, seq=1)) == "old_sequence"


def test_what_the_caller_rejects(journal: Journal) -> None:
    accept(journal, 1, rejection=Failure("wrong_class", "cannot take job: no", "try another"))
    status = journal.terminal("job-1")
    assert (status.state, status.error) == ("rejected", Failure("wrong_class", "cannot take job: no", "try another"))


def test_too_many_wait(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 3)
    for number in (1, 2, 3):
        accept(journal, number)
    assert code_of(journal, 4) == "busy"
    # Room that the document itself makes is room; and a rejection needs none.
    assert accept(journal, 4, cancel=["job-2"]) == "accepted"
    assert accept(journal, 5, rejection=Failure("bad_args", "no")) == "accepted"
    end(journal, "job-1")
    assert accept(journal, 6) == "accepted"


def test_nobody_listens(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that the fleet does not have are not dropped: no more jobs are taken instead."""
    monkeypatch.setattr(module, "MAX_UNTOLD", 3)
    for number in (1, 2, 3):
        accept(journal, number, rejection=Failure("bad_args", "no"))
    assert code_of(journal, 4) == "busy"
    journal.published("job-1", 1)
    assert accept(journal, 4) == "accepted"


def test_args_that_are_no_json(journal: Journal) -> None:
    for args in ({"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            accept(journal, 1, order(1, args=args))
    assert journal.last() == (1, 0, 0)


# -- enrolments -------------------------------------------------------------------------------------------------------


def test_a_new_enrolment(journal: Journal) -> None:
    """Counters restart; what the old fleet wanted is over, and is nobody's business."""
    accept(journal, 7, order(7))
    accept(journal, 8, order(8))
    journal.accept_desired(3, b"desired", epoch=1)
    running = journal.job("job-8")
    journal.save(running.key, running.progress, move(running.progress, state="running", attempt=1))
    journal.begin_epoch(2)
    assert journal.last() == (2, 0, 0) and journal.desired() == (0, b"")
    assert journal.unpublished() == []
    assert journal.terminal("job-7").error.code == "old_epoch"
    assert journal.is_cancelled(running.key)
    assert accept(journal, 1, order(7, epoch=2, seq=1), epoch=2) == "accepted"
    assert journal.job("job-7").order.epoch == 2
    assert [status.epoch for status in journal.unpublished()] == [2]
    assert code_of(journal, 9, order(9), epoch=1) == "old_epoch"


def test_the_same_enrolment_and_an_earlier_one(journal: Journal) -> None:
    accept(journal, 1)
    journal.begin_epoch(1)
    assert journal.last() == (1, 1, 1)
    with pytest.raises(Refusal) as caught:
        journal.begin_epoch(0)
    assert caught.value.code == "old_epoch"


# -- what the fleet is told -------------------------------------------------------------------------------------------


def test_a_state_is_told_until_it_is_confirmed(journal: Journal, folder: Path, clock: SimulatedClock) -> None:
    accept(journal, 1)
    first = journal.unpublished()[0]
    last = end(journal, "job-1")
    journal.published("job-1", first.rev)  # the confirmation of an earlier one
    assert [status.rev for status in journal.unpublished()] == [last]
    journal.close()
    with Journal(folder / "journal.db", clock) as again:
        assert [status.rev for status in again.unpublished()] == [last]
        again.published("job-1", last)
        again.published("job-1", first.rev)
        again.published("job-1", 1 << 40)
        again.published("unknown", 1)
        assert again.unpublished() == []


def test_old_ends_are_forgotten_and_never_done_again(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 3)
    for number in range(1, 9):
        accept(journal, number)
        rev = end(journal, f"job-{number}")
        if number != 2:
            journal.published(f"job-{number}", rev)
    kept = {status.job_id for status in journal.jobs()}
    assert kept == {"job-2", "job-6", "job-7", "job-8"}, "what the fleet does not know yet is kept"
    assert journal.job("job-1") is None
    assert code_of(journal, 9, order(1)) == "old_sequence"


def test_an_end_is_an_end(journal: Journal) -> None:
    accept(journal, 1)
    before = journal.job("job-1").progress
    end(journal, "job-1")
    key = journal.job("job-1").key
    assert not journal.save(key, before, move(before, state="failed"))
    with pytest.raises(ValueError, match="from succeeded to running"):
        move(journal.job("job-1").progress, state="running")
    journal.cancel(["job-1"])
    assert journal.terminal("job-1").state == "succeeded"
    assert journal.job("job-1").order.envelope == b"", "it has served"


def test_a_list(journal: Journal) -> None:
    for number in range(1, 6):
        accept(journal, number)
    end(journal, "job-5")
    assert [status.job_id for status in journal.jobs(limit=2)] == ["job-5", "job-4"]
    assert [status.job_id for status in journal.jobs(limit=2, open_only=True)] == ["job-4", "job-3"]
    assert journal.job("unknown") is None and journal.terminal("unknown") is None and journal.load(99) is None


# -- the small tables -------------------------------------------------------------------------------------------------


def test_the_desired_state(journal: Journal, folder: Path, clock: SimulatedClock) -> None:
    assert journal.desired() == (0, b"")
    assert journal.accept_desired(4, b"four", epoch=1) == "accepted"
    assert journal.accept_desired(4, b"four", epoch=1) == "duplicate"
    for version, document, epoch, code in (
        (4, b"other", 1, "old_version"),
        (3, b"three", 1, "old_version"),
        (5, b"five", 2, "future_epoch"),
        (5, b"five", 0, "old_epoch"),
    ):
        with pytest.raises(Refusal) as caught:
            journal.accept_desired(version, document, epoch=epoch)
        assert caught.value.code == code
    journal.close()
    with Journal(folder / "journal.db", clock) as again:
        assert again.desired() == (4, b"four")


def test_refusals_are_counted_and_cost_no_writes(folder: Path, clock: SimulatedClock) -> None:
    writes: list[str] = []
    with Journal(folder / "journal.db", clock, step=writes.append) as journal:
        writes.clear()
        for _ in range(1000):
            journal.refused("bad_signature")
        journal.refused("expired")
        assert writes == []
        assert journal.refusals() == {"bad_signature": 1000, "expired": 1}
        clock.pass_time(61)
        journal.refused("expired")
        assert len(writes) == 2  # before and after one commit
        assert journal.refusals() == {"bad_signature": 1000, "expired": 2}
        journal.refused("expired")
        for number in range(1000):
            journal.refused(f"code-{number}")
        assert len(journal.refusals()) < 100
    with Journal(folder / "journal.db", clock) as again:
        assert again.refusals()["expired"] == 3


def test_maintenance(journal: Journal, folder: Path, clock: SimulatedClock) -> None:
    journal.maintenance.started("scrub", "2026-01-01T00:00:00Z")
    assert journal.maintenance.tasks()["scrub"].ok is None
    journal.maintenance.ended("scrub", "2026-01-01T00:01:00Z", ok=False, text="one is damaged", data={"blobs": 3})
    journal.maintenance.started("scrub", "2026-01-02T00:00:00Z")
    journal.close()
    with Journal(folder / "journal.db", clock) as again:
        task = again.maintenance.tasks()["scrub"]
        assert (task.started_at, task.ended_at) == ("2026-01-02T00:00:00Z", "2026-01-01T00:01:00Z")
        assert (task.ok, task.text, task.data) == (False, "one is damaged", {"blobs": 3})


def test_facts(journal: Journal) -> None:
    assert journal.facts.get("clock") is None
    journal.facts.put("clock", "2026")
    journal.facts.put("clock", "2027")
    assert journal.facts.get("clock") == "2027"
    journal.facts.put("clock", None)
    assert journal.facts.get("clock") is None


# -- the file ---------------------------------------------------------------------------------------------------------


def test_nobody_else_may_read_it(journal: Journal, folder: Path) -> None:
    accept(journal, 1)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert files == {"journal.db": 0o600, "journal.db-wal": 0o600}
    journal.close()
    assert [path.name for path in folder.iterdir()] == ["journal.db"]


def test_one_at_a_time(journal: Journal, folder: Path, clock: SimulatedClock) -> None:
    other = "import sys, pathlib; from agent.work.journal import Journal; from agent.base.clock import SystemClock\n"
    other += "Journal(pathlib.Path(sys.argv[1]), SystemClock()).open()"
    command = [sys.executable, "-c", other, str(folder / "journal.db")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "ConflictError: cannot open the job journal: database is locked" in found.stderr
    with pytest.raises(ConflictError):
        Journal(folder / "journal.db", clock).open()
    accept(journal, 1)


def test_closed(journal: Journal) -> None:
    journal.close()
    journal.close()
    for action in (journal.unpublished, lambda: accept(journal, 1), lambda: journal.cancel(["job-1"])):
        with pytest.raises(TryLaterError, match="not open"):
            action()


def test_many_threads(journal: Journal) -> None:
    """The event loop accepts and cancels while both lanes write."""
    problems: list[BaseException] = []
    for number in range(1, 41):
        accept(journal, number)

    def work(first: int) -> None:
        try:
            for number in range(first, 41, 4):
                record = journal.job(f"job-{number}")
                if record.progress.has_ended:
                    continue
                running = move(record.progress, state="running", attempt=1)
                if journal.save(record.key, record.progress, running):
                    journal.is_cancelled(record.key)
                    assert journal.save(record.key, running, move(running, state="succeeded"))
                journal.unpublished()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(1, 5)]
    for thread in threads:
        thread.start()
    for number in range(41, 81):
        accept(journal, number, cancel=[f"job-{81 - number}"])
        journal.published(f"job-{81 - number}", 1)
        journal.refused("expired")
    for thread in threads:
        thread.join(60)
    assert problems == []
    states = {status.job_id: status.state for status in journal.jobs()}
    assert {states[f"job-{number}"] for number in range(1, 41)} <= {"succeeded", "cancelled"}


ACCEPT = """
import os, pathlib, sys
from agent.base.clock import SystemClock
from agent.work.journal import Journal
from tests.work.simulation import order
with Journal(pathlib.Path(sys.argv[1]), SystemClock()) as journal:
    journal.begin_epoch(1)
    for number in (1, 2, 3):
        os.write(1, b"begin")
        journal.accept(order(number), epoch=1, generation=number, document=b"%d" % number)
        os.write(1, b"accepted")
    os.write(1, b"begin")
    journal.published("job-1", 1)
    os.write(1, b"published")
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_accepted_means_flushed(tmp_path: Path) -> None:
    """Seen from the kernel: between the last write to the log and the verdict it was flushed. What is lax is not."""
    traced = subprocess.run(
        ["strace", "-f", "-y", "-s", "16", "-e", "trace=fsync,fdatasync,pwrite64,write", "-o", str(tmp_path / "trace"),
         sys.executable, "-c", ACCEPT, str(tmp_path / "journal.db")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "PTRACE" in traced.stderr or "ptrace" in traced.stderr:
        pytest.skip("tracing is not allowed here")
    assert traced.returncode == 0, traced.stderr
    events = []
    for line in (tmp_path / "trace").read_text().splitlines():
        if found := re.search(r'write\(1<.*"(begin|accepted|published)"', line):
            events.append(found[1])
        elif "journal.db-wal" in line:
            events.append("flush" if "sync(" in line else "log")
    told = json.dumps(events)
    for part in told.split('"begin"')[1:4]:
        assert re.search(r'"log"(, "flush")+, "accepted"', part), told
    assert "flush" not in told.split('"begin"')[4].split('"published"')[0], told
