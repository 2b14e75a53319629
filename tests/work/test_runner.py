"""Lanes, steps, deadlines, cancellation, restarts and undo, one story at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from agent.base.errors import DamagedError, PeerError, RefusedError, TryLaterError
from agent.work.jobs import JobStatus, Order, WindowSpec
from agent.work.journal import Journal
from agent.work.runner import RestartPending, Runner
from agent.work.steps import Step, Turn
from tests.work.simulation import Handed, SimulatedClock, order

_T = TypeVar("_T")


class Turns(Handed):
    """Lanes of a bench. ``wait`` is what goes on before a step's turn comes, and is told what asks whether to wait."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.execute)
        self._bench = bench

    def in_turn(self, order: Order, work: Callable[[], _T], look: Callable[[], None]) -> _T:
        self._bench.wait(look)
        return work()


class Bench:
    """A journal, a runner, and lanes whose threads are the test. ``steps`` are those of every job."""

    def __init__(self, folder: Path, clock: SimulatedClock) -> None:
        self.path = folder / "journal.db"
        self.clock = clock
        self.steps: list[Step] | Callable[[Mapping[str, Any]], list[Step]] = []
        self.log: list[str] = []
        self.verify: Callable[[Any], None] = lambda order: None
        self.wait: Callable[[Callable[[], None]], None] = lambda look: None
        self.refuse_work = False
        self.starts = 0
        self.number = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.todo: list[tuple[str, str, Callable[[], None]]] = []
        self.changes = 0
        self.writes: list[str] = []
        self.journal = Journal(self.path, self.clock, clock_trusted=self.clock.trusted, step=self.writes.append).open()
        self.journal.begin_epoch(1)
        self.runner = Runner(
            self.journal,
            {"program": self.made},
            Turns(self),
            clock=self.clock,
            clock_trusted=self.clock.trusted,
            boot_nonce=f"start-{self.starts}",
            verify=self.verified,
            changed=self.changed,
        )

    def changed(self) -> None:
        self.changes += 1

    def verified(self, job: Any) -> None:
        self.verify(job)

    def made(self, args: Mapping[str, Any]) -> list[Step]:
        return self.steps(args) if callable(self.steps) else self.steps

    def execute(self, lane: str, name: str, work: Callable[[], None]) -> None:
        if self.refuse_work:
            raise TryLaterError("cannot start it: too much is waiting")
        self.todo.append((lane, name, work))

    def restart(self) -> None:
        """As after a kill: what the lanes had is gone."""
        self.journal.close()
        self.start()

    def accept(self, **changes: Any) -> str:
        self.number += 1
        job = order(self.number, **changes)
        self.journal.accept(job, epoch=1, generation=self.number, document=b"%d" % self.number)
        return job.job_id

    def work(self) -> None:
        """What the lanes have been given."""
        while self.todo:
            self.todo.pop(0)[2]()

    def run(self, **changes: Any) -> JobStatus:
        """A job, to its end or to where it waits."""
        job_id = self.accept(**changes)
        return self.go(job_id)

    def go(self, job_id: str) -> JobStatus:
        self.runner.wake()
        self.work()
        return self.status(job_id)

    def status(self, job_id: str) -> JobStatus:
        return self.journal.job(job_id).status

    def noted(self, name: str, **more: Any) -> Step:
        """A step that writes down what was asked of it."""
        return Step(
            name,
            "installing",
            more.pop("do", lambda turn: self.log.append(f"do {name}")),
            undo=more.pop("undo", lambda turn: self.log.append(f"undo {name}")),
            **more,
        )


@pytest.fixture
def bench(folder: Path, clock: SimulatedClock) -> Iterator[Bench]:
    made = Bench(folder, clock)
    yield made
    made.journal.close()


def raising(error: BaseException) -> Callable[[Turn], None]:
    def do(turn: Turn) -> None:
        raise error

    return do


class Gone(BaseException):
    """The process is no more."""


def die(bench: Bench, job_id: str) -> None:
    """Run into a step that kills the process, and start again."""
    bench.runner.wake()
    with pytest.raises(Gone):
        bench.work()
    bench.restart()


# -- lanes and order --------------------------------------------------------------------------------------------------


def test_the_most_urgent_first_then_in_order(bench: Bench) -> None:
    bench.steps = lambda args: [Step("note", "accepted", lambda turn: bench.log.append(turn.job.job_id))]
    for priority in (5, 0, 9, 5):
        bench.accept(priority=priority)
    while bench.runner.wake() is None and bench.todo:
        assert len(bench.todo) == 1, "one job at a time"
        bench.work()
    assert bench.log == ["job-3", "job-1", "job-4", "job-2"]


