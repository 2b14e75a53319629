"""One run of a session: at once on the event loop, in a thread in its turn, or joined with others.

A run ends, or is asked to, when its request's time is over or its caller has gone. A session that comes to hold far
more than was measured is dropped, so that no input makes the daemon keep memory that the budget does not know. For the
event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from agent.base.errors import DeadlineError, TryLaterError
from agent.base.memory import resident_mb
from agent.infer.answering import Resident, respond
from agent.infer.halting import Halt, LoopGuard
from agent.infer.loading import EngineLimits, before
from agent.infer.runners import Job, Runners
from agent.infer.standing import Standing
from agent.infer.tensors import InferRequest, InferResponse
from agent.infer.wishes import Wishes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agent.infer.joining import Joint, Means

#: A run on the loop that was longer may have taken any memory, which nobody looked at: its session is dropped.
_LONG_US = 20_000
#: Growth of the process within one run that drops the session: this much, and this often what was measured.
_OUTGROWN_MB, _OUTGROWN = 64.0, 2.0
_LOG = logging.getLogger("edge_agent.engine")
_T = TypeVar("_T")


class Running:
    """Runs of the sessions of ``standing``. ``fence`` as in ``Engine``."""

    def __init__(self, standing: Standing, limits: Callable[[], EngineLimits], fence: Callable[[], None]) -> None:
        self._standing = standing
        self._loader = standing.loader
        self._limits = limits
        self._fence = fence
        self._runners = Runners(limits().places)
        self._guard = LoopGuard()
        self._unfit: dict[str, str] = {}  # why requests are not joined, by the digest of the option
        self._closing = False
        #: Of the runs under way.
        self.halts: set[Halt] = set()

    @property
    def idle(self) -> bool:
        """Whether nobody runs."""
        return self._runners.idle

    async def close(self, timeout_s: float) -> bool:
        """Have runs end, and wait for them; whether all have."""
        self._closing = True
        for halt in self.halts:
            halt.request()
        return await self._runners.close(timeout_s)

    def on_loop(self, resident: Resident, request: InferRequest) -> InferResponse:
        """One run on this thread. DeadlineError when it held the loop up; its session is dropped then."""
        try:
            response = respond(resident, request, 0.0, self._guard.begin())
        except TryLaterError:
            self._standing.retire(resident)
            raise
        finally:
            self._guard.end()
        if response.parameters["compute_us"] > _LONG_US:
            self._standing.retire(resident)
        return response

    async def run(
        self,
        resident: Resident,
        request: InferRequest,
        arrays: dict[str, NDArray[Any]],
        times: tuple[float, float],
        wishes: Wishes,
    ) -> InferResponse | None:
        """One run of a session that was leased: joined with others, else alone. None when what it was joined with made
        the session go. ``times``: of its arrival (``perf_counter``) and its deadline (``monotonic``)."""
        arrived, deadline = times
        if (joint := self.joint_of(resident)) is not None and wishes.pin is None:
            release = partial(self._loader.release, resident.name, wishes.keep_s)
            if (joined := await joint.answer(request, arrays, times, release)) is not None:
                return joined
            if resident.retired:
                release()
                return None
        halt = Halt()
        job = await self._start(resident, request, arrived, deadline, halt, wishes)
        try:
            return await before(deadline, asyncio.shield(job.future))
        except (DeadlineError, asyncio.CancelledError):
            halt.request()
            self._runners.withdraw(job)
            raise

    async def _start(
        self, resident: Resident, request: InferRequest, arrived: float, deadline: float, halt: Halt, wishes: Wishes
    ) -> Job:
        """The run, waiting for a thread or in one; it holds the session, and its turn, until it has really ended."""
        try:
            if wishes.pin is not None:
                self._standing.pin(resident, pinned=wishes.pin)
            if resident.turn is not None:
                await before(deadline, resident.turn.acquire())
        except BaseException:
            self._loader.release(resident.name, wishes.keep_s)
            raise
        work = partial(self._guarded, resident, partial(respond, resident, request, arrived, halt))
        job = self._runners.submit(resident.name.model, work, resident.option.threads)
        self.halts.add(halt)
        job.future.add_done_callback(partial(self._release, resident, request, halt, wishes))
        return job

    def _guarded(self, resident: Resident, work: Callable[[], _T]) -> _T:
        """In a thread: one run that may take long, and much memory."""
        self._fence()
        start_mb = resident_mb()
        try:
            return work()
        except DeadlineError:
            raise
        except TryLaterError:
            resident.outgrown = True  # an arena that failed to grow reserves as much again at its next step
            raise
        finally:
            if resident_mb() - start_mb > _OUTGROWN_MB + _OUTGROWN * resident.option.need_mb:
                resident.outgrown = True

    def _release(
        self,
        resident: Resident,
        request: InferRequest,
        halt: Halt,
        wishes: Wishes,
        done: asyncio.Future[InferResponse],
    ) -> None:
        self.halts.discard(halt)
        if not done.cancelled() and done.exception() is None:  # seen: nobody may be waiting any more
            compute_us = done.result().parameters["compute_us"]
            resident.ran(request, compute_us)
            self._standing.consider_change(resident)
        self._drop_outgrown(resident)
        if resident.turn is not None:
            resident.turn.release()
        self._loader.release(resident.name, wishes.keep_s)

    def _drop_outgrown(self, resident: Resident) -> None:
        if resident.outgrown and not resident.retired:
            _LOG.warning("model %s %s: dropped from memory, it asked for far more than measured", *resident.key)
            self._standing.retire(resident, cold=True)
            self._loader.give_back_now()

    # -- joining ------------------------------------------------------------------------------------------------------

    def joint_of(self, resident: Resident) -> Joint | None:
        """Where its requests are joined; None where each runs alone."""
        if resident.joint_for is not resident.served:
            resident.joint_for = resident.served
            options = resident.served.options
            if resident.joint is not None or any(option.batching is not None for option in options):
                from agent.infer.joining import joint_of  # noqa: PLC0415 - most devices join nothing

                resident.joint = joint_of(resident, self._unfit.get(resident.option.digest, ""), self._means())
        return resident.joint if resident.joint is not None and resident.joint.on else None

    def _means(self) -> Means:
        from agent.infer.joining import Means  # noqa: PLC0415 - as above

        return Means(
            submit=self._runners.submit,
            withdraw=self._runners.withdraw,
            guarded=self._guarded,
            ended=self._ended_together,
            unfit=self._not_joinable,
            guard=self._guard,
            too_long=self._standing.keep_off_the_loop,
            closing=lambda: self._closing,
            halts=self.halts,
            places=self._limits().places,
        )

    def _ended_together(self, resident: Resident, request: InferRequest | None, rows: int, compute_us: int) -> None:
        if request is not None:
            resident.ran(request, compute_us)
        if rows:
            self._standing.consider_change(resident)
        self._drop_outgrown(resident)

    def _not_joinable(self, resident: Resident, reason: str) -> None:
        self._unfit[resident.option.digest] = reason
        _LOG.warning("model %s %s: requests are not joined any more: %s", *resident.key, reason)
