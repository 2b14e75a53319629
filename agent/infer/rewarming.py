"""After a change: the hottest requests of a model are answered ahead by what answers now, when nobody wants to run.

One run at a time on the whole device, and only while nobody runs or waits; a live request that comes meanwhile ends it,
and it is tried again later. Between two runs there is a pause as long as the run. A model that is not in memory, or not
yet what was chosen, is waited for and never loaded for this. All of it ends after a while, or with the next change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from agent.infer.answering import Resident
from agent.infer.shelf import Served
from agent.infer.tensors import InferRequest, InferResponse

if TYPE_CHECKING:
    from agent.infer.favourites import Favourite

#: By then it is done, or given up.
MOST_S = 60.0
#: How often an input is begun again after a live request has ended its run.
_TRIES = 3
#: How long to wait before looking again whether the device is idle: at first, and at most.
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.005, 0.25
_LOG = logging.getLogger("edge_agent.engine")


class Runs(Protocol):
    """What it needs of the engine: see ``caching.Around``."""

    @property
    def resident(self) -> Callable[[Served], Resident | None]: ...
    @property
    def replay(self) -> Callable[[Served, InferRequest], Coroutine[Any, Any, InferResponse]]: ...
    @property
    def idle(self) -> Callable[[], bool]: ...


class Rewarming:
    """At most one task a model. ``keep`` takes what comes of a run. For the event loop's thread."""

    def __init__(self, around: Runs, keep: Callable[[Served, Favourite, InferResponse], None]) -> None:
        self._around = around
        self._keep = keep
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: asyncio.Task[InferResponse] | None = None

    def begin(self, served: Served, favourites: Sequence[Favourite]) -> None:
        """Answer these again by that version. Whatever was under way for the model ends."""
        self.cancel(served.model)
        wanted = [(favourite, favourite.request) for favourite in favourites if favourite.request is not None]
        if wanted:
            task = asyncio.get_running_loop().create_task(self._rewarm(served, wanted))
            self._tasks[served.model] = task
            task.add_done_callback(lambda done: self._ended(served.model, done))

    def cancel(self, model: str) -> None:
        """Something has changed again."""
        task = self._tasks.pop(model, None)
        if task is not None:
            task.cancel()

    def give_way(self) -> None:
        """Somebody wants to run."""
        if self._running is not None:
            self._running.cancel()

    def _ended(self, model: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(model) is task:
            del self._tasks[model]
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("model %s: re-warming has failed", model, exc_info=error)

    async def _rewarm(self, served: Served, wanted: Sequence[tuple[Favourite, InferRequest]]) -> None:
        end = time.monotonic() + MOST_S
        done = 0
        for favourite, request in wanted:
            for _ in range(_TRIES):
                if not await self._turn(served, end):
                    return
                begun = time.monotonic()
                response = await self._run(served, request)
                if isinstance(response, InferResponse):
                    self._keep(served, favourite, response)
                    done += 1
                await asyncio.sleep(max(_LEAST_PAUSE_S, time.monotonic() - begun))
                if response is not None:
                    break
        _LOG.info("model %s %s: %d answers of before are there again", served.model, served.version, done)

    async def _turn(self, served: Served, end: float) -> bool:
        """Wait until it may run; False when that takes too long."""
        pause_s = _LEAST_PAUSE_S
        while not self._may_run(served):
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)
        return True

    def _may_run(self, served: Served) -> bool:
        resident = self._around.resident(served)
        return (
            self._running is None
            and resident is not None
            and resident.option.candidate == served.options[0].candidate
            and self._around.idle()
        )

    async def _run(self, served: Served, request: InferRequest) -> InferResponse | BaseException | None:
        """One run: its answer, why there is none, or None when it had to give way."""
        run = self._running = asyncio.get_running_loop().create_task(self._around.replay(served, request))
        try:
            await asyncio.wait({run})
        finally:
            self._running = None
            run.cancel()  # no longer wanted itself
        return None if run.cancelled() else run.exception() or run.result()
