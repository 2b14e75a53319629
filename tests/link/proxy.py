"""A TCP proxy that misbehaves on demand, between a client and ``target`` on this machine.

    with Proxy(port) as proxy: ...connect to proxy.port...; proxy.half_open()

Faults hold for the connections that are there and those to come, until ``heal``. Directions: ``up`` from the client to
the target, ``down`` back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
_CHUNK = 16384
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends a reset
#: tcp_info in linux/tcp.h since 4.19: where tcpi_bytes_sent and tcpi_bytes_retrans lie.
_INFO_BYTES, _SENT_AT = 216, 200


@dataclass
class Faults:
    """What goes wrong. ``cut_after``: bytes of both directions after which a connection is reset, used up by it."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    refuse: bool = False
    stalled: bool = False
    swallow: set[str] = field(default_factory=set)
    cut_after: list[int] = field(default_factory=list)


class Proxy:
    """Runs in a thread of its own; its methods may be called from any thread."""

    def __init__(self, target: int, host: str = "127.0.0.1", *, send_bytes: int = 0) -> None:
        """``send_bytes``: what may wait on the way to a client, so that a cut comes near its count; 0 = as it is."""
        self._target = (host, target)
        self._send_bytes = send_bytes
        self._faults = Faults()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._watched: dict[tuple[asyncio.StreamWriter, asyncio.StreamWriter], tuple[socket.socket, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        #: Connections made, and bytes forwarded, since the start.
        self.connections = 0
        self.forwarded = 0
        #: When each connection was made, in the loop's seconds.
        self.times: list[float] = []
        #: Bytes that went to the client, of connections that are over, by our port towards the target. What was still
        #: waiting on this side is not among them.
        self.sent: dict[int, int] = {}

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._call(self._start)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(30)

    async def _start(self) -> asyncio.AbstractServer:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close_all()

    # -- faults -------------------------------------------------------------------------------------------------------

    def _set(self, **changes: object) -> None:
        async def change() -> None:
            for name, value in changes.items():
                setattr(self._faults, name, value)

        self._call(change)

    def delay(self, seconds: float) -> None:
        """Each piece, in both directions, takes so much longer."""
        self._set(delay_s=seconds)

    def bandwidth(self, bytes_per_s: float) -> None:
        """No more than this in each direction of each connection."""
        self._set(bytes_per_s=bytes_per_s)

    def drop(self, *directions: str) -> None:
        """Swallow what goes ``up``, ``down`` or both: the sender sees nothing wrong."""
        self._set(swallow=set(directions))

    def half_open(self) -> None:
        """Connections stay, new ones are taken, and nothing goes through."""
        self._set(stalled=True)

    def refuse(self) -> None:
        """Reset what is there, and every new connection."""
        self._set(refuse=True)
        self.reset()

    def cut_after(self, *counts: int) -> None:
        """Reset the connection that has carried so many bytes: one count for each connection, the present one first."""
        self._set(cut_after=list(counts))

    def reset(self) -> None:
        """Reset every connection, now."""

        async def work() -> None:
            self._close_all()

        self._call(work)

    def heal(self) -> None:
        """No faults any more. What a stalled connection held back is let through."""
        self._set(delay_s=0.0, bytes_per_s=0.0, refuse=False, stalled=False, swallow=set(), cut_after=[])

    # -- forwarding ---------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.times.append(self._loop.time())
        if self._faults.refuse:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        if self._send_bytes:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_bytes)
        pair = (writer, far_writer)
        self._pairs.add(pair)
        near = writer.get_extra_info("socket").fileno()
        # A descriptor of its own: what the transport has lost it closes.
        self._watched[pair] = socket.socket(fileno=os.dup(near)), far_writer.get_extra_info("sockname")[1]
        carried = [0]
        pumps = (
            self._pump("up", reader, far_writer, pair, carried),
            self._pump("down", far_reader, writer, pair, carried),
        )
        for pump in pumps:
            task = self._loop.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        direction: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        carried: list[int],
    ) -> None:
        faults = self._faults
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if faults.delay_s:
                    await asyncio.sleep(faults.delay_s)
                if faults.bytes_per_s:
                    await asyncio.sleep(len(data) / faults.bytes_per_s)
                while faults.stalled:
                    await asyncio.sleep(0.02)
                if direction in faults.swallow:
                    continue
                limit = faults.cut_after[0] if faults.cut_after else None
                if limit is not None and carried[0] + len(data) >= limit:
                    writer.write(data[: max(0, limit - carried[0])])
                    await writer.drain()
                    faults.cut_after.pop(0)
                    break
                carried[0] += len(data)
                self.forwarded += len(data)
                writer.write(data)
                await writer.drain()
        self._close(pair)

    def _close(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        if pair in self._pairs:
            self._pairs.discard(pair)
            for writer in pair:
                _reset(writer)
            self._loop.call_soon(self._weigh, *self._watched.pop(pair))

    def _weigh(self, near: socket.socket, port: int) -> None:
        """After the transport has let go of it: what has gone out now is all that ever arrives."""
        said = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        near.close()
        sent, again = struct.unpack_from("QQ", said, _SENT_AT)
        self.sent[port] = sent - again

    def _close_all(self) -> None:
        for pair in list(self._pairs):
            self._close(pair)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
