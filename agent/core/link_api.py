"""What link may do on the administration socket: docs/spec/link.md 6. One row each, all with the right ``carry``.

Link hands in bytes and takes bytes; it is told a verdict and never a reason to act on. What it reports of its own
connection is believed for what it is worth: it decides nothing but whether a configuration may stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from agent.base.errors import PeerError
from agent.serve.access import CARRY
from agent.serve.exchange import Request, Response, json_response
from agent.serve.routes import Route

if TYPE_CHECKING:
    from agent.core.outgoing import Message

MOST_WAIT_S = 60.0
_MOST_IDS = 4096
#: The largest packet that link takes: an envelope that is too large is refused by whoever counts refusals.
_MOST_BODY = 128 << 10
_MOST_CSR = 4096
#: Link speaks every 30 s while it lives.
_SILENT_S = 100.0
#: So long a device without a fleet keeps link waiting.
_NOTHING_S = 5.0


@dataclass(slots=True)
class LinkState:
    """What link last said of itself. ``heard`` is monotonic, 0 when it never spoke."""

    heard: float = 0.0
    document: dict[str, Any] = field(default_factory=dict)

    def connected(self, settings_version: int) -> bool:
        """Whether it is connected with these settings."""
        return self.shown()["connected"] is True and self.document.get("settings_version") == settings_version

    def shown(self) -> dict[str, Any]:
        """For ``status``. A link that has fallen silent is not believed any more."""
        if not self.heard:
            return {"connected": False, "reason": "the link has not been heard of"}
        silent_s = round(time.monotonic() - self.heard, 1)
        if silent_s > _SILENT_S:
            return {**self.document, "connected": False, "reason": "the link has fallen silent", "heard_s": silent_s}
        return {**self.document, "heard_s": silent_s}


class Fleet(Protocol):
    """What stands behind the rows."""

    def link_settings(self) -> dict[str, Any]: ...
    async def received(self, topic: str, data: bytes) -> dict[str, str]: ...
    async def outgoing(self, cursor: str, wait_s: float) -> tuple[str, list[Message]]: ...
    def confirmed(self, ids: set[str]) -> None: ...
    def link_said(self, document: dict[str, Any]) -> None: ...
    def certificate_requested(self, csr: str) -> None: ...
    def enrolled(self, data: bytes) -> dict[str, str]: ...


class NoFleet:
    """Stands behind the rows on a device without a ``trust.toml``: link is told to do nothing."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Link waits no longer: a restart must not wait for it."""
        self._stopping.set()

    def link_settings(self) -> dict[str, Any]:
        """Off."""
        return {"state": "off", "version": 0, "outbox_mb": 1, "splay_s": 0.0, "broker": None, "certificate": None}

    async def received(self, topic: str, data: bytes) -> dict[str, str]:
        """Refused."""
        return {"verdict": "refused", "reason": "not_enrolled"}

    async def outgoing(self, cursor: str, wait_s: float) -> tuple[str, list[Message]]:
        """Nothing, in time."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), min(wait_s, _NOTHING_S))
        return cursor, []

    def confirmed(self, ids: set[str]) -> None:
        """Nothing was said."""

    def link_said(self, document: dict[str, Any]) -> None:
        """Nobody asks."""

    def certificate_requested(self, csr: str) -> None:
        """Nobody would sign it."""

    def enrolled(self, data: bytes) -> dict[str, str]:
        """Refused."""
        return {"verdict": "refused", "reason": "not_enrolled", "certificate": ""}


class LinkApi:
    """Handlers of the rows. ``fleet`` gives who stands behind them now."""

    def __init__(self, fleet: Callable[[], Fleet]) -> None:
        self._now = fleet

    @property
    def _fleet(self) -> Fleet:
        return self._now()

    def routes(self) -> list[Route]:
        """The table."""

        def row(method: str, path: str, handler: Callable[[Request], Any], deadline_s: float = 30.0) -> Route:
            return Route(method, f"/v1/link/{path}", CARRY, handler, body_bytes=_MOST_BODY, deadline_s=deadline_s)

        return [
            row("GET", "settings", lambda request: json_response(self._fleet.link_settings())),
            row("POST", "received", self._received),
            row("GET", "outgoing", self._outgoing, MOST_WAIT_S + 15),
            row("POST", "confirmed", self._confirmed),
            row("POST", "state", self._state),
            row("POST", "csr", self._csr),
            row("POST", "enrolment", lambda request: json_response(self._fleet.enrolled(bytes(request.body)))),
        ]

    async def _received(self, request: Request) -> Response:
        topic = request.options().get("topic", "")
        return json_response(await self._fleet.received(topic, bytes(request.body)))

    async def _outgoing(self, request: Request) -> Response:
        options = request.options()
        cursor, messages = await self._fleet.outgoing(options.get("after", ""), wait_of(options))
        settings = self._fleet.link_settings()
        return json_response(
            {
                "cursor": cursor,
                "start": settings.get("boot_nonce", ""),
                "settings_version": settings["version"],
                "messages": [message.document() for message in messages],
            }
        )

    def _confirmed(self, request: Request) -> Response:
        ids = request.json().get("ids")
        if not isinstance(ids, list) or len(ids) > _MOST_IDS or not all(isinstance(one, str) for one in ids):
            raise PeerError("cannot read request: 'ids' must be a list of texts")
        self._fleet.confirmed(set(ids))
        return json_response({})

    def _state(self, request: Request) -> Response:
        document = request.json()
        if not isinstance(document.get("connected"), bool):
            raise PeerError("cannot read request: 'connected' must be true or false")
        self._fleet.link_said(_bounded(document))
        return json_response({})

    def _csr(self, request: Request) -> Response:
        csr = request.json().get("csr")
        if not isinstance(csr, str) or len(csr) > _MOST_CSR:
            raise PeerError(f"cannot read request: 'csr' must be a text of at most {_MOST_CSR} characters")
        self._fleet.certificate_requested(csr)
        return json_response({})


def wait_of(options: Mapping[str, str]) -> float:
    """``wait_s`` of a question that may be kept waiting. PeerError."""
    text = options.get("wait_s", "0")
    if not text.replace(".", "", 1).isdecimal() or len(text) > 8:
        raise PeerError("cannot read request: 'wait_s' must be a number of seconds")
    return min(float(text), MOST_WAIT_S)


def _bounded(document: Mapping[str, Any]) -> dict[str, Any]:
    """What link says of itself is shown in ``status``: plain values, one level of them below a name, all short."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value[:200]
        return value if value is None or isinstance(value, (bool, int, float)) else None

    found: dict[str, Any] = {}
    for key, value in list(document.items())[:32]:
        if isinstance(value, dict):
            found[key[:32]] = {str(name)[:32]: plain(item) for name, item in list(value.items())[:16]}
        else:
            found[key[:32]] = plain(value)
    return found
