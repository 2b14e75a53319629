"""Durable file operations: atomic write, fsync, locks, bounded reads.

Invariants: a file written here is either wholly there or not at all, and when a function returns, its effect
survives power loss (data and directory entry are flushed). Nothing here follows a symbolic link that it writes to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from agent.base.errors import ConflictError, RefusedError

#: Temporary names start with this, so that a sweep can recognise what a kill left behind.
TEMPORARY_PREFIX = ".tmp-"


def fsync_directory(path: Path) -> None:
    """Flush a directory, so that renames and deletions in it survive power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_own(path: Path) -> None:
    """RefusedError where another user owns the folder, or could put something of his own into it. Raises OSError."""
    status = os.stat(path)
    if status.st_uid not in (0, os.geteuid()):
        raise RefusedError(
            f"cannot use {path}: it belongs to another user (uid {status.st_uid})", hint="choose a folder of your own"
        )
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise RefusedError(f"cannot use {path}: other users may write to it", hint=f"chmod go-w {path}")


def temporary_name(path: Path) -> Path:
    """A fresh name in the same directory, recognisable as temporary."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(6)}")


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: write beside it, fsync, rename, fsync the directory. Raises OSError."""
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def read_bounded(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes from the start of ``path``. Raises OSError. Never blocks on a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        parts: list[bytes] = []
        left = limit
        while left > 0:
            part = stream.read(min(left, 1 << 16))
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on ``path`` (made if missing) for the block; ConflictError when somebody has it.

    The kernel drops the lock when the holder dies, so a killed daemon never leaves a stale one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                f"cannot lock {path}: another process has it", hint="stop the other daemon on this folder"
            ) from error
        yield
    finally:
        os.close(descriptor)
