"""The engine: answers requests with loaded sessions of the models on its shelf.

What is in memory is decided by ``residency`` and done by ``loading``; ``standing`` knows which session answers for a
version; ``running`` makes the runs. Here they meet requests. All state is changed on the event loop's thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from agent import __version__
from agent.base.errors import DeadlineError, TryLaterError
from agent.infer.answering import Key, Resident, described, require_options
from agent.infer.attempts import Attempt
from agent.infer.cascading import Cascading
from agent.infer.loading import MIB, EngineLimits
from agent.infer.picking import pick
from agent.infer.running import Running
from agent.infer.runtimes.base import Runtime
from agent.infer.runtimes.failures import DoubtfulError, ProviderLostError, return_memory
from agent.infer.shelf import Option, Served, Shelf
from agent.infer.standing import Standing
from agent.infer.steering import Pressure
from agent.infer.tensors import InferRequest, InferResponse, check_inputs
from agent.infer.wishes import NO_WISHES, Wishes, wishes_of

if TYPE_CHECKING:
    from agent.bundles.manifest import TensorSpec
    from agent.infer.caching import Caching

__all__ = ["Engine", "EngineLimits", "Key"]

#: For runs that were told to end, at the stop.
_CLOSE_S = 5.0
#: For a run that nobody waits for.
_REPLAY_S = 30.0
_LOG = logging.getLogger("edge_agent.engine")


class Engine:
    """Serves the models of a shelf. Construct on any thread, use on the event loop's.

    ``fence`` is called, from any thread, before something is loaded or run that may take much memory; ``give_back``
    after much was freed.
    """

    def __init__(
        self,
        limits: EngineLimits,
        load_runtime: Callable[[str], Runtime],
        report_damage: Callable[[Key, Option, str], None] = lambda key, option, reason: None,
        fence: Callable[[], None] = lambda: None,
        give_back: Callable[[], None] = return_memory,
        report_loss: Callable[[Option, str], None] = lambda option, reason: None,
    ) -> None:
        self._limits = limits
        self._standing = Standing(lambda: self._limits, load_runtime, report_damage, fence, give_back, report_loss)
        self._loader = self._standing.loader
        self._waiting: dict[str, int] = {}
        self._running = Running(self._standing, lambda: self._limits, fence)
        self._caching: Caching | None = None
        self._cascading = Cascading(self._answer, self._standing.hurried)
        self._closing = False
        #: What ``index`` says of which shelf: it is asked for far more often than it changes.
        self._indexed: tuple[Shelf | None, Sequence[Mapping[str, str]]] = None, []
        #: Told when a request is about to run: whatever runs aside shall end.
        self.give_way: Callable[[], None] | None = None

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def _shelf(self) -> Shelf:
        return self._standing.shelf

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

    def index(self) -> Sequence[Mapping[str, str]]:
        """Every installed version: READY when it can answer, else UNAVAILABLE with the reason."""
        if self._indexed[0] is not self._shelf:
            self._indexed = self._shelf, list(_index(self._shelf))
        return self._indexed[1]

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
        """The sessions that answer now, for ``status``."""
        residents = self._standing.all()
        for resident in residents:
            self._running.joint_of(resident)  # one that nobody has asked yet does not know
        return [self._row(resident, stands=self._standing.stands(resident)) for resident in residents]

    def _row(self, resident: Resident, *, stands: bool) -> dict[str, Any]:
        """One session; that which answers only requests that pick it is what was asked for."""
        pinned = stands and resident.key in self._standing.pins
        row = {**described(resident), "on_request": not stands, "pinned": pinned}
        return row if stands else {**row, "degraded": False, "reason": ""}

    def cascades(self) -> list[dict[str, Any]]:
        """The active versions that answer by a cascade, or were to, for ``status``."""
        active = self._shelf.active
        cascades = (
            served
            for (model, version), served in self._shelf.versions.items()
            if (served.cascade is not None or served.no_cascade) and active.get(model) == version
        )
        return [
            {"model": served.model, "version": served.version, "in_force": found is not None, "why": served.no_cascade}
            | ({"first": found.first, "then": found.then, "threshold": found.threshold} if found else {})
            for served in sorted(cascades, key=lambda served: served.model)
            for found in [served.cascade]
        ]

    def memory(self) -> dict[str, Any]:
        """Budget, what is held of it, and counts of loads, for ``status``."""
        return self._loader.memory()

    def caches(self) -> list[dict[str, Any]]:
        """Statistics of each model whose answers are kept."""
        return self._caching.books.rows() if self._caching is not None else []

    def hottest(self, name: str, most: int = 10) -> list[dict[str, Any]]:
        """The requests of a model that come most often, where its answers are kept."""
        return self._caching.books.hottest(name, most) if self._caching is not None else []

    # -- changing what there is ---------------------------------------------------------------------------------------

    def put(self, shelf: Shelf) -> None:
        """Serve this shelf from now on. Sessions that it no longer holds end when their last request is done."""
        self._standing.put(shelf)
        if self._caching is None and any(served.cache is not None for served in shelf.versions.values()):
            self._caching = self._make_caching()
        if self._caching is not None:
            self._caching.put(shelf)

    def _make_caching(self) -> Caching:
        from agent.infer.caching import Around, Caching  # noqa: PLC0415 - most devices keep no answers

        def touched(served: Served, keep_s: float) -> None:
            if (resident := self._standing.now(served)) is not None:
                self._loader.touch(resident.name, keep_s)

        return Caching(
            Around(
                resident=self._standing.now,
                touched=touched,
                replay=lambda served, request: self._answer(served, request, time.monotonic() + _REPLAY_S, NO_WISHES),
                idle=lambda: self.idle,
                reserve=self._loader.reserve,
                budget_mb=lambda: self._limits.budget_mb,
            )
        )

    def clear_cache(self, name: str | None = None) -> int:
        """Forget the kept answers of that model, or of all. Returns how many there were."""
        return self._caching.clear(name) if self._caching is not None else 0

    async def preload(
        self, name: str, version: str | None = None, deadline: float | None = None, wishes: Wishes = NO_WISHES
    ) -> None:
        """Load now; returns when the version can answer. Raises what keeps it from doing so."""
        resident = await self._standing.lease(self._shelf.find(name, version), deadline)
        try:
            if wishes.pin is not None:
                self._standing.pin(resident, pinned=wishes.pin)
        finally:
            self._loader.release(resident.name, wishes.keep_s)

    async def load(self, name: str, parameters: Mapping[str, Any], deadline: float) -> None:
        """The repository API's ``load``, with the parameters ``keep_alive`` and ``pin``."""
        await self.preload(name, None, deadline, wishes_of(parameters))

    def preload_soon(self, name: str, version: str | None = None) -> None:
        """Load that version, or the active one, when there is room to spare, or at least decrypt it. NotFoundError."""
        self._standing.preload(self._shelf.find(name, version))

    def unload(self, name: str) -> int:
        """Drop the model from memory; it comes back at the next request. Returns how many sessions there were."""
        self.clear_cache(name)
        return self._standing.unload(name)

    def press(self, size_mb: float) -> None:
        """The device is short of memory: give so much back, kept answers first, then what is idle."""
        if self._caching is not None and (freed := self._caching.press(int(size_mb * MIB))):
            self._loader.give_back_now()
            size_mb -= freed / MIB
        if size_mb > 0:
            self._loader.press(size_mb)

    # -- what the governor and the watch over providers ask for -------------------------------------------------------

    @property
    def shelf(self) -> Shelf:
        """What is installed."""
        return self._standing.shelf

    @property
    def switches(self) -> int:
        """How often another option took over from one that answered."""
        return self._standing.switches

    def steer(self, pressure: Pressure) -> None:
        """Have cheaper options answer, or the chosen ones again: each takes over once it is loaded."""
        self._standing.press(pressure)

    async def regain(self, provider: str) -> str:
        """A lost provider works again: its options take over. Why not, where one cannot be loaded."""
        return await self._standing.regain(provider)

    async def close(self) -> bool:
        """Stop taking requests, end runs, wait for loads under way, end every session; whether all has ended."""
        self._closing = True
        self._standing.stop()
        if self._caching is not None:
            self._caching.close()
        clean = await self._running.close(_CLOSE_S)
        clean = await self._standing.close(_CLOSE_S) and clean
        if not clean:
            _LOG.error("a load or a run did not end when told to")
        return clean

    # -- answering ----------------------------------------------------------------------------------------------------

    def infer(
        self, name: str, version: str | None, request: InferRequest, deadline: float
    ) -> InferResponse | Awaitable[InferResponse]:
        """Answer at once where the session is hot and fast, else an awaitable. ``deadline`` in ``time.monotonic()``."""
        served = self._shelf.find(name, version)
        wishes = wishes_of(request.parameters) if request.parameters else NO_WISHES
        if wishes.picks:
            return self._answer(served, request, deadline, wishes, pick(served, wishes))
        if served.cascade is not None:
            return self._cascading.answer(served, served.cascade, request, deadline, wishes)
        if served.cache is not None and self._caching is not None and wishes.cache and wishes.pin is None:
            fresh = partial(self._fresh, served, request, deadline, wishes)
            return self._caching.infer(served, request, deadline, wishes.keep_s, fresh)
        return self._fresh(served, request, deadline, wishes)

    def _fresh(
        self, served: Served, request: InferRequest, deadline: float, wishes: Wishes
    ) -> InferResponse | Awaitable[InferResponse]:
        """An answer that is computed for this request: at once on the loop, else by a run in a thread."""
        resident = self._standing.now(served)
        if (
            resident is not None
            and resident.fits_the_loop(request)
            and wishes.pin is None
            and ((joint := self._running.joint_of(resident)) is None or joint.quiet())
            and self._loader.touch(resident.name, wishes.keep_s)
        ):
            try:
                return self._running.on_loop(resident, request)
            except DeadlineError:  # its time follows from its inputs' values: it runs in threads from now on
                self._standing.keep_off_the_loop(resident)
            except ProviderLostError as error:
                self._standing.lose(resident.option, str(error))
        if self._caching is not None:
            self._caching.give_way()
        if self.give_way is not None:
            self.give_way()
        return self._answer(served, request, deadline, wishes)

    @property
    def idle(self) -> bool:
        """Whether nobody runs, or waits to."""
        return not self._waiting and self._running.idle

    def is_hot(self, name: str, version: str) -> bool:
        """Whether a session of that version is in memory."""
        served = self._shelf.versions.get((name, version))
        return served is not None and self._standing.now(served) is not None

    def aside(
        self, name: str, version: str, request: InferRequest, deadline: float
    ) -> Coroutine[Any, Any, InferResponse]:
        """An answer that nobody waits for: it is not kept."""
        return self._answer(self._shelf.find(name, version), request, deadline, NO_WISHES)

    async def _answer(
        self,
        served: Served,
        request: InferRequest,
        deadline: float,
        wishes: Wishes,
        wanted: Sequence[Option] | None = None,
    ) -> InferResponse:
        """One run in a thread, in its turn; of one of the options ``wanted``, else of whatever stands for the version.

        Where a provider fails, another option runs it.
        """
        require_options(served)
        arrays = check_inputs(served.inputs, request.inputs)  # a wrong request must not cost a load
        waiting = self._waiting.get(served.model, 0)
        if waiting >= self._limits.queue_per_model:
            raise TryLaterError(f"model '{served.model}': {waiting} requests are waiting already")
        self._waiting[served.model] = waiting + 1
        arrived = time.perf_counter()
        try:
            attempt = Attempt(self._standing, served, wanted)
            while True:
                resident = await self._standing.lease(served, deadline, attempt.pick)
                try:
                    response = await self._running.run(resident, request, arrays, (arrived, deadline), wishes)
                except (ProviderLostError, DoubtfulError) as error:
                    attempt.failed(resident, error)
                else:
                    if response is not None:
                        return attempt.answered(resident, response)
        finally:
            left = self._waiting[served.model] - 1
            if left:
                self._waiting[served.model] = left
            else:
                del self._waiting[served.model]


def _index(shelf: Shelf) -> Iterator[dict[str, str]]:
    for (model, version), served in sorted(shelf.versions.items()):
        active = shelf.active.get(model) == version
        state = "READY" if served.options and active else "UNAVAILABLE"
        reason = served.reason or ("" if active else "not the active version")
        yield {"name": model, "version": version, "state": state, "reason": reason}


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
