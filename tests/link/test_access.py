"""What the shipped configuration of mosquitto lets whom do, as the broker itself says."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.link.broker import RENDER, TENANT, Broker, Credentials, until

REFUSED = 0x87


class Guest:
    """Any client that comes with some certificate: what it hears, and what the broker answers to what it says."""

    def __init__(self, port: int, credentials: Credentials | None, client_id: str) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.connected: int | None = None
        self.ended = threading.Event()
        self._codes: dict[int, int] = {}
        self._client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTv5, reconnect_on_failure=False)
        if credentials is not None:
            self._client.tls_set(str(credentials.ca), str(credentials.certificate), str(credentials.key))
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = lambda *_: self.ended.set()
        self._client.on_message = lambda _client, _data, message: self.heard.append((message.topic, message.payload))
        self._client.on_publish = self._on_publish
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 60
        self._client.connect("localhost", port, clean_start=False, properties=session)
        self._client.loop_start()

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        self.connected = code.value

    def _on_publish(self, _client: Any, _data: Any, mid: int, code: Any, _properties: Any) -> None:
        self._codes[mid] = code.value

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> int:
        info = self._client.publish(f"eda/1/{topic}", payload, qos=1, retain=retain)
        return int(until(lambda: self._codes.get(info.mid, -1) + 1, topic)) - 1

    def subscribe(self, topic: str) -> None:
        self._client.subscribe(topic, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def guest(port: int, credentials: Credentials | None, client_id: str = "guest") -> Iterator[Guest]:
    subject = Guest(port, credentials, client_id)
    try:
        yield subject
    finally:
        subject.close()


def admitted(port: int, credentials: Credentials | None) -> bool:
    try:
        with guest(port, credentials) as subject:
            until(lambda: subject.connected is not None or subject.ended.is_set(), "an answer")
            return subject.connected == 0
    except OSError:  # the handshake itself failed
        return False


def test_a_device_speaks_below_its_own_up_and_nowhere_else(broker: Broker) -> None:
    with guest(broker.port, broker.device("d1")) as device:
        for rest in ("status", "info", "reported", "job/j1", "rpc", "tel/heat", "alert/heat"):
            assert device.publish(f"{TENANT}/d1/up/{rest}") != REFUSED
        for topic in (
            f"{TENANT}/d2/up/status", f"{TENANT}/d1/dn/job", f"{TENANT}/d2/dn/job", f"{TENANT}/claim/d1/up/announce",
            f"{TENANT}/d1/other", "other/d1/up/status", f"{TENANT}/@ops/up/x", f"{TENANT}/d1",
        ):  # fmt: skip
            assert device.publish(topic) == REFUSED, topic


def test_a_device_hears_its_own_dn_and_nothing_else(broker: Broker) -> None:
    operator = broker.operator()
    with guest(broker.port, broker.device("d1")) as device, guest(broker.port, broker.device("d2")) as other:
        for topic in ("#", "eda/1/#", f"eda/1/{TENANT}/+/dn/#", f"eda/1/{TENANT}/d2/up/#", "$SYS/#"):
            device.subscribe(topic)
        other.publish(f"{TENANT}/d2/up/info", b"secret", retain=True)
        operator.publish("d2/dn/job", b"secret", retain=True)
        operator.publish("d1/dn/job", b"mine")
        until(lambda: device.heard, "its own")
        assert {payload for _, payload in device.heard} == {b"mine"}


def test_the_client_id_is_that_of_the_certificate_whatever_the_device_says(broker: Broker) -> None:
    """Otherwise any device could throw any other out, or take its session and what waits in it."""
    with guest(broker.port, broker.device("d1"), "x") as first:
        until(lambda: first.connected == 0, "connected")
        with guest(broker.port, broker.device("d2"), "d1") as thief:
            until(lambda: thief.connected == 0, "connected")
            assert not first.ended.wait(0.5)
        with guest(broker.port, broker.device("d1"), "y"):
            assert first.ended.wait(20), "but the device itself, come anew, does"


def test_each_listener_admits_its_own_certificates_only(broker: Broker) -> None:
    broker.claims.start()
    device, claimant = broker.device("d1"), broker.claimant()
    ops = Credentials(broker.server_ca, broker.folder / "ops.pem", broker.folder / "ops.key")
    ports = (broker.port, broker.operator_port, broker.claim_port)
    for credentials, own in ((device, broker.port), (ops, broker.operator_port), (claimant, broker.claim_port)):
        assert [admitted(port, credentials) for port in ports] == [port == own for port in ports]
    assert not any(admitted(port, None) for port in ports)


def test_a_claimant_announces_and_hears_enrolments_and_nothing_else(broker: Broker) -> None:
    broker.claims.start()
    with guest(broker.claim_port, broker.claimant(), f"{TENANT}/claim/k1") as claimant:
        assert claimant.publish(f"{TENANT}/claim/k1/up/announce") != REFUSED
        for topic in (f"{TENANT}/d1/up/status", f"{TENANT}/claim/k1/dn/enrolment", f"{TENANT}/d1/dn/job"):
            assert claimant.publish(topic) == REFUSED, topic


def test_what_a_collector_may_read_is_telemetry(broker: Broker) -> None:
    broker.operators.issue(broker.folder, "collector", "@collector")
    files = Credentials(broker.server_ca, broker.folder / "collector.pem", broker.folder / "collector.key")
    with guest(broker.operator_port, files) as collector, guest(broker.port, broker.device("d1")) as device:
        collector.subscribe("eda/1/#")
        until(lambda: collector.connected == 0, "connected")
        assert collector.publish(f"{TENANT}/d1/dn/job") == REFUSED
        device.publish(f"{TENANT}/d1/up/info", b"not this")
        device.publish(f"{TENANT}/d1/up/tel/heat", b"this")
        until(lambda: collector.heard, "telemetry")
        assert [payload for _, payload in collector.heard] == [b"this"]


def test_retained_messages_are_still_given_out_after_a_restart(broker: Broker) -> None:
    """mosquitto then asks whether their author may still publish there."""
    operator = broker.operator()
    operator.publish("d1/dn/job", b"a job", retain=True)
    broker.restart()
    with guest(broker.port, broker.device("d1")) as device:
        until(lambda: device.connected == 0, "connected")
        device.subscribe(f"eda/1/{TENANT}/d1/dn/job")
        until(lambda: [payload for _, payload in device.heard] == [b"a job"], "the job")


@pytest.mark.parametrize(
    "arguments",
    [
        ["a/b", "."],
        ["a", "missing"],
        ["", "."],
        ["a", ".", "PORT"],
        ["a", ".", "NAME=1"],
        ["a", ".", "PORT=1|2"],
        ["a"],
    ],
)
def test_what_cannot_be_rendered_is_told(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([str(RENDER), *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: cannot render:")
    assert list(tmp_path.iterdir()) == []
