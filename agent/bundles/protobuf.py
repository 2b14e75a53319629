"""A reader of protocol-buffer wire format over a descriptor, for looking into files that nobody vouches for.

Invariants: reads only with ``pread`` (a file cut short meanwhile is an error, never a SIGBUS as with a mapping); holds
one window of the file and the strings it is asked for; visits at most ``MAX_FIELDS`` fields and nests at most
``MAX_DEPTH`` deep, so that a hostile file costs bounded time and memory.
Source: Protocol Buffers documentation, "Encoding".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from agent.base.errors import PeerError, TooLargeError

#: Several times what large published models have; a second or two of reading at worst.
MAX_FIELDS = 1_000_000
MAX_DEPTH = 64
MAX_TEXT_BYTES = 1 << 16
_WINDOW = 1 << 16

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Message:
    """Where a message, string or byte field lies in the file, and how deep it is nested."""

    start: int
    end: int
    depth: int = 0


class WireReader:
    """Fields of messages in the first ``size`` bytes of ``descriptor``. Its position in the file is not moved."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._fields_left = MAX_FIELDS
        self._window = b""
        self._window_start = 0
        self.whole = Message(0, size)

    def fields(
        self, message: Message, passing_over: re.Pattern[bytes] | None = None
    ) -> Iterator[tuple[int, int | Message]]:
        """(field number, value) in file order: a number for varints and fixed fields, else where the bytes lie.

        Runs of whole fields that match ``passing_over`` are skipped at the speed of the pattern and do not count.
        """
        if message.depth > MAX_DEPTH:
            raise PeerError("cannot read model file: messages nested too deep")
        position, end = message.start, message.end
        while position < end:
            if passing_over is not None and (skipped := self._run(passing_over, position, end)):
                position += skipped
                continue
            self._fields_left -= 1
            if self._fields_left < 0:
                raise TooLargeError(f"cannot read model file: more than {MAX_FIELDS} fields")
            key, position = self._varint(position, end)
            number, wire_type = key >> 3, key & 7
            if not 0 < number < 1 << 29:
                raise _malformed()
            value: int | Message
            if wire_type == VARINT:
                value, position = self._varint(position, end)
            elif wire_type == BYTES:
                length, position = self._varint(position, end)
                value = Message(position, position + length, message.depth + 1)
                position += length
            elif wire_type in (FIXED64, FIXED32):
                width = 8 if wire_type == FIXED64 else 4
                value = int.from_bytes(self.raw(Message(position, min(position + width, end))), "little")
                position += width
            else:
                raise _malformed()  # Groups, which ONNX never had, and types that do not exist.
            if position > end:
                raise _malformed()
            yield number, value

    def raw(self, message: Message, limit: int = MAX_TEXT_BYTES) -> bytes:
        """The bytes of a field. TooLargeError beyond ``limit``."""
        if message.end - message.start > limit:
            raise TooLargeError(f"cannot read model file: a text of {message.end - message.start} bytes")
        parts: list[bytes] = []
        position = message.start
        while position < message.end:
            available = self._window_at(position)
            offset = position - self._window_start
            part = self._window[offset : offset + min(available, message.end - position)]
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def text(self, message: Message, limit: int = MAX_TEXT_BYTES) -> str:
        """A string field. PeerError unless it is UTF-8."""
        try:
            return self.raw(message, limit).decode()
        except UnicodeDecodeError as error:
            raise PeerError("cannot read model file: a name is not UTF-8") from error

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if position >= end:
                raise _malformed()
            offset = position - self._window_start
            if not 0 <= offset < len(self._window):
                self._window_at(position)
                offset = position - self._window_start
            byte = self._window[offset]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, position
            shift += 7
            if shift > 63:
                raise _malformed()

    def _run(self, pattern: re.Pattern[bytes], position: int, end: int) -> int:
        """Bytes that match from ``position`` within the message and the window."""
        self._window_at(position)
        offset = position - self._window_start
        match = pattern.match(self._window, offset, offset + end - position)
        return match.end() - offset if match else 0

    def _window_at(self, position: int) -> int:
        """Bring ``position`` into the window; the bytes available from there, at least one."""
        offset = position - self._window_start
        if not 0 <= offset < len(self._window):
            self._window = os.pread(self._descriptor, _WINDOW, position)
            self._window_start = position
            offset = 0
        if offset >= len(self._window):
            raise _malformed()
        return len(self._window) - offset


def signed(value: int) -> int:
    """A varint as the int64 that it codes."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _malformed() -> PeerError:
    return PeerError("cannot read model file: it is no ONNX file, or it is damaged or cut short")
