"""What is handed in to be installed: an open file or a pipe, read without waiting for ever.

Whoever writes into a pipe may stop without closing it, and one reader that waits for it would keep every other
operation waiting. So a pipe is read only when there is something in it; in between the reader asks whether to go on.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from pydantic import ValidationError

from agent.base.errors import PeerError
from agent.bundles.manifest import FileRef, Manifest

Contents = tuple[Manifest, Iterator[tuple[FileRef, Iterator[bytes]]]]
#: How long a pipe may give nothing. A file manager that asks its user something takes longer than a disk.
PIPE_IDLE_S = 60.0
_POLL_MS = 100
_BLOCK_BYTES = 1 << 18


def opened(descriptor: int, go_on: Callable[[], None], *, idle_s: float = PIPE_IDLE_S) -> BinaryIO:
    """The descriptor as a stream of its own. PeerError for what is no file and no pipe.

    ``go_on`` is called while a pipe is waited for; what it raises comes out of the read.
    """
    mode = os.fstat(descriptor).st_mode
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if access & (os.O_WRONLY | os.O_PATH):
        raise PeerError("cannot add model: the descriptor is not open for reading")
    if stat.S_ISREG(mode):
        return os.fdopen(os.dup(descriptor), "rb", buffering=0)
    if stat.S_ISFIFO(mode):
        return cast("BinaryIO", _Pipe(os.dup(descriptor), go_on, idle_s))
    raise PeerError("cannot add model: neither a file nor a pipe")


class _Pipe(io.RawIOBase):
    """The reading end of a pipe. A read raises PeerError when nothing comes for ``idle_s``."""

    def __init__(self, descriptor: int, go_on: Callable[[], None], idle_s: float) -> None:
        self._descriptor = descriptor
        self._go_on = go_on
        self._idle_s = idle_s
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # the base says WriteableBuffer
        deadline = time.monotonic() + self._idle_s
        while not self._poll.poll(_POLL_MS):
            self._go_on()
            if time.monotonic() > deadline:
                raise PeerError(f"cannot add model: nothing came through the pipe for {self._idle_s:g} s")
        return os.readv(self._descriptor, [buffer])

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def contents(stream: BinaryIO, *, file_name: str = "", name: str | None = None) -> Contents:
    """The manifest and the files behind it, of a bundle or a bare model. PeerError and its kin."""
    try:
        return _contents(stream, file_name, name)
    except OSError as error:  # a file system that fails: a stick pulled out, a server gone
        raise PeerError(f"cannot read model file: {error.strerror}") from error


def _contents(stream: BinaryIO, file_name: str, name: str | None) -> Contents:
    # Readers of hostile files are a good part of the code, and a device that has its models needs none of it.
    from agent.bundles import bare  # noqa: PLC0415 - see above
    from agent.bundles.archive import BundleReader  # noqa: PLC0415
    from agent.bundles.kinds import HEAD_BYTES, kind_of  # noqa: PLC0415

    descriptor = stream.fileno()
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if not regular or kind_of(os.pread(descriptor, HEAD_BYTES, 0)) == "edgemodel":
        if regular:
            stream.seek(0)
        reader = BundleReader(stream)
        manifest = reader.read_manifest()
        return manifest if name is None else _renamed(manifest, name), reader.files()
    manifest = bare.describe(descriptor, file_name=file_name, name=name)
    stream.seek(0)
    return manifest, iter([(manifest.variants[0].file, _blocks(stream))])


def _renamed(manifest: Manifest, name: str) -> Manifest:
    try:
        return Manifest.model_validate({**manifest.model_dump(), "name": name})
    except ValidationError as error:
        raise PeerError(
            f"cannot add model: {name!r} cannot be its name",
            hint="lower case letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit",
        ) from error


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(_BLOCK_BYTES):
        yield block
