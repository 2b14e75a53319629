"""The shell around micro-batching: joins requests for one session as ``batching`` decides, and parts the answers.

A member of a batch brings its lease of the session, which ends with the batch that it was in, so that nothing closes a
session that runs. When a batch fails, its members are sent back to be answered alone: only the guilty one gets the
error. So are they when it takes far longer than it should, for how long a run takes may follow from one member's
values. A model whose outputs do not have the batch's rows is never joined again.

Everything is for the event loop's thread but ``together``; fast models run there as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from agent.base.errors import DeadlineError, TryLaterError
from agent.infer.answering import Resident, wanted
from agent.infer.batching import Expire, Member, Pace, Queue, Run, level_of
from agent.infer.gains import Batching, described, not_free
from agent.infer.halting import Halt, LoopGuard
from agent.infer.runners import Job
from agent.infer.runtimes.failures import ProviderLostError
from agent.infer.tensors import InferRequest, InferResponse
from agent.infer.together import Joining, Kind, NotJoinableError, alone, size_of, together

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Parameters that are the request's own and not the run's.
_OWN = frozenset({"priority", "timeout", "keep_alive", "pin"})
#: A batch that takes so much longer than expected is ended, and its members run alone.
_OVERLONG, _OVERLONG_S = 10.0, 0.1
_LOG = logging.getLogger("edge_agent.engine")


@dataclass(frozen=True, slots=True)
class Means:
    """What joining needs of the engine.

    ``submit`` runs work in a thread when its model's turn comes, ``guarded`` is work of one run with its memory looked
    at, ``ended`` is told of each run (the request where it had but one; rows, 0 of one that failed; microseconds),
    ``unfit`` why a model cannot be joined, ``too_long`` that a run held the event loop up. Nothing new begins once
    ``closing`` says so.
    """

    submit: Callable[[str, Callable[[], Any], int], Job]
    withdraw: Callable[[Job], None]
    guarded: Callable[[Resident, Callable[[], Any]], Any]
    ended: Callable[[Resident, InferRequest | None, int, int], None]
    unfit: Callable[[Resident, str], None]
    guard: LoopGuard
    too_long: Callable[[Resident], None]
    closing: Callable[[], bool]
    halts: set[Halt]
    places: int


@dataclass(slots=True, eq=False)
class _UnderWay:
    run: Run
    members: list[Joining]
    halt: Halt
    job: Job | None = None
    began: float = 0.0
    overlong: bool = False
    here: bool = False
    timer: asyncio.TimerHandle | None = None


class Joint:
    """The requests for one resident."""

    def __init__(self, resident: Resident, batching: Batching, means: Means) -> None:
        self._resident = resident
        self._means = means
        self._lanes = max(1, means.places // resident.option.threads) if resident.turn is None else 1
        self._queue = Queue(self._pace(batching))
        self.batching = batching
        self._members: dict[int, Joining] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self._tickets = 0
        self._due = False
        self._this_turn = 0
        self._timer: asyncio.TimerHandle | None = None
        self._optional = frozenset(spec.name for spec in resident.served.inputs if spec.optional)
        self.runs = self.requests = 0

    def _pace(self, batching: Batching) -> Pace:
        return Pace(batching.size, batching.delay_s, self._lanes, batching.most_bytes, batching.gain.times)

    def adjust(self, batching: Batching) -> None:
        """Join otherwise from now on."""
        if batching != self.batching:
            self.batching = batching
            self._queue.repace(self._pace(batching))

    @property
    def on(self) -> bool:
        """Whether requests are joined."""
        return self.batching.size > 1

    def describe(self) -> dict[str, Any]:
        """For ``status``."""
        return {**described(self.batching), "runs": self.runs, "requests": self.requests}

    # -- one request --------------------------------------------------------------------------------------------------

    def quiet(self) -> bool:
        """Whether a request may run at once on the event loop, which counts as having come: nobody else is about."""
        if not self._this_turn:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._this_turn += 1
        if self._this_turn > 1:
            self._queue.crowded(self._this_turn)
        if not self._queue.quiet:
            return False
        self._queue.passed_alone(time.monotonic())
        return True

    def _end_turn(self) -> None:
        self._this_turn = 0

    def _kind_of(self, request: InferRequest, arrays: dict[str, NDArray[Any]]) -> Kind | None:
        """None for a request that cannot be joined. PeerError."""
        names = wanted(self._resident, request)
        shapes = [tensor.array.shape for tensor in request.inputs]
        if any(not shape or shape[0] != shapes[0][0] for shape in shapes) or not shapes[0][0]:
            return None
        if not self._optional.isdisjoint(arrays):
            return None
        parameters = frozenset(
            [(name, type(value), value) for name, value in request.parameters.items() if name not in _OWN]
        )
        inputs = tuple([(tensor.name, tensor.array.shape[1:]) for tensor in request.inputs])
        return Kind(inputs, names, parameters)

    async def answer(
        self,
        request: InferRequest,
        arrays: dict[str, NDArray[Any]],
        times: tuple[float, float],
        release: Callable[[], None],
    ) -> InferResponse | None:
        """The answer out of a batch; None when it must be answered alone, and then its lease was not released.

        ``times``: of its arrival (``perf_counter``) and its deadline (``monotonic``).
        """
        try:
            kind = self._kind_of(request, arrays)
        except BaseException:
            release()
            raise
        if kind is None:
            return None
        loop = asyncio.get_running_loop()
        rows = request.inputs[0].array.shape[0]
        joining = Joining(request, arrays, kind.outputs, rows, *times, release, loop.create_future())
        self._tickets += 1
        ticket = self._tickets
        self._members[ticket] = joining
        level = level_of(request.parameters.get("priority")) if request.parameters else level_of(0)
        size = sum(size_of(array) for array in arrays.values())
        self._queue.add(Member(ticket, kind, rows, size, joining.deadline, level), time.monotonic())
        if self._queue.crowd <= 1:
            self._act()
        elif not self._due:  # others may come in this very turn of the loop
            self._due = True
            loop.call_soon(self._act)
        try:
            return await joining.future
        except asyncio.CancelledError:
            if _sent_back(joining.future):  # the caller was to answer it alone, and has gone
                release()
            else:
                self._leave(ticket)
            raise

    def _leave(self, ticket: int) -> None:
        """Nobody waits for it any more."""
        joining = self._members.pop(ticket, None)
        if joining is None:
            return
        if self._queue.withdraw(ticket):
            joining.release()
            self._act()
        else:
            for under_way in list(self._under_way.values()):
                if joining in under_way.members:
                    self._look(under_way)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        self._due = False
        now = time.monotonic()
        if self._means.closing():
            self._refuse_all()
        for action in self._queue.decide(now):
            if isinstance(action, Expire):
                joining = self._members.pop(action.ticket)
                joining.release()
                _fail(joining, _too_late())
            else:
                self._begin(action)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue.wake_at != float("inf"):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, self._queue.wake_at - now), self._act)

    def _refuse_all(self) -> None:
        for ticket, joining in list(self._members.items()):
            if self._queue.withdraw(ticket):
                del self._members[ticket]
                joining.release()
                _fail(joining, TryLaterError("cannot run model: the agent is stopping"))

    def _begin(self, run_now: Run) -> None:
        members = [self._members[ticket] for ticket in run_now.tickets]
        if all(self._resident.fits_the_loop(joining.request) for joining in members):
            self._run_here(run_now, members)
            return
        under_way = self._under_way[run_now.run] = _UnderWay(run_now, members, Halt())
        self._means.halts.add(under_way.halt)
        turn = self._resident.turn
        if turn is None:
            self._submit(under_way)
        else:
            asyncio.get_running_loop().create_task(self._submit_in_turn(under_way, turn))

    def _run_here(self, run_now: Run, members: list[Joining]) -> None:
        """On the event loop: together they take less of it than one by one, and no thread has to be woken."""
        under_way = _UnderWay(run_now, members, self._means.guard.begin(), here=True)
        self._under_way[run_now.run] = under_way
        done: asyncio.Future[list[tuple[Joining, InferResponse]]] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(self._run(under_way))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the members
            done.set_exception(error)
            if isinstance(error, DeadlineError):
                under_way.overlong = True
                self._means.too_long(self._resident)
        finally:
            self._means.guard.end()
        self._ended(under_way, done)

    async def _submit_in_turn(self, under_way: _UnderWay, turn: asyncio.Lock) -> None:
        await turn.acquire()
        self._submit(under_way)

    def _submit(self, under_way: _UnderWay) -> None:
        work = partial(self._means.guarded, self._resident, partial(self._run, under_way))
        under_way.job = self._means.submit(self._resident.name.model, work, self._resident.option.threads)
        under_way.job.future.add_done_callback(partial(self._ended, under_way))
        self._look(under_way)

    def _look(self, under_way: _UnderWay) -> None:
        """Let go of members whose time is over; end a run that nobody waits for, or that takes far too long."""
        now = time.monotonic()
        next_at = float("inf")
        left = 0
        for joining in under_way.members:
            if joining.deadline <= now:
                _fail(joining, _too_late())
            if not joining.future.done():
                left += 1
                next_at = min(next_at, joining.deadline)
        if not left:
            under_way.halt.request()
            if under_way.job is not None:
                self._means.withdraw(under_way.job)
        elif len(under_way.members) > 1 and not under_way.overlong:
            limit_s = _OVERLONG * under_way.run.expected_s + _OVERLONG_S
            if under_way.began and now - under_way.began > limit_s:
                under_way.overlong = True
                under_way.halt.request()
            else:
                next_at = min(next_at, (under_way.began or now) + limit_s + 0.001)
        if under_way.timer is not None:
            under_way.timer.cancel()
            under_way.timer = None
        if left and next_at != float("inf"):
            loop = asyncio.get_running_loop()
            under_way.timer = loop.call_later(max(0.0, next_at - now), self._look, under_way)

    def _run(self, under_way: _UnderWay) -> list[tuple[Joining, InferResponse]]:
        """In a thread: one run for all that still wait."""
        under_way.began = time.monotonic()
        members = [joining for joining in under_way.members if not joining.future.done()]
        if not members:
            return []
        if len(members) == 1:
            return [(members[0], alone(self._resident, members[0], under_way.halt))]
        return together(self._resident, members, under_way.halt)

    def _ended(self, under_way: _UnderWay, done: asyncio.Future[list[tuple[Joining, InferResponse]]]) -> None:
        self._means.halts.discard(under_way.halt)
        if under_way.timer is not None:
            under_way.timer.cancel()
        now = time.monotonic()
        error = DeadlineError("the run was withdrawn") if done.cancelled() else done.exception()
        if error is None:
            self._succeeded(under_way, done.result(), now)
        else:
            self._failed(under_way, error, now)
        if self._resident.turn is not None and not under_way.here:
            self._resident.turn.release()
        for ticket, joining in zip(under_way.run.tickets, under_way.members, strict=True):
            self._members.pop(ticket, None)
            if not _sent_back(joining.future):
                joining.release()
        del self._under_way[under_way.run.run]
        self._act()

    def _succeeded(self, under_way: _UnderWay, answers: list[tuple[Joining, InferResponse]], now: float) -> None:
        self._queue.finished(under_way.run.run, now - (under_way.began or now), now)
        if not answers:
            return
        self.runs += 1
        self.requests += len(answers)
        compute_us = answers[0][1].parameters["compute_us"]
        rows = answers[0][1].parameters["batch"]
        self._means.ended(self._resident, answers[0][0].request if len(answers) == 1 else None, rows, compute_us)
        for joining, response in answers:
            if not joining.future.done():
                joining.future.set_result(response)

    def _failed(self, under_way: _UnderWay, error: BaseException, now: float) -> None:
        """A member that was alone gets the error; several are answered one by one."""
        lost = isinstance(error, ProviderLostError)  # no member is to blame, and another provider answers them all
        shortage = isinstance(error, TryLaterError) and not lost
        self._means.ended(self._resident, None, 0, 0)
        self._queue.failed(under_way.run.run, now, shortage=shortage)
        if isinstance(error, NotJoinableError):
            self.batching = replace(self.batching, size=1, reason=str(error))
            self._queue.repace(self._pace(self.batching))
            self._means.unfit(self._resident, str(error))
        ended = isinstance(error, DeadlineError) and not under_way.overlong
        several = len(under_way.members) > 1 or under_way.overlong
        singly = several and not ended and not lost and not self._means.closing()
        for joining in under_way.members:
            if joining.future.done():
                continue
            if singly:
                joining.future.set_result(None)
            else:
                joining.future.set_exception(_too_late() if ended else error)


def joint_of(resident: Resident, unfit: str, means: Means) -> Joint | None:
    """How requests for a resident are joined, as its shelf wants it now; None where that was not asked for."""
    candidates = {option.candidate: option for option in resident.served.options}
    batching = candidates.get(resident.option.candidate, resident.option).batching
    if batching is None:
        return None
    session = resident.session
    reason = unfit or not_free(resident.served.inputs, resident.served.outputs) or not_free(
        session.inputs, session.outputs
    )  # fmt: skip
    if reason:
        batching = replace(batching, size=1, reason=reason)
    if resident.joint is not None:
        resident.joint.adjust(batching)
        return resident.joint
    return Joint(resident, batching, means)


def _fail(joining: Joining, error: BaseException) -> None:
    if not joining.future.done():
        joining.future.set_exception(error)


def _sent_back(future: asyncio.Future[InferResponse | None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None and future.result() is None


def _too_late() -> DeadlineError:
    return DeadlineError("the request's time ran out before the model answered")
