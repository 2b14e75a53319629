"""Encrypted files on disk: payloads named by the SHA-256 of their ciphertext, and headers beside them.

Invariants: a payload under its name is whole and flushed; payloads and headers are written once and never changed; no
plaintext reaches the disk. Payloads are read with ``pread``, not mapped: a bad sector or a file cut under a mapping
would be a SIGBUS that ends the daemon, here it is an error of one blob. Reading does not hash the ciphertext, since
every chunk is authenticated and the header binds key, identity and length; ``check`` hashes, and needs no key for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import PeerError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, read_bounded, temporary_name, write_atomically
from agent.store import stream
from agent.store.age import AgeError, Header, parse_header
from agent.store.document import BlobRef
from agent.store.faults import reading
from agent.store.memory import Plaintext, hold
from agent.store.pace import Pace
from agent.store.sealing import MAX_OWN_HEADER_BYTES
from agent.store.stream import CHUNK_BYTES, NONCE_BYTES, SEALED_CHUNK_BYTES, Bytes

Step = Callable[[str], None]

#: Chunks decrypted per read and write: few enough for the second-level cache of small boards.
_BATCH = 2
_PIECE_BYTES = 1 << 20
_ZEROS = bytes(CHUNK_BYTES)

#: Buffers of readers that are done, plaintext zeroed: fresh ones would cost a small blob more than its cipher does.
_MAX_SPARE = 4
_spare: list[tuple[memoryview, memoryview]] = []


@dataclass(frozen=True, slots=True)
class Draft:
    """A payload written and flushed, still under a temporary name."""

    path: Path
    payload: str
    payload_size: int
    size: int
    sha256: str


class Blobs:
    """The folder of payloads and headers."""

    def __init__(self, folder: Path, pace: Pace, *, step: Step) -> None:
        self._folder = folder
        self._pace = pace
        self._step = step

    def prepare(self) -> None:
        """Make the folder, drop what a kill left half written."""
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700)
            fsync_directory(self._folder.parent)
        for path in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    def files(self) -> dict[str, int]:
        """Name and bytes of every finished file."""
        sizes = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.startswith(TEMPORARY_PREFIX):
                    with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                        sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        return sizes

    @contextlib.contextmanager
    def draft(
        self, pieces: Iterable[Bytes], file_key: bytes, nonce: bytes, grow: Callable[[int], None]
    ) -> Iterator[Draft]:
        """Encrypt ``pieces`` into a temporary file that ends with the block unless ``keep`` took it.

        ``grow`` is told the payload's size before bytes beyond its last word are written, and may raise.
        """
        path = temporary_name(self._folder / "payload")
        try:
            yield self._encrypt(path, pieces, file_key, nonce, grow)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def keep(self, draft: Draft) -> None:
        """Give a draft its name. Durable only after the next ``put_header``, which flushes the folder."""
        os.replace(draft.path, self._folder / draft.payload)
        self._step("payload renamed")

    def put_header(self, payload: str, header: bytes) -> str:
        """Write a header beside its payload; returns its name, made of its content. Durable on return."""
        name = f"{payload}.{hashlib.sha256(header).hexdigest()[:16]}.header"
        write_atomically(self._folder / name, header)
        self._step("header written")
        return name

    def header(self, name: str) -> Header:
        """A header of ours, parsed. Raises AgeError, also when it is missing."""
        with reading("header"):
            data = read_bounded(self._folder / name, MAX_OWN_HEADER_BYTES + 1)
        header = parse_header(data)
        if header.length != len(data):
            raise AgeError("header is followed by something else")
        return header

    def decrypt(self, ref: BlobRef, file_key: bytes) -> Plaintext:
        """The plaintext in memory. Raises AgeError, and what ``memory.hold`` raises."""
        if stream.payload_size(ref.size) != ref.payload_size:
            raise AgeError("payload and plaintext sizes do not belong together")
        with (
            self._open_file(self._folder / ref.payload, ref.payload_size) as fd,
            contextlib.closing(_decrypted(fd, ref.payload_size, file_key)) as pieces,
            self._pace.timed("reading a model", ref.payload_size),
        ):
            return hold(pieces, ref.size)

    def examine(self, path: Path, payload_size: int, file_key: bytes) -> Draft:
        """A payload that was written elsewhere, as a draft: hashed, decrypted in memory and flushed where it lies.

        AgeError when it has another size or does not open with ``file_key``.
        """
        sealed_digest, plain_digest = hashlib.sha256(), hashlib.sha256()
        size = 0
        with (
            self._open_file(path, payload_size) as fd,
            contextlib.closing(_decrypted(fd, payload_size, file_key, sealed_digest.update)) as pieces,
        ):
            for piece in pieces:
                plain_digest.update(piece)
                size += len(piece)
            os.fsync(fd)
        self._step("payload examined")
        return Draft(path, sealed_digest.hexdigest(), payload_size, size, plain_digest.hexdigest())

    def check(self, ref: BlobRef, progress: Callable[[int], None]) -> None:
        """Hash a payload; AgeError unless it is what its name says. ``progress`` is told each number of bytes read."""
        digest = hashlib.sha256()
        buffer = bytearray(_PIECE_BYTES)
        with self._open_file(self._folder / ref.payload, ref.payload_size) as fd:
            offset = 0
            while count := _pread(fd, [memoryview(buffer)], offset):
                digest.update(memoryview(buffer)[:count])
                offset += count
                progress(count)
        if offset != ref.payload_size or digest.hexdigest() != ref.payload:
            raise AgeError("payload differs from its name")

    def delete(self, name: str) -> None:
        """Remove a file; harmless when it is gone. ``flush`` makes it durable."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / name)
        self._step("blob file deleted")

    def flush(self) -> None:
        """Make renames and deletions durable."""
        fsync_directory(self._folder)

    def holds(self, name: str) -> bool:
        """Whether a finished file of that name is there."""
        return (self._folder / name).is_file()

    def _encrypt(
        self, path: Path, pieces: Iterable[Bytes], file_key: bytes, nonce: bytes, grow: Callable[[int], None]
    ) -> Draft:
        sealed_digest, plain_digest = hashlib.sha256(), hashlib.sha256()
        size = payload_size = 0

        def watched() -> Iterator[Bytes]:
            nonlocal size
            for piece in pieces:
                size += len(piece)
                grow(stream.payload_size(size))
                plain_digest.update(piece)
                yield piece

        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            self._step("payload begun")
            for part in stream.encrypt(file_key, nonce, watched()):
                sealed_digest.update(part)
                _write_all(file.fileno(), part)
                payload_size += len(part)
            self._step("payload written")
            with self._pace.timed("writing a model", payload_size):
                os.fsync(file.fileno())
        self._step("payload flushed")
        return Draft(path, sealed_digest.hexdigest(), payload_size, size, plain_digest.hexdigest())

    @contextlib.contextmanager
    def _open_file(self, path: Path, payload_size: int) -> Iterator[int]:
        with reading("payload"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != payload_size:
                raise AgeError(f"payload has {status.st_size} bytes, {payload_size} expected")
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield fd
        finally:
            os.close(fd)


def pieces_of(source: int | Iterable[Bytes]) -> Iterator[Bytes]:
    """What a source gives: a descriptor from its position on, or pieces. PeerError when it fails."""
    try:
        yield from iter(lambda: os.read(source, _PIECE_BYTES), b"") if isinstance(source, int) else source
    except OSError as error:
        raise PeerError(f"cannot read source: {error.strerror or error}") from error


def _decrypted(
    fd: int, payload_size: int, file_key: bytes, seen: Callable[[memoryview], None] | None = None
) -> Generator[memoryview, None, None]:
    """Authentic plaintext in order, in a buffer that is used again. Zeroed at the end, however it ends.

    ``seen`` is told the ciphertext, each piece before its plaintext is given out.
    """
    nonce = bytearray(NONCE_BYTES)
    _pread_fully(fd, memoryview(nonce), 0)
    if seen is not None:
        seen(memoryview(nonce))
    chunks = stream.Chunks(file_key, bytes(nonce))
    total = max(1, -(-(payload_size - NONCE_BYTES) // SEALED_CHUNK_BYTES))
    sealed, plain = _take_buffers()
    offset = NONCE_BYTES
    used = 0
    try:
        for first in range(0, total, _BATCH):
            length = min(len(sealed), payload_size - offset)
            _pread_fully(fd, sealed[:length], offset)
            if seen is not None:
                seen(sealed[:length])
            offset += length
            used = max(used, length)
            yield plain[: _open_batch(chunks, first, total, sealed[:length], plain)]
    finally:
        for start in range(0, used, CHUNK_BYTES):
            plain[start : start + CHUNK_BYTES] = _ZEROS[: len(plain) - start]
        if len(_spare) < _MAX_SPARE:
            _spare.append((sealed, plain))


def _take_buffers() -> tuple[memoryview, memoryview]:
    try:
        return _spare.pop()
    except IndexError:
        return memoryview(bytearray(_BATCH * SEALED_CHUNK_BYTES)), memoryview(bytearray(_BATCH * CHUNK_BYTES))


def _open_batch(chunks: stream.Chunks, first: int, total: int, sealed: memoryview, plain: memoryview) -> int:
    """Open the chunks in ``sealed`` into ``plain``; returns how many bytes they have."""
    filled = 0
    for index, start in enumerate(range(0, len(sealed), SEALED_CHUNK_BYTES), first):
        chunk = sealed[start : start + SEALED_CHUNK_BYTES]
        end = filled + max(0, len(chunk) - stream.TAG_BYTES)
        chunks.open_into(index, chunk, plain[filled:end], last=index == total - 1)
        filled = end
    return filled


def _pread_fully(fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = _pread(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise AgeError("payload is cut short")
        done += count


def _pread(fd: int, buffers: list[memoryview], offset: int) -> int:
    with reading("payload"):
        return os.preadv(fd, buffers, offset)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
