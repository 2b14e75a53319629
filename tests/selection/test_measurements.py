"""A measurement holds until its key changes, and comes back from the disk as it went."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import DamagedError
from agent.selection.measurements import Measurement, estimated_joules, percentile

from .simulation import key

NUMBERS = st.none() | st.floats(0.001, 1e6)
MEASUREMENTS = st.builds(
    Measurement,
    candidate_id=st.text(min_size=1, max_size=30),
    key=st.builds(key, st.text(max_size=8), threads=st.integers(1, 64), power_mode=st.none() | st.text(max_size=8)),
    outcome=st.sampled_from(["ok", "rejected"]),
    failure=st.none() | st.sampled_from(["crash", "hang", "memory", "load", "error", "disagreement"]),
    reason=st.text(max_size=40),
    session=st.text(max_size=8),
    round_ms=st.lists(NUMBERS, max_size=6).map(tuple),
    p50_ms=NUMBERS,
    peak_mb=NUMBERS,
    agreement=st.none() | st.floats(-1, 1),
    agreement_metric=st.none() | st.sampled_from(["top1", "cosine"]),
    joules=NUMBERS,
    energy_source=st.none() | st.sampled_from(["measured", "estimated"]),
    notes=st.lists(st.text(max_size=10), max_size=2).map(tuple),
)


@given(MEASUREMENTS)
def test_it_comes_back_as_it_went(measurement: Measurement) -> None:
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "e"},
        {"runtime_version": "1.33.0"},
        {"provider": "CUDAExecutionProvider"},
        {"threads": 2},
        {"features": {"avx2": True, "avx512_vnni": True}},
        {"features": {"avx2": True, "avx512_vnni": None}},
        {"power_mode": "15W"},
        {"golden_digest": "f"},
    ],
)
def test_whatever_it_depends_on_ends_it(change: dict[str, Any]) -> None:
    measured = Measurement("int8@CPU", key())
    assert measured.holds_for(key())
    assert not measured.holds_for(key(**change))
    assert len(key().changes(key(**change))) == 1


def test_the_change_is_told_in_words() -> None:
    assert key().changes(key(runtime_version="1.33.0")) == ("runtime_version: 1.32.0 -> 1.33.0",)
    assert key().changes(key(power_mode="15W")) == ("power_mode: unknown -> 15W",)


def test_a_feature_that_becomes_readable_is_another_key() -> None:
    unknown, absent = key(features={"i8mm": None}), key(features={"i8mm": False})
    assert unknown.cpu_features == ("i8mm?",)
    assert absent.cpu_features == ()


def test_a_foreign_burst_spoils_one_round_and_an_own_tail_shows_in_all() -> None:
    calm = [[5.0] * 20 for _ in range(9)]
    burst = [*calm[:-1], [50.0] * 20]
    tail = [[5.0] * 18 + [20.0] * 2 for _ in range(9)]
    assert Measurement.from_samples("a", key(), "s", burst).p95_ms == 5.0
    assert Measurement.from_samples("a", key(), "s", tail).p95_ms == pytest.approx(20.0, rel=0.1)


def test_rounds_that_were_thrown_away_stay_in_their_place() -> None:
    measured = Measurement.from_samples("a", key(), "s", [[1.0, 3.0, 2.0], None, [4.0]])
    assert measured.round_ms == (2.0, None, 4.0)
    assert measured.rounds == 2


@pytest.mark.parametrize("rounds", [[], [None], [[0.0]], [[1.0], [float("nan")]], [[-1.0]], [[float("inf")]]])
def test_samples_that_are_no_times_are_refused(rounds: list[Any]) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        Measurement.from_samples("a", key(), "s", rounds)


def test_percentiles() -> None:
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile(list(map(float, range(101))), 0.95) == 95.0


def test_estimated_energy_is_watts_times_time() -> None:
    assert estimated_joules(6.1, 20.0) == pytest.approx(0.122)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("p50_ms", "fast", "p50_ms is not a number"),
        ("p50_ms", float("nan"), "p50_ms is not a number"),
        ("p50_ms", True, "p50_ms is not a number"),
        ("outcome", "great", "outcome is not one of"),
        ("candidate_id", 3, "candidate_id is not a text"),
        ("round_ms", 5, "round_ms and notes must be lists"),
        ("round_ms", ["x"], "round_ms is not a number"),
        ("key", None, "not an object"),
        ("speed", 1, "unknown field speed"),
    ],
)
def test_damage_is_told_by_field(field: str, value: object, said: str) -> None:
    document = {**Measurement("a", key()).to_json(), field: value}
    with pytest.raises(DamagedError, match=said):
        Measurement.from_json(document)
