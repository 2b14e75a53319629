"""What a job is made of: steps that can be done, asked about and taken back, and what a step sees of its job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agent.base.errors import TryLaterError
from agent.work.jobs import Failure, Order, Phase, State

_T = TypeVar("_T")


def _at_once(work: Callable[[], None]) -> None:
    work()


class Turn:
    """One step's view of its job, for the thread that runs the step.

    ``notes`` are the job's own memory (JSON): written with every step, and by ``save`` within one.
    """

    __slots__ = ("_go_on", "_in_turn", "_save", "_tell", "attempt", "boot_nonce", "job", "notes")

    def __init__(
        self,
        job: Order,
        notes: dict[str, Any],
        attempt: int,
        boot_nonce: str,
        *,
        tell: Callable[[Mapping[str, Any]], None],
        go_on: Callable[[], None],
        save: Callable[[], None],
        in_turn: Callable[[Callable[[], None]], None] = _at_once,
    ) -> None:
        self.job = job
        self.notes = notes
        #: Starts of the job: above 1 after a kill, a power cut or a reboot.
        self.attempt = attempt
        self.boot_nonce = boot_nonce
        self._tell, self._go_on, self._save, self._in_turn = tell, go_on, save, in_turn

    def tell(self, event: Mapping[str, Any]) -> None:
        """Progress, and a safe point like ``go_on``. An event with a ``phase`` changes the job's, durably."""
        self._tell(event)

    def go_on(self) -> None:
        """A safe point: raises when the job is cancelled, a deadline has passed, or the agent is stopping."""
        self._go_on()

    def save(self) -> None:
        """Make the notes durable now: before an effect that only they can tell of later."""
        self._save()

    def in_turn(self, work: Callable[[], _T]) -> _T:
        """For a step apart: what ``work`` returns or raises, done when nobody else changes the catalog.

        The time of the step begins anew with it.
        """
        found: list[_T] = []
        self._in_turn(lambda: found.append(work()))
        return found[0]


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Names are unique within a job and stay the same over versions of the agent: the journal keeps them.

    ``do`` performs it; what it returns becomes part of the job's result. ``holds`` tells whether its effect is there:
    it is asked after a kill, and without it ``do`` is simply done again. ``undo`` takes it back, also where ``do`` got
    nowhere, and also twice. ``apart``: ``do`` waits for the world, for hours maybe, and takes a turn among what else
    changes the catalog only where it says so (``Turn.in_turn``); the others have it for all that they do.
    """

    name: str
    phase: Phase
    do: Callable[[Turn], Mapping[str, Any] | None]
    holds: Callable[[Turn], bool] | None = None
    undo: Callable[[Turn], None] | None = None
    apart: bool = False


#: From a job's arguments to its steps. PeerError for bad arguments: the job is rejected, ``bad_args``.
Handler = Callable[[Mapping[str, Any]], Sequence[Step]]


class RestartPending(Exception):  # noqa: N818 - no error: the way a step says that it goes on after a restart
    """Raised by a step: process or machine restart now, and ``holds`` is asked after the start.

    ``then`` begins the restart: it is called when it is durable that the job waits for one.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        super().__init__("a restart is pending")
        self.then = then


class Pause(Exception):  # noqa: N818 - no error, as above
    """Raised by a step that waits for the world: it is done again after ``seconds``, and its thread is free till then.

    The job keeps its lane, notes are kept, and the time of the step begins anew.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__("the step waits")
        self.seconds = seconds


class HaltedError(TryLaterError):
    """Raised at a safe point: the job is cancelled or too late. It ends as ``state`` once it is taken back."""

    def __init__(self, state: State, failure: Failure) -> None:
        super().__init__(failure.text, hint=failure.hint)
        self.state: State = state
        self.failure = failure


class StoppingError(TryLaterError):
    """Raised at a safe point: the agent is stopping. The job goes on after the next start."""

    def __init__(self) -> None:
        super().__init__("cannot go on: the agent is stopping", hint="it goes on when the agent runs again")
