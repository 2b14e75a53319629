"""What comes from the fleet, checked: docs/spec/link.md 2 and 3. Decides; what follows from it is done by others.

Invariants: nothing is parsed before a key that this device obeys has signed it; nothing is accepted that is not for
this device, this enrolment and a later moment than all before; what was accepted is durable before the verdict is
given. A job whose signers had the right but which cannot run is journaled as rejected, so that the fleet learns why.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, TypeVar

from agent.base.clock import TrustedClock
from agent.base.errors import AgentError, PeerError
from agent.trust.allegiance import Allegiance
from agent.trust.envelope import EnvelopeError, open_envelope
from agent.wire.messages import Desired, Job, JobDocument, RpcRequest, decode
from agent.wire.ops import OPS, SIGNATURES, Op
from agent.work.jobs import Failure, Order, Refusal, WindowSpec
from agent.work.journal import Journal

_LOG = logging.getLogger("edge_agent.inbox")
_REMEMBERED = 1024
#: Refusals of the journal that are an answer to a job that may be given: the fleet is told as its end.
_REJECTIONS = frozenset(("expired", "clock_untrusted", "bad_args", "busy"))

_M = TypeVar("_M", JobDocument, Desired, RpcRequest)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an envelope. ``reason`` is the code of a refusal."""

    verdict: Literal["accepted", "duplicate", "refused"]
    reason: str = ""

    def document(self) -> dict[str, str]:
        """As link gets it."""
        return {"verdict": self.verdict, "reason": self.reason}


