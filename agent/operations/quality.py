"""How well versions answer over time: their golden sets run again, and what apps say of single answers. Pure.

Counts by version and UTC day, for so many days; the first days with feedback are kept beyond that, to be compared
with. Whoever may use a model may say anything of its answers, so nothing is decided by it: it is told, and may raise an
alert.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agent.base.errors import PeerError

#: Days with feedback that are kept, results of golden sets, and ids that are known to have been judged.
MOST_DAYS, MOST_RESULTS, MOST_IDS = 30, 30, 4096
#: Days that are compared: the first ones, and the last ones.
FIRST_DAYS, LAST_DAYS = 3, 3
#: Judged answers on either side, and how much lower the share of right ones must be to be worth a word.
LEAST_JUDGED, MARGIN = 50, 0.05
#: Standard deviations that make a difference more than luck: one in a thousand.
_SURE = 3.29
_MOST_TEXT = 256

Key = tuple[str, str]


@dataclass(slots=True)
class Counts:
    """Judged answers."""

    correct: int = 0
    wrong: int = 0

    @property
    def judged(self) -> int:
        """All of them."""
        return self.correct + self.wrong

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.correct + other.correct, self.wrong + other.wrong)


@dataclass(frozen=True, slots=True)
class Golden:
    """One run of a golden set: when, the metric's value, and whether it was good enough."""

    at: str
    metric: str
    value: float
    ok: bool


@dataclass(slots=True)
class _History:
    golden: deque[Golden] = field(default_factory=lambda: deque(maxlen=MOST_RESULTS))
    days: dict[str, Counts] = field(default_factory=dict)
    first: dict[str, Counts] = field(default_factory=dict)


def judgement(document: Mapping[str, Any]) -> tuple[str, bool]:
    """Id (or "") and whether the answer was right: ``correct``, or ``label`` beside ``predicted``. PeerError."""
    if unknown := sorted(set(document) - {"id", "correct", "label", "predicted"}):
        raise PeerError(f"cannot take feedback: unknown '{str(unknown[0])[:64]}'")
    name = document.get("id", "")
    if not isinstance(name, str) or len(name) > _MOST_TEXT:
        raise PeerError(f"cannot take feedback: 'id' must be a text of at most {_MOST_TEXT} characters")
    correct = document.get("correct")
    if "correct" in document:
        if not isinstance(correct, bool) or "label" in document or "predicted" in document:
            raise PeerError("cannot take feedback: 'correct' must be true or false, and stand alone")
        return name, correct
    if "label" not in document or "predicted" not in document:
        raise PeerError("cannot take feedback: 'correct' is missing, or 'label' and 'predicted'")
    label, predicted = document["label"], document["predicted"]
    for what, value in (("label", label), ("predicted", predicted)):
        if not isinstance(value, (str, int, float, bool)) or len(str(value)) > _MOST_TEXT:
            raise PeerError(f"cannot take feedback: '{what}' must be a short text, a number, or true or false")
    return name, type(label) is type(predicted) and label == predicted


