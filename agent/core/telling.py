"""Jobs and the twin as the fleet is told of them, within what a message may hold. Pure.

What is too long is left out and its size given in its place: a device that cannot say everything must not fall silent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agent.base.errors import one_line
from agent.wire import messages as wire
from agent.work.jobs import Failure, JobStatus

#: Bytes of JSON of one value in ``config`` and ``drift``, and rows of ``drift``.
MOST_VALUE = 512
MOST_DRIFT = 40
#: Bytes of log lines in one answer: with signature and base64 they must fit a message.
MOST_LOG = 24 << 10


def job_state(status: JobStatus, address: Mapping[str, Any]) -> wire.JobState:
    """One state of a job. ValueError for one that cannot be a message."""
    error = status.error
    return wire.JobState(
        tenant=address["tenant"],
        device=address["device"],
        epoch=status.epoch,
        job_id=status.job_id,
        seq=status.seq,
        op=status.op,
        rev=status.rev,
        state=status.state,
        phase=status.phase,
        step=status.step,
        attempt=status.attempt,
        at=status.at,
        clock_trusted=status.clock_trusted,
        result=None if status.result is None else dict(status.result),
        error=None if error is None else wire.Failure(code=error.code, text=error.text, hint=error.hint),
    )


def without_story(status: JobStatus) -> JobStatus:
    """The bare outcome, for when the result or the reason cannot be told."""
    error = status.error
    return replace(
        status,
        result=None if status.result is None else {"left_out": True},
        error=None if error is None else Failure(error.code[:64], one_line(error.text)),
    )


def job_row(status: JobStatus) -> dict[str, Any]:
    """For ``jobs list``."""
    error = status.error
    return {
        "job_id": status.job_id,
        "op": status.op,
        "state": status.state,
        "phase": status.phase,
        "step": status.step,
        "rev": status.rev,
        "attempt": status.attempt,
        "at": status.at,
        "result": None if status.result is None else dict(status.result),
        "error": None if error is None else {"code": error.code, "text": error.text, "hint": error.hint},
    }


def shortened(value: Any) -> Any:
    """The value, or how many bytes it has where those are many."""
    size = len(json.dumps(value))
    return value if size <= MOST_VALUE else {"left_out_bytes": size}


def short_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the fleet has set, section by section, long values left out."""
    return {
        section: {key: shortened(value) for key, value in values.items()} if isinstance(values, dict) else values
        for section, values in config.items()
    }


def short_drift(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first rows, long values left out."""
    return [{key: shortened(value) for key, value in row.items()} for row in rows[:MOST_DRIFT]]


def last_lines(lines: Sequence[str]) -> list[str]:
    """As many of the last lines as fit into an answer."""
    room, kept = MOST_LOG, 0
    for line in reversed(lines):
        room -= len(json.dumps(line)) + 1
        if room < 0:
            break
        kept += 1
    return list(lines[len(lines) - kept :])
