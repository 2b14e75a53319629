"""Job documents and what devices answered to them, in tables of the database.

A document is ``draft`` (exported, signatures missing), ``waiting`` (to be published, or published and not answered),
``answered`` (the device has it) or ``void`` (the device will never take it; the note says why). What a device says of a
job is kept beside it and always outweighs what is thought here.

Invariants: a job's ``rev`` only rises; what ended stays ended; the document of a device that is on its doorbell is the
waiting one with the lowest generation (docs/spec/link.md 1.4), by whichever command that is asked.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent.base.errors import ConflictError, NotFoundError
from agent.fleet.database import Database
from agent.wire.messages import JobState

DocumentState = Literal["draft", "waiting", "answered", "void"]
#: States of a job that end it.
TERMINAL = frozenset(("succeeded", "failed", "rejected", "cancelled"))
Recorded = Literal["new", "duplicate", "out_of_order", "after_end", "unknown_job", "mismatch"]


@dataclass(frozen=True, slots=True)
class Document:
    """A signed document for one device and what is known of it. ``published``: when it was last put on the doorbell."""

    device: str
    epoch: int
    generation: int
    seq: int
    job_id: str
    op: str
    kind: str
    lane: str
    args: Mapping[str, Any]
    cancels: tuple[str, ...]
    envelope: bytes
    state: DocumentState
    note: str
    given: str
    published: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One job on one device: the document, and the last state that the device signed (None: none yet)."""

    document: Document
    said: JobState | None
    received: str | None

    @property
    def state(self) -> str:
        """In a word: the device's own, else ``draft``, ``waiting``, ``sent``, ``taken`` or ``void``."""
        if self.said is not None:
            return self.said.state
        if self.document.state == "waiting":
            return "sent" if self.document.published else "waiting"
        return "taken" if self.document.state == "answered" else self.document.state

    @property
    def over(self) -> bool:
        """Whether nothing more is to come."""
        return self.state in TERMINAL or self.state == "void"


