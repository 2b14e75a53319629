"""One SQLite file that survives kills and power cuts: opening, versions, transactions, errors that say who must act.

A later version may have written it: the one that took over for a while and then gave way again. Where that one says, in
``application_id``, that this version may go on, it does, and passes over what it does not know (docs/spec/jobs.md 5).

Invariants: what ``write`` has left is on the disk (WAL, synchronous=FULL) unless it was asked to be lax, when it is on
the disk with the next that was not; under its name the file is never half made; one process has it at a time; another
user's file, or one that others could open, is not read. Any thread may call: a lock lets one in at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.base.errors import AgentError, ConflictError, DamagedError, TryLaterError, UnsupportedError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, read_bounded

_SETTINGS = (
    "PRAGMA locking_mode = EXCLUSIVE",  # and so no -shm file: the index of the WAL is kept in memory
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA cache_size = -512",
    "PRAGMA journal_size_limit = 1048576",
    "PRAGMA trusted_schema = OFF",
)
_SMALLEST_PAGE = 512
#: Magic, page size, and twice that the file is used with a WAL (sqlite.org/fileformat2 1.3).
_HEADER = re.compile(rb"SQLite format 3\x00..\x02\x02", re.DOTALL)
HINT = "check the disk, and the owner and mode of the file; 'edge-agent jobs reset' moves it aside and begins a new one"


class Database:
    """The file ``path`` with the tables that ``versions`` make. ``step`` is told of each commit, before and after."""

    def __init__(
        self, path: Path, versions: Sequence[Sequence[str]], step: Callable[[str], None] = lambda name: None
    ) -> None:
        self.path = path
        self._fresh = path.with_name(TEMPORARY_PREFIX + path.name)
        self._versions = versions
        self._step = step
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._lax = False

    def open(self) -> None:
        """Make the file where there is none, check it, carry it over to the present version.

        DamagedError, TryLaterError (no room), ConflictError (somebody has it), UnsupportedError (a later version).
        """
        with translated("open the job journal", self.path):
            if not os.path.lexists(self.path):
                if not self._is_prepared():
                    if wal_of(self.path).exists():
                        raise sqlite3.DatabaseError("the file is gone, its log is not")
                    self.prepare()
                self.place()
            _require_own_file(self.path)
            connection = _connect(self.path)
            try:
                _require_sound(connection)
                self._carry_over(connection)
                _require_tables(connection, self._versions, later=_number(connection, "user_version"))
            except BaseException:
                connection.close()
                raise
        self._connection = connection

    def prepare(self, first: str = "SELECT 1", values: Sequence[Any] = ()) -> None:
        """Make a new file beside ``path``; ``first`` is done in it. Raises sqlite3.Error, OSError."""
        for leftover in (self._fresh, wal_of(self._fresh)):
            leftover.unlink(missing_ok=True)
        os.close(os.open(self._fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        with contextlib.closing(_connect(self._fresh)) as connection:
            self._carry_over(connection, (first, values))

    def place(self) -> None:
        """Put what was prepared under its name, where nothing is. Raises OSError."""
        self._step("before: begin a new journal")
        wal_of(self.path).unlink(missing_ok=True)  # it would be read into the new file
        os.rename(self._fresh, self.path)
        fsync_directory(self.path.parent)
        self._step("after: begin a new journal")

    def _is_prepared(self) -> bool:
        """Whether a new file was made in full, and the kill came before it was put under its name."""
        if not self._fresh.exists() or wal_of(self._fresh).exists():
            return False
        with contextlib.closing(_connect(self._fresh)) as connection:
            return bool(connection.execute("PRAGMA user_version").fetchone()[0])

    def close(self) -> None:
        """Flush and let go; harmless when repeated."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def write(self, what: str, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, ``what`` reads "cannot …". When it was ``durable``, it is on the disk after the block."""
        with self._lock, translated(what, self.path):
            connection = self._connected()
            self._be_lax(connection, not durable)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                self._step(f"before: {what}")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise
            self._step(f"after{'' if durable else ', lax'}: {what}")

    def read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock, translated("read the job journal", self.path):
            return self._connected().execute(sql, values).fetchall()

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            raise TryLaterError("cannot use the job journal: it is not open")
        return self._connection

    def _be_lax(self, connection: sqlite3.Connection, lax: bool) -> None:
        """Between FULL and NORMAL, which in WAL mode differ by the flush at each commit alone (sqlite.org/pragma)."""
        if lax != self._lax:
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if lax else 'FULL'}")
            self._lax = lax

    def _carry_over(self, connection: sqlite3.Connection, first: tuple[str, Sequence[Any]] | None = None) -> None:
        version, oldest = _number(connection, "user_version"), _number(connection, "application_id")
        known = len(self._versions)
        if version > known and not 0 < oldest <= known:
            raise UnsupportedError(
                f"cannot open the job journal: {self.path} is of version {version}, this agent knows up to {known}",
                hint="run the agent that wrote it; 'edge-agent jobs reset' moves the journal aside",
            )
        if first is None and version < 1:
            raise sqlite3.DatabaseError("there is nothing in it")
        connection.execute("BEGIN IMMEDIATE")  # also where there is nothing to do: a file that cannot be written shows
        for number in range(version, known):
            for statement in self._versions[number]:
                connection.execute(statement)
        if first is not None:
            connection.execute(*first)
        if version < known:
            connection.execute(f"PRAGMA user_version = {known}")
            self._step("before: carry the journal over")
        connection.execute("COMMIT")


