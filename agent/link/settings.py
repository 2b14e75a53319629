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
    #: Bytes of telemetry a second; 0 = as fast as it goes.
    telemetry_rate: float = 0.0

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
    known = of_kind(document, dict, "settings")
    state = _STATES.get(field_of(known, "state", str))
    if state is None:
        raise DamagedError("cannot read core's settings: unknown state")
    tenant, device, keyid = (optional_of(known, name, str) or "" for name in ("tenant", "device", "keyid"))
    if state != "off":
        _require_names(tenant, device if state == "enrolled" else keyid)
    return Settings(
        version=field_of(known, "version", int),
        state=state,
        tenant=tenant,
        device=device,
        keyid=keyid,
        broker=None if state == "off" else _broker(field_of(known, "broker", dict)),
        outbox_mb=max(1, field_of(known, "outbox_mb", int)),
        splay_s=max(0.0, float(field_of(known, "splay_s", (int, float)))),
        certificate=optional_of(known, "certificate", str) or "",
        telemetry_rate=max(0, optional_of(known, "outbox_kib_s", int) or 0) * 1024.0,
    )


def _require_names(*names: str) -> None:
    if not all(is_name(name) for name in names):
        raise DamagedError("cannot read core's settings: tenant, device and keyid must be names")


def _broker(document: Mapping[str, Any]) -> Broker:
    port, keepalive_s = field_of(document, "port", int), field_of(document, "keepalive_s", int)
    if not 0 < port < 65536 or not 1 <= keepalive_s < 65536:
        raise DamagedError("cannot read core's settings: port and keepalive_s must be 1 to 65535")
    texts = {
        name: optional_of(document, name, str) or None
        for name in ("ca_file", "cert_file", "key_file", "username", "password_file")
    }
    return Broker(
        field_of(document, "host", str), port, field_of(document, "tls", bool), keepalive_s=keepalive_s, **texts
    )


def parse_outgoing(document: Any) -> Outgoing:
    """Core's batch of messages. DamagedError."""
    known = of_kind(document, dict, "answer")
    messages = of_kind(known.get("messages", []), list, "messages")
    return Outgoing(
        field_of(known, "cursor", str),
        field_of(known, "settings_version", int),
        tuple(_message(item) for item in messages),
        optional_of(known, "start", str) or "",
    )


def _message(document: Any) -> Message:
    known = of_kind(document, dict, "message")
    kind = _KINDS.get(field_of(known, "kind", str))
    if kind is None:
        raise DamagedError("cannot read core's messages: unknown kind")
    topic = optional_of(known, "topic", str) or ""
    if kind == "tel":
        stream = field_of(known, "stream", str)
        if not is_name(stream):
            raise DamagedError("cannot read core's messages: a stream without a name")
        record = field_of(known, "record", dict)
        return Message(field_of(known, "id", (int, str)), topic, kind, False, False, stream=stream, record=record)
    if not topic.startswith("up/") or not all(is_name(part) for part in topic.split("/")):
        raise DamagedError("cannot read core's messages: the topic is none of the device's own")
    return Message(
        id=field_of(known, "id", (int, str)),
        topic=topic,
        kind=kind,
        retain=bool(optional_of(known, "retain", bool)),
        confirm=bool(optional_of(known, "confirm", bool)),
        payload=_bytes(optional_of(known, "payload", str) or ""),
    )


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DamagedError("cannot read core's messages: a payload is not base64") from error


def of_kind(value: Any, kind: type[_T], name: str) -> _T:
    """``value``, which must be of this kind. DamagedError."""
    if not isinstance(value, kind):
        raise DamagedError(f"cannot read core's answer: {name} is no {kind.__name__}")
    return value


def field_of(document: Mapping[str, Any], name: str, kind: type[Any] | tuple[type[Any], ...]) -> Any:
    """A field, which must be there and of this kind. DamagedError."""
    value = document.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DamagedError(f"cannot read core's answer: {name} is missing or of the wrong kind")
    return value


def optional_of(document: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """A field that may be missing. DamagedError where it is of another kind."""
    return None if document.get(name) is None else field_of(document, name, kind)


def known_streams(messages: Sequence[Message]) -> list[tuple[str, Mapping[str, Any]]]:
    """The telemetry among ``messages``, as stream and record."""
    return [(message.stream, message.record) for message in messages if message.record is not None]
