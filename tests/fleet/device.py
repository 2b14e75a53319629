"""A device as the fleet sees one: real keys, real MQTT, and the answers that a test wants.

Not the agent: the least of what docs/spec/link.md asks of a device, so that the operator's side is tested against the
specification.
"""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.base.errors import AgentError
from agent.store import age
from agent.trust.allegiance import Allegiance, load, trusted_keys
from agent.trust.envelope import EnvelopeError, Signer, open_envelope, seal
from agent.wire import messages as wire
from agent.wire.ops import OPS, SIGNATURES
from tests.fleet.waiting import until

#: What ``Info`` says of a Raspberry Pi 4, as far as tests look at it.
FACTS: dict[str, Any] = {
    "board": "Raspberry Pi 4 Model B",
    "profile": "raspberry-pi-4",
    "arch": "aarch64",
    "user_bits": 64,
    "features": {"neon": True, "dotprod": False},
    "mem_total_mb": 3792,
    "mem_available_mb": 3000,
    "mem_limit_mb": 3792,
    "supported": True,
    "plan": {"providers": ["CPUExecutionProvider"], "cpu_precisions": ["int8", "fp32"], "memory_budget_mb": 1896},
}
INVENTORY: dict[str, Any] = {
    "runtimes": {"onnx": {"version": "1.23.2", "providers": ["CPUExecutionProvider"]}},
    "absent": {"tflite": ""},
}
#: States of a job, in order: state, phase, error code.
State = tuple[str, "str | None", "str | None"]
WELL: Sequence[State] = (("queued", "accepted", None), ("running", "installing", None), ("succeeded", None, None))


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Identity:
    """What a device makes at its first start."""

    signer: Signer = field(default_factory=lambda: Signer(secrets.token_bytes(32)))
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def public(self) -> str:
        return base64.b64encode(self.signer.public.raw).decode()

    @property
    def csr(self) -> str:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "whatever it says")])
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self.key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.PEM).decode()

    def write_key(self, path: Path) -> Path:
        path.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return path


class Connection:
    """paho in its own thread; what goes wrong in a callback is kept and raised at the end."""

    def __init__(self, client_id: str, will: tuple[str, bytes] | None = None) -> None:
        self.errors: list[BaseException] = []
        self.client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTv5)
        self.client.reconnect_delay_set(1, 1)
        if will is not None:
            self.client.will_set(will[0], will[1], qos=1, retain=True)
        self._acknowledged: set[int] = set()
        self._lock = threading.Lock()
        self.client.on_publish = self._on_publish
        self.listening = threading.Event()
        self.client.on_subscribe = lambda *_: self.listening.set()

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        with self._lock:
            self._acknowledged.add(mid)

    def connect(self, port: int, ca: Path, certificate: Path, key: Path) -> None:
        self.client.tls_set(str(ca), str(certificate), str(key), tls_version=ssl.PROTOCOL_TLS_CLIENT)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self.client.connect("localhost", port, keepalive=20, clean_start=False, properties=properties)
        self.client.loop_start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, wait: bool = True) -> None:
        info = self.client.publish(topic, payload, qos=1, retain=retain)
        if wait:
            until(lambda: info.mid in self._acknowledged, f"PUBACK for {topic}")

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def cut(self) -> None:
        """End without a word: the broker publishes the Will."""
        self.client.loop_stop()
        sock = self.client.socket()
        if sock is not None:
            sock.close()

    def guarded(self, work: Callable[..., None]) -> Callable[..., None]:
        def call(client: Any, userdata: Any, *rest: Any) -> None:
            try:
                work(*rest)
            except Exception as error:
                self.errors.append(error)
                raise

        return call


