"""The payload of an age v1 file: a 16-byte nonce, then 64 KiB chunks under ChaCha20-Poly1305 (STREAM).

Pure. The chunk counter and the flag of the last chunk are in each chunk's nonce, so that a chunk cannot be moved,
repeated or cut off unnoticed. Plaintext leaves this module only after its chunk is authentic, and callers that want
all or nothing must wait for the end: a cut file shows only there. Source: https://c2sp.org/age, "Payload".
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from agent.store.age import (
    FILE_KEY_BYTES,
    MAX_HEADER_BYTES,
    AgeError,
    Identity,
    Recipient,
    hkdf_sha256,
    open_header,
    parse_header,
    seal_x25519,
    write_header,
)

Bytes = bytes | bytearray | memoryview

NONCE_BYTES = 16
CHUNK_BYTES = 1 << 16
TAG_BYTES = 16
SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES

#: ``decrypt_into`` writes where the caller wants it; older releases of cryptography lack it and take one copy more.
_HAS_DECRYPT_INTO = hasattr(ChaCha20Poly1305, "decrypt_into")


def payload_size(size: int) -> int:
    """Bytes of the payload (nonce included) for ``size`` bytes of plaintext. The last chunk exists even when empty."""
    return NONCE_BYTES + size + TAG_BYTES * max(1, -(-size // CHUNK_BYTES))


def plaintext_size(payload: int) -> int:
    """The inverse of ``payload_size``. Raises AgeError where no plaintext has such a payload."""
    body = payload - NONCE_BYTES
    chunks = max(1, -(-body // SEALED_CHUNK_BYTES))
    size = body - TAG_BYTES * chunks
    if size < 0 or payload_size(size) != payload:
        raise AgeError("payload is cut short")
    return size


class Chunks:
    """Seals and opens single chunks of one payload. Indices count from 0; each is sealed at most once."""

    def __init__(self, file_key: bytes, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise AgeError("payload is cut short")
        self._cipher = ChaCha20Poly1305(hkdf_sha256(file_key, nonce, b"payload"))

    def seal(self, index: int, chunk: Bytes, *, last: bool) -> bytes:
        """``chunk`` (at most 64 KiB) sealed, 16 bytes longer."""
        return self._cipher.encrypt(_nonce(index, last), chunk, None)

    def open(self, index: int, sealed: Bytes, *, last: bool) -> bytes:
        """The plaintext of one chunk. Raises AgeError."""
        _check_chunk(index, len(sealed), last)
        try:
            return self._cipher.decrypt(_nonce(index, last), sealed, None)
        except InvalidTag as error:
            raise AgeError(f"chunk {index} is not authentic") from error

    def open_into(self, index: int, sealed: Bytes, out: memoryview, *, last: bool) -> None:
        """The same into ``out``, which has exactly the right size. On AgeError ``out`` is zeroed.

        cryptography's ``decrypt_into`` leaves unverified plaintext in its output when the tag is wrong.
        """
        _check_chunk(index, len(sealed), last)
        try:
            if _HAS_DECRYPT_INTO:
                cast("Any", self._cipher).decrypt_into(_nonce(index, last), sealed, None, out)
            else:
                out[:] = self._cipher.decrypt(_nonce(index, last), sealed, None)
        except InvalidTag as error:
            out[:] = bytes(len(out))
            raise AgeError(f"chunk {index} is not authentic") from error


def cut(pieces: Iterable[Bytes]) -> Iterator[tuple[Bytes, bool]]:
    """Pieces of any size as chunks of 64 KiB, each with whether it is the last. An empty source is one empty chunk.

    A chunk is valid until the next is asked for.
    """
    # One chunk is held back: only at the end is it known whether it was the last.
    held = bytearray()
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest:
            if len(held) == CHUNK_BYTES:
                yield bytes(held), False
                held.clear()
            while not held and len(rest) > CHUNK_BYTES:
                yield rest[:CHUNK_BYTES], False
                rest = rest[CHUNK_BYTES:]
            room = CHUNK_BYTES - len(held)
            held += rest[:room]
            rest = rest[room:]
    yield bytes(held), True


def encrypt(file_key: bytes, nonce: bytes, pieces: Iterable[Bytes]) -> Iterator[bytes]:
    """The payload for ``pieces``, nonce first, in parts of at most 64 KiB and a tag."""
    chunks = Chunks(file_key, nonce)
    yield nonce
    for index, (chunk, last) in enumerate(cut(pieces)):
        yield chunks.seal(index, chunk, last=last)


def decrypt(file_key: bytes, read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The plaintext chunk by chunk from ``read(n)``, which returns at most n bytes, none at the end. Raises AgeError.

    A cut payload raises only at its end, after the chunks before it were given out.
    """
    chunks = Chunks(file_key, _read_fully(read, NONCE_BYTES))
    sealed = _read_fully(read, SEALED_CHUNK_BYTES)
    index = 0
    while True:
        following = _read_fully(read, SEALED_CHUNK_BYTES)
        yield chunks.open(index, sealed, last=not following)
        if not following:
            return
        sealed = following
        index += 1


def encrypt_file(
    recipients: Iterable[Recipient], pieces: Iterable[Bytes], random: Callable[[int], bytes]
) -> Iterator[bytes]:
    """A whole age file for ``recipients``, header first; ``random(n)`` gives n fresh random bytes."""
    file_key = random(FILE_KEY_BYTES)
    stanzas = [seal_x25519(file_key, recipient, random(32)) for recipient in recipients]
    yield write_header(stanzas, file_key)
    yield from encrypt(file_key, random(NONCE_BYTES), pieces)


def decrypt_file(identities: Iterable[Identity], read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The plaintext of a whole age file, chunk by chunk; ``read`` as for ``decrypt``. Raises AgeError."""
    start = _read_fully(read, MAX_HEADER_BYTES)
    header = parse_header(start)
    file_key = open_header(header, identities)
    rest = io.BytesIO(start[header.length :])
    yield from decrypt(file_key, lambda count: rest.read(count) or read(count))


def _read_fully(read: Callable[[int], bytes], size: int) -> bytes:
    data = read(size)
    while len(data) < size:
        more = read(size - len(data))
        if not more:
            break
        data += more
    return data


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _check_chunk(index: int, length: int, last: bool) -> None:
    if length < TAG_BYTES or length > SEALED_CHUNK_BYTES or (not last and length != SEALED_CHUNK_BYTES):
        raise AgeError("payload is cut short")
    if last and index > 0 and length == TAG_BYTES:
        raise AgeError("the last chunk is empty")
