"""What link asks of core, over ``admin.sock``: docs/spec/link.md 6. A small HTTP/1.1 client on asyncio.

Every request here may be repeated: core answers a second hand-in as a duplicate. So a kept connection that turns out to
be closed is replaced without a word; anything else that goes wrong is told to the caller, who knows when to try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from agent.base.errors import AgentError, DamagedError, TryLaterError
from agent.link.settings import Outgoing, Settings, parse_outgoing, parse_settings
from agent.link.sources import Word
from agent.link.wanted import Listing, Put, parse_listing, parse_put

_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 16 << 20
_HEAD_BYTES = 16384
_KEPT = 4
_CONFLICT = 409
#: Core flushes what it is given now and then, and a card takes its time.
_FLUSH_S = 200.0


class CoreAbsentError(TryLaterError):
    """Core does not answer: it restarts, hangs, or has no such socket yet."""


class CoreRefusalError(AgentError):
    """Core answered with an error: it lives, but this request it did not take."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"cannot hand over to core: {status} {text}")
        self.status = status


class CoreMovedError(CoreRefusalError):
    """Core waits for other bytes of a want: those from ``offset`` on."""

    def __init__(self, text: str, offset: int) -> None:
        super().__init__(_CONFLICT, text)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Verdict:
    """Core's answer to what came from the broker; ``certificate`` only to an enrolment."""

    verdict: str
    reason: str = ""
    certificate: str = ""


class Core(Protocol):
    """What link needs of core. Each call raises CoreAbsentError, CoreRefusalError, or DamagedError for nonsense."""

    async def settings(self) -> Settings: ...

    async def received(self, topic: str, payload: bytes) -> Verdict: ...

    async def outgoing(self, after: str, wait_s: float) -> Outgoing: ...

    async def confirmed(self, ids: Iterable[int | str]) -> None: ...

    async def state(self, document: Mapping[str, Any]) -> None: ...

    async def csr(self, pem: str) -> None: ...

    async def enrolment(self, envelope: bytes) -> Verdict: ...

    async def wants(self, known: int | None, wait_s: float) -> Listing: ...

    async def put(self, want: str, offset: int, data: memoryview | bytes, *, last: bool) -> Put: ...

    async def failed(self, want: str, code: Word, text: str) -> None: ...


