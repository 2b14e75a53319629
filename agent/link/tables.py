"""The tables of the outbox, and what is done to them within one transaction. No files, no policy on damage.

``records`` holds what waits; one that belongs to a message has its number. ``streams`` holds, for each stream, what it
takes and what was given up since its last message: sums over the records themselves would read all of them.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from collections.abc import Collection, Iterator
from typing import NamedTuple

VERSION = 1
#: What a row takes beside its text: id, stream, index entries.
ROW_BYTES = 64

_PRAGMAS = (
    "journal_mode=WAL", "synchronous=NORMAL", "cache_size=-256", "journal_size_limit=262144", "wal_autocheckpoint=128",
    "temp_store=MEMORY", "trusted_schema=OFF",
)  # fmt: skip
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE streams (name TEXT PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL, dropped INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE messages (seq INTEGER PRIMARY KEY, stream TEXT NOT NULL, dropped INTEGER NOT NULL);
CREATE TABLE records (
    id INTEGER PRIMARY KEY AUTOINCREMENT, stream TEXT NOT NULL, size INTEGER NOT NULL, seq INTEGER, body TEXT NOT NULL
);
CREATE INDEX records_waiting ON records (stream, id) WHERE seq IS NULL;
CREATE INDEX records_numbered ON records (seq, id) WHERE seq IS NOT NULL
"""


class Numbered(NamedTuple):
    """A message: its number, and the texts of its records."""

    seq: int
    stream: str
    dropped: int
    bodies: list[str]


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # the first error is the one to tell
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def prepare(database: sqlite3.Connection) -> str:
    """Set up the connection, make the tables where there are none; the outbox's name. sqlite3.Error when damaged."""
    for pragma in _PRAGMAS:
        database.execute(f"PRAGMA {pragma}")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        _create(database)
    elif version != VERSION:
        raise sqlite3.DatabaseError(f"its version is {version}, not {VERSION}")
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(str(verdict))
    return meta(database, "id")


def _create(database: sqlite3.Connection) -> None:
    with transaction(database):
        for statement in _SCHEMA.split(";"):
            database.execute(statement)
        known = {"id": secrets.token_hex(8), "next": "1", "dropped": "0", "last": "[]"}
        database.executemany("INSERT INTO meta VALUES (?, ?)", known.items())
        database.execute(f"PRAGMA user_version={VERSION}")


def meta(database: sqlite3.Connection, name: str) -> str:
    """One of the single values."""
    row = database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"{name} is missing")
    return str(row[0])


def set_meta(database: sqlite3.Connection, name: str, value: str) -> None:
    """Change one of the single values."""
    database.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))


def _change(database: sqlite3.Connection, stream: str, records: int, size: int, dropped: int) -> None:
    database.execute(
        "INSERT INTO streams VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
        " records = records + excluded.records, bytes = bytes + excluded.bytes, dropped = dropped + excluded.dropped",
        (stream, records, size, dropped),
    )


def insert(database: sqlite3.Connection, stream: str, body: str) -> None:
    """One record more."""
    size = len(body) + ROW_BYTES
    database.execute("INSERT INTO records (stream, size, body) VALUES (?, ?, ?)", (stream, size, body))
    _change(database, stream, 1, size, 0)


def count_dropped(database: sqlite3.Connection, stream: str, count: int) -> None:
    """Records that were given up, for the next message of their stream to say."""
    _change(database, stream, 0, 0, count)
    set_meta(database, "dropped", str(int(meta(database, "dropped")) + count))


def trim(database: sqlite3.Connection, cap: int, goal: int) -> None:
    """When there is more than ``cap``, drop the oldest records of the largest stream until there is at most ``goal``.

    The largest stream: one that talks too much pays for it itself.
    """
    _, size, _ = totals(database)
    if size <= cap:
        return
    while size > goal and (freed := _drop_oldest(database, size - goal)):  # what belongs to a message stays
        size -= freed


