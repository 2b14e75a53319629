"""Trials: the candidates of a model are loaded, checked and timed in confined children, in interleaved rounds.

Round *i* runs on every candidate within the same short while, in an order that rotates, so that drift of the machine
falls on all alike. Halfway each candidate gets a fresh process: where its memory and code come to lie differs from
process to process, and that difference must show as noise, not as speed. Nothing is timed while the device throttles,
and runs during which the device served a request do not count.

A candidate that crashes, hangs, outgrows its memory, does not load or disagrees becomes a rejected ``Measurement``.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agent.base.clock import Clock, iso
from agent.infer import answers
from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.selection.measurements import Failure, Measurement, MeasurementKey

#: Rounds that nothing disturbed; where there are fewer, all of them count.
_LEAST_CLEAR = 3
_FAILURES: dict[str, Failure] = {"crashed": "crash", "hung": "hang", "memory": "memory", "refused": "error"}


class OpenModel(Protocol):
    """A decrypted model: an open descriptor, closed by the context."""

    fd: int

    def __enter__(self) -> OpenModel: ...
    def __exit__(self, *exception: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Entrant:
    """A candidate that takes part: how to load it and where its bytes come from.

    ``beside``: it is no candidate, but there to be compared with: how it agrees is noted, and rejects nothing.
    """

    id: str
    key: MeasurementKey
    open_model: Callable[[], OpenModel]
    devices: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    beside: bool = False


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """How to measure. ``memory_mb`` bounds one child, ``headroom_mb`` all that live at once; seconds and counts else.

    ``metric``/``passes`` judge the golden set behind ``open_golden``; without one, inputs are made up in ``shapes``.
    """

    memory_mb: int
    headroom_mb: int
    cpus: tuple[int, ...] = ()
    open_golden: Callable[[], OpenModel] | None = None
    metric: str | None = None
    threshold: float = 0.0
    passes: Callable[[float], bool] = lambda value: True
    #: Says how a loaded model's signature departs from the manifest's; empty when it does not.
    departs: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str] = lambda inputs, outputs: ""
    shapes: Mapping[str, list[int]] = field(default_factory=dict)
    round_s: float = 0.04
    least_runs: int = 3
    most_runs: int = 200
    least_rounds: int = 12
    most_rounds: int = 48
    load_timeout_s: float = 120.0
    check_timeout_s: float = 300.0
    run_timeout_s: float = 60.0
    #: What the children run; they are confined by themselves, before they touch the model.
    module: str = "agent.infer.child"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The world as the trial sees it: clock, throttling, an energy counter in joules (None where there is none)."""

    clock: Clock
    throttled: Callable[[], bool | None] = lambda: None
    energy_j: Callable[[], float | None] = lambda: None
    wait: Callable[[float], None] = lambda seconds: None
    progress: Callable[[Mapping[str, Any]], None] = lambda event: None
    #: When requests ran between two moments of ``perf_counter``; kept between ``watch(True)`` and ``watch(False)``.
    spans: Callable[[float, float], Sequence[tuple[float, float]]] = lambda begin, end: ()
    watch: Callable[[bool], None] = lambda on: None
    #: Asked again and again, also while a child works: what it raises ends the trial and its children.
    go_on: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _Contest:
    """What is known of one entrant while the trial runs."""

    entrant: Entrant
    child: ChildProcess | None = None
    load_ms: float | None = None
    peak_mb: float | None = None
    agreement: float | None = None
    rounds: list[list[float] | None] = field(default_factory=list)
    #: The same with what ran while a request did: for where too little else is left.
    disturbed: list[list[float] | None] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejection: tuple[Failure, str] | None = None

    @property
    def runs(self) -> bool:
        return self.rejection is None and not any(note.startswith("made-up") for note in self.notes)


#: From what is measured, the rounds done and the most there may be: the ids that should run once more (none: stop).
StillNeeded = Callable[[Sequence[Measurement], int, int], Collection[str]]


