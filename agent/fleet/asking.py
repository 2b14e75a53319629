"""Asks an online device one question and brings its answer, or says at once that it is not there.

Invariants: only an answer that the device signed for this question and this start counts; a question carries the nonce
of a start that the device itself signed, and the broker may not deliver it after the asker has gone.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.base.clock import Clock, iso
from agent.base.errors import DeadlineError, NotFoundError, PeerError, RefusedError, TooLargeError, TryLaterError
from agent.fleet.books import Books
from agent.fleet.broker import NO_SUBSCRIBERS, Broker, Outgoing
from agent.fleet.hearing import Event, Hearing
from agent.fleet.registry import Device
from agent.trust.envelope import Signer, seal
from agent.wire.messages import RpcAnswer, RpcRequest
from agent.wire.ops import OPS, SIGNATURES, Op
from agent.wire.topics import device_topic

#: Within this the broker has sent what it retains of one device.
_RETAINED_S = 1.0
_REFUSED = 0x80
#: Its answer is more than shown: states of jobs that were never heard.
_LIST = "jobs.list"
_GONE = "cannot ask '{}': it is offline"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the device said, and how long it took, in seconds from the first question."""

    message: RpcAnswer
    took_s: float


class Asker:
    """Asks one device over an open connection of its own. For one thread."""

    def __init__(self, broker: Broker, books: Books, tenant: str, clock: Clock) -> None:
        self._broker = broker
        self._books = books
        self._tenant = tenant
        self._clock = clock
        self._hearing = Hearing(books, tenant)

    def ask(
        self, device: Device, op: str, args: Mapping[str, Any], signers: Sequence[Signer], timeout_s: float
    ) -> Answer:
        """TryLaterError when the device is offline, DeadlineError without an answer in time, PeerError and RefusedError
        for what it would refuse."""
        row = require_question(op)
        _require_obeyed(device, row, signers)
        topics = ("up/rpc", "up/status", "up/info")
        self._broker.subscribe({device_topic(self._tenant, device.name, rest): 1 for rest in topics})
        start = self._clock.monotonic()
        self._hear_retained(device)
        deadline = start + timeout_s
        while True:
            nonce = self._nonce(device)
            request = self._request(device, op, args, nonce, signers)
            self._put(device, request, signers, math.ceil(max(1.0, deadline - self._clock.monotonic())))
            answer = self._wait(device, request, deadline)
            if answer is not None:
                self._note(request, "failed" if answer.error else "answered")
                if op == _LIST:
                    with self._books.database.transaction():
                        self._hearing.learn(answer, iso(self._clock.now()))
                return Answer(answer, self._clock.monotonic() - start)

    def _hear_retained(self, device: Device) -> None:
        """Until status and info are there, which come at once where there are any."""
        wanted = {"status", "info"}
        deadline = self._clock.monotonic() + _RETAINED_S
        while wanted and (left := deadline - self._clock.monotonic()) > 0:
            for topic, event in self._hear(left):
                wanted.discard(topic.rpartition("/")[2])
                self._require_online(device, event)
        status = None if "status" in wanted else self._books.words.word(device.name, "status")
        if status is not None and status.payload.get("online") is False:
            raise TryLaterError(_GONE.format(device.name), hint=_since(status.payload))

    def _hear(self, timeout_s: float) -> list[tuple[str, Event | None]]:
        messages = self._broker.receive(timeout_s)
        now = iso(self._clock.now())
        with self._books.database.transaction():
            found = [(each.topic, self._hearing.hear(each.topic, each.payload, now)) for each in messages]
        self._broker.acknowledge(messages)
        return found

    def _require_online(self, device: Device, event: Event | None) -> None:
        if event is not None and event.kind == "status" and event.data.get("online") is False:
            raise TryLaterError(_GONE.format(device.name), hint=_since(event.data))

    def _nonce(self, device: Device) -> str:
        info = self._books.words.word(device.name, "info")
        if info is None:
            raise TryLaterError(
                f"cannot ask '{device.name}': it has said nothing since its enrolment", hint="it was never online"
            )
        return str(info.payload["boot_nonce"])

    def _request(
        self, device: Device, op: str, args: Mapping[str, Any], nonce: str, signers: Sequence[Signer]
    ) -> RpcRequest:
        now = self._clock.now()
        rpc_id = secrets.token_hex(8)
        with self._books.database.transaction():
            number = self._books.words.ask(
                device.name, op, rpc_id, [signer.keyid for signer in signers], (iso(now), int(now.timestamp() * 1e6))
            )
        try:
            json.dumps(args, allow_nan=False)
            return RpcRequest(
                tenant=self._tenant,
                device=device.name,
                epoch=device.epoch,
                rpc_id=rpc_id,
                n=number,
                boot_nonce=nonce,
                op=op,
                args=dict(args),
            )
        except (ValueError, TypeError) as error:  # a ValidationError is a ValueError
            raise PeerError(f"cannot ask '{op}': the arguments cannot be said in JSON") from error

    def _put(self, device: Device, request: RpcRequest, signers: Sequence[Signer], expiry_s: int) -> None:
        try:
            envelope = seal(RpcRequest.KIND, request.encode(), signers)
        except ValueError as error:
            raise TooLargeError(f"cannot ask '{request.op}': {error}") from error
        topic = device_topic(self._tenant, device.name, f"dn/rpc/{request.op}")
        (reason,) = self._broker.publish([Outgoing(topic, envelope, expiry_s=expiry_s)])
        if reason == NO_SUBSCRIBERS:
            self._note(request, "offline")
            raise TryLaterError(_GONE.format(device.name), hint="it has no session at the broker")
        if reason >= _REFUSED:
            self._note(request, "refused by the broker")
            raise RefusedError(f"cannot publish on {topic}: the broker refuses it (reason {reason:#x})")

    def _wait(self, device: Device, request: RpcRequest, deadline: float) -> RpcAnswer | None:
        """The answer; None when the device has started anew meanwhile, so that it has to be asked once more."""
        while (left := deadline - self._clock.monotonic()) > 0:
            for _, event in self._hear(left):
                if event is None or event.device != device.name:
                    continue
                self._require_online(device, event)
                if event.kind == "info" and event.data["boot_nonce"] != request.boot_nonce:
                    return None
                answer = event.message
                if isinstance(answer, RpcAnswer) and _is_for(answer, request):
                    return answer
        self._note(request, "no answer")
        raise DeadlineError(
            f"cannot ask '{device.name}': no answer in time",
            hint="it may have refused the question: edge-fleet devices show tells what it refused",
        )

    def _note(self, request: RpcRequest, outcome: str) -> None:
        with self._books.database.transaction():
            self._books.words.answer(request.n, iso(self._clock.now()), outcome)


def require_question(op: str) -> Op:
    """The row of an operation that may be asked. NotFoundError."""
    row = OPS.get(op)
    if row is None or not row.rpc:
        named = ", ".join(sorted(name for name, each in OPS.items() if each.rpc))
        raise NotFoundError(f"cannot ask '{op}': there is no such question; there are {named}")
    return row


def _require_obeyed(device: Device, row: Op, signers: Sequence[Signer]) -> None:
    able = [signer for signer in signers if row.kind in device.obeys.get(signer.keyid, ())]
    if len(able) < SIGNATURES[row.kind]:
        raise RefusedError(
            f"cannot ask '{device.name}': it does not obey these keys in class {row.kind}",
            hint="a device obeys the keys that there were at its enrolment",
        )


def _is_for(answer: RpcAnswer, request: RpcRequest) -> bool:
    return (answer.rpc_id, answer.op, answer.boot_nonce) == (request.rpc_id, request.op, request.boot_nonce)


def _since(status: Mapping[str, Any]) -> str:
    parts = [f"since {status['at']}" if status.get("at") else "", str(status.get("reason") or "")]
    return ", ".join(part for part in parts if part)
