"""What a job is and how it may move, docs/spec/jobs.md 1 and 2. Pure.

Invariants: a move that ``MOVES`` does not list raises; ``rev`` rises with everything that the fleet can see; a job that
has ended does not move again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal

from agent.base.errors import RefusedError

Lane = Literal["normal", "rescue"]
LANES: tuple[Lane, ...] = ("normal", "rescue")
State = Literal["queued", "running", "succeeded", "failed", "rejected", "cancelled"]
Phase = Literal[
    "accepted", "waiting_window", "downloading", "verifying", "installing", "trying", "activating", "probation",
    "rebooting",
]  # fmt: skip
PHASES: frozenset[str] = frozenset(Phase.__args__)  # type: ignore[attr-defined]
ENDED: frozenset[State] = frozenset(("succeeded", "failed", "rejected", "cancelled"))
_NOWHERE: frozenset[State] = frozenset()
MOVES: dict[State, frozenset[State]] = {
    "queued": frozenset(("running", "succeeded", "failed", "rejected", "cancelled")),
    "running": frozenset(("running", "succeeded", "failed", "rejected", "cancelled")),
    **dict.fromkeys(ENDED, _NOWHERE),
}
#: JSON of a result. With signature and base64 it must fit the link's 64 KiB.
MAX_RESULT_BYTES = 32 << 10


class Refusal(RefusedError):  # noqa: N818 - the word of the specification
    """A document is not taken. ``code`` is one of the reason codes of docs/spec/link.md 4."""

    def __init__(self, code: str, text: str, *, hint: str = "") -> None:
        super().__init__(text, hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """When a job may begin: ``cron`` (five fields) says when it opens, in the time zone ``tz``, for ``duration_s``."""

    cron: str
    duration_s: int
    tz: str = "UTC"


@dataclass(frozen=True, slots=True)
class Order:
    """One durable command, as it was signed. ``envelope`` is the signed document itself, raw."""

    job_id: str
    epoch: int
    seq: int
    op: str
    kind: str
    lane: Lane
    priority: int
    args: Mapping[str, Any]
    not_after: str | None
    step_timeout_s: float
    total_timeout_s: float
    window: WindowSpec | None
    envelope: bytes = field(repr=False)

    def digest(self) -> str:
        """The same for two orders of the same content, whoever signed them. ValueError when ``args`` are no JSON."""
        window = self.window and [self.window.cron, self.window.duration_s, self.window.tz]
        content = [
            self.job_id, self.epoch, self.seq, self.op, self.kind, self.lane, self.priority, dict(self.args),
            self.not_after, float(self.step_timeout_s), float(self.total_timeout_s), window,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def expiry(self) -> datetime | None:
        """``not_after`` as a moment. ValueError when it is none."""
        if self.not_after is None:
            return None
        return datetime.strptime(self.not_after, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job did not do what it was for."""

    code: str
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job will end once what it began is taken back. ``troubles`` say what could not be, ``undone`` counts."""

    state: State
    failure: Failure
    undone: int = 0
    troubles: tuple[str, ...] = ()

    def outcome(self) -> Failure:
        """What the fleet is told at the end."""
        failure = self.failure
        if self.troubles:
            text = f"{failure.text}; not taken back: {'; '.join(self.troubles)}"
            return replace(failure, text=text[:2000])
        if self.undone and failure.code == "failed":
            return replace(failure, code="undone")
        return failure


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. All of it is written at once, before what it announces is done.

    ``begun`` names the steps that were begun, of which the first ``done`` are known to be done. ``stalled`` counts the
    starts of the present step. With ``ending`` the steps in ``begun`` are being taken back, last first.
    """

    state: State = "queued"
    phase: Phase | None = None
    step: str | None = None
    rev: int = 1
    attempt: int = 0
    stalled: int = 0
    elapsed_s: float = 0.0
    begun: tuple[str, ...] = ()
    done: int = 0
    ending: Ending | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    error: Failure | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will come after this."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What the fleet is told of a job. ``at`` is when it came to this state."""

    job_id: str
    epoch: int
    seq: int
    op: str
    rev: int
    state: State
    phase: Phase | None
    step: str | None
    attempt: int
    at: str
    clock_trusted: bool
    result: Mapping[str, Any] | None
    error: Failure | None


def move(before: Progress, **changes: Any) -> Progress:
    """The next progress. ValueError for a move that is not in the table, also for a rejection of begun work."""
    after = replace(before, **changes)
    if after.state not in MOVES[before.state]:
        raise ValueError(f"a job cannot go from {before.state} to {after.state}")
    if after.state == "rejected" and (before.begun or before.attempt):
        raise ValueError("a job that was begun cannot be rejected")
    if after.has_ended:
        after = replace(after, begun=(), done=0, ending=None, notes={}, phase=None, stalled=0)
        if after.state != "succeeded":
            after = replace(after, result=None)
    return replace(after, rev=before.rev + (_visible(after) != _visible(before)))


def _visible(progress: Progress) -> tuple[object, ...]:
    shown = (progress.state, progress.phase, progress.step, progress.attempt, progress.error)
    return (*shown, progress.result) if progress.has_ended else shown
