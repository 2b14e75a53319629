"""Whether a new version is worse than the one before it, judged by live requests: docs/spec/delivery.md 9.

Pure but for ``steps``, which make a job wait for what a ``Watcher`` finds. A verdict is final: nothing that comes later
changes it. A version is called worse before its time is up only where that is no longer a matter of luck.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agent.base.errors import ConflictError, RefusedError

if TYPE_CHECKING:
    from agent.work.steps import Step, Turn

State = Literal["watching", "passed", "worse"]
#: Times of single requests that are kept of a version: the latest.
MOST_TIMES = 512
#: Fewer say nothing: times and comparisons of a version, failures of the new one, requests of the one before.
LEAST_TIMES, LEAST_COMPARED, LEAST_FAILED, LEAST_BEFORE = 20, 20, 3, 20
#: What a request over the socket costs in itself, in ms: nobody is served worse by less than that.
LEAST_MS = 0.25
#: How much more room live requests give than the trial: the versions are seen at different moments, and what else the
#: device does by then slows one of them alone (**measured**: 2.1 x for a twin on a machine that others had filled).
LIVE_ROOM = 2.0
#: Starts of the agent within one probation, without an orderly stop before: after so many the version is to blame.
MOST_STARTS = 4
#: Standard deviations that make a difference more than luck: one error in a thousand.
_SURE = 3.29
#: How often a job asks what has come of it.
_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Rules:
    """The configuration's part. ``max_latency_ratio`` is None where the version may be slower."""

    requests: int = 200
    seconds: float = 600.0
    max_error_rate: float = 0.02
    max_latency_ratio: float | None = 1.5
    min_agreement: float = 0.5


@dataclass(slots=True)
class Tally:
    """What was seen of one version: answers, failures that were its own, the latest times in ms."""

    answered: int = 0
    failed: int = 0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_TIMES))

    @property
    def requests(self) -> int:
        """All that it was asked."""
        return self.answered + self.failed

    def p50(self) -> float | None:
        """The median of its times; None while there are too few."""
        return _median(sorted(self.times)) if len(self.times) >= LEAST_TIMES else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"answered": self.answered, "failed": self.failed, "times": [round(ms, 4) for ms in self.times]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Tally:
        """As it was written. KeyError, TypeError or ValueError for what nobody wrote so."""
        times = deque((float(ms) for ms in document["times"]), maxlen=MOST_TIMES)
        return cls(int(document["answered"]), int(document["failed"]), times)


@dataclass(frozen=True, slots=True)
class Before:
    """How the version before did on this device: its median in ms, and failures among so many requests."""

    p50_ms: float | None = None
    requests: int = 0
    failed: int = 0

    @property
    def error_rate(self) -> float:
        """0 where too little is known."""
        return self.failed / self.requests if self.requests >= LEAST_BEFORE else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Worse: ``code`` is ``errors``, ``latency``, ``agreement`` or ``interrupted``; ``text`` says by how much."""

    state: State
    code: str = ""
    text: str = ""


@dataclass(slots=True)
class Course:
    """One probation: the rules, what it is compared with, and what has been seen so far.

    ``compared`` and ``agreed``: answers that the version before gave, too, and the sum of how far they agree.
    ``starts``: of the agent, since it began.
    """

    rules: Rules
    before: Before = Before()
    new: Tally = field(default_factory=Tally)
    elapsed_s: float = 0.0
    compared: int = 0
    agreed: float = 0.0
    starts: int = 1
    _final: Verdict | None = None

    @property
    def agreement(self) -> float | None:
        """The mean; None while nothing was compared."""
        return self.agreed / self.compared if self.compared else None

    def verdict(self) -> Verdict:
        """What is to be done now."""
        if self._final is None:
            over = self.new.requests >= self.rules.requests or self.elapsed_s >= self.rules.seconds
            found = self._worse(over=over)
            if found is None and not over:
                return Verdict("watching")
            self._final = found or Verdict("passed")
        return self._final

    def _worse(self, *, over: bool) -> Verdict | None:
        if self.starts > MOST_STARTS:
            return Verdict("worse", "interrupted", f"the agent ended {self.starts - 1} times since it answers")
        return self._errors(over=over) or self._latency(over=over) or self._disagrees()

    def _errors(self, *, over: bool) -> Verdict | None:
        failed, requests = self.new.failed, self.new.requests
        allowed = self.before.error_rate + self.rules.max_error_rate
        if failed < LEAST_FAILED or (failed / requests if over else least_rate(failed, requests)) <= allowed:
            return None
        text = f"{failed} of {requests} requests failed ({failed / requests:.1%}), {allowed:.1%} are allowed"
        return Verdict("worse", "errors", text)

    def _latency(self, *, over: bool) -> Verdict | None:
        before = self.before.p50_ms
        if self.rules.max_latency_ratio is None or before is None or len(self.new.times) < LEAST_TIMES:
            return None
        ratio = self.rules.max_latency_ratio * LIVE_ROOM
        times = sorted(self.new.times)
        median = _median(times)
        if (median if over else _least_median(times)) <= max(before * ratio, before + LEAST_MS):
            return None
        text = f"p50 {median:.4g} ms, before {before:.4g} ms ({median / before:.1f} x, {ratio:g} x is allowed)"
        return Verdict("worse", "latency", text)

    def _disagrees(self) -> Verdict | None:
        mean, least = self.agreement, self.rules.min_agreement
        if mean is None or self.compared < LEAST_COMPARED or mean >= least:
            return None
        text = f"it agrees by {mean:.3g} with the version before over {self.compared} requests, {least:g} is asked for"
        return Verdict("worse", "agreement", text)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what a kill must not take."""
        return {
            "before": [self.before.p50_ms, self.before.requests, self.before.failed],
            "new": self.new.to_json(),
            "elapsed_s": round(self.elapsed_s, 1),
            "compared": self.compared,
            "agreed": self.agreed,
            "starts": self.starts,
        }

    @classmethod
    def from_json(cls, rules: Rules, document: Mapping[str, Any]) -> Course:
        """As it was written. KeyError, TypeError or ValueError for what nobody wrote so."""
        p50_ms, requests, failed = document["before"]
        return cls(
            rules,
            Before(None if p50_ms is None else float(p50_ms), int(requests), int(failed)),
            Tally.from_json(document["new"]),
            float(document["elapsed_s"]),
            int(document["compared"]),
            float(document["agreed"]),
            int(document["starts"]),
        )

    def told(self) -> dict[str, Any]:
        """For people, and for the fleet."""
        return {
            "requests": self.new.requests,
            "failed": self.new.failed,
            "p50_ms": _rounded(self.new.p50()),
            "before_p50_ms": _rounded(self.before.p50_ms),
            "before_error_rate": round(self.before.error_rate, 4),
            "agreement": _rounded(self.agreement),
            "compared": self.compared,
            "elapsed_s": round(self.elapsed_s, 1),
            "most_requests": self.rules.requests,
            "most_s": self.rules.seconds,
        }


