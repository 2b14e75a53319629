"""HTTP/1.1 as far as a GET needs it, by hand, on a socket of ``dialling``: heads, bodies, and a watch on slow senders.

Invariants: heads are bounded; nothing is waited for without end: whoever sends too little in the time that is spent
waiting for him is left, whether he sends a head, a body or nothing; a connection that breaks loses no byte that was
read.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.base.errors import one_line
from agent.link.dialling import until_ready
from agent.link.sources import SourceError

_MOST_HEAD_BYTES = 16 << 10
_MOST_LINE_BYTES = 256
_MOST_BEFORE = 4
_STATUS = re.compile(r"HTTP/1\.[01] ([1-5]\d\d)( .*)?")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(;.*)?")
_NO_HTTP = "it does not speak HTTP as it should"


@dataclass(frozen=True, slots=True)
class Patience:
    """Whoever sends less than ``least_bytes`` in ``window_s`` of waiting for him is too slow."""

    window_s: float = 20.0
    least_bytes: int = 20 << 10


@dataclass(frozen=True, slots=True)
class Head:
    """Status and fields of an answer, and what came of its body with it."""

    status: int
    fields: Mapping[str, str]
    early: bytes


class Stream:
    """A connected socket that is waited for, but not for ever. ``close`` it."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._sock = sock
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._left_s = patience.window_s
        self._got = 0

    async def send(self, data: bytes) -> None:
        """All of it. OSError, SourceError too_slow."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self._wait(self._loop.add_writer, self._loop.remove_writer)
            except ssl.SSLWantReadError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)

    async def receive(self, view: memoryview) -> int:
        """At least one byte into ``view``; 0 at the end. OSError, SourceError too_slow."""
        while True:
            try:
                count = self._sock.recv_into(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
            except ssl.SSLWantWriteError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)
            else:
                self._got += count
                return count

    async def _wait(self, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
        """Only waiting counts: what is held up on our side is not the sender's doing."""
        if self._left_s <= 0:
            if self._got < self._patience.least_bytes:
                raise SourceError("too_slow", f"{self._got} bytes came in {self._patience.window_s:g} s")
            self._left_s, self._got = self._patience.window_s, 0
        began = time.monotonic()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(until_ready(watch, unwatch, self._sock.fileno()), self._left_s)
        self._left_s -= time.monotonic() - began

    def close(self) -> None:
        """Let go of it, without a word."""
        self._sock.close()


async def read_head(stream: Stream) -> Head:
    """The head of the answer. SourceError for what is none; OSError."""
    buffer, filled = bytearray(_MOST_HEAD_BYTES), 0
    for _ in range(_MOST_BEFORE):
        while (end := buffer.find(b"\r\n\r\n", 0, filled)) < 0:
            if filled == len(buffer):
                raise SourceError("unreachable", f"the head of its answer has more than {_MOST_HEAD_BYTES} bytes")
            count = await stream.receive(memoryview(buffer)[filled:])
            if not count:
                raise SourceError("unreachable", "the connection was closed without an answer")
            filled += count
        head = _parsed(bytes(buffer[:end]), bytes(buffer[end + 4 : filled]))
        if head.status >= 200:
            return head
        buffer[: len(head.early)], filled = head.early, len(head.early)  # 100, 103: the answer is still to come
    raise SourceError("unreachable", _NO_HTTP)


def _parsed(data: bytes, early: bytes) -> Head:
    first, *lines = data.decode("latin-1").split("\r\n")
    match = _STATUS.fullmatch(first)
    if match is None:
        raise SourceError("unreachable", f"{_NO_HTTP}: {one_line(first[:60])}")
    pairs = (line.partition(":") for line in lines)
    return Head(int(match[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}, early)


class Body:
    """The bytes after a head, whatever way their end is told."""

    def __init__(self, stream: Stream, head: Head) -> None:
        """SourceError for an encoding that was not asked for."""
        coding = head.fields.get("transfer-encoding", "").lower()
        if coding not in ("", "chunked") or head.fields.get("content-encoding", "identity").lower() != "identity":
            raise SourceError("unreachable", "it sends in an encoding that was not asked for")
        self._stream = stream
        self._early = head.early
        self._chunked = coding == "chunked"
        self._left = 0 if self._chunked else length_of(head)
        self._began = self._ended = False

    async def read(self, view: memoryview) -> int:
        """Some bytes into ``view``, which must have room; 0 at the end. SourceError when it ends too early; OSError."""
        if self._chunked and not self._left and not self._ended:
            await self._next_chunk()
        if self._ended or self._left == 0:
            return 0
        count = await self._raw(view if self._left is None else view[: self._left])
        if self._left is not None:
            if not count:
                raise SourceError("unreachable", "the connection was closed too early")
            self._left -= count
        self._ended = not count
        return count

    async def _next_chunk(self) -> None:
        """RFC 9112 7.1. Extensions and trailers mean nothing to us."""
        if self._began:
            await self._line()  # that ends the chunk before
        self._began = True
        match = _CHUNK.fullmatch(await self._line())
        if match is None:
            raise SourceError("unreachable", f"{_NO_HTTP}: no length of a chunk")
        self._left = int(match[1], 16)
        self._ended = not self._left

    async def _line(self) -> bytes:
        line, byte = bytearray(), bytearray(1)
        while not line.endswith(b"\n"):
            if len(line) >= _MOST_LINE_BYTES or not await self._raw(memoryview(byte)):
                raise SourceError("unreachable", f"{_NO_HTTP}: no length of a chunk")
            line += byte
        return bytes(line).rstrip(b"\r\n")

    async def _raw(self, view: memoryview) -> int:
        if not self._early:
            return await self._stream.receive(view)
        count = min(len(view), len(self._early))
        view[:count], self._early = self._early[:count], self._early[count:]
        return count


def length_of(head: Head) -> int | None:
    """The length of the body as it says; None where it does not. SourceError for nonsense."""
    text = head.fields.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise SourceError("unreachable", f"{_NO_HTTP}: no length of a body")
    return int(text)
