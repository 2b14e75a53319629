"""The maintenance plan: recurring tasks, when each is due, and what came of it the last time.

A task is due when its interval has passed since it last ended, and begins in a window where one is set. Without a
clock that can be trusted the interval counts from the start of the agent, and a window never opens: a device whose
clock is years off must neither maintain itself all the time nor at noon. Results are kept in a file.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

from agent.base.clock import TrustedClock, iso
from agent.base.config import MaintenanceConfig
from agent.base.errors import AgentError, NotFoundError, TryLaterError
from agent.base.files import read_bounded, write_atomically

_LOG = logging.getLogger("edge_agent.maintenance")
#: No task in the first minutes: a start has enough to do, and a restart loop must not become a maintenance loop.
SETTLE_S = 900.0
_MOST_BYTES = 1 << 20
_LONG_AGO = datetime(1970, 1, 1, tzinfo=timezone.utc)

GoOn = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run: good or not, one line, figures."""

    ok: bool
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the plan. ``hours`` reads its interval out of the configuration."""

    name: str
    what: str
    hours: Callable[[MaintenanceConfig], float]
    run: Callable[[GoOn], Result]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last run of a task. ``ok`` is None while it has not ended once; times are RFC 3339."""

    started_at: str | None = None
    ended_at: str | None = None
    ok: bool | None = None
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class Results(Protocol):
    """Where outcomes are kept."""

    def tasks(self) -> Mapping[str, Outcome]:
        """The last outcomes by task."""
        ...

    def put(self, task: str, outcome: Outcome) -> None:
        """Keep this one."""
        ...


class ResultsFile:
    """Outcomes in one small JSON file, replaced as a whole. One that cannot be read counts as none: what it said is
    only when something was last done, and doing it again is right."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes = self._read()

    def _read(self) -> dict[str, Outcome]:
        try:
            document = json.loads(read_bounded(self._path, _MOST_BYTES))
            return {str(task): _outcome(fields) for task, fields in document.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _LOG.warning("results of maintenance are lost: %s", error)
            return {}

    def tasks(self) -> Mapping[str, Outcome]:
        """See ``Results``."""
        return self._outcomes

    def put(self, task: str, outcome: Outcome) -> None:
        """See ``Results``. TryLaterError when the disk does not take it."""
        self._outcomes = {**self._outcomes, task: outcome}
        document = {name: asdict(kept) for name, kept in self._outcomes.items()}
        try:
            write_atomically(self._path, json.dumps(document).encode())
        except OSError as error:
            raise TryLaterError(f"cannot keep what came of maintenance: {error.strerror}") from error

    def latest(self) -> datetime:
        """The latest moment that an outcome tells of: it is past, whatever the clock says."""
        moments = [_moment(outcome.ended_at) for outcome in self._outcomes.values() if outcome.ended_at]
        return max((moment for moment in moments if moment is not None), default=_LONG_AGO)


class Plan:
    """The table, and who is due. ``run`` blocks; the rest is quick."""

    def __init__(
        self,
        tasks: Sequence[Task],
        results: Results,
        config: Callable[[], MaintenanceConfig],
        clock: TrustedClock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._results = results
        self._config = config
        self._clock = clock
        self._monotonic = monotonic
        self._started = monotonic()
        self._ended: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of the table."""
        return tuple(self._tasks)

    def due(self) -> str | None:
        """The task that should begin now, if any."""
        if self._monotonic() - self._started < SETTLE_S or not self._open():
            return None
        last = self._results.tasks()
        return next((name for name, task in self._tasks.items() if self._is_due(task, last.get(name))), None)

    def _open(self) -> bool:
        config = self._config()
        if not config.window:
            return True
        if not self._clock.trusted():
            return False
        from agent.work.jobs import WindowSpec  # noqa: PLC0415 - most devices have no window
        from agent.work.windows import opening_at  # noqa: PLC0415

        now = self._clock.clock.now()
        return opening_at(WindowSpec(config.window, config.duration_s, config.tz), now).holds(now)

    def _is_due(self, task: Task, last: Outcome | None) -> bool:
        interval = task.hours(self._config()) * 3600
        if interval <= 0:
            return False
        ended = _moment(last.ended_at) if last and last.ended_at else None
        now = self._clock.clock.now()
        if self._clock.trusted() and (ended is None or ended <= now):
            return ended is None or now - ended >= timedelta(seconds=interval)
        since = self._ended.get(task.name, self._started)
        return self._monotonic() - since >= interval

    def run(self, names: Sequence[str], go_on: GoOn) -> list[dict[str, Any]]:
        """Run these now, whatever the window; their rows. NotFoundError for a task that there is not."""
        for name in names:
            if name not in self._tasks:
                raise NotFoundError(f"cannot run '{name}': no such task", hint=f"there are {', '.join(self._tasks)}")
        for name in names:
            go_on()
            self._run(self._tasks[name], go_on)
        rows = {row["task"]: row for row in self.table()}
        return [rows[name] for name in names]

    def _run(self, task: Task, go_on: GoOn) -> None:
        began = iso(self._clock.clock.now())
        try:
            result = task.run(go_on)
        except AgentError as error:
            go_on()  # a stop, or a cancelled job, is no outcome
            result = Result(ok=False, text=str(error))
        if not result.ok:
            _LOG.warning("%s: %s", task.name, result.text)
        self._ended[task.name] = self._monotonic()
        outcome = Outcome(began, iso(self._clock.clock.now()), result.ok, result.text, dict(result.data))
        self._results.put(task.name, outcome)

    def table(self) -> list[dict[str, Any]]:
        """Every task with its interval and its last outcome."""
        last, config = self._results.tasks(), self._config()
        return [_row(task, task.hours(config), last.get(name)) for name, task in self._tasks.items()]


def _outcome(fields: Mapping[str, Any]) -> Outcome:
    """An outcome as it was kept. TypeError for one that is none."""
    found = Outcome(**fields)
    texts = (found.started_at or "", found.ended_at or "", found.text)
    if not (all(isinstance(text, str) for text in texts) and isinstance(found.data, dict)):
        raise TypeError("an outcome has texts and an object")
    if found.ok not in (None, True, False):
        raise TypeError("an outcome is good or not")
    return found


def _row(task: Task, hours: float, last: Outcome | None) -> dict[str, Any]:
    return {
        "task": task.name,
        "what": task.what,
        "every_h": hours,
        "started_at": last.started_at if last else None,
        "ended_at": last.ended_at if last else None,
        "ok": last.ok if last else None,
        "text": last.text if last else "",
        "data": dict(last.data) if last else {},
    }


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
