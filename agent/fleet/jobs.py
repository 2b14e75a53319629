"""Gives jobs: makes, signs and stores the documents that devices will find on their doorbells; cancels; takes drafts.

Invariants: a number is given to one document only and is stored with it before anybody can see it; a document that was
published is never made anew under other numbers; what a device would refuse (a key that it does not obey, a missing
second signature, no nonce) is refused here first, with the reason.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from agent.base.clock import iso
from agent.base.errors import ConflictError, NotFoundError, PeerError, RefusedError, TooLargeError
from agent.fleet.books import Books
from agent.fleet.documents import Document
from agent.fleet.registry import Device
from agent.trust.envelope import EnvelopeError, PublicKey, Signer, open_envelope, peek_payload, seal
from agent.wire.messages import Job, JobDocument, Window, decode
from agent.wire.ops import OPS, SIGNATURES, Lane, Op

EXPORT = "edge-fleet/job/1"
MOST_EXPORTED_BYTES = 256 << 20
#: The job beside a cancellation: its answer tells that the device has the document.
_MARKER = "ping"


@dataclass(frozen=True, slots=True)
class Command:
    """What is asked of each device. ``this_start``: not after the device's next restart, whatever the class."""

    op: str
    args: Mapping[str, Any] = field(default_factory=dict)
    lane: Lane | None = None
    priority: int = 5
    window: Window | None = None
    not_after: datetime | None = None
    step_timeout_s: float = 3600.0
    total_timeout_s: float = 86_400.0
    this_start: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What became of a cancellation on one device: ``withdrawn`` (the device never had it), ``asked`` or ``over``."""

    device: str
    result: str


class Office:
    """Writes documents for one tenant. ``signers`` are those of the person at the keyboard."""

    def __init__(self, books: Books, tenant: str) -> None:
        self._books = books
        self._registry = books.registry
        self._documents = books.documents
        self._tenant = tenant

    def give(
        self,
        command: Command,
        devices: Sequence[Device],
        signers: Sequence[Signer],
        now: datetime,
        *,
        draft: bool = False,
        job_id: str | None = None,
        own: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> tuple[str, list[Document]]:
        """Sign a job for each device and store it; the id, which is the same on all. Nothing is published here.

        ``own`` are further arguments, by device. As ``draft`` it may still lack signatures. PeerError for what cannot
        be a job, RefusedError for what a device would refuse, ConflictError for an id that is taken.
        """
        row = require_op(command.op)
        _require_json(command.args)
        job_id = job_id or new_job_id(now)
        documents: list[Document] = []
        with self._books.database.transaction():
            for named in devices:
                device = self._registry.device(named.name)
                if not draft:
                    require_obeyed(device, row, [signer.keyid for signer in signers])
                generation, seq = self._registry.next_numbers(device.name)
                meant = replace(command, args={**command.args, **own.get(device.name, {})})
                job = self._job(meant, row, job_id, seq, device)
                documents.append(self._store(device, generation, job, (), signers, now, draft=draft))
        return job_id, documents

    def _job(self, command: Command, row: Op, job_id: str, seq: int, device: Device) -> Job:
        try:
            return Job(
                job_id=job_id,
                seq=seq,
                op=row.name,
                kind=row.kind,
                args=dict(command.args),
                lane=command.lane or row.lane,
                priority=command.priority,
                boot_nonce=self._nonce(device) if row.kind == "destroy" or command.this_start else None,
                not_after=None if command.not_after is None else iso(command.not_after),
                step_timeout_s=command.step_timeout_s,
                total_timeout_s=command.total_timeout_s,
                window=command.window,
            )
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise PeerError(f"cannot give job: {where}: {problem['msg']}") from error

    def _nonce(self, device: Device) -> str:
        info = self._books.words.word(device.name, "info")
        if info is None:
            raise RefusedError(
                f"cannot give '{device.name}' an order for its present start: it has said nothing since its enrolment",
                hint="try again when it was online once: edge-fleet devices list",
            )
        return str(info.payload["boot_nonce"])

    def _store(
        self,
        device: Device,
        generation: int,
        job: Job,
        cancels: Sequence[str],
        signers: Sequence[Signer],
        now: datetime,
        *,
        draft: bool = False,
    ) -> Document:
        message = JobDocument(
            tenant=self._tenant,
            device=device.name,
            epoch=device.epoch,
            generation=generation,
            job=job,
            cancel=list(cancels),
        )
        made = Document(
            device=device.name,
            epoch=device.epoch,
            generation=generation,
            seq=job.seq,
            job_id=job.job_id,
            op=job.op,
            kind=job.kind,
            lane=job.lane,
            args=job.args,
            cancels=tuple(cancels),
            envelope=_sealed(message, signers),
            state="draft" if draft else "waiting",
            note="signatures are missing" if draft else "",
            given=iso(now),
        )
        self._documents.add(made)
        return made

    # -- cancelling ---------------------------------------------------------------------------------------------------

    def cancel(self, job_id: str, devices: Sequence[str], signers: Sequence[Signer], now: datetime) -> list[Cancelled]:
        """Cancel a job on ``devices``, or on all that have it where none is named. Publishes nothing.

        A document that no device can have seen is withdrawn. Else the device is told; a job that it has not answered
        for yet is skipped by that, and later documents that nobody has seen move behind the cancellation.
        """
        with self._books.database.transaction():
            outcomes = [
                outcome
                for outcome in self._documents.outcomes(job_id)
                if not devices or outcome.document.device in devices
            ]
            if missing := [name for name in devices if name not in {outcome.document.device for outcome in outcomes}]:
                raise NotFoundError(f"cannot cancel job {job_id} on '{missing[0]}': it was not given to it")
            return [
                self._cancel(outcome.document, signers, now)
                if not outcome.over
                else Cancelled(outcome.document.device, "over")
                for outcome in outcomes
            ]

    def _cancel(self, document: Document, signers: Sequence[Signer], now: datetime) -> Cancelled:
        device = self._registry.device(document.device)
        if document.state in ("draft", "waiting") and document.published is None:
            self._documents.set_state(document, "void", "cancelled before it was published")
            return Cancelled(device.name, "withdrawn")
        require_cancelling(device, [signer.keyid for signer in signers])
        unanswered = document.state == "waiting"
        later = [other for other in self._documents.waiting(device.name) if other.published is None]
        generation, seq = self._registry.next_numbers(device.name)
        marker = Job(
            job_id=f"cancel-{new_job_id(now)}", seq=seq, op=_MARKER, kind=OPS[_MARKER].kind, lane=OPS[_MARKER].lane
        )
        self._store(device, generation, marker, [document.job_id], signers, now)
        if unanswered:
            self._documents.set_state(document, "void", "cancelled before the device answered")
        for other in later:
            self._move_behind(device, other, signers, now)
        return Cancelled(device.name, "asked")

    def _move_behind(self, device: Device, document: Document, signers: Sequence[Signer], now: datetime) -> None:
        """New numbers for a document that nobody has seen. What these signers cannot sign is given up, and says so."""
        try:
            require_obeyed(device, OPS[document.op], [signer.keyid for signer in signers])
        except RefusedError:
            self._documents.set_state(
                document, "void", "a cancellation overtook it and could not sign it: give it again"
            )
            return
        _, payload = peek_payload(document.envelope)
        message = decode(payload, JobDocument)
        generation, seq = self._registry.next_numbers(device.name)
        job = None if message.job is None else message.job.model_copy(update={"seq": seq})
        moved = message.model_copy(update={"generation": generation, "job": job})
        self._documents.replace(
            document, replace(document, generation=generation, seq=seq, envelope=_sealed(moved, signers))
        )

    # -- drafts -------------------------------------------------------------------------------------------------------

    def submit(self, envelopes: Sequence[tuple[str, bytes]], keys: Sequence[PublicKey]) -> list[Document]:
        """Take exported documents back, signed by whoever had to: device and envelope each. Publishes nothing.

        PeerError and EnvelopeError for what is not what was exported, RefusedError for missing signatures,
        ConflictError where the device has gone on meanwhile.
        """
        taken: list[Document] = []
        known = {key.keyid: key for key in keys}
        with self._books.database.transaction():
            for name, envelope in envelopes:
                taken.append(self._submit(name, envelope, known))
        return taken

    def _submit(self, name: str, envelope: bytes, known: Mapping[str, PublicKey]) -> Document:
        device = self._registry.device(name)
        opened = open_envelope(envelope, JobDocument.KIND, known)
        message = decode(opened.payload, JobDocument)
        if message.job is None or message.device != name:
            raise PeerError(f"cannot submit: the document for '{name}' is not for it")
        document = self._documents.of_job(message.job.job_id, name, message.epoch)
        if document is None or peek_payload(document.envelope)[1] != opened.payload:
            raise PeerError(f"cannot submit job {message.job.job_id}: it is not what was exported for '{name}'")
        if document.state != "draft":
            raise ConflictError(f"cannot submit job {document.job_id} for '{name}': it is {document.state}")
        require_obeyed(device, require_op(message.job.op), sorted(opened.keyids))
        self._require_next(device, document, message.job)
        self._documents.complete(document, envelope)
        return replace(document, state="waiting", note="", envelope=envelope)

    def _require_next(self, device: Device, document: Document, job: Job) -> None:
        """ConflictError when the device would refuse it for what it has accepted, or started, since the export."""
        outcomes = self._documents.of_device(device.name, most=-1)
        later = [other.document for other in outcomes if other.document.generation > document.generation]
        if document.epoch != device.epoch or any(other.published for other in later if other.epoch == device.epoch):
            raise ConflictError(
                f"cannot submit job {document.job_id}: '{device.name}' was given a later one since",
                hint="give it again",
            )
        if job.boot_nonce is not None and job.boot_nonce != self._nonce(device):
            raise ConflictError(
                f"cannot submit job {document.job_id}: '{device.name}' has started anew since", hint="give it again"
            )


def new_job_id(now: datetime) -> str:
    """An id that sorts by time: ``20260131-120000-3f9a2c``."""
    return f"{now.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def require_op(op: str) -> Op:
    """The row of an operation that may be a job. NotFoundError."""
    row = OPS.get(op)
    if row is None or not row.job:
        named = ", ".join(sorted(name for name, each in OPS.items() if each.job))
        raise NotFoundError(f"cannot give job '{op}': there is no such operation; there are {named}")
    return row


def require_obeyed(device: Device, row: Op, keyids: Sequence[str]) -> None:
    """RefusedError unless the device would obey these signers in an operation of that class."""
    able = {keyid for keyid in keyids if row.kind in device.obeys.get(keyid, ())}
    need = SIGNATURES[row.kind]
    if len(able) >= need:
        return
    if not any(keyid in device.obeys for keyid in keyids):
        raise RefusedError(
            f"cannot give '{row.name}' to '{device.name}': it was enrolled without these keys",
            hint="a device obeys the keys that there were at its enrolment: enrol it again, or sign with one of them",
        )
    if not able:
        raise RefusedError(f"cannot give '{row.name}' to '{device.name}': it obeys none of these keys in {row.kind}")
    raise RefusedError(
        f"cannot give '{row.name}' to '{device.name}': {len(able)} of {need} signatures that class {row.kind} needs",
        hint="add --export FILE; another person signs it: edge-fleet keys sign FILE; then: edge-fleet job submit FILE",
    )


def require_cancelling(device: Device, keyids: Sequence[str]) -> None:
    """RefusedError unless the device would obey these signers when they cancel: that is a change, with a ping."""
    for kind in ("change", OPS[_MARKER].kind):
        if not any(kind in device.obeys.get(keyid, ()) for keyid in keyids):
            raise RefusedError(f"cannot cancel on '{device.name}': it obeys none of these keys in class {kind}")


def export_envelopes(envelopes: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """Device and envelope each, as a file that a second person signs."""
    return {
        "format": EXPORT,
        "documents": [
            {"device": device, "envelope": base64.b64encode(envelope).decode()} for device, envelope in envelopes
        ],
    }


def parse_export(document: Any) -> list[tuple[str, bytes]]:
    """Device and envelope of each document in such a file. PeerError."""
    if not isinstance(document, dict) or document.get("format") != EXPORT:
        raise PeerError(f"cannot read exported job: its format is not {EXPORT}")
    entries = document.get("documents")
    if not isinstance(entries, list) or not entries or set(document) != {"format", "documents"}:
        raise PeerError("cannot read exported job: there are no documents in it")
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"device", "envelope"}:
            raise PeerError("cannot read exported job: each document has a device and an envelope")
        if not isinstance(entry["device"], str) or not isinstance(entry["envelope"], str):
            raise PeerError("cannot read exported job: each document has a device and an envelope")
        try:
            found.append((entry["device"], base64.b64decode(entry["envelope"], validate=True)))
        except ValueError as error:
            raise PeerError("cannot read exported job: its base64 is wrong") from error
    return found


def read_exported(envelope: bytes) -> JobDocument:
    """What a person is about to sign. PeerError, EnvelopeError."""
    kind, payload = peek_payload(envelope)
    if kind != JobDocument.KIND:
        raise EnvelopeError("wrong_type", "it is no job")
    return decode(payload, JobDocument)


def _require_json(args: Mapping[str, Any]) -> None:
    """PeerError for what JSON cannot say: it would be signed as something else."""
    try:
        json.dumps(args, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise PeerError("cannot give job: args cannot be said in JSON") from error


def _sealed(message: JobDocument, signers: Sequence[Signer]) -> bytes:
    try:
        return seal(JobDocument.KIND, message.encode(), signers)
    except ValueError as error:
        raise TooLargeError(
            f"cannot give job: {error}", hint="shorter arguments, or a version of fewer files"
        ) from error