def test_the_rescue_lane_waits_for_nobody(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    bench.accept()
    bench.accept(lane="rescue", priority=0)
    bench.runner.wake()
    assert [lane for lane, _, _ in bench.todo] == ["normal", "rescue"]
    bench.todo.pop(1)[2]()
    assert bench.status("job-2").state == "succeeded"
    assert bench.status("job-1").state == "queued"


def test_a_lane_that_cannot_take_more(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    job_id = bench.accept()
    bench.refuse_work = True
    assert bench.runner.wake() is not None
    assert "too much is waiting" in bench.runner.problem
    bench.refuse_work = False
    assert bench.go(job_id).state == "succeeded"
    assert bench.runner.problem is None


def test_what_is_under_way_and_what_is_stuck(bench: Bench) -> None:
    shown = {}

    def do(turn: Turn) -> None:
        turn.tell({"stage": "x"})
        bench.clock.pass_time(5)
        shown["early"] = bench.runner.under_way()["normal"]
        bench.clock.pass_time(600)
        shown["late"] = bench.runner.under_way()["normal"]

    bench.steps = [bench.noted("a", do=do)]
    bench.run()
    early = shown["early"]
    assert (early["job_id"], early["op"], early["step"], early["phase"]) == ("job-1", "program", "a", "installing")
    assert (early["seconds"], early["stuck"], early["event"]) == (5, False, {"stage": "x"})
    assert shown["late"]["stuck"]
    assert bench.runner.under_way() == {}


def test_states_on_the_way(bench: Bench) -> None:
    seen = []

    def look(turn: Turn) -> dict[str, int]:
        status = bench.status("job-1")
        seen.append((status.state, status.phase, status.step, status.rev, status.attempt))
        return {f"n{len(seen)}": len(seen)}

    bench.steps = [Step("one", "verifying", look), Step("two", "trying", look)]
    status = bench.run()
    assert seen == [("running", "verifying", "one", 2, 1), ("running", "trying", "two", 3, 1)]
    assert (status.state, status.phase, status.step, status.rev) == ("succeeded", None, None, 4)
    assert status.result == {"n1": 1, "n2": 2}
    assert bench.changes == 4  # three states, and the lane is free


def test_a_step_may_tell_of_phases(bench: Bench) -> None:
    seen = []

    def do(turn: Turn) -> None:
        for phase in ("downloading", "verifying", "verifying", "nonsense", "trying"):
            turn.tell({"phase": phase})
            seen.append((bench.status("job-1").phase, bench.status("job-1").rev))

    bench.steps = [Step("one", "accepted", do)]
    assert bench.run().state == "succeeded"
    assert seen == [("downloading", 3), ("verifying", 4), ("verifying", 4), ("verifying", 4), ("trying", 5)]


def test_a_job_without_steps(bench: Bench) -> None:
    assert bench.run().state == "succeeded"


# -- what is refused at the last moment -------------------------------------------------------------------------------


class BadSignatureError(RefusedError):
    code = "unknown_key"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadSignatureError("cannot accept envelope: nobody vouches"), "unknown_key"),
        (RefusedError("cannot believe it"), "bad_signature"),
        (PeerError("cannot read message: no"), "bad_signature"),
    ],
    ids=str,
)
def test_an_envelope_that_nobody_vouches_for_any_more(bench: Bench, error: Exception, code: str) -> None:
    bench.steps = [bench.noted("a")]
    bench.verify = raising(error)
    status = bench.run()
    assert (status.state, status.error.code, status.attempt) == ("rejected", code, 0)
    assert bench.log == []


def test_while_keys_cannot_be_read_jobs_wait(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    bench.verify = raising(DamagedError("cannot read trust.toml"))
    job_id = bench.accept()
    assert bench.go(job_id).state == "queued"
    assert bench.runner.problem == "cannot read trust.toml"
    wait = bench.runner.wake()
    assert wait is not None and bench.todo == []
    bench.verify = lambda order: None
    bench.clock.pass_time(wait)
    assert bench.go(job_id).state == "succeeded"


def test_a_journal_that_was_written_to_by_others(bench: Bench) -> None:
    """The order is not what was accepted: neither done nor undone."""
    bench.steps = [bench.noted("a")]
    job_id = bench.accept(args={"model": "digits"})
    with bench.journal._db.write("tamper") as db:
        db.execute("""UPDATE jobs SET args = '{"model": "evil"}'""")
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "failed")
    assert "damaged" in status.error.text and bench.log == []


