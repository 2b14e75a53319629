"""Chooses which job runs next in which lane, and when to look again. Starts no thread and no timer of its own.

Invariants: one job a lane at a time; a lane is never held by a job that waits for its window or for the clock, and the
rescue lane by nothing that waits. ``wake`` is cheap and never raises for local trouble: what is wrong stands in
``problem``, and it is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from agent.base.clock import Clock
from agent.base.errors import AgentError, PeerError
from agent.work.attempt import Attempt, Bench, Lanes, UnwritableError
from agent.work.jobs import Failure, Lane, Order, move
from agent.work.journal import Journal
from agent.work.records import Waiting
from agent.work.steps import Handler, RestartPending

if TYPE_CHECKING:
    from agent.work.windows import Opening

__all__ = ("Lanes", "RestartPending", "Runner")

#: Seconds after which it is tried again where the journal or the lane would not have it.
_RETRY_S = 15.0
#: Wall clocks are set: what waits for one looks again at least this often.
_LOOK_AGAIN_S = 60.0
_LOG = logging.getLogger("edge_agent.work")


@dataclass(slots=True)
class _Seat:
    """What a lane is busy with."""

    job: Waiting
    since: float
    attempt: Attempt | None = None
    #: The job waits for a restart, or its step for a while (``paused``), until then on the monotonic clock.
    parked_until: float = 0.0
    paused: bool = False


class Runner:
    """Between the journal and the lanes' threads. Any thread may call.

    The owner calls ``wake`` at the start, after each ``changed``, after a cancel, and when the time is up that ``wake``
    named. ``verify`` raises for an order that its envelope does not vouch for.
    """

    def __init__(
        self,
        journal: Journal,
        handlers: Mapping[str, Handler],
        lanes: Lanes,
        *,
        clock: Clock,
        clock_trusted: Callable[[], bool],
        boot_nonce: str,
        verify: Callable[[Order], None],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._handlers = handlers
        self._lanes = lanes
        self._clock = clock
        self._trusted = clock_trusted
        self._changed = changed
        self._stopping = threading.Event()
        self._bench = Bench(journal, clock, boot_nonce, verify, changed, self._stopping.is_set, lanes)
        self._lock = threading.Lock()
        self._seats: dict[Lane, _Seat] = {}
        self._parked: dict[int, _Seat] = {}
        self._retry_at = -math.inf
        self._has_moved = False
        self._openings: dict[int, tuple[datetime, Opening]] = {}
        #: Called in place of ``changed`` where nothing can be seen to have changed, and yet ``wake`` has another time
        #: to name: the owner may set it.
        self.paused = changed
        #: Why jobs do not run, where something local is wrong.
        self.problem: str | None = None

    def wake(self) -> float | None:
        """Start what can be started; seconds after which to call again at the latest, None when nothing waits."""
        if self._stopping.is_set():
            return None
        with self._lock:
            self._has_moved = False
            try:
                wait = self._wake()
            except AgentError as error:
                wait = self._fail(error)
            has_moved = self._has_moved
        if has_moved:
            self._changed()
        return wait

    def stop(self) -> None:
        """Nothing is begun from now on; what runs leaves at its next safe point and goes on after the next start."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._lock:
            for seat in self._parked.values():
                _leave(seat)

    def under_way(self) -> dict[Lane, dict[str, Any]]:
        """What each busy lane does, for ``status``. ``stuck``: it is past its time and has not come to a safe point."""
        with self._lock:
            seats = {seat.job.lane: seat for seat in self._parked.values()} | self._seats
            return {lane: self._shown(seat) for lane, seat in seats.items()}

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _wake(self) -> float | None:
        now = self._clock.monotonic()
        if now < self._retry_at:
            return self._retry_at - now
        self.problem = None
        waits = [self._unpark(seat, now) for seat in list(self._parked.values())]
        jobs = self._journal.waiting()
        self._openings = {job.key: self._openings[job.key] for job in jobs if job.key in self._openings}
        for job in jobs:
            if job.key in self._parked:
                continue
            wait = self._gate(job)
            if wait == 0 and self._is_free(job.lane):
                wait = self._start(job)
            waits.append(wait)
        return min((wait for wait in waits if wait), default=None)

    def _is_free(self, lane: Lane) -> bool:
        """In the normal lane a job may rely on the one before it being over; rescue waits for nothing."""
        waiting = lane == "normal" and any(seat.job.lane == lane for seat in self._parked.values())
        return lane not in self._seats and not waiting

    def _gate(self, job: Waiting) -> float | None:
        """0 when the job may run now, seconds until it may, None when it never will (and has ended)."""
        if job.begun:
            return 0
        trusted = self._trusted()
        if job.not_after is not None:
            if not trusted:
                return _LOOK_AGAIN_S
            if self._clock.now() > _moment(job.not_after):
                self._reject(job, "expired", f"cannot begin: it was to begin by {job.not_after}")
                return None
        if job.window is None or job.lane != "normal":
            return 0
        if not trusted:
            self._show_waiting(job)
            return _LOOK_AGAIN_S
        return self._gate_window(job)

    def _gate_window(self, job: Waiting) -> float | None:
        moment = self._clock.now()
        try:
            opening = self._opening(job, moment)
        except PeerError as error:
            self._reject(job, "bad_args", str(error))
            return None
        if opening.holds(moment):
            return 0
        self._show_waiting(job)
        return min(_LOOK_AGAIN_S, max(0.1, (opening.opens - moment).total_seconds()))

    def _opening(self, job: Waiting, moment: datetime) -> Opening:
        """Kept until it closes, or the clock was set back."""
        assert job.window is not None
        asked_at, opening = self._openings.get(job.key, (None, None))
        if asked_at is None or opening is None or not asked_at <= moment < opening.closes:
            from agent.work.windows import opening_at  # noqa: PLC0415 - most devices never see one

            opening = opening_at(job.window, moment)
            self._openings[job.key] = (moment, opening)
        return opening

    def _reject(self, job: Waiting, code: str, text: str) -> None:
        self._move(job, state="rejected", phase=None, error=Failure(code, text))

    def _show_waiting(self, job: Waiting) -> None:
        if job.phase != "waiting_window":
            self._move(job, state="running", phase="waiting_window")

    def _move(self, job: Waiting, **changes: Any) -> None:
        record = self._journal.load(job.key)
        if record is None or record.progress.has_ended or record.progress.attempt:
            return
        if self._journal.save(job.key, record.progress, move(record.progress, **changes)):
            self._has_moved = True

    # -- lanes --------------------------------------------------------------------------------------------------------

    def _start(self, job: Waiting) -> float | None:
        return self._hand_over(_Seat(job, self._clock.monotonic()), late=False)

    def _unpark(self, seat: _Seat, now: float) -> float | None:
        """A restart that did not come in time fails its step; a pause that is over is followed by it. Seconds until
        then."""
        if now < seat.parked_until:
            return seat.parked_until - now
        if seat.job.lane in self._seats:
            return None  # looked at again when the lane is free
        del self._parked[seat.job.key]
        wait = self._hand_over(seat, late=not seat.paused)
        if wait is not None:
            self._parked[seat.job.key] = seat
        return wait

    def _hand_over(self, seat: _Seat, *, late: bool) -> float | None:
        job = seat.job
        self._seats[job.lane] = seat
        try:
            self._lanes.execute(job.lane, f"job {job.job_id} ({job.op})", partial(self._work, seat, late))
        except AgentError as error:
            del self._seats[job.lane]
            self.problem = str(error)
            return _RETRY_S
        return None

    def _work(self, seat: _Seat, late: bool) -> None:
        """In the lane's thread: run the job of the seat, give the seat back."""
        parked = quiet = False
        trouble: BaseException | None = None
        try:
            if self._may_still(seat):
                parked = self._run(seat, late)
        except UnwritableError as error:
            trouble = error.__cause__
        except Exception as error:  # noqa: BLE001 - a bug here must not end the lane: the job counts as interrupted
            trouble = error
        with self._lock:
            del self._seats[seat.job.lane]
            if parked and seat.attempt is not None:
                quiet = self._park(seat, seat.attempt)
            if trouble is not None:
                self._fail(trouble)
        (self.paused if quiet else self._changed)()

    def _park(self, seat: _Seat, attempt: Attempt) -> bool:
        """The job waits; whether it has been doing so."""
        before, seat.paused = seat.paused, attempt.pause_s is not None
        pause_s = attempt.pause_s
        seat.parked_until = attempt.deadline if pause_s is None else self._clock.monotonic() + pause_s
        self._parked[seat.job.key] = seat
        if self._stopping.is_set():
            _leave(seat)
        return before and seat.paused

    def _may_still(self, seat: _Seat) -> bool:
        """The lane's thread may have been busy with something else for long: the window may have closed since."""
        if self._stopping.is_set():
            return False
        if seat.paused:
            return True
        with self._lock:
            return self._gate(seat.job) == 0

    def _run(self, seat: _Seat, late: bool) -> bool:
        record = self._journal.load(seat.job.key)
        if record is None or record.progress.has_ended:
            return False
        seat.attempt = Attempt(self._bench, record, self._handlers.get(record.order.op), late=late, again=seat.paused)
        return seat.attempt.run()

    def _fail(self, error: BaseException | None) -> float:
        self._retry_at = self._clock.monotonic() + _RETRY_S
        self.problem = str(error) or type(error).__name__
        _LOG.error("jobs wait: %s", self.problem, exc_info=None if isinstance(error, AgentError) else error)
        return _RETRY_S

    def _shown(self, seat: _Seat) -> dict[str, Any]:
        now = self._clock.monotonic()
        shown: dict[str, Any] = {"job_id": seat.job.job_id, "op": seat.job.op, "seconds": round(now - seat.since, 1)}
        if seat.attempt is not None:
            progress = seat.attempt.progress
            shown |= {"step": progress.step, "phase": progress.phase, "attempt": progress.attempt}
            stuck = now > seat.attempt.deadline and not seat.paused
            shown |= {"stuck": stuck, "event": dict(seat.attempt.event)}
        return shown


def _leave(seat: _Seat) -> None:
    """An orderly stop while a step pauses."""
    if seat.paused and seat.attempt is not None:
        with contextlib.suppress(UnwritableError):  # it counts as interrupted then
            seat.attempt.leave()


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
