"""How well versions answer over time, kept in a small file: what apps say of answers, and golden sets run again.

Counts are written at most every ten minutes and at an orderly stop: a kill takes the last minutes of them. For the
event loop's thread, but for ``ran`` and ``told``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.base.clock import Clock, iso
from agent.base.files import read_bounded, write_atomically
from agent.core.health import Finding
from agent.operations.drift import Recheck
from agent.operations.quality import Golden, Quality
from agent.store.document import CatalogDocument

_LOG = logging.getLogger("edge_agent.quality")
_FLUSH_S = 600.0
_MOST_BYTES = 8 << 20


class QualityKept:
    """See ``agent.serve.inference.Feedback``. ``version_of`` gives the version that is meant, NotFoundError."""

    def __init__(
        self,
        path: Path,
        document: Callable[[], CatalogDocument],
        version_of: Callable[[str, str | None], str],
        clock: Clock,
    ) -> None:
        self._path = path
        self._document = document
        self._version_of = version_of
        self._clock = clock
        self._lock = threading.Lock()
        self._quality = self._read()
        self._flush: asyncio.TimerHandle | None = None

    def _read(self) -> Quality:
        try:
            return Quality.from_json(json.loads(read_bounded(self._path, _MOST_BYTES)))
        except FileNotFoundError:
            return Quality()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.warning("what was known of the quality of answers is lost: %s", error)
            return Quality()

    def judge(self, model: str, version: str | None, document: Mapping[str, Any]) -> bool:
        """Count it; False where that answer has been judged before. PeerError, NotFoundError."""
        day = self._clock.now().strftime("%Y-%m-%d")
        with self._lock:
            counted = self._quality.judge(model, self._version_of(model, version), day, document)
        if counted and self._flush is None:
            loop = asyncio.get_running_loop()
            self._flush = loop.call_later(_FLUSH_S, lambda: loop.run_in_executor(None, self._write))
        return counted

    def ran(self, model: str, version: str, found: Recheck) -> None:
        """A golden set was run again. From the operations' thread."""
        with self._lock:
            self._quality.ran(
                model, version, Golden(iso(self._clock.now()), found.metric, float(found.value), ok=found.ok)
            )

    def close(self) -> None:
        """Write what is known."""
        if self._flush is not None:
            self._flush.cancel()
            self._write()

    def _write(self) -> None:
        self._flush = None
        installed = [(name, version) for name, model in self._document().models.items() for version in model.versions]
        with self._lock:
            self._quality.keep(installed)
            data = json.dumps(self._quality.to_json(), separators=(",", ":")).encode()
        try:
            write_atomically(self._path, data)
        except OSError as error:
            _LOG.warning("the quality of answers cannot be kept: %s", error.strerror)

    def flush(self) -> None:
        """Write now. From the operations' thread."""
        self._write()

    # -- telling ------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Counts of every version that was judged."""
        with self._lock:
            return [
                {"model": model, "version": version, "correct": counts.correct, "wrong": counts.wrong}
                for model, version, counts in self._quality.counts()
            ]

    def told(self, model: str, version: str) -> dict[str, Any]:
        """For ``models show``."""
        with self._lock:
            return self._quality.told(model, version)

    def short(self, model: str, version: str) -> dict[str, Any]:
        """For the fleet."""
        with self._lock:
            return self._quality.short(model, version)

    def findings(self) -> list[Finding]:
        """Active versions whose answers have become worse, by what apps say."""
        with self._lock:
            problems = sorted(self._quality.problems())
        models = self._document().models
        return [
            Finding("quality", "warning", f"{name} {version}: {problem}")
            for name, version, problem in problems
            if name in models and models[name].active == version
        ]