def test_an_unknown_operation_and_bad_arguments(bench: Bench) -> None:
    status = bench.run(op="something-else")
    assert (status.state, status.error.code) == ("rejected", "unknown_op")
    bench.steps = raising(PeerError("cannot take arguments: model is missing", hint="name it"))
    status = bench.run()
    assert (status.state, status.error.code, status.error.hint) == ("rejected", "bad_args", "name it")
    bench.steps = raising(ZeroDivisionError("by zero"))
    status = bench.run()
    assert (status.state, status.error.code) == ("failed", "failed")
    assert "ZeroDivisionError" in status.error.text


def test_too_late_to_begin(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    job_id = bench.accept(not_after="2026-03-28T12:00:30Z")
    bench.clock.pass_time(31)
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("rejected", "expired")


def test_a_last_moment_without_a_clock_waits_for_one(bench: Bench) -> None:
    """Accepted when the time was known; after a start without it nobody can tell."""
    bench.steps = [bench.noted("a")]
    job_id = bench.accept(not_after="2026-03-28T12:01:00Z")
    bench.clock.is_trusted = False
    assert bench.go(job_id).state == "queued"
    assert bench.runner.wake() is not None
    bench.clock.is_trusted = True
    assert bench.go(job_id).state == "succeeded"


# -- windows ----------------------------------------------------------------------------------------------------------

NIGHT = WindowSpec("0 22 * * *", 3600)


def test_waiting_for_the_window(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    job_id = bench.accept(window=NIGHT)
    other = bench.accept()
    status = bench.go(job_id)
    assert (status.state, status.phase, status.attempt) == ("running", "waiting_window", 0)
    assert bench.status(other).state == "succeeded", "who waits blocks nobody"
    waited = 0.0
    while (wait := bench.runner.wake()) is not None and not bench.todo:
        assert wait <= 60, "wall clocks are set"
        bench.clock.pass_time(wait)
        waited += wait
    assert waited == pytest.approx(10 * 3600, abs=1)
    bench.work()
    assert bench.status(job_id).state == "succeeded"


def test_a_window_that_closes_does_not_stop_a_job(bench: Bench) -> None:
    def slow(turn: Turn) -> None:
        bench.clock.pass_time(590)
        turn.go_on()

    bench.steps = [bench.noted("a", do=slow), bench.noted("b")]
    bench.clock.pass_time(10 * 3600 + 3300)
    assert bench.run(window=NIGHT).state == "succeeded"


def test_a_window_that_closes_before_the_lane_is_free(bench: Bench) -> None:
    """The lane's thread does other things than jobs: it may be hours until it gets to one."""
    bench.steps = [bench.noted("a")]
    bench.clock.pass_time(10 * 3600)
    job_id = bench.accept(window=NIGHT)
    bench.runner.wake()
    bench.clock.pass_time(3600)
    bench.work()
    assert bench.log == []
    assert bench.status(job_id).phase == "waiting_window"
    bench.clock.pass_time(23 * 3600)
    assert bench.go(job_id).state == "succeeded"


def test_interrupted_in_the_window_it_goes_on_outside(bench: Bench) -> None:
    bench.steps = [bench.noted("a", do=raising(Gone()))]
    bench.clock.pass_time(10 * 3600)
    job_id = bench.accept(window=NIGHT)
    die(bench, job_id)
    bench.clock.pass_time(7200)
    bench.steps = [bench.noted("a")]
    assert bench.go(job_id).state == "succeeded"


def test_no_window_opens_for_a_clock_that_is_not_trusted(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    job_id = bench.accept(window=NIGHT)
    bench.clock.pass_time(10 * 3600)
    bench.clock.is_trusted = False
    assert bench.go(job_id).phase == "waiting_window"
    bench.clock.is_trusted = True
    assert bench.go(job_id).state == "succeeded"


def test_a_clock_that_is_set_back(bench: Bench) -> None:
    """The window that was thought open is not."""
    bench.steps = [bench.noted("a")]
    bench.clock.pass_time(9 * 3600)
    job_id = bench.accept(window=NIGHT)
    bench.go(job_id)
    bench.clock.wall -= timedelta(days=1)
    assert bench.go(job_id).phase == "waiting_window"
    bench.clock.pass_time(3600)
    assert bench.go(job_id).state == "succeeded"


def test_rescue_ignores_windows(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    assert bench.run(lane="rescue", window=NIGHT).state == "succeeded"


def test_cancelled_while_it_waits(bench: Bench) -> None:
    job_id = bench.accept(window=NIGHT)
    rev = bench.go(job_id).rev
    bench.journal.cancel([job_id])
    status = bench.status(job_id)
    assert (status.state, status.phase, status.rev) == ("cancelled", None, rev + 1)
    assert bench.runner.wake() is None


# -- cancel, deadlines, failures --------------------------------------------------------------------------------------


def test_taken_back_last_first(bench: Bench) -> None:
    bench.steps = [bench.noted("a"), bench.noted("b"), bench.noted("c", do=raising(DamagedError("cannot do c: no")))]
    status = bench.run()
    assert bench.log == ["do a", "do b", "undo c", "undo b", "undo a"]
    assert (status.state, status.step) == ("failed", "c")
    assert (status.error.code, status.error.text) == ("undone", "cannot do c: no")


def test_nothing_to_take_back(bench: Bench) -> None:
    bench.steps = [Step("a", "trying", raising(DamagedError("cannot do a: no", hint="mend it")))]
    status = bench.run()
    assert (status.error.code, status.error.text, status.error.hint) == ("failed", "cannot do a: no", "mend it")


def test_what_cannot_be_taken_back_is_said(bench: Bench) -> None:
    """And what was before it is taken back all the same."""
    bench.steps = [
        bench.noted("a"),
        bench.noted("b", undo=raising(DamagedError("the disk is gone"))),
        bench.noted("c", undo=raising(KeyError("bug"))),
        bench.noted("d", do=raising(DamagedError("cannot do d: no"))),
    ]
    status = bench.run()
    assert bench.log == ["do a", "do b", "do c", "undo d", "undo a"]
    assert status.error.code == "failed"
    expected = "cannot do d: no; not taken back: c: cannot do c: KeyError: 'bug'; b: the disk is gone"
    assert status.error.text == expected


def test_a_bug_in_a_step_ends_its_job_alone(bench: Bench) -> None:
    bench.steps = [bench.noted("a", do=raising(ZeroDivisionError("by\nzero")))]
    status = bench.run()
    assert (status.state, status.error.text) == ("failed", "cannot do a: ZeroDivisionError: by\\nzero")
    bench.steps = [bench.noted("a")]
    assert bench.run().state == "succeeded"


@pytest.mark.parametrize("outcome", [{"x": {1}}, {"x": float("nan")}, {"x": b"bytes"}, ["no object"]], ids=str)
def test_a_result_that_is_none(bench: Bench, outcome: Any) -> None:
    bench.steps = [bench.noted("a", do=lambda turn: outcome)]
    assert bench.run().state == "failed"
    assert bench.log == ["undo a"]


def test_notes_that_are_no_json(bench: Bench) -> None:
    bench.steps = [bench.noted("a", do=lambda turn: turn.notes.update(x=object()))]
    assert bench.run().state == "failed"
    bench.steps = [bench.noted("a", do=lambda turn: (turn.notes.update(x=object()), turn.save()))]
    assert bench.run().state == "failed"


def test_a_result_that_is_too_large_to_tell(bench: Bench) -> None:
    bench.steps = [bench.noted("a", do=lambda turn: {"text": "x" * 100_000})]
    assert bench.run().result == {"left_out_bytes": 100_011}


def test_cancelled_at_a_safe_point(bench: Bench) -> None:
    def do(turn: Turn) -> None:
        bench.log.append("do b")
        bench.journal.cancel([turn.job.job_id])
        turn.go_on()
        bench.log.append("went on")

    bench.steps = [bench.noted("a"), bench.noted("b", do=do), bench.noted("c")]
    status = bench.run()
    assert bench.log == ["do a", "do b", "undo b", "undo a"]
    assert (status.state, status.error.code) == ("cancelled", "cancelled")


def test_cancelled_between_steps(bench: Bench) -> None:
    bench.steps = [bench.noted("a", do=lambda turn: bench.journal.cancel([turn.job.job_id])), bench.noted("b")]
    assert bench.run().state == "cancelled"
    assert bench.log == ["undo a"]


def test_cancelled_too_late(bench: Bench) -> None:
    bench.steps = [bench.noted("a", do=lambda turn: bench.journal.cancel([turn.job.job_id]))]
    assert bench.run().state == "succeeded"


def test_cancelled_before_it_is_begun_by_a_busy_lane(bench: Bench) -> None:
    bench.steps = [bench.noted("a")]
    job_id = bench.accept()
    bench.runner.wake()
    bench.journal.cancel([job_id])
    bench.work()
    assert bench.status(job_id).state == "cancelled" and bench.log == []
    assert bench.runner.under_way() == {}


def test_a_cancel_survives_a_kill(bench: Bench) -> None:
    def do(turn: Turn) -> None:
        bench.journal.cancel([turn.job.job_id])
        raise Gone

    bench.steps = [bench.noted("a", do=do)]
    job_id = bench.accept()
    die(bench, job_id)
    assert bench.go(job_id).state == "cancelled"
    assert bench.log == ["undo a"]


def test_what_a_safe_point_raised_counts(bench: Bench) -> None:
    """Also where a step makes something else of it."""

    def do(turn: Turn) -> None:
        bench.journal.cancel([turn.job.job_id])
        try:
            turn.go_on()
        except TryLaterError as error:
            raise DamagedError("cannot install: the child has died") from error

    bench.steps = [bench.noted("a", do=do)]
    assert bench.run().state == "cancelled"


@pytest.mark.parametrize("listens", [True, False])
def test_a_step_that_takes_too_long(bench: Bench, listens: bool) -> None:
    """One that does not listen is found out when it returns."""

    def slow(turn: Turn) -> None:
        bench.clock.pass_time(601)
        if listens:
            turn.go_on()

    bench.steps = [bench.noted("a"), bench.noted("b", do=slow)]
    status = bench.run()
    assert (status.state, status.error.code) == ("failed", "step_timeout")
    assert bench.log == ["do a", "undo b", "undo a"]


def test_each_step_has_its_own_time(bench: Bench) -> None:
    bench.steps = [bench.noted(name, do=lambda turn: bench.clock.pass_time(500)) for name in "abcd"]
    assert bench.run().state == "succeeded"


def test_the_whole_takes_too_long_over_restarts(bench: Bench) -> None:
    """Time that was spent before a kill counts, time in which nothing ran does not."""

    def slow(turn: Turn) -> None:
        for _ in range(5):
            bench.clock.pass_time(100)
            turn.go_on()
        raise Gone

    bench.steps = [bench.noted("a", do=slow)]
    job_id = bench.accept(total_timeout_s=900.0)
    die(bench, job_id)
    bench.clock.pass_time(10_000)
    bench.runner.wake()
    bench.work()  # the second start comes to its total before the kill
    status = bench.status(job_id)
    assert (status.state, status.error.code) == ("failed", "total_timeout")
    assert bench.log == ["undo a"]


def test_taking_back_has_its_own_time(bench: Bench) -> None:
    def slow_undo(turn: Turn) -> None:
        bench.clock.pass_time(500)
        turn.go_on()
        bench.log.append("undo")

    def never_ending(turn: Turn) -> None:
        bench.clock.pass_time(601)
        turn.go_on()

    bench.steps = [
        bench.noted("a", undo=slow_undo),
        bench.noted("b", undo=never_ending),
        bench.noted("c", do=lambda turn: bench.clock.pass_time(10_000)),
    ]
    status = bench.run(total_timeout_s=700.0)
    assert status.error.code == "step_timeout"
    assert "not taken back: b: " in status.error.text
    assert bench.log == ["do a", "do b", "undo c", "undo"]


# -- kills ------------------------------------------------------------------------------------------------------------


def test_a_step_whose_effect_holds_is_not_done_again(bench: Bench) -> None:
    def do(turn: Turn) -> None:
        bench.log.append(f"do {turn.attempt}")
        raise Gone

    bench.steps = [bench.noted("a"), bench.noted("b", do=do, holds=lambda turn: "do 1" in bench.log), bench.noted("c")]
    job_id = bench.accept()
    die(bench, job_id)
    status = bench.go(job_id)
    assert (status.state, status.attempt) == ("succeeded", 2)
    assert bench.log == ["do a", "do 1", "do c"]


def test_a_step_that_cannot_be_asked_is_done_again(bench: Bench) -> None:
    bench.steps = [bench.noted("a"), bench.noted("b", do=raising(Gone()))]
    job_id = bench.accept()
    die(bench, job_id)
    bench.steps = [bench.noted("a"), bench.noted("b")]
    assert bench.go(job_id).state == "succeeded"
    assert bench.log == ["do a", "do b"]


def test_when_nobody_can_tell_it_is_taken_back(bench: Bench) -> None:
    bench.steps = [bench.noted("a"), bench.noted("b", do=raising(Gone()))]
    job_id = bench.accept()
    die(bench, job_id)
    bench.steps = [bench.noted("a"), bench.noted("b", holds=raising(DamagedError("cannot read it")))]
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "interrupted")
    assert status.error.text == "cannot tell whether b has happened: cannot read it"
    assert bench.log == ["do a", "undo b", "undo a"]


def test_a_step_that_always_kills_is_given_up(bench: Bench) -> None:
    bench.steps = [bench.noted("a"), bench.noted("b", do=raising(Gone()))]
    job_id = bench.accept()
    for _ in range(5):
        die(bench, job_id)
    status = bench.go(job_id)
    assert (status.state, status.error.code, status.attempt) == ("failed", "interrupted", 6)
    assert bench.log == ["do a", "undo b", "undo a"]


def test_progress_between_kills_is_no_standstill(bench: Bench) -> None:
    """Ten kills, but never twice in a step."""
    killed = set()

    def deadly(name: str) -> Callable[[Turn], None]:
        def do(turn: Turn) -> None:
            if name not in killed:
                killed.add(name)
                raise Gone

        return do

    bench.steps = [bench.noted(name, do=deadly(name)) for name in "abcdefghij"]
    job_id = bench.accept()
    for _ in range(10):
        die(bench, job_id)
    assert bench.go(job_id).state == "succeeded"


def test_orderly_stops_are_no_standstill_either(bench: Bench) -> None:
    def do(turn: Turn) -> None:
        bench.runner.stop()
        turn.go_on()

    bench.steps = [bench.noted("a", do=do)]
    job_id = bench.accept()
    for _ in range(10):
        bench.go(job_id)
        bench.restart()
        assert bench.status(job_id).state == "running"
    bench.steps = [bench.noted("a")]
    assert bench.go(job_id).state == "succeeded"
    assert bench.log == ["do a"]


def test_a_stop_that_others_notice_first(bench: Bench) -> None:
    """The rest of the agent raises TryLaterError when it stops: no failure of the job."""

    def do(turn: Turn) -> None:
        bench.runner.stop()
        raise TryLaterError("cannot go on: the agent is stopping")

    bench.steps = [bench.noted("a", do=do)]
    job_id = bench.accept()
    bench.go(job_id)
    bench.restart()
    bench.steps = [bench.noted("a")]
    assert bench.go(job_id).state == "succeeded"


def test_killed_while_taking_back(bench: Bench) -> None:
    """It goes on going back, and is never done again."""
    bench.steps = [
        bench.noted("a"),
        bench.noted("b", undo=raising(Gone())),
        bench.noted("c", do=raising(DamagedError("cannot do c: no"))),
    ]
    job_id = bench.accept()
    die(bench, job_id)
    status = bench.status(job_id)
    assert (status.state, status.error.text) == ("running", "cannot do c: no"), "why is told at once"
    bench.steps = [bench.noted("a"), bench.noted("b"), bench.noted("c")]
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "undone")
    assert bench.log == ["do a", "do b", "undo c", "undo b", "undo a"]


def test_taking_back_that_always_kills_is_given_up(bench: Bench) -> None:
    bench.steps = [
        bench.noted("a"),
        bench.noted("b", undo=raising(Gone())),
        bench.noted("c", do=raising(DamagedError("cannot do c: no"))),
    ]
    job_id = bench.accept()
    for _ in range(5):
        die(bench, job_id)
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "failed")
    assert status.error.text == "cannot do c: no; not taken back: b: interrupted 5 times"
    assert bench.log == ["do a", "do b", "undo c", "undo a"]


def test_other_steps_after_an_update(bench: Bench) -> None:
    """What is known by name is taken back, and the rest is said."""
    bench.steps = [bench.noted("a"), bench.noted("old"), bench.noted("c", do=raising(Gone()))]
    job_id = bench.accept()
    die(bench, job_id)
    bench.steps = [bench.noted("a"), bench.noted("new"), bench.noted("c")]
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "interrupted")
    assert "not taken back: old: this version" in status.error.text
    assert bench.log == ["do a", "do old", "undo c", "undo a"]


