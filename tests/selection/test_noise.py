"""When are two latencies different? Never for two copies of one file; always for what a person would notice."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.selection.noise import FLOOR, compare_rounds, compare_unpaired

LATENCIES = st.lists(st.floats(0.01, 1000), min_size=12, max_size=40)


def test_drift_that_hits_both_leaves_the_ratio_alone() -> None:
    """A board that heats up and gets three times slower: unpaired medians would see nothing but the heat."""
    heat = [1 + 0.1 * index for index in range(20)]
    seen = compare_rounds([5.5 * factor for factor in heat], [5.0 * factor for factor in heat])
    assert seen is not None
    assert seen.ratio == pytest.approx(1.1)
    assert seen.slower
    assert seen.noise == FLOOR


def test_two_copies_in_a_noisy_place_are_alike_and_the_noise_is_told() -> None:
    rng = random.Random(5)
    first, second = ([5 * math.exp(rng.gauss(0, 0.1)) for _ in range(20)] for _ in range(2))
    seen = compare_rounds(first, second)
    assert seen is not None
    assert seen.tie
    assert seen.noise > 2 * FLOOR


def test_a_burst_in_a_few_rounds_decides_nothing() -> None:
    """Somebody compiled something while the second candidate ran, four rounds of sixteen."""
    first = [5.0] * 16
    second = [5.0 * (4 if index in (3, 4, 5, 11) else 1) for index in range(16)]
    seen = compare_rounds(second, first)
    assert seen is not None
    assert seen.tie


def test_bursts_that_make_the_slower_one_slower_do_not_hide_that_it_is_slower() -> None:
    first = [5.0] * 16
    second = [10.0 * (8 if index in (3, 4, 5, 11) else 1) for index in range(16)]
    seen = compare_rounds(second, first)
    assert seen is not None
    assert seen.slower


def test_one_round_tells_nothing() -> None:
    seen = compare_rounds([10.0], [5.0])
    assert seen is not None
    assert seen.tie
    assert math.isinf(seen.noise)


def test_rounds_that_only_one_ran_in_do_not_count() -> None:
    seen = compare_rounds([5.0, None, 5.0, 5.0], [5.0, 9.0, None, 5.0])
    assert seen is not None
    assert seen.rounds == 2
    assert compare_rounds([None, 1.0], [1.0, None]) is None


def test_two_microseconds_are_nobodys_concern() -> None:
    """20 µs against 21.8 µs: nine per cent, and a thirtieth of what the socket costs."""
    seen = compare_rounds([0.0218] * 20, [0.020] * 20)
    assert seen is not None
    assert seen.tie
    big = compare_rounds([21.8] * 20, [20.0] * 20)
    assert big is not None
    assert big.slower


def test_sessions_are_compared_with_a_wide_margin() -> None:
    assert compare_unpaired(5.4, 5.0).tie
    assert compare_unpaired(5.0, 5.4).tie
    assert compare_unpaired(5.6, 5.0).slower


@given(LATENCIES, LATENCIES)
def test_comparison_is_antisymmetric(first: list[float], second: list[float]) -> None:
    there, back = compare_rounds(first, second), compare_rounds(second, first)
    assert there is not None
    assert back is not None
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low == pytest.approx(1 / back.high)
    assert there.low <= there.ratio <= there.high


@given(LATENCIES, st.floats(1.2, 10))
def test_a_candidate_is_slower_than_itself_made_slower(rounds: list[float], factor: float) -> None:
    seen = compare_rounds([value * factor for value in rounds], rounds)
    assert seen is not None
    assert seen.slower == (factor - 1 > seen.noise)
    assert seen.ratio == pytest.approx(factor)


def test_the_interval_is_as_sure_as_it_says() -> None:
    """Of 2,000 intervals around the median of heavy-tailed ratios, at most about one in a hundred misses it."""
    rng = random.Random(1)
    for rounds in (12, 20, 48):
        missed = 0
        for _ in range(700):
            ratios = [math.exp(rng.gauss(0, 0.05) * (1 if rng.random() < 0.9 else 6)) for _ in range(rounds)]
            seen = compare_rounds(ratios, [1.0] * rounds)
            assert seen is not None
            missed += not seen.low <= 1 <= seen.high
        assert missed <= 14
