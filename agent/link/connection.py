"""One MQTT 5 connection: opened once, used, ended. A reconnect is a new one, so nothing of the old can leak into it.

paho is driven from asyncio by its socket callbacks and ``loop_read``, ``loop_write``, ``loop_misc``; no thread.

Invariants: an exception anywhere in paho or in a callback ends the connection, told as the reason, and never leaves a
dead one that looks alive; a message is acknowledged on the connection that it came by or not at all; a publish counts
only by the reason code of its PUBACK; a broker that makes no progress for two keepalives is left.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.base.errors import TryLaterError
from agent.link.dialling import dial

_LOG = logging.getLogger("edge_agent.link")

SESSION_EXPIRY_S = 7 * 86_400
#: Messages that the broker may have under way to us, and we to it.
RECEIVE_MAXIMUM = 16
WINDOW = 16
MAX_PACKET_BYTES = 128 << 10
#: A connection that is back sooner was never away: no "offline" for it.
WILL_DELAY_S = 5
#: CONNECT to CONNACK and SUBACK.
_HANDSHAKE_S = 20.0
_GOODBYE_S = 2.0
_SILENT_KEEPALIVES = 2

NORMAL, WITH_WILL, TAKEN_OVER, TOO_LARGE = 0x00, 0x04, 0x8E, 0x95
#: In place of a reason code: the connection ended before there was one.
LOST = -1


@dataclass(frozen=True, slots=True)
class Plan:
    """Where and as whom to connect, and what to listen to. ``will``: topic and payload, retained."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    client_id: str
    keepalive_s: int
    username: str | None
    password: str | None
    will: tuple[str, bytes] | None
    subscriptions: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A message from the broker. ``ack`` sends its PUBACK on the connection that it came by, or nothing at all."""

    topic: str
    payload: bytes
    qos: int
    ack: Callable[[], None]


@dataclass(frozen=True, slots=True)
class End:
    """Why a connection ended; ``code`` is the broker's reason where it gave one, ``closed``: it closed without."""

    reason: str
    code: int | None = None
    closed: bool = False

    @property
    def takeover(self) -> bool:
        """Another client came with the same identity."""
        return self.code == TAKEN_OVER


class _Paho(Client):
    """paho on a socket that is connected already."""

    prepared: socket.socket

    def _create_socket(self) -> socket.socket:
        return self.prepared


def _properties(packet: int) -> Properties:
    return Properties(packet)  # type: ignore[no-untyped-call]