def test_further_steps_after_an_update(bench: Bench) -> None:
    bench.steps = [bench.noted("a"), bench.noted("b", do=raising(Gone()))]
    job_id = bench.accept()
    die(bench, job_id)
    bench.steps = [bench.noted("a"), bench.noted("b"), bench.noted("c")]
    assert bench.go(job_id).state == "succeeded"
    assert bench.log == ["do a", "do b", "do c"]


def test_nobody_vouches_for_a_job_that_was_begun(bench: Bench) -> None:
    """Begun, it cannot be rejected; unvouched for, its arguments are not followed any further, not even back."""
    bench.steps = [bench.noted("a", do=raising(Gone()))]
    job_id = bench.accept()
    die(bench, job_id)
    bench.verify = raising(BadSignatureError("cannot accept envelope: nobody vouches"))
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "unknown_key")
    assert status.error.text.endswith("not taken back: a")
    assert bench.log == []


# -- restarts ---------------------------------------------------------------------------------------------------------


def restart_step(bench: Bench, then: Callable[[], None] | None = None) -> Step:
    def do(turn: Turn) -> None:
        turn.notes["start"] = turn.boot_nonce
        bench.log.append("ask")
        raise RestartPending(then)

    return bench.noted("restart", do=do, holds=lambda turn: turn.notes.get("start") not in (None, turn.boot_nonce))


