"""Killed at every write and every effect, twice over, and for real at drawn moments."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from agent.base.clock import SystemClock
from agent.base.errors import DamagedError
from agent.work.jobs import ENDED
from agent.work.journal import Journal
from agent.work.runner import Runner
from agent.work.steps import Step, Turn
from tests.work.simulation import Device, Handed, Killed, order

PROGRAMS = (
    [{}, {}, {}],
    [{}, {"kind": "again"}, {"kind": "restart"}, {}],
    [{}, {}, {"fails": "before"}],
    [{"kind": "restart"}, {}, {"fails": "after"}],
)
#: By kill: a step that fails with its effect there has succeeded for whoever asks after a kill.
ENDS = [{"succeeded"}, {"succeeded"}, {"failed"}, {"failed", "succeeded"}]


def accept_all(device: Device) -> None:
    """All programs, also where a kill has left some accepted."""
    for number in range(device.journal.last()[1] + 1, len(PROGRAMS) + 1):
        job = order(number, args={"steps": PROGRAMS[number - 1]})
        device.journal.accept(job, epoch=1, generation=number, document=b"%d" % number)


def work_through(device: Device, fuses: Iterator[int]) -> None:
    """Everything to its end, killed when the next fuse has burnt down, and so on while there are fuses."""

    def go() -> None:
        accept_all(device)
        while True:
            if device.run_one():
                continue
            if device.world.restart_asked:
                left = device.fuse
                device.crash()
                device.fuse = left
                continue
            if device.runner.wake() is None and not device.todo:
                return

    while True:
        device.fuse = next(fuses, None)
        try:
            go()
        except Killed:
            device.crash()
            continue
        return


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power lost"])
@pytest.mark.parametrize("again_after", [None, 0, 1, 2, 5])
def test_at_every_write_and_effect(power: bool, again_after: int | None) -> None:
    """At the first, at the second, … until one comes through; and again so many steps after the start."""
    for number in itertools.count():
        device = Device()
        device.power = device.power_always = power
        try:
            work_through(device, iter([number] if again_after is None else [number, again_after]))
            statuses = [device.journal.terminal(f"job-{index + 1}") for index in range(len(PROGRAMS))]
            for status, ends in zip(statuses, ENDS, strict=True):
                assert status is not None and status.state in ends, (number, status)
            assert {status.job_id for status in device.journal.unpublished()} == {f"job-{n}" for n in range(1, 5)}
            done = {name for job, name in device.world.effects if job == "job-1"}
            assert done == {"step-0", "step-1", "step-2"}
            assert not {name for job, name in device.world.effects if job == "job-3"}
            if not device.blown:
                break
        finally:
            device.close()
    assert number > 40, "the steps of the programs are gone"


# -- for real ---------------------------------------------------------------------------------------------------------

JOBS = 40


class Files:
    """A world of files: an effect is a file that can be made once, and what is made twice is written down."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._folder = folder
        self._chance = chance

    def handler(self, args: dict[str, object]) -> list[Step]:
        return [self._step(name) for name in ("a", "b", "c")] + ([self._failing()] if args.get("fails") else [])

    def _step(self, name: str) -> Step:
        def path(turn: Turn) -> Path:
            return self._folder / f"{turn.job.job_id}.{name}"

        def do(turn: Turn) -> None:
            time.sleep(self._chance.uniform(0, 0.003))
            turn.go_on()
            try:
                os.close(os.open(path(turn), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                (self._folder / f"{turn.job.job_id}.{name}.twice").touch()
            time.sleep(self._chance.uniform(0, 0.003))

        return Step(
            name, "installing", do, lambda turn: path(turn).exists(), lambda turn: path(turn).unlink(missing_ok=True)
        )

    @staticmethod
    def _failing() -> Step:
        def do(turn: Turn) -> None:
            raise DamagedError("cannot do it: it was to fail")

        return Step("fails", "trying", do)


def agent(folder: Path, seed: int, report: Callable[[str], None]) -> None:
    """A small agent: takes jobs one after the other while two lanes of threads work them off."""
    news = threading.Event()
    threads: list[threading.Thread] = []

    def execute(lane: str, name: str, work: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    with Journal(folder / "journal.db", SystemClock()) as journal:
        journal.begin_epoch(1)
        runner = Runner(
            journal,
            {"program": Files(folder, random.Random(seed)).handler},
            Handed(execute),
            clock=SystemClock(),
            clock_trusted=lambda: True,
            boot_nonce=os.urandom(16).hex(),
            verify=lambda order: None,
            changed=news.set,
        )
        told: dict[str, int] = {}
        number = journal.last()[1]
        while True:
            news.clear()
            if number < JOBS:
                number += 1
                fails, lane = number % 5 == 0, "rescue" if number % 7 == 0 else "normal"
                job = order(number, args={"fails": fails}, lane=lane)
                journal.accept(job, epoch=1, generation=number, document=b"%d" % number)
                report(json.dumps(["accepted", job.job_id]))
            runner.wake()
            is_done = number >= JOBS and not journal.jobs(open_only=True)
            for status in journal.unpublished():
                if told.get(status.job_id) != status.rev:
                    told[status.job_id] = status.rev
                    report(json.dumps(["state", status.job_id, status.rev, status.state, status.attempt]))
                if status.state in ENDED and status.seq % 2:
                    journal.published(status.job_id, status.rev)
            if is_done:
                break
            news.wait(0.01 if number < JOBS else 5)
        for thread in threads:
            thread.join()


def in_child(task: Callable[[Callable[[str], None]], None], *, kill_after: float | None) -> tuple[bool, list[str]]:
    """Run ``task`` in a forked process; whether it was killed, and the lines that it reported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            task(lambda line: (os.write(writer, line.encode() + b"\n"), None)[1])
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    killer = None
    if kill_after is not None:
        killer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL))
        killer.start()
    with os.fdopen(reader, "rb") as pipe:
        lines = pipe.read().decode().splitlines()
    if killer is not None:
        killer.cancel()  # the child has closed the pipe: it is gone, or about to be
        killer.join()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the agent has failed"
    return os.WIFSIGNALED(status), lines


class Fleet:
    """Remembers what it was told, and whether it was told what cannot be."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.states: dict[str, tuple[int, str]] = {}
        self.attempts: Counter[str] = Counter()

    def hear(self, lines: list[str]) -> None:
        for line in lines:
            kind, job_id, *rest = json.loads(line)
            if kind == "accepted":
                self.accepted.add(job_id)
                continue
            rev, state, attempt = rest
            before = self.states.get(job_id)
            if before is not None:
                assert rev > before[0] or (rev, state) == before, f"{job_id}: {before}, then {rev} {state}"
                assert before[1] not in ENDED or before[1] == state, f"{job_id} has ended twice"
            self.states[job_id] = (rev, state)
            self.attempts[job_id] = max(attempt, self.attempts[job_id])


def killed_at_any_moment(kills: int, seed: int) -> None:
    """Kills drawn over the whole life of the agent, opening included; each folder until its jobs are done."""
    chance = random.Random(seed)
    killed = interrupted = 0
    while killed < kills:
        with tempfile.TemporaryDirectory(prefix="edge-agent-test-", dir="/dev/shm") as name:
            folder, fleet = Path(name), Fleet()
            while True:
                after = chance.uniform(0, 0.25) if killed < kills else None
                was_killed, lines = in_child(partial(agent, folder, chance.getrandbits(32)), kill_after=after)
                fleet.hear(lines)
                killed += was_killed
                if not was_killed:
                    break
            require_done(folder, fleet)
            interrupted += sum(attempt > 1 for attempt in fleet.attempts.values())
    assert interrupted > kills // 3, "the kills have hit nothing"


def require_done(folder: Path, fleet: Fleet) -> None:
    ids = {f"job-{number}" for number in range(1, JOBS + 1)}
    assert fleet.accepted | set(fleet.states) == ids
    for number in range(1, JOBS + 1):
        job_id = f"job-{number}"
        state = fleet.states[job_id][1]
        # A job that was hit in more than five starts in a row may have been given up.
        assert state == ("failed" if number % 5 == 0 else "succeeded") or fleet.attempts[job_id] > 5, job_id
        there = {path.name.split(".", 1)[1] for path in folder.glob(f"{job_id}.*")}
        assert there == ({"a", "b", "c"} if state == "succeeded" else set()), f"{job_id}: {there}"
    with Journal(folder / "journal.db", SystemClock()) as journal:
        assert journal.jobs(open_only=True) == []


def test_fifty_real_kills() -> None:
    killed_at_any_moment(50, seed=1)


@pytest.mark.slow
@pytest.mark.long
def test_a_thousand_real_kills() -> None:
    killed_at_any_moment(1000, seed=2)
