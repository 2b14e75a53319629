"""The tables of the outbox, and what is done to them within one transaction. No files, no policy on damage.

``records`` holds what waits; one that belongs to a message has its number. ``streams`` holds, for each stream, what it
takes and what was given up since its last message: sums over the records themselves would read all of them.

A record's key is the number of its stream, then its place in the order of all: so a stream lies together, and when the
oldest of one stream are dropped whole pages become free. In the order of arrival the file would outgrow its cap by the
gaps.
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
CREATE TABLE streams (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    records INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, dropped INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE messages (seq INTEGER PRIMARY KEY, stream INTEGER NOT NULL, dropped INTEGER NOT NULL);
CREATE TABLE records (id INTEGER PRIMARY KEY, size INTEGER NOT NULL, seq INTEGER, body TEXT NOT NULL);
CREATE INDEX records_numbered ON records (seq, id) WHERE seq IS NOT NULL
"""
_META = {"next": "1", "newest": "0", "dropped": "0", "last": "[]"}
#: Bits of a record's key that tell its place; above them the number of the stream.
_PLACE_BITS = 40
_PLACE = (1 << _PLACE_BITS) - 1


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
        database.executemany("INSERT INTO meta VALUES (?, ?)", {"id": secrets.token_hex(8), **_META}.items())
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


def _number_of(database: sqlite3.Connection, stream: str) -> int:
    """The number of a stream, which gets one when it has none."""
    database.execute("INSERT OR IGNORE INTO streams (name) VALUES (?)", (stream,))
    (found,) = database.execute("SELECT number FROM streams WHERE name = ?", (stream,)).fetchone()
    return int(found)


def _keys(stream: int, after: int = 0) -> tuple[int, int]:
    """Keys between which the records of a stream lie that came after ``after``, both exclusive."""
    return stream << _PLACE_BITS | after, (stream + 1) << _PLACE_BITS


def _change(database: sqlite3.Connection, stream: int, records: int, size: int) -> None:
    change = "UPDATE streams SET records = records + ?, bytes = bytes + ? WHERE number = ?"
    database.execute(change, (records, size, stream))


def insert(database: sqlite3.Connection, stream: str, body: str) -> None:
    """One record more."""
    number, place, size = _number_of(database, stream), int(meta(database, "newest")) + 1, len(body) + ROW_BYTES
    key = number << _PLACE_BITS | (place & _PLACE)
    database.execute("INSERT INTO records (id, size, body) VALUES (?, ?, ?)", (key, size, body))
    set_meta(database, "newest", str(place))
    _change(database, number, 1, size)


def count_dropped(database: sqlite3.Connection, stream: str, count: int) -> None:
    """Records that were given up, for the next message of their stream to say."""
    _count_dropped(database, _number_of(database, stream), count)


def _count_dropped(database: sqlite3.Connection, stream: int, count: int) -> None:
    database.execute("UPDATE streams SET dropped = dropped + ? WHERE number = ?", (count, stream))
    set_meta(database, "dropped", str(int(meta(database, "dropped")) + count))


def trim(database: sqlite3.Connection, cap: int, goal: int) -> None:
    """When there is more than ``cap``, drop the oldest records of the largest stream until there is at most ``goal``.

    The largest stream: one that talks too much pays for it itself.
    """
    _, size, _ = totals(database)
    if size <= cap:
        return
    while size > goal and (freed := _drop_oldest(database, size - goal)):
        size -= freed


