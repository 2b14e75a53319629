"""Where the bytes of a want land: in memory, or in a file that outlives a kill.

Invariants: each piece says where it belongs, and lands there or nowhere; no byte beyond what the want takes is kept;
bytes are hashed as they are written; a file that is whole is flushed. What lies in a file from before is hashed again
and never trusted: where the whole then turns out wrong, it is fetched once more from its beginning.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from agent.base.errors import ConflictError, DamagedError, TryLaterError
from agent.base.files import fsync_directory
from agent.trust.wants import DeliveryError, Want

if TYPE_CHECKING:
    from collections.abc import Iterator

Piece = bytes | memoryview

#: What is read at once of a file from before.
_PIECE_BYTES = 1 << 20
#: So much may be lost with the power, and so much waits for the disk at once.
_FLUSH_BYTES = 8 << 20
_SHORT = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class OffsetError(ConflictError):
    """The bytes do not belong where they were brought; ``offset`` is where the next ones belong."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"cannot take these bytes: those from {offset} on are waited for")
        self.offset = offset


class Landing(Protocol):
    """Takes the bytes of one want."""

    @property
    def offset(self) -> int:
        """How many bytes are here: what is brought next begins there."""
        ...

    def write(self, offset: int, piece: Piece) -> None:
        """Take a piece. OffsetError; DeliveryError too_long; what the disk says."""
        ...

    def finish(self, offset: int, last: bool) -> bool:
        """Whether all is here, and right. OffsetError; DeliveryError wrong_content; what the disk says."""
        ...


class Memory:
    """Into memory, for what is small. It begins anew with every piece for its beginning."""

    offset = 0  # what others are told: nothing of it would survive, and its source may have changed

    def __init__(self, want: Want) -> None:
        self._want = want
        self._found = bytearray()

    @property
    def data(self) -> bytes:
        """What has landed."""
        return bytes(self._found)

    def write(self, offset: int, piece: Piece) -> None:
        """See ``Landing``."""
        if offset == 0:
            self._found.clear()
        self._require(offset)
        if offset + len(piece) > self._want.most:
            raise DeliveryError("too_long", f"{self._want.path} has more than {self._want.most} bytes")
        self._found += piece

    def finish(self, offset: int, last: bool) -> bool:
        """See ``Landing``."""
        self._require(offset)
        want, length = self._want, len(self._found)
        if not last and (want.length is None or length < want.length):
            return False
        if want.length is not None and length != want.length:
            raise DeliveryError("wrong_content", f"{want.path} has {length} bytes, {want.length} belong there")
        if want.sha256 is not None and hashlib.sha256(self._found).hexdigest() != want.sha256:
            raise DeliveryError("wrong_content", f"{want.path} has another digest than was promised")
        return True

    def _require(self, offset: int) -> None:
        if offset != len(self._found):
            raise OffsetError(len(self._found))


class File:
    """Into a file (0600) whose length and digest are known. Bytes that lie there count, once they are hashed again."""

    def __init__(self, want: Want, path: Path) -> None:
        if want.length is None or want.sha256 is None:
            raise ValueError("a want for a file has a length and a digest")
        self._want = want
        self._length, self._sha256 = want.length, want.sha256
        self._path = path
        self._descriptor = -1
        self.offset = 0
        self._digest = hashlib.sha256()
        self._from_before = False
        self._flushed = 0

    def open(self, go_on: Callable[[], None]) -> bool:
        """Hash what lies there; whether it is all, and right. ``go_on`` may raise between two pieces."""
        with _disk():
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            return self._take_stock(go_on)
        except BaseException:
            self.close()
            raise

    def _take_stock(self, go_on: Callable[[], None]) -> bool:
        buffer = bytearray(_PIECE_BYTES)
        while self.offset <= self._length:
            go_on()
            with _disk():
                count = os.preadv(self._descriptor, [buffer], self.offset)
            if not count:
                break
            self._digest.update(memoryview(buffer)[:count])
            self.offset += count
        self._from_before = self.offset > 0
        if self.offset < self._length:
            return False
        if self.offset == self._length and self._is_right():
            self._flush(whole=True)
            return True
        self._begin_anew()
        return False

    def write(self, offset: int, piece: Piece) -> None:
        """See ``Landing``."""
        if offset != self.offset:
            raise OffsetError(self.offset)
        if offset + len(piece) > self._length:
            raise DeliveryError("too_long", f"{self._want.path} has more than {self._length} bytes")
        self._digest.update(piece)
        with _disk():
            left = memoryview(piece)
            while left:
                left = left[os.pwrite(self._descriptor, left, offset + len(piece) - len(left)) :]
        self.offset += len(piece)
        if self.offset - self._flushed >= _FLUSH_BYTES:
            self._flush()

    def finish(self, offset: int, last: bool) -> bool:
        """See ``Landing``. A source that ends too soon says nothing of the file: more may come from another."""
        if offset != self.offset:
            raise OffsetError(self.offset)
        if self.offset < self._length:
            return False
        if self._is_right():
            self._flush(whole=True)
            return True
        if self._from_before:
            self._begin_anew()
            raise OffsetError(0)
        raise DeliveryError("wrong_content", f"{self._want.path} has another digest than was promised")

    def close(self) -> None:
        """Let go of the file; what is in it stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def delete(self) -> None:
        """What lies there is of no use to anybody."""
        with _disk():
            self._path.unlink(missing_ok=True)

    def _is_right(self) -> bool:
        return self._digest.hexdigest() == self._sha256

    def _begin_anew(self) -> None:
        """What was here may have been damaged here, by a power cut say: nobody is blamed for it."""
        with _disk():
            os.ftruncate(self._descriptor, 0)
        self.offset = self._flushed = 0
        self._digest = hashlib.sha256()
        self._from_before = False

    def _flush(self, *, whole: bool = False) -> None:
        with _disk():
            if whole:
                os.fsync(self._descriptor)
                fsync_directory(self._path.parent)
            else:
                os.fdatasync(self._descriptor)
        self._flushed = self.offset


@contextmanager
def _disk() -> Iterator[None]:
    """Turns OSError into TryLaterError (no space) or DamagedError."""
    try:
        yield
    except OSError as error:
        text = f"cannot keep what was fetched: {os.strerror(error.errno or 0)}"
        if error.errno in _SHORT:
            raise TryLaterError(text, hint="remove a model, or run 'edge-agent store gc'") from error
        raise DamagedError(text, hint="check the disk and the owner and mode of the state folder") from error
