"""What live requests tell: only while somebody wants to know, of the version that is meant, and whose fault it was."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from agent.base.errors import AgentError, DamagedError, DeadlineError, NotFoundError, PeerError, TryLaterError
from agent.core.watching import Watching
from agent.infer.runtimes.failures import RunError
from agent.infer.tensors import InferRequest, InferResponse
from agent.operations.probation import Tally

ASKED = InferRequest(())


def response(version: str = "1.0.0", **parameters: object) -> InferResponse:
    return InferResponse("m", version, (), parameters={"compute_us": 1500, "cache": "off", **parameters})


class Site:
    """Inference, as far as it matters here."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.held = 0
        self.watching = Watching(lambda watch: self.told.append(watch is not None), self.hold, self.let_go)

    def hold(self) -> None:
        self.held = 1

    def let_go(self) -> None:
        self.held = 0


@pytest.fixture
def site() -> Site:
    return Site()


def test_nobody_is_told_anything_but_while_somebody_wants_to_know(site: Site) -> None:
    site.watching.follow("m", "1.0.0", Tally())
    site.watching.measure(on=True)
    site.watching.unfollow("m", "1.0.0")
    site.watching.measure(on=False)
    assert site.told == [True, True, True, False]


def test_answers_of_the_version_are_counted_and_timed(site: Site) -> None:
    tally = Tally()
    site.watching.follow("m", "1.0.0", tally)
    for answer in (response(), response("2.0.0"), response(cache="hit", compute_us=0), response(cache="joined")):
        site.watching.answered(ASKED, answer)
    assert (tally.answered, tally.failed, list(tally.times)) == (3, 0, [1.5])


@pytest.mark.parametrize(
    ("error", "hurried", "counts"),
    [
        (RunError("cannot run model"), False, True),
        (DamagedError("gone"), False, True),
        (TryLaterError("full"), False, True),
        (DeadlineError("late"), False, True),
        (DeadlineError("late"), True, False),
        (PeerError("input 'x': missing"), False, False),
        (NotFoundError("no such model"), False, False),
    ],
)
def test_whose_fault_it_was(site: Site, error: AgentError, hurried: bool, counts: bool) -> None:
    tally = Tally()
    site.watching.follow("m", "2.0.0", tally)
    for version in (None, "2.0.0", "1.0.0"):
        site.watching.failed("m", version, error, hurried=hurried)
    site.watching.failed("other", None, error, hurried=hurried)
    assert tally.failed == 2 * counts


def test_another_version_takes_over_the_watch(site: Site) -> None:
    before, after = Tally(), Tally()
    site.watching.follow("m", "1.0.0", before)
    site.watching.follow("m", "2.0.0", after)
    site.watching.answered(ASKED, response("1.0.0"))
    site.watching.answered(ASKED, response("2.0.0"))
    site.watching.unfollow("m", "1.0.0")  # long gone
    site.watching.answered(ASKED, response("2.0.0"))
    assert (before.answered, after.answered) == (0, 2)


def test_when_requests_ran(site: Site) -> None:
    watching = site.watching
    begin = time.perf_counter()
    watching.began(time.perf_counter_ns())  # nobody measures
    assert watching.spans(begin, time.perf_counter()) == []
    watching.measure(on=True)
    first, second = time.perf_counter_ns(), time.perf_counter_ns() + 1
    watching.began(first)
    watching.began(second)
    watching.ended(first)
    end = time.perf_counter()
    done, running = watching.spans(begin, end)
    assert done[0] == first / 1e9
    assert first / 1e9 <= done[1] <= end
    assert running == (second / 1e9, int(end * 1e9) / 1e9)
    assert watching.spans(end + 1, end + 2) == [(second / 1e9, pytest.approx(end + 2))]
    watching.ended(second)
    watching.ended(second)
    assert watching.spans(end + 1, end + 2) == []
    watching.measure(on=False)
    assert watching.spans(begin, end) == []


def test_whoever_gives_way_is_told_when_requests_come_and_when_none_is_left(site: Site) -> None:
    site.watching.began(1)
    assert not site.held, "nobody gives way"
    site.watching.give_way(on=True)
    site.watching.began(2)
    site.watching.began(3)
    site.watching.ended(2)
    assert site.held
    site.watching.ended(3)
    site.watching.ended(3)
    assert not site.held
    site.watching.began(4)
    site.watching.measure(on=True)
    site.watching.give_way(on=False)
    assert not site.held
    site.watching.ended(4)
    assert len(site.watching.spans(0.0, time.perf_counter())) == 1
    assert site.told[-1]
    site.watching.measure(on=False)
    assert not site.told[-1]


def test_who_gives_way_waits_until_the_answer_has_been_sent() -> None:
    """Who is told of the end while it is being told of has not sent the answer yet; by then the next may have come."""
    told: list[str] = []
    later: list[Callable[[], None]] = []
    watching = Watching(lambda watch: None, lambda: told.append("hold"), lambda: told.append("go"), later.append)
    watching.give_way(on=True)
    told.clear()
    watching.began(1)
    watching.ended(1)
    assert told == ["hold"]
    watching.began(2)
    later.pop()()
    assert told == ["hold", "hold"], "another one has come"
    watching.ended(2)
    later.pop()()
    assert told == ["hold", "hold", "go"]


def test_a_request_that_ended_without_a_word_holds_nobody_for_ever(site: Site) -> None:
    site.watching.give_way(on=True)
    site.watching.began(time.perf_counter_ns() - 10**12)
    assert site.held
    site.watching.spans(0.0, 1.0)
    assert not site.held
