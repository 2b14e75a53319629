"""One start of one job: forward through its steps, or back over what was begun.

Invariants: that a step begins is durable before it is done; after a kill its effect is asked for before it is done
again; once a job goes back it never goes forward again, and each step is taken back before the one before it; the end
is written once. A journal that cannot be written to counts as a kill: the job is left as it is, and started again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from agent.base.clock import Clock
from agent.base.errors import AgentError, PeerError, RefusedError, TryLaterError, one_line
from agent.work.jobs import PHASES, Ending, Failure, Lane, Order, Progress, State, move
from agent.work.journal import Journal
from agent.work.records import Record
from agent.work.steps import HaltedError, Handler, Pause, RestartPending, Step, StoppingError, Turn

#: Starts of a step, or of taking one back, after which it is given up.
MAX_STALLED = 5
#: How often the time that a long step takes is written down.
_KEEP_TIME_S = 30.0
_LOG = logging.getLogger("edge_agent.work")
_T = TypeVar("_T")


class Lanes(Protocol):
    """The threads in which jobs run, one for each lane."""

    def execute(self, lane: Lane, name: str, work: Callable[[], None]) -> None:
        """Have ``work`` called once in the lane's thread, and return before. TryLaterError when not."""
        ...

    def in_turn(self, order: Order, work: Callable[[], _T], look: Callable[[], None]) -> _T:
        """From the lane's thread: what ``work`` returns or raises, done when nobody else changes what it changes.

        Until its turn comes ``look`` is called now and then. What it raises is raised, and ``work`` not begun; it must
        change nothing itself, as ``work`` may begin just then. TryLaterError when all is being stopped.
        """
        ...


class UnwritableError(Exception):
    """The journal could not be written; why is its cause. No step may go on."""


class _MovedError(Exception):
    """The job has ended by another hand: it was cancelled before it was begun."""


class _ParkedError(Exception):
    """The job waits, for a restart or for a while."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all attempts share."""

    journal: Journal
    clock: Clock
    boot_nonce: str
    verify: Callable[[Order], None]
    changed: Callable[[], None]
    is_stopping: Callable[[], bool]
    lanes: Lanes