def _drop_oldest(database: sqlite3.Connection, wanted: int) -> int:
    """Drop from the largest stream what is wanted of it, but at most half; the bytes that gives.

    Records of messages stay, and are few; a stream that has nothing else is passed over.
    """
    for stream, held in database.execute("SELECT number, bytes FROM streams ORDER BY bytes DESC").fetchall():
        freed = count = last = 0
        for key, size in database.execute(
            "SELECT id, size FROM records WHERE id > ? AND id < ? AND seq IS NULL ORDER BY id", _keys(stream)
        ):
            freed, count, last = freed + size, count + 1, key
            if freed >= min(wanted, held // 2):
                break
        if count:
            lowest, _ = _keys(stream)
            database.execute("DELETE FROM records WHERE id > ? AND id <= ? AND seq IS NULL", (lowest, last))
            _change(database, stream, -count, -freed)
            _count_dropped(database, stream, count)
            return freed
    return 0


def oldest_stream(database: sqlite3.Connection, after: int) -> int | None:
    """The stream with the oldest of the waiting records that came after ``after``."""
    best: tuple[int, int] | None = None
    first = "SELECT id FROM records WHERE id > ? AND id < ? AND seq IS NULL ORDER BY id LIMIT 1"
    for (stream,) in database.execute("SELECT number FROM streams WHERE records > 0").fetchall():
        row = database.execute(first, _keys(stream, after)).fetchone()
        if row is not None and (best is None or row[0] & _PLACE < best[0]):
            best = row[0] & _PLACE, stream
    return best and best[1]


def numbered(database: sqlite3.Connection, but: Collection[int]) -> Numbered | None:
    """The first message that has its number and is none of ``but``."""
    every = "SELECT seq, name, messages.dropped FROM messages JOIN streams ON number = stream ORDER BY seq"
    for seq, name, dropped in database.execute(every):
        if seq not in but:
            bodies = database.execute("SELECT body FROM records WHERE seq = ? ORDER BY id", (seq,)).fetchall()
            return Numbered(seq, name, dropped, [body for (body,) in bodies])
    return None


def number(database: sqlite3.Connection, stream: int, after: int, room: int) -> Numbered:
    """Make the next message of ``stream``: its waiting records after ``after``, as many as fit into ``room`` bytes."""
    lowest, highest = _keys(stream, after)
    bodies: list[str] = []
    last = lowest
    waiting = database.execute(
        "SELECT id, body FROM records WHERE id > ? AND id < ? AND seq IS NULL ORDER BY id", (lowest, highest)
    )
    for key, body in waiting:
        room -= len(body) + 1
        if bodies and room < 0:
            break
        bodies.append(body)
        last = key
    waiting.close()
    seq = int(meta(database, "next"))
    name, dropped = database.execute("SELECT name, dropped FROM streams WHERE number = ?", (stream,)).fetchone()
    database.execute("INSERT INTO messages VALUES (?, ?, ?)", (seq, stream, dropped))
    mark = "UPDATE records SET seq = ? WHERE id > ? AND id <= ? AND seq IS NULL"
    database.execute(mark, (seq, lowest, last))
    database.execute("UPDATE streams SET dropped = 0 WHERE number = ?", (stream,))
    set_meta(database, "next", str(seq + 1))
    return Numbered(seq, name, dropped, bodies)


def forget(database: sqlite3.Connection, seq: int) -> None:
    """Drop a message with its records. Harmless when it is gone."""
    row = database.execute("SELECT stream FROM messages WHERE seq = ?", (seq,)).fetchone()
    if row is None:
        return
    held = database.execute("SELECT count(*), coalesce(sum(size), 0) FROM records WHERE seq = ?", (seq,))
    count, size = held.fetchone()
    database.execute("DELETE FROM records WHERE seq = ?", (seq,))
    database.execute("DELETE FROM messages WHERE seq = ?", (seq,))
    _change(database, row[0], -count, -size)


def totals(database: sqlite3.Connection) -> tuple[int, int, int]:
    """Records and bytes that are held, and records given up since the outbox was begun."""
    held = database.execute("SELECT coalesce(sum(records), 0), coalesce(sum(bytes), 0) FROM streams")
    records, size = held.fetchone()
    return int(records), int(size), int(meta(database, "dropped"))


def newest(database: sqlite3.Connection) -> int:
    """The place of the record that was stored last."""
    return int(meta(database, "newest"))


def last_marks(database: sqlite3.Connection) -> set[str]:
    """Digests of the records of the last hand-over."""
    marks: list[str] = json.loads(meta(database, "last"))
    return set(marks)