class SimulatedDevice:
    """An enrolled device. ``plays``: what it says of a job; ``answers``: of a question (None: nothing)."""

    def __init__(self, tenant: str, identity: Identity, allegiance: Allegiance) -> None:
        assert allegiance.device is not None
        self.tenant, self.name, self.epoch = tenant, allegiance.device, allegiance.epoch
        self.identity = identity
        self.allegiance = allegiance
        self.nonce = secrets.token_hex(16)
        self.generation = self.seq = 0
        self.documents: list[wire.JobDocument] = []
        self.done: list[wire.Job] = []
        self.cancelled: list[str] = []
        self.refused: Counter[str] = Counter()
        self.desired: list[wire.Desired] = []
        self.facts: dict[str, Any] = dict(FACTS)
        self.inventory: dict[str, Any] = dict(INVENTORY)
        #: To whom grants may be sealed; an old agent tells nobody (None).
        self.grant: age.Identity | None = age.Identity(secrets.token_bytes(32))
        self.keys_version: int | None = None
        self.plays: Callable[[wire.Job], Sequence[State]] = lambda job: WELL
        self.answers: Callable[[wire.RpcRequest], Mapping[str, Any] | None] = lambda request: {"pong": True}
        self.result: Mapping[str, Any] | None = None
        self._rev: Counter[str] = Counter()
        self._said: dict[str, bytes] = {}
        self._reported = 0
        self._connection: Connection | None = None

    # -- the link -----------------------------------------------------------------------------------------------------

    def topic(self, rest: str) -> str:
        return f"eda/1/{self.tenant}/{self.name}/{rest}"

    def connect(self, port: int, ca: Path, certificate: Path, key: Path) -> SimulatedDevice:
        will = json.dumps({"online": False, "session": 1, "at": None, "reason": "lost"}).encode()
        self._connection = connection = Connection(f"{self.tenant}/{self.name}", (self.topic("up/status"), will))
        connection.client.on_message = connection.guarded(self._on_message)
        connection.client.on_connect = connection.guarded(
            lambda *_: connection.client.subscribe(
                [(self.topic(f"dn/{rest}"), 1) for rest in ("job", "desired", "rpc/+")]
            )
        )
        connection.connect(port, ca, certificate, key)
        assert connection.listening.wait(20)
        self.say_status(online=True)
        self.say_info()
        self.say_reported()
        return self

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    def go_offline(self, *, clean: bool = True) -> None:
        if clean:
            self.say_status(online=False, reason="shut down")
            self.connection.stop()
        else:
            self.connection.cut()
        assert self.connection.errors == []

    def say_status(self, *, online: bool, reason: str = "") -> None:
        document = {"online": online, "session": 1, "at": now(), "reason": reason}
        self.connection.publish(self.topic("up/status"), json.dumps(document).encode(), retain=True)

    # -- saying -------------------------------------------------------------------------------------------------------

    def address(self) -> dict[str, Any]:
        return {"tenant": self.tenant, "device": self.name, "epoch": self.epoch}

    def seal(self, message: Any) -> bytes:
        return seal(message.KIND, message.encode(), [self.identity.signer])

    def info(self) -> wire.Info:
        return wire.Info(
            **self.address(),
            boot_nonce=self.nonce,
            at=now(),
            agent_version="0.1.0",
            identity=self.identity.public,
            ops=sorted(OPS),
            last_seq=self.seq,
            last_generation=self.generation,
            desired_version=self.desired[-1].version if self.desired else 0,
            facts=self.facts,
            profile=str(self.facts.get("profile", "")),
            inventory=self.inventory,
            grant=None if self.grant is None else [self.grant.recipient().text()],
            keys_version=self.keys_version,
        )

    def say_info(self) -> None:
        self.connection.publish(self.topic("up/info"), self.seal(self.info()), retain=True)

    def say_reported(self, health: str = "healthy", **more: Any) -> None:
        self._reported += 1
        report = wire.Reported(
            **self.address(),
            version=self._reported,
            at=now(),
            desired_version=0,
            config_state="default",
            config={},
            drift=[],
            health=health,
            models=[],
            jobs={},
            maintenance=[],
            refused=dict(self.refused),
            **more,
        )
        self.connection.publish(self.topic("up/reported"), self.seal(report), retain=True)

    def state(self, job: wire.Job, state: str, phase: str | None = None, code: str | None = None) -> wire.JobState:
        self._rev[job.job_id] += 1
        return wire.JobState(
            **self.address(),
            job_id=job.job_id,
            seq=job.seq,
            op=job.op,
            rev=self._rev[job.job_id],
            state=state,  # type: ignore[arg-type]
            phase=phase,  # type: ignore[arg-type]
            attempt=1,
            at=now(),
            clock_trusted=True,
            result=self.result if state == "succeeded" else None,  # type: ignore[arg-type]
            error=None if code is None else wire.Failure(code=code, text=f"because of {code}"),
        )

    def say_state(self, job: wire.Job, *state: Any, wait: bool = True) -> None:
        self._said[job.job_id] = said = self.seal(self.state(job, *state))
        self.connection.publish(self.topic(f"up/job/{job.job_id}"), said, wait=wait)

    def alert(self, name: str, text: str | None) -> None:
        payload = b"" if text is None else json.dumps({"id": name, "level": "warning", "text": text}).encode()
        self.connection.publish(self.topic(f"up/alert/{name}"), payload, retain=True)

    def restart(self) -> None:
        """A new start: another nonce, and it says so."""
        self.nonce = secrets.token_hex(16)
        self.say_info()

    # -- hearing ------------------------------------------------------------------------------------------------------

    def _on_message(self, message: Any) -> None:
        rest = message.topic.removeprefix(self.topic(""))
        if not message.payload:
            return
        try:
            if rest == "dn/job":
                self._job(message.payload)
            elif rest == "dn/desired":
                self._desired(message.payload)
            else:
                self._rpc(message.payload)
        except EnvelopeError as error:
            self.refused[error.code] += 1
        except AgentError as error:
            self.refused[f"bad_message: {error}"] += 1

    def _opened(self, data: bytes, kind: Any) -> tuple[Any, frozenset[str]]:
        opened = open_envelope(data, kind.KIND, self.allegiance.public_keys)
        message = wire.decode(opened.payload, kind)
        if (message.tenant, message.device) != (self.tenant, self.name):
            raise EnvelopeError("wrong_device", "for another")
        if message.epoch != self.epoch:
            raise EnvelopeError("old_epoch" if message.epoch < self.epoch else "future_epoch", "of another time")
        return message, opened.keyids

    def _job(self, data: bytes) -> None:
        document, keyids = self._opened(data, wire.JobDocument)
        if document.cancel or document.job is None:
            self.allegiance.require_class(keyids, "change", 1)
        if document.generation == self.generation:
            if document.job is not None and (last := self._said.get(document.job.job_id)) is not None:
                self.connection.publish(self.topic(f"up/job/{document.job.job_id}"), last, wait=False)
            return
        if document.generation < self.generation:
            raise EnvelopeError("old_generation", "there was a later one")
        job = document.job
        if job is not None:
            row = OPS[job.op]
            self.allegiance.require_class(keyids, row.kind, SIGNATURES[row.kind])
            if job.seq <= self.seq:
                raise EnvelopeError("old_sequence", "there was a later one")
            self.seq = job.seq
        self.generation = document.generation
        self.documents.append(document)
        self.cancelled += document.cancel
        if job is None:
            return
        if (row.kind == "destroy" or job.boot_nonce) and job.boot_nonce != self.nonce:
            self.say_state(job, "rejected", None, "wrong_boot_nonce", wait=False)
            return
        self.done.append(job)
        for state in self.plays(job):
            self.say_state(job, *state, wait=False)

    def _desired(self, data: bytes) -> None:
        document, keyids = self._opened(data, wire.Desired)
        self.allegiance.require_class(keyids, "change", 1)
        self.desired.append(document)

    def _rpc(self, data: bytes) -> None:
        request, keyids = self._opened(data, wire.RpcRequest)
        self.allegiance.require_class(keyids, "observe", 1)
        if request.boot_nonce != self.nonce:
            raise EnvelopeError("wrong_boot_nonce", "of another start")
        answer = self.answers(request)
        if answer is not None:
            message = wire.RpcAnswer(
                **self.address(), rpc_id=request.rpc_id, op=request.op, boot_nonce=self.nonce, result=dict(answer)
            )
            self.connection.publish(self.topic("up/rpc"), self.seal(message), wait=False)


