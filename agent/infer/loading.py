"""The shell around residency: does what it decides, in threads, and tells it what came of it.

Everything here is for the event loop's thread; loading, decrypting and closing happen in worker threads that touch
nothing but their own session. ``lease`` waits for a session's turn, ``release`` ends a run on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from agent.base.errors import DamagedError, DeadlineError, TryLaterError
from agent.base.memory import resident_mb
from agent.infer import tiers
from agent.infer.opening import Opening, Way
from agent.infer.residency import Residency
from agent.infer.returning import Returning
from agent.infer.runtimes.base import Runtime, Session
from agent.infer.shelf import SessionName
from agent.infer.tiers import Action, Blob, Event
from agent.infer.weighing import Scales

MIB = 1 << 20
#: Growth of the process beyond what its sessions account for that is nobody's business: a share of the budget, within
#: these bytes.
_SLACK, _LEAST_SLACK, _MOST_SLACK = 1 / 16, 4 * MIB, 16 * MIB
_LOG = logging.getLogger("edge_agent.engine")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bytes of everything loaded, requests that may wait for one model, threads of all runs at once, loads at once.

    ``lanes``: of three, two may be slow loads. **Measured** on two cores with 1,000 models: with one slow load at a
    time they waited for each other five times as long as they took.
    A load that takes longer than ``load_s`` is given up; the trial's own limit is far below it. ``keep_s``: how long
    what nobody uses stays in memory. ``pinned_share`` of the budget may be pinned. ``weigh_s``: how often the process
    is weighed after something changed, so that what sessions take beyond their measurements counts as well; 0: never.
    ``give_back_s``: freed memory goes back to the system so long after the last session was closed (``returning``).
    """

    budget_mb: float
    queue_per_model: int = 64
    places: int = 1
    load_s: float = 300.0
    lanes: int = 3
    keep_s: float = tiers.FOREVER
    pinned_share: float = 0.5
    weigh_s: float = 0.0
    give_back_s: float = 0.5


class LoadError(Exception):
    """A session could not be had; ``error`` is what was raised, None where its model is no longer installed."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__(str(error))
        self.error = error


class Watch(Protocol):
    """Who is told, on the event loop's thread: before a session is handed out, when it failed, before it closes."""

    def opened(self, name: SessionName, way: Way, session: Session) -> None: ...
    def failed(self, name: SessionName, way: Way, error: BaseException) -> None: ...
    def closing(self, name: SessionName) -> None: ...


