"""Which versions were published, and how their payloads open. Methods that write are called in a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from agent.fleet.database import Database

ReleaseState = Literal["staged", "published", "withdrawn"]


@dataclass(frozen=True, slots=True)
class Payload:
    """A published file: its name in the bundle, digest and size as encrypted and as it was, and its age header.

    The header holds the file key, sealed to the operator's identity.
    """

    part: str
    payload: str
    payload_size: int
    size: int
    sha256: str
    header: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Release:
    """A version. ``manifest`` as it is published, ``changed`` when it got its state."""

    model: str
    version: str
    manifest: bytes
    state: ReleaseState
    changed: str


class Releases:
    """The tables of releases and payloads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def _sql(self) -> sqlite3.Connection:
        return self._database.connection

    def all(self) -> list[Release]:
        """Every version there ever was, by name and then in the order of publishing."""
        rows = self._sql.execute("SELECT * FROM releases ORDER BY model, rowid")
        return [_release(row) for row in rows]

    def find(self, model: str, version: str) -> Release | None:
        """A version, or None."""
        row = self._sql.execute("SELECT * FROM releases WHERE model = ? AND version = ?", (model, version)).fetchone()
        return None if row is None else _release(row)

    def payloads(self, model: str, version: str) -> tuple[Payload, ...]:
        """The files of a version in the bundle's order."""
        rows = self._sql.execute(
            "SELECT * FROM payloads WHERE model = ? AND version = ? ORDER BY rowid", (model, version)
        )
        return tuple(
            Payload(row["part"], row["payload"], row["payload_size"], row["size"], row["sha256"], row["header"])
            for row in rows
        )

    def put(
        self, model: str, version: str, manifest: bytes, payloads: Sequence[Payload], state: ReleaseState, now: str
    ) -> None:
        """A version with its files, in place of what an earlier attempt left."""
        self._sql.execute("DELETE FROM releases WHERE model = ? AND version = ?", (model, version))
        self._sql.execute("DELETE FROM payloads WHERE model = ? AND version = ?", (model, version))
        self._sql.execute("INSERT INTO releases VALUES(?, ?, ?, ?, ?)", (model, version, manifest, state, now))
        self._sql.executemany(
            "INSERT INTO payloads VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (model, version, each.part, each.payload, each.payload_size, each.size, each.sha256, each.header)
                for each in payloads
            ],
        )

    def withdraw(self, model: str, version: str, now: str) -> None:
        """A version that is given out no more; the record of what it was stays."""
        self._sql.execute(
            "UPDATE releases SET state = 'withdrawn', changed = ? WHERE model = ? AND version = ?",
            (now, model, version),
        )


def _release(row: sqlite3.Row) -> Release:
    return Release(row["model"], row["version"], row["manifest"], row["state"], row["changed"])
