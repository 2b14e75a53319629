"""The engine: answers requests with loaded sessions, loads what is missing off the serving path, evicts by bytes.

All state is changed on the event loop's thread only; loading and running happen in worker threads that touch nothing
but their own session. A busy or loading session is never evicted; a load happens once however many ask for it.
A model whose measured p95 is below ``INLINE_P95_MS`` runs on the loop itself, for a thread would cost more than that:
with inputs of shapes that were quick in a thread before, and only where the run can be ended when the values make it
long. A session that is not ``concurrent`` runs one request at a time; others wait for their turn and hold no thread.

A run ends, or is asked to, when its request's time is over or its caller has gone. A session that comes to hold far
more than was measured is dropped, so that no input makes the daemon keep memory that the budget does not know.

When the chosen option cannot be read or loaded, the next one answers and says ``degraded``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from agent import __version__
from agent.base.errors import DamagedError, DeadlineError, PeerError, TryLaterError, UnsupportedError
from agent.base.memory import resident_mb
from agent.infer.halting import Halt, LoopGuard
from agent.infer.runners import Job, Runners
from agent.infer.runtimes.base import LoadOptions, Runtime, Session
from agent.infer.shelf import Option, Served, Shelf
from agent.infer.tensors import InferRequest, InferResponse, Tensor, check_inputs

if TYPE_CHECKING:
    from agent.bundles.manifest import TensorSpec

INLINE_P95_MS = 0.3
#: A run in a thread that was shorter proves its shapes fit for the loop; the first one after a load is slower.
_QUICK_US = 3000
#: A run on the loop that was longer may have taken any memory, which nobody looked at: its session is dropped.
_LONG_US = 20_000
#: Shapes that are remembered for each session.
_MOST_SHAPES = 64
#: Growth of the process within one run that drops the session: this much, and this often what was measured.
_OUTGROWN_MB, _OUTGROWN = 64.0, 2.0
#: For runs that were told to end, at the stop.
_CLOSE_S = 5.0
_LOG = logging.getLogger("edge_agent.engine")

Key = tuple[str, str]
Shapes = tuple[tuple[int, ...], ...]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bytes of all loaded sessions together, requests that may wait for one model, threads that run sessions.

    A load that takes longer than ``load_s`` is given up; the trial's own limit is far below it.
    """

    budget_mb: float
    queue_per_model: int = 64
    workers: int = 1
    load_s: float = 300.0


@dataclass(slots=True)
class Loaded:
    """A session that can answer. ``busy`` counts the requests that hold it."""

    key: Key
    served: Served
    option: Option
    session: Session
    degraded_because: str = ""
    busy: int = 0
    last_used: float = 0.0
    retired: bool = False
    output_names: tuple[str, ...] = ()
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    #: Held by the request that runs, where the session takes only one at a time.
    turn: asyncio.Lock | None = None
    #: Whether the model is fast enough for the event loop, and its runs can be ended.
    fast: bool = False
    #: Shapes of inputs that ran quickly in a thread.
    quick: set[Shapes] = field(default_factory=set)
    outgrown: bool = False

    def fits_the_loop(self, request: InferRequest) -> bool:
        """Whether this request may run on the event loop now: it will be quick, and nobody is at the session."""
        return self.fast and shapes_of(request) in self.quick and (self.turn is None or not self.turn.locked())


def shapes_of(request: InferRequest) -> Shapes:
    """The shapes of the inputs, in the request's order."""
    return tuple([tensor.array.shape for tensor in request.inputs])


