"""A device to run jobs on: a clock that is set, a world in which steps have effects, kills and power cuts anywhere.

The world outlives every kill. It refuses to let a step happen twice whose effect can be asked for, and to have steps
taken back in another order than the reverse of the one they were begun in.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

from agent.base.errors import DamagedError
from agent.work.jobs import JobStatus, Order
from agent.work.journal import Journal
from agent.work.runner import Runner
from agent.work.steps import RestartPending, Step, Turn
from agent.work.windows import opening_at

_T = TypeVar("_T")
START = datetime(2026, 3, 28, 12, 0, tzinfo=timezone.utc)
PHASES = ("downloading", "verifying", "installing", "trying", "activating", "probation")


class Handed:
    """Lanes that hand what they are given to a function, and where a step's turn has always come."""

    def __init__(self, execute: Callable[[str, str, Callable[[], None]], object]) -> None:
        self._execute = execute

    def execute(self, lane: str, name: str, work: Callable[[], None]) -> None:
        self._execute(lane, name, work)

    def in_turn(self, order: Order, work: Callable[[], _T], look: Callable[[], None]) -> _T:
        return work()


class Killed(BaseException):
    """SIGKILL, or the power is gone."""


class Wronged(BaseException):
    """The world was treated as it must not be."""


class SimulatedClock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.wall = START
        self.is_trusted = True

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self.wall

    def trusted(self) -> bool:
        return self.is_trusted

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.wall += timedelta(seconds=seconds)


def order(number: int, op: str = "program", **changes: Any) -> Order:
    """Job ``number`` of enrolment 1."""
    fields: dict[str, Any] = {
        "job_id": f"job-{number}",
        "epoch": 1,
        "seq": number,
        "op": op,
        "kind": "change",
        "lane": "normal",
        "priority": 5,
        "args": {},
        "not_after": None,
        "step_timeout_s": 600.0,
        "total_timeout_s": 6000.0,
        "window": None,
        "envelope": b"envelope %d" % number,
    }
    return Order(**fields | changes)


