"""``.edgemodel`` files: an uncompressed tar with ``model.json`` first, written the same every time, read as a stream.

Invariants of reading: strictly forward, so that the source may be a pipe; never more than one block of a file, or the
manifest, in memory; what a reader has handed out to the end is exactly the files that the manifest names, with the
sizes and digests that it names, and nothing else was in the source. A file's chunks are unverified until its iterator
has ended without an error. Why there is a reader of our own: ``docs/decisions/bundle-archive-reader.md``.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from agent.base.errors import NotFoundError, PeerError, TooLargeError
from agent.bundles.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRef, Manifest, parse_manifest
from agent.bundles.ustar import BLOCK, Header, check_extended, decode_header, encode_header, padding

CHUNK = 1 << 18
#: Zero bytes allowed after the end mark: tar programs fill up to their own record size (GNU tar: 10 KiB by default).
MAX_TAIL_BYTES = 1 << 20


class Source(Protocol):
    """A blocking byte source: a file, a pipe's or a socket's reading end."""

    def read(self, size: int, /) -> bytes | None:
        """Up to ``size`` bytes, empty at the end."""
        ...


class Sink(Protocol):
    """A byte sink that takes all it is given."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``."""
        ...


class BundleReader:
    """Reads one bundle, once, forward: ``read_manifest()``, then ``files()`` to its end."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._manifest: Manifest | None = None

    def read_manifest(self) -> Manifest:
        """The manifest, which must be the first member. PeerError, TooLargeError."""
        if self._manifest is not None:
            return self._manifest
        header = self._next_header()
        if header is None or header.name != MANIFEST_NAME:
            first = "nothing" if header is None else repr(header.name)
            raise PeerError(f"cannot read bundle: starts with {first}, not with {MANIFEST_NAME}")
        if header.size > MAX_MANIFEST_BYTES:
            raise TooLargeError(
                f"cannot read bundle: {MANIFEST_NAME} has {header.size} bytes, {MAX_MANIFEST_BYTES} fit"
            )
        self._manifest = parse_manifest(_exactly(self._source, header.size, MANIFEST_NAME))
        self._skip_padding(header)
        return self._manifest

    def files(self) -> Iterator[tuple[FileRef, Iterator[bytes]]]:
        """Each file that the manifest names, in the archive's order, as (reference, its chunks).

        Chunks that the caller leaves unread are read and verified all the same. When the iterator ends, every file was
        there and right, and nothing followed. PeerError says which file is wrong and how.
        """
        wanted = {ref.name: ref for ref in self.read_manifest().files()}
        missing = dict(wanted)
        while (header := self._next_header()) is not None:
            ref = missing.pop(header.name, None)
            if ref is None:
                again = "a second time" if header.name in wanted else "though its manifest does not"
                raise PeerError(f"cannot read bundle: it holds {header.name!r} {again}")
            if header.size != ref.size:
                raise PeerError(f"cannot read bundle: {ref.name} has {header.size} bytes, the manifest says {ref.size}")
            chunks = self._verified(ref)
            yield ref, chunks
            for _ in chunks:
                pass
            self._skip_padding(header)
        if missing:
            raise PeerError(f"cannot read bundle: {', '.join(sorted(missing))} missing")
        self._expect_end()

    def _verified(self, ref: FileRef) -> Iterator[bytes]:
        digest = hashlib.sha256()
        left = ref.size
        while left:
            chunk = self._source.read(min(left, CHUNK))
            if not chunk:
                raise _cut_short(ref.name)
            left -= len(chunk)
            digest.update(chunk)
            if not left and digest.hexdigest() != ref.sha256:
                break  # The last chunk is held back: whoever ignores the error still lacks the end.
            yield chunk
        if digest.hexdigest() != ref.sha256:
            raise _wrong_digest(ref.name)

    def _next_header(self) -> Header | None:
        annotated = False
        while True:
            block = _exactly(self._source, BLOCK, "the next header")
            if not any(block):
                if any(_exactly(self._source, BLOCK, "the end mark")) or annotated:
                    raise PeerError("cannot read bundle: malformed end mark")
                return None
            header = decode_header(block)
            if not header.extended:
                return header
            if annotated:
                raise PeerError("cannot read bundle: two extended headers in a row")
            annotated = True
            check_extended(_exactly(self._source, header.size, "an extended header"))
            self._skip_padding(header)

    def _skip_padding(self, header: Header) -> None:
        if any(_exactly(self._source, padding(header.size), header.name)):
            raise PeerError(f"cannot read bundle: {header.name!r} is followed by hidden bytes")

    def _expect_end(self) -> None:
        left = MAX_TAIL_BYTES
        while tail := self._source.read(CHUNK):
            left -= len(tail)
            if left < 0 or any(tail):
                raise PeerError("cannot read bundle: something follows its end")


def read(source: Source) -> BundleReader:
    """A reader over ``source``; nothing is read yet."""
    return BundleReader(source)


def write(manifest: Manifest, files: Mapping[str, Path | bytes], stream: Sink) -> None:
    """Write the bundle to ``stream``: equal manifest and files give equal bytes.

    ``files`` maps each file name of the manifest to its path or content; sizes and digests are verified on the way, and
    a PeerError leaves a bundle without an end mark, which no reader takes. Raises OSError for unreadable files.
    """
    document = manifest.to_json()
    if len(document) > MAX_MANIFEST_BYTES:
        raise TooLargeError(
            f"cannot pack {manifest.name}: {MANIFEST_NAME} has {len(document)} bytes, {MAX_MANIFEST_BYTES} fit"
        )
    _write_member(stream, MANIFEST_NAME, document)
    for ref in manifest.files():
        content = files.get(ref.name)
        if content is None:
            raise NotFoundError(f"cannot pack {manifest.name}: {ref.name} missing")
        if isinstance(content, bytes):
            content = _checked(content, ref)
            _write_member(stream, ref.name, content)
        else:
            stream.write(encode_header(ref.name, ref.size))
            for chunk in _chunks_of(content, ref):
                stream.write(chunk)
            stream.write(bytes(padding(ref.size)))
    stream.write(bytes(2 * BLOCK))


def read_directory(folder: Path) -> tuple[Manifest, dict[str, Path]]:
    """The manifest of a bundle kept as a directory, and where its files lie; names and sizes checked, not digests."""
    manifest = parse_manifest(_manifest_bytes(folder))
    paths = {ref.name: folder / ref.name for ref in manifest.files()}
    for ref in manifest.files():
        os.close(_open_regular(paths[ref.name], ref))
    return manifest, paths


def pack_directory(folder: Path) -> tuple[Manifest, dict[str, Path]]:
    """As ``read_directory``, with every digest verified. PeerError names the file that differs."""
    manifest, paths = read_directory(folder)
    for ref in manifest.files():
        for _ in _chunks_of(paths[ref.name], ref):
            pass
    return manifest, paths


def stream_directory(folder: Path, stream: Sink) -> Manifest:
    """Write the bundle in ``folder`` to ``stream`` (a pipe will do), verifying on the way. PeerError, OSError."""
    manifest, paths = read_directory(folder)
    write(manifest, paths, stream)
    return manifest


def _exactly(source: Source, size: int, what: str) -> bytes:
    parts: list[bytes] = []
    while size:
        part = source.read(size)
        if not part:
            raise _cut_short(what)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_member(stream: Sink, name: str, content: bytes) -> None:
    stream.write(encode_header(name, len(content)))
    stream.write(content)
    stream.write(bytes(padding(len(content))))


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"cannot read bundle {folder}: it has no {MANIFEST_NAME}", hint="docs/reference/manifest.md shows one"
        ) from error
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise PeerError(f"cannot read {path}: not a regular file")
        size = os.fstat(descriptor).st_size
        if size > MAX_MANIFEST_BYTES:
            raise TooLargeError(f"cannot read {path}: {size} bytes, {MAX_MANIFEST_BYTES} fit")
        return _exactly(stream, size, str(path))


def _open_regular(path: Path, ref: FileRef) -> int:
    try:
        # Without O_NONBLOCK a FIFO of that name would hold us for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read bundle {path.parent}: {ref.name} missing") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != ref.size:
        os.close(descriptor)
        found = f"has {status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise PeerError(f"cannot read bundle {path.parent}: {ref.name} {found}, the manifest says {ref.size} bytes")
    return descriptor


def _chunks_of(path: Path, ref: FileRef) -> Iterator[bytes]:
    digest = hashlib.sha256()
    left = ref.size
    with os.fdopen(_open_regular(path, ref), "rb", buffering=0) as stream:
        while left:
            chunk = stream.read(min(left, CHUNK))
            if not chunk:
                raise _cut_short(ref.name)
            left -= len(chunk)
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != ref.sha256:
        raise _wrong_digest(ref.name)


def _checked(content: bytes, ref: FileRef) -> bytes:
    if len(content) != ref.size or hashlib.sha256(content).hexdigest() != ref.sha256:
        raise _wrong_digest(ref.name)
    return content


def _cut_short(what: str) -> PeerError:
    return PeerError(f"cannot read bundle: it ends inside {what}", hint="the file was cut short; copy it again")


def _wrong_digest(name: str) -> PeerError:
    return PeerError(
        f"cannot read bundle: {name} is not the file that the manifest names (SHA-256 differs)",
        hint="pack the bundle again; edge-fleet pack fills in digests that model.json leaves out",
    )