def test_a_job_goes_on_after_the_restart_that_it_asked_for(bench: Bench) -> None:
    def then() -> None:
        status = bench.status("job-1")
        assert (status.state, status.phase) == ("running", "rebooting"), "it is durable before the restart begins"
        bench.log.append("restart")

    bench.steps = [restart_step(bench, then), bench.noted("b")]
    job_id = bench.accept()
    bench.go(job_id)
    assert bench.runner.under_way()["normal"]["job_id"] == job_id
    other = bench.accept()
    assert bench.go(other).state == "queued", "the normal lane waits with it"
    bench.restart()
    status = bench.go(job_id)
    assert (status.state, status.attempt) == ("succeeded", 2)
    assert bench.log == ["ask", "restart", "do b"]


def test_a_restart_that_does_not_come(bench: Bench) -> None:
    bench.steps = [bench.noted("a"), restart_step(bench)]
    job_id = bench.accept()
    bench.go(job_id)
    wait = bench.runner.wake()
    assert wait == pytest.approx(600) and bench.todo == []
    bench.clock.pass_time(wait + 1)
    status = bench.go(job_id)
    assert (status.state, status.error.code) == ("failed", "step_timeout")
    assert "the restart did not come" in status.error.text
    assert bench.log == ["do a", "ask", "undo restart", "undo a"]