class Engine:
    """Serves the models of a shelf. Construct on any thread, use on the event loop's.

    ``fence`` is called, from any thread, before something is loaded or run that may take much memory.
    """

    def __init__(
        self,
        limits: EngineLimits,
        load_runtime: Callable[[str], Runtime],
        report_damage: Callable[[Key, Option, str], None] = lambda key, option, reason: None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._limits = limits
        self._load_runtime = load_runtime
        self._report_damage = report_damage
        self._fence = fence
        self._shelf = Shelf()
        self._hot: dict[Key, Loaded] = {}
        self._loading: dict[Key, asyncio.Task[Loaded]] = {}
        self._waiting: dict[str, int] = {}
        self._reserved_mb = 0.0
        self._runners = Runners(limits.workers)
        self._halts: set[Halt] = set()
        self._guard = LoopGuard()
        self._not_for_the_loop: set[str] = set()
        self._lost = 0  # loads that were given up: their threads may never end
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._closing = False

    # -- what there is --------------------------------------------------------------------------------------------

    def server_metadata(self) -> dict[str, Any]:
        """Open Inference Protocol server metadata."""
        return {
            "name": "edge-agent",
            "version": __version__,
            "extensions": ["binary_tensor_data", "classification", "model_repository", "statistics"],
        }

    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._closing

    def index(self) -> list[dict[str, Any]]:
        """Every installed version: READY when it can answer, else UNAVAILABLE with the reason."""
        rows = []
        for (model, version), served in sorted(self._shelf.versions.items()):
            active = self._shelf.active.get(model) == version
            state = "READY" if served.options and active else "UNAVAILABLE"
            reason = served.reason or ("" if active else "not the active version")
            rows.append({"name": model, "version": version, "state": state, "reason": reason})
        return rows

    def model_metadata(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Open Inference Protocol model metadata; NotFoundError."""
        served = self._shelf.find(name, version)
        versions = sorted(v for model, v in self._shelf.versions if model == name)
        option = served.options[0] if served.options else None
        return {
            "name": name,
            "versions": versions,
            "platform": f"{option.runtime}_{option.provider}" if option else "",
            "inputs": [_metadata(spec) for spec in served.inputs],
            "outputs": [_metadata(spec) for spec in served.outputs],
        }

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Whether the version can answer; NotFoundError for one that is not installed."""
        return bool(self._shelf.find(name, version).options) and not self._closing

    def served(self, name: str, version: str | None = None) -> Served:
        """What is on the shelf; NotFoundError."""
        return self._shelf.find(name, version)

    def labels(self, name: str, version: str | None = None) -> tuple[str, ...]:
        """Class labels of the model, for the classification extension."""
        return self._shelf.find(name, version).labels

    def loaded(self) -> list[dict[str, Any]]:
        """The hot sessions, for ``status``."""
        return [
            {
                "model": loaded.key[0],
                "version": loaded.key[1],
                "variant": loaded.option.variant,
                "backend": loaded.session.provider,
                "mb": round(loaded.option.need_mb, 1),
                "degraded": bool(loaded.degraded_because),
                "reason": loaded.degraded_because,
            }
            for loaded in self._hot.values()
        ]

    # -- changing what there is -----------------------------------------------------------------------------------

    def put(self, shelf: Shelf) -> None:
        """Serve this shelf from now on. Sessions that it no longer holds end when their last request is done."""
        self._shelf = shelf
        for key, loaded in list(self._hot.items()):
            served = shelf.versions.get(key)
            if served is None or loaded.option.digest not in [option.digest for option in served.options]:
                self._retire(loaded)
                continue
            loaded.served = served
            if served.options[0].candidate != loaded.option.candidate and not loaded.degraded_because:
                self._begin_load(served)  # another variant was chosen: it takes over once it is loaded

    async def preload(self, name: str, version: str | None = None) -> Loaded:
        """Load now; returns when the version can answer. Raises what keeps it from doing so."""
        return await self._obtain(self._shelf.find(name, version))

    def unload(self, name: str) -> int:
        """Drop the model's sessions from memory; they come back at the next request. Returns how many."""
        dropped = [loaded for loaded in self._hot.values() if loaded.key[0] == name]
        for loaded in dropped:
            self._retire(loaded)
        return len(dropped)

    async def close(self) -> bool:
        """Stop taking requests, end runs, wait for loads under way, end every session; whether all has ended."""
        self._closing = True
        if self._loading:
            await asyncio.wait(list(self._loading.values()), timeout=_CLOSE_S)
        for halt in self._halts:
            halt.request()
        clean = await self._runners.close(_CLOSE_S) and not self._loading and not self._lost
        for loaded in list(self._hot.values()):
            self._retire(loaded)
        self._loader.shutdown(wait=not self._loading)
        if not clean:
            _LOG.error("a load or a run did not end when told to")
        return clean

    # -- answering ------------------------------------------------------------------------------------------------

    def infer(
        self, name: str, version: str | None, request: InferRequest, deadline: float
    ) -> InferResponse | Awaitable[InferResponse]:
        """Answer at once where the session is hot and fast, else an awaitable. ``deadline`` in ``time.monotonic()``."""
        served = self._shelf.find(name, version)
        loaded = self._hot.get((served.model, served.version))
        if loaded is not None and loaded.fits_the_loop(request):
            try:
                return self._run_on_loop(loaded, request)
            except DeadlineError:  # its time follows from its inputs' values: it runs in threads from now on
                self._not_for_the_loop.add(loaded.option.digest)
                _LOG.warning("model %s %s: a run took far longer than any before", *loaded.key)
        return self._answer(served, request, deadline)

    def _run_on_loop(self, loaded: Loaded, request: InferRequest) -> InferResponse:
        """One run on this thread. DeadlineError when it held the loop up; its session is dropped then."""
        loaded.last_used = time.monotonic()
        try:
            response = self._run(loaded, request, 0.0, self._guard.begin())
        except TryLaterError:
            self._retire(loaded)
            raise
        finally:
            self._guard.end()
        if response.parameters["compute_us"] > _LONG_US:
            self._retire(loaded)
        return response

    async def _answer(self, served: Served, request: InferRequest, deadline: float) -> InferResponse:
        _require_options(served)
        check_inputs(served.inputs, request.inputs)  # a wrong request must not cost a load
        waiting = self._waiting.get(served.model, 0)
        if waiting >= self._limits.queue_per_model:
            raise TryLaterError(f"model '{served.model}': {waiting} requests are waiting already")
        self._waiting[served.model] = waiting + 1
        arrived = time.perf_counter()
        try:
            loaded = self._hot.get((served.model, served.version))
            while loaded is None or loaded.retired:  # it may be evicted between its load and our turn
                loaded = await _before(deadline, self._obtain(served))
            loaded.last_used = time.monotonic()
            halt = Halt()
            job = await self._start(loaded, request, arrived, deadline, halt)
            try:
                return await _before(deadline, asyncio.shield(job.future))
            except (DeadlineError, asyncio.CancelledError):
                halt.request()
                self._runners.withdraw(job)
                raise
        finally:
            left = self._waiting[served.model] - 1
            if left:
                self._waiting[served.model] = left
            else:
                del self._waiting[served.model]

    async def _start(self, loaded: Loaded, request: InferRequest, arrived: float, deadline: float, halt: Halt) -> Job:
        """The run, waiting for a thread or in one; it holds the session, and its turn, until it has really ended."""
        loaded.busy += 1  # from here on the session is not closed, however long the turn takes to come
        try:
            if loaded.turn is not None:
                await _before(deadline, loaded.turn.acquire())
        except BaseException:
            self._let_go(loaded)
            raise
        job = self._runners.submit(loaded.key[0], partial(self._run_in_thread, loaded, request, arrived, halt))
        self._halts.add(halt)
        job.future.add_done_callback(partial(self._release, loaded, request, halt))
        return job

    def _run_in_thread(self, loaded: Loaded, request: InferRequest, arrived: float, halt: Halt) -> InferResponse:
        """One run that may take long, and much memory."""
        self._fence()
        before = resident_mb()
        try:
            return self._run(loaded, request, arrived, halt)
        except DeadlineError:
            raise
        except TryLaterError:
            loaded.outgrown = True  # an arena that failed to grow reserves as much again at its next step
            raise
        finally:
            if resident_mb() - before > _OUTGROWN_MB + _OUTGROWN * loaded.option.need_mb:
                loaded.outgrown = True

    def _run(self, loaded: Loaded, request: InferRequest, arrived: float, halt: Halt) -> InferResponse:
        """One run in the calling thread. DeadlineError when ``halt`` ended it."""
        start = time.perf_counter()
        arrays = check_inputs(loaded.served.inputs, request.inputs)
        names = self._wanted(loaded, request)
        try:
            answers = loaded.session.run(arrays, names, halt)
        except MemoryError as error:
            raise TryLaterError("cannot run model: out of memory") from error
        end = time.perf_counter()
        queue_us = int((start - arrived) * 1e6) if arrived else 0
        compute_us = int((end - start) * 1e6)
        option, best = loaded.option, loaded.served.options[0] if loaded.served.options else loaded.option
        return InferResponse(
            model_name=loaded.key[0],
            model_version=loaded.key[1],
            id=request.id,
            outputs=tuple(
                Tensor(name, loaded.outputs[name].datatype, answer) for name, answer in zip(names, answers, strict=True)
            ),
            parameters={
                "variant": option.variant,
                "backend": loaded.session.provider,
                "requested_variant": best.variant,
                "requested_backend": best.provider,
                "degraded": bool(loaded.degraded_because),
                "cache": "off",
                "queue_us": queue_us,
                "compute_us": compute_us,
            },
        )

    def _wanted(self, loaded: Loaded, request: InferRequest) -> tuple[str, ...]:
        if not request.outputs:
            return loaded.output_names
        names = tuple(output.name for output in request.outputs)
        for name in names:
            if name not in loaded.outputs:
                raise PeerError(f"output '{name}': no such output; the model has {', '.join(loaded.output_names)}")
        return names

    # -- loading and evicting -------------------------------------------------------------------------------------

    async def _obtain(self, served: Served) -> Loaded:
        """The hot session of that version, loaded by whoever asks first."""
        key = (served.model, served.version)
        if (loaded := self._hot.get(key)) is not None:
            loaded.last_used = time.monotonic()
            return loaded
        if self._closing:
            raise TryLaterError("cannot load model: the agent is stopping")
        return await asyncio.shield(self._begin_load(served))

    def _begin_load(self, served: Served) -> asyncio.Task[Loaded]:
        """The load of that version under way, or a new one."""
        key = (served.model, served.version)
        task = self._loading.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(served))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loaded(key, done))
        return task

    def _loaded(self, key: Key, task: asyncio.Task[Loaded]) -> None:
        self._loading.pop(key, None)
        if not task.cancelled() and task.exception() is not None:
            _LOG.warning("model %s %s: %s", *key, task.exception())

    async def _load(self, served: Served) -> Loaded:
        key = (served.model, served.version)
        _require_options(served)
        failures: list[str] = []
        for option in served.options:
            await self._make_room(option.need_mb)
            self._reserved_mb += option.need_mb
            try:
                session = await self._open_in_thread(option)
            except (DamagedError, UnsupportedError) as error:
                failures.append(f"{option.candidate}: {error}")
                self._report_damage(key, option, str(error))
                continue
            finally:
                self._reserved_mb -= option.need_mb
            because = "; ".join(failures)
            if not because and session.provider != option.provider:
                because = f"{option.provider} did not take the model"
            loaded = Loaded(key, served, option, session, because, last_used=time.monotonic())
            loaded.turn = None if session.concurrent else asyncio.Lock()
            loaded.outputs = {spec.name: spec for spec in session.outputs}
            loaded.output_names = tuple(spec.name for spec in served.outputs)
            loaded.fast = (
                option.p95_ms is not None
                and option.p95_ms < INLINE_P95_MS
                and session.stoppable
                and option.digest not in self._not_for_the_loop
            )
            if (before := self._hot.get(key)) is not None:
                self._retire(before)
            self._hot[key] = loaded
            return loaded
        raise DamagedError(f"model '{served.model}': no variant can answer: {'; '.join(failures)}")

    async def _open_in_thread(self, option: Option) -> Session:
        """Load off the serving path. A load that never ends loses its thread, and the others get a new one."""
        opening = asyncio.get_running_loop().run_in_executor(self._loader, self._open, option)
        done, _ = await asyncio.wait([opening], timeout=self._limits.load_s)
        if not done:
            self._loader.shutdown(wait=False)
            self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
            self._lost += 1
            raise DamagedError(f"cannot load model: not done within {self._limits.load_s:g} s")
        return opening.result()

    def _open(self, option: Option) -> Session:
        """Decrypt and load; in the loader's thread."""
        self._fence()
        runtime = self._load_runtime(option.runtime)
        with option.open_model() as model:
            return runtime.load(model.fd, LoadOptions(option.provider, option.threads, option.parameters))

    def _held_mb(self) -> float:
        return self._reserved_mb + sum(loaded.option.need_mb for loaded in self._hot.values())

    async def _make_room(self, need_mb: float) -> None:
        """Evict idle sessions, least recently used first, until ``need_mb`` fits; wait for busy ones when they must go.

        A model that is larger than the whole budget is let in alone: refusing it would make it useless for ever.
        """
        for _ in range(600):
            if self._held_mb() + need_mb <= self._limits.budget_mb or not (self._hot or self._reserved_mb):
                return
            idle = [loaded for loaded in self._hot.values() if not loaded.busy]
            if idle:
                self._retire(min(idle, key=lambda loaded: loaded.last_used))
            else:
                await asyncio.sleep(0.05)
        raise TryLaterError(f"cannot load model: {need_mb:.0f} MB do not fit while others are busy")

    def _retire(self, loaded: Loaded) -> None:
        """Out of the table now; closed when its last request is done."""
        if self._hot.get(loaded.key) is loaded:
            del self._hot[loaded.key]
        loaded.retired = True
        if not loaded.busy:
            loaded.session.close()

    def _release(self, loaded: Loaded, request: InferRequest, halt: Halt, done: asyncio.Future[InferResponse]) -> None:
        self._halts.discard(halt)
        if not done.cancelled() and done.exception() is None:  # seen: nobody may be waiting any more
            compute_us = done.result().parameters["compute_us"]
            if loaded.fast and compute_us < _QUICK_US and len(loaded.quick) < _MOST_SHAPES:
                loaded.quick.add(shapes_of(request))
        if loaded.outgrown and not loaded.retired:
            _LOG.warning("model %s %s: dropped from memory, it asked for far more than measured", *loaded.key)
            self._retire(loaded)
        if loaded.turn is not None:
            loaded.turn.release()
        self._let_go(loaded)

    def _let_go(self, loaded: Loaded) -> None:
        loaded.busy -= 1
        if loaded.retired and not loaded.busy:
            loaded.session.close()


def _require_options(served: Served) -> None:
    if not served.options:
        raise DamagedError(f"model '{served.model}': {served.reason or 'no variant can answer'}")


async def _before(deadline: float, work: Awaitable[_T]) -> _T:
    left = deadline - time.monotonic()
    try:
        return await asyncio.wait_for(work, max(0.0, left))
    except asyncio.TimeoutError as error:  # on Python 3.10 a class of its own
        raise DeadlineError("the request's time ran out before the model answered") from error


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