class Attempt:
    """Runs the job of ``record`` from where it is. ``late``: the restart that it waits for did not come in time.
    ``again``: no start of the job, a step that paused goes on."""

    def __init__(
        self, bench: Bench, record: Record, handler: Handler | None, *, late: bool = False, again: bool = False
    ) -> None:
        self._bench = bench
        self._key = record.key
        self._order = record.order
        self._record = record
        self._handler = handler
        self._late = late
        self._again = again
        self._now = record.progress
        self._pending: dict[str, Any] = {}
        self._notes = dict(record.progress.notes)
        self._started = bench.clock.monotonic()
        self._kept_at = self._started
        self._raised: TryLaterError | None = None
        self._going_back = False
        self.event: Mapping[str, Any] = {}
        #: After ``run``: seconds after which a step that paused is to go on.
        self.pause_s: float | None = None
        self.deadline = self._started + self._order.step_timeout_s

    @property
    def progress(self) -> Progress:
        """As last written."""
        return self._now

    def run(self) -> bool:
        """To the end, or to where it must be left; whether the job waits. Raises UnwritableError."""
        try:
            self._run()
        except StoppingError:
            self.leave()
        except _MovedError:
            pass
        except _ParkedError:
            return True
        return False

    def _run(self) -> None:
        try:
            plan = self._plan()
        except HaltedError as halt:
            self._end(halt.state, halt.failure)
            return
        if self._now.attempt and not self._late and not self._again:
            self._save(attempt=self._now.attempt + 1, stalled=self._now.stalled + 1)
        if self._now.ending is None:
            try:
                self._go_forward(plan)
            except HaltedError as halt:
                self._turn_round(halt)
            else:
                self._end("succeeded", None)
                return
        self._go_back({step.name: step for step in plan})

    # -- forward ------------------------------------------------------------------------------------------------------

    def _plan(self) -> Sequence[Step]:
        """The steps. HaltedError when it is not known, or not certain, what the job asks for."""
        if not self._record.intact:
            raise self._unfit("failed", "failed", "cannot run job: the journal's copy of it is damaged")
        try:
            self._bench.verify(self._order)
        except (RefusedError, PeerError) as error:
            raise self._unfit("rejected", getattr(error, "code", "bad_signature"), str(error), error.hint) from error
        except AgentError as error:
            raise UnwritableError from error
        if self._handler is None:
            raise self._unfit("rejected", "unknown_op", f"cannot run job: there is no operation {self._order.op}")
        try:
            return tuple(self._handler(self._order.args))
        except PeerError as error:
            raise self._unfit("rejected", "bad_args", str(error), error.hint) from error
        except AgentError as error:
            if isinstance(error, TryLaterError) and self._bench.is_stopping():
                raise StoppingError from error
            raise self._unfit("failed", "failed", str(error), error.hint) from error
        except Exception as error:
            _LOG.exception("job %s: its steps could not be made", self._order.job_id)
            raise self._unfit("failed", "failed", f"cannot run job: {type(error).__name__}: {error}") from error

    def _unfit(self, state: State, code: str, text: str, hint: str = "") -> HaltedError:
        if self._now.begun:
            state, text = "failed", f"{text}; not taken back: {', '.join(reversed(self._now.begun))}"
        elif self._now.attempt:
            state = "failed"
        return HaltedError(state, Failure(code, one_line(text), hint))

    def _go_forward(self, plan: Sequence[Step]) -> None:
        if self._late:
            text = f"cannot do {self._now.step}: the restart did not come in {self._order.step_timeout_s:g} s"
            raise HaltedError("failed", Failure("step_timeout", text))
        self._settle(plan)
        for step in plan[self._done :]:
            self._check()
            self._save(
                state="running", phase=step.phase, step=step.name, begun=(*self._now.begun, step.name), stalled=1,
                attempt=max(1, self._now.attempt),
            )  # fmt: skip
            self._perform(step)
        self._check_deadlines()

    def _settle(self, plan: Sequence[Step]) -> None:
        """After a kill: find out whether the step that it fell into has happened, and do it if not."""
        begun = self._now.begun
        if [step.name for step in plan[: len(begun)]] != list(begun):
            text = "cannot go on: this version of the agent does it in other steps"
            raise HaltedError("failed", Failure("interrupted", text))
        if len(begun) == self._done:
            return
        step = plan[self._done]
        self._check()
        if self._now.stalled > MAX_STALLED:
            text = f"cannot do {step.name}: interrupted {MAX_STALLED} times"
            raise HaltedError("failed", Failure("interrupted", text))
        if self._holds(step):
            self._pending = {"done": self._done + 1}
        else:
            self._perform(step)

    def _holds(self, step: Step) -> bool:
        if step.holds is None:
            return False
        try:
            return self._in_turn(step.holds)
        except UnwritableError:
            raise
        except Exception as error:
            halt = self._halt(step.name, error)
            if halt.failure.code == "failed":
                text = f"cannot tell whether {step.name} has happened: {halt.failure.text}"
                halt = HaltedError("failed", Failure("interrupted", one_line(text), halt.failure.hint))
            raise halt from error

    def _perform(self, step: Step) -> None:
        try:
            outcome = self._at_once(step.do) if step.apart else self._in_turn(step.do)
            result = {**(self._now.result or {}), **outcome} if outcome is not None else self._now.result
            json.dumps([result, self._notes], allow_nan=False)
        except RestartPending as pending:
            self._await_restart(step, pending)
        except Pause as pause:
            self._save(durable=False)
            self.pause_s = pause.seconds
            raise _ParkedError from None
        except UnwritableError:
            raise
        except Exception as error:
            raise self._halt(step.name, error) from error
        self._check_deadlines()
        self._pending = {"done": self._done + 1, "result": result}

    def _await_restart(self, step: Step, pending: RestartPending) -> None:
        self._save(phase="rebooting")
        if pending.then is not None:
            try:
                pending.then()
            except Exception as error:
                raise self._halt(step.name, error) from error
        raise _ParkedError

    # -- back ---------------------------------------------------------------------------------------------------------

    def _turn_round(self, halt: HaltedError) -> None:
        """From here on what was begun is taken back, also after a kill."""
        if self._now.begun:
            self._save(ending=Ending(halt.state, halt.failure), error=halt.failure, stalled=1)
        else:
            self._now = move(self._now, ending=Ending(halt.state, halt.failure))

    def _go_back(self, steps: Mapping[str, Step]) -> None:
        self._going_back = True
        ending = self._now.ending
        assert ending is not None
        begun = self._now.begun
        while begun:
            name = begun[-1]
            step = steps.get(name)
            begun = begun[:-1]
            if step is None:
                ending = _with_trouble(ending, f"{name}: this version of the agent has no such step")
            elif step.undo is not None:
                ending = self._take_back(step, ending)
                if begun:
                    self._save(begun=begun, done=min(self._done, len(begun)), ending=ending, stalled=1)
        self._end(ending.state, ending.outcome())

    def _take_back(self, step: Step, ending: Ending) -> Ending:
        assert step.undo is not None
        if self._now.stalled > MAX_STALLED:
            return _with_trouble(ending, f"{step.name}: interrupted {MAX_STALLED} times")
        try:
            self._in_turn(step.undo)
        except UnwritableError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, what was begun before is taken back all the same
            return _with_trouble(ending, f"{step.name}: {self._halt(step.name, error).failure.text}")
        return Ending(ending.state, ending.failure, ending.undone + 1, ending.troubles)

    # -- what a step sees ---------------------------------------------------------------------------------------------

    def _turn(self) -> Turn:
        return Turn(
            self._order,
            self._notes,
            self._now.attempt,
            self._bench.boot_nonce,
            tell=self._tell,
            go_on=self._go_on,
            save=self._save,
            in_turn=lambda work: self._in_turn(lambda turn: work()),
        )

    def _tell(self, event: Mapping[str, Any]) -> None:
        self._go_on()
        self.event = event
        phase = event.get("phase")
        if phase in PHASES and phase != self._now.phase and not self._going_back:
            self._save(phase=phase)

    def _go_on(self) -> None:
        try:
            self._check()
        except TryLaterError as error:
            self._raised = error
            raise
        if self._bench.clock.monotonic() - self._kept_at >= _KEEP_TIME_S:
            self._save(durable=False)

    def _check(self) -> None:
        self._check_wanted()
        self._check_deadlines()

    def _check_wanted(self) -> None:
        if self._bench.is_stopping():
            raise StoppingError
        if not self._going_back and self._bench.journal.is_cancelled(self._key):
            raise HaltedError("cancelled", Failure("cancelled", "cancelled by the fleet"))

    def _check_deadlines(self) -> None:
        order = self._order
        if self._bench.clock.monotonic() > self.deadline:
            text = f"cannot do {self._now.step}: it takes longer than {order.step_timeout_s:g} s"
            raise HaltedError("failed", Failure("step_timeout", text))
        if not self._going_back and self._elapsed() > order.total_timeout_s:
            text = f"cannot finish: the job takes longer than {order.total_timeout_s:g} s"
            raise HaltedError("failed", Failure("total_timeout", text))

    def _in_turn(self, part: Callable[[Turn], _T]) -> _T:
        """A part of a step, when its turn has come; its time begins then, and waiting counts nowhere."""
        asked_at = self._bench.clock.monotonic()
        self._raised, self.deadline = None, math.inf

        def begin() -> _T:
            self._started += self._bench.clock.monotonic() - asked_at
            return self._at_once(part)

        return self._bench.lanes.in_turn(self._order, begin, self._check_wanted)

    def _at_once(self, part: Callable[[Turn], _T]) -> _T:
        self._raised = None
        self.deadline = self._bench.clock.monotonic() + self._order.step_timeout_s
        return part(self._turn())

    def _halt(self, name: str, error: Exception) -> HaltedError:
        """What an exception of a step means for the job. Raises StoppingError where it means nothing but a stop.

        What a safe point raised counts, also where the step made something else of it.
        """
        self._keep_sound_notes()
        cause = self._raised or error
        if isinstance(cause, TryLaterError) and not isinstance(cause, HaltedError) and self._bench.is_stopping():
            raise StoppingError from error
        if isinstance(cause, HaltedError):
            return cause
        if isinstance(error, AgentError):
            return HaltedError("failed", Failure("failed", str(error), error.hint))
        _LOG.error("job %s: step %s failed", self._order.job_id, name, exc_info=error)
        return HaltedError("failed", Failure("failed", one_line(f"cannot do {name}: {type(error).__name__}: {error}")))

    def _keep_sound_notes(self) -> None:
        """A step that failed may have left anything in the notes; those that were written last can be written."""
        try:
            json.dumps(self._notes, allow_nan=False)
        except (TypeError, ValueError):
            self._notes.clear()
            self._notes.update(self._now.notes)

    # -- the journal --------------------------------------------------------------------------------------------------

    @property
    def _done(self) -> int:
        done: int = self._pending.get("done", self._now.done)
        return done

    def _elapsed(self) -> float:
        return self._record.progress.elapsed_s + self._bench.clock.monotonic() - self._started

    def _save(self, *, durable: bool = True, **changes: Any) -> None:
        before = self._now
        after = move(before, **self._pending | changes, notes=dict(self._notes), elapsed_s=self._elapsed())
        try:
            written = self._bench.journal.save(self._key, before, after, durable=durable)
        except AgentError as error:
            raise UnwritableError from error
        if not written:
            raise _MovedError
        self._kept_at = self._bench.clock.monotonic()
        self._now, self._pending = after, {}
        if after.rev != before.rev:
            self._bench.changed()

    def _end(self, state: State, failure: Failure | None) -> None:
        if state == "succeeded":
            self._save(state=state, step=None, error=None)
        else:
            self._save(state=state, error=failure)

    def leave(self) -> None:
        """An orderly stop is no sign of a step that cannot be done."""
        if self._now.attempt:
            self._save(durable=False, stalled=max(0, self._now.stalled - 1))


def _with_trouble(ending: Ending, trouble: str) -> Ending:
    return Ending(ending.state, ending.failure, ending.undone, (*ending.troubles, one_line(trouble)[:500]))