def test_a_restart_that_cannot_be_begun(bench: Bench) -> None:
    bench.steps = [restart_step(bench, lambda: raising(RefusedError("cannot reboot: not allowed"))(None))]
    status = bench.run()
    assert (status.state, status.error.code, status.error.text) == ("failed", "undone", "cannot reboot: not allowed")


def test_a_restart_that_comes_before_it_was_asked_for(bench: Bench) -> None:
    """Killed before the note was written: nothing tells that this start is the one that was wanted."""
    bench.steps = [bench.noted("restart", do=raising(Gone()), holds=lambda turn: "start" in turn.notes)]
    job_id = bench.accept()
    die(bench, job_id)
    bench.steps = [restart_step(bench)]
    bench.go(job_id)
    assert bench.log == ["ask"]
    bench.restart()
    assert bench.go(job_id).state == "succeeded"


def test_a_pending_reboot_does_not_block_rescue(bench: Bench) -> None:
    bench.steps = [restart_step(bench)]
    first = bench.accept(lane="rescue")
    bench.go(first)
    bench.steps = [bench.noted("a")]
    assert bench.run(lane="rescue").state == "succeeded"
    bench.clock.pass_time(601)
    bench.steps = [restart_step(bench)]
    assert bench.go(first).error.code == "step_timeout"


