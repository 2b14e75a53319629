"""HTTP/1.1 requests out of bytes: no sockets, no clock, so that it can be fuzzed.

Invariants: what comes out does not depend on how the bytes were split into reads; a size is compared with its cap
before anything of that size is allocated; one reading only is possible of each request, all others are refused (bare
LF, folded lines, signs or blanks in numbers, two lengths, a length beside a transfer coding). The parser keeps at most
one request and the bytes that follow it in one read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import ClassVar

from agent.serve.heads import (
    REMEMBERED_HEAD_BYTES,
    Head,
    HeadReader,
    ProtocolError,
    join_fields,
    read_field_line,
    read_head,
    read_request_line,
    too_large,
)
from agent.serve.limits import Limits

__all__ = ["Head", "HeadReader", "ProtocolError", "RequestParser"]

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\Z")
_TOKEN_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
#: What says where a message ends must not come after it has ended (RFC 9110 6.5.1).
_FRAMING = frozenset(("transfer-encoding", "content-length"))
CHUNK_LINE_BYTES = 256
#: Framing bytes allowed beside the data of a chunked body: one byte a chunk would cost more work than it carries.
CHUNK_OVERHEAD_BYTES = 65536
#: malloc's alignment on 64-bit; on 32-bit ARM it is 8, which is the largest item that a tensor has.
_ALIGNMENT = 16


def _memory(size: int) -> bytearray | memoryview:
    """Memory that is about to be filled wholly. numpy, where it is loaded anyway, does not clear it first."""
    numpy = sys.modules.get("numpy")
    return bytearray(size) if numpy is None else numpy.empty(size, "u1").data


class RequestParser:
    """Bytes in; a head, then its body, out; then the next request.

    Order of calls: ``feed`` (or ``wrote`` after filling ``room()``) as bytes come; ``next_head`` until it gives one;
    ``start_body``; ``next_body`` until it gives one; again from ``next_head``. After a ProtocolError it is of no use.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_chunk_left",
        "_chunk_overhead",
        "_filled",
        "_head",
        "_limit",
        "_line",
        "_pad",
        "_pairs",
        "_reader",
        "_reserve",
        "_scan",
        "_skipped",
        "_stage",
        "_start",
        "_wanted",
    )  # fmt: skip

    def __init__(self, reader: HeadReader) -> None:
        self._reader = reader
        self._buffer: bytes | bytearray = b""
        self._start = 0  # first byte of the buffer that is not consumed
        self._body: bytearray | memoryview | None = None
        self._reset()

    def _reset(self) -> None:
        self._scan = self._start
        self._skipped = False
        self._line: tuple[str, str, int] | None = None
        self._pairs: list[tuple[str, str]] = []
        self._head: Head | None = None
        self._stage = "head"
        self._body = None
        self._pad = self._filled = self._wanted = self._limit = 0
        self._chunk_left = self._chunk_overhead = 0
        self._reserve: Callable[[int], None] | None = None

    def whole(self, data: bytes) -> tuple[Head, bytes] | None:
        """A request that ``data`` is exactly, where its head is remembered and nothing else is pending; else None.

        What kept-alive apps send nearly always. Gives what ``feed`` and the other calls would give, in one step.
        """
        end = data.find(b"\r\n\r\n", 0, REMEMBERED_HEAD_BYTES) + 4
        head = self._reader.remembered.get(data[:end])
        if head is None or head.chunked or (head.length or 0) != len(data) - end:
            return None
        return head, data[end:]

    def discard(self) -> None:
        """Let go of all memory, and of the caller's methods: no further request is wanted."""
        self._buffer, self._start = b"", 0
        self._reset()

    @property
    def pending(self) -> int:
        """Bytes that came and belong to no finished request."""
        return len(self._buffer) - self._start + self._filled

    def feed(self, data: bytes) -> None:
        """Take bytes as they came."""
        if self._start == len(self._buffer):
            self._scan -= self._start
            self._buffer, self._start = data, 0
            return
        if self._start or isinstance(self._buffer, bytes):
            self._buffer = bytearray(memoryview(self._buffer)[self._start :])
            self._scan -= self._start
            self._start = 0
        self._buffer += data

    def room(self) -> memoryview | None:
        """Where the next bytes of a large body may be written directly, else None."""
        if self._body is None or self._stage != "body":
            return None
        return memoryview(self._body)[self._pad + self._filled :]

    def wrote(self, count: int) -> None:
        """``count`` bytes were written into ``room()``."""
        self._filled += count

    def next_head(self) -> Head | None:
        """The next head, or None until more bytes come. Raises ProtocolError."""
        if self._scan == self._start and (head := self._remembered_head()) is not None:
            return head
        if not self._skip_empty_line():
            return None
        limits = self._reader.limits
        while (line := self._next_line(limits)) is not None:
            if self._line is None:
                self._line = read_request_line(line)
            elif line:
                self._add_field(line, limits)
            else:
                head = read_head(self._line, join_fields(self._pairs))
                self._reader.remember(bytes(memoryview(self._buffer)[self._start : self._scan]), head)
                return self._head_done(head)
        return None

    def _remembered_head(self) -> Head | None:
        end = self._buffer.find(b"\r\n\r\n", self._start, self._start + REMEMBERED_HEAD_BYTES)
        if end < 0:
            return None
        head = self._reader.remembered.get(bytes(self._buffer[self._start : end + 4]))
        if head is None:
            return None
        self._scan = end + 4
        return self._head_done(head)

    def _head_done(self, head: Head) -> Head:
        self._start = self._scan
        self._head = head
        self._pairs = []
        return head

    def _skip_empty_line(self) -> bool:
        """Skip one CRLF before a request (RFC 9112 2.2); refuse at once what cannot be HTTP, such as TLS."""
        if self._line is not None or self._start == len(self._buffer):
            return self._start < len(self._buffer)
        first = self._buffer[self._start]
        if first == 13 and not self._skipped:
            if len(self._buffer) - self._start < 2:
                return False
            if self._buffer[self._start + 1] == 10:
                self._start += 2
                self._scan = self._start
                self._skipped = True
                return self._skip_empty_line()
        if first not in _TOKEN_BYTES:
            raise ProtocolError(400, "cannot read request: malformed request line")
        return True

    def _next_line(self, limits: Limits) -> bytes | None:
        """The next line of a head or trailer without its CRLF, or None until it is whole."""
        first = self._line is None and self._head is None
        cap = self._start + (limits.request_line_bytes if first else limits.head_bytes)
        end = self._buffer.find(b"\n", self._scan, cap)
        if end < 0:
            if len(self._buffer) >= cap:
                if first:
                    raise ProtocolError(414, f"cannot read request: first line over {limits.request_line_bytes} bytes")
                raise ProtocolError(431, f"cannot read request: headers over {limits.head_bytes} bytes")
            return None
        line = bytes(self._buffer[self._scan : end])
        if line[-1:] != b"\r":
            raise ProtocolError(400, "cannot read request: line ends without CR")
        self._scan = end + 1
        return line[:-1]

    def _add_field(self, line: bytes, limits: Limits) -> None:
        if len(self._pairs) >= limits.head_fields:
            raise ProtocolError(431, f"cannot read request: more than {limits.head_fields} headers")
        self._pairs.append(read_field_line(line))

    def start_body(self, limit: int, reserve: Callable[[int], None] | None = None) -> None:
        """Allow a body of up to ``limit`` bytes. Raises ProtocolError 413 before anything is allocated.

        ``reserve`` is called with the number of bytes about to be allocated, and may raise.
        """
        head = self._head
        assert head is not None
        lead = head.inference_length or 0
        self._limit, self._reserve = limit, reserve
        if head.chunked:
            self._stage = "size"
            self._body = bytearray(-lead % _ALIGNMENT)
            self._pad = len(self._body)
            return
        self._stage = "body"
        self._wanted = head.length or 0
        if self._wanted > limit:
            raise too_large(self._wanted, limit)
        have = len(self._buffer) - self._start
        if have < self._wanted:
            if reserve is not None:
                reserve(self._wanted)
            self._pad = -lead % _ALIGNMENT
            self._body = _memory(self._pad + self._wanted)
            self._body[self._pad : self._pad + have] = memoryview(self._buffer)[self._start :]
            self._filled = have
            self._buffer, self._start = b"", 0

    def next_body(self) -> bytes | memoryview | None:
        """The whole body once it is there, else None. Raises ProtocolError."""
        if self._stage == "body":
            return self._plain_body()
        while self._stage != "done":
            if not self._STEPS[self._stage](self):
                return None
        assert self._body is not None
        body = memoryview(self._body)[self._pad :]
        self._reset()
        return body

    def _plain_body(self) -> bytes | memoryview | None:
        if self._body is None:
            end = self._start + self._wanted
            small = bytes(self._buffer[self._start : end]) if self._wanted else b""
            self._start = end
            self._reset()
            return small
        if self._filled < self._wanted:
            return None
        whole = memoryview(self._body)[self._pad :]
        self._reset()
        return whole

    def _chunk_size(self) -> bool:
        end = self._buffer.find(b"\n", self._start, self._start + CHUNK_LINE_BYTES)
        if end < 0:
            if len(self._buffer) - self._start >= CHUNK_LINE_BYTES:
                raise ProtocolError(400, f"cannot read body: chunk line over {CHUNK_LINE_BYTES} bytes")
            return False
        line = bytes(self._buffer[self._start : end])
        match = _CHUNK_LINE.match(line[:-1]) if line[-1:] == b"\r" else None
        if match is None:
            raise ProtocolError(400, "cannot read body: malformed chunk size")
        digits = match[1].lstrip(b"0")
        size = int(digits[:16] or b"0", 16)
        if self._filled + size > self._limit or len(digits) > 16:
            raise ProtocolError(413, f"cannot take body: over {self._limit} bytes")
        self._count_overhead(end + 1 - self._start)
        self._start = self._scan = end + 1
        self._chunk_left = size
        if size and self._reserve is not None:
            self._reserve(size)
        self._stage = "data" if size else "trailers"
        return True

    def _count_overhead(self, size: int) -> None:
        self._chunk_overhead += size
        if self._chunk_overhead > CHUNK_OVERHEAD_BYTES + self._filled // 16:
            raise ProtocolError(400, "cannot read body: chunks too small")

    def _chunk_data(self) -> bool:
        take = min(self._chunk_left, len(self._buffer) - self._start)
        if not take:
            return False
        assert isinstance(self._body, bytearray)
        with memoryview(self._buffer) as view:
            self._body += view[self._start : self._start + take]
        self._start += take
        self._filled += take
        self._chunk_left -= take
        if self._chunk_left == 0:
            self._stage = "end"
        return True

    def _chunk_end(self) -> bool:
        ending = bytes(self._buffer[self._start : self._start + 2])
        if ending != b"\r\n"[: len(ending)]:
            raise ProtocolError(400, "cannot read body: chunk longer than its size")
        if len(ending) < 2:
            return False
        self._start += 2
        self._stage = "size"
        return True

    def _trailers(self) -> bool:
        """Trailer fields are checked like headers and dropped: nothing here needs one."""
        while (line := self._next_line(self._reader.limits)) is not None:
            if not line:
                self._start = self._scan
                self._stage = "done"
                return True
            self._add_field(line, self._reader.limits)
            if self._pairs[-1][0] in _FRAMING:
                raise ProtocolError(400, f"cannot read body: {self._pairs[-1][0]} in a trailer")
        return False

    _STEPS: ClassVar[dict[str, Callable[[RequestParser], bool]]] = {
        "size": _chunk_size,
        "data": _chunk_data,
        "end": _chunk_end,
        "trailers": _trailers,
    }
