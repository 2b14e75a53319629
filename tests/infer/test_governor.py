"""How far to step down, and when back: the pure machine under a simulated clock, and what looks say of each cause."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.hardware.pressure import Strain
from agent.infer.governor import CAUSES, Governor, Pace, Reading
from agent.infer.steering import CALM
from agent.infer.strain import Thresholds, judge, missing_mb

PACE = Pace(down_s=10.0, up_s=60.0)
DEEP = dict.fromkeys(CAUSES, 3)
HOT, COOL, WARM = Reading("pressing", "heat: hot"), Reading("clear"), Reading("between")


class Day:
    """A governor that is looked at every five seconds."""

    def __init__(self, pace=PACE, deepest=DEEP, every=5.0):
        self.governor, self.deepest, self.every, self.now = Governor(pace), deepest, every, 0.0
        self.history = []

    def go(self, seconds, reading, cause="heat"):
        end = self.now + seconds
        while self.now < end:
            self.governor.sample({cause: reading}, self.deepest, self.now)
            self.history.append((self.now, self.governor.levels[cause].steps))
            self.now += self.every
        return self

    @property
    def level(self):
        return self.history[-1][1]

    @property
    def changes(self):
        return [(now, new) for (_, old), (now, new) in zip(self.history, self.history[1:], strict=False) if old != new]


def test_a_moment_is_no_reason():
    assert Day().go(10, HOT).go(60, COOL).changes == []


def test_it_steps_down_one_by_one_while_it_is_pressed_and_back_one_by_one():
    day = Day().go(11, HOT)
    assert day.level == 1
    assert day.go(60, HOT).level == 3
    assert day.go(55, COOL).level == 3
    assert day.go(10, COOL).level == 2
    assert day.go(300, COOL).level == 0
    assert day.governor.pressure is CALM


def test_between_the_thresholds_nothing_happens():
    day = Day().go(11, HOT)
    assert day.go(3600, WARM).level == 1


def test_what_cannot_wait_goes_all_the_way_at_once():
    assert Day().go(1, Reading("urgent", "heat: off")).level == 3


def test_where_nothing_is_to_be_stepped_down_nothing_is():
    day = Day(deepest={})
    assert day.go(3600, Reading("urgent", "x")).level == 0
    assert day.governor.changes == 0


def test_what_only_the_step_keeps_bearable_does_not_swing():
    """A device that is hot at full cost and cool one step down: it would go up and down for ever."""
    day = Day()
    for _ in range(24 * 720):
        day.go(5, HOT if day.governor.levels["heat"].steps == 0 else COOL)
    downs = len([new for _, new in day.changes if new])
    assert downs < 24 * 3600 / (60 * 16) + 8  # patience grows; a plain hysteresis would swing 1,200 times


def test_patience_starts_anew_after_a_step_back_that_held():
    day = Day()
    for _ in range(4):
        day.go(15, HOT).go(70 * day.governor.levels["heat"].patience, COOL)
    assert day.governor.levels["heat"].patience > 1
    day.go(8 * 60 + 60, COOL).go(15, HOT)
    assert day.governor.levels["heat"].patience == 1


def test_memory_and_compute_are_told_apart_and_the_reason_names_each():
    governor = Governor(Pace(0, 60))
    governor.sample({"memory": Reading("pressing", "memory: 4% left"), "power": HOT}, DEEP, 0.0)
    assert (governor.pressure.memory, governor.pressure.compute) == (1, 1)
    assert governor.pressure.reason == "governor: memory: 4% left; heat: hot"


def test_the_reason_stays_the_same_until_the_level_changes():
    governor = Governor(Pace(10, 60))
    said = set()
    for moment in range(0, 20, 5):
        governor.sample({"heat": Reading("pressing", f"heat: {moment}")}, DEEP, float(moment))
        said.add(governor.pressure.reason)
    assert len(said) == 2


STATES = st.sampled_from(["clear", "between", "pressing", "urgent"])
PACES = st.builds(Pace, st.floats(0, 60), st.floats(0.5, 300))


@settings(max_examples=300, deadline=None)
@given(
    pace=PACES,
    course=st.lists(st.tuples(STATES, st.floats(0.1, 400), st.integers(0, 4)), min_size=1, max_size=120),
)
def test_whatever_comes_levels_keep_their_bounds_and_their_pace(pace, course):
    governor, now = Governor(pace), 0.0
    ups: list[float] = []
    pressed_since = cleared_since = None
    for state, wait, deepest in course:
        now += wait
        pressing = state in ("pressing", "urgent")
        pressed_since = (now if pressed_since is None else pressed_since) if pressing else None
        cleared_since = (now if cleared_since is None else cleared_since) if state == "clear" else None
        before = governor.levels["heat"].steps
        changed = governor.sample({"heat": Reading(state, state)}, {"heat": deepest}, now)
        after = governor.levels["heat"].steps
        assert changed is (before != after)
        assert 0 <= after <= max(deepest, 0)
        if after > before:
            assert pressed_since is not None
            assert state == "urgent" or (after == before + 1 and now - pressed_since >= pace.down_s - 1e-9)
        elif after < before and before <= deepest:
            assert after == before - 1
            assert cleared_since is not None
            assert now - cleared_since >= pace.up_s - 1e-9
            assert not ups or now - ups[-1] >= pace.up_s - 1e-9
            ups.append(now)
    assert governor.levels["memory"].steps == governor.levels["power"].steps == 0


@settings(max_examples=100, deadline=None)
@given(course=st.lists(st.tuples(STATES, st.integers(1, 40)), max_size=30))
def test_what_stays_away_ends_every_step_and_what_stays_takes_all(course):
    day = Day()
    for state, looks in course:
        day.go(5 * looks, Reading(state, state))
    day.go(3 * (60 * 16 + 10), COOL)
    assert day.level == 0
    day.go(60, HOT)
    assert day.level == 3


# -- what a look says -------------------------------------------------------------------------------------------------

AT = Thresholds()


def state(cause, before=None, **values):
    return judge(Strain(**values), before, AT)[cause].state


def test_a_device_that_tells_nothing_is_not_pressed():
    assert {reading.state for reading in judge(Strain(), None, AT).values()} == {"clear"}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"memory_some": 21.0}, "pressing"),
        ({"memory_some": 12.0}, "between"),
        ({"memory_some": 5.0, "memory_full": 0.0}, "clear"),
        ({"memory_full": 11.0}, "pressing"),
        ({"memory_full": 40.0}, "urgent"),
        ({"available": 0.04}, "pressing"),
        ({"available": 0.02}, "urgent"),
        ({"available": 0.08}, "between"),
        ({"available": 0.5}, "clear"),
    ],
)
def test_memory(values, wanted):
    assert state("memory", **values) == wanted


def test_a_limit_of_the_control_group_that_was_met_presses_once():
    before = Strain(events=3, available=0.5)
    assert judge(replace(before, events=4), before, AT)["memory"].state == "pressing"
    assert judge(before, before, AT)["memory"].state == "clear"
    assert judge(before, Strain(), AT)["memory"].state == "clear"  # the first look knows no before


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"throttle_c": 2.0, "hottest": "cpu 83 °C"}, "pressing"),
        ({"throttle_c": -4.0}, "pressing"),
        ({"throttle_c": 5.0}, "between"),
        ({"throttle_c": 20.0}, "clear"),
        ({"throttled": True, "throttle_c": 20.0}, "pressing"),
        ({"critical_c": 1.0, "throttle_c": -9.0}, "urgent"),
    ],
)
def test_heat(values, wanted):
    assert state("heat", **values) == wanted


@pytest.mark.parametrize(("capped", "wanted"), [(1.0, "clear"), (0.92, "between"), (0.6, "pressing")])
def test_power(capped, wanted):
    assert state("power", capped=capped) == wanted


def test_how_much_has_to_come_free():
    assert missing_mb(Strain(available=0.05, available_mb=100), AT) == pytest.approx(100)
    assert missing_mb(Strain(available=0.5, available_mb=1000), AT) == 0
    assert missing_mb(Strain(available_mb=10), AT) == 0
