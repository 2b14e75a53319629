"""What one expects of each candidate before it has run: a rank, never a verdict."""

from __future__ import annotations

from dataclasses import dataclass

from agent.selection.rules import Candidate


@dataclass(frozen=True, slots=True)
class Prior:
    """An expectation: ``score`` is the expected speed relative to fp32 on one CPU (1.5 = 1.5 times as fast)."""

    candidate: Candidate
    score: float
    why: str
