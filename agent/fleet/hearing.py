"""What is heard from the broker, checked and put into the books.

Nobody on the way is trusted: what a device signs is believed once its key vouches for it, and only where topic,
tenant, device and enrolment agree; what is older than what is known is dropped; everything that is dropped is counted
under its reason. ``status`` and ``alert`` are plain: they are shown, and nothing is decided by them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from agent.base.errors import AgentError, PeerError, one_line
from agent.fleet.books import Books
from agent.fleet.registry import Device
from agent.fleet.words import Announced
from agent.trust.envelope import EnvelopeError, PublicKey, open_envelope, peek_payload
from agent.wire.messages import Announcement, Info, JobState, Reported, RpcAnswer, decode
from agent.wire.topics import CLAIM, Topic, parse_topic

_MOST_PLAIN_BYTES = 64 << 10
_MOST_DEPTH = 16

_M = TypeVar("_M", Info, Reported, JobState, RpcAnswer)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that an operator may want to see. ``message``: the verified message, where there is one.

    ``kind``: ``status``, ``info``, ``reported``, ``job``, ``alert``, ``answer``, ``announcement``, ``telemetry``,
    ``dropped``.
    """

    kind: str
    device: str
    data: Mapping[str, Any] = field(default_factory=dict)
    message: JobState | RpcAnswer | Info | None = None


