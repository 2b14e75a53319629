"""Which requests run together, and when: the state machine alone, with a clock of its own."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.infer.batching import FOREVER, USUAL, Expire, Member, Pace, Queue, Run, level_of
from agent.infer.gains import JOINING_S, Gain, decide, sizes

#: A run of one row takes 2 ms, one of 16 rows 4 ms.
TIMES = ((1, 0.002), (4, 0.0025), (16, 0.004))
PACE = Pace(size=8, delay_s=0.001, times=TIMES)


class Session:
    """A session's requests on a simulated clock. ``log``: the tickets of each run, in the order in which they began."""

    def __init__(self, pace=PACE):
        self.queue, self.now = Queue(pace), 100.0
        self.running, self.log, self.expired, self.tickets = {}, [], [], 0

    def ask(self, *, rows=1, kind="a", size=0, within=FOREVER, level=USUAL, decide=True):
        self.tickets += 1
        self.queue.add(Member(self.tickets, kind, rows, size, self.now + within, level), self.now)
        if decide:
            self.decide()
        return self.tickets

    def decide(self):
        for action in self.queue.decide(self.now):
            if isinstance(action, Run):
                self.running[action.run] = action
                self.log.append(action.tickets)
            else:
                self.expired.append(action.ticket)

    def wait(self, seconds):
        end = self.now + seconds
        while self.queue.wake_at <= end:
            self.now = max(self.now, self.queue.wake_at)
            self.decide()
        self.now = end

    def finish(self, seconds=0.002, *, failed=False, shortage=False):
        run = next(iter(self.running))
        del self.running[run]
        if failed:
            self.queue.failed(run, self.now, shortage=shortage)
        else:
            self.queue.finished(run, seconds, self.now)
        self.decide()

    def crowd(self, count=8):
        """So many were here at once lately, one soon after the other."""
        for _ in range(40 // count):
            for _ in range(count):
                self.now += 0.0001
                self.ask(decide=False)
            self.decide()
            while self.running:
                self.finish()
        self.log.clear()


# -- when -------------------------------------------------------------------------------------------------------------


def test_a_lone_client_never_waits():
    session = Session()
    for count in range(1, 200):
        session.ask()
        assert len(session.log) == count
        session.finish()
        session.wait(0.0001)  # it asks again at once: the next request is its own, and would never come to join it


def test_what_came_while_a_run_went_on_runs_together():
    session = Session()
    session.ask()
    for _ in range(5):
        session.ask()
    assert session.log == [(1,)]
    session.finish()
    assert session.log == [(1,), (2, 3, 4, 5, 6)]


def test_in_a_crowd_it_waits_for_others_and_no_longer_than_it_may():
    session = Session()
    session.crowd()
    session.ask()
    session.wait(0.0003)
    session.ask()
    assert session.log == []
    session.wait(0.002)
    assert len(session.log) == 1
    assert len(session.log[0]) == 2


def test_another_lane_is_for_what_is_full_or_has_waited():
    session = Session(Pace(4, 0.001, lanes=2, times=TIMES))
    session.ask()
    session.ask()
    assert session.log == [(1,)]
    for _ in range(3):
        session.ask()
    assert session.log == [(1,), (2, 3, 4, 5)]
    session.finish()
    session.ask()
    assert len(session.log) == 2
    session.wait(0.001)
    assert session.log[2:] == [(6,)]


def test_it_does_not_wait_once_all_are_here_or_it_is_full():
    session = Session()
    session.crowd(3)
    for _ in range(3):
        assert session.log == []
        session.ask()
    assert len(session.log[0]) == 3
    session = Session()
    session.crowd(20)
    for _ in range(8):
        assert session.log == []
        session.ask()
    assert len(session.log[0]) == 8


def test_it_does_not_wait_where_others_come_too_seldom_to_save_as_much():
    session = Session()
    session.crowd(3)
    for _ in range(40):
        session.wait(0.005)  # a run takes 2 ms
        session.ask()
        if session.running:
            session.finish()
    assert [len(tickets) for tickets in session.log[-20:]] == [1] * 20


def test_a_batch_never_waits_past_the_deadline_of_a_member_less_its_run():
    session = Session(Pace(8, 1.0, times=TIMES))
    session.crowd()
    begun = session.now
    session.ask(within=0.003)
    while not session.log:
        assert session.queue.wake_at < FOREVER
        session.wait(session.queue.wake_at - session.now)
    assert session.now + 0.002 <= begun + 0.003
    assert session.expired == []


def test_whose_time_is_over_is_taken_out_before_the_run():
    session = Session()
    session.ask()
    late, early = session.ask(within=0.5), session.ask()
    session.wait(1.0)
    assert session.expired == [late]
    session.finish()
    assert session.log[-1] == (early,)


def test_who_has_gone_is_not_run():
    session = Session()
    session.ask()
    gone, here = session.ask(), session.ask()
    assert session.queue.withdraw(gone)
    session.finish()
    assert session.log[-1] == (here,)
    assert not session.queue.withdraw(here)


# -- who --------------------------------------------------------------------------------------------------------------


def test_only_one_kind_runs_together_and_none_is_kept_waiting_for_the_other():
    session = Session()
    session.ask()
    first = [session.ask(kind="a"), session.ask(kind="b"), session.ask(kind="a"), session.ask(kind="b")]
    session.finish()
    session.finish()
    assert session.log[1:] == [(first[0], first[2]), (first[1], first[3])]


def test_rows_and_bytes_are_bounded():
    session = Session(Pace(8, 0.001, most_bytes=100, times=TIMES))
    session.ask()
    rows = [session.ask(rows=3), session.ask(rows=3), session.ask(rows=3)]
    large = [session.ask(size=60), session.ask(size=60), session.ask(rows=20), session.ask()]
    for _ in range(6):
        session.finish()
    assert session.log[1:] == [(rows[0], rows[1]), (rows[2], large[0]), (large[1],), (large[2],), (large[3],)]


def test_the_urgent_go_first_and_who_waited_for_long_before_them():
    session = Session(Pace(1, 0.0))
    session.ask()
    usual, low, urgent = session.ask(), session.ask(level=level_of(200)), session.ask(level=level_of(1))
    for _ in range(3):
        session.finish()
    assert session.log[1:] == [(urgent,), (usual,), (low,)]
    session.ask(level=level_of(200))
    session.wait(0.6)
    session.ask(level=level_of(1))
    session.finish()
    session.finish()
    assert session.log[-2:] == [(5,), (6,)]


def test_levels():
    assert [level_of(value) for value in (1, 2, 0, None, 1.5, "1")] == [1, 2, USUAL, USUAL, USUAL, USUAL]


# -- when it fails ----------------------------------------------------------------------------------------------------


def test_after_a_batch_that_failed_requests_run_one_by_one_for_a_while():
    session = Session()
    session.ask()
    for _ in range(3):
        session.ask()
    session.finish()
    session.finish(failed=True)
    session.ask()
    session.ask()
    session.ask()
    session.finish()
    assert session.log[-2:] == [(5,), (6,)]
    session.finish()
    session.finish()
    session.wait(2.0)
    for _ in range(3):
        session.ask()
    session.finish()
    assert session.log[-1] == (9, 10)


def test_a_batch_that_had_not_memory_enough_makes_the_next_ones_smaller():
    session = Session()
    session.ask()
    for _ in range(8):
        session.ask()
    session.finish()
    session.finish(failed=True, shortage=True)
    session.wait(2.0)
    for _ in range(9):
        session.ask()
    session.finish()
    assert len(session.log[-1]) == 4


# -- the gain ---------------------------------------------------------------------------------------------------------


def test_the_best_size_that_was_measured_is_used():
    gain = Gain(((1, 1e-3), (2, 1.2e-3), (4, 1.6e-3), (8, 2.8e-3), (16, 9e-3)))
    assert decide(gain, 16, 0.001).size == 8
    assert decide(gain, 4, 0.001).size == 4
    assert decide(gain, 1, 0.001).size == 1


def test_where_a_batch_does_not_pay_it_is_off_and_says_so():
    slow = Gain(((1, 1e-3), (2, 2e-3), (4, 4e-3)))
    assert decide(slow, 4, 0.001).size == 1
    assert "does not pay: 1000 us a row" in decide(slow, 4, 0.001).reason
    tiny = Gain(((1, JOINING_S / 2), (16, JOINING_S / 2)))  # a sixteenth of the time, and still not worth the joining
    assert decide(tiny, 16, 0.001).size == 1
    assert decide(Gain(note="its answers differ"), 16, 0.001).reason == "its answers differ"


def test_sizes_and_times_between_them():
    assert sizes(16) == (1, 2, 4, 8, 16)
    assert sizes(12) == (1, 2, 4, 8, 12)
    assert [round(PACE.run_s(rows) * 1e6) for rows in (1, 2, 4, 10, 16, 32)] == [2000, 2167, 2500, 3250, 4000, 8000]
    assert Pace(4, 0.0).run_s(3) == 0.0


def test_a_gain_survives_the_catalog():
    gain = Gain(((1, 0.001), (2, 0.0015)), 64, "")
    assert Gain.from_json(gain.to_json()) == gain


# -- whatever happens -------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Everybody is answered once, within bounds, and nobody waits for nothing."""

    @initialize(
        size=st.integers(1, 6),
        delay_ms=st.integers(0, 20),
        lanes=st.integers(1, 3),
        most=st.sampled_from([50, 1 << 40]),
    )
    def begin(self, size, delay_ms, lanes, most):
        self.pace = Pace(size, delay_ms / 1000, lanes, most, TIMES)
        self.queue = Queue(self.pace)
        self.now, self.tickets = 0.0, 0
        self.waiting, self.running, self.since = {}, {}, {}

    def decide(self):
        free = len(self.running) < self.pace.lanes
        for action in self.queue.decide(self.now):
            if isinstance(action, Expire):
                assert self.waiting.pop(action.ticket).deadline <= self.now
                continue
            members = [self.waiting.pop(ticket) for ticket in action.tickets]
            assert free
            assert len({member.kind for member in members}) == 1
            assert all(member.deadline > self.now for member in members)
            assert sum(member.rows for member in members) == action.rows
            if len(members) > 1:
                assert action.rows <= self.pace.size
                assert sum(member.size for member in members) <= self.pace.most_bytes
            self.running[action.run] = members
            assert len(self.running) <= self.pace.lanes

    @rule(
        rows=st.integers(1, 8), kind=st.sampled_from("ab"), size=st.integers(0, 60),
        level=st.sampled_from([1, USUAL, 200]), within=st.one_of(st.just(FOREVER), st.floats(0.001, 0.1)),
    )  # fmt: skip
    def ask(self, rows, kind, size, level, within):
        self.tickets += 1
        self.waiting[self.tickets] = Member(self.tickets, kind, rows, size, self.now + within, level)
        self.since[self.tickets] = self.now
        self.queue.add(self.waiting[self.tickets], self.now)
        self.decide()

    @rule(milliseconds=st.floats(0.01, 30))
    def wait(self, milliseconds):
        end = self.now + milliseconds / 1000
        while self.queue.wake_at <= end:
            before = self.queue.wake_at
            self.now = max(self.now, before)
            self.decide()
            assert self.queue.wake_at > before or self.queue.wake_at > self.now, "asked again at once, for nothing"
        self.now = end

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["well", "well", "failed", "shortage"]))
    def finish(self, data, outcome):
        run = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[run]
        if outcome == "well":
            self.queue.finished(run, 0.002, self.now)
        else:
            self.queue.failed(run, self.now, shortage=outcome == "shortage")
        self.decide()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        assert self.queue.withdraw(ticket)
        self.decide()

    @invariant()
    def nobody_waits_for_nothing(self):
        if not hasattr(self, "queue"):
            return
        assert self.queue.here == len(self.waiting) + sum(map(len, self.running.values()))
        if self.waiting and len(self.running) < self.pace.lanes:
            eldest = min(self.since[ticket] for ticket in self.waiting)
            assert self.now <= eldest + self.pace.delay_s + 1e-9
            assert self.queue.wake_at <= eldest + self.pace.delay_s + 1e-9
        for member in self.waiting.values():
            assert member.deadline > self.now - 1e-9
            assert self.queue.wake_at <= member.deadline

    def teardown(self):
        """When nothing new comes, everybody is answered."""
        if not hasattr(self, "queue"):
            return
        for _ in range(1000):
            if not self.running and not self.waiting:
                return
            if self.running:
                run = next(iter(self.running))
                del self.running[run]
                self.queue.finished(run, 0.002, self.now)
            else:
                self.now = max(self.now, self.queue.wake_at)
            self.decide()
        raise AssertionError("somebody waits for ever")


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestWhateverHappens = Machine.TestCase
