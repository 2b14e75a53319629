"""When freed memory goes back, with a clock and timers of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from agent.infer.returning import Returning


class World:
    """A clock that moves when told to, and fires what is due on its way."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.timers = []
        self.given = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)
        self.returning = Returning(lambda: 0.5, lambda: self.given.append(round(self.now, 3)), lambda: self.now)

    def call_later(self, delay, work):
        timer = [self.now + delay, work]
        self.timers.append(timer)
        return Timer(self.timers, timer)

    def go_on(self, seconds):
        end = self.now + seconds
        while due := sorted((timer for timer in self.timers if timer[0] <= end), key=lambda timer: timer[0]):
            self.timers.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
        self.now = end


class Timer:
    def __init__(self, timers, timer):
        self.cancel = lambda: timers.remove(timer)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_memory_goes_back_half_a_second_after_the_last_close(world):
    for _ in range(2):
        world.returning.freed()
        world.go_on(0.4)
    assert world.given == []
    world.go_on(10)
    assert world.given == [100.9]


def test_where_sessions_come_and_go_all_the_time_it_goes_back_now_and_then(world):
    for _ in range(30):
        world.returning.freed()
        world.go_on(0.1)
    assert len(world.given) == 2
    assert 1.0 <= world.given[1] - world.given[0] < 1.2


def test_much_goes_back_at_once_and_nothing_is_due_afterwards(world):
    world.returning.freed()
    world.go_on(0.1)
    world.returning.freed(much=True)
    world.go_on(10)
    assert world.given == [100.1]


def test_what_is_cancelled_is_not_given_back(world):
    world.returning.freed()
    world.returning.cancel()
    world.go_on(10)
    assert world.given == []
