"""Some of what a version on probation has answered, the version before answers, too, and the answers are compared.

Never at a request's cost: one run at a time, only while nothing runs or waits, of a session that is in memory anyway,
and ended when a request comes. What finds no such moment is left out. For the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from agent.base.errors import AgentError
from agent.core.watching import Shadow
from agent.operations.probation import Case, Course

if TYPE_CHECKING:
    from agent.bundles.manifest import GoldenMetric
    from agent.infer.tensors import InferRequest, InferResponse

_LOG = logging.getLogger("edge_agent.probation")
#: Requests that wait for an idle moment, and their size together with their answers.
_MOST_WAITING, _MOST_BYTES = 8, 1 << 20
_RUN_S = 30.0
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.005, 0.25


class Runs(Protocol):
    """What it needs of the engine."""

    give_way: Callable[[], None] | None

    @property
    def idle(self) -> bool: ...
    def is_hot(self, name: str, version: str) -> bool: ...
    def preload_soon(self, name: str, version: str | None = None) -> None: ...
    def aside(
        self, name: str, version: str, request: InferRequest, deadline: float
    ) -> Coroutine[Any, Any, InferResponse]: ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    case: Case
    course: Course
    metric: GoldenMetric
    request: InferRequest
    response: InferResponse


class Shadowing:
    """``draw`` gives numbers from 0 to 1: below ``share`` a request is compared."""

    def __init__(self, engine: Runs, draw: Callable[[], float] = random.random) -> None:
        self._engine = engine
        self._draw = draw
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[InferResponse] | None = None

    def of(self, case: Case, course: Course, metric: GoldenMetric, share: float) -> Shadow | None:
        """What is to be told of the answers of that version; None where nothing is to be compared."""
        if share <= 0:
            return None
        self._engine.give_way = self._give_way
        try:
            self._engine.preload_soon(case.model, case.before)  # where there is room, it stays or comes back
        except AgentError as error:
            _LOG.info("%s: answers are not compared: %s", case.model, error)
            return None

        def shadow(asked: InferRequest, response: InferResponse) -> None:
            if self._draw() < share and len(self._waiting) < _MOST_WAITING and _size(asked, response) <= _MOST_BYTES:
                self._waiting.append(_Waiting(case, course, metric, _copied(asked), response))
                if self._task is None or self._task.done():
                    self._task = asyncio.get_running_loop().create_task(self._run())

        return shadow

    def stop(self) -> None:
        """End; harmless when repeated."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
        self._give_way()

    def _give_way(self) -> None:
        if self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        pause_s = _LEAST_PAUSE_S
        while self._waiting:
            await asyncio.sleep(pause_s)
            case = self._waiting[0].case
            if not self._engine.is_hot(case.model, case.before):
                self._waiting.clear()
            elif self._engine.idle:
                await self._compare(self._waiting.popleft())
                pause_s = _LEAST_PAUSE_S
            else:
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    async def _compare(self, waiting: _Waiting) -> None:
        case = waiting.case
        run = self._engine.aside(case.model, case.before, waiting.request, time.monotonic() + _RUN_S)
        self._running = asyncio.get_running_loop().create_task(run)
        try:
            await asyncio.wait({self._running})
        finally:
            running, self._running = self._running, None
            running.cancel()
        if running.cancelled():
            return  # a request came
        if (error := running.exception()) is None:
            waiting.course.agreed += alike(waiting.metric, running.result(), waiting.response)
            waiting.course.compared += 1
        elif not isinstance(error, AgentError):
            _LOG.error("%s %s could not be compared", case.model, case.before, exc_info=error)


def alike(metric: GoldenMetric, before: InferResponse, now: InferResponse) -> float:
    """How two answers agree, from 0 (or -1) to 1: by the golden set's metric, and by cosine where that gives no share.

    Answers that cannot be compared (another shape, another kind) do not agree.
    """
    from agent.bundles.agreement import agreement  # noqa: PLC0415 - brings numpy in

    expected, got = (_arrays(response) for response in (before, now))
    for name in dict.fromkeys(("cosine" if metric == "max_abs" else metric, "cosine")):
        try:
            value = agreement(name, expected, got)
        except AgentError:
            continue
        return 0.0 if math.isnan(value) else value
    return 0.0


def _arrays(response: InferResponse) -> dict[str, Any]:
    """Each with an axis of one example in front, as the metrics want it."""
    return {
        tensor.name: tensor.array if tensor.array.ndim > 1 else tensor.array.reshape(1, -1)
        for tensor in response.outputs
    }


def _size(asked: InferRequest, response: InferResponse) -> int:
    return sum(tensor.array.nbytes for tensor in (*asked.inputs, *response.outputs))


def _copied(asked: InferRequest) -> InferRequest:
    """Its arrays may be views of what came in, which is somebody else's by then."""
    inputs = tuple(replace(tensor, array=tensor.array.copy()) for tensor in asked.inputs)
    return replace(asked, inputs=inputs, id="", parameters={})
