"""Jobs as the journal hands them out, and the way between them and its rows. Pure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.base.errors import DamagedError
from agent.work.database import HINT
from agent.work.jobs import (
    MAX_RESULT_BYTES,
    Ending,
    Failure,
    JobStatus,
    Lane,
    Order,
    Phase,
    Progress,
    State,
    WindowSpec,
)

INSERT = """INSERT INTO jobs (
    epoch, job_id, seq, op, kind, lane, priority, args, not_after, step_timeout_s, total_timeout_s, cron, window_s, tz,
    envelope, digest, accepted_at, at, clock_trusted, state, rev, error
) VALUES (
    :epoch, :job_id, :seq, :op, :kind, :lane, :priority, :args, :not_after, :step_timeout_s, :total_timeout_s, :cron,
    :window_s, :tz, :envelope, :digest, :at, :at, :clock_trusted, :state, :rev, :error
)"""
#: Changes an open job that is still at ``before``. Once it has ended its envelope has served.
SAVE = """UPDATE jobs SET
    state = :state, phase = :phase, step = :step, rev = :rev, attempt = :attempt, stalled = :stalled,
    elapsed_s = :elapsed_s, begun = :begun, done = :done, ending = :ending, notes = :notes, result = :result,
    error = :error,
    at = CASE WHEN rev < :rev THEN :at ELSE at END,
    clock_trusted = CASE WHEN rev < :rev THEN :clock_trusted ELSE clock_trusted END,
    envelope = CASE WHEN :state IN ('queued', 'running') THEN envelope ELSE x'' END
WHERE key = :key AND rev = :before AND state IN ('queued', 'running')"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An open job, as far as choosing the next one needs it. ``begun``: it was started before."""

    key: int
    job_id: str
    op: str
    seq: int
    lane: Lane
    priority: int
    not_after: str | None
    window: WindowSpec | None
    state: State
    phase: Phase | None
    begun: bool


@dataclass(frozen=True, slots=True)
class Record:
    """A job in full. ``intact``: the order is the one that was accepted."""

    key: int
    order: Order
    progress: Progress
    intact: bool
    accepted_at: str
    at: str
    clock_trusted: bool

    @property
    def status(self) -> JobStatus:
        """What the fleet is told."""
        order, now = self.order, self.progress
        return JobStatus(
            order.job_id, order.epoch, order.seq, order.op, now.rev, now.state, now.phase, now.step, now.attempt,
            self.at, self.clock_trusted, now.result if now.has_ended else None, now.error,
        )  # fmt: skip


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """What cannot be in a row that was written here means a damaged file: DamagedError."""
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        raise DamagedError(f"cannot read the job journal: a row makes no sense: {path}", hint=HINT) from error


def require_counters(row: sqlite3.Row) -> None:
    """What guards against replay must be numbers. TypeError, IndexError."""
    for name in ("epoch", "generation", "seq", "desired_version"):
        _whole(row[name])


def order_columns(order: Order) -> dict[str, Any]:
    """The columns that never change."""
    window = order.window
    return {
        "epoch": order.epoch,
        "job_id": order.job_id,
        "seq": order.seq,
        "op": order.op,
        "kind": order.kind,
        "lane": order.lane,
        "priority": order.priority,
        "args": _text(dict(order.args)),
        "not_after": order.not_after,
        "step_timeout_s": float(order.step_timeout_s),
        "total_timeout_s": float(order.total_timeout_s),
        "cron": window and window.cron,
        "window_s": window and window.duration_s,
        "tz": window and window.tz,
        "envelope": order.envelope,
        "digest": order.digest(),
    }


def order_of(row: sqlite3.Row) -> Order:
    """The order of a row."""
    return Order(
        job_id=row["job_id"],
        epoch=row["epoch"],
        seq=row["seq"],
        op=row["op"],
        kind=row["kind"],
        lane=row["lane"],
        priority=row["priority"],
        args=json.loads(row["args"]),
        not_after=row["not_after"],
        step_timeout_s=row["step_timeout_s"],
        total_timeout_s=row["total_timeout_s"],
        window=window_of(row),
        envelope=row["envelope"],
    )


