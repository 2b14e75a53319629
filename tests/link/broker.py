"""A real mosquitto with the shipped configuration, TLS and access list, and an operator to speak to it.

For other tests too: ``with Broker(folder) as broker: broker.device("d1")``; the broker can be killed and comes back on
the same ports with what it had saved.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests.link.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
RENDER = ROOT / "deploy" / "mosquitto" / "render.sh"
TENANT = "acme"
PATIENCE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for ``condition`` and give what it gave; fails the test when it does not come true."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {patience_s:.0f} s: {what}")


class Credentials(NamedTuple):
    """Files of one client."""

    ca: Path
    certificate: Path
    key: Path


class Process:
    """mosquitto on one configuration file."""

    def __init__(self, config: Path, ports: tuple[int, ...]) -> None:
        self._config = config
        self._ports = ports
        self._process: subprocess.Popen[bytes] | None = None
        self.log = config.with_suffix(".log")

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(["/usr/sbin/mosquitto", "-c", str(self._config)], stderr=log, stdout=log)
        until(self._listening, f"mosquitto listens\n{self.log.read_text()}")

    @property
    def pid(self) -> int:
        """Of the running broker."""
        assert self._process is not None
        return self._process.pid

    def _listening(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        for port in self._ports:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; SIGKILL: without saving."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)
            self._process = None

    def save(self) -> None:
        """Write everything to disk now."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)


class Broker:
    """The broker of a tenant, and on demand the one for claims."""

    def __init__(self, folder: Path, tenant: str = TENANT, extra: str = "") -> None:
        self.folder, self.tenant = folder, tenant
        self.port, self.operator_port, self.claim_port = free_port(), free_port(), free_port()
        self.devices, self.operators, self.claimants = (Authority(f"{name} CA") for name in ("device", "ops", "claim"))
        self._server = Authority("server CA")
        self._make_files()
        self._render(extra)
        self.process = Process(folder / "broker.conf", (self.port, self.operator_port))
        self.claims = Process(folder / "claims.conf", (self.claim_port,))
        self._operators: list[Operator] = []

    def _make_files(self) -> None:
        for name, authority in (
            ("server-ca", self._server), ("devices-ca", self.devices),
            ("operators-ca", self.operators), ("claims-ca", self.claimants),
        ):  # fmt: skip
            (self.folder / f"{name}.pem").write_bytes(authority.pem)
        self._server.issue(self.folder, "server", "broker", host="localhost")
        self.operators.issue(self.folder, "ops", "@ops")
        self.operators.issue(self.folder, "claims-bridge", "@claims")
        self.claimants.issue(self.folder, "claim", "claim")
        for name in ("data", "claim-data"):
            (self.folder / name).mkdir()

    def _render(self, extra: str) -> None:
        settings = {
            "PORT": self.port, "OPERATOR_PORT": self.operator_port, "CLAIM_PORT": self.claim_port, "AUTOSAVE": 1,
            "DATA": self.folder / "data", "CLAIM_DATA": self.folder / "claim-data",
        }  # fmt: skip
        arguments = [f"{name}={value}" for name, value in settings.items()]
        subprocess.run([str(RENDER), self.tenant, str(self.folder), *arguments], check=True, stdout=subprocess.DEVNULL)
        for name in ("broker.conf", "claims.conf"):
            path = self.folder / name
            path.write_text("user root\n" + extra + path.read_text())  # as root it would give up the right to its files

    @property
    def server_ca(self) -> Path:
        return self.folder / "server-ca.pem"

    def device(self, name: str, **options: object) -> Credentials:
        """Certificate and key for a device."""
        options.setdefault("organization", self.tenant)
        return Credentials(self.server_ca, *self.devices.issue(self.folder, f"device-{name}", name, **options))

    def claimant(self) -> Credentials:
        return Credentials(self.server_ca, self.folder / "claim.pem", self.folder / "claim.key")

    def operator(self, *topics: str, port: int | None = None) -> Operator:
        """A connected operator who hears ``topics`` (below ``eda/1/TENANT/``)."""
        credentials = Credentials(self.server_ca, self.folder / "ops.pem", self.folder / "ops.key")
        operator = Operator(port or self.operator_port, credentials, f"eda/1/{self.tenant}/", topics)
        self._operators.append(operator)
        return operator

    def restart(self, number: int = signal.SIGTERM) -> None:
        self.process.stop(number)
        self.process.start()

    def __enter__(self) -> Broker:
        self.process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for operator in self._operators:
            operator.close()
        self.claims.stop()
        self.process.stop()


class Heard(NamedTuple):
    """A message as an operator heard it; ``topic`` below the tenant."""

    topic: str
    payload: bytes
    retained: bool


class Operator:
    """A client of the operator's side, in paho's own thread. It reconnects by itself and keeps its session."""

    _number = 0

    def __init__(self, port: int, credentials: Credentials, prefix: str, topics: tuple[str, ...]) -> None:
        Operator._number += 1
        self.heard: list[Heard] = []
        self._prefix = prefix
        self._topics = topics
        self._listening = threading.Event()
        self._codes: dict[int, int] = {}
        self._client = Client(CallbackAPIVersion.VERSION2, f"ops/{port}/{Operator._number}", protocol=MQTTv5)
        self._client.reconnect_delay_set(1, 1)
        self._client.tls_set(
            str(credentials.ca), str(credentials.certificate), str(credentials.key), tls_version=ssl.PROTOCOL_TLS_CLIENT
        )
        # Without this a question waits up to 40 ms for the acknowledgement of the bytes before it (tcp(7)).
        self._client.on_socket_open = lambda *given: given[2].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._listening.set()
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600
        self._client.connect("localhost", port, keepalive=10, clean_start=False, properties=session)
        self._client.loop_start()
        assert not topics or self._listening.wait(PATIENCE_S), "the operator hears"

    def _on_connect(self, client: Client, *_: Any) -> None:
        if self._topics:
            client.subscribe([(self._prefix + topic, SubscribeOptions(qos=1)) for topic in self._topics])

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        topic = message.topic.removeprefix(self._prefix)
        self.heard.append(Heard(topic, bytes(message.payload), message.retain))

    def _on_publish(self, _client: Any, _data: Any, mid: int, code: Any, _properties: Any) -> None:
        self._codes[mid] = code.value

    def publish(self, topic: str, payload: bytes | str, *, retain: bool = False) -> int:
        """Publish below the tenant and wait for the broker; the reason code."""
        info = self._client.publish(self._prefix + topic, payload, qos=1, retain=retain)
        return int(until(lambda: self._codes.get(info.mid, -1) + 1, f"PUBACK for {topic}")) - 1

    def on(self, topic: str) -> list[bytes]:
        """What was heard on a topic, or below it when it ends with a slash."""
        below = topic.endswith("/")
        return [
            item.payload for item in list(self.heard) if item.topic == topic or (below and item.topic.startswith(topic))
        ]

    def close(self) -> None:
        with contextlib.suppress(ValueError):
            self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()  # paho leaves the pair that wakes its thread to the garbage collector


@pytest.fixture
def broker(short_dir: Path) -> Iterator[Broker]:
    """A running broker."""
    folder = short_dir / "broker"
    folder.mkdir()
    with Broker(folder) as running:
        yield running