class _DroppedError(PeerError):
    """Not believed. ``code`` is counted."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Hearing:
    """Takes messages for one tenant. ``hear`` is called in a transaction of the database."""

    def __init__(self, books: Books, tenant: str) -> None:
        self._registry = books.registry
        self._documents = books.documents
        self._words = books.words
        self._tenant = tenant
        self._kinds: Mapping[str, Callable[[Device, str, bytes, str], Event | None]] = {
            "status": self._status,
            "info": self._info,
            "reported": self._reported,
            "job": self._job,
            "rpc": self._rpc,
            "alert": self._alert,
            "tel": self._telemetry,
        }

    def hear(self, topic: str, payload: bytes, now: str) -> Event | None:
        """What a message means, None where it says nothing new. Never raises for what anybody sends."""
        found = parse_topic(topic)
        if found is None or found.tenant != self._tenant:
            return self._drop("", "topic", "wrong_topic", now)
        claim = found.device.startswith(f"{CLAIM}/")
        what, device = ("announcement", "") if claim else (found.rest.split("/")[1], found.device)
        try:
            return self._claim(found, payload, now) if claim else self._said(found, payload, now)
        except (EnvelopeError, _DroppedError) as error:
            reason = error.code
        except AgentError:
            reason = "bad_message"
        return self._drop(device, what, reason, now)

    def _said(self, topic: Topic, payload: bytes, now: str) -> Event | None:
        direction, kind, *rest = topic.rest.split("/")
        device = self._registry.find_device(topic.device)
        if device is None:
            if not payload:
                return None  # emptied when it was forgotten
            raise _DroppedError("unknown_device")
        if direction != "up" or kind not in self._kinds or len(rest) > 1:
            raise _DroppedError("wrong_topic")
        return self._kinds[kind](device, rest[0] if rest else "", payload, now)

    def _drop(self, device: str, what: str, reason: str, now: str) -> Event:
        if device and self._registry.find_device(device) is None:
            device = ""  # names that anybody can make up do not get rows of their own
        self._words.drop(
            device, what if what in self._kinds or what in ("topic", "announcement") else "other", reason, now
        )
        return Event("dropped", device, {"what": what, "reason": reason})

    def _open(self, device: Device, data: bytes, message: type[_M]) -> _M:
        """The message in an envelope, once the device itself vouches for it, in its present enrolment."""
        opened = open_envelope(data, message.KIND, {device.identity.keyid: device.identity})
        found = decode(opened.payload, message)
        if found.tenant != self._tenant:
            raise _DroppedError("wrong_tenant")
        if found.device != device.name:
            raise _DroppedError("wrong_device")
        if found.epoch != device.epoch:
            raise _DroppedError("old_epoch" if found.epoch < device.epoch else "future_epoch")
        return found

    # -- signed -------------------------------------------------------------------------------------------------------

    def _info(self, device: Device, _: str, data: bytes, now: str) -> Event | None:
        info = self._open(device, data, Info)
        before = self._words.word(device.name, "info")
        if before is not None:
            if before.payload["boot_nonce"] == info.boot_nonce and before.payload["at"] == info.at:
                return None
            if info.last_generation < before.payload["last_generation"] or info.last_seq < before.payload["last_seq"]:
                raise _DroppedError("old_message")
        payload = info.model_dump(mode="json")
        self._words.hear(device.name, "info", now, payload)
        self._documents.taken(device.name, device.epoch, info.last_generation)
        if info.keys_version is not None:
            self._registry.obeys_table(device.name, info.keys_version)
        return Event("info", device.name, payload, info)

    def _reported(self, device: Device, _: str, data: bytes, now: str) -> Event | None:
        reported = self._open(device, data, Reported)
        before = self._words.word(device.name, "reported")
        payload = reported.model_dump(mode="json")
        if before is not None:
            if before.payload == payload:
                return None
            # Within a start versions rise. One start from another only tells the nonce of the last info.
            behind = reported.version < before.payload["version"] and reported.at < before.payload["at"]
            if behind and self._words.start(device.name) == before.start:
                raise _DroppedError("old_message")
        self._words.hear(device.name, "reported", now, payload, self._words.start(device.name))
        return Event("reported", device.name, payload)

    def _job(self, device: Device, job_id: str, data: bytes, now: str) -> Event | None:
        state = self._open(device, data, JobState)
        if state.job_id != job_id:
            raise _DroppedError("wrong_topic")
        verdict = self._documents.record(state, now)
        if verdict == "duplicate":
            return None
        if verdict != "new":
            raise _DroppedError(verdict)
        return Event("job", device.name, state.model_dump(mode="json", exclude_none=True), state)

    def _rpc(self, device: Device, _: str, data: bytes, now: str) -> Event:
        answer = self._open(device, data, RpcAnswer)
        return Event("answer", device.name, answer.model_dump(mode="json", exclude_none=True), answer)

    def learn(self, answer: RpcAnswer, now: str) -> list[Event]:
        """States of jobs from a verified answer to ``jobs.list``: what was lost on the way is made up for."""
        rows = (answer.result or {}).get("jobs")
        events = []
        for row in rows if isinstance(rows, list) else ():
            told = {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else {}
            # Which number the job had, and whether its clock could be trusted, is not in the list.
            whole = {"tenant": answer.tenant, "device": answer.device, "epoch": answer.epoch, "seq": 0, **told}
            try:
                state = JobState.model_validate_json(json.dumps({"clock_trusted": False, **whole}))
            except ValidationError:
                continue
            if self._documents.record(state, now) == "new":
                events.append(Event("job", answer.device, state.model_dump(mode="json", exclude_none=True), state))
        return events

    # -- plain --------------------------------------------------------------------------------------------------------

    def _status(self, device: Device, _: str, data: bytes, now: str) -> Event | None:
        if not data:
            return None
        found = _plain(data)
        if not isinstance(found.get("online"), bool):
            raise _DroppedError("bad_message")
        payload = {name: found[name] for name in ("online", "session", "at", "reason") if _scalar(found.get(name))}
        before = self._words.word(device.name, "status")
        self._words.hear(device.name, "status", now, payload)
        return None if before is not None and before.payload == payload else Event("status", device.name, payload)

    def _alert(self, device: Device, alert: str, data: bytes, now: str) -> Event | None:
        if not alert:
            raise _DroppedError("wrong_topic")
        if not data:
            self._words.set_alert(device.name, alert, now, None)
            return Event("alert", device.name, {"id": alert, "over": True})
        found = _plain(data)
        payload = {
            name: one_line(str(found[name]))
            for name in ("level", "text", "mend", "since")
            if found.get(name) is not None and _scalar(found[name])
        }
        if any(name == alert and word.payload == payload for _, name, word in self._words.alerts(device.name)):
            return None
        if not self._words.set_alert(device.name, alert, now, payload):
            raise _DroppedError("too_many")
        return Event("alert", device.name, {"id": alert, **payload})

    def _telemetry(self, device: Device, stream: str, data: bytes, now: str) -> Event:
        return Event("telemetry", device.name, {"stream": stream, **_plain(data)})

    # -- announcements ------------------------------------------------------------------------------------------------

    def _claim(self, topic: Topic, data: bytes, now: str) -> Event | None:
        if topic.rest != "up/announce":
            raise _DroppedError("wrong_topic")
        keyid = topic.device.removeprefix(f"{CLAIM}/")
        if not data:
            self._words.withdraw_announcement(keyid)
            return None
        announced = read_announcement(data, self._tenant, keyid, now)
        known = self._words.find_announced(keyid)
        if known is not None and (known.csr, known.identity) == (announced.csr, announced.identity):
            return None
        if not self._words.announce(announced):
            raise _DroppedError("too_many")
        return Event("announcement", "", {"keyid": keyid, "board": announced.board, "serial": announced.serial})


def read_announcement(data: bytes, tenant: str, keyid: str, now: str) -> Announced:
    """Who asks to be enrolled, once the identity that it names has signed it. EnvelopeError, PeerError."""
    _, payload = peek_payload(data)
    found = decode(payload, Announcement)
    identity = PublicKey(base64.b64decode(found.identity))
    if identity.keyid != keyid:
        raise EnvelopeError("unknown_key", "it is on the topic of another identity")
    opened = open_envelope(data, Announcement.KIND, {keyid: identity})
    if opened.payload != payload or found.tenant != tenant:
        raise EnvelopeError("wrong_tenant", f"it is for tenant '{found.tenant}'")
    return Announced(
        keyid=keyid,
        identity=found.identity,
        csr=found.csr,
        board=None if found.board is None else one_line(found.board)[:200],
        serial=None if found.serial is None else one_line(found.serial)[:200],
        agent_version=one_line(found.agent_version)[:64],
        received=now,
    )


def _plain(data: bytes) -> dict[str, Any]:
    if len(data) > _MOST_PLAIN_BYTES:
        raise _DroppedError("too_large")
    try:
        found = json.loads(data.decode("utf-8"))
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise _DroppedError("malformed") from error
    if not isinstance(found, dict):
        raise _DroppedError("malformed")
    return found


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
