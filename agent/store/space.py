"""Room for blobs: the quota, and what the disk really has. Both are reserved before the first byte is written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.base.errors import TooLargeError, TryLaterError

#: Kept free for headers, catalog generations and the journal: a full disk must not stop their commits.
MARGIN_BYTES = 4 << 20


class Space:
    """Reservations in bytes for the blobs in ``folder``. ``used`` tells what finished files hold. Thread-safe."""

    def __init__(self, folder: Path, quota_bytes: int, used: Callable[[], int]) -> None:
        self._folder = folder
        self._quota = quota_bytes
        self._used = used
        self._lock = threading.Lock()
        self._reservations: dict[object, int] = {}

    def reserved(self) -> int:
        """Bytes promised to writes under way."""
        return sum(list(self._reservations.values()))

    def free(self) -> int:
        """Bytes that the file system has for us."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[Callable[[int], None]]:
        """Hold ``size`` bytes for the block; the value given raises the reservation to a total, if it is more."""
        token = object()

        def grow(total: int) -> None:
            with self._lock:
                if total > self._reservations.get(token, 0):
                    self._require(total - self._reservations.get(token, 0), total)
                    self._reservations[token] = total

        grow(size)
        try:
            yield grow
        finally:
            with self._lock:
                self._reservations.pop(token, None)

    def _require(self, more: int, total: int) -> None:
        if total > self._quota:
            raise TooLargeError(
                f"cannot store: {total} bytes are more than the quota of {self._quota}", hint="raise the store's quota"
            )
        if self._used() + self.reserved() + more > self._quota:
            raise TryLaterError(
                f"cannot store: the quota of {self._quota} bytes is used up",
                hint="remove a model, run 'edge-agent store gc', or raise the store's quota",
            )
        # What others reserved may be written already; counting it twice errs on the safe side.
        if self.free() < self.reserved() + more + MARGIN_BYTES:
            raise TryLaterError(
                f"cannot store: the disk has {self.free()} bytes free",
                hint="free space on the disk of the state folder",
            )
