"""Plaintext in memory only: a sealed, anonymous file that runtimes open by ``/proc/self/fd/N``.

Invariants: a ``Plaintext`` is complete, authentic and can no longer be changed by anybody; a failure on the way leaves
nothing behind. Order matters: kernels before 6.7 refuse even a read-only shared mapping through the read-write
descriptor of a write-sealed memfd, so it is sealed, reopened read-only, and the first descriptor is closed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import warnings
from collections.abc import Iterable

from agent.base.errors import TooLargeError, UnsupportedError
from agent.store.faults import raise_if_short

# From linux/memfd.h and linux/fcntl.h: not every supported Python has the names.
_MFD_CLOEXEC = 0x1
_MFD_ALLOW_SEALING = 0x2
_MFD_NOEXEC_SEAL = 0x8
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # SEAL, SHRINK, GROW, WRITE


class Plaintext:
    """An open, sealed, read-only plaintext of ``size`` bytes. Close it, or use it as a context.

    ``path`` opens it again within this process, also after this object was closed by whoever holds a descriptor of it.
    """

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    @property
    def path(self) -> str:
        """Where this process opens it by name."""
        if self.fd < 0:
            raise ValueError("the plaintext is closed")
        return f"/proc/self/fd/{self.fd}"

    def view(self) -> mmap.mmap:
        """A read-only mapping of all of it, to be closed by the caller. ValueError when it is empty."""
        return mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)

    def read_bytes(self, limit: int) -> bytes:
        """All of it as one object; TooLargeError when it has more than ``limit`` bytes."""
        if self.size > limit:
            raise TooLargeError(f"cannot read plaintext: {self.size} bytes, at most {limit} expected")
        return os.pread(self.fd, self.size, 0)

    def close(self) -> None:
        """Give the descriptor back; the memory goes when the last one of it is closed. Again is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Plaintext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.fd >= 0:
            told = f"unclosed {self!r}"
            self.close()  # first: the warning may be made an error
            warnings.warn(told, ResourceWarning, stacklevel=1, source=self)

    def __repr__(self) -> str:
        return f"<Plaintext fd={self.fd} size={self.size}>"


def hold(pieces: Iterable[memoryview], size: int) -> Plaintext:
    """A ``Plaintext`` of all ``pieces``, ``size`` bytes together; a piece may be reused once the next is asked for.

    Writing, rather than decrypting into a mapping, spares the page faults and the zeroing of fresh pages. Whatever
    ``pieces`` raises passes through and nothing is left. TryLaterError when memory or descriptors are short,
    UnsupportedError where the kernel has no sealed memfd.
    """
    fd = _create()
    try:
        try:
            _write_all(fd, pieces, size)
            os.fchmod(fd, 0o400)
            _seal(fd)
            return Plaintext(_reopen(fd), size)
        except BaseException:
            # Pages go back to the kernel now, which clears them before anybody else gets them.
            _empty(fd)
            raise
    except OSError as error:
        raise_if_short(error, "cannot decrypt")
        raise
    finally:
        os.close(fd)


def _create() -> int:
    if not hasattr(os, "memfd_create"):
        raise UnsupportedError(
            "cannot decrypt: this Python has no memfd_create", hint="use a Python built on glibc 2.27"
        )
    try:
        try:
            # Kernel 6.3; with vm.memfd_noexec=2 the only kind allowed.
            return os.memfd_create("edge-agent", _MFD_CLOEXEC | _MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.memfd_create("edge-agent", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    except OSError as error:
        raise_if_short(error, "cannot decrypt")
        raise UnsupportedError(
            f"cannot decrypt: no memory file ({os.strerror(error.errno or 0)})",
            hint="the kernel needs memfd_create; check the sandbox's system call filter",
        ) from error


def _write_all(fd: int, pieces: Iterable[memoryview], size: int) -> None:
    written = 0
    for piece in pieces:
        offset = 0
        while offset < len(piece):
            offset += os.write(fd, piece[offset:])
        written += len(piece)
    if written != size:
        raise ValueError(f"{written} bytes of plaintext where {size} were announced")


def _seal(fd: int) -> None:
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise UnsupportedError(
            f"cannot decrypt: memory file cannot be sealed ({os.strerror(error.errno or 0)})",
            hint="the kernel needs file sealing (Linux 3.17)",
        ) from error


def _reopen(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UnsupportedError("cannot decrypt: /proc is not mounted", hint="mount it in the sandbox") from error


def _empty(fd: int) -> None:
    try:
        os.ftruncate(fd, 0)
    except OSError:  # already sealed: closing frees it
        return
