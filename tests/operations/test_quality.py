"""What apps say of answers, and golden sets, by version and day: bounded, and worth a word only when it is sure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import PeerError
from agent.operations.quality import (
    LEAST_JUDGED,
    MOST_DAYS,
    MOST_IDS,
    MOST_RESULTS,
    Counts,
    Golden,
    Quality,
    has_fallen,
    judgement,
)


def judged(quality: Quality, day: int, correct: int, wrong: int, version: str = "1.0.0") -> None:
    for number in range(correct + wrong):
        assert quality.judge("m", version, f"2026-01-{day:02}", {"correct": number < correct})


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ({"correct": True}, ("", True)),
        ({"id": "r1", "correct": False}, ("r1", False)),
        ({"label": "cat", "predicted": "cat"}, ("", True)),
        ({"label": 3, "predicted": 5, "id": "x"}, ("x", False)),
        ({"label": 1, "predicted": True}, ("", False)),
        ({"label": "1", "predicted": 1}, ("", False)),
    ],
)
def test_an_app_says_whether_an_answer_was_right(said: dict[str, Any], means: tuple[str, bool]) -> None:
    assert judgement(said) == means


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({}, "'correct' is missing"),
        ({"correct": 1}, "true or false"),
        ({"correct": None}, "true or false"),
        ({"correct": True, "label": "x"}, "stand alone"),
        ({"label": "x"}, "'label' and 'predicted'"),
        ({"label": [], "predicted": "x"}, "'label' must be"),
        ({"label": "x" * 257, "predicted": "x"}, "'label' must be"),
        ({"id": 7, "correct": True}, "'id' must be"),
        ({"id": "x" * 257, "correct": True}, "'id' must be"),
        ({"correct": True, "weight": 2}, "unknown 'weight'"),
    ],
)
def test_what_it_says_must_mean_something(said: dict[str, Any], wrong: str) -> None:
    with pytest.raises(PeerError, match=wrong):
        judgement(said)


def test_an_answer_counts_once() -> None:
    quality = Quality()
    assert quality.judge("m", "1.0.0", "2026-01-01", {"id": "r1", "correct": True})
    assert not quality.judge("m", "1.0.0", "2026-01-01", {"id": "r1", "correct": False})
    assert quality.judge("m", "2.0.0", "2026-01-01", {"id": "r1", "correct": False})
    assert quality.told("m", "1.0.0")["feedback"] == {"2026-01-01": {"correct": 1, "wrong": 0}}


def test_nothing_grows_for_ever() -> None:
    quality = Quality()
    for number in range(MOST_IDS + 10):
        quality.judge("m", "1.0.0", f"{2000 + number // 200}-01-01", {"id": f"r{number}", "correct": True})
        quality.judge("m", "1.0.0", f"day-{number % 90:02}", {"correct": True})
    for _ in range(2 * MOST_RESULTS):
        quality.ran("m", "1.0.0", Golden("2026-01-01T00:00:00Z", "top1", 1.0, ok=True))
    told = quality.told("m", "1.0.0")
    assert len(told["feedback"]) == MOST_DAYS
    assert len(told["golden"]) == MOST_RESULTS
    assert quality.judge("m", "1.0.0", "x", {"id": "r0", "correct": True})  # so long ago that nobody knows


def test_worse_than_in_the_first_days() -> None:
    quality = Quality()
    for day in (1, 2, 3):
        judged(quality, day, 95, 5)
    assert quality.problem("m", "1.0.0") == ""
    for day in (4, 5, 6):
        judged(quality, day, 70, 30)
    assert quality.problem("m", "1.0.0") == "70.0% of its answers are right over 3 days, 95.0% were at first"
    assert quality.short("m", "1.0.0")["feedback"] == {"correct": 210, "wrong": 90}
    for day in (7, 8, 9):
        judged(quality, day, 95, 5)
    assert quality.problem("m", "1.0.0") == ""


def test_the_first_days_are_remembered_when_their_days_are_gone() -> None:
    quality = Quality()
    for day in (1, 2, 3):
        judged(quality, day, 100, 0)
    for day in range(4, 4 + MOST_DAYS):
        quality.judge("m", "1.0.0", f"2026-02-{day:02}", {"correct": True})
    again = Quality.from_json(json.loads(json.dumps(quality.to_json())))
    for day in (90, 91, 92):
        for number in range(100):
            again.judge("m", "1.0.0", f"2026-{day}", {"correct": number < 50})
    assert "100.0% were at first" in again.problem("m", "1.0.0")


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_a_fall_is_said_only_where_it_is_one(correct: int, wrong: int, now_correct: int, now_wrong: int) -> None:
    first, now = Counts(correct, wrong), Counts(now_correct, now_wrong)
    if not has_fallen(first, now):
        return
    assert min(first.judged, now.judged) >= LEAST_JUDGED
    assert now.correct / now.judged < first.correct / first.judged
    assert not has_fallen(now, first)
    assert has_fallen(Counts(2 * correct, 2 * wrong), Counts(2 * now_correct, 2 * now_wrong))


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=80))
def test_what_is_written_is_what_is_read(said: list[tuple[int, bool]]) -> None:
    quality = Quality()
    for day, correct in said:
        quality.judge("m", "1.0.0", f"2026-01-{day:02}", {"correct": correct})
    quality.ran("m", "2.0.0", Golden("2026-01-01T00:00:00Z", "cosine", 0.99, ok=True))
    again = Quality.from_json(json.loads(json.dumps(quality.to_json())))
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        assert again.told("m", version) == quality.told("m", version)
    again.keep([("m", "2.0.0")])
    assert again.told("m", "1.0.0")["feedback"] == {}
    assert len(again.told("m", "2.0.0")["golden"]) == 1
