"""Setting a damaged journal aside, on request alone: it holds what keeps jobs from being run twice.

A new journal takes over the counters of the old one where they can still be read. Where not, it takes nothing more in
the present enrolment: a retained job might have been run before. A new enrolment restarts the counters.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import DamagedError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory
from agent.work.database import Database
from agent.work.schema import VERSIONS

#: No document has a higher counter (docs/spec/link.md 3).
_CLOSED = (1 << 53) - 1


@dataclass(frozen=True, slots=True)
class SetAside:
    """Where the old journal is now, None where there was none; without its counters the device must be enrolled anew."""

    path: Path | None
    counters_kept: bool


def set_aside(path: Path, epoch: int, stamp: str, step: Callable[[str], None] = lambda name: None) -> SetAside:
    """Put a new journal in the place of the one at ``path``, which nobody has open. ``epoch`` is the present enrolment.

    ``stamp`` names the old one. Jobs that were open are lost. DamagedError where the folder cannot be written to.
    """
    try:
        counters = _salvaged(path)
        fresh = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        for leftover in (fresh, _wal(fresh)):
            leftover.unlink(missing_ok=True)
        _make(fresh, counters or (epoch, _CLOSED, _CLOSED, _CLOSED), step)
        aside = path.with_name(f"{path.name}.damaged-{stamp}") if os.path.lexists(path) else None
        if aside is not None:
            os.rename(path, aside)
        # A WAL that stayed would be read into the new file.
        with contextlib.suppress(FileNotFoundError):
            os.rename(_wal(path), _wal(aside or path.with_name(f"{path.name}.damaged-{stamp}")))
        os.rename(fresh, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise DamagedError(f"cannot set the job journal aside: {error.strerror}: {error.filename}") from error
    return SetAside(aside, counters is not None)


def _salvaged(path: Path) -> tuple[int, ...] | None:
    """The counters of a journal that may be damaged; None where they cannot be read."""
    if not path.is_file() or path.is_symlink():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=1.0)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            row = connection.execute("SELECT epoch, generation, seq, desired_version FROM counters").fetchone()
    except sqlite3.Error:
        return None
    if row is None or not all(isinstance(value, int) and 0 <= value <= _CLOSED for value in row):
        return None
    return tuple(row)


def _make(path: Path, counters: tuple[int, ...], step: Callable[[str], None]) -> None:
    database = Database(path, VERSIONS, step)
    database.open()
    try:
        with database.write("begin a new journal") as db:
            db.execute("UPDATE counters SET epoch = ?, generation = ?, seq = ?, desired_version = ?", counters)
    finally:
        database.close()


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")