class Claimant:
    """A device before it is enrolled: announces itself by the claim credential and waits for its enrolment."""

    def __init__(self, tenant: str, trust: Path, identity: Identity) -> None:
        self.tenant, self.identity = tenant, identity
        waiting = load(trust)
        assert waiting is not None and waiting.enroller is not None
        self._enroller = waiting.enroller
        self.enrolments: list[wire.Enrolment] = []
        self._connection = Connection(f"{tenant}/claim/{self.keyid}")
        self._connection.client.on_message = self._connection.guarded(self._on_message)
        self._connection.client.on_connect = self._connection.guarded(
            lambda *_: self._connection.client.subscribe(self.topic("dn/enrolment"), 1)
        )

    @property
    def keyid(self) -> str:
        return self.identity.signer.keyid

    def topic(self, rest: str) -> str:
        return f"eda/1/{self.tenant}/claim/{self.keyid}/{rest}"

    def announcement(self, **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "tenant": self.tenant,
            "identity": self.identity.public,
            "boot_nonce": secrets.token_hex(16),
            "at": now(),
            "csr": self.identity.csr,
            "agent_version": "0.1.0",
            "board": "Raspberry Pi 4 Model B",
            "serial": "1000-0000",
            "facts": {},
        }
        message = wire.Announcement(**(fields | changes))
        return seal(wire.Announcement.KIND, message.encode(), [self.identity.signer])

    def connect(self, port: int, ca: Path, certificate: Path, key: Path) -> None:
        self._connection.connect(port, ca, certificate, key)
        assert self._connection.listening.wait(20)
        self._connection.publish(self.topic("up/announce"), self.announcement(), retain=True)

    def _on_message(self, message: Any) -> None:
        if message.payload:
            self.take(message.payload)

    def take(self, data: bytes) -> None:
        opened = open_envelope(data, wire.Enrolment.KIND, {self._enroller.keyid: self._enroller})
        enrolment = wire.decode(opened.payload, wire.Enrolment)
        assert enrolment.identity == self.identity.public
        self.enrolments.append(enrolment)

    def stop(self) -> None:
        self._connection.stop()
        assert self._connection.errors == []

    def allegiance(self) -> Allegiance:
        """Whom it obeys now."""
        last = self.enrolments[-1]
        keys = trusted_keys([(key.name, key.public, key.classes) for key in last.keys])
        return Allegiance(last.tenant, last.device, last.epoch, keys)
