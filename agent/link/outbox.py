"""Telemetry on disk until the broker has it: a bounded SQLite file. docs/spec/link.md 5.

Invariants: what one call stores is stored as a whole or not at all; a message, once it has its number, keeps its
records until the broker has confirmed it, so that ``(outbox, seq)`` never means two things; over the cap the oldest
records of the largest stream go first, and the next message of that stream says how many. Nothing here ever keeps the
link from its work: a damaged file is moved aside and a new outbox, with a name of its own, is begun; on a full disk
records are counted as dropped.

WAL with ``synchronous=NORMAL``: a kill loses nothing, a power cut perhaps the last seconds, and the flash is spared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agent.link import tables

_LOG = logging.getLogger("edge_agent.link")
_T = TypeVar("_T")

#: 1.5 of the specification, and what surrounds the records in a message.
MAX_MESSAGE_BYTES = 64 << 10
_HEAD_BYTES = 512
_ROOM = MAX_MESSAGE_BYTES - _HEAD_BYTES
#: Over the cap a little more than needed is dropped, so that a full outbox does not drop one by one.
_AFTER_TRIM = 0.98
_MEMORY_CAP = 2 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """A message of telemetry, to be published on ``up/tel/<stream>``."""

    outbox: str
    seq: int
    stream: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Counts:
    """What the outbox holds, and how many records it has given up since it was begun."""

    records: int
    bytes: int
    dropped: int


class _Full(Exception):  # noqa: N818 - never leaves this module
    """The disk is full."""


class Outbox:
    """One writer, the link's event loop. Opened by its first use, or by ``open``."""

    def __init__(self, path: Path, cap_bytes: int) -> None:
        self._path = path
        self._cap = cap_bytes
        self._database: sqlite3.Connection | None = None
        self._backlog = 0
        #: Confirmed messages that could not be forgotten yet, and records that could not be stored.
        self._confirmed: set[int] = set()
        self._unstored: Counter[str] = Counter()
        #: The name of this outbox; a new one has another.
        self.id = ""

    # -- opening ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the file; begin a new one where it is missing or damaged."""
        if self._database is not None:
            return
        try:
            self._open(str(self._path))
        except sqlite3.Error as error:
            self._begin_anew(error)

    def _open(self, where: str) -> None:
        database = sqlite3.connect(where, isolation_level=None)
        try:
            self.id = tables.prepare(database)
            self._backlog = tables.newest(database)
        except BaseException:
            database.close()
            raise
        self._database = database

    def _begin_anew(self, error: sqlite3.Error) -> None:
        aside = self._path.with_name(self._path.name + ".damaged")
        _LOG.error("the outbox is damaged: %s; it is kept as %s, and a new one is begun", error, aside)
        self.close()
        try:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
            self._open(str(self._path))
        except (sqlite3.Error, OSError) as problem:
            _LOG.error("the outbox is kept in memory: %s", problem)
            self._cap = min(self._cap, _MEMORY_CAP)
            self._open(":memory:")

    def close(self) -> None:
        """Close the file. Harmless when repeated; the next use opens it again."""
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    # -- use ----------------------------------------------------------------------------------------------------------

    def add(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Store records (stream, record), in order and as one; those that the last call stored are left out.

        So a hand-over that is repeated, because its receipt was lost, is stored once.
        """
        texts = [(stream, json.dumps(record, separators=(",", ":"))) for stream, record in records]
        if not texts:
            return
        try:
            self._do(lambda database: self._add(database, texts))
        except _Full:
            self._unstored.update(stream for stream, _ in texts)
        else:
            self._unstored.clear()

    def _add(self, database: sqlite3.Connection, texts: list[tuple[str, str]]) -> None:
        known = tables.last_marks(database)
        marks = []
        for stream, text in texts:
            mark = hashlib.blake2b(f"{stream}\0{text}".encode(), digest_size=8).hexdigest()
            marks.append(mark)
            if mark in known:
                continue
            if len(text) > _ROOM:
                tables.count_dropped(database, stream, 1)
            else:
                tables.insert(database, stream, text)
        tables.set_meta(database, "last", json.dumps(marks))
        for stream, count in self._unstored.items():
            tables.count_dropped(database, stream, count)
        self._trim(database)

    def _trim(self, database: sqlite3.Connection) -> None:
        tables.trim(database, self._cap, int(self._cap * _AFTER_TRIM))

    def resize(self, cap_bytes: int) -> None:
        """Hold at most so many bytes from now on."""
        if cap_bytes != self._cap:
            self._cap = cap_bytes
            with contextlib.suppress(_Full):
                self._do(self._trim)

    def mark_backlog(self) -> None:
        """An outage is over: what is stored by now is backlog, and what comes from now on goes before it."""
        with contextlib.suppress(_Full):
            self._backlog = self._do(tables.newest)

    def next_batch(self, flying: Iterable[Batch]) -> Batch | None:
        """The next message to publish, none of ``flying``: live records first, then the backlog from its beginning."""
        but = self._confirmed | {batch.seq for batch in flying if batch.outbox == self.id}
        try:
            found = self._do(lambda database: self._next(database, but))
        except _Full:
            return None
        if found is None:
            return None
        head = {"v": 1, "outbox": self.id, "seq": found.seq, "stream": found.stream, "dropped": found.dropped}
        text = json.dumps(head, separators=(",", ":"))[:-1] + ',"records":[' + ",".join(found.bodies) + "]}"
        return Batch(self.id, found.seq, found.stream, text.encode())

    def _next(self, database: sqlite3.Connection, but: Collection[int]) -> tables.Numbered | None:
        live = tables.oldest_stream(database, self._backlog)
        if live is not None:
            return tables.number(database, live, self._backlog, _ROOM)
        begun = tables.numbered(database, but)
        if begun is not None:
            return begun
        stream = tables.oldest_stream(database, 0)
        return tables.number(database, stream, 0, _ROOM) if stream is not None else None

    def delivered(self, batch: Batch) -> None:
        """The broker has confirmed this message."""
        if batch.outbox != self.id:
            return  # of an outbox that is no more
        self._confirmed.add(batch.seq)
        try:
            self._do(self._forget_confirmed)
        except _Full:
            return  # tried again with the next one; until then it is not sent a second time
        self._confirmed.clear()

    def _forget_confirmed(self, database: sqlite3.Connection) -> None:
        for seq in self._confirmed:
            tables.forget(database, seq)

    def counts(self) -> Counts:
        """What is held, what was given up."""
        self.open()
        records, size, dropped = self._do(tables.totals)
        return Counts(records, size, dropped + self._unstored.total())

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """``work`` in one transaction. On a damaged file a new outbox is begun, and it is done there."""
        self.open()
        try:
            return self._once(work)
        except sqlite3.Error as error:
            if "full" in str(error):  # SQLITE_FULL; Python 3.10 gives its number nowhere
                raise _Full from error
            self._begin_anew(error)
            self._confirmed.clear()
            return self._once(work)

    def _once(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        assert self._database is not None
        with tables.transaction(self._database):
            return work(self._database)
