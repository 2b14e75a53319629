"""The job journal: what was accepted, how far it is, and what the fleet has yet to be told.

Invariants: a job is accepted, together with every counter that guards against replay, in one durable transaction or
not at all; what has ended does not change; the last state of a job is given by ``unpublished`` until ``published``
names its ``rev``; at most ``MAX_ENDED`` ended and ``MAX_OPEN`` open jobs are kept. Any thread may call anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from agent.base.clock import Clock, iso
from agent.base.errors import AgentError, DamagedError, PeerError, one_line
from agent.work.database import HINT, Database
from agent.work.jobs import Failure, JobStatus, Order, Progress, Refusal, move
from agent.work.records import (
    INSERT,
    SAVE,
    Record,
    Waiting,
    order_columns,
    progress_columns,
    progress_of,
    record_of,
    require_counters,
    status_of,
    understood,
    waiting_of,
)
from agent.work.schema import VERSIONS
from agent.work.tables import Facts, Maintenance, Refusals

#: Jobs that may wait or run at a time.
MAX_OPEN = 256
#: Ended jobs that are kept once the fleet knows of their end.
MAX_ENDED = 1000
#: States that the fleet has not confirmed, beyond which no further job is taken.
MAX_UNTOLD = 2000
Verdict = Literal["accepted", "duplicate"]


class Journal:
    """The file ``path``, between ``open`` and ``close``. ``step`` is told of each durable write, before and after."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        clock_trusted: Callable[[], bool] = lambda: True,
        step: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._path = path
        self._db = Database(path, VERSIONS, step)
        self._clock = clock
        self._trusted = clock_trusted
        self._cancelled: set[int] = set()
        self._guard = threading.Lock()
        self.maintenance = Maintenance(self._db)
        self.facts = Facts(self._db)
        self._refusals = Refusals(self._db, clock)

    def open(self) -> Journal:
        """Ready for use. DamagedError, TryLaterError, ConflictError, UnsupportedError say why not."""
        self._db.open()
        try:
            self._require_counters()
            for row in self._db.read("SELECT * FROM jobs WHERE published < rev OR state IN ('queued', 'running')"):
                with understood(self._path):
                    record_of(row)
        except AgentError:
            self._db.close()
            raise
        self._cancelled = {
            row["key"] for row in self._db.read("SELECT key FROM jobs WHERE cancel AND state IN ('queued', 'running')")
        }
        return self

    def _require_counters(self) -> None:
        rows = self._db.read("SELECT * FROM counters")
        if len(rows) != 1:
            raise DamagedError(f"cannot read the job journal: its counters are gone: {self._path}", hint=HINT)
        with understood(self._path):
            require_counters(rows[0])

    def close(self) -> None:
        """Harmless when repeated."""
        with contextlib.suppress(AgentError):  # counters of refusals are worth no failing stop
            self._refusals.flush()
        self._db.close()

    def __enter__(self) -> Journal:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- from the fleet -----------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """The device's enrolment. A later one restarts the counters, and what is open of an earlier is cancelled."""
        with self._db.write("begin an enrolment") as db:
            known = _counters(db)["epoch"]
            if epoch < known:
                raise Refusal("old_epoch", f"cannot go back to enrolment {epoch}: the journal is in {known}")
            if epoch == known:
                return
            left = [row["job_id"] for row in db.execute("SELECT job_id FROM jobs WHERE state IN ('queued', 'running')")]
            flagged = self._cancel(db, left, "old_epoch", "the device was enrolled anew")
            db.execute("UPDATE jobs SET published = rev")
            db.execute(
                "UPDATE counters SET epoch = ?, generation = 0, document = '', seq = 0, desired_version = 0, "
                "desired = x''",
                (epoch,),
            )
        self._note_cancelled(flagged)

    def accept(
        self,
        order: Order | None,
        *,
        epoch: int,
        generation: int,
        document: bytes,
        cancel: Sequence[str] = (),
        rejection: Failure | None = None,
    ) -> Verdict:
        """A job document: the job on disk, what it cancels cancelled, the counters moved; all of it or nothing.

        ``document`` is what tells one document from another. A job with a ``rejection``, or whose window or last
        moment cannot be kept (bad_args, clock_untrusted, expired), is written down as rejected. Refusal: old_epoch,
        future_epoch, old_generation, job_id_taken, old_sequence, busy. A duplicate is published again.
        With ``rejection`` the job is taken as one that has ended, rejected for that reason, so that the fleet is told.
        """
        if order is not None and order.epoch != epoch:
            raise ValueError("a job is of the enrolment of its document")
        content = None if order is None else order.digest()
        document_digest = hashlib.sha256(document).hexdigest()
        with self._db.write("accept a job") as db:
            counters = _counters(db)
            _require_epoch(counters["epoch"], epoch)
            known = (
                order
                and db.execute(
                    "SELECT key, digest FROM jobs WHERE epoch = ? AND job_id = ?", (epoch, order.job_id)
                ).fetchone()
            )
            again = generation == counters["generation"] and document_digest == counters["document"]
            if generation <= counters["generation"] and not again:
                raise Refusal("old_generation", f"cannot take generation {generation}: there was a later one")
            flagged = [] if again else self._cancel(db, cancel, "cancelled", "cancelled by the fleet")
            if known:
                self._repeat(db, known, content)
            elif order is not None and not again:
                self._insert(db, order, counters["seq"], rejection)
            if not again:
                db.execute("UPDATE counters SET generation = ?, document = ?", (generation, document_digest))
        self._note_cancelled(flagged)
        return "duplicate" if again or known else "accepted"

    def cancel(self, job_ids: Iterable[str]) -> None:
        """What waits is cancelled; what runs will be at its next safe point. Unknown and ended ids mean nothing."""
        with self._db.write("cancel jobs") as db:
            flagged = self._cancel(db, job_ids, "cancelled", "cancelled by the fleet")
        self._note_cancelled(flagged)

    def refused(self, code: str) -> None:
        """Count a refused document. Cheap however often it is called."""
        self._refusals.count(code)

    def refusals(self) -> dict[str, int]:
        """Refused documents by reason code, since the journal was made."""
        return self._refusals.counts()

    def desired(self) -> tuple[int, bytes]:
        """Version and document of the last desired state; ``(0, b"")`` when there was none."""
        row = self._db.read("SELECT desired_version, desired FROM counters")[0]
        return row["desired_version"], row["desired"]

    def accept_desired(self, version: int, document: bytes, *, epoch: int) -> Verdict:
        """A desired state on disk. Refusal: old_epoch, future_epoch, old_version."""
        with self._db.write("accept a desired state") as db:
            counters = _counters(db)
            _require_epoch(counters["epoch"], epoch)
            if version == counters["desired_version"] and document == counters["desired"]:
                return "duplicate"
            if version <= counters["desired_version"]:
                raise Refusal("old_version", f"cannot take version {version}: there was a later one")
            db.execute("UPDATE counters SET desired_version = ?, desired = ?", (version, document))
        return "accepted"

    def last(self) -> tuple[int, int, int]:
        """Epoch, generation and seq of the last that was accepted."""
        row = self._db.read("SELECT epoch, generation, seq FROM counters")[0]
        return row["epoch"], row["generation"], row["seq"]

    # -- to the fleet -------------------------------------------------------------------------------------------------

    def unpublished(self) -> list[JobStatus]:
        """The last state of each job of this enrolment that the fleet has not confirmed, oldest job first."""
        rows = self._db.read(
            "SELECT epoch, job_id, seq, op, rev, state, phase, step, attempt, at, clock_trusted, result, error "
            "FROM jobs WHERE published < rev AND epoch = (SELECT epoch FROM counters) ORDER BY key"
        )
        with understood(self._path):
            return [status_of(row) for row in rows]

    def published(self, job_id: str, rev: int) -> None:
        """The fleet has this state. Not flushed: after a power cut it is told once more."""
        with self._db.write("note what is published", durable=False) as db:
            db.execute(
                "UPDATE jobs SET published = max(published, min(?, rev)) "
                "WHERE job_id = ? AND epoch = (SELECT epoch FROM counters)",
                (rev, job_id),
            )
            db.execute(
                "DELETE FROM jobs WHERE key IN (SELECT key FROM jobs WHERE state NOT IN ('queued', 'running') "
                "AND (published >= rev OR epoch < (SELECT epoch FROM counters)) ORDER BY key DESC LIMIT -1 OFFSET ?)",
                (MAX_ENDED,),
            )

    def terminal(self, job_id: str) -> JobStatus | None:
        """How a job ended; None while it has not, and for one that is not known."""
        record = self.job(job_id)
        return record.status if record and record.progress.has_ended else None

    def jobs(self, *, limit: int = 100, open_only: bool = False) -> list[JobStatus]:
        """States, newest job first."""
        rows = self._db.read(
            "SELECT epoch, job_id, seq, op, rev, state, phase, step, attempt, at, clock_trusted, result, error "
            "FROM jobs WHERE NOT ? OR state IN ('queued', 'running') ORDER BY key DESC LIMIT ?",
            int(open_only),
            limit,
        )
        with understood(self._path):
            return [status_of(row) for row in rows]

    def job(self, job_id: str) -> Record | None:
        """A job by its id, of the latest enrolment that has it."""
        rows = self._db.read("SELECT * FROM jobs WHERE job_id = ? ORDER BY epoch DESC LIMIT 1", job_id)
        with understood(self._path):
            return record_of(rows[0]) if rows else None

    # -- for the runner -----------------------------------------------------------------------------------------------

    def waiting(self) -> list[Waiting]:
        """Open jobs, in the order in which they are to run: begun ones, then by priority, then by ``seq``."""
        rows = self._db.read(
            "SELECT key, job_id, op, seq, lane, priority, not_after, cron, window_s, tz, state, phase, attempt "
            "FROM jobs WHERE state IN ('queued', 'running') ORDER BY attempt > 0 DESC, priority DESC, epoch, seq"
        )
        with understood(self._path):
            return [waiting_of(row) for row in rows]

    def load(self, key: int) -> Record | None:
        """A job by its key."""
        rows = self._db.read("SELECT * FROM jobs WHERE key = ?", key)
        with understood(self._path):
            return record_of(rows[0]) if rows else None

    def save(self, key: int, before: Progress, after: Progress, *, durable: bool = True) -> bool:
        """Write ``after`` in place of ``before``; False when the job has moved meanwhile (it was cancelled)."""
        values = progress_columns(after) | self._stamp() | {"key": key, "before": before.rev}
        with self._db.write("write down how far a job is", durable=durable) as db:
            changed = db.execute(SAVE, values).rowcount
        if after.has_ended:
            with self._guard:
                self._cancelled.discard(key)
        return changed == 1

    def is_cancelled(self, key: int) -> bool:
        """Whether a running job is to stop at its next safe point. Costs nothing."""
        with self._guard:
            return key in self._cancelled

    # -- within -------------------------------------------------------------------------------------------------------

    def _insert(self, db: sqlite3.Connection, order: Order, last_seq: int, rejection: Failure | None) -> None:
        if order.seq <= last_seq:
            raise Refusal("old_sequence", f"cannot take job {order.job_id}: its sequence number {order.seq} was used")
        rejection = rejection or self._untimely(order)
        full = db.execute("SELECT count(*) >= ? FROM jobs WHERE state IN ('queued', 'running')", (MAX_OPEN,))
        untold = db.execute("SELECT count(*) >= ? FROM jobs WHERE published < rev", (MAX_UNTOLD,))
        if (full.fetchone()[0] and rejection is None) or untold.fetchone()[0]:
            raise Refusal("busy", f"cannot take job {order.job_id}: too many are waiting", hint="try again later")
        progress = Progress() if rejection is None else Progress(state="rejected", error=rejection)
        db.execute(INSERT, order_columns(order) | progress_columns(progress) | self._stamp())
        db.execute("UPDATE counters SET seq = ?", (order.seq,))

    def _untimely(self, order: Order) -> Failure | None:
        """What an order says of time must be sensible, and can be followed only by who knows the time."""
        try:
            expiry = order.expiry()
            if order.window is not None:
                from agent.work.windows import opening_at  # noqa: PLC0415 - most devices never see one

                opening_at(order.window, self._clock.now())
        except (PeerError, ValueError) as error:
            return Failure("bad_args", one_line(f"cannot take job: {error}"))
        if (expiry is not None or order.window is not None) and not self._trusted():
            return Failure("clock_untrusted", "cannot take job: nobody vouches for this device's clock")
        if expiry is not None and self._clock.now() > expiry:
            return Failure("expired", f"cannot take job: it was to begin by {order.not_after}")
        return None

    def _stamp(self) -> dict[str, Any]:
        return {"at": iso(self._clock.now()), "clock_trusted": int(self._trusted())}

    @staticmethod
    def _repeat(db: sqlite3.Connection, known: sqlite3.Row, content: str | None) -> None:
        if content != known["digest"]:
            raise Refusal("job_id_taken", "cannot take job: there is another of its id")
        db.execute("UPDATE jobs SET published = 0 WHERE key = ?", (known["key"],))

    def _cancel(self, db: sqlite3.Connection, job_ids: Iterable[str], code: str, text: str) -> list[int]:
        """End what was not begun, flag what was; returns the keys of the flagged."""
        flagged: list[int] = []
        for job_id in job_ids:
            rows = db.execute("SELECT * FROM jobs WHERE job_id = ? AND state IN ('queued', 'running')", (job_id,))
            for row in rows.fetchall():
                if row["attempt"]:
                    db.execute("UPDATE jobs SET cancel = 1 WHERE key = ?", (row["key"],))
                    flagged.append(row["key"])
                else:
                    with understood(self._path):
                        before = progress_of(row)
                    after = move(before, state="cancelled", error=Failure(code, text))
                    keys = {"key": row["key"], "before": row["rev"]}
                    db.execute(SAVE, progress_columns(after) | self._stamp() | keys)
        return flagged

    def _note_cancelled(self, keys: Iterable[int]) -> None:
        with self._guard:
            self._cancelled.update(keys)


def _counters(db: sqlite3.Connection) -> sqlite3.Row:
    row: sqlite3.Row = db.execute("SELECT * FROM counters").fetchone()
    return row


def _require_epoch(own: int, epoch: int) -> None:
    if epoch != own:
        code = "old_epoch" if epoch < own else "future_epoch"
        raise Refusal(code, f"cannot take a document of enrolment {epoch}: this is enrolment {own}")
