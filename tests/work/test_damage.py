"""A journal that is cut, overwritten, locked up or without room: said clearly, and never taken for an empty one."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.base.errors import AgentError, DamagedError, TryLaterError
from agent.work.jobs import Refusal
from agent.work.journal import Journal
from agent.work.mending import set_aside
from agent.work.runner import Runner
from agent.work.steps import Step
from tests.work.simulation import Handed, SimulatedClock, order

STAMP = "20260328T120000Z"


def filled(folder: Path, clock: SimulatedClock, *, close: bool = True) -> Path:
    """A journal with jobs in several states, as a kill leaves it or closed."""
    path = folder / "journal.db"
    journal = Journal(path, clock).open()
    journal.begin_epoch(3)
    for number in range(1, 13):
        job = order(number, epoch=3, args={"text": "x" * 300 * number}, envelope=b"e" * 3000)
        journal.accept(job, epoch=3, generation=number, document=b"%d" % number)
    runner(journal, clock).wake()
    journal.accept_desired(5, b"desired", epoch=3)
    if close:
        journal.close()
        return path
    copy = folder / "killed"
    copy.mkdir()
    for file in folder.glob("journal.db*"):
        shutil.copy(file, copy / file.name)
    journal.close()
    return copy / "journal.db"


def runner(journal: Journal, clock: SimulatedClock) -> Runner:
    """Works off what there is, at once."""
    return Runner(
        journal,
        {"program": lambda args: [Step("a", "trying", lambda turn: {"size": len(args["text"])})]},
        Handed(lambda lane, name, work: work_later(work)),
        clock=clock,
        clock_trusted=clock.trusted,
        boot_nonce="0",
        verify=lambda order: None,
    )


LATER: list[Callable[[], None]] = []


def work_later(work: Callable[[], None]) -> None:
    LATER.append(work)


def exercise(path: Path, clock: SimulatedClock) -> None:
    """Everything that core asks of a journal. Only errors of the agent may come out."""
    LATER.clear()
    with Journal(path, clock) as journal:
        jobs = runner(journal, clock)
        for _ in range(20):
            jobs.wake()
            while LATER:
                LATER.pop()()
        for status in journal.unpublished():
            journal.published(status.job_id, status.rev)
        journal.accept(order(99, epoch=3), epoch=3, generation=99, document=b"99", cancel=["job-1", "job-2"])
        for status in journal.jobs():
            journal.job(status.job_id)
        journal.maintenance.tasks()
        journal.refused("expired")
        journal.refusals()
        journal.desired()
        journal.facts.get("x")
        jobs.under_way()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_cut_off(folder: Path, clock: SimulatedClock, share: float) -> None:
    path = filled(folder, clock)
    os.truncate(path, int(path.stat().st_size * share))
    before = path.read_bytes()
    with pytest.raises(DamagedError, match="cannot open the job journal") as caught:
        Journal(path, clock).open()
    assert "edge-agent jobs reset" in caught.value.hint
    assert path.read_bytes() == before, "what is damaged is left as it is"


def test_garbage(folder: Path, clock: SimulatedClock) -> None:
    path = folder / "journal.db"
    for content in (b"", b"\0", b"\0" * 8192, b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 5000):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(DamagedError):
            Journal(path, clock).open()
        assert path.read_bytes() == content


def test_a_garbled_beginning_leaves_the_log_alone(folder: Path, clock: SimulatedClock) -> None:
    """In it may be what is missing."""
    killed = filled(folder, clock, close=False)
    log = killed.with_name("journal.db-wal")
    whole = log.read_bytes()
    for at in (0, 18, 19):
        content = bytearray(killed.read_bytes())
        content[at] ^= 3
        killed.write_bytes(content)
        with pytest.raises(DamagedError):
            Journal(killed, clock).open()
        assert log.read_bytes() == whole
    assert set_aside(killed, 3, STAMP).counters_kept
    assert killed.with_name(f"journal.db.damaged-{STAMP}-wal").read_bytes() == whole


def test_another_database(folder: Path, clock: SimulatedClock) -> None:
    """A sound file of somebody else's: no tables of ours, also where it calls itself version 1."""
    path = folder / "journal.db"
    for version in (0, 1):
        path.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE notes (text)")
            other.execute(f"PRAGMA user_version = {version}")
        path.chmod(0o600)
        with pytest.raises(DamagedError):
            Journal(path, clock).open()