# -- trouble with the journal -----------------------------------------------------------------------------------------


def test_a_full_disk_is_like_a_kill(bench: Bench, folder: Path, clock: SimulatedClock) -> None:
    """The job is left as it is, and goes on when there is room again."""
    full = False

    def step(name: str) -> None:
        if full and name.startswith("before: write down"):
            raise TryLaterError("cannot write down how far a job is: database or disk is full")

    bench.journal._db._step = step

    def do(turn: Turn) -> None:
        nonlocal full
        bench.log.append("do a")
        full = True

    bench.steps = [bench.noted("a", do=do, holds=lambda turn: "do a" in bench.log), bench.noted("b")]
    job_id = bench.accept()
    bench.go(job_id)
    assert bench.log == ["do a"]
    assert "full" in bench.runner.problem
    assert bench.runner.under_way() == {}
    wait = bench.runner.wake()
    assert wait and bench.todo == []
    full = False
    bench.clock.pass_time(wait)
    assert bench.go(job_id).state == "succeeded"
    assert bench.log == ["do a", "do b"]
    assert bench.runner.wake() is None and bench.runner.problem is None


def test_a_step_must_not_go_on_without_its_note(bench: Bench) -> None:
    """Where ``save`` fails, the step ends there, however broadly it catches errors of the agent."""

    def step(name: str) -> None:
        if name.startswith("before: write down") and "save" in bench.log:
            raise TryLaterError("cannot write: disk is full")

    bench.journal._db._step = step

    def do(turn: Turn) -> None:
        bench.log.append("save")
        with contextlib.suppress(TryLaterError):
            turn.save()
        bench.log.append("effect")

    bench.steps = [bench.noted("a", do=do)]
    job_id = bench.accept()
    assert bench.go(job_id).state == "running"
    assert bench.log == ["save"]


