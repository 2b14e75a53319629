"""What core tells link: the settings, and the messages to be published. Pure.

Core is trusted and of the same release, yet a half written answer must not make half a connection: every field that is
used is checked, an unknown one is passed over.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from agent.base.errors import DamagedError
from agent.wire.topics import DOWN, claim_topic, device_topic, is_name

State = Literal["off", "claim", "enrolled"]
Kind = Literal["state", "rpc", "alert", "tel"]

_STATES: Mapping[str, State] = {"off": "off", "claim": "claim", "enrolled": "enrolled"}
_KINDS: Mapping[str, Kind] = {"state": "state", "rpc": "rpc", "alert": "alert", "tel": "tel"}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and how it knows us. Files are paths that link's user may read; None means there is none."""

    host: str
    port: int
    tls: bool
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    username: str | None = None
    password_file: str | None = None
    keepalive_s: int = 60


@dataclass(frozen=True, slots=True)
class Settings:
    """``GET /v1/link/settings``. ``device`` is empty before enrolment, ``keyid`` names the device's identity."""

    version: int
    state: State
    tenant: str
    device: str
    keyid: str
    broker: Broker | None
    outbox_mb: int
    splay_s: float
    #: PEM of the certificate that the enrolment gave; empty without one.
    certificate: str = ""

    @property
    def client_id(self) -> str:
        """The MQTT client id, 1.3 of the specification: unambiguous, since no name holds a slash."""
        return f"{self.tenant}/claim/{self.keyid}" if self.state == "claim" else f"{self.tenant}/{self.device}"

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """The topics to listen to."""
        if self.state == "claim":
            return (self.topic("dn/enrolment"),)
        return tuple(self.topic(f"dn/{rest}") for rest in DOWN)

    def topic(self, rest: str) -> str:
        """The whole topic of ``rest`` (``up/status``); subscriptions may hold a wildcard at the end."""
        if self.state == "claim":
            return claim_topic(self.tenant, self.keyid, rest)
        return device_topic(self.tenant, self.device, rest)


@dataclass(frozen=True, slots=True)
class Message:
    """One message that core wants published: a payload, or for telemetry a record of a stream."""

    id: int | str
    topic: str
    kind: Kind
    retain: bool
    confirm: bool
    payload: bytes = b""
    stream: str = ""
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """``GET /v1/link/outgoing``. ``start`` names the start of core that answers."""

    cursor: str
    settings_version: int
    messages: tuple[Message, ...]
    start: str = ""


def parse_settings(document: Any) -> Settings:
    """Core's settings. DamagedError names the field that makes no sense."""
    known = _of(document, dict, "settings")
    state = _STATES.get(_field(known, "state", str))
    if state is None:
        raise DamagedError("cannot read core's settings: unknown state")
    tenant, device, keyid = (_optional(known, name, str) or "" for name in ("tenant", "device", "keyid"))
    if state != "off":
        _require_names(tenant, device if state == "enrolled" else keyid)
    return Settings(
        version=_field(known, "version", int),
        state=state,
        tenant=tenant,
        device=device,
        keyid=keyid,
        broker=None if state == "off" else _broker(_field(known, "broker", dict)),
        outbox_mb=max(1, _field(known, "outbox_mb", int)),
        splay_s=max(0.0, float(_field(known, "splay_s", (int, float)))),
        certificate=_optional(known, "certificate", str) or "",
    )


def _require_names(*names: str) -> None:
    if not all(is_name(name) for name in names):
        raise DamagedError("cannot read core's settings: tenant, device and keyid must be names")


def _broker(document: Mapping[str, Any]) -> Broker:
    port, keepalive_s = _field(document, "port", int), _field(document, "keepalive_s", int)
    if not 0 < port < 65536 or not 1 <= keepalive_s < 65536:
        raise DamagedError("cannot read core's settings: port and keepalive_s must be 1 to 65535")
    texts = {
        name: _optional(document, name, str) or None
        for name in ("ca_file", "cert_file", "key_file", "username", "password_file")
    }
    return Broker(_field(document, "host", str), port, _field(document, "tls", bool), keepalive_s=keepalive_s, **texts)


def parse_outgoing(document: Any) -> Outgoing:
    """Core's batch of messages. DamagedError."""
    known = _of(document, dict, "answer")
    messages = _of(known.get("messages", []), list, "messages")
    return Outgoing(
        _field(known, "cursor", str),
        _field(known, "settings_version", int),
        tuple(_message(item) for item in messages),
        _optional(known, "start", str) or "",
    )


def _message(document: Any) -> Message:
    known = _of(document, dict, "message")
    kind = _KINDS.get(_field(known, "kind", str))
    if kind is None:
        raise DamagedError("cannot read core's messages: unknown kind")
    topic = _optional(known, "topic", str) or ""
    if kind == "tel":
        stream = _field(known, "stream", str)
        if not is_name(stream):
            raise DamagedError("cannot read core's messages: a stream without a name")
        record = _field(known, "record", dict)
        return Message(_field(known, "id", (int, str)), topic, kind, False, False, stream=stream, record=record)
    if not topic.startswith("up/") or not all(is_name(part) for part in topic.split("/")):
        raise DamagedError("cannot read core's messages: the topic is none of the device's own")
    return Message(
        id=_field(known, "id", (int, str)),
        topic=topic,
        kind=kind,
        retain=bool(_optional(known, "retain", bool)),
        confirm=bool(_optional(known, "confirm", bool)),
        payload=_bytes(_optional(known, "payload", str) or ""),
    )


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DamagedError("cannot read core's messages: a payload is not base64") from error


def _of(value: Any, kind: type[_T], name: str) -> _T:
    if not isinstance(value, kind):
        raise DamagedError(f"cannot read core's answer: {name} is no {kind.__name__}")
    return value


def _field(document: Mapping[str, Any], name: str, kind: type[Any] | tuple[type[Any], ...]) -> Any:
    value = document.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DamagedError(f"cannot read core's answer: {name} is missing or of the wrong kind")
    return value


def _optional(document: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    return None if document.get(name) is None else _field(document, name, kind)


def known_streams(messages: Sequence[Message]) -> list[tuple[str, Mapping[str, Any]]]:
    """The telemetry among ``messages``, as stream and record."""
    return [(message.stream, message.record) for message in messages if message.record is not None]