class _LastError(logging.Handler):
    """paho tells what went wrong with a socket to its logger only."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class Connection:
    """``open``, then ``publish`` until ``ended`` is done. All on the event loop's thread.

    ``received`` gets each message; ``tick`` is called now and then while the connection makes progress.
    """

    def __init__(self, plan: Plan, received: Callable[[Received], None], tick: Callable[[], None]) -> None:
        self._plan = plan
        self._received = received
        self._tick_done = tick
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[End] = self._loop.create_future()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._said: End | None = None
        self._waiting: dict[int, tuple[asyncio.Future[int], float]] = {}
        self._descriptor: int | None = None
        self._held = False
        self._timer: asyncio.TimerHandle | None = None
        self._heard = self._loop.time()
        self._keepalive_s = plan.keepalive_s
        self._max_packet = 1 << 28
        self._errors = _LastError()
        self._client = self._make_client()
        #: What the broker said in its CONNACK.
        self.session_present = False
        self.window = WINDOW

    # -- opening ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Dial, connect, subscribe. TryLaterError with the reason when any of it fails."""
        plan = self._plan
        try:
            self._client.prepared = await dial(plan.host, plan.port, plan.tls, float(plan.keepalive_s))
            self._drive(self._connect)
            either: set[asyncio.Future[Any]] = {self._ready, self.ended}
            await asyncio.wait(either, timeout=_HANDSHAKE_S, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self.abort("given up")
            raise
        if not self._ready.done():
            self.abort(f"no answer to CONNECT within {_HANDSHAKE_S:.0f} s")
        if self.ended.done():
            raise TryLaterError(f"cannot connect to {plan.host} port {plan.port}: {self.ended.result().reason}")

    def _make_client(self) -> _Paho:
        plan = self._plan
        client = _Paho(CallbackAPIVersion.VERSION2, plan.client_id, protocol=MQTTv5, manual_ack=True)
        client.username, client.password = plan.username, plan.password
        if plan.will is not None:
            delay = _properties(PacketTypes.WILLMESSAGE)
            delay.WillDelayInterval = WILL_DELAY_S
            client.will_set(*plan.will, qos=1, retain=True, properties=delay)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write
        logger = logging.Logger("paho", logging.ERROR)
        logger.addHandler(self._errors)
        client.enable_logger(logger)
        return client

    def _connect(self) -> MQTTErrorCode:
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        plan = self._plan
        code = self._client.connect(plan.host, plan.port, plan.keepalive_s, clean_start=False, properties=properties)
        self._heard = self._loop.time()
        self._schedule_tick()
        return code

    # -- using --------------------------------------------------------------------------------------------------------

    @property
    def under_way(self) -> int:
        """Published messages that wait for their PUBACK."""
        return len(self._waiting)

    def publish(self, topic: str, payload: bytes, *, retain: bool, qos: int = 1) -> asyncio.Future[int]:
        """Publish; the future holds the reason code of the PUBACK, or ``LOST``. ValueError for a bad topic.

        What is larger than the broker takes is answered here: the broker would end the connection for it. With QoS 0
        there is no PUBACK, and the answer is 0 at once.
        """
        answer: asyncio.Future[int] = self._loop.create_future()
        if self.ended.done():
            answer.set_result(LOST)
        elif len(topic.encode()) + len(payload) + 32 > self._max_packet:
            answer.set_result(TOO_LARGE)
        else:
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                answer.set_result(LOST)
                self.abort(f"cannot publish: {error_string(info.rc)}")
            elif qos == 0:
                answer.set_result(0)
            else:
                self._waiting[info.mid] = answer, self._loop.time()
        return answer

    def _ack(self, mid: int, qos: int) -> None:
        """When the connection has ended, nothing: the number would be another message's on the next one."""
        if not self.ended.done() and qos:
            self._drive(lambda: self._client.ack(mid, qos))

    async def close(self, code: int) -> None:
        """Say goodbye with a DISCONNECT and end."""
        if not self.ended.done():
            reason = ReasonCode(PacketTypes.DISCONNECT, identifier=code)
            self._drive(lambda: self._client.disconnect(reason))
            await asyncio.wait({self.ended}, timeout=_GOODBYE_S)
        self.abort("closed")

    def abort(self, reason: str) -> None:
        """End at once, without a word to the broker. Harmless when it has ended."""
        self._finish(End(reason))

    # -- driving paho -------------------------------------------------------------------------------------------------

    def _drive(self, step: Callable[[], MQTTErrorCode]) -> None:
        """Let paho do something. Never called from one of its callbacks: it holds a lock then."""
        if self.ended.done():
            return
        try:
            code = step()
        except Exception as error:  # noqa: BLE001 - whatever it was, going on would mean a dead connection that looks alive
            _LOG.error("the connection failed", exc_info=error)
            self._finish(End(f"failed: {error!r}"))
            return
        if self._said is not None:
            self._finish(self._said)
        elif code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._finish(End(self._described(error_string(code))))

    def _described(self, text: str) -> str:
        return f"{text.rstrip('.')}: {self._errors.text}" if self._errors.text else text.rstrip(".")

    def hold(self, *, stop: bool) -> None:
        """Read nothing more, so that the broker's own window fills and it waits; or read on."""
        self._held = stop
        if self._descriptor is None:
            return
        if stop:
            self._loop.remove_reader(self._descriptor)
        else:
            self._loop.add_reader(self._descriptor, self._readable)
            self._loop.call_soon(self._readable)  # what TLS holds already shows nowhere else

    def _readable(self) -> None:
        if self._held:
            return
        self._heard = self._loop.time()
        self._drive(self._client.loop_read)
        if self.ended.done():
            return
        # paho reads as much as is announced, and has no other way to see that: it must not fill the memory first.
        if self._client._in_packet["remaining_length"] > MAX_PACKET_BYTES:
            self.abort("the broker sends a packet that is too large")
            return
        # Bytes that TLS has decrypted already do not make the descriptor readable.
        pending = getattr(self._client.prepared, "pending", None)
        if pending is not None and pending():
            self._loop.call_soon(self._readable)

    def _writable(self) -> None:
        self._drive(self._client.loop_write)

    def _schedule_tick(self) -> None:
        self._timer = self._loop.call_later(max(0.25, self._keepalive_s / 8), self._tick)

    def _tick(self) -> None:
        self._drive(self._client.loop_misc)
        if self.ended.done():
            return
        patience = self._loop.time() - _SILENT_KEEPALIVES * self._keepalive_s
        if self._heard < patience:
            self.abort("nothing heard from the broker")
        elif any(sent < patience for _, sent in self._waiting.values()):
            self.abort("the broker confirms nothing")
        else:
            self._tick_done()
            self._schedule_tick()

    def _finish(self, end: End) -> None:
        if self.ended.done():
            return
        self.ended.set_result(end)
        if self._timer is not None:
            self._timer.cancel()
        client = self._client
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            self._descriptor = None
        for name in ("connect", "subscribe", "message", "publish", "disconnect"):
            setattr(client, f"on_{name}", None)
        for name in ("open", "close", "register_write", "unregister_write"):
            setattr(client, f"on_socket_{name}", None)
        if hasattr(client, "prepared"):
            client.prepared.close()
        waiting, self._waiting = self._waiting, {}
        for answer, _ in waiting.values():
            if not answer.done():
                answer.set_result(LOST)

    # -- paho's callbacks: they note, and leave the doing to _drive ---------------------------------------------------

    def _on_socket_open(self, _client: Any, _data: Any, sock: Any) -> None:
        self._descriptor = sock.fileno()
        self._loop.add_reader(self._descriptor, self._readable)

    def _on_socket_close(self, _client: Any, _data: Any, _sock: Any) -> None:
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            self._descriptor = None  # the number may be somebody else's from now on

    def _on_register_write(self, _client: Any, _data: Any, _sock: Any) -> None:
        if self._descriptor is not None:
            self._loop.add_writer(self._descriptor, self._writable)

    def _on_unregister_write(self, _client: Any, _data: Any, _sock: Any) -> None:
        if self._descriptor is not None:
            self._loop.remove_writer(self._descriptor)

    def _on_connect(self, client: Client, _data: Any, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            self._say(End(f"the broker refuses: {code}", code.value))
            return
        self.session_present = flags.session_present
        # One less than the broker takes: the device's own status goes beside what the publisher sends.
        self.window = max(1, min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW + 1) - 1))
        self._max_packet = getattr(properties, "MaximumPacketSize", self._max_packet)
        self._keepalive_s = getattr(properties, "ServerKeepAlive", 0) or self._keepalive_s
        # Retained messages come with every connect: what a broker lost or we missed is heard then.
        client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in self._plan.subscriptions])

    def _on_subscribe(self, _client: Any, _data: Any, _mid: int, codes: list[ReasonCode], _properties: Any) -> None:
        for topic, code in zip(self._plan.subscriptions, codes, strict=True):
            if code.is_failure:
                self._say(End(f"the broker refuses to let us read {topic}: {code}", code.value))
                return
        if not self._ready.done():
            self._ready.set_result(None)

    def _on_message(self, _client: Any, _data: Any, message: MQTTMessage) -> None:
        ack = partial(self._ack, message.mid, message.qos)
        self._received(Received(message.topic, bytes(message.payload), message.qos, ack))

    def _on_publish(self, _client: Any, _data: Any, mid: int, code: ReasonCode, _properties: Any) -> None:
        answer, _ = self._waiting.pop(mid, (None, 0.0))
        if answer is not None and not answer.done():
            answer.set_result(code.value)

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, code: ReasonCode, _properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            self._say(End(f"the broker disconnects: {code}", code.value))
        elif code == "Unspecified error":  # paho's word for a connection that is lost; its logger knows why
            self._say(End(self._errors.text or "the broker closed the connection", closed=not self._errors.text))
        else:
            self._say(End(self._described(str(code))))

    def _say(self, end: End) -> None:
        """Keep the first reason: what follows from it is said after it."""
        self._said = self._said or end
