"""A step that waits for the world: its thread is free meanwhile, its lane is not, and a kill counts as one."""

from __future__ import annotations

import pytest

from agent.work.attempt import MAX_STALLED
from agent.work.steps import Pause, Step, Turn
from tests.work.test_runner import Bench, Gone, bench, die, raising

__all__ = ["bench"]


def waiting(bench: Bench, until: int, name: str = "wait", seconds: float = 2.0) -> Step:
    """It waits until it has looked so often."""

    def do(turn: Turn) -> dict[str, int]:
        turn.go_on()
        turn.notes["looks"] = turn.notes.get("looks", 0) + 1
        bench.log.append(f"look {turn.notes['looks']}")
        if turn.notes["looks"] < until:
            raise Pause(seconds)
        return {"looks": turn.notes["looks"]}

    return Step(name, "probation", do, None, lambda turn: bench.log.append(f"undo {name}"))


def pass_time(bench: Bench, seconds: float) -> None:
    bench.clock.pass_time(seconds)
    bench.runner.wake()
    bench.work()


def test_it_looks_again_after_its_time_and_keeps_its_notes(bench: Bench) -> None:
    bench.steps = [bench.noted("before"), waiting(bench, 3), bench.noted("after")]
    status = bench.run()
    assert (status.state, status.phase, status.step, status.attempt) == ("running", "probation", "wait", 1)
    assert bench.runner.wake() == pytest.approx(2.0)
    pass_time(bench, 1.0)
    assert bench.log == ["do before", "look 1"]
    pass_time(bench, 1.0)
    pass_time(bench, 2.0)
    status = bench.status("job-1")
    assert (status.state, status.attempt, status.result) == ("succeeded", 1, {"looks": 3})
    assert bench.log == ["do before", "look 1", "look 2", "look 3", "do after"]


def test_the_next_job_waits_and_a_rescue_does_not(bench: Bench) -> None:
    bench.steps = lambda args: [waiting(bench, 2)] if args.get("wait") else [bench.noted("other")]
    bench.accept(args={"wait": True})
    other, rescue = bench.accept(), bench.accept(lane="rescue")
    bench.runner.wake()
    bench.work()
    bench.runner.wake()
    bench.work()
    assert bench.status(rescue).state == "succeeded"
    assert bench.status(other).state == "queued"
    pass_time(bench, 2.0)
    bench.runner.wake()
    bench.work()
    assert bench.status(other).state == "succeeded"


def test_waiting_has_no_deadline_of_the_step_and_is_not_stuck(bench: Bench) -> None:
    bench.steps = [waiting(bench, 5, seconds=400.0)]
    bench.run(step_timeout_s=600.0, total_timeout_s=700.0)
    for _ in range(3):
        pass_time(bench, 400.0)
        assert not bench.runner.under_way()["normal"]["stuck"]
    pass_time(bench, 400.0)
    assert bench.status("job-1").state == "succeeded"


def test_nobody_is_told_that_nothing_changes(bench: Bench) -> None:
    woken = []
    bench.runner.paused = lambda: woken.append(1)
    bench.steps = [waiting(bench, 5)]
    bench.run()
    changes, rev = bench.changes, bench.status("job-1").rev
    for _ in range(3):
        pass_time(bench, 2.0)
    assert (bench.changes, bench.status("job-1").rev, len(woken)) == (changes, rev, 3)


def test_a_cancel_ends_it_at_its_next_look(bench: Bench) -> None:
    bench.steps = [bench.noted("before"), waiting(bench, 9)]
    bench.run()
    bench.journal.accept(None, epoch=1, generation=99, document=b"c", cancel=["job-1"])
    pass_time(bench, 2.0)
    status = bench.status("job-1")
    assert status.state == "cancelled"
    assert bench.log == ["do before", "look 1", "undo wait", "undo before"]


def test_after_a_kill_it_goes_on_with_what_was_noted(bench: Bench) -> None:
    bench.steps = [waiting(bench, 3)]
    bench.run()
    bench.restart()
    status = bench.go("job-1")
    assert (status.state, status.attempt) == ("running", 2)
    pass_time(bench, 2.0)
    assert bench.status("job-1").result == {"looks": 3}


def test_killed_again_and_again_while_it_waits_it_is_given_up(bench: Bench) -> None:
    bench.steps = [waiting(bench, 99)]
    bench.run()
    for _ in range(MAX_STALLED - 1):
        bench.restart()
        assert bench.go("job-1").state == "running"
    bench.restart()
    status = bench.go("job-1")
    assert status.state == "failed"
    assert status.error.code == "interrupted"


def test_an_orderly_stop_while_it_waits_counts_for_nothing(bench: Bench) -> None:
    bench.steps = [waiting(bench, 99)]
    bench.run()
    for _ in range(2 * MAX_STALLED):
        bench.runner.stop()
        bench.runner.stop()
        bench.restart()
        assert bench.go("job-1").state == "running"


def test_a_stop_in_the_middle_of_a_look(bench: Bench) -> None:
    def do(turn: Turn) -> None:
        bench.runner.stop()
        raise Pause(1.0)

    bench.steps = [Step("wait", "probation", do)]
    bench.run()
    for _ in range(2 * MAX_STALLED):
        bench.restart()
        assert bench.go("job-1").state == "running"


def test_killed_within_a_look(bench: Bench) -> None:
    bench.steps = [Step("wait", "probation", raising(Gone()))]
    job_id = bench.accept()
    for _ in range(MAX_STALLED):
        die(bench, job_id)
    assert bench.go(job_id).error.code == "interrupted"