class Documents:
    """The tables of jobs. Methods that write are called in a transaction of the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def _sql(self) -> sqlite3.Connection:
        return self._database.connection

    def add(self, document: Document) -> None:
        """ConflictError when the device has a job of that id already."""
        try:
            self._sql.execute(
                "INSERT INTO documents VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    document.device,
                    document.epoch,
                    document.generation,
                    document.seq,
                    document.job_id,
                    document.op,
                    document.kind,
                    document.lane,
                    json.dumps(document.args, separators=(",", ":")),
                    json.dumps(document.cancels),
                    document.envelope,
                    document.state,
                    document.note,
                    document.given,
                    document.published,
                ),
            )
        except sqlite3.IntegrityError as error:
            raise ConflictError(
                f"cannot give job {document.job_id} to '{document.device}': it has one of that id already"
            ) from error

    def replace(self, old: Document, new: Document) -> None:
        """Another document in the place of one that was never published."""
        self._sql.execute(
            "DELETE FROM documents WHERE device = ? AND epoch = ? AND generation = ?",
            (old.device, old.epoch, old.generation),
        )
        self.add(new)

    def set_state(self, document: Document, state: DocumentState, note: str = "") -> None:
        """Move a document."""
        self._sql.execute(
            "UPDATE documents SET state = ?, note = ? WHERE device = ? AND epoch = ? AND generation = ?",
            (state, note, document.device, document.epoch, document.generation),
        )

    def complete(self, document: Document, envelope: bytes) -> None:
        """A draft has all its signatures: it waits for its turn."""
        self._sql.execute(
            "UPDATE documents SET state = 'waiting', note = '', envelope = ?"
            " WHERE device = ? AND epoch = ? AND generation = ? AND state = 'draft'",
            (envelope, document.device, document.epoch, document.generation),
        )

    def set_published(self, documents: Sequence[Document], now: str) -> None:
        """They are about to be on their doorbells."""
        self._sql.executemany(
            "UPDATE documents SET published = ? WHERE device = ? AND epoch = ? AND generation = ?",
            [(now, document.device, document.epoch, document.generation) for document in documents],
        )

    def current(self, device: str) -> Document | None:
        """What belongs on a device's doorbell now; None leaves there what is there."""
        row = self._sql.execute(
            "SELECT documents.* FROM documents JOIN devices ON name = device AND documents.epoch = devices.epoch"
            " WHERE device = ? AND state = 'waiting' ORDER BY documents.generation LIMIT 1",
            (device,),
        ).fetchone()
        return None if row is None else _document(row)

    def waiting(self, device: str) -> list[Document]:
        """Documents that a device has not answered, in their order."""
        rows = self._sql.execute(
            "SELECT * FROM documents WHERE device = ? AND state = 'waiting' ORDER BY epoch, generation", (device,)
        )
        return [_document(row) for row in rows]

    def unended(self) -> list[Document]:
        """The last document that each device has answered, where its job has not ended and nothing waits behind it.

        A device that gets it again says again what became of the job: of an earlier one it would not.
        """
        ended = ", ".join(f"'{state}'" for state in sorted(TERMINAL))
        rows = self._sql.execute(
            "SELECT documents.* FROM documents JOIN devices ON name = documents.device"  # noqa: S608 - constants
            " AND documents.epoch = devices.epoch WHERE documents.state = 'answered' AND documents.generation ="
            " (SELECT max(generation) FROM documents AS other WHERE other.device = documents.device"
            " AND other.epoch = documents.epoch AND other.state IN ('waiting', 'answered'))"
            " AND NOT EXISTS (SELECT 1 FROM states WHERE states.job_id = documents.job_id"
            " AND states.device = documents.device AND states.epoch = documents.epoch"
            f" AND states.state IN ({ended})) ORDER BY documents.device"
        )
        return [_document(row) for row in rows]

    def devices_waiting(self) -> list[str]:
        """Devices with documents that they have not answered."""
        rows = self._sql.execute("SELECT DISTINCT device FROM documents WHERE state = 'waiting' ORDER BY device")
        return [row["device"] for row in rows]

    def of_job(self, job_id: str, device: str, epoch: int) -> Document | None:
        """The document of a job on a device."""
        row = self._sql.execute(
            "SELECT * FROM documents WHERE job_id = ? AND device = ? AND epoch = ?", (job_id, device, epoch)
        ).fetchone()
        return None if row is None else _document(row)

    def record(self, state: JobState, now: str) -> Recorded:
        """Take a state whose signature was verified. Only "new" changes anything.

        A state may come twice and in any order: the one with the highest ``rev`` is kept.
        """
        document = self.of_job(state.job_id, state.device, state.epoch)
        if document is None:
            return "unknown_job"
        # A device that cannot read a job may not know its number, and says 0.
        if state.op != document.op or state.seq not in (0, document.seq):
            return "mismatch"
        row = self._sql.execute(
            "SELECT rev, state FROM states WHERE job_id = ? AND device = ? AND epoch = ?",
            (state.job_id, state.device, state.epoch),
        ).fetchone()
        payload = state.encode().decode()
        if row is not None and state.rev <= row["rev"]:
            same = (state.rev, state.state) == (row["rev"], row["state"])
            return "duplicate" if same else "out_of_order"
        if row is not None and row["state"] in TERMINAL:
            return "after_end"
        self._sql.execute(
            "INSERT OR REPLACE INTO states VALUES(?, ?, ?, ?, ?, ?, ?)",
            (state.device, state.epoch, state.job_id, state.rev, state.state, now, payload),
        )
        self.set_state(document, "answered")
        return "new"

    def taken(self, device: str, epoch: int, generation: int) -> bool:
        """The device says that it has accepted ``generation``: that one and earlier ones are done with."""
        done = self._sql.execute(
            "UPDATE documents SET state = 'answered' WHERE device = ? AND epoch = ? AND generation <= ?"
            " AND state = 'waiting'",
            (device, epoch, generation),
        )
        return done.rowcount > 0

    def outcomes(self, job_id: str) -> list[Outcome]:
        """A job on each of its devices. NotFoundError for an id that there is not."""
        found = self._outcomes("documents.job_id = ?", (job_id,))
        if not found:
            raise NotFoundError(f"cannot find job {job_id}: there is none of that id", hint="edge-fleet job list")
        return found

    def of_device(self, device: str, most: int = 20) -> list[Outcome]:
        """The last jobs of a device, newest first."""
        return self._outcomes("documents.device = ?", (device,), most)

    def recent(self, most: int, *, device: str | None = None, unfinished: bool = False) -> list[Outcome]:
        """The last jobs, of one device or of all, newest first."""
        ended = ", ".join(f"'{state}'" for state in sorted(TERMINAL))
        under_way = f"documents.state != 'void' AND coalesce(states.state, '') NOT IN ({ended})"
        where = f"(? IS NULL OR documents.device = ?) AND {under_way if unfinished else '1'}"
        return self._outcomes(where, (device, device), most)

    def _outcomes(self, where: str, values: Sequence[object], most: int = -1) -> list[Outcome]:
        rows = self._sql.execute(
            "SELECT documents.*, states.received AS heard, states.payload AS said"  # noqa: S608 - conditions of this class
            " FROM documents LEFT JOIN states ON states.job_id = documents.job_id"
            " AND states.device = documents.device AND states.epoch = documents.epoch"
            f" WHERE {where} ORDER BY documents.given DESC, documents.device, documents.generation DESC LIMIT ?",
            (*values, most),
        )
        return [
            Outcome(
                _document(row),
                None if row["said"] is None else JobState.model_validate_json(row["said"]),
                row["heard"],
            )
            for row in rows
        ]


def _document(row: sqlite3.Row) -> Document:
    return Document(
        device=row["device"],
        epoch=row["epoch"],
        generation=row["generation"],
        seq=row["seq"],
        job_id=row["job_id"],
        op=row["op"],
        kind=row["kind"],
        lane=row["lane"],
        args=json.loads(row["args"]),
        cancels=tuple(json.loads(row["cancels"])),
        envelope=row["envelope"],
        state=row["state"],
        note=row["note"],
        given=row["given"],
        published=row["published"],
    )