def test_with_no_journal_nothing_happens(bench: Bench) -> None:
    bench.accept()
    bench.journal.close()
    assert bench.runner.wake() is not None
    assert "not open" in bench.runner.problem


def test_time_spent_is_written_down_now_and_then(bench: Bench) -> None:
    """Not at each safe point, and without a flush: it is only for the total deadline."""

    def do(turn: Turn) -> None:
        bench.writes.clear()
        for _ in range(1000):
            bench.clock.pass_time(0.3)
            turn.go_on()
        bench.log += bench.writes

    bench.steps = [bench.noted("a", do=do)]
    bench.run()
    lax = [name for name in bench.log if name.startswith("after")]
    assert 8 <= len(lax) <= 10 and all(name.startswith("after, lax") for name in lax)


def test_the_time_of_a_step_begins_when_its_turn_has_come(bench: Bench) -> None:
    """Others may take hours before it."""

    def wait(look: Callable[[], None]) -> None:
        for _ in range(30):
            bench.clock.pass_time(100.0)
            look()

    bench.wait = wait
    bench.steps = [bench.noted("a", do=lambda turn: turn.go_on()), bench.noted("b")]
    status = bench.run(step_timeout_s=60.0, total_timeout_s=100.0)
    assert (status.state, bench.log) == ("succeeded", ["do b"])


def test_a_step_that_waits_for_its_turn_is_cancelled(bench: Bench) -> None:
    def wait(look: Callable[[], None]) -> None:
        if bench.log == ["do a"]:
            bench.journal.cancel(["job-1"])
            look()

    bench.wait = wait
    bench.steps = [bench.noted("a"), bench.noted("b")]
    status = bench.run()
    assert status.state == "cancelled"
    # That it begins was written down before it waited; taking back is for steps that got nowhere, too.
    assert bench.log == ["do a", "undo b", "undo a"]


def test_a_step_apart_waits_for_no_turn_but_taking_it_back_does(bench: Bench) -> None:
    bench.wait = lambda look: bench.log.append("turn")
    bench.steps = [bench.noted("a", apart=True), bench.noted("b", do=raising(RefusedError("no")))]
    status = bench.run()
    assert status.state == "failed"
    assert bench.log == ["do a", "turn", "turn", "undo b", "turn", "undo a"]


def test_a_step_apart_takes_a_turn_where_it_asks_for_one(bench: Bench) -> None:
    def do(turn: Turn) -> dict[str, int]:
        bench.log.append("waits")
        return {"found": turn.in_turn(lambda: bench.log.append("works") or 7)}

    bench.wait = lambda look: bench.log.append("turn")
    bench.steps = [bench.noted("a", do=do, apart=True)]
    assert bench.run().result == {"found": 7}
    assert bench.log == ["waits", "turn", "works"]


def test_a_turn_that_a_step_asks_for_fails_it_or_is_cancelled(bench: Bench) -> None:
    def wait(look: Callable[[], None]) -> None:
        if "cancel" in bench.log:
            bench.journal.cancel(["job-2"])
            look()

    no = raising(RefusedError("no"))
    bench.wait = wait
    bench.steps = [bench.noted("a", do=lambda turn: turn.in_turn(partial(no, turn)), apart=True)]
    status = bench.run()
    assert (status.state, status.error.text, bench.log) == ("failed", "no", ["undo a"])
    bench.log[:] = ["cancel"]
    assert (bench.run().state, bench.log) == ("cancelled", ["cancel", "undo a"])


def test_real_threads(bench: Bench) -> None:
    """Both lanes at once, jobs accepted, cancelled and published meanwhile."""
    news = threading.Event()
    threads: list[threading.Thread] = []

    def execute(lane: str, name: str, work: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work, name=lane))
        threads[-1].start()

    bench.execute = execute
    bench.changed = news.set
    bench.restart()
    bench.steps = [bench.noted("a", do=lambda turn: turn.go_on()), bench.noted("b", do=lambda turn: turn.tell({}))]
    for number in range(60):
        bench.accept(lane="rescue" if number % 3 == 0 else "normal")
        bench.runner.wake()
        if number % 10 == 9:
            bench.journal.cancel([f"job-{number - 1}"])
        for status in bench.journal.unpublished():
            bench.journal.published(status.job_id, status.rev)
    while bench.journal.jobs(open_only=True):
        assert news.wait(30), bench.journal.jobs(open_only=True)
        news.clear()
        bench.runner.wake()
    for thread in threads:
        thread.join()
    assert {status.state for status in bench.journal.jobs()} <= {"succeeded", "cancelled"}
    assert bench.runner.under_way() == {}
