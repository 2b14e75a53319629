"""A TCP proxy that misbehaves on demand, between a client and ``target`` on this machine.

    with Proxy(port) as proxy: ...connect to proxy.port...; proxy.half_open()

Faults hold for the connections that are there and those to come, until ``heal``. Directions: ``up`` from the client to
the target, ``down`` back.
"""

from __future__ import annotations

import asyncio
import contextlib
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
#: tcp_info in linux/tcp.h: where tcpi_bytes_acked lies.
_INFO_BYTES, _ACKED_AT = 192, 120


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

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self._target = (host, target)
        self._faults = Faults()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        #: Connections made, and bytes forwarded, since the start.
        self.connections = 0
        self.forwarded = 0
        #: When each connection was made, in the loop's seconds.
        self.times: list[float] = []
        #: Bytes that each client's kernel acknowledged, of connections that are over, by our port towards the target.
        self.acknowledged: dict[int, int] = {}

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
        pair = (writer, far_writer)
        self._pairs.add(pair)
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
            near, far = (writer.get_extra_info("socket") for writer in pair)
            with contextlib.suppress(OSError):
                said = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
                self.acknowledged[far.getsockname()[1]] = struct.unpack_from("Q", said, _ACKED_AT)[0]
            for writer in pair:
                _reset(writer)

    def _close_all(self) -> None:
        for pair in list(self._pairs):
            self._close(pair)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
