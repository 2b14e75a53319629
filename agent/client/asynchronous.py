"""The asynchronous client, for asyncio on any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agent.base.errors import DeadlineError
from agent.client.blocking import INFER_SOCKET
from agent.client.exchange import (
    AGAIN_S,
    FULL_QUEUE_PAUSE_S,
    HEAD_BYTES,
    KEPT,
    Answer,
    LostError,
    NotTaken,
    Part,
    Step,
    exchange,
    feedback_request,
    is_ready,
    model_path,
    not_taken,
    request,
    statistics_of,
    unreachable,
)
from agent.client.tensors import Result, Wanted, infer_request, infer_result

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class AsyncClient:
    """The same for asyncio (any event loop); calls may run side by side, each on a connection of its own."""

    def __init__(self, path: str | os.PathLike[str] = INFER_SOCKET, timeout: float | None = 30.0) -> None:
        self._path = os.fspath(path)
        self._timeout = timeout
        self._kept: list[socket.socket] = []

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        outputs: Wanted | None = None,
        version: str | None = None,
        id: str | None = None,  # noqa: A002 - the protocol's word
        parameters: Mapping[str, Any] | None = None,
        datatypes: Mapping[str, str] | None = None,
    ) -> Result:
        """As ``Client.infer``."""
        target = model_path(model, version, "/infer")
        parts = infer_request(target, inputs, outputs, id, parameters, datatypes)
        return infer_result(await self._call(parts, harmless=True))

    async def metadata(self, model: str | None = None, version: str | None = None) -> dict[str, Any]:
        """As ``Client.metadata``."""
        return await self._get("/v2" if model is None else model_path(model, version))

    async def ready(self, model: str | None = None, version: str | None = None) -> bool:
        """As ``Client.ready``."""
        target = "/v2/health/ready" if model is None else model_path(model, version, "/ready")
        return is_ready(await self._call(request("GET", target), harmless=True))

    async def models(self) -> list[dict[str, Any]]:
        """As ``Client.models``."""
        answer: list[dict[str, Any]] = (
            await self._call(request("POST", "/v2/repository/index"), harmless=True)
        ).document()
        return answer

    async def statistics(self, model: str | None = None, version: str | None = None) -> list[dict[str, Any]]:
        """As ``Client.statistics``."""
        target = "/v2/models/stats" if model is None else model_path(model, version, "/stats")
        return statistics_of(await self._get(target))

    async def feedback(
        self,
        model: str,
        correct: bool | None = None,
        *,
        label: str | float | bool | None = None,
        predicted: str | float | bool | None = None,
        version: str | None = None,
        id: str | None = None,  # noqa: A002 - the protocol's word
    ) -> bool:
        """As ``Client.feedback``."""
        parts = feedback_request(model, version, correct, label, predicted, id)
        return bool((await self._call(parts)).document()["counted"])

    async def _get(self, target: str) -> dict[str, Any]:
        document: dict[str, Any] = (await self._call(request("GET", target), harmless=True)).document()
        return document

    async def _call(self, parts: list[Part], *, harmless: bool = False) -> Answer:
        """See ``Lines.call``."""
        try:
            return await asyncio.wait_for(self._repeated(parts, harmless=harmless), self._timeout)
        except (asyncio.TimeoutError, OSError) as error:
            if isinstance(error, asyncio.TimeoutError):
                raise DeadlineError("cannot ask the agent: no answer within the timeout") from error
            raise unreachable(self._path, error) from error

    async def _repeated(self, parts: list[Part], *, harmless: bool) -> Answer:
        try:
            if harmless:
                with contextlib.suppress(LostError):
                    return await self._on_some(parts)
            return await self._on_some(parts)
        except NotTaken:
            raise not_taken(self._path) from None

    async def _on_some(self, parts: list[Part]) -> Answer:
        while self._kept:
            with contextlib.suppress(NotTaken):
                return await self._on(self._kept.pop(), parts)
        for pause in AGAIN_S:
            with contextlib.suppress(NotTaken):
                return await self._on(await self._connected(), parts)
            await asyncio.sleep(pause)
        return await self._on(await self._connected(), parts)

    async def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while not self._connect(sock):
                await asyncio.sleep(FULL_QUEUE_PAUSE_S)
        except BaseException:
            sock.close()
            raise
        return sock

    def _connect(self, sock: socket.socket) -> bool:
        """A Unix socket connects at once or not at all, so nothing here blocks the loop."""
        try:
            sock.connect(self._path)
        except BlockingIOError:
            return False
        return True

    async def _on(self, sock: socket.socket, parts: list[Part]) -> Answer:
        try:
            answer = await _perform(sock, exchange(parts))
        except BaseException:
            sock.close()
            raise
        if answer.keep and len(self._kept) < KEPT:
            self._kept.append(sock)
        else:
            sock.close()
        return answer

    async def close(self) -> None:
        """Close the kept connections."""
        while self._kept:
            self._kept.pop().close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _perform(sock: socket.socket, steps: Generator[Step, int, Answer]) -> Answer:
    loop = asyncio.get_running_loop()
    try:
        kind, what = next(steps)
        while True:
            try:
                if kind == "send":
                    count = await _send_all(loop, sock, what)
                else:
                    count = await loop.sock_recv_into(sock, what)
            except OSError as error:
                kind, what = steps.throw(error)
            else:
                kind, what = steps.send(count)
    except StopIteration as stop:
        answer: Answer = stop.value
        return answer


async def _send_all(loop: asyncio.AbstractEventLoop, sock: socket.socket, parts: list[Part]) -> int:
    small = b"".join(part for part in parts if len(part) <= HEAD_BYTES)
    if len(small) == sum(len(part) for part in parts):
        parts = [small]
    for part in parts:
        if len(part):
            await loop.sock_sendall(sock, part)
    return 0