class Replays:
    """Numbers that a key has used in this start: the last 1,024 are remembered, and nothing below them is taken."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[set[int], deque[int]]] = {}

    def require_new(self, keyids: frozenset[str], number: int) -> None:
        """EnvelopeError ``replayed`` when any of the keys has used the number, or it is below all remembered."""
        for keyid in keyids:
            numbers, _ = self._seen.get(keyid, (set(), deque()))
            if number in numbers or (len(numbers) >= _REMEMBERED and number < min(numbers)):
                raise EnvelopeError("replayed", f"number {number} was used before")
        for keyid in keyids:
            numbers, _ = self._seen.setdefault(keyid, (set(), deque()))
            numbers.add(number)
            if len(numbers) > _REMEMBERED:
                numbers.discard(min(numbers))


@dataclass(frozen=True, slots=True)
class Called:
    """What the inbox calls when it has accepted something, in its own thread; all return at once."""

    jobs_changed: Callable[[], None]
    desired_changed: Callable[[], None]
    asked: Callable[[RpcRequest], None]
    refused: Callable[[], None] = field(default=lambda: None)
    check_args: Callable[[str, Mapping[str, Any]], None] = field(default=lambda op, args: None)


class Inbox:
    """Takes raw envelopes. ``boot_nonce`` names this start of core. Questions are for the event loop's thread alone."""

    def __init__(
        self,
        allegiance: Callable[[], Allegiance | None],
        journal: Journal,
        clock: TrustedClock,
        boot_nonce: str,
        called: Called,
    ) -> None:
        self._allegiance = allegiance
        self._journal = journal
        self._clock = clock
        self._nonce = boot_nonce
        self._called = called
        self._replays = Replays()

    def receive(self, topic: str, data: bytes) -> Verdict:
        """The verdict on what came on ``topic`` (``dn/job``). DamagedError when the journal cannot take it."""
        try:
            return self._received(topic, data)
        except EnvelopeError as error:
            return self._refused(topic, error.code, str(error))
        except Refusal as error:
            return self._refused(topic, error.code, str(error))
        except PeerError as error:
            return self._refused(topic, "bad_message", str(error))

    def _refused(self, topic: str, code: str, text: str) -> Verdict:
        _LOG.warning("refused on %s: %s (%s)", topic, text, code)
        with contextlib.suppress(AgentError):  # a journal that cannot be written to: it counts in memory
            self._journal.refused(code)
        self._called.refused()
        return Verdict("refused", code)

    def _received(self, topic: str, data: bytes) -> Verdict:
        if topic == "dn/job":
            return self._job(data)
        if topic == "dn/desired":
            return self._desired(data)
        if topic.startswith("dn/rpc/"):
            return self._rpc(topic.removeprefix("dn/rpc/"), data)
        raise EnvelopeError("wrong_topic", f"nothing is expected on {topic[:80]!r}")

    def _open(self, data: bytes, message: type[_M]) -> tuple[_M, frozenset[str], Allegiance]:
        """The message, who signed it, and whom we obey; it is for this device and this enrolment."""
        allegiance = self._allegiance()
        if allegiance is None or allegiance.device is None:
            raise EnvelopeError("not_enrolled", "this device has no fleet")
        opened = open_envelope(data, message.KIND, allegiance.public_keys)
        found = decode(opened.payload, message)
        require_address(found.tenant, found.device, found.epoch, allegiance)
        return found, opened.keyids, allegiance

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def order(self, data: bytes) -> Order | None:
        """The order in a document whose signers still have the right to it. EnvelopeError, PeerError."""
        document, keyids, allegiance = self._open(data, JobDocument)
        return None if document.job is None else self._order(document, document.job, keyids, allegiance, data)

    def _job(self, data: bytes) -> Verdict:
        document, keyids, allegiance = self._open(data, JobDocument)
        if document.cancel or document.job is None:
            allegiance.require_class(keyids, "change", SIGNATURES["change"])
        order = None if document.job is None else self._order(document, document.job, keyids, allegiance, data)
        rejection = None if document.job is None else self._why_not(document.job)
        try:
            verdict = self._take(document, order, data, rejection)
        except Refusal as error:
            if error.code not in _REJECTIONS:
                raise
            verdict = self._take(document, order, data, Failure(error.code, str(error), error.hint))
        self._called.jobs_changed()
        return Verdict(verdict)

    def _take(
        self, document: JobDocument, order: Order | None, data: bytes, rejection: Failure | None
    ) -> Literal["accepted", "duplicate"]:
        return self._journal.accept(
            order,
            epoch=document.epoch,
            generation=document.generation,
            document=data,
            cancel=document.cancel,
            rejection=rejection,
        )

    def _order(
        self, document: JobDocument, job: Job, keyids: frozenset[str], allegiance: Allegiance, data: bytes
    ) -> Order:
        row = OPS.get(job.op)
        kind = row.kind if row is not None else job.kind
        allegiance.require_class(keyids, kind, SIGNATURES[kind])
        window = job.window
        return Order(
            job_id=job.job_id,
            epoch=document.epoch,
            seq=job.seq,
            op=job.op,
            kind=kind,
            lane=job.lane,
            priority=job.priority,
            args=job.args,
            not_after=job.not_after,
            step_timeout_s=job.step_timeout_s,
            total_timeout_s=job.total_timeout_s,
            window=WindowSpec(window.cron, window.duration_s, window.tz) if window is not None else None,
            envelope=data,
        )

    def _why_not(self, job: Job) -> Failure | None:
        """Why a job that somebody may give cannot be taken; None where it can."""
        try:
            self._require_moment(_job_row(job), job.boot_nonce, job.not_after)
            self._called.check_args(job.op, job.args)
        except EnvelopeError as error:
            return Failure(error.code, str(error), error.hint)
        except PeerError as error:
            return Failure("bad_args", str(error), error.hint)
        return None

    def _require_moment(self, row: Op, nonce: str | None, not_after: str | None) -> None:
        """For this start where it says so, or must; and not too late."""
        if (row.kind == "destroy" or nonce is not None) and nonce != self._nonce:
            raise EnvelopeError("wrong_boot_nonce", "it is not for this start of the device")
        if not_after is None:
            return
        if not self._clock.trusted():
            raise EnvelopeError("clock_untrusted", "it has a last moment, and nobody vouches for this clock")
        if self._clock.clock.now() > moment(not_after):
            raise EnvelopeError("expired", f"it was for before {not_after}")

    # -- desired and rpc ----------------------------------------------------------------------------------------------

    def _desired(self, data: bytes) -> Verdict:
        document, keyids, allegiance = self._open(data, Desired)
        allegiance.require_class(keyids, "change", SIGNATURES["change"])
        verdict = self._journal.accept_desired(document.version, data, epoch=document.epoch)
        if verdict == "accepted":
            self._called.desired_changed()
        return Verdict(verdict)

    def _rpc(self, op: str, data: bytes) -> Verdict:
        request, keyids, allegiance = self._open(data, RpcRequest)
        row = OPS.get(request.op)
        if request.op != op:
            raise EnvelopeError("wrong_topic", f"it asks for '{request.op}' on the topic of '{op[:48]}'")
        if row is None or not row.rpc:
            raise EnvelopeError("unknown_op", f"there is no question '{request.op}'")
        allegiance.require_class(keyids, row.kind, SIGNATURES[row.kind])
        self._require_moment(row, request.boot_nonce, request.not_after)
        self._replays.require_new(keyids, request.n)
        self._called.asked(request)
        return Verdict("accepted")


def _job_row(job: Job) -> Op:
    """The row of a job's operation. EnvelopeError when there is none, or it is not as the job says."""
    row = OPS.get(job.op)
    if row is None or not row.job:
        raise EnvelopeError("unknown_op", f"there is no job '{job.op}'")
    if job.kind != row.kind:
        raise EnvelopeError("wrong_class", f"'{job.op}' is of class {row.kind}, not {job.kind}")
    if job.lane == "rescue" and row.lane != "rescue":
        raise EnvelopeError("wrong_lane", f"'{job.op}' does not belong into the rescue lane")
    return row


def require_address(tenant: str, device: str, epoch: int, allegiance: Allegiance) -> None:
    """EnvelopeError unless a message is for this device and this enrolment."""
    if tenant != allegiance.tenant:
        raise EnvelopeError("wrong_tenant", f"it is for tenant '{tenant}'")
    if device != allegiance.device:
        raise EnvelopeError("wrong_device", f"it is for device '{device}'")
    if epoch < allegiance.epoch:
        raise EnvelopeError("old_epoch", f"it is for enrolment {epoch}, this is {allegiance.epoch}")
    if epoch > allegiance.epoch:
        raise EnvelopeError("future_epoch", f"it is for enrolment {epoch}, this is still {allegiance.epoch}")


def moment(text: str) -> datetime:
    """A time of a message. EnvelopeError for a day that does not exist."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise EnvelopeError("bad_message", f"'{text}' is no moment") from error