class Trial:
    """One session of measuring. ``run`` blocks (call it from a worker thread) and always ends its children."""

    def __init__(self, entrants: Sequence[Entrant], plan: TrialPlan, around: Surroundings) -> None:
        self._plan = plan
        self._around = around
        self._contests = [_Contest(entrant) for entrant in entrants]
        self._session = secrets.token_hex(8)

    def run(self, still_needed: StillNeeded) -> list[Measurement]:
        """Measure every entrant: one measurement each, in order. ``still_needed`` says who runs the next round."""
        self._around.watch(True)
        try:
            self._enter_all()
            self._rounds(still_needed)
            return self.measurements()
        finally:
            self._leave_all()
            self._around.watch(False)

    def check(self) -> list[Measurement]:
        """Load every entrant and hold it against the golden set; nothing is timed."""
        try:
            self._enter_all()
            return self.measurements()
        finally:
            self._leave_all()

    def measurements(self) -> list[Measurement]:
        """What has been measured so far."""
        return [self._measurement(contest) for contest in self._contests]

    # -- entering: load and check ---------------------------------------------------------------------------------

    def _enter_all(self) -> None:
        for contest in self._contests:
            self._around.progress({"stage": "try", "candidate": contest.entrant.id})
            self._enter(contest)

    def _leave_all(self) -> None:
        for contest in self._contests:
            self._leave(contest)

    def _enter(self, contest: _Contest) -> None:
        """First load of a candidate, its golden check and its memory; rejects with the reason."""
        plan = self._plan
        with self._rejecting(contest):
            child = self._start(contest)
            if contest.rejection is None:
                self._judge(contest, child.call("check", plan.check_timeout_s, metric=plan.metric))
            contest.peak_mb = answers.number(child.call("memory", plan.run_timeout_s), "peak_mb")
        if not contest.runs or self._held_mb() > plan.headroom_mb:
            self._leave(contest)

    def _judge(self, contest: _Contest, answer: Mapping[str, Any]) -> None:
        """Take the golden check's answer: a value that passes, or a rejection."""
        plan = self._plan
        if note := answers.text(answer, "note"):
            contest.notes.append(f"made-up inputs were refused: {note}"[:300])
        if plan.open_golden is None:
            return
        value = answers.optional_number(answer, "agreement")
        if contest.entrant.beside:
            contest.agreement = value
            return
        if value is None:
            reason = answers.text(answer, "disagrees") or "its answers are not finite numbers"
            contest.rejection = ("disagreement", f"disagrees with the golden set: {reason}"[:300])
            return
        contest.agreement = value
        if not plan.passes(contest.agreement):
            text = (
                f"disagrees with the golden set: {plan.metric} {contest.agreement:.4g}, {plan.threshold:g} is asked for"
            )
            contest.rejection = ("disagreement", text)

    def _start(self, contest: _Contest) -> ChildProcess:
        """A fresh child with the candidate loaded in it."""
        plan, entrant = self._plan, contest.entrant
        self._leave(contest)
        limits = ChildLimits(plan.memory_mb, start_s=plan.load_timeout_s)
        with contextlib.ExitStack() as files:
            model = files.enter_context(entrant.open_model())
            golden = files.enter_context(plan.open_golden()) if plan.open_golden else None
            contest.child = child = ChildProcess(
                {"model": model.fd, "golden": golden.fd if golden else None},
                limits,
                cpus=plan.cpus,
                devices=entrant.devices,
                module=plan.module,
                go_on=self._around.go_on,
            )
        child.greet()
        key = entrant.key
        child.call("prepare", plan.load_timeout_s, runtime=key.runtime)
        try:
            answer = child.call(
                "load",
                plan.load_timeout_s,
                runtime=key.runtime,
                provider=key.provider,
                threads=key.threads,
                parameters=dict(entrant.parameters),
                shapes=dict(plan.shapes),
            )
        except ChildError as error:
            if error.kind == "refused":
                contest.rejection = ("load", str(error))
            raise
        load_ms = answers.number(answer, "load_ms")
        contest.load_ms = load_ms if contest.load_ms is None else min(contest.load_ms, load_ms)
        if (taken := answers.text(answer, "provider")) != key.provider:
            contest.rejection = ("load", f"asked for {key.provider}, the runtime took {taken}")
        if not entrant.beside and (
            reason := plan.departs(answers.tensors(answer, "inputs"), answers.tensors(answer, "outputs"))
        ):
            contest.rejection = ("load", reason)
        return child

    def _leave(self, contest: _Contest) -> None:
        if contest.child is not None:
            contest.child.close()
            contest.child = None

    def _held_mb(self) -> float:
        return sum(contest.peak_mb or 0.0 for contest in self._contests if contest.child is not None)

    @contextlib.contextmanager
    def _rejecting(self, contest: _Contest) -> Iterator[None]:
        try:
            yield
        except ChildError as error:
            contest.rejection = contest.rejection or (_FAILURES[error.kind], str(error))
            self._leave(contest)

    # -- rounds: timing -------------------------------------------------------------------------------------------

    def _rounds(self, still_needed: StillNeeded) -> None:
        plan = self._plan
        done = 0
        while done < plan.most_rounds:
            alive = [contest for contest in self._contests if contest.runs]
            if done >= plan.least_rounds:
                needed = still_needed(self.measurements(), done, plan.most_rounds)
                resting = [contest for contest in alive if contest.entrant.id not in needed]
                alive = [contest for contest in alive if contest.entrant.id in needed]
                for contest in resting if alive else ():
                    self._leave(contest)
                    contest.rounds.append(None)
                    contest.disturbed.append(None)
            if not alive:
                return
            if done and done % (plan.least_rounds // 2) == 0:
                for contest in alive:
                    self._leave(contest)
            self._wait_while_throttled()
            self._around.progress({"stage": "measure", "round": done + 1, "rounds": max(plan.least_rounds, done + 1)})
            turn = done % len(alive)
            for contest in alive[turn:] + alive[:turn]:
                self._round(contest)
            done += 1

    def _round(self, contest: _Contest) -> None:
        plan = self._plan
        with self._rejecting(contest):
            child = contest.child or self._start(contest)
            if contest.rejection is None:
                before, began = self._around.energy_j(), time.perf_counter()
                answer = child.call(
                    "round", plan.run_timeout_s, seconds=plan.round_s, least=plan.least_runs, most=plan.most_runs
                )
                after = self._around.energy_j()
                times = answers.numbers(answer, "times", max(plan.least_runs, plan.most_runs))
                if note := answers.text(answer, "note"):
                    contest.notes.append(f"made-up inputs were refused: {note}"[:300])
                spans = self._around.spans(began, time.perf_counter())
                clear = apart(times, answers.numbers(answer, "began", len(times)), spans)
                # A round that met throttling tells of the heat, not of the candidate.
                spoiled = self._around.throttled() is True
                contest.rounds.append(clear if clear and not spoiled else None)
                contest.disturbed.append(times if times and not spoiled else None)
                if before is not None and after is not None and times and not spans and after > before:
                    contest.joules.append((after - before) / len(times))
            if self._held_mb() > plan.headroom_mb:
                self._leave(contest)

    def _wait_while_throttled(self) -> None:
        for _ in range(60):
            if self._around.throttled() is not True:
                return
            self._around.go_on()
            self._around.wait(1.0)

    # -- results --------------------------------------------------------------------------------------------------

    def _measurement(self, contest: _Contest) -> Measurement:
        common: dict[str, Any] = {
            "load_ms": contest.load_ms,
            "peak_mb": contest.peak_mb,
            "agreement": contest.agreement,
            "agreement_metric": self._plan.metric if contest.agreement is not None else None,
            "measured_at": iso(self._around.clock.now()),
            "notes": tuple(dict.fromkeys(contest.notes)),
        }
        entrant = contest.entrant
        if contest.rejection is not None:
            failure, reason = contest.rejection
            return Measurement.rejected(entrant.id, entrant.key, failure, reason, **common)
        if contest.joules:
            ordered = sorted(contest.joules)
            common |= {"joules": ordered[len(ordered) // 2], "energy_source": "measured"}
        rounds = contest.rounds
        if sum(map(bool, rounds)) < _LEAST_CLEAR < sum(map(bool, contest.disturbed)):
            rounds = contest.disturbed
            common["notes"] = (*common["notes"], "measured while requests ran")
        if any(rounds):
            return Measurement.from_samples(entrant.id, entrant.key, self._session, rounds, **common)
        return Measurement(entrant.id, entrant.key, session=self._session, **common)


def apart(times: Sequence[float], began: Sequence[float], spans: Sequence[tuple[float, float]]) -> list[float]:
    """The times (ms) of those runs that no span touches. ``began`` and spans in seconds of the same clock."""
    return [
        took
        for took, at in zip(times, began, strict=False)
        if not any(start < at + took / 1e3 and end > at for start, end in spans)
    ]
