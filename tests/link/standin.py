"""A small core for tests of the link: the rows of docs/spec/link.md 6 on the real server of ``admin.sock``.

What it accepted is in ``taken``, as if on disk: it stays when the stand-in is stopped and started again, while ids,
cursors and what was acknowledged by them do not, as in the real core.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.base.config import DeliveryConfig
from agent.base.errors import AgentError
from agent.core.incoming_api import IncomingApi
from agent.serve.access import CARRY
from agent.serve.admin import ADMIN_LIMITS, admin_server
from agent.serve.exchange import Request, Response, json_response
from agent.serve.routes import Route
from agent.serve.server import Server
from agent.trust.desk import Desk
from tests.link.broker import TENANT, Credentials, until
from tests.serve.running import Running

KEYID = "0123456789abcdef0123456789abcdef"
_LIMITS = replace(ADMIN_LIMITS, body_bytes=256 << 10, request_s=90.0, idle_s=75.0)


class StandIn:
    """``with StandIn(socket, port, credentials) as core``. Everything but ``start`` and ``stop`` is plain data."""

    def __init__(
        self, path: Path, port: int, credentials: Credentials | None, device: str = "d1", **settings: Any
    ) -> None:
        ca, certificate, key = map(str, credentials) if credentials else ("", "", "")
        self._path = path
        self._running: Running | None = None
        self.settings: dict[str, Any] = {
            "state": "enrolled", "tenant": TENANT, "device": device, "epoch": 1, "keyid": KEYID,
            "boot_nonce": "0" * 32, "outbox_mb": 1, "splay_s": 0, "version": 1, "certificate": None,
            "broker": {
                "host": "localhost", "port": port, "tls": credentials is not None, "keepalive_s": 5,
                "ca_file": ca, "cert_file": certificate, "key_file": key, "username": "", "password_file": "",
            },
        }  # fmt: skip
        self.settings.update(settings)
        #: Each hand-in with its verdict, in order; what was accepted; and what to answer in place of a verdict.
        self.hand_ins: list[tuple[str, bytes, str]] = []
        self.taken: list[tuple[str, bytes]] = []
        self.judge: Callable[[str, bytes], str] = lambda topic, payload: "accepted"
        self.fail: Callable[[str, bytes], AgentError | None] = lambda topic, payload: None
        self.slow_s = 0.0
        self.states: list[dict[str, Any]] = []
        self.csrs: list[str] = []
        self.enrol: Callable[[bytes], dict[str, Any]] = lambda envelope: {"verdict": "refused", "reason": "malformed"}
        #: What is wanted from outside, of this start, and from where.
        self.desk = Desk()
        self.delivery = DeliveryConfig()
        #: Waiting to be published: text of the topic -> message; confirmed ones are gone, whatever link that was.
        self._messages: list[dict[str, Any]] = []
        self._lock = asyncio.Lock()

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> StandIn:
        self._nonce = secrets.token_hex(4)
        self.desk = Desk()
        self._count = 0
        self._acknowledged = 0
        for message in self._messages:
            message["id"] = self._next()
        self._running = Running(self._make, self._path)
        self._running.__enter__()
        return self

    def stop(self) -> None:
        """As a kill would: nothing is drained."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def __enter__(self) -> StandIn:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _next(self) -> int:
        self._count += 1
        return self._count

    # -- for the test -------------------------------------------------------------------------------------------------

    def say(self, topic: str, payload: bytes, kind: str = "state", **fields: Any) -> None:
        """Something to publish; confirmed by default."""
        message = {"topic": topic, "kind": kind, "retain": False, "confirm": kind == "state", **fields}
        message["payload"] = base64.b64encode(payload).decode()
        self._add(message)

    def record(self, stream: str, **record: Any) -> None:
        """One record of telemetry."""
        self._add({"topic": f"up/tel/{stream}", "kind": "tel", "stream": stream, "record": record})

    def _add(self, message: dict[str, Any]) -> None:
        message["id"] = self._next()
        self._messages.append(message)

    def change(self, **settings: Any) -> None:
        """New settings."""
        self.settings = {**self.settings, **settings, "version": self.settings["version"] + 1}

    @property
    def unconfirmed(self) -> int:
        return sum(bool(message.get("confirm")) for message in self._messages)

    @property
    def waiting(self) -> int:
        """Messages that no link has taken over yet."""
        return len(self._messages)

    @property
    def state(self) -> dict[str, Any]:
        return self.states[-1] if self.states else {}

    def until_state(self, **wanted: Any) -> dict[str, Any]:
        """Wait until the link has reported this."""

        def reached() -> dict[str, Any] | None:
            state = self.state
            return state if state and all(state[name] == value for name, value in wanted.items()) else None

        found: dict[str, Any] = until(reached, f"the link reports {wanted}; it said {self.states[-3:]}")
        return found

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _make(self) -> Server:
        rows = (
            ("GET", "settings", self._get_settings), ("POST", "received", self._received),
            ("GET", "outgoing", self._outgoing), ("POST", "confirmed", self._confirmed),
            ("POST", "state", self._state), ("POST", "csr", self._csr), ("POST", "enrolment", self._enrolment),
        )  # fmt: skip
        routes = [Route(method, f"/v1/link/{name}", CARRY, handler) for method, name, handler in rows]
        incoming = IncomingApi(self.desk, lambda: self.delivery)
        incoming.start()
        return admin_server([*routes, *incoming.routes()], link_uid=None, limits=_LIMITS)

    def _get_settings(self, _request: Request) -> Response:
        return json_response(self.settings)

    async def _received(self, request: Request) -> Response:
        topic, payload = request.options()["topic"], bytes(request.body)
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        failure = self.fail(topic, payload)
        if failure is not None:
            raise failure
        verdict = "duplicate" if (topic, payload) in self.taken else self.judge(topic, payload)
        if verdict == "accepted":
            self.taken.append((topic, payload))
        self.hand_ins.append((topic, payload, verdict))
        return json_response({"verdict": verdict, "reason": "" if verdict != "refused" else "malformed"})

    async def _outgoing(self, request: Request) -> Response:
        options = request.options()
        nonce, _, number = options.get("after", "").partition(":")
        seen = int(number) if nonce == self._nonce else 0
        self._messages = [item for item in self._messages if item["id"] > seen or item.get("confirm")]
        deadline = asyncio.get_running_loop().time() + min(float(options["wait_s"]), 5.0)
        version = self.settings["version"]
        while True:
            later = [item for item in self._messages if item["id"] > seen][:200]
            waited = asyncio.get_running_loop().time() > deadline or self.settings["version"] != version
            if later or waited:
                break
            await asyncio.sleep(0.005)
        last = later[-1]["id"] if later else seen
        named = [{**item, "id": f"{self._nonce}:{item['id']}"} for item in later]
        return json_response(
            {"cursor": f"{self._nonce}:{last}", "settings_version": self.settings["version"], "messages": named}
        )

    def _confirmed(self, request: Request) -> Response:
        ids = set(request.json()["ids"])
        self._messages = [item for item in self._messages if f"{self._nonce}:{item['id']}" not in ids]
        return json_response({})

    def _state(self, request: Request) -> Response:
        self.states.append(request.json())
        return json_response({})

    def _csr(self, request: Request) -> Response:
        self.csrs.append(str(request.json()["csr"]))
        return json_response({})

    def _enrolment(self, request: Request) -> Response:
        return json_response(self.enrol(bytes(request.body)))


def document(payload: bytes) -> Any:
    """A payload as JSON."""
    return json.loads(payload)
