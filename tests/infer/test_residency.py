"""Which models are in memory: the state machine alone, on a simulated device with a simulated clock."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.infer import tiers
from agent.infer.eviction import Worth, choose
from agent.infer.tiers import FOREVER, Item
from tests.infer.device import Device, item


def device(budget=100, lanes=1, keep_s=FOREVER, **items):
    made = Device(budget, lanes, keep_s)
    made.install(**items)
    return made


def hot(made, *names):
    """Bring these in, each used once."""
    for name in names:
        made.ask(name)
        made.settle()
        made.pass_time(10)


def tiers_of(made):
    return {name: made.machine.tier(name) for name in made.items}


# -- one at a time ----------------------------------------------------------------------------------------------------


def test_the_first_request_loads_and_all_who_ask_meanwhile_share_it():
    made = device(a=item())
    for _ in range(5):
        made.ask("a")
    assert made.log == [tiers.Load("a", held=False, keep=False)]
    made.loaded()
    assert len(made.running) == 5
    made.ask("a")
    assert len(made.running) == 6
    assert made.loads == 1


def test_what_shares_its_plaintext_becomes_warm_and_comes_back_without_reading():
    big = item(10, plaintext=40, blob="A", shares=True)
    made = device(100, a=big, b=item(60, blob="B"))
    hot(made, "a", "b")
    assert tiers_of(made) == {"a": "warm", "b": "hot"}
    hot(made, "a")
    assert made.log[-2:] == [tiers.Load("a", held=True, keep=True), tiers.Grant(3, "a")]


def test_a_plaintext_goes_after_the_session_that_is_made_of_it():
    made = device(100, a=item(10, plaintext=50, blob="A", shares=True), b=item(90))
    hot(made, "a")
    made.ask("b")
    assert made.log[-1] == tiers.Demote("a")
    made.closed()
    assert made.log[-1] == tiers.Evict("A")
    assert not made.loading
    made.dropped()
    assert made.log[-1] == tiers.Load("b", held=False, keep=False)


def test_a_spare_plaintext_goes_before_any_session():
    made = device(100, a=item(30, plaintext=30, blob="A"), b=item(40))
    hot(made, "a", "b")
    assert tiers_of(made) == {"a": "hot", "b": "hot"}
    assert made.plaintexts == {"A": 30}
    made.items["c"] = item(30)
    made.install(**made.items)
    hot(made, "c")
    assert made.plaintexts == {}
    assert tiers_of(made) == {"a": "hot", "b": "hot", "c": "hot"}


def test_two_forms_of_one_file_share_its_plaintext():
    quick = item(5, plaintext=40, blob="A", shares=True)
    steady = item(30, plaintext=40, blob="A", shares=True)
    made = device(100, quick=quick, steady=steady)
    hot(made, "quick", "steady")
    assert made.used == 75
    made.feed(tiers.Retire("quick"))
    made.settle()
    assert made.used == 70
    assert tiers_of(made)["steady"] == "hot"


def test_a_load_that_fails_refuses_all_who_wait_and_the_next_one_tries_again():
    made = device(a=item(10, plaintext=5, blob="A"))
    first = [made.ask("a") for _ in range(3)]
    made.load_failed()
    assert made.refused == [(ticket, "load") for ticket in first]
    assert made.used == 0
    made.ask("a")
    made.settle()
    assert made.loads == 2


def test_a_load_that_fails_for_want_of_memory_gets_more_room_and_one_more_try():
    made = device(100, a=item(60), b=item(40))
    hot(made, "b")
    ticket = made.ask("a")
    made.load_failed(shortage=True)
    assert not made.refused
    assert made.closing == {"b"}  # it would have fitted beside it
    made.closed()
    made.load_failed(shortage=True)
    assert made.refused == [(ticket, "load")]


def test_what_is_not_installed_is_refused_and_what_is_removed_goes_when_it_is_idle():
    made = device(a=item(), b=item())
    made.ask("c")
    assert made.refused == [(1, "gone")]
    made.ask("a")
    made.loaded()
    made.install(b=made.items["b"])
    assert not made.closing
    made.finish()
    assert made.closing == {"a"}
    late = made.ask("b")
    made.install()
    assert (late, "gone") in made.refused
    made.loaded()
    made.settle()
    assert made.used == 0


# -- room -------------------------------------------------------------------------------------------------------------


def test_two_that_cannot_both_fit_are_served_in_turn_and_nobody_fails():
    made = device(100, a=item(80), b=item(80))
    for turn in range(8):
        made.ask("ab"[turn % 2])
    made.settle()
    assert not made.refused
    assert [name for _, name in made.granted] == ["a"] * 4 + ["b"] * 4
    assert made.loads == 2


def test_a_busy_session_is_not_closed_but_gets_nobody_new_once_another_waits():
    made = device(100, a=item(80), b=item(80))
    made.ask("a")
    made.loaded()
    made.pass_time(10)
    waits = made.ask("b")
    late = made.ask("a")
    assert not made.closing
    assert made.waiting == {waits: "b", late: "a"}
    made.finish()
    made.settle()
    assert [name for _, name in made.granted] == ["a", "b", "a"]


def test_when_who_waited_gives_up_the_others_go_on_as_if_nothing_had_been():
    made = device(100, a=item(80), b=item(80))
    made.ask("a")
    made.loaded()
    waits, late = made.ask("b"), made.ask("a")
    made.withdraw(waits)
    assert (late, "a") in made.running
    assert not made.closing


def test_under_ceaseless_requests_for_one_model_another_is_served_all_the_same():
    made = device(100, a=item(80), b=item(80))
    made.ask("a")
    made.loaded()
    ticket = None
    for round_ in range(2000):
        made.ask("a")  # the next one comes before the last one ends: it is never idle
        if made.running:
            made.finish()
        if round_ == 50:
            ticket = made.ask("b")
        made.pass_time(0.002)
        while made.closing or made.loading:
            made.closed() if made.closing else made.loaded()
    assert ticket not in made.waiting
    assert not made.refused


def test_a_model_larger_than_the_budget_is_let_in_alone_and_leaves_for_others():
    made = device(100, a=item(30), huge=item(500))
    made.ask("a")
    made.loaded()
    made.ask("huge")
    assert not made.loading
    made.finish()
    made.closed()
    assert "huge" in made.loading
    made.loaded()
    made.feed(tiers.Tick())
    assert tiers_of(made)["huge"] == "hot"
    made.ask("a")
    made.settle()
    assert tiers_of(made) == {"a": "hot", "huge": "cold"}


def test_only_pinned_models_can_keep_another_out_and_then_it_is_told():
    made = device(100, a=item(60), b=item(60), c=item(30))
    made.pin("a")
    hot(made, "a")
    ticket = made.ask("b")
    assert made.refused == [(ticket, "room")]
    hot(made, "c")
    assert tiers_of(made) == {"a": "hot", "b": "cold", "c": "hot"}
    made.pin("a", pinned=False)
    hot(made, "b")
    assert tiers_of(made)["b"] == "hot"


def test_a_plaintext_that_two_sessions_are_made_of_goes_after_both():
    both = {name: item(10, plaintext=30, blob="same", shares=True) for name in ("one", "other")}
    made = device(100, **both, large=item(100, plaintext=0))
    hot(made, "one")
    hot(made, "other")
    hot(made, "large")
    assert tiers_of(made) == {"one": "cold", "other": "cold", "large": "hot"}


def test_small_ones_behind_a_large_one_use_only_what_it_does_not_need():
    made = device(100, lanes=2, large=item(90), busy=item(50), small=item(10, load_s=0.001, read_s=0))
    made.ask("busy")
    made.loaded()
    made.pass_time(1)
    made.ask("large")
    made.ask("small")  # 40 are free, the large one will need all but 10
    assert made.sessions.keys() == {"busy", "small"}
    made.loaded("small")
    made.finish()
    made.settle()
    assert tiers_of(made) == {"large": "hot", "busy": "cold", "small": "hot"}


def test_a_short_load_overtakes_a_long_one_but_not_for_ever():
    made = device(100, a=item(10, load_s=0.1), b=item(10, load_s=0.1), c=item(10, load_s=0.001))
    made.ask("a")
    made.ask("b")
    made.pass_time(0.05)
    made.ask("c")
    made.loaded()
    assert list(made.loading) == ["c"]
    other = device(100, a=item(10, load_s=0.1), b=item(10, load_s=0.1), c=item(10, load_s=0.001))
    other.ask("a")
    other.ask("b")
    other.pass_time(0.6)
    other.ask("c")
    other.loaded()
    assert list(other.loading) == ["b"]


def test_one_lane_stays_free_of_slow_loads():
    slow = {name: item(10, load_s=0.2) for name in "abc"}
    made = device(100, lanes=2, **slow, quick=item(10, load_s=0.002, read_s=0.001))
    for name in ("a", "b", "c", "quick"):
        made.ask(name)
        made.pass_time(2)
    assert list(made.loading) == ["a", "quick"]


def test_models_that_keep_evicting_each_other_get_some_work_done_in_between():
    made = device(100, a=item(80, load_s=0.05), b=item(80, load_s=0.05))
    served = {"a": 0, "b": 0}
    for name in "ab":
        made.ask(name)
    end = 20.0
    while made.now < end:
        made.pass_time(0.002)
        if made.closing:
            made.closed()
        elif made.loading:
            made.pass_time(0.05)
            made.loaded()
        for ticket, name in list(made.running):  # each app asks again as soon as it was answered
            made.finish(ticket)
            served[name] += 1
            made.ask(name)
    assert min(served.values()) > 0.7 * max(served.values())
    assert made.loads < sum(served.values()) / 10


# -- budget, pressure, time -------------------------------------------------------------------------------------------


def test_a_smaller_budget_evicts_what_is_idle_and_lets_the_busy_run_dry():
    made = device(100, **{name: item(30) for name in "abc"})
    hot(made, "a", "b")
    made.ask("c")
    made.loaded()
    made.resize(40)
    assert made.closing == {"a", "b"}
    made.settle()
    assert made.used == 30
    made.ask("c")
    made.resize(20)  # the last one stays: it would only come back
    made.settle()
    assert tiers_of(made)["c"] == "hot"


def test_pressure_takes_what_is_asked_for_and_no_more():
    made = device(100, **{name: item(20) for name in "abc"})
    hot(made, "a", "b", "c")
    made.ask("b")
    made.feed(tiers.Pressure(30))
    assert made.closing == {"a", "c"}


def test_what_is_unused_for_too_long_goes_for_good_and_pinned_models_stay():
    made = device(100, keep_s=60.0, a=item(10, plaintext=20, blob="A", shares=True), b=item(10))
    made.pin("b")
    made.ask("a")
    made.ask("b")
    made.settle()
    made.pass_time(59)
    assert tiers_of(made) == {"a": "hot", "b": "hot"}
    made.pass_time(2)
    made.settle()
    assert tiers_of(made) == {"a": "cold", "b": "hot"}
    assert made.used == 10


def test_each_request_may_say_how_long_its_model_stays():
    made = device(100, a=item())
    made.ask("a")
    made.loaded()
    made.finish(keep_s=5.0)
    made.pass_time(4)
    made.ask("a")
    made.pass_time(100)  # busy all the while
    assert not made.closing
    made.finish(keep_s=0.0)
    assert made.closing == {"a"}


def test_preloads_fill_what_room_there_is_and_take_nothing_from_anybody():
    made = device(
        100,
        a=item(60),
        b=item(10, plaintext=10, blob="B", shares=True),
        c=item(60, plaintext=20, blob="C", shares=True),
        d=item(60),
    )
    hot(made, "a")
    for name in "bcd":
        made.feed(tiers.Preload(name))
    made.settle()
    assert tiers_of(made) == {"a": "hot", "b": "hot", "c": "warm", "d": "cold"}


def test_there_is_room_where_a_load_fits_twice_and_takes_nothing_from_anybody():
    steady = item(20, plaintext=10, blob="A")
    made = device(80, a=item(5, plaintext=10, blob="A", shares=True), steady=steady, b=item(26), c=item(1))
    assert not made.machine.has_room("unknown")
    hot(made, "a")
    assert made.machine.has_room("steady")  # its plaintext is there
    made.ask("c")
    assert not made.machine.has_room("steady")  # the lane is taken
    made.settle()
    assert made.machine.has_room("steady")
    hot(made, "b")
    assert made.used == 42
    assert not made.machine.has_room("steady")
    assert not made.machine.has_room("a")  # it is there


# -- the order of going -----------------------------------------------------------------------------------------------


@dataclass
class Held:
    """Something to let go of."""

    name: object
    score: float
    size: int
    used_at: float = 0.0


def going(held, short):
    return [one.name for one in choose(held, short, lambda one: one.size, lambda one: None, lambda one: 0)]


def test_the_least_worthy_go_and_none_that_is_not_needed():
    held = [Held("a", 1, 5), Held("b", 2, 50), Held("c", 3, 50)]
    assert going(held, 5) == ["a"]
    assert going(held, 50) == ["b"]  # a is not needed beside it
    assert going(held, 55) == ["a", "b"]
    assert going(held, 500) == ["a", "b", "c"]


def test_among_equals_the_least_recently_used_goes_and_what_loads_cheaper_before_that():
    made = device(100, **{name: item(30) for name in "abc"})
    hot(made, "a", "b", "c")
    made.ask("a")
    made.finish()
    made.items["d"] = item(30)
    made.install(**made.items)
    made.ask("d")
    assert made.closing == {"b"}
    cheap = device(100, a=item(30, load_s=0.001), b=item(30, load_s=0.5), c=item(60))
    hot(cheap, "b", "a")
    cheap.ask("c")
    assert cheap.closing == {"a"}


def test_what_is_no_longer_used_goes_in_the_end_however_dear_it_was():
    made = device(100, dear=item(40, load_s=1.0), **{f"m{n}": item(40, load_s=0.02) for n in range(4)})
    hot(made, *["dear"] * 3)
    for turn in range(3000):
        hot(made, f"m{turn % 4}")
        if made.machine.tier("dear") == "cold":
            break
    assert made.machine.tier("dear") == "cold"


def cost_of(order, requests=6000):
    """Seconds of loading and decrypting for a skewed workload, with that order of going."""
    draw = random.Random(3)
    sizes = [draw.choice([20, 200, 1000, 3600, 14_000]) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(300)]
    budget, spent, now = 15 * sum(sizes) // 300, 0.0, 0.0
    worth, held = Worth(), {}
    for name in draw.choices(range(300), weights, k=requests):
        now += 1
        worth.used(name)
        size, cost_s = sizes[name], 0.001 + sizes[name] * 1.2e-6
        if name not in held:
            spent += cost_s
            short = sum(sizes[key] for key in held) + size - budget
            for key in going([Held(key, held[key][0], sizes[key], held[key][1]) for key in held], short):
                worth.lost(held[key][0])
                del held[key]
        held[name] = (order(worth, name, cost_s, size, now), now)
    return spent


def test_that_order_costs_less_than_recency_alone_and_than_cheapest_first():
    ours = cost_of(lambda worth, name, cost_s, size, now: worth.score(name, cost_s, size))
    recency = cost_of(lambda worth, name, cost_s, size, now: now)
    cheapest = cost_of(lambda worth, name, cost_s, size, now: cost_s)
    assert ours < 0.95 * recency
    assert ours < 0.85 * cheapest


# -- whatever happens -------------------------------------------------------------------------------------------------

NAMES = [f"m{n}" for n in range(7)]


@st.composite
def items(draw):
    """Up to seven sessions over up to four files; all sessions of a file agree on its size."""
    sizes = [draw(st.sampled_from([0, 3, 10, 40])) for _ in range(4)]
    made = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=7, unique=True)):
        blob = draw(st.integers(0, 3))
        made[name] = Item(
            f"blob{blob}",
            draw(st.sampled_from([1, 5, 20, 50, 90, 130])),
            sizes[blob],
            sizes[blob] > 0 and draw(st.booleans()),
            draw(st.sampled_from([0.0, 0.002, 0.05, 0.3])),
            draw(st.sampled_from([0.0, 0.01, 0.1])),
        )
    return made


class Whatever(RuleBasedStateMachine):
    """Every event in any order. The device checks each action as it comes; at the end all waiting must end."""

    @initialize(
        budget=st.integers(30, 200), lanes=st.integers(1, 3), keep=st.sampled_from([FOREVER, 0.5, 30.0]), it=items()
    )
    def start(self, budget, lanes, keep, it):
        self.device = Device(budget, lanes, keep)
        self.sizes = {known.blob: known.plaintext for known in it.values()}
        self.device.install(**it)

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 3))
    def ask(self, name, count):
        for _ in range(count):
            self.device.ask(name)

    @precondition(lambda self: self.device.running)
    @rule(data=st.data(), keep=st.sampled_from([None, None, 0.0, 1.0]))
    def finish(self, data, keep):
        ticket, _ = data.draw(st.sampled_from(self.device.running))
        self.device.finish(ticket, keep)

    @precondition(lambda self: self.device.waiting)
    @rule(data=st.data())
    def give_up(self, data):
        self.device.withdraw(data.draw(st.sampled_from(sorted(self.device.waiting))))

    @precondition(lambda self: self.device.loading)
    @rule(data=st.data())
    def load_ends(self, data):
        self.device.loaded(data.draw(st.sampled_from(sorted(self.device.loading))))

    @precondition(lambda self: self.device.loading)
    @rule(data=st.data(), read=st.booleans(), shortage=st.booleans())
    def load_fails(self, data, read, shortage):
        self.device.load_failed(data.draw(st.sampled_from(sorted(self.device.loading))), read=read, shortage=shortage)

    @precondition(lambda self: self.device.warming)
    @rule(kept=st.booleans())
    def reading_ends(self, kept):
        self.device.warmed(kept=kept)

    @precondition(lambda self: self.device.closing)
    @rule(data=st.data())
    def closing_ends(self, data):
        self.device.closed(data.draw(st.sampled_from(sorted(self.device.closing))))

    @precondition(lambda self: self.device.dropping)
    @rule()
    def dropping_ends(self):
        self.device.dropped()

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name, pinned):
        if name in self.device.items:
            self.device.pin(name, pinned)

    @rule(budget=st.integers(20, 250))
    def budget(self, budget):
        self.device.resize(budget)

    @rule(size=st.integers(1, 300))
    def pressure(self, size):
        self.device.feed(tiers.Pressure(size))

    @rule(name=st.sampled_from(NAMES), cold=st.booleans())
    def retire(self, name, cold):
        self.device.feed(tiers.Retire(name, cold))

    @rule(name=st.sampled_from(NAMES))
    def preload(self, name):
        self.device.feed(tiers.Preload(name))

    @rule(seconds=st.sampled_from([0.001, 0.1, 5.0, 100.0]))
    def wait(self, seconds):
        self.device.pass_time(seconds)

    @rule(name=st.sampled_from(NAMES))
    def touch(self, name):
        free = self.device.machine.touch(name, self.device.now)
        assert not free or (name in self.device.sessions and name not in self.device.closing)

    @rule(it=items())
    def shelf(self, it):
        # A file's size is part of what it is: another size is another file.
        self.device.install(**{
            name: Item(f"{new.blob}/{new.plaintext}", new.session, new.plaintext, new.shares, new.load_s, new.read_s)
            for name, new in it.items()
        })  # fmt: skip

    @invariant()
    def who_can_be_served_is_not_left_waiting(self):
        if not hasattr(self, "device"):
            return
        made = self.device
        under_way = made.loading or made.closing or made.dropping or made.warming or made.running
        if made.waiting and not under_way:
            assert made.machine.wake_at < FOREVER, made.waiting

    def teardown(self):
        if hasattr(self, "device"):
            self.device.settle()
            assert not self.device.waiting


TestWhatever = Whatever.TestCase
TestWhatever.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_a_busy_day_with_failing_loads_serves_everybody_in_bounded_time(seed):
    """Skewed requests of eight apps on a device that holds a tenth of the models; loads and runs take their time."""
    draw = random.Random(seed)
    names = [f"m{n}" for n in range(60)]
    made = device(
        0,
        lanes=2,
        **{
            name: item(
                draw.choice([1, 5, 30]), plaintext=draw.choice([1, 20, 60]), blob=name, shares=draw.random() < 0.7,
                load_s=draw.choice([0.001, 0.01, 0.05]), read_s=draw.choice([0.001, 0.02]),
            )
            for name in names
        },
    )  # fmt: skip
    made.resize(sum(known.session + known.plaintext for known in made.items.values()) // 10)
    weights = [1 / (rank + 1) for rank in range(len(names))]
    asked: dict[int, float] = {}
    ends: list[tuple[float, str, object]] = []
    seen: set[object] = set()
    longest = 0.0
    answered = 0
    for _ in range(4000):
        while len(made.waiting) + len(made.running) < 8:
            asked[made.ask(draw.choices(names, weights)[0])] = made.now
        for kind, under_way in (("load", made.loading), ("close", made.closing), ("drop", made.dropping)):
            for key in under_way:
                if (kind, key) not in seen:
                    seen.add((kind, key))
                    known = made.items.get(key)
                    ends.append((made.now + (known.load_s + known.read_s if kind == "load" else 0.001), kind, key))
        for ticket, _ in made.running:
            if ("run", ticket) not in seen:
                seen.add(("run", ticket))
                longest = max(longest, made.now - asked[ticket])
                ends.append((made.now + 0.005, "run", ticket))
        ends.sort(key=str)
        ends.sort(key=lambda end: end[0])
        if not ends or made.machine.wake_at < ends[0][0]:
            made.pass_time(made.machine.wake_at - made.now)
            continue
        moment, kind, key = ends.pop(0)
        seen.discard((kind, key))
        made.pass_time(max(0.0, moment - made.now))
        if kind == "load":
            made.load_failed(key) if draw.random() < 0.05 else made.loaded(key)
        elif kind == "close":
            made.closed(key)
        elif kind == "drop":
            made.dropped(key)
        else:
            made.finish(key)
            answered += 1
    assert {reason for _, reason in made.refused} <= {"load"}
    assert answered > 500
    assert longest < 3.0