def test_any_flipped_byte(folder: Path, clock: SimulatedClock) -> None:
    """Found out, or without effect, or what one row says is another word: never an error that nobody expects."""
    chance = random.Random(1)
    whole = filled(folder, clock).read_bytes()
    path = folder / "flipped.db"
    found = 0
    for _ in range(250):
        at = chance.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << chance.randrange(8)
        path.unlink(missing_ok=True)
        path.write_bytes(flipped)
        path.chmod(0o600)
        try:
            exercise(path, clock)
        except AgentError:
            found += 1
        path.with_name("flipped.db-wal").unlink(missing_ok=True)
    assert found


def test_any_overwritten_stretch(folder: Path, clock: SimulatedClock) -> None:
    chance = random.Random(2)
    whole = filled(folder, clock).read_bytes()
    path = folder / "torn.db"
    found = 0
    for _ in range(120):
        at, length = chance.randrange(len(whole)), chance.choice([16, 512, 4096])
        torn = bytearray(whole)
        torn[at : at + length] = chance.randbytes(len(torn[at : at + length]))
        path.unlink(missing_ok=True)
        path.write_bytes(torn)
        path.chmod(0o600)
        try:
            exercise(path, clock)
        except AgentError:
            found += 1
        path.with_name("torn.db-wal").unlink(missing_ok=True)
    assert found > 50


def test_a_log_that_is_cut_or_torn(folder: Path, clock: SimulatedClock) -> None:
    """The tail of the log is what a power cut may harm: what it held is gone as a whole, what was before stands."""
    chance = random.Random(3)
    killed = filled(folder, clock, close=False)
    log = killed.with_name("journal.db-wal")
    whole = log.read_bytes()
    counts = set()
    for number in range(60):
        place = folder / str(number)
        place.mkdir()
        shutil.copy(killed, place / "journal.db")
        at = chance.randrange(len(whole))
        tail = b"" if number % 2 else chance.randbytes(len(whole) - at)
        (place / "journal.db-wal").write_bytes(whole[:at] + tail)
        with Journal(place / "journal.db", clock) as journal:
            epoch, generation, seq = journal.last()
            assert generation == seq == len(journal.jobs())
            assert all(journal.job(status.job_id).intact for status in journal.jobs())
            counts.add(seq)
            if epoch:
                journal.accept(order(50, epoch=epoch), epoch=epoch, generation=50, document=b"50")
    assert len(counts) > 5


def test_a_log_without_its_file(folder: Path, clock: SimulatedClock) -> None:
    """Somebody took the file away: not a device without a past."""
    killed = filled(folder, clock, close=False)
    killed.unlink()
    with pytest.raises(DamagedError, match="the file is gone"):
        Journal(killed, clock).open()


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o606])
def test_others_could_open_it(folder: Path, clock: SimulatedClock, mode: int) -> None:
    path = filled(folder, clock)
    path.chmod(mode)
    with pytest.raises(DamagedError, match=f"other users may open it .mode {mode:04o}") as caught:
        Journal(path, clock).open()
    assert "owner and mode" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_it_belongs_to_another_user(folder: Path, clock: SimulatedClock) -> None:
    path = filled(folder, clock)
    os.chown(path, 12345, 12345)
    with pytest.raises(DamagedError, match="belongs to another user"):
        Journal(path, clock).open()