class Quality:
    """The histories of all versions. ``to_json`` and ``from_json`` keep all but the ids."""

    def __init__(self) -> None:
        self._histories: dict[Key, _History] = {}
        self._judged: dict[tuple[str, str, str], None] = {}

    def judge(self, model: str, version: str, day: str, document: Mapping[str, Any]) -> bool:
        """Count what an app says of an answer; False where that answer has been judged before. PeerError."""
        name, correct = judgement(document)
        if name:
            if (model, version, name) in self._judged:
                return False
            if len(self._judged) >= MOST_IDS:
                del self._judged[next(iter(self._judged))]
            self._judged[model, version, name] = None
        history = self._history(model, version)
        counts = self._day(history, day)
        if correct:
            counts.correct += 1
        else:
            counts.wrong += 1
        return True

    def _day(self, history: _History, day: str) -> Counts:
        counts = history.days.get(day)
        if counts is None:
            counts = history.days[day] = Counts()
            while len(history.days) > MOST_DAYS:
                del history.days[min(history.days)]
            if len(history.first) < FIRST_DAYS:
                history.first[day] = counts
        return counts

    def ran(self, model: str, version: str, result: Golden) -> None:
        """A golden set was run again."""
        self._history(model, version).golden.append(result)

    def keep(self, installed: Iterable[Key]) -> None:
        """Forget versions that are not installed any more."""
        known = set(installed)
        for key in [key for key in self._histories if key not in known]:
            del self._histories[key]

    def _history(self, model: str, version: str) -> _History:
        history = self._histories.get((model, version))
        if history is None:
            history = self._histories[model, version] = _History()
        return history

    # -- telling ------------------------------------------------------------------------------------------------------

    def told(self, model: str, version: str) -> dict[str, Any]:
        """For ``models show``: results and counts, oldest first."""
        history = self._histories.get((model, version)) or _History()
        return {
            "golden": [asdict(result) for result in history.golden],
            "feedback": {day: asdict(history.days[day]) for day in sorted(history.days)},
            "problem": self.problem(model, version),
        }

    def short(self, model: str, version: str) -> dict[str, Any]:
        """For the fleet, which hears of many models: whether the last result was good, and the last days' counts."""
        history = self._histories.get((model, version)) or _History()
        last = history.golden[-1] if history.golden else None
        recent = sum((history.days[day] for day in sorted(history.days)[-LAST_DAYS:]), Counts())
        return {
            "golden_ok": last.ok if last is not None else None,
            "feedback": asdict(recent) if recent.judged else None,
        }

    def counts(self) -> list[tuple[str, str, Counts]]:
        """Every version that was judged, with all that is kept of that."""
        rows = ((*key, sum(history.days.values(), Counts())) for key, history in sorted(self._histories.items()))
        return [row for row in rows if row[2].judged]

    def problem(self, model: str, version: str) -> str:
        """Why its answers are held to be worse than in its first days; empty where they are not."""
        history = self._histories.get((model, version))
        if history is None or not history.days:
            return ""
        last = [day for day in sorted(history.days) if day not in history.first][-LAST_DAYS:]
        first, now = sum(history.first.values(), Counts()), sum((history.days[day] for day in last), Counts())
        if not has_fallen(first, now):
            return ""
        shares = (now.correct / now.judged, first.correct / first.judged)
        return f"{shares[0]:.1%} of its answers are right over {len(last)} days, {shares[1]:.1%} were at first"

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Model, version, and why its answers are held to be worse than at first, of each of which they are."""
        for model, version in self._histories:
            if problem := self.problem(model, version):
                yield model, version, problem

    # -- keeping ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {
                "model": model,
                "version": version,
                "golden": [asdict(result) for result in history.golden],
                "days": {day: [counts.correct, counts.wrong] for day, counts in history.days.items()},
                "first": {day: [counts.correct, counts.wrong] for day, counts in history.first.items()},
            }
            for (model, version), history in self._histories.items()
        ]
        return {"versions": rows}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Quality:
        """As it was written. KeyError, TypeError or ValueError for what nobody wrote so."""
        quality = cls()
        for row in document["versions"]:
            history = quality._history(str(row["model"]), str(row["version"]))
            history.golden.extend(Golden(**result) for result in row["golden"])
            history.days = {str(day): _counts(pair) for day, pair in row["days"].items()}
            history.first = {day: history.days.get(day) or _counts(pair) for day, pair in row["first"].items()}
        return quality


def has_fallen(first: Counts, now: Counts) -> bool:
    """Whether the share of right answers is lower by more than the margin, and by more than luck: the two-proportion
    z test with a pooled share."""
    if min(first.judged, now.judged) < LEAST_JUDGED:
        return False
    lower = first.correct / first.judged - now.correct / now.judged
    pooled = (first.correct + now.correct) / (first.judged + now.judged)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / first.judged + 1 / now.judged))
    return lower > MARGIN and lower > _SURE * deviation


def _counts(pair: Any) -> Counts:
    correct, wrong = pair
    if not all(type(count) is int and count >= 0 for count in (correct, wrong)):
        raise ValueError("counts are whole numbers")
    return Counts(correct, wrong)
