"""The journal's small tables: refused documents, maintenance, and facts that outlive a start."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.base.clock import Clock
from agent.work.database import Database

#: Refusals cost the sender nothing: they must not wear out the flash.
_FLUSH_EVERY_S = 60.0
#: Reason codes are a short list; what is not on it would be a bug, and must not fill the disk.
_MAX_CODES = 64


class Refusals:
    """Counters by reason code, written at most once a minute: a kill loses no more than that."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._lock = threading.Lock()
        self._fresh: dict[str, int] = {}
        self._flushed_at = clock.monotonic()

    def count(self, code: str) -> None:
        """One more."""
        with self._lock:
            if code in self._fresh or len(self._fresh) < _MAX_CODES:
                self._fresh[code] = self._fresh.get(code, 0) + 1
            due = self._clock.monotonic() - self._flushed_at >= _FLUSH_EVERY_S
        if due:
            self.flush()

    def counts(self) -> dict[str, int]:
        """All of them, by code."""
        with self._lock:
            counts = {row["code"]: row["count"] for row in self._db.read("SELECT * FROM refusals")}
            for code, number in self._fresh.items():
                counts[code] = counts.get(code, 0) + number
        return dict(sorted(counts.items()))

    def flush(self) -> None:
        """Write what was counted since."""
        with self._lock:
            self._flushed_at = self._clock.monotonic()
            if not self._fresh:
                return
            with self._db.write("count refused documents", durable=False) as db:
                db.executemany(
                    "INSERT INTO refusals (code, count) VALUES (?, ?) "
                    "ON CONFLICT (code) DO UPDATE SET count = count + excluded.count",
                    list(self._fresh.items()),
                )
            self._fresh.clear()


@dataclass(frozen=True, slots=True)
class Task:
    """A recurring task of maintenance and its last run. ``ok`` is None while it has not ended once."""

    task: str
    started_at: str | None
    ended_at: str | None
    ok: bool | None
    text: str
    data: Mapping[str, Any]


class Maintenance:
    """What was done last, by task."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def started(self, task: str, at: str) -> None:
        """A run begins at ``at`` (RFC 3339)."""
        with self._db.write("note maintenance") as db:
            db.execute(
                "INSERT INTO maintenance (task, started_at) VALUES (?, ?) "
                "ON CONFLICT (task) DO UPDATE SET started_at = excluded.started_at",
                (task, at),
            )

    def ended(self, task: str, at: str, *, ok: bool, text: str = "", data: Mapping[str, Any] | None = None) -> None:
        """It is over."""
        with self._db.write("note maintenance") as db:
            db.execute(
                "INSERT INTO maintenance (task, ended_at, ok, text, data) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (task) DO UPDATE SET ended_at = excluded.ended_at, ok = excluded.ok, "
                "text = excluded.text, data = excluded.data",
                (task, at, int(ok), text, json.dumps(dict(data or {}), allow_nan=False)),
            )

    def tasks(self) -> dict[str, Task]:
        """By name."""
        return {
            row["task"]: Task(
                row["task"], row["started_at"], row["ended_at"], None if row["ok"] is None else bool(row["ok"]),
                row["text"], json.loads(row["data"]),
            )
            for row in self._db.read("SELECT * FROM maintenance ORDER BY task")
        }  # fmt: skip


class Facts:
    """Short texts by name."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def get(self, name: str) -> str | None:
        """None when it was never put."""
        rows = self._db.read("SELECT value FROM facts WHERE name = ?", name)
        return rows[0]["value"] if rows else None

    def put(self, name: str, value: str | None) -> None:
        """Durable on return; None deletes it."""
        with self._db.write("note a fact") as db:
            if value is None:
                db.execute("DELETE FROM facts WHERE name = ?", (name,))
            else:
                db.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))