class Loader:
    """Sessions by name. Construct on any thread, use on the event loop's.

    ``fence`` is called before anything that may take much memory, ``give_back`` when much was freed; from any thread.
    """

    def __init__(
        self,
        limits: Callable[[], EngineLimits],
        load_runtime: Callable[[str], Runtime],
        watch: Watch,
        fence: Callable[[], None],
        give_back: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._load_runtime = load_runtime
        self._watch = watch
        self._fence = fence
        self._give_back = give_back
        now = limits()
        self._machine = Residency(int(now.budget_mb * MIB), now.lanes, now.keep_s)
        self._ways: Mapping[SessionName, Way] = {}
        self._sessions: dict[SessionName, Session] = {}
        self._plaintexts: dict[Blob, contextlib.ExitStack] = {}
        self._descriptors: dict[Blob, int] = {}
        self._leaving: list[tuple[Event, Callable[[], None]]] = []  # what is to be closed
        self._closing = False
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._tickets = itertools.count(1)
        self._errors: dict[SessionName, BaseException] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._actions: deque[Action] = deque()
        self._acting = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = tiers.FOREVER
        self._opener = ThreadPoolExecutor(now.lanes, thread_name_prefix="load")
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="close")
        self._importing = threading.Lock()
        self._scales = Scales()
        self._beyond = self._reserved = 0
        self._runtimes: dict[str, Runtime] = {}
        self._returning = Returning(lambda: limits().give_back_s, self._begin_giving_back)
        self._lost = 0  # loads that were given up: their threads may never end
        self.counts: Counter[str] = Counter()

    # -- for the engine -----------------------------------------------------------------------------------------------

    def put(self, ways: Mapping[SessionName, Way]) -> None:
        """What can be opened from now on."""
        self._ways = ways
        self._errors = {name: error for name, error in self._errors.items() if name in ways}
        self._feed(tiers.Shelf({name: way.item for name, way in ways.items()}))

    async def lease(self, name: SessionName, deadline: float | None = None) -> None:
        """Return once a run on that session may begin; ``release`` must follow.

        LoadError where it cannot be had, TryLaterError where pinned models leave it no room, DeadlineError.
        """
        ticket = next(self._tickets)
        actions = self._machine.handle(tiers.Request(ticket, name), time.monotonic())
        if actions and actions[0] == tiers.Grant(ticket, name):
            self._act(actions[1:])
            return
        waiter = self._waiters[ticket] = asyncio.get_running_loop().create_future()
        self._act(actions)
        try:
            await (waiter if deadline is None else before(deadline, waiter))
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(name)  # it came with the very end of the wait
            else:
                self._waiters.pop(ticket, None)
                self._feed(tiers.Withdrawn(ticket))
            raise

    def release(self, name: SessionName, keep_s: float | None = None) -> None:
        """The run has ended; the model may stay unused for ``keep_s`` seconds, or as long as all."""
        self._feed(tiers.Finished(name, keep_s))

    def touch(self, name: SessionName, keep_s: float | None = None) -> bool:
        """Whether a run that is over at once may be made now; it counts as made."""
        touched = self._machine.touch(name, time.monotonic(), keep_s)
        if self._machine.wake_at < self._timer_at:
            self._set_timer()
        return touched

    def retire(self, name: SessionName, *, cold: bool = False) -> None:
        """Close that session once it is idle; ``cold``: and let go of its plaintext."""
        self._feed(tiers.Retire(name, cold))

    def preload(self, name: SessionName) -> None:
        """Load it when there is room to spare, or at least decrypt it."""
        self._feed(tiers.Preload(name))

    def pin(self, name: SessionName, *, pinned: bool) -> None:
        """Keep it in memory whatever comes, or no longer. TryLaterError when too much is pinned already."""
        way = self._ways.get(name)
        if pinned and way is not None:
            most = self._limits().pinned_share * self._machine.budget
            if self._machine.pinned() + way.form.session + way.form.size > most:
                raise TryLaterError(
                    f"cannot pin model '{name.model}': pinned models may hold {most / MIB:.0f} MB together",
                    hint="unpin or unload another one",
                )
        self._feed(tiers.Pin(name, pinned))

    def press(self, size_mb: float) -> None:
        """The device is short of memory: give so much back, as far as it is idle."""
        self._feed(tiers.Pressure(int(size_mb * MIB)))

    def reserve(self, size: int) -> None:
        """So many bytes of the budget are held by something else: kept answers."""
        self._reserved = size
        self._set_budget(MIB)

    def has_room(self, name: SessionName) -> bool:
        """Whether it could be loaded now and nothing would have to go."""
        return self._machine.has_room(name)

    def tier(self, name: SessionName) -> str:
        """hot, loading, warm or cold."""
        return self._machine.tier(name)

    def memory(self) -> dict[str, Any]:
        """For ``status``: MB and counts."""
        return {
            "budget_mb": round(self._limits().budget_mb, 1),
            "held_mb": round(self._machine.held / MIB, 1),
            "cached_mb": round(self._reserved / MIB, 1),
            "unaccounted_mb": round(max(0, self._beyond - self._reserved - self._slack) / MIB, 1),
            "hot": len(self._sessions),
            "warm": len(self._plaintexts),
            **{name: self.counts[name] for name in ("loads", "failed", "demoted", "evicted")},
        }

    def refuse_all(self, error: TryLaterError) -> None:
        """Nobody shall wait any longer."""
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(error)

    async def close(self, timeout_s: float) -> bool:
        """Wait for loads under way, end every session; whether all has ended."""
        until = time.monotonic() + timeout_s
        while self._tasks and (left := until - time.monotonic()) > 0:  # a load that ends may let another session go
            await asyncio.wait(list(self._tasks), timeout=left)
        clean = not self._tasks and not self._lost
        if self._timer is not None:
            self._timer.cancel()
        self._returning.cancel()
        self._closer.shutdown()
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        for plaintext in self._plaintexts.values():
            plaintext.close()
        self._plaintexts.clear()
        self._opener.shutdown(wait=clean)
        return clean

    # -- events and actions -------------------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        self._act(self._machine.handle(event, time.monotonic()))

    def _act(self, actions: list[Action]) -> None:
        """Do it in order; what follows from an action comes after those that are due already."""
        self._actions.extend(actions)
        if not self._acting:
            self._acting = True
            try:
                while self._actions:
                    self._do(self._actions.popleft())
            finally:
                self._acting = False
        if self._machine.wake_at < self._timer_at:
            self._set_timer()

    def _do(self, action: Action) -> None:
        if isinstance(action, tiers.Grant):
            waiter = self._waiters.pop(action.ticket, None)
            if waiter is None or waiter.done():
                self._feed(tiers.Finished(action.name))  # whoever waited has just gone
            else:
                waiter.set_result(None)
        elif isinstance(action, tiers.Refuse):
            self._refuse(action)
        elif isinstance(action, tiers.Load):
            self._begin(self._load(_named(action.name), held=action.held, keep=action.keep))
        elif isinstance(action, tiers.Warm):
            self._begin(self._warm(_named(action.name), action.blob))
        elif isinstance(action, tiers.Demote):
            self._demote(_named(action.name))
        else:
            self._evict(action.blob)

    def _refuse(self, action: tiers.Refuse) -> None:
        waiter = self._waiters.pop(action.ticket, None)
        if waiter is None or waiter.done():
            return
        name = _named(action.name)
        if action.reason == "room":
            waiter.set_exception(
                TryLaterError(
                    f"cannot load model '{name.model}': pinned models leave it no room",
                    hint="unpin a model, or raise budget_mb in [memory]",
                )
            )
        else:
            waiter.set_exception(LoadError(self._errors.get(name) if action.reason == "load" else None))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("residency is out of step", exc_info=error)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._machine.wake_at
        wait_s = max(0.0, self._timer_at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, tiers.FOREVER
        self._feed(tiers.Tick())

    # -- loading ------------------------------------------------------------------------------------------------------

    async def _load(self, name: SessionName, *, held: bool, keep: bool) -> None:
        """Load off the serving path. A load that never ends loses its thread, and the others get a new one."""
        way = self._ways[name]
        blob = way.form.digest
        opening = Opening(way, self._descriptors[blob] if held else None, keep=keep)
        running = asyncio.get_running_loop().run_in_executor(self._opener, self._open, opening)
        done, _ = await asyncio.wait([running], timeout=self._limits().load_s)
        if not done:
            opening.abandoned.set()
            self._opener.shutdown(wait=False)
            self._opener = ThreadPoolExecutor(self._limits().lanes, thread_name_prefix="load")
            self._lost += 1
            error: BaseException | None = DamagedError(
                f"cannot load model: not done within {self._limits().load_s:g} s"
            )
        else:
            error = running.exception()
        if error is None:
            self.counts["loads"] += 1
            session = self._sessions[name] = running.result()
            self._keep(blob, opening)
            self._watch.opened(name, way, session)
            self._feed(tiers.Loaded(name, opening.load_s, opening.read_s))
        else:
            self.counts["failed"] += 1
            self._errors[name] = error
            self._watch.failed(name, way, error)
            self._feed(tiers.LoadFailed(name, kept=held, shortage=isinstance(error, (TryLaterError, MemoryError))))
        self._weigh_soon()

    async def _warm(self, name: SessionName, blob: Blob) -> None:
        opening = Opening(self._ways[name], None, keep=True)
        try:
            await asyncio.get_running_loop().run_in_executor(self._opener, opening.read)
        except Exception as error:  # noqa: BLE001 - whatever a load of it would raise, when it is needed
            _LOG.warning("model %s %s was not decrypted ahead: %s", name.model, name.version, error)
            self._feed(tiers.Warmed(blob, kept=False))
            return
        self._keep(blob, opening)
        self._feed(tiers.Warmed(blob, kept=True))

    def _keep(self, blob: Blob, opening: Opening) -> None:
        if opening.stack is not None:
            self._plaintexts[blob] = opening.stack
            self._descriptors[blob] = opening.descriptor

    def _demote(self, name: SessionName) -> None:
        self.counts["demoted"] += 1
        self._watch.closing(name)
        self._close_soon(tiers.Closed(name), self._sessions.pop(name).close)

    def _evict(self, blob: Blob) -> None:
        self.counts["evicted"] += 1
        del self._descriptors[blob]
        self._close_soon(tiers.Dropped(blob), self._plaintexts.pop(blob).close)

    def _close_soon(self, event: Event, close: Callable[[], None]) -> None:
        self._leaving.append((event, close))
        if not self._closing:
            self._closing = True
            self._begin(self._close_all())

    async def _close_all(self) -> None:
        """Close in a thread, all that has come together in one go: one at a time the closing thread and this one would
        wait for the interpreter in turns, 1 ms for each session, of which a large model displaces twenty."""
        try:
            while self._leaving:
                batch, self._leaving = self._leaving, []
                work = [close for _, close in batch]
                try:
                    await asyncio.get_running_loop().run_in_executor(self._closer, _call_each, work)
                finally:
                    for event, _ in batch:
                        self._feed(event)
                self._returning.freed()
                self._weigh_soon()
        finally:
            self._closing = False

    def _open(self, opening: Opening) -> Session:
        """Decrypt and load; in a loading thread."""
        self._fence()
        with self._importing:  # a runtime is made once, and what its import takes is no session's
            before = resident_mb()
            name = opening.way.option.runtime
            runtime = self._load_runtime(name)
            if name not in self._runtimes:
                self._runtimes[name] = runtime
                self._scales.imported(before)
        return opening.load(runtime)

    # -- memory -------------------------------------------------------------------------------------------------------

    def give_back_now(self) -> None:
        """Much was freed that nobody will want soon."""
        self._returning.freed(much=True)

    def _begin_giving_back(self) -> None:
        self._closer.submit(self._return_memory)

    def _return_memory(self) -> None:
        """In the closing thread: what the runtimes keep for the next run, then what the allocator keeps."""
        for runtime in list(self._runtimes.values()):
            runtime.trim()
        self._give_back()

    def _weigh_soon(self) -> None:
        """Weigh the process, now and then, and take from the budget what sessions hold beyond their measurements."""
        every = self._limits().weigh_s
        if every and self._scales.due(time.monotonic(), every):
            self._beyond = self._scales.beyond(self._machine.sessions_held)
            self._set_budget(self._slack // 4)

    @property
    def _slack(self) -> int:
        return max(_LEAST_SLACK, min(_MOST_SLACK, int(self._limits().budget_mb * MIB * _SLACK)))

    def _set_budget(self, step: int) -> None:
        """What is left for models, where it is another by more than ``step`` bytes."""
        whole = int(self._limits().budget_mb * MIB)
        budget = max(whole - self._reserved - max(0, self._beyond - self._reserved - self._slack), whole // 4)
        if abs(budget - self._machine.budget) > step:
            self._feed(tiers.Budget(budget))


async def before(deadline: float, work: Awaitable[_T]) -> _T:
    """Await it until then (``time.monotonic``); DeadlineError."""
    left = deadline - time.monotonic()
    try:
        return await asyncio.wait_for(work, max(0.0, left))
    except asyncio.TimeoutError as error:  # on Python 3.10 a class of its own
        raise too_late() from error


def _call_each(work: Sequence[Callable[[], None]]) -> None:
    """All of them, also when one raises."""
    with contextlib.ExitStack() as stack:
        for one in reversed(work):
            stack.callback(one)


def too_late() -> DeadlineError:
    """A request's time is over."""
    return DeadlineError("the request's time ran out before the model answered")


def _named(name: tiers.Name) -> SessionName:
    assert isinstance(name, SessionName)
    return name