def test_it_is_no_file(folder: Path, clock: SimulatedClock) -> None:
    path = folder / "journal.db"
    os.mkfifo(path, 0o600)
    with pytest.raises(DamagedError, match="no regular file"):
        Journal(path, clock).open()
    path.unlink()
    path.mkdir(0o700)
    with pytest.raises(DamagedError, match="no regular file"):
        Journal(path, clock).open()
    path.rmdir()
    target = filled(folder, clock).rename(folder / "elsewhere.db")
    path.symlink_to(target)
    with pytest.raises(DamagedError, match="no regular file"):
        Journal(path, clock).open()


def test_no_folder(folder: Path, clock: SimulatedClock) -> None:
    with pytest.raises(DamagedError, match="No such file"):
        Journal(folder / "nowhere" / "journal.db", clock).open()


def as_user(uid: int, action: Callable[[], None]) -> None:
    """In a forked process without root's rights; what it asserts is asserted here."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a folder of another user is needed")
def test_read_only(folder: Path, clock: SimulatedClock) -> None:
    """The folder cannot be written to: the log cannot be made."""
    path = filled(folder, clock)
    os.chown(path, 12345, 12345)
    path.chmod(0o400)
    folder.chmod(0o755)

    def action() -> None:
        with pytest.raises(DamagedError, match="cannot open the job journal") as caught:
            Journal(path, clock).open()
        assert caught.value.hint

    as_user(12345, action)


def test_a_full_disk(folder: Path, clock: SimulatedClock) -> None:
    """No room: try later, with nothing half accepted; and on with it when there is room."""
    path = filled(folder, clock)
    folder.chmod(0o755)

    def action() -> None:
        with Journal(path, clock) as journal:
            last = journal.last()
            log = path.with_name("journal.db-wal")
            size = log.stat().st_size if log.exists() else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, resource.RLIM_INFINITY))
            for _ in range(3):
                with pytest.raises((TryLaterError, DamagedError), match="cannot accept a job: "):
                    journal.accept(
                        order(20, epoch=3, args={"text": "x" * 30_000}), epoch=3, generation=20, document=b"20"
                    )
                assert journal.last() == last and journal.job("job-20") is None
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert journal.accept(order(20, epoch=3), epoch=3, generation=20, document=b"20") == "accepted"
        with Journal(path, clock) as journal:
            assert journal.last() == (3, 20, 20)

    as_user(os.geteuid(), action)


def fill(journal: Journal) -> None:
    for number in range(1, 500):
        job = order(number, envelope=b"x" * 10_000)
        journal.accept(job, epoch=1, generation=number, document=b"%d" % number)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_file_system_that_is_full(folder: Path, clock: SimulatedClock) -> None:
    """A real one of 256 KiB: making the journal, and accepting, until there is no room."""
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {folder} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with Journal(folder / "journal.db", clock) as journal:
            journal.begin_epoch(1)
            with pytest.raises(TryLaterError, match="full") as caught:
                fill(journal)
            assert "free space" in caught.value.hint
            last = journal.last()
            assert last[1] == last[2] == len(journal.jobs()) > 5
        with Journal(folder / "journal.db", clock) as journal:
            assert journal.last() == last
        for file in folder.iterdir():
            file.unlink()
        with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(b"x" * 4096):
                pass
        with pytest.raises((TryLaterError, DamagedError), match="cannot open the job journal: "):
            Journal(folder / "journal.db", clock).open()
        (folder / "ballast").unlink()
        with Journal(folder / "journal.db", clock) as journal:
            assert journal.last() == (0, 0, 0), "half made, it is made anew"
    finally:
        os.system(f"umount {folder}")


# -- setting aside ----------------------------------------------------------------------------------------------------


def test_set_aside_with_counters(folder: Path, clock: SimulatedClock) -> None:
    """What can still be read of the counters holds on: nothing that was accepted before is accepted again."""
    path = filled(folder, clock)
    found = set_aside(path, 3, STAMP)
    assert (found.path, found.counters_kept) == (folder / f"journal.db.damaged-{STAMP}", True)
    assert found.path.stat().st_size > 10_000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Journal(path, clock) as journal:
        assert journal.last() == (3, 12, 12) and journal.desired()[0] == 5
        assert journal.jobs() == []
        with pytest.raises(Refusal) as caught:
            journal.accept(order(12, epoch=3), epoch=3, generation=12, document=b"12")
        assert caught.value.code == "old_generation"
        assert journal.accept(order(13, epoch=3), epoch=3, generation=13, document=b"13") == "accepted"


@pytest.mark.parametrize("how", ["cut", "garbage", "missing", "folder"])
def test_set_aside_without_counters(folder: Path, clock: SimulatedClock, how: str) -> None:
    """Nobody knows what was done: nothing more in this enrolment, everything in the next."""
    path = filled(folder, clock)
    if how == "cut":
        os.truncate(path, 3000)
    elif how == "garbage":
        path.write_bytes(b"garbage" * 5000)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
    found = set_aside(path, 3, STAMP)
    assert not found.counters_kept and (found.path is None) == (how == "missing")
    with Journal(path, clock) as journal:
        journal.begin_epoch(3)
        with pytest.raises(Refusal) as caught:
            journal.accept(order(13, epoch=3), epoch=3, generation=13, document=b"13")
        assert caught.value.code == "old_generation"
        journal.begin_epoch(4)
        assert journal.accept(order(1, epoch=4), epoch=4, generation=1, document=b"1") == "accepted"


class Killed(BaseException):
    pass


def test_killed_while_setting_aside(folder: Path, clock: SimulatedClock) -> None:
    """At any step: the old journal, damaged as it was, or the new one with its counters; never an empty one."""
    template = filled(folder, clock, close=False)
    outcomes = set()
    for number in range(12):
        place = folder / f"kill-{number}"
        place.mkdir()
        for file in template.parent.iterdir():
            shutil.copy(file, place / file.name)
        path = place / "journal.db"
        left = number

        def step(name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with contextlib.suppress(Killed):
            set_aside(path, 3, STAMP, step)
        with Journal(path, clock) as journal:
            assert journal.last() == (3, 12, 12)
            outcomes.add(len(journal.jobs()))
    assert outcomes == {0, 12}


def test_killed_while_setting_aside_what_cannot_be_read(folder: Path, clock: SimulatedClock) -> None:
    """The log of the old journal, which is whole, never gets into the new one."""
    path = filled(folder, clock)
    (folder / "killed").mkdir()
    with Journal(path, clock) as journal:
        journal.cancel(["job-3"])
        for file in folder.glob("journal.db*"):
            shutil.copy(file, folder / "killed" / file.name)
    template = folder / "killed" / "journal.db"
    template.write_bytes(b"garbage" * 20_000)
    outcomes = []
    for number in range(8):
        place = folder / f"kill-{number}"
        place.mkdir()
        for file in template.parent.iterdir():
            shutil.copy(file, place / file.name)
        path = place / "journal.db"
        left = number

        def step(name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with contextlib.suppress(Killed):
            set_aside(path, 3, STAMP, step)
        outcomes.append((place / f"journal.db.damaged-{STAMP}").exists())
        if not outcomes[-1]:
            with pytest.raises(DamagedError):
                Journal(path, clock).open()
            continue
        with Journal(path, clock) as journal:
            assert journal.last()[0] == 3 and journal.last()[1] > 1 << 50
            assert journal.jobs() == []
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


def test_killed_while_a_journal_is_made(folder: Path, clock: SimulatedClock) -> None:
    for number in range(4):
        path = folder / str(number) / "journal.db"
        path.parent.mkdir()
        left = number

        def step(name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with contextlib.suppress(Killed):
            Journal(path, clock, step=step).open().close()
        with Journal(path, clock) as journal:
            assert journal.last() == (0, 0, 0)
        assert [file.name for file in path.parent.iterdir()] == ["journal.db"]