def least_rate(failed: int, requests: int) -> float:
    """The lower end of Wilson's score interval (E. B. Wilson 1927): the true rate is above it, but for bad luck."""
    square = _SURE * _SURE
    rate = failed / requests
    middle = rate + square / (2 * requests)
    reach = _SURE * math.sqrt(rate * (1 - rate) / requests + square / (4 * requests * requests))
    return max(0.0, (middle - reach) / (1 + square / requests))


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _least_median(ordered: Sequence[float]) -> float:
    """The order statistic that the true median is above, but for bad luck: the sign test's, by its normal bound."""
    return ordered[max(0, int(len(ordered) / 2 - _SURE / 2 * math.sqrt(len(ordered))))]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# -- what watches ------------------------------------------------------------------------------------------------------


#: Somebody on the device has added it.
LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Case:
    """A version on probation, and the way back: ``before`` answers again, and ``previous`` is what it had before it.

    ``by``: the job that brought it, or ``LOCAL``. ``slower``: whoever brought it takes a slower one.
    """

    model: str
    version: str
    before: str
    previous: str | None
    by: str
    slower: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has come of a case. ``kept``: it is worse, and the version before could not be had."""

    state: Literal["watching", "passed", "rolled_back", "kept"]
    text: str = ""
    seen: Mapping[str, Any] = field(default_factory=dict)


class Watcher(Protocol):
    """Watches versions on probation and takes back what is worse. For the threads of operations."""

    def look(self, model: str) -> None:
        """A version is about to be tried: measure how the active one does with live requests until then."""
        ...

    def arm(self, case: Case) -> None:
        """That version is about to answer: it is watched from then on, also after a kill. The same again is nothing,
        and so is a version that has been replaced."""
        ...

    def disarm(self, model: str, version: str) -> None:
        """It will not answer, or not any more."""
        ...

    def outcome(self, model: str, version: str, by: str) -> Outcome | None:
        """None: it does not answer, or nobody watches it, and nothing is noted of it."""
        ...


class _Unwatched:
    def look(self, model: str) -> None:
        """See ``Watcher``."""

    def arm(self, case: Case) -> None:
        """See ``Watcher``."""

    def disarm(self, model: str, version: str) -> None:
        """See ``Watcher``."""

    def outcome(self, model: str, version: str, by: str) -> Outcome | None:
        """See ``Watcher``."""
        return Outcome("passed")


#: Where nothing is ever on probation.
UNWATCHED: Watcher = _Unwatched()


def steps(watcher: Watcher, model: str, version: str, case_of: Callable[[Turn], Case | None]) -> list[Step]:
    """What follows the step that let ``version`` answer, in whatever job did that, and had the watcher armed.

    ``case_of``: what that step brought; None where there is nothing to go back to.
    """
    from agent.work.steps import Pause, Step  # noqa: PLC0415 - a device without a fleet has no jobs

    def do(turn: Turn) -> Mapping[str, Any]:
        case = case_of(turn)
        if case is None:
            return {"probation": None}
        found = watcher.outcome(model, version, case.by)
        if found is None:
            watcher.arm(case)
            found = watcher.outcome(model, version, case.by)
        if found is None:
            watcher.disarm(model, version)
            raise ConflictError(f"cannot finish the probation of '{model}' {version}: another version answers now")
        if found.state == "watching":
            turn.go_on()
            raise Pause(_PAUSE_S)
        if found.state == "passed":
            return {"probation": dict(found.seen)}
        again = f"{case.before} answers again" if found.state == "rolled_back" else f"{case.before} cannot be had"
        raise RefusedError(
            f"cannot keep '{model}' {version}: it is worse than {case.before} here: {found.text}; {again}"
        )

    return [Step("probation", "probation", do, None, lambda turn: watcher.disarm(model, version))]


def mark(turn: Turn) -> str:
    """Who asked. Job ids are unique within an enrolment only."""
    return f"job-{turn.job.epoch}-{turn.job.job_id}"
