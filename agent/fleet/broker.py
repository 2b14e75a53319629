"""The operator's connection to the broker: MQTT 5 by paho, whose thread does nothing but fill and empty queues.

Invariants: what is received is acknowledged after its effect is stored, and only on the connection that brought it; a
publication counts once the broker's reason code says so; callbacks neither raise nor call anything of ours; memory for
what has not been read is bounded (acknowledged kinds by the receive maximum, the rest by bytes).
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agent.base.errors import ConfigError, DeadlineError, RefusedError, TryLaterError
from agent.base.files import read_bounded
from agent.fleet.folder import BrokerSettings, Folder

if TYPE_CHECKING:
    from paho.mqtt.client import Client

#: docs/spec/link.md 1.5.
MAX_PACKET = 128 << 10
NO_SUBSCRIBERS = 0x10
_RECEIVE_MAXIMUM = 200
_MOST_UNREAD_BYTES = 64 << 20
_CONNECT_S = 15.0
_ANSWER_S = 30.0
_KEEPALIVE_S = 30


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came; ``connection`` is the number of the connection that brought it."""

    topic: str
    payload: bytes
    retained: bool
    message_id: int
    qos: int
    connection: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish with QoS 1. ``expiry_s``: after that the broker must not deliver it any more."""

    topic: str
    payload: bytes
    retain: bool = False
    expiry_s: int | None = None


class Broker:
    """One connection; a context manager. With ``session_s`` the broker keeps QoS 1 messages for it while it is away.

    For one thread. Raises TryLaterError where the broker cannot be reached, RefusedError where it will not have us.
    """

    def __init__(self, folder: Folder, settings: BrokerSettings, client_id: str, *, session_s: int = 0) -> None:
        self._folder = folder
        self._settings = settings
        self._client_id = client_id
        self._session_s = session_s
        self._changed = threading.Condition()
        self._client: Client | None = None
        self._unread: deque[Received] = deque()
        self._unread_bytes = 0
        self._left_out = 0
        self._taken = 0
        self._connections = 0
        self._connected = False
        self._resumed = False
        self._verdict: str | None = None
        self._published: dict[int, int] = {}
        self._granted: dict[int, list[int]] = {}
        self._filters: dict[str, int] = {}

    # -- the connection -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Broker:
        self._client = client = self._make_client()
        try:
            client.connect(
                self._settings.host,
                self._settings.port,
                keepalive=_KEEPALIVE_S,
                clean_start=self._session_s == 0,
                properties=self._connect_properties(),
            )
            client.loop_start()
            self._wait_for_answer()
        except BaseException as error:
            self._stop()
            if isinstance(error, OSError):
                raise self._unreachable(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None
            self._connected = False

    @property
    def where(self) -> str:
        """The broker, for people."""
        return f"{self._settings.host}:{self._settings.port}"

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment; a lost one is made anew by itself."""
        return self._connected

    @property
    def resumed(self) -> bool:
        """Whether the broker still had the session: else it kept nothing for us."""
        return self._resumed

    @property
    def connections(self) -> int:
        """How often it was connected: more than once after an interruption."""
        return self._connections

    @property
    def taken(self) -> int:
        """How many messages were received so far."""
        return self._taken

    @property
    def left_out(self) -> int:
        """Messages that were given up because nobody read them in time."""
        return self._left_out

    def _make_client(self) -> Client:
        mqtt = _paho()
        client: Client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=mqtt.MQTTv5, manual_ack=True
        )
        client.connect_timeout = _CONNECT_S
        client.reconnect_delay_set(1, 5)  # somebody waits, for answers that a broker without a session gives to nobody
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        if self._settings.tls:
            client.tls_set_context(self._tls())
        if self._settings.username:
            client.username_pw_set(self._settings.username, self._password())
        return client

    def _tls(self) -> ssl.SSLContext:
        settings, folder = self._settings, self._folder
        named = ""
        try:
            named = settings.ca_file
            context = ssl.create_default_context(cafile=str(folder.file(named)) if named else None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            named = settings.cert_file
            if named:
                key = folder.file(settings.key_file) if settings.key_file else None
                # An empty password instead of a prompt of OpenSSL's own: this key is not to have one.
                context.load_cert_chain(str(folder.file(named)), None if key is None else str(key), password="")
        except (OSError, ValueError) as error:  # SSLError is an OSError
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cannot use {folder.file(named)}: {reason}", hint="[broker] in fleet.toml") from error
        return context

    def _password(self) -> str | None:
        if not self._settings.password_file:
            return None
        path = self._folder.file(self._settings.password_file)
        try:
            return read_bounded(path, 4096).split(b"\n", 1)[0].decode("utf-8").rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the broker's password from {path}: {error}") from error

    def _connect_properties(self) -> Any:
        made = _properties("CONNECT")
        made.SessionExpiryInterval = self._session_s
        made.ReceiveMaximum = _RECEIVE_MAXIMUM
        made.MaximumPacketSize = MAX_PACKET
        return made

    def _wait_for_answer(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._verdict is not None, _CONNECT_S)
        if self._connected:
            return
        if self._verdict is None:
            raise TryLaterError(f"cannot connect to {self.where}: no answer within {_CONNECT_S:g} s")
        raise RefusedError(
            f"cannot connect to {self.where}: {self._verdict}",
            hint="does the broker know this certificate's authority, and its access list the name @ops?",
        )

    def _unreachable(self, error: OSError) -> Exception:
        if isinstance(error, ssl.SSLCertVerificationError):
            return RefusedError(
                f"cannot connect to {self.where}: its certificate is not to be trusted: {error.verify_message}",
                hint="ca_file in [broker] of fleet.toml names the authority; host must be a name in the certificate",
            )
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error, socket.gaierror):
            reason = "there is no such host"
        elif isinstance(error, ssl.SSLError):
            reason = f"TLS: {error.reason or reason}"
        elif isinstance(error, TimeoutError):
            reason = "no answer"
        return TryLaterError(
            f"cannot connect to {self.where}: {reason}", hint="[broker] in fleet.toml says where it is"
        )

    # -- paho's thread: note it, wake whoever waits --------------------------------------------------------------------

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        with self._changed:
            if reason.is_failure:
                self._verdict = f"it says '{reason}'"
            else:
                self._connections += 1
                self._connected = True
                self._resumed = bool(flags.session_present)
                if self._filters and self._connections > 1:
                    client.subscribe(list(self._filters.items()))
            self._changed.notify_all()

    def _on_disconnect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        with self._changed:
            self._connected = False
            if self._connections == 0 and self._verdict is None:
                self._verdict = "it closed the connection without a word"
            self._changed.notify_all()

    def _on_message(self, client: Client, userdata: Any, message: Any) -> None:
        received = Received(
            message.topic, bytes(message.payload), bool(message.retain), message.mid, message.qos, self._connections
        )
        with self._changed:
            if message.qos == 0 and self._unread_bytes > _MOST_UNREAD_BYTES:
                self._left_out += 1
                return
            self._unread.append(received)
            self._unread_bytes += len(received.payload)
            self._changed.notify_all()

    def _on_publish(self, client: Client, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        with self._changed:
            self._published[mid] = int(reason.value)
            self._changed.notify_all()

    def _on_subscribe(self, client: Client, userdata: Any, mid: int, reasons: Any, properties: Any) -> None:
        with self._changed:
            self._granted[mid] = [int(reason.value) for reason in reasons]
            self._changed.notify_all()

    # -- our thread ---------------------------------------------------------------------------------------------------

    def subscribe(self, filters: dict[str, int]) -> None:
        """Filters with their QoS. RefusedError where the access list forbids one, DeadlineError."""
        client = self._require_client()
        with self._changed:
            self._filters |= filters
            _, mid = client.subscribe(list(filters.items()))
            self._wait(lambda: mid in self._granted, "subscribe")
            granted = self._granted.pop(mid or 0)
        for name, reason in zip(filters, granted, strict=True):
            if reason >= 0x80:
                raise RefusedError(
                    f"cannot listen to {name}: the broker refuses it (reason {reason:#x})",
                    hint="its access list must let the operator read below eda/1/TENANT/",
                )

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """No longer. The broker's word is not waited for: what still comes is not wanted."""
        for name in filters:
            self._filters.pop(name, None)
        if filters:
            self._require_client().unsubscribe(list(filters))

    def receive(self, timeout_s: float, most: int = 256) -> list[Received]:
        """What has come, at most ``most``; waits up to ``timeout_s`` for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._unread, timeout_s)
            found = [self._unread.popleft() for _ in range(min(most, len(self._unread)))]
            self._taken += len(found)
            self._unread_bytes -= sum(len(message.payload) for message in found)
        return found

    def acknowledge(self, messages: Sequence[Received]) -> None:
        """Their effect is stored. Those of an earlier connection will come again: a message id is of its connection."""
        client = self._require_client()
        for message in messages:
            if message.qos and message.connection == self._connections:
                client.ack(message.message_id, message.qos)

    def publish(self, messages: Sequence[Outgoing]) -> list[int]:
        """Publish all and wait for the broker's word on each; its reason codes. DeadlineError.

        A code of 0x80 or above is a refusal; 0x10 tells that nobody has subscribed, also nobody who is away.
        """
        client = self._require_client()
        mids = []
        for message in messages:
            properties = None
            if message.expiry_s is not None:
                properties = _properties("PUBLISH")
                properties.MessageExpiryInterval = message.expiry_s
            info = client.publish(message.topic, message.payload, qos=1, retain=message.retain, properties=properties)
            mids.append(info.mid)
        with self._changed:
            self._wait(lambda: all(mid in self._published for mid in mids), "publish", len(mids))
            return [self._published.pop(mid) for mid in mids]

    def send(self, topic: str, payload: bytes) -> bool:
        """Publish with QoS 0, and wait until it is on its way; whether it is. Nobody answers for its arrival."""
        info = self._require_client().publish(topic, payload, qos=0)
        if info.rc != 0:  # not connected: paho would keep it, and nobody bounds how much
            return False
        info.wait_for_publish(_ANSWER_S)
        return bool(info.is_published())

    def _wait(self, done: Any, what: str, count: int = 1) -> None:
        """For the broker's answer, as long as there are any: a thousand publications may take their time."""
        deadline = time.monotonic() + _ANSWER_S
        known = -1
        while not done():
            if len(self._published) != known:
                known, deadline = len(self._published), time.monotonic() + _ANSWER_S
            if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise DeadlineError(f"cannot {what}: {self.where} has not answered for {_ANSWER_S:g} s ({count} sent)")

    def _require_client(self) -> Client:
        if self._client is None:
            raise RuntimeError("the broker is not connected")
        return self._client


def _paho() -> Any:
    import paho.mqtt.client as mqtt  # noqa: PLC0415 - only commands that talk to a broker need it

    return mqtt


def _properties(packet: str) -> Any:
    from paho.mqtt.packettypes import PacketTypes  # noqa: PLC0415
    from paho.mqtt.properties import Properties  # noqa: PLC0415

    return Properties(getattr(PacketTypes, packet))  # type: ignore[no-untyped-call]
