"""Maintenance in core: the plan, when it runs, and what may be believed of the clock. With a fleet or without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

from agent.base.clock import SystemClock, TrustedClock
from agent.base.config import Config
from agent.base.errors import AgentError
from agent.base.paths import Paths
from agent.core.operating import Operations, Progress
from agent.core.tasks import Means, tasks
from agent.operations.plan import Plan, ResultsFile

_LOG = logging.getLogger("edge_agent.maintenance")
#: No date before this release can be right.
_BUILT = datetime(2026, 11, 1, tzinfo=timezone.utc)
_LOOK_S = 30.0


class Upkeep:
    """``start`` and ``stop`` belong to the event loop's thread. ``config`` is what holds now."""

    def __init__(
        self,
        paths: Paths,
        config: Callable[[], Config],
        operations: Operations,
        means: Callable[[TrustedClock], Means],
        changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._operations = operations
        self._changed = changed
        self._results = ResultsFile(paths.state_dir / "maintenance.json")
        self.clock = TrustedClock(SystemClock(), config().clock.trust, max(_BUILT, self._results.latest()))
        self.plan = Plan(tasks(means(self.clock)), self._results, lambda: config().maintenance, self.clock)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for what is due."""
        self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """End; harmless when repeated."""
        if self._task is not None:
            self._task.cancel()

    def reload(self) -> None:
        """The configuration is another one."""
        self.clock.trust = self._config().clock.trust

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._operations.under_way is None and (name := self.plan.due()) is not None:
                try:
                    await self._operations.run(f"maintenance {name}", partial(self.run, [name]), lambda event: None)
                except AgentError as error:
                    _LOG.warning("maintenance %s: %s", name, error)
                self._changed()

    def run(self, names: Sequence[str], tell: Progress) -> list[dict[str, Any]]:
        """Run these tasks now, all without a name; on the operations' thread. NotFoundError."""
        return self.plan.run(names or self.plan.names, lambda: tell({"stage": "maintenance"}))

    def table(self) -> list[dict[str, Any]]:
        """The plan with its last outcomes."""
        return self.plan.table()

    def short(self) -> list[dict[str, Any]]:
        """The outcomes alone, for ``status`` and the twin."""
        return [{name: row[name] for name in ("task", "ended_at", "ok", "text")} for row in self.plan.table()]

    def status(self) -> Mapping[str, Any]:
        """For ``status``."""
        return {"clock_trusted": self.clock.trusted(), "maintenance": self.short()}
