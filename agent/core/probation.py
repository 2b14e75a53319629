"""Versions on probation: watched while they answer, and taken back where they are worse than the one before.

A case is armed before its version answers, is kept in a small file, and goes on after any kill with what it had seen
by then. Each start of the agent that was not preceded by an orderly stop counts: a version that brings the agent down
again and again is taken back before anything is served. What came of a case is kept with the version in the catalog.

State belongs to the event loop's thread; ``look``, ``arm``, ``disarm`` and ``outcome`` are called from others.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from agent.base.clock import Clock, iso
from agent.base.config import ProbationConfig
from agent.base.errors import AgentError
from agent.base.files import read_bounded, write_atomically
from agent.core.health import Finding
from agent.core.operating import Operations
from agent.core.watching import Shadow, Watching
from agent.operations.install import Installer
from agent.operations.probation import LEAST_BEFORE, LOCAL, Before, Case, Course, Outcome, Rules, Tally, Verdict
from agent.store.document import CatalogDocument, ModelEntry
from agent.store.store import Store

_LOG = logging.getLogger("edge_agent.probation")
_TICK_S, _SAVE_S, _RETRY_S = 1.0, 5.0, 15.0
_MOST_BYTES = 1 << 20


@dataclass(slots=True)
class _Watched:
    """A case under way. ``on``: its version has answered since; ``settling``: what came of it is being carried out."""

    case: Case
    course: Course
    rules: dict[str, Any]
    on: bool = False
    settling: bool = False
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What it uses. ``computed``: how often a version has answered since the start, and the mean in ms; ``shadow``
    makes what has the version before answer, too; ``changed`` is called when something can be seen to have changed."""

    store: Store
    installer: Callable[[], Installer]
    operations: Operations
    watching: Watching
    config: Callable[[], ProbationConfig]
    computed: Callable[[str, str], tuple[int, float]]
    shadow: Callable[[Case, Course], Shadow | None]
    clock: Clock
    changed: Callable[[], None]


