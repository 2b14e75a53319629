"""Whether a new version is worse: judged in the end alike, whatever came between; kept whole over any kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.base.errors import ConflictError, RefusedError
from agent.operations.probation import (
    LEAST_BEFORE,
    LEAST_FAILED,
    LEAST_MS,
    LEAST_TIMES,
    MOST_STARTS,
    Before,
    Case,
    Course,
    Outcome,
    Rules,
    Tally,
    Verdict,
    least_rate,
    steps,
)
from agent.work.jobs import Order
from agent.work.steps import Pause, Turn

MS = st.floats(0.01, 1000.0)


def course(before_ms: float | None = 10.0, *, errors: int = 0, requests: int = 1000, **rules: Any) -> Course:
    return Course(Rules(**rules), Before(before_ms, requests, errors))


def answer(on: Course, count: int, ms: float) -> None:
    for _ in range(count):
        on.new.answered += 1
        on.new.times.append(ms)


# -- what is worse -----------------------------------------------------------------------------------------------------


def test_nobody_asks_and_it_passes_when_its_time_is_up() -> None:
    found = course(seconds=60.0)
    found.elapsed_s = 59.9
    assert found.verdict() == Verdict("watching")
    found.elapsed_s = 60.0
    assert found.verdict() == Verdict("passed")


def test_as_good_as_the_one_before_passes_after_enough_requests() -> None:
    found = course()
    answer(found, 199, 10.0)
    assert found.verdict().state == "watching"
    answer(found, 1, 10.0)
    assert found.verdict() == Verdict("passed")


def test_twenty_times_slower_is_seen_long_before_the_end() -> None:
    found = course(before_ms=1.0)
    answer(found, LEAST_TIMES, 20.0)
    verdict = found.verdict()
    assert (verdict.state, verdict.code) == ("worse", "latency")
    assert verdict.text == "p50 20 ms, before 1 ms (20.0 x, 3 x is allowed)"


def test_a_little_slower_is_allowed_and_a_little_more_is_not() -> None:
    allowed, refused = course(), course()
    answer(allowed, 200, 30.0)
    answer(refused, 200, 30.1)
    assert allowed.verdict() == Verdict("passed")
    assert refused.verdict().code == "latency"


def test_a_few_slow_answers_make_nothing_slower() -> None:
    found = course()
    answer(found, 60, 500.0)
    answer(found, 140, 10.0)
    assert found.verdict() == Verdict("passed")


def test_nobody_feels_what_is_less_than_a_request_costs() -> None:
    found = course(before_ms=0.01)
    answer(found, 200, 0.01 + LEAST_MS)
    assert found.verdict() == Verdict("passed")


def test_whoever_takes_a_slower_one_gets_it() -> None:
    found = course(max_latency_ratio=None)
    answer(found, 200, 5000.0)
    assert found.verdict() == Verdict("passed")


def test_where_nothing_is_known_of_the_one_before_times_say_nothing() -> None:
    found = course(before_ms=None)
    answer(found, 200, 5000.0)
    assert found.verdict() == Verdict("passed")


def test_one_that_always_fails_is_seen_at_once() -> None:
    found = course()
    found.new.failed = LEAST_FAILED
    assert found.verdict() == Verdict("worse", "errors", "3 of 3 requests failed (100.0%), 2.0% are allowed")


def test_errors_that_the_one_before_had_as_well_are_not_held_against_it() -> None:
    """An app sends nonsense in every tenth request."""
    found = course(errors=100)
    answer(found, 180, 10.0)
    found.new.failed = 20
    assert found.verdict() == Verdict("passed")
    lacking = course(errors=LEAST_BEFORE - 1, requests=LEAST_BEFORE - 1)
    answer(lacking, 180, 10.0)
    lacking.new.failed = 20
    assert lacking.verdict().code == "errors"


def test_two_failures_may_be_bad_luck() -> None:
    found = course(requests=0)
    answer(found, 40, 10.0)
    found.new.failed, found.elapsed_s = 2, 600.0
    assert found.verdict() == Verdict("passed")


def test_other_answers_than_before_are_worse_where_somebody_compares() -> None:
    found = course(min_agreement=0.8)
    found.compared, found.agreed = 19, 0.0
    assert found.verdict().state == "watching"
    found.compared, found.agreed = 20, 15.9
    verdict = found.verdict()
    assert verdict.code == "agreement"
    assert verdict.text == "it agrees by 0.795 with the version before over 20 requests, 0.8 is asked for"


def test_the_agent_goes_down_again_and_again() -> None:
    found = course()
    found.starts = MOST_STARTS
    assert found.verdict().state == "watching"
    found.starts += 1
    assert found.verdict().code == "interrupted"


@given(st.integers(1, 400), st.data())
def test_the_least_rate_is_no_higher_than_the_rate(requests: int, data: st.DataObject) -> None:
    failed = data.draw(st.integers(0, requests))
    assert 0.0 <= least_rate(failed, requests) <= failed / requests + 1e-12
    if failed < requests:
        assert least_rate(failed, requests) <= least_rate(failed + 1, requests)


@given(st.lists(MS, min_size=LEAST_TIMES, max_size=600), MS)
def test_it_is_never_slower_than_itself(times: list[float], factor: float) -> None:
    """The very same times, whatever they are: no version is worse than its own twin."""
    tally = Tally()
    tally.times.extend(times)
    found = Course(Rules(requests=len(times)), Before(tally.p50(), len(times), 0))
    for at, ms in enumerate(list(tally.times)):
        found.new.answered = at + 1
        found.new.times.append(ms)
    found.new.answered = len(times)
    assert found.verdict() == Verdict("passed"), factor


# -- whatever happens, in whatever order -------------------------------------------------------------------------------


class Watched(RuleBasedStateMachine):
    """Requests, failures, time, comparisons, kills: a verdict is final, has a reason, and comes in time."""

    @initialize(
        before=st.one_of(st.none(), MS),
        requests=st.integers(1, 60),
        seconds=st.floats(1.0, 100.0),
        rate=st.floats(0.0, 0.5),
    )
    def begin(self, before: float | None, requests: int, seconds: float, rate: float) -> None:
        self.rules = Rules(requests, seconds, rate, 1.5, 0.5)
        self.course = Course(self.rules, Before(before, 100, 0))
        self.final: Verdict | None = None

    @rule(ms=MS, count=st.integers(1, 25))
    def answers(self, ms: float, count: int) -> None:
        answer(self.course, count, ms)

    @rule()
    def fails(self) -> None:
        self.course.new.failed += 1

    @rule(seconds=st.floats(0.0, 50.0))
    def time_passes(self, seconds: float) -> None:
        self.course.elapsed_s += seconds

    @rule(agreement=st.floats(-1.0, 1.0))
    def is_compared(self, agreement: float) -> None:
        self.course.compared += 1
        self.course.agreed += agreement

    @rule()
    def is_killed(self) -> None:
        """What was written is what goes on; a verdict that was not carried out is found again."""
        self.course = Course.from_json(self.rules, json.loads(json.dumps(self.course.to_json())))
        self.course.starts += 1
        self.final = None

    @rule()
    def is_judged(self) -> None:
        verdict = self.course.verdict()
        if verdict.state != "watching":
            assert self.final in (None, verdict)
            self.final = verdict

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "course") or self.final is None:
            return
        assert self.course.verdict() == self.final
        assert (self.final.state == "worse") == bool(self.final.code) == bool(self.final.text)

    @invariant()
    def ends_in_time(self) -> None:
        if hasattr(self, "course"):
            verdict = Course.from_json(self.rules, self.course.to_json()).verdict()
            over = self.course.new.requests >= self.rules.requests
            assert verdict.state != "watching" or not over


TestWatched = Watched.TestCase


def test_a_kill_changes_no_verdict() -> None:
    for make in (
        test_twenty_times_slower_is_seen_long_before_the_end,
        test_one_that_always_fails_is_seen_at_once,
    ):
        make()
    found = course(before_ms=1.0)
    answer(found, LEAST_TIMES - 1, 20.0)
    again = Course.from_json(found.rules, json.loads(json.dumps(found.to_json())))
    answer(again, 1, 20.0)
    assert again.verdict().code == "latency"


@pytest.mark.parametrize("broken", [{}, {"before": 1}, {"before": [1, 2]}, {"new": {}}, {"elapsed_s": "x"}])
def test_what_nobody_wrote_is_not_read(broken: Mapping[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Course.from_json(Rules(), {**course().to_json(), **broken} if broken else {})


# -- the step of a job -------------------------------------------------------------------------------------------------


class Watch:
    """Knows what it is told."""

    def __init__(self) -> None:
        self.known: Outcome | None = None
        self.answers = True
        self.armed: list[Case] = []
        self.disarmed: list[tuple[str, str]] = []

    def look(self, model: str) -> None:
        raise AssertionError(model)

    def arm(self, case: Case) -> None:
        self.armed.append(case)
        if self.answers:
            self.known = Outcome("watching")

    def disarm(self, model: str, version: str) -> None:
        self.disarmed.append((model, version))

    def outcome(self, model: str, version: str, by: str) -> Outcome | None:
        assert by == "job-1-j1"
        return self.known


CASE = Case("m", "2.0.0", "1.0.0", None, "job-1-j1")


def do(watch: Watch, case: Case | None = CASE) -> Mapping[str, Any] | None:
    order = Order("j1", 1, 1, "model.install", "change", "normal", 5, {}, None, 60.0, 60.0, None, b"")
    turn = Turn(order, {}, 1, "0" * 32, tell=lambda event: None, go_on=lambda: None, save=lambda: None)
    (step,) = steps(watch, "m", "2.0.0", lambda turn: case)
    return step.do(turn)


def test_a_job_waits_and_then_says_what_was_seen() -> None:
    watch = Watch()
    watch.known = Outcome("watching")
    with pytest.raises(Pause):
        do(watch)
    watch.known = Outcome("passed", seen={"requests": 200})
    assert do(watch) == {"probation": {"requests": 200}}
    assert watch.armed == []


def test_a_job_whose_version_is_worse_fails_with_the_reason() -> None:
    watch = Watch()
    watch.known = Outcome("rolled_back", "p50 20 ms, before 1 ms (20.0 x, 3 x is allowed)")
    with pytest.raises(RefusedError) as refused:
        do(watch)
    assert str(refused.value) == (
        "cannot keep 'm' 2.0.0: it is worse than 1.0.0 here: p50 20 ms, before 1 ms (20.0 x, 3 x is allowed);"
        " 1.0.0 answers again"
    )


def test_nothing_to_go_back_to_is_no_probation() -> None:
    assert do(Watch(), None) == {"probation": None}


def test_a_case_that_was_lost_is_begun_again() -> None:
    watch = Watch()
    with pytest.raises(Pause):
        do(watch)
    assert watch.armed == [CASE]


def test_somebody_has_let_another_version_answer() -> None:
    watch = Watch()
    watch.answers = False
    with pytest.raises(ConflictError, match="another version answers now"):
        do(watch)
    assert watch.disarmed == [("m", "2.0.0")]
