"""While a request is answered the children stand still; where requests never end they get a little time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.infer.right_of_way import RIGHT_OF_WAY, RightOfWay

LOOP = "while True: pass"


def cpu_ns(child: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{child.pid}/schedstat").read_text().split()[0])


def runs(child: subprocess.Popen[bytes]) -> bool:
    """Whether it gets any further. A stopped one may take a moment to stand."""
    time.sleep(0.05)
    before = cpu_ns(child)
    end = time.monotonic() + (20 if state(child) != "T" else 0.2)
    while cpu_ns(child) == before:
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def goes_on(way: RightOfWay, child: subprocess.Popen[bytes]) -> bool:
    """Whether it runs before long, once who waits for it has looked."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        way.breathe()
        if runs(child):
            return True
    return False


def state(child: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def way() -> RightOfWay:
    return RightOfWay()


@pytest.fixture
def child(way: RightOfWay) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", LOOP]) as made:
        way.add(made)
        yield made
        way.take_out(made)
        made.kill()


def test_it_stands_still_while_a_request_is_answered(way: RightOfWay, child: subprocess.Popen[bytes]) -> None:
    assert runs(child)
    way.hold()
    assert not runs(child)
    way.let_go()
    assert goes_on(way, child)


def test_it_stands_still_between_requests_that_come_one_after_another(
    way: RightOfWay, child: subprocess.Popen[bytes]
) -> None:
    for _ in range(40):
        way.hold()
        time.sleep(0.01)
        way.let_go()
        time.sleep(0.002)
    assert state(child) == "T"
    assert goes_on(way, child)


def test_where_it_never_gets_quiet_it_goes_on_between_requests_for_some_of_the_time(
    way: RightOfWay, child: subprocess.Popen[bytes]
) -> None:
    """Who waits for it looks in now and then; it gets a share, and none of it while a request is answered."""
    during = between = 0
    looked, end = 0.0, time.monotonic() + 20.0
    while between < 0.05e9 and time.monotonic() < end:
        if time.monotonic() - looked > 0.05:
            looked = time.monotonic()
            way.breathe()
        way.hold()
        while state(child) != "T":
            time.sleep(0.0005)
        before = cpu_ns(child)
        time.sleep(0.005)
        during += cpu_ns(child) - before
        way.let_go()
        before = cpu_ns(child)
        time.sleep(0.005)
        between += cpu_ns(child) - before
    assert between >= 0.05e9
    assert during == 0


def test_requests_that_take_little_time_hold_it_up_no_longer_than_they_last(
    way: RightOfWay, child: subprocess.Popen[bytes]
) -> None:
    for _ in range(40):
        way.hold()
        way.let_go()
        time.sleep(0.01)
    assert runs(child)


def test_before_requests_are_known_they_count_as_many(way: RightOfWay, child: subprocess.Popen[bytes]) -> None:
    way.hold()
    way.let_go()
    assert not runs(child), "none has been seen to take little of the time"
    assert goes_on(way, child)


def test_one_that_starts_while_others_are_held_is_held_too(way: RightOfWay, child: subprocess.Popen[bytes]) -> None:
    way.hold()
    with subprocess.Popen([sys.executable, "-c", LOOP]) as later:
        way.add(later)
        assert not runs(later)
        way.let_go()
        assert goes_on(way, later)
        way.take_out(later)
        later.kill()
    assert runs(child)


def test_one_that_has_nothing_to_do_does_not_run_because_requests_end(
    way: RightOfWay, child: subprocess.Popen[bytes]
) -> None:
    way.rest(child)
    way.hold()
    way.let_go()
    time.sleep(0.1)
    way.breathe()
    assert not runs(child)
    way.hold()
    way.run(child)
    assert not runs(child)
    way.let_go()
    assert goes_on(way, child)


def test_requests_that_never_end_leave_it_a_little_time(way: RightOfWay, child: subprocess.Popen[bytes]) -> None:
    way.hold()
    assert not runs(child)
    before, end = cpu_ns(child), time.monotonic() + 20
    while cpu_ns(child) == before and time.monotonic() < end:
        way.breathe()
    assert cpu_ns(child) > before
    assert not runs(child), "only a little"


def test_nobody_is_told_of_a_process_that_is_gone(way: RightOfWay) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        way.add(gone)
        way.take_out(gone)
        gone.wait()
        way.hold()
        way.run(gone)
        way.rest(gone)
        way.let_go()
        way.breathe()


def test_requests_matter_from_the_first_child_to_the_last(way: RightOfWay) -> None:
    told: list[bool] = []
    way.watch = told.append
    with subprocess.Popen([sys.executable, "-c", LOOP]) as one, subprocess.Popen([sys.executable, "-c", LOOP]) as two:
        for made in (one, two):
            way.add(made)
        way.take_out(one)
        way.take_out(one)
        assert told == [True]
        way.hold()
        way.take_out(two)
        assert told == [True, False]
        for made in (one, two):
            made.kill()
    with subprocess.Popen([sys.executable, "-c", LOOP]) as later:
        way.add(later)
        assert runs(later), "what was held for others is not held for it"
        way.take_out(later)
        later.kill()


def test_a_real_child_starts_answers_and_ends_though_requests_never_end() -> None:
    asking = threading.Event()

    def ask() -> None:
        while not asking.wait(0.001):
            RIGHT_OF_WAY.hold()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        with ChildProcess({"model": None, "golden": None}, ChildLimits(memory_mb=512, start_s=2.0)) as child:
            child.greet()
            with pytest.raises(ChildError) as refused:
                child.call("no such thing", 10.0)
            assert refused.value.kind in ("refused", "crashed")
    finally:
        asking.set()
        thread.join()
        RIGHT_OF_WAY.let_go()


def test_what_a_request_waits_for_is_not_held_up_by_it() -> None:
    """A runtime is tried in a child before its first use: the request that asks for it holds all the others."""
    RIGHT_OF_WAY.hold()
    try:
        with ChildProcess({"model": None, "golden": None}, ChildLimits(memory_mb=512), urgent=True) as child:
            child.greet()
            assert os.sched_getscheduler(child.pid) == os.sched_getscheduler(0)
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == os.getpriority(os.PRIO_PROCESS, 0)
            RIGHT_OF_WAY.let_go()
            RIGHT_OF_WAY.hold()
            assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    finally:
        RIGHT_OF_WAY.let_go()
