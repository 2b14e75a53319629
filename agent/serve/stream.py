"""A connected Unix socket driven by the event loop: bytes and descriptors in, parts of answers out.

Used instead of asyncio's transports for three things they do not give on every supported Python: a large body is
received in its final place, an answer of many parts leaves by ``sendmsg`` without being joined or copied, and
descriptors arrive with the bytes they were sent with (unix(7), SCM_RIGHTS). What the kernel does not take at once is
kept by reference, never copied.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence

from agent.base.errors import PeerError

Part = bytes | bytearray | memoryview

READ_BYTES = 65536
#: Answers up to this size are joined and sent by one plain send(): cheaper than a vector.
_JOIN_BYTES = 32768
#: Parts handed to one sendmsg(); the kernel takes 1024.
_SEND_PARTS = 64
_INT = array.array("i").itemsize


class Stream:
    """Owns ``sock``. ``readable`` is called when there is something to read, ``flushed`` when a backlog is written.

    All methods that touch the socket may raise OSError, which means that the connection is lost; reading may also raise
    BlockingIOError, which means that there is nothing now.
    """

    __slots__ = (
        "_fd",
        "_flushed",
        "_loop",
        "_out",
        "_readable",
        "_reading",
        "_sock",
        "_writing",
        "backlog",
        "descriptors",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        readable: Callable[[], None],
        flushed: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._readable = readable
        self._flushed = flushed
        self._reading = self._writing = False
        self._out: deque[memoryview] = deque()
        self.backlog = 0  # bytes that the kernel has not taken yet
        self.descriptors: list[int] = []  # came with what was read; the owner takes or closes them

    def resume(self) -> None:
        """Call ``readable`` from now on."""
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def pause(self) -> None:
        """Leave further bytes in the kernel, which stops the sender in time."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def read(self, descriptors: int = 0) -> bytes:
        """What is there, at most READ_BYTES; empty at the end. More than ``descriptors`` descriptors: PeerError."""
        if not descriptors:
            return self._sock.recv(READ_BYTES)  # descriptors sent here are closed by the kernel
        data, control, flags, _ = self._sock.recvmsg(READ_BYTES, _control_bytes(descriptors), socket.MSG_CMSG_CLOEXEC)
        self._take(control, flags, descriptors)
        return data

    def read_into(self, room: memoryview, descriptors: int = 0) -> int:
        """Fill ``room`` as far as bytes are there; 0 at the end. ``descriptors`` as for ``read``."""
        if not descriptors:
            return self._sock.recv_into(room)
        space = _control_bytes(descriptors)
        count, control, flags, _ = self._sock.recvmsg_into([room], space, socket.MSG_CMSG_CLOEXEC)
        self._take(control, flags, descriptors)
        return count

    def _take(self, control: list[tuple[int, int, bytes]], flags: int, allowed: int) -> None:
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.descriptors.extend(array.array("i", payload[: len(payload) - len(payload) % _INT]))
        if len(self.descriptors) > allowed or flags & socket.MSG_CTRUNC:
            raise PeerError(f"cannot read request: more than {allowed} descriptors")

    def hung_up(self) -> bool:
        """Whether the peer closed both directions, so that nobody is left to answer (poll(2), POLLHUP)."""
        poll = select.poll()
        poll.register(self._fd, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def send(self, parts: Sequence[Part]) -> None:
        """Send what the kernel takes now and keep the rest for later, in order."""
        if self._out:
            self._keep(parts, 0)
            return
        size = sum(map(len, parts))
        try:
            if size <= _JOIN_BYTES:
                parts = (b"".join(parts),)
                sent = self._sock.send(parts[0])
            else:
                sent = self._sock.sendmsg(parts[:_SEND_PARTS])
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < size:
            self._keep(parts, sent)

    def _keep(self, parts: Sequence[Part], sent: int) -> None:
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
                continue
            view = memoryview(part)[sent:]
            sent = 0
            self._out.append(view)
            self.backlog += len(view)
        if self._out and not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        try:
            sent = self._sock.sendmsg([self._out[index] for index in range(min(len(self._out), _SEND_PARTS))])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop_backlog()  # the owner sees the loss when it reads or sends next
            self._flushed()
            return
        self.backlog -= sent
        while self._out and sent >= len(self._out[0]):
            sent -= len(self._out.popleft())
        if self._out:
            self._out[0] = self._out[0][sent:]
            return
        self._drop_backlog()
        self._flushed()

    def _drop_backlog(self) -> None:
        self._out.clear()
        self.backlog = 0
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)

    def finish(self) -> None:
        """Tell the peer that no more comes."""
        self._sock.shutdown(socket.SHUT_WR)

    def close_descriptors(self) -> None:
        """Close those that nobody took."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def close(self) -> None:
        """Close at once; what was not sent is dropped."""
        self.pause()
        self._drop_backlog()
        self.close_descriptors()
        self._sock.close()
        # The owner holds this stream and the stream its owner's methods: a large body must not wait for the collector.
        self._readable = self._flushed = _nothing


def _nothing() -> None:
    """Stands where the owner's methods were."""


def _control_bytes(descriptors: int) -> int:
    """Room for one more than allowed, so that too many are noticed rather than cut off."""
    return socket.CMSG_SPACE((descriptors + 1) * _INT)
