"""Setting a damaged journal aside, on request alone: it holds what keeps jobs from being run twice.

A new journal takes over the counters of the old one where they can still be read. Where not, it takes nothing more in
the present enrolment: a retained job might have been run before. A new enrolment restarts the counters.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.base.files import TEMPORARY_PREFIX
from agent.work.database import Database, translated, wal_of
from agent.work.schema import VERSIONS

#: No document has a higher counter (docs/spec/link.md 3).
_CLOSED = (1 << 53) - 1
#: More than a journal grows to.
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SetAside:
    """Where the old journal is now, None where there was none. Without its counters the device is enrolled anew."""

    path: Path | None
    counters_kept: bool


def set_aside(path: Path, epoch: int, stamp: str, step: Callable[[str], None] = lambda name: None) -> SetAside:
    """Put a new journal in the place of the one at ``path``, which nobody has open. ``epoch`` is the present enrolment.

    ``stamp`` names the old one. Jobs that were open are lost. DamagedError where the folder cannot be written to.
    """
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    with translated("set the job journal aside", path):
        counters = _salvaged(path)
        existed = os.path.lexists(path)
        database = Database(path, VERSIONS, step)
        database.prepare(
            "UPDATE counters SET epoch = ?, generation = ?, seq = ?, desired_version = ?",
            counters or (epoch, _CLOSED, _CLOSED, _CLOSED),
        )
        for old, new in ((path, aside), (wal_of(path), wal_of(aside))):
            step("before: move the old journal")
            with contextlib.suppress(FileNotFoundError):
                os.rename(old, new)
        database.place()
    return SetAside(aside if existed else None, counters is not None)


def _salvaged(path: Path) -> tuple[int, ...] | None:
    """The counters of a journal that may be damaged; None where they cannot be read. Raises OSError.

    From a copy: SQLite deletes a log whose file it does not recognise.
    """
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MOST_BYTES:
        return None
    copy = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-salvaged")
    try:
        shutil.copyfile(path, copy)
        if wal_of(path).is_file():
            shutil.copyfile(wal_of(path), wal_of(copy))
        row = _counters(copy)
    finally:
        for file in (copy, wal_of(copy)):
            file.unlink(missing_ok=True)
    if row is None or not all(isinstance(value, int) and 0 <= value <= _CLOSED for value in row):
        return None
    return row


def _counters(path: Path) -> tuple[int, ...] | None:
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            row = connection.execute("SELECT epoch, generation, seq, desired_version FROM counters").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else tuple(row)