def _drop_oldest(database: sqlite3.Connection, wanted: int) -> int:
    """Drop from the stream that takes most, as much as is wanted of it but at most half; the bytes that gives."""
    largest = database.execute(
        "SELECT stream, sum(size) AS held FROM records WHERE seq IS NULL GROUP BY stream ORDER BY held DESC LIMIT 1"
    ).fetchone()
    if largest is None:
        return 0
    stream, held = largest
    wanted = min(wanted, held // 2)
    freed = count = last = 0
    for number, size in database.execute(
        "SELECT id, size FROM records WHERE seq IS NULL AND stream = ? ORDER BY id", (stream,)
    ):
        freed, count, last = freed + size, count + 1, number
        if freed >= wanted:
            break
    database.execute("DELETE FROM records WHERE seq IS NULL AND stream = ? AND id <= ?", (stream, last))
    _change(database, stream, -count, -freed, 0)
    count_dropped(database, stream, count)
    return freed


def oldest_stream(database: sqlite3.Connection, after: int) -> str | None:
    """The stream of the oldest waiting record after ``after``."""
    row = database.execute(
        "SELECT stream FROM records WHERE seq IS NULL AND id > ? ORDER BY id LIMIT 1", (after,)
    ).fetchone()
    return row and str(row[0])


def numbered(database: sqlite3.Connection, but: Collection[int]) -> Numbered | None:
    """The first message that has its number and is none of ``but``."""
    for seq, stream, dropped in database.execute("SELECT seq, stream, dropped FROM messages ORDER BY seq"):
        if seq not in but:
            bodies = database.execute("SELECT body FROM records WHERE seq = ? ORDER BY id", (seq,)).fetchall()
            return Numbered(seq, stream, dropped, [body for (body,) in bodies])
    return None


def number(database: sqlite3.Connection, stream: str, after: int, room: int) -> Numbered:
    """Make the next message of ``stream``: its waiting records after ``after``, as many as fit into ``room`` bytes."""
    bodies: list[str] = []
    last = after
    waiting = database.execute(
        "SELECT id, body FROM records WHERE seq IS NULL AND stream = ? AND id > ? ORDER BY id", (stream, after)
    )
    for record, body in waiting:
        room -= len(body) + 1
        if bodies and room < 0:
            break
        bodies.append(body)
        last = record
    waiting.close()
    seq = int(meta(database, "next"))
    row = database.execute("SELECT dropped FROM streams WHERE name = ?", (stream,)).fetchone()
    dropped = int(row[0]) if row else 0
    database.execute("INSERT INTO messages VALUES (?, ?, ?)", (seq, stream, dropped))
    database.execute(
        "UPDATE records SET seq = ? WHERE seq IS NULL AND stream = ? AND id > ? AND id <= ?", (seq, stream, after, last)
    )
    database.execute("UPDATE streams SET dropped = 0 WHERE name = ?", (stream,))
    set_meta(database, "next", str(seq + 1))
    return Numbered(seq, stream, dropped, bodies)


def forget(database: sqlite3.Connection, seq: int) -> None:
    """Drop a message with its records. Harmless when it is gone."""
    row = database.execute("SELECT stream FROM messages WHERE seq = ?", (seq,)).fetchone()
    if row is None:
        return
    count, size = database.execute(
        "SELECT count(*), coalesce(sum(size), 0) FROM records WHERE seq = ?", (seq,)
    ).fetchone()
    database.execute("DELETE FROM records WHERE seq = ?", (seq,))
    database.execute("DELETE FROM messages WHERE seq = ?", (seq,))
    _change(database, row[0], -count, -size, 0)


def totals(database: sqlite3.Connection) -> tuple[int, int, int]:
    """Records and bytes that are held, and records given up since the outbox was begun."""
    records, size = database.execute(
        "SELECT coalesce(sum(records), 0), coalesce(sum(bytes), 0) FROM streams"
    ).fetchone()
    return int(records), int(size), int(meta(database, "dropped"))


def newest(database: sqlite3.Connection) -> int:
    """The number of the record stored last, 0 when none is held."""
    (last,) = database.execute("SELECT coalesce(max(id), 0) FROM records").fetchone()
    return int(last)


def last_marks(database: sqlite3.Connection) -> set[str]:
    """Digests of the records of the last hand-over."""
    marks: list[str] = json.loads(meta(database, "last"))
    return set(marks)
