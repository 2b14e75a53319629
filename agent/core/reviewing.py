"""When core looks at its models again: after a start, when the owner wants something else of one, after damage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from agent.base.errors import AgentError
from agent.core.operating import Operations
from agent.operations.measured import Progress

_LOG = logging.getLogger("edge_agent.core")
#: After damage was found the models are reviewed so soon, and not again for so long.
_SOON_S, _PAUSE_S = 1.0, 30.0


class Reviews:
    """For the event loop's thread. ``review`` does the work on the operations' thread: what still holds stays."""

    def __init__(
        self, operations: Operations, review: Callable[[Progress], object], any_models: Callable[[], bool]
    ) -> None:
        self._operations = operations
        self._review = review
        self._any_models = any_models
        self._tasks: set[asyncio.Task[None]] = set()
        self._damage: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Review now: runtime, power mode or configuration may be others than when the models were tried."""
        self._begin(self._run())

    def damaged(self) -> None:
        """Something could not be used: a prepared form, for one, is made anew."""
        if self._damage is None or self._damage.done():
            self._damage = self._begin(self._run_soon())

    def stop(self) -> None:
        """End; harmless when repeated."""
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self) -> None:
        if not self._any_models():
            return
        try:
            await self._operations.run("review", self._review, lambda event: None)
        except AgentError as error:
            _LOG.warning("models were not reviewed: %s", error)

    async def _run_soon(self) -> None:
        await asyncio.sleep(_SOON_S)
        await self._run()
        await asyncio.sleep(_PAUSE_S)
