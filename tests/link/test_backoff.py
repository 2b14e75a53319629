"""When a device connects, and when a whole fleet does."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.link.backoff import (
    BASE_S,
    CAP_S,
    CLOSINGS,
    STABLE_S,
    TAKEOVER_PAUSE_S,
    TAKEOVER_WINDOW_S,
    TAKEOVERS,
    Backoff,
)


def backoff(seed: int = 1) -> Backoff:
    return Backoff(random.Random(seed).uniform)


def test_the_first_attempt_is_drawn_from_the_splay() -> None:
    pauses = [backoff(seed).next_pause(60.0) for seed in range(500)]
    assert max(pauses) <= 60
    assert max(Counter(int(pause // 6) for pause in pauses).values()) < 100, "one in ten each, not a crowd"
    assert backoff().next_pause(0.0) == 0


@given(st.integers(), st.integers(1, 60), st.floats(0, 3600))
def test_pauses_grow_to_their_bounds_and_never_leave_them(seed: int, attempts: int, splay_s: float) -> None:
    subject = backoff(seed)
    subject.next_pause(splay_s)
    last = least = max(BASE_S, splay_s / 2)
    for _ in range(attempts):
        pause = subject.next_pause(splay_s)
        assert pause >= splay_s, "not twice within a splay"
        jitter = pause - splay_s / 2
        assert least - 1e-6 <= jitter <= min(max(CAP_S, 2 * splay_s), 3 * last) + 1e-6
        last = jitter


def test_neighbours_that_failed_together_drift_apart() -> None:
    neighbours = [backoff(seed) for seed in range(50)]
    for each in neighbours:
        each.next_pause(0.0)
    third = [[each.next_pause(0.0) for each in neighbours] for _ in range(3)][-1]
    assert len({round(pause, 1) for pause in third}) > 30


def test_only_a_connection_that_held_resets_the_pause() -> None:
    subject = backoff()
    for _ in range(12):
        subject.next_pause(5.0)
    subject.lost(STABLE_S - 1, 0.0)
    assert max(subject.next_pause(5.0) for _ in range(20)) > 5.0
    subject.lost(STABLE_S, 0.0)
    assert subject.next_pause(5.0) <= 5.0


def test_a_fight_over_the_session_is_an_alarm_and_a_long_pause() -> None:
    subject = backoff()
    for moment in range(TAKEOVERS - 1):
        subject.lost(1.0, moment, takeover=True)
    assert not subject.contested
    subject.lost(1.0, 10.0, takeover=True)
    assert subject.contested
    for _ in range(5):
        assert TAKEOVER_PAUSE_S[0] <= subject.next_pause(0.0) <= TAKEOVER_PAUSE_S[1]
    subject.held(TAKEOVER_WINDOW_S - 1)
    assert subject.contested
    subject.held(TAKEOVER_WINDOW_S)
    assert not subject.contested


def test_being_closed_again_and_again_soon_after_connecting_is_the_same_alarm() -> None:
    """mosquitto 2.0 does not say why."""
    subject = backoff()
    for moment in range(CLOSINGS - 1):
        subject.lost(2.0, moment * 60, closed=True)
        subject.lost(STABLE_S, moment * 60 + 30, closed=True)  # of a connection that had held
        subject.lost(2.0, moment * 60 + 40)  # cut by the network
    assert not subject.contested
    subject.lost(2.0, 200.0, closed=True)
    assert subject.contested


def test_a_takeover_now_and_then_is_none() -> None:
    subject = backoff()
    for moment in range(10):
        subject.lost(1.0, moment * TAKEOVER_WINDOW_S, takeover=True)
    assert not subject.contested, "the device itself, coming from another network"


@pytest.mark.parametrize("held_s", [1.0, 3600.0])
@pytest.mark.parametrize("outage_s", [0, 30, 45, 60, 100, 600, 3600])
def test_a_fleet_comes_back_no_faster_than_planned(outage_s: int, held_s: float) -> None:
    """2,000 devices lose their broker in one instant; each attempt before it is back fails."""
    splay_s, devices, window_s = 60.0, 2000, 6
    connected: Counter[int] = Counter()
    attempts: list[tuple[float, int]] = []
    fleet = [backoff(seed) for seed in range(devices)]
    for number, each in enumerate(fleet):
        each.next_pause(splay_s)
        each.lost(held_s, 0.0)
        heapq.heappush(attempts, (each.next_pause(splay_s), number))
    while attempts:
        moment, number = heapq.heappop(attempts)
        if moment >= outage_s:
            connected[int(moment - outage_s) // window_s] += 1
        else:
            heapq.heappush(attempts, (moment + fleet[number].next_pause(splay_s), number))
    assert sum(connected.values()) == devices
    planned = devices / splay_s * window_s
    assert max(connected.values()) <= 1.25 * planned, "the planned rate, and what chance adds to it"