class Probations:
    """See ``agent.operations.probation.Watcher``."""

    def __init__(self, path: Path, around: Surroundings) -> None:
        self._around = around
        self._file = _File(path)
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._looks: dict[str, tuple[str, Tally]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ticked = self._saved = 0.0
        self._taken = 0
        self._saving: asyncio.Future[None] | None = None
        self._unsaved = False
        self._stopped = False
        self._found: tuple[CatalogDocument | None, list[Finding]] = None, []  # what is wrong with which catalog

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read what was under way, before the catalog is shown; what has brought the agent down too often is taken back
        now."""
        document = self._around.store.document
        for watched in self._file.read():
            case = watched.case
            record = record_of(document, case.model, case.version)
            over = record is not None and record.get("by") == case.by != LOCAL
            if over or _active(document, case.model) != case.version:
                continue
            watched.course.starts += 1
            self._watched[case.model, case.version] = watched
            verdict = watched.course.verdict()
            if verdict.code == "interrupted":
                self._take_back_now(watched, verdict)
        if self._watched or self._file.exists:
            self._file.write(self._snapshot())

    def _take_back_now(self, watched: _Watched, verdict: Verdict) -> None:
        """Before anything is loaded: there is nothing to switch."""
        try:
            record = self._record(watched, verdict, "rolled_back")
            self._around.installer().take_back(watched.case, record, serving=False)
        except AgentError as error:
            _LOG.error("%s is worse and cannot be taken back: %s", _named(watched.case), error)
        else:
            _LOG.error("%s was taken back: %s", _named(watched.case), verdict.text)
            del self._watched[watched.case.model, watched.case.version]

    def stop(self) -> None:
        """An orderly stop: it counts for nothing."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._around.watching.close()
        if self._watched:
            for watched in self._watched.values():
                watched.course.starts -= 1
            self._file.write(self._snapshot())

    def shown(self, document: CatalogDocument) -> None:
        """Another catalog is served: who answers from now on is watched from now on."""
        for watched in self._watched.values():
            case = watched.case
            if not watched.on and _active(document, case.model) == case.version:
                watched.on = True
                shadow = self._around.shadow(case, watched.course)
                self._looks.pop(case.model, None)
                self._around.watching.follow(case.model, case.version, watched.course.new, shadow)
        self._begin()

    def _begin(self) -> None:
        if self._timer is None and self._watched and not self._stopped:
            self._ticked = time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    # -- what operations ask for --------------------------------------------------------------------------------------

    def look(self, model: str) -> None:
        """See ``Watcher``."""
        self._around.operations.on_loop(partial(self._look, model))

    def _look(self, model: str) -> None:
        version = _active(self._around.store.document, model)
        if version is None or self._stopped or any(w.on and w.case.model == model for w in self._watched.values()):
            return
        tally = Tally()
        self._looks[model] = (version, tally)
        self._around.watching.follow(model, version, tally)

    def arm(self, case: Case) -> None:
        """See ``Watcher``."""
        if case.by == LOCAL and not self._around.config().local:
            self.disarm(case.model, case.version)
            return
        self._file.write(self._around.operations.on_loop(partial(self._arm, case)))

    def _arm(self, case: Case) -> _Snapshot:
        key = (case.model, case.version)
        known = self._watched.get(key)
        if known is None or known.case.by != case.by:
            rules = self._rules(case)
            self._watched[key] = _Watched(case, Course(rules, self._before(case)), asdict(rules))
            self.shown(self._around.store.document)
        return self._snapshot()

    def _rules(self, case: Case) -> Rules:
        config = self._around.config()
        ratio = None if case.slower else config.max_latency_ratio
        return Rules(config.requests, config.seconds, config.max_error_rate, ratio, config.min_agreement)

    def _before(self, case: Case) -> Before:
        """How the version before does: as seen while the new one was tried, else as recorded since the start."""
        version, tally = self._looks.get(case.model, ("", Tally()))
        proven = self._watched.get((case.model, case.before))
        if proven is not None and proven.on:
            version, tally = case.before, proven.course.new
        if version != case.before:
            tally = Tally()
        p50_ms = tally.p50()
        if p50_ms is None:
            count, mean_ms = self._around.computed(case.model, case.before)
            p50_ms = mean_ms if count >= LEAST_BEFORE else None
        return Before(p50_ms, tally.requests, tally.failed)

    def disarm(self, model: str, version: str) -> None:
        """See ``Watcher``."""
        self._file.write(self._around.operations.on_loop(partial(self._disarm, model, version)))

    def _disarm(self, model: str, version: str) -> _Snapshot:
        self._drop(model, version)
        if (look := self._looks.pop(model, None)) is not None:
            self._around.watching.unfollow(model, look[0])
        return self._snapshot()

    def outcome(self, model: str, version: str, by: str) -> Outcome | None:
        """See ``Watcher``."""
        return self._around.operations.on_loop(partial(self._outcome, model, version, by))

    def _outcome(self, model: str, version: str, by: str) -> Outcome | None:
        watched = self._watched.get((model, version))
        if watched is not None and watched.on and watched.case.by == by:
            return Outcome("watching", seen=watched.course.told())
        record = record_of(self._around.store.document, model, version)
        if record is None or record.get("by") != by:
            return None
        return Outcome(record["state"], str(record["text"]), dict(record["seen"]))

    # -- watching -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        passed_s, self._ticked = now - self._ticked, now
        document = self._around.store.document
        for watched in list(self._watched.values()):
            if watched.on:
                self._look_at(watched, document, passed_s)
        if now - self._saved >= _SAVE_S:
            self._save()
        if self._watched and not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _look_at(self, watched: _Watched, document: CatalogDocument, passed_s: float) -> None:
        case = watched.case
        if watched.settling:
            return
        if _active(document, case.model) != case.version:
            self._drop(case.model, case.version)  # somebody has decided otherwise
            self._save()
            return
        watched.course.elapsed_s += passed_s
        verdict = watched.course.verdict()
        if verdict.state == "watching" or time.monotonic() < watched.retry_at:
            return
        try:
            self._around.operations.submit(f"probation of {_named(case)}", partial(self._settle, watched, verdict))
            watched.settling = True
        except AgentError as error:
            _LOG.warning("what came of the probation of %s must wait: %s", _named(case), error)
            watched.retry_at = time.monotonic() + _RETRY_S

    def _settle(self, watched: _Watched, verdict: Verdict) -> None:
        """On the operations' thread: take it back, or note that it stays."""
        done = False
        try:
            if verdict.state == "worse":
                self._take_back(watched, verdict)
            else:
                self._around.installer().note_probation(watched.case, self._record(watched, verdict, "passed"))
                _LOG.info("%s has passed its probation", _named(watched.case))
            done = True
        except AgentError as error:
            _LOG.error("what came of the probation of %s is not noted: %s", _named(watched.case), error)
        finally:
            self._around.operations.on_loop(partial(self._settled, watched, done=done))

    def _take_back(self, watched: _Watched, verdict: Verdict) -> None:
        case, installer = watched.case, self._around.installer()
        try:
            taken_back = installer.take_back(case, self._record(watched, verdict, "rolled_back"))
        except AgentError as error:
            self._around.operations.go_on()
            _LOG.error("%s is worse (%s) and %s cannot be had: %s", _named(case), verdict.text, case.before, error)
            kept = replace(verdict, text=f"{verdict.text}; {case.before} cannot be had: {error}")
            installer.note_probation(case, self._record(watched, kept, "kept"))
        else:
            if taken_back:
                _LOG.error("%s was taken back, %s answers: %s", _named(case), case.before, verdict.text)

    def _settled(self, watched: _Watched, *, done: bool) -> None:
        watched.settling = False
        if done:
            self._drop(watched.case.model, watched.case.version)
        else:
            watched.retry_at = time.monotonic() + _RETRY_S
        self._save()
        self._around.changed()

    def _drop(self, model: str, version: str) -> None:
        watched = self._watched.pop((model, version), None)
        if watched is not None and watched.on:
            self._around.watching.unfollow(model, version)

    def _record(self, watched: _Watched, verdict: Verdict, state: str) -> dict[str, Any]:
        return {
            "state": state,
            "by": watched.case.by,
            "before": watched.case.before,
            "at": iso(self._around.clock.now()),
            "code": verdict.code,
            "text": verdict.text,
            "seen": watched.course.told(),
        }

    # -- the file -----------------------------------------------------------------------------------------------------

    def _snapshot(self) -> _Snapshot:
        self._taken += 1
        rows = [
            {"case": asdict(w.case), "rules": w.rules, "course": w.course.to_json()} for w in self._watched.values()
        ]
        return _Snapshot(self._taken, json.dumps({"cases": rows}).encode())

    def _save(self) -> None:
        """In a thread of its own: a slow disk must not hold up requests."""
        self._unsaved = self._saving is not None
        if self._saving is None:
            self._saved = time.monotonic()
            self._saving = asyncio.get_running_loop().run_in_executor(None, self._file.write, self._snapshot())
            self._saving.add_done_callback(self._written)

    def _written(self, _: asyncio.Future[None]) -> None:
        self._saving = None
        if self._unsaved and not self._stopped:
            self._save()

    # -- telling ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Cases under way by model, for ``status``."""
        return {
            watched.case.model: {
                "version": watched.case.version,
                "before": watched.case.before,
                "by": watched.case.by,
                **watched.course.told(),
            }
            for watched in self._watched.values()
            if watched.on
        }

    def findings(self) -> list[Finding]:
        """What was taken back, as long as nothing else has come in its place."""
        document = self._around.store.document
        if self._found[0] is not document:
            self._found = document, self._findings(document)
        return self._found[1]

    def _findings(self, document: CatalogDocument) -> list[Finding]:
        found = []
        for name, model in document.models.items():
            for version, record in _records(model):
                if record["state"] == "rolled_back" and model.active == record["before"]:
                    text = f"{name} {version} was taken back, {record['before']} answers: {record['text']}"
                    mend = f"edge-agent models remove {name} --version {version}, or bring a better version"
                    found.append(Finding("probation", "warning", text, mend))
                elif record["state"] == "kept" and model.active == version:
                    found.append(Finding("probation", "error", f"{name} {version}: {record['text']}"))
        return found


class _Snapshot(NamedTuple):
    """What is to be kept; a later one has a higher number."""

    number: int
    data: bytes


class _File:
    """The cases under way. One that cannot be read counts as none: jobs arm theirs again. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._written = 0

    @property
    def exists(self) -> bool:
        return self._path.exists()

    def read(self) -> list[_Watched]:
        try:
            document = json.loads(read_bounded(self._path, _MOST_BYTES))
            return [_watched(row) for row in document["cases"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.warning("what was on probation is lost: %s", error)
            return []

    def write(self, snapshot: _Snapshot) -> None:
        """A disk that does not take it costs what was seen, and nothing else."""
        try:
            with self._lock:
                if snapshot.number > self._written:
                    write_atomically(self._path, snapshot.data)
                    self._written = snapshot.number
        except OSError as error:
            _LOG.warning("what is on probation cannot be kept: %s", error.strerror)


def _watched(row: Mapping[str, Any]) -> _Watched:
    rules = Rules(**row["rules"])
    return _Watched(Case(**row["case"]), Course.from_json(rules, row["course"]), dict(row["rules"]))


def record_of(document: CatalogDocument, model: str, version: str) -> dict[str, Any] | None:
    """What came of a version's last probation."""
    entry = document.models.get(model, ModelEntry()).versions.get(version)
    record: Any = (entry.choice or {}).get("probation") if entry is not None else None
    return record if isinstance(record, dict) else None


def _records(model: ModelEntry) -> Sequence[tuple[str, dict[str, Any]]]:
    found = ((version, (entry.choice or {}).get("probation")) for version, entry in model.versions.items())
    return [(version, record) for version, record in found if isinstance(record, dict)]


def _active(document: CatalogDocument, model: str) -> str | None:
    entry = document.models.get(model)
    return entry.active if entry is not None else None


def _named(case: Case) -> str:
    return f"{case.model} {case.version}"
