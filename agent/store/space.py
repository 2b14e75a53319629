"""Room for blobs: the quota, and what the disk really has. Both are reserved before the first byte is written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import TooLargeError, TryLaterError

#: Kept free for headers, catalog generations and the journal: a full disk must not stop their commits.
MARGIN_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class _Reservation:
    """``size`` bytes promised, ``announced`` of them about to be written, ``written`` of them on the disk already."""

    size: int = 0
    announced: int = 0
    written: int = 0
    on_disk: bool = False


class Hold:
    """Space that is promised over many calls, to what is downloaded in pieces. For one thread."""

    def __init__(self, space: Space, reservation: _Reservation) -> None:
        self._space = space
        self._reservation = reservation

    def wrote(self, total: int) -> None:
        """So many bytes of it lie on the disk."""
        self._reservation.written = total

    def resize(self, size: int) -> None:
        """From now on so many bytes. TooLargeError, TryLaterError when they are more and do not fit."""
        self._space.resize(self._reservation, size)

    def close(self) -> None:
        """Give it back; again is harmless."""
        self._space.drop(self._reservation)


class Space:
    """Reservations in bytes for the blobs in ``folder``. ``used`` tells what finished files hold. Thread-safe."""

    def __init__(self, folder: Path, quota_bytes: int, used: Callable[[], int]) -> None:
        self._folder = folder
        self._quota = quota_bytes
        self._used = used
        self._lock = threading.Lock()
        self._reservations: list[_Reservation] = []

    def reserved(self) -> int:
        """Bytes promised to writes under way, written or not."""
        return sum(reservation.size for reservation in list(self._reservations))

    def free(self) -> int:
        """Bytes that the file system has for us."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    @contextlib.contextmanager
    def reserve(self, size: int, *, on_disk: bool = False) -> Iterator[Callable[[int], None]]:
        """Hold ``size`` bytes for the block. The value given is told each total before the bytes up to it are written.

        ``on_disk``: the bytes lie on this file system already and need room in the quota alone. TooLargeError when it
        can never fit, TryLaterError when it does not fit now.
        """
        reservation = _Reservation(on_disk=on_disk, written=size if on_disk else 0)

        def grow(total: int) -> None:
            with self._lock:
                if total > reservation.size:
                    self._require(total, reservation)
                    reservation.size = total
                reservation.written, reservation.announced = reservation.announced, total

        with self._lock:
            self._require(size, reservation)
            reservation.size = size
            self._reservations.append(reservation)
        try:
            yield grow
        finally:
            with self._lock:
                self._reservations.remove(reservation)

    def hold(self, size: int, written: int = 0) -> Hold:
        """Promise ``size`` bytes, of which ``written`` lie on the disk, until the hold is closed. As ``reserve``."""
        reservation = _Reservation(written=written)
        with self._lock:
            self._require(size, reservation)
            reservation.size = size
            self._reservations.append(reservation)
        return Hold(self, reservation)

    def resize(self, reservation: _Reservation, size: int) -> None:
        """See ``Hold``."""
        with self._lock:
            if size > reservation.size:
                self._require(size, reservation)
            reservation.size = size

    def drop(self, reservation: _Reservation) -> None:
        """See ``Hold``."""
        with self._lock:
            if reservation in self._reservations:
                self._reservations.remove(reservation)

    def _require(self, total: int, reservation: _Reservation) -> None:
        if total > self._quota:
            raise TooLargeError(
                f"cannot store: {total} bytes are more than the quota of {self._quota}", hint="raise the store's quota"
            )
        more = total - reservation.size
        if self._used() + self.reserved() + more > self._quota:
            raise TryLaterError(
                f"cannot store: the quota of {self._quota} bytes is used up",
                hint="remove a model, run 'edge-agent store gc', or raise the store's quota",
            )
        others = (other for other in self._reservations if other is not reservation)
        unwritten = sum(max(0, other.size - other.written) for other in others)
        if self.free() < unwritten + (0 if reservation.on_disk else max(0, total - reservation.written)) + MARGIN_BYTES:
            raise TryLaterError(
                f"cannot store: the disk has {self.free()} bytes free",
                hint="free space where the state folder is",
            )
