"""The operator's database: one SQLite file, its schema and its transactions.

Invariants: one writer at a time, and what ``transaction`` encloses is there wholly or not at all, also after power loss
(WAL, synchronous=FULL); a file of a newer edge-fleet is left alone. Several commands may have it open at once; one
object is used by one thread.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from agent.base.errors import ConflictError, DamagedError, TryLaterError

#: Each brings a registry from its index as version to the next one.
MIGRATIONS = (
    """
    CREATE TABLE keys(name TEXT PRIMARY KEY, public TEXT NOT NULL UNIQUE, classes TEXT NOT NULL, added TEXT NOT NULL,
        revoked TEXT);
    CREATE TABLE devices(name TEXT PRIMARY KEY, identity TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL,
        origin TEXT NOT NULL, enrolled TEXT NOT NULL, certificate_until TEXT, board TEXT, serial TEXT,
        obeys TEXT NOT NULL, generation INTEGER NOT NULL DEFAULT 0, seq INTEGER NOT NULL DEFAULT 0,
        desired INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE past(name TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
    CREATE TABLE words(device TEXT NOT NULL, kind TEXT NOT NULL, received TEXT NOT NULL, payload TEXT NOT NULL,
        start TEXT NOT NULL, PRIMARY KEY(device, kind));
    CREATE TABLE alerts(device TEXT NOT NULL, id TEXT NOT NULL, received TEXT NOT NULL, payload TEXT NOT NULL,
        PRIMARY KEY(device, id));
    CREATE TABLE announcements(keyid TEXT PRIMARY KEY, identity TEXT NOT NULL, csr TEXT NOT NULL, board TEXT,
        serial TEXT, agent_version TEXT NOT NULL, received TEXT NOT NULL);
    CREATE TABLE documents(device TEXT NOT NULL, epoch INTEGER NOT NULL, generation INTEGER NOT NULL,
        seq INTEGER NOT NULL, job_id TEXT NOT NULL, op TEXT NOT NULL, kind TEXT NOT NULL, lane TEXT NOT NULL,
        args TEXT NOT NULL, cancels TEXT NOT NULL, envelope BLOB NOT NULL, state TEXT NOT NULL, note TEXT NOT NULL,
        given TEXT NOT NULL, published TEXT, PRIMARY KEY(device, epoch, generation));
    CREATE UNIQUE INDEX documents_by_job ON documents(job_id, device, epoch);
    CREATE INDEX documents_waiting ON documents(device, epoch, generation) WHERE state = 'waiting';
    CREATE TABLE states(device TEXT NOT NULL, epoch INTEGER NOT NULL, job_id TEXT NOT NULL, rev INTEGER NOT NULL,
        state TEXT NOT NULL, received TEXT NOT NULL, payload TEXT NOT NULL, PRIMARY KEY(job_id, device, epoch));
    CREATE TABLE dropped(device TEXT NOT NULL, what TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL,
        last TEXT NOT NULL, PRIMARY KEY(device, what, reason));
    CREATE TABLE questions(n INTEGER PRIMARY KEY, rpc_id TEXT NOT NULL, device TEXT NOT NULL, op TEXT NOT NULL,
        keyids TEXT NOT NULL, asked TEXT NOT NULL, answered TEXT, outcome TEXT);
    """,
    """
    CREATE TABLE releases(model TEXT NOT NULL, version TEXT NOT NULL, manifest BLOB NOT NULL, state TEXT NOT NULL,
        changed TEXT NOT NULL, PRIMARY KEY(model, version));
    CREATE TABLE payloads(model TEXT NOT NULL, version TEXT NOT NULL, part TEXT NOT NULL, payload TEXT NOT NULL,
        payload_size INTEGER NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL, header BLOB NOT NULL,
        PRIMARY KEY(model, version, part));
    """,
    """
    ALTER TABLE devices ADD COLUMN revoked TEXT;
    CREATE TABLE key_tables(version INTEGER PRIMARY KEY, document BLOB NOT NULL, published TEXT NOT NULL)
    """,
)
_BUSY_S = 20.0


class Database:
    """The file. A context manager; construction does no I/O. Whoever writes does so within ``transaction``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: sqlite3.Connection | None = None

    def __enter__(self) -> Database:
        try:
            if not self._path.exists():
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._open = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            self._open.row_factory = sqlite3.Row
            self._open.execute("PRAGMA journal_mode=WAL")
            self._open.execute("PRAGMA synchronous=FULL")
            self._migrate()
        except sqlite3.Error as error:
            self.close()
            raise DamagedError(f"cannot open {self._path}: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; what was not committed is as if it had not been."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def connection(self) -> sqlite3.Connection:
        """The open connection."""
        if self._open is None:
            raise RuntimeError("the database is not open")
        return self._open

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. TryLaterError when others keep it busy, DamagedError for a broken file or a full disk."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise TryLaterError(f"cannot write to {self._path}: {error}") from error
        try:
            yield
            self.connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            self._roll_back()
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise DamagedError(f"cannot write to {self._path}: {error}") from error
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def _migrate(self) -> None:
        version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise ConflictError(
                f"cannot use {self._path}: a newer edge-fleet made it (schema {version}, this knows {len(MIGRATIONS)})",
                hint="update edge-fleet here",
            )
        while version < len(MIGRATIONS):
            with self.transaction():
                version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
                for statement in MIGRATIONS[version].split(";") if version < len(MIGRATIONS) else ():
                    self.connection.execute(statement)
                version = min(version + 1, len(MIGRATIONS))
                self.connection.execute(f"PRAGMA user_version = {version:d}")