class World:
    """What the steps of all jobs have done. ``step`` is called around each effect: a kill may fall there."""

    def __init__(self, clock: SimulatedClock, step: Callable[[str], None]) -> None:
        self._clock = clock
        self._step = step
        #: Effects that are there now, by job and step.
        self.effects: set[tuple[str, str]] = set()
        #: Steps with something to take back, in the order in which they were begun and not taken back yet.
        self.begun: dict[str, list[str]] = {}
        self.undone_last: dict[str, str] = {}
        self.starts: dict[tuple[str, str], int] = {}
        self.restart_asked = False
        self.during: Callable[[str], None] = lambda job_id: None

    def handler(self, args: Mapping[str, Any]) -> list[Step]:
        """``args["steps"]``: a list of objects with kind, fails, undo, seconds."""
        return [self._made(number, dict(spec)) for number, spec in enumerate(args["steps"])]

    def _made(self, number: int, spec: dict[str, Any]) -> Step:
        name = f"step-{number}"
        kind = spec.get("kind", "told")
        return Step(
            name,
            PHASES[number % len(PHASES)],
            lambda turn: self._do(turn, name, spec),
            {
                "told": lambda turn: (turn.job.job_id, name) in self.effects,
                "again": None,
                "restart": lambda turn: turn.notes.get(name) not in (None, turn.boot_nonce),
            }[kind],
            (lambda turn: self._undo(turn, name)) if spec.get("undo", True) else None,
        )

    def _do(self, turn: Turn, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        job_id = turn.job.job_id
        self._require_window(turn, name)
        self.starts[job_id, name] = self.starts.get((job_id, name), 0) + 1
        if spec.get("undo", True) and name not in self.begun.setdefault(job_id, []):
            self.begun[job_id].append(name)
        if spec.get("fails") == "before":
            raise DamagedError(f"cannot do {name}: it was to fail")
        self._clock.pass_time(spec.get("seconds", 0))
        self.during(job_id)
        if spec.get("listens", True):
            turn.go_on()
        if spec.get("kind") == "restart":
            turn.notes[name] = turn.boot_nonce
            raise RestartPending(self._ask_for_restart)
        self._step("before an effect")
        if spec.get("kind", "told") == "told":
            self._require((job_id, name) not in self.effects, f"{name} of {job_id} was run twice")
        self.effects.add((job_id, name))
        self._step("after an effect")
        turn.notes[name] = "done"
        if spec.get("fails") == "after":
            raise DamagedError(f"cannot do {name}: it was to fail")
        return {name: turn.attempt}

    def _ask_for_restart(self) -> None:
        self._step("before a restart")
        self.restart_asked = True

    def _undo(self, turn: Turn, name: str) -> None:
        job_id = turn.job.job_id
        self._step("before an undo")
        left = self.begun.get(job_id, [])
        if left and left[-1] == name:
            left.pop()
        else:
            # Again after a kill, or one that was begun in the journal and not in the world.
            self._require(name not in left, f"{name} of {job_id} is taken back before {left[-1:]}")
        self.effects.discard((job_id, name))
        self._step("after an undo")

    def _require_window(self, turn: Turn, name: str) -> None:
        """The first step of a job with a window begins in it, on a clock that is trusted."""
        job = turn.job
        if job.window is None or job.lane != "normal" or name != "step-0" or turn.attempt > 1:
            return
        now = self._clock.now()
        self._require(self._clock.trusted(), "a window was believed though the clock was not trusted")
        self._require(opening_at(job.window, now).holds(now), "it began outside of its window")

    @staticmethod
    def _require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise Wronged(otherwise)


class Device:
    """Journal and runner in a folder, killed and started again. ``fuse`` counts down the steps until a kill."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="edge-agent-test-", dir="/dev/shm"))
        self.clock = SimulatedClock()
        self.world = World(self.clock, self.step)
        self.fuse: int | None = None
        self.fuse_at_start: int | None = None
        self.power = self.power_always = False
        self.flushed = 0
        self.starts = 0
        self.kills = 0
        self.blown = 0
        self.seen: dict[str, JobStatus] = {}
        self.todo: list[tuple[str, Callable[[], None]]] = []
        self.start()

    @property
    def path(self) -> Path:
        return self.root / str(self.starts) / "journal.db"

    def start(self) -> None:
        """A new start of the agent on whatever is in the folder. May be killed as well."""
        self.path.parent.mkdir(exist_ok=True)
        self.todo.clear()
        self.world.restart_asked = False
        self.journal = Journal(self.path, self.clock, clock_trusted=self.clock.trusted, step=self.step)
        self.journal.open()
        self.journal.begin_epoch(1)
        self.runner = Runner(
            self.journal,
            {"program": self.world.handler},
            Handed(lambda lane, name, work: self.todo.append((lane, work))),
            clock=self.clock,
            clock_trusted=self.clock.trusted,
            boot_nonce=f"{self.starts:032x}",
            verify=lambda order: None,
            changed=self.look,
        )
        self.look()

    def step(self, name: str) -> None:
        """Every durable write and every effect comes by here."""
        if name.startswith("after:"):
            log = self.path.with_name("journal.db-wal")
            self.flushed = log.stat().st_size if log.exists() else 0
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.blown += 1
                raise Killed(name)

    def survive(self, action: Callable[[], Any]) -> Any:
        """Do it; when it is killed, start again (which the fuse, blown once, lets pass)."""
        try:
            return action()
        except Killed:
            self.crash()
            return None
        finally:
            self.fuse = None

    def crash(self) -> None:
        """What the disk holds now goes on in a new folder; after a power cut without what was not flushed."""
        fuse, self.fuse = self.fuse_at_start, None
        self.fuse_at_start = None
        self.kills += 1
        old = self.path.parent
        self.starts += 1
        new = self.path.parent
        new.mkdir()
        for file in old.iterdir():
            shutil.copy2(file, new / file.name)
        if self.power and (log := new / "journal.db-wal").exists():
            with log.open("r+b") as stream:
                stream.truncate(min(self.flushed, log.stat().st_size))
        self.power = self.power_always
        self.journal.close()
        shutil.rmtree(old)
        self.fuse = fuse
        self.survive(self.start)

    def restart(self) -> None:
        """An orderly stop and start."""
        self.runner.stop()
        while self.todo:
            self.todo.pop(0)[1]()
        self.journal.close()
        old = self.path.parent
        self.starts += 1
        shutil.move(old, self.path.parent)
        self.start()

    def run_one(self, pick: int = 0) -> bool:
        """Let a lane's thread do one piece of work; whether there was one."""
        self.runner.wake()
        if self.todo:
            self.todo.pop(pick % len(self.todo))[1]()
            return True
        return False

    def settle(self) -> None:
        """No more kills: everything to its end."""
        self.fuse = None
        self.clock.is_trusted = True
        for _ in range(2000):
            if self.run_one():
                continue
            if self.world.restart_asked:
                self.restart()
                continue
            wait = self.runner.wake()
            if self.todo:
                continue
            if wait is None:
                return
            self.clock.pass_time(wait)
        raise AssertionError(f"still not settled: {self.journal.jobs(open_only=True)}")

    def look(self) -> None:
        """What the fleet would see: ``rev`` rises with every change, and what has ended stays as it is."""
        for status in self.journal.unpublished():
            before = self.seen.get(status.job_id)
            if before is not None and before != status:
                assert status.rev > before.rev, f"{before} became {status}"
                assert before.state in ("queued", "running"), f"{before} ended again as {status}"
            self.seen[status.job_id] = status

    def close(self) -> None:
        self.journal.close()
        shutil.rmtree(self.root)