class CoreClient:
    """``Core`` behind a Unix socket."""

    def __init__(self, socket: Path, timeout_s: float = _TIMEOUT_S) -> None:
        self._socket = socket
        self._timeout_s = timeout_s
        self._kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def settings(self) -> Settings:
        """How to reach the broker, and as whom."""
        return parse_settings(await self._call("GET", "/v1/link/settings"))

    async def received(self, topic: str, payload: bytes) -> Verdict:
        """Hand in a message from the broker; the answer means that it is durable, or refused for good."""
        target = "/v1/link/received?" + urlencode({"topic": topic}, quote_via=quote, safe="/")
        return _verdict(await self._call("POST", target, payload))

    async def outgoing(self, after: str, wait_s: float) -> Outgoing:
        """Messages after the cursor (empty: from the beginning); waits up to ``wait_s`` for the first one."""
        query = {"wait_s": f"{wait_s:g}", **({"after": after} if after else {})}
        target = "/v1/link/outgoing?" + urlencode(query)
        return parse_outgoing(await self._call("GET", target, timeout_s=wait_s + self._timeout_s))

    async def confirmed(self, ids: Iterable[int | str]) -> None:
        """The broker has these."""
        await self._call("POST", "/v1/link/confirmed", {"ids": list(ids)})

    async def state(self, document: Mapping[str, Any]) -> None:
        """How the connection and the outbox are."""
        await self._call("POST", "/v1/link/state", document)

    async def csr(self, pem: str) -> None:
        """The certificate request that goes into the announcement."""
        await self._call("POST", "/v1/link/csr", {"csr": pem})

    async def enrolment(self, envelope: bytes) -> Verdict:
        """Hand in an enrolment."""
        return _verdict(await self._call("POST", "/v1/link/enrolment", envelope))

    async def wants(self, known: int | None, wait_s: float) -> Listing:
        """What core wants to be fetched; waits up to ``wait_s`` for another list than the known one."""
        query = {"wait_s": f"{wait_s:g}", **({} if known is None else {"known": str(known)})}
        target = "/v1/link/wants?" + urlencode(query)
        return parse_listing(await self._call("GET", target, timeout_s=wait_s + self._timeout_s))

    async def put(self, want: str, offset: int, data: memoryview | bytes, *, last: bool) -> Put:
        """Bring bytes of a want, those from ``offset`` on. CoreMovedError when others are waited for."""
        query = {"offset": str(offset), **({"end": "1"} if last else {})}
        target = f"/v1/incoming/{quote(want, safe='')}?" + urlencode(query)
        return parse_put(await self._call("PUT", target, bytes(data), timeout_s=_FLUSH_S))

    async def failed(self, want: str, code: Word, text: str) -> None:
        """The bytes of a want will not come."""
        await self._call("POST", f"/v1/incoming/{quote(want, safe='')}/failed", {"code": code, "text": text})

    def close(self) -> None:
        """Close the kept connections."""
        while self._kept:
            self._kept.pop()[1].close()

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    async def _call(
        self, method: str, target: str, body: Mapping[str, Any] | bytes = b"", timeout_s: float | None = None
    ) -> Any:
        raw = isinstance(body, bytes)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if raw else "application/json"
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: core\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        try:
            status, answer = await asyncio.wait_for(self._exchange(head.encode() + data), timeout_s or self._timeout_s)
        except asyncio.TimeoutError as error:
            raise CoreAbsentError("cannot reach core: it does not answer") from error
        except (OSError, EOFError) as error:
            raise CoreAbsentError(f"cannot reach core at {self._socket}: {error}") from error
        return _document(status, answer)

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        """One request and its answer, on a kept connection where there is one that core has not closed meanwhile."""
        while self._kept:
            kept = self._kept.pop()
            with contextlib.suppress(ConnectionError, EOFError):
                return await self._on(kept, request)
        return await self._on(await asyncio.open_unix_connection(str(self._socket), limit=_HEAD_BYTES), request)

    async def _on(self, pair: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> tuple[int, bytes]:
        reader, writer = pair
        try:
            writer.write(request)
            await writer.drain()
            status, length, keep = _head(await reader.readuntil(b"\r\n\r\n"))
            answer = await reader.readexactly(length)
        except BaseException as error:
            writer.close()
            if isinstance(error, asyncio.LimitOverrunError):
                raise DamagedError("cannot read core's answer: its head is too long") from error
            raise
        if keep and len(self._kept) < _KEPT:
            self._kept.append(pair)
        else:
            writer.close()
        return status, answer


def _head(data: bytes) -> tuple[int, int, bool]:
    """Status, length of the body, and whether the connection stays open."""
    first, *lines = data.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status, length = first[9:12], fields.get("content-length", "")
    if not first.startswith("HTTP/1.1 ") or not status.isdecimal() or not length.isdecimal() or len(length) > 9:
        raise DamagedError("cannot read core's answer: not HTTP as core speaks it")
    if int(length) > _MAX_ANSWER_BYTES:
        raise DamagedError(f"cannot read core's answer: {length} bytes")
    return int(status), int(length), fields.get("connection", "").lower() != "close"


def _document(status: int, answer: bytes) -> Any:
    try:
        document = json.loads(answer) if answer else {}
    except (ValueError, RecursionError) as error:
        raise DamagedError("cannot read core's answer: not JSON") from error
    if status < 400:
        return document
    known = document if isinstance(document, dict) else {}
    text, offset = known.get("error", ""), known.get("offset")
    if status == _CONFLICT and isinstance(offset, int):
        raise CoreMovedError(str(text), offset)
    raise CoreRefusalError(status, str(text))


def _verdict(document: Any) -> Verdict:
    known = document if isinstance(document, dict) else {}
    if known.get("verdict") not in ("accepted", "duplicate", "refused"):
        raise DamagedError("cannot read core's verdict")
    texts = (str(known.get(name) or "") for name in ("reason", "certificate"))
    return Verdict(str(known["verdict"]), *texts)