def window_of(row: sqlite3.Row) -> WindowSpec | None:
    """The window of a row, where it has one."""
    return None if row["cron"] is None else WindowSpec(row["cron"], row["window_s"], row["tz"])


def progress_columns(progress: Progress) -> dict[str, Any]:
    """The columns that a step of a job changes."""
    ending, error = progress.ending, progress.error
    return {
        "state": progress.state,
        "phase": progress.phase,
        "step": progress.step,
        "rev": progress.rev,
        "attempt": progress.attempt,
        "stalled": progress.stalled,
        "elapsed_s": progress.elapsed_s,
        "begun": _text(progress.begun),
        "done": progress.done,
        "ending": ending and _text(dataclasses.asdict(ending)),
        "notes": _text(dict(progress.notes)),
        "result": None if progress.result is None else _text(bounded(progress.result)),
        "error": error and _text(dataclasses.asdict(error)),
    }


def progress_of(row: sqlite3.Row) -> Progress:
    """The progress of a row."""
    return Progress(
        state=row["state"],
        phase=row["phase"],
        step=row["step"],
        rev=_whole(row["rev"]),
        attempt=_whole(row["attempt"]),
        stalled=_whole(row["stalled"]),
        elapsed_s=float(row["elapsed_s"]),
        begun=tuple(json.loads(row["begun"])),
        done=_whole(row["done"]),
        ending=_ending(row["ending"]),
        notes=dict(json.loads(row["notes"])),
        result=None if row["result"] is None else dict(json.loads(row["result"])),
        error=_failure(row["error"]),
    )


def status_of(row: sqlite3.Row) -> JobStatus:
    """What the fleet is told. A result is told at the end alone."""
    ended = row["state"] not in ("queued", "running")
    return JobStatus(
        job_id=row["job_id"],
        epoch=_whole(row["epoch"]),
        seq=_whole(row["seq"]),
        op=row["op"],
        rev=_whole(row["rev"]),
        state=row["state"],
        phase=row["phase"],
        step=row["step"],
        attempt=_whole(row["attempt"]),
        at=row["at"],
        clock_trusted=bool(row["clock_trusted"]),
        result=json.loads(row["result"]) if ended and row["result"] is not None else None,
        error=_failure(row["error"]),
    )


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError("a whole number is expected")
    return value


def record_of(row: sqlite3.Row) -> Record:
    """A whole row."""
    order = order_of(row)
    intact = bool(order.digest() == row["digest"])
    progress, trusted = progress_of(row), bool(row["clock_trusted"])
    return Record(row["key"], order, progress, intact, row["accepted_at"], row["at"], trusted)


def waiting_of(row: sqlite3.Row) -> Waiting:
    """What choosing needs of a row."""
    return Waiting(
        key=row["key"],
        job_id=row["job_id"],
        op=row["op"],
        seq=_whole(row["seq"]),
        lane=row["lane"],
        priority=_whole(row["priority"]),
        not_after=row["not_after"],
        window=window_of(row),
        state=row["state"],
        phase=row["phase"],
        begun=_whole(row["attempt"]) > 0,
    )


def bounded(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result, or in its place how large it was. ValueError, TypeError when it is no JSON."""
    size = len(_text(dict(result)))
    return result if size <= MAX_RESULT_BYTES else {"left_out_bytes": size}


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _ending(text: str | None) -> Ending | None:
    if text is None:
        return None
    fields = json.loads(text)
    return Ending(fields["state"], Failure(**fields["failure"]), fields["undone"], tuple(fields["troubles"]))


def _failure(text: str | None) -> Failure | None:
    return None if text is None else Failure(**json.loads(text))