def wal_of(path: Path) -> Path:
    """SQLite's write-ahead log of a database."""
    return path.with_name(f"{path.name}-wal")


@contextlib.contextmanager
def translated(what: str, path: Path) -> Iterator[None]:
    """Turns the errors of SQLite and of the disk into ours; ``what`` reads "cannot …"."""
    try:
        yield
    except sqlite3.Error as error:
        raise _trouble(error, what, path) from error
    except UnicodeDecodeError as error:  # what SQLite says of a damaged table quotes it
        raise DamagedError(f"cannot {what}: its tables make no sense: {path}", hint=HINT) from error
    except OSError as error:
        text = f"cannot {what}: {error.strerror}: {path}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            raise TryLaterError(text, hint="free space, memory or descriptors") from error
        raise DamagedError(text, hint=HINT) from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        for setting in _SETTINGS:
            connection.execute(setting)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_sound(connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(str(found).splitlines()[-1])


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _require_tables(connection: sqlite3.Connection, versions: Sequence[Sequence[str]], later: int) -> None:
    """A damaged page may still read as tables, of other columns: those that there must be, and no others.

    In a file of a ``later`` version there may be more: tables, and columns that need not be written.
    """
    told = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        for version in versions:
            for statement in version:
                fresh.execute(statement)
        expected = [tuple(row) for row in fresh.execute(told)]
        columns = {name: _columns(fresh, name) for kind, name, *_ in expected if kind == "table"}
    if later > len(versions):
        fits = all(_covers(_columns(connection, name), known) for name, known in columns.items())
    else:
        fits = [tuple(row) for row in connection.execute(told)] == expected
    if not fits:
        raise sqlite3.DatabaseError("its tables are not those of a job journal")


def _columns(connection: sqlite3.Connection, table: str) -> dict[str, tuple[Any, ...]]:
    """Type, whether it must be given, default and place in the key of each column (sqlite.org/pragma, table_info)."""
    return {row[1]: tuple(row[2:6]) for row in connection.execute("SELECT * FROM pragma_table_info(?)", (table,))}


def _covers(found: dict[str, tuple[Any, ...]], known: dict[str, tuple[Any, ...]]) -> bool:
    more = [row for name, row in found.items() if name not in known]
    return {name: found.get(name) for name in known} == known and not any(row[1] and row[2] is None for row in more)


def _trouble(error: sqlite3.Error, what: str, path: Path) -> AgentError:
    """By text: Python 3.10 hands out no codes."""
    text = f"cannot {what}: {error}: {path}"
    if "full" in str(error) or "out of memory" in str(error):
        return TryLaterError(text, hint="free space, memory or descriptors")
    if "locked" in str(error):
        return ConflictError(text, hint="stop the other agent on this folder")
    return DamagedError(text, hint=HINT)


def _require_own_file(path: Path) -> None:
    """Refuse a file that is not ours, or no journal: to open it would change it. Raises OSError, DamagedError."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        reason = "it is no regular file"
    elif status.st_uid != os.geteuid():
        reason = f"it belongs to another user (uid {status.st_uid})"
    elif status.st_mode & 0o077:
        reason = f"other users may open it (mode {stat.S_IMODE(status.st_mode):04o})"
    elif status.st_size < _SMALLEST_PAGE:
        reason = "there is nothing in it"  # SQLite would begin a new database
    elif not _HEADER.match(read_bounded(path, 20)):
        reason = "it does not begin like one"  # SQLite would delete its log
    else:
        return
    raise DamagedError(f"cannot open the job journal: {reason}: {path}", hint=HINT)
