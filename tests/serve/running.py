"""A server on an event loop in a thread of its own, with real Unix sockets, and plain callers for it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from agent.serve.access import ModelRules
from agent.serve.inference import Inference
from agent.serve.limits import Limits
from agent.serve.routes import RouteTable
from agent.serve.server import Server
from tests.serve.toy import ToyModels

T = TypeVar("T")

PATIENCE_S = 30.0


class Running:
    """``with Running(make_server, path) as running``: the server is made and started on the loop."""

    def __init__(self, make: Callable[[], Server], path: Path, *, uvloop: bool = False) -> None:
        self._make = make
        self._uvloop = uvloop
        self.path = path
        self.server: Server

    def __enter__(self) -> Running:
        if self._uvloop:
            import uvloop  # noqa: PLC0415 - only where it is installed

            self.loop = uvloop.new_event_loop()
        else:
            self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start())
        return self

    async def _start(self) -> None:
        self.server = self._make()
        self.server.start_unix(self.path, 0o666)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work`` on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def look(self, value: Callable[[], T]) -> T:
        """What ``value`` gives on the loop's thread."""

        async def work() -> T:
            return value()

        return self.run(work())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, on the loop, until ``condition`` holds."""

        async def work() -> None:
            while not condition():
                await asyncio.sleep(0.002)

        self.run(work())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self.server.drain(0))
        self.run(self.loop.shutdown_asyncgens())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()


def serving(
    path: Path, limits: Limits | None = None, *, rules: ModelRules | None = None, uvloop: bool = False, **changes: Any
) -> tuple[Running, list[ToyModels]]:
    """The toy models behind ``infer.sock``'s table. The list gets the models once the server is made."""
    limits = replace(limits or Limits(), **changes)
    made: list[ToyModels] = []

    def make() -> Server:
        made.append(ToyModels())
        return Server(RouteTable(Inference(made[0], limits=limits, rules=rules).routes()), limits)

    return Running(make, path, uvloop=uvloop), made


def connect(path: Path) -> socket.socket:
    """A connected socket that gives up after PATIENCE_S."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_S)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def answer(sock: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Status, fields and body of the next answer, as the standard library's client reads it."""
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    body = response.read()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def ask(path: Path, data: bytes) -> tuple[int, bytes, bool]:
    """Send raw bytes on a fresh connection: status, body, and whether the server closed it afterwards."""
    with connect(path) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)  # refused before all of it is sent: the answer is there
        status, fields, body = answer(sock)
        return status, body, fields.get("connection") == "close" and at_end(sock)


def at_end(sock: socket.socket) -> bool:
    """Whether the server closes without saying more."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def get(target: str, *fields: str) -> bytes:
    """A GET request."""
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: x", *fields, "", ""]).encode("latin-1")


def post(target: str, body: bytes, *fields: str) -> bytes:
    """A POST request with its length."""
    lines = [f"POST {target} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
