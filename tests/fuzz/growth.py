"""Whether time and memory grow in proportion to the input.

Time is judged twice, never against a clock on the wall: by the lines of Python executed, which is the same every time
but sees nothing of what happens inside one call; and by CPU time, the least of several runs, as the ratio between an
input and one eight times as large. In proportion is 8, the square is 64; 27 is allowed, which is 3 for each doubling.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

from tests.fuzz.target import FindingError, Target, traced_peak, without_gc

TIMES = 8
MOST_RATIO = 27.0
#: CPU seconds and lines below which a ratio says nothing.
LEAST_S = 0.004
LEAST_LINES = 1000
#: What may be held for good after a few rounds: caches that fill.
MOST_HELD = 64 << 10


def work(target: Target, data: bytes) -> None:
    """Read once; an allowed error is a way to read."""
    with contextlib.suppress(*target.allowed):
        (target.work or target.read)(data)


def lines_of(target: Target, data: bytes) -> int:
    """Lines of Python that reading takes."""
    count = 0

    def local(_frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        nonlocal count
        count += event == "line"
        return local

    before = sys.gettrace()
    sys.settrace(lambda _frame, _event, _argument: local)
    try:
        work(target, data)
    finally:
        sys.settrace(before)
    return count


def cpu_of(target: Target, data: bytes, repeats: int = 5) -> float:
    """The least CPU time of several readings, in seconds."""
    best = float("inf")
    with without_gc():
        for _ in range(repeats):
            start = time.thread_time()
            work(target, data)
            best = min(best, time.thread_time() - start)
    return best


def check_lines(target: Target, shape: str) -> float:
    """Ratio of lines between an input of a shape and an eighth of it. Raises FindingError when it is too much."""
    make = target.shapes[shape]
    large = target.grown // 4
    few, many = (lines_of(target, make(size)) for size in (large // TIMES, large))
    ratio = many / max(few, 1)
    if many > LEAST_LINES and ratio > MOST_RATIO:
        raise FindingError(f"{target.name}: {shape}: {ratio:.1f} times the lines for {TIMES} times the input")
    return ratio


def check_time(target: Target, shape: str) -> float:
    """Ratio of CPU time between the largest input of a shape and an eighth of it. Raises FindingError."""
    make = target.shapes[shape]
    small, large = make(target.grown // TIMES), make(target.grown)
    work(target, small)  # imports, caches, patterns
    for _ in range(3):  # a busy machine may spoil one measurement, not three
        fast, slow = cpu_of(target, small), cpu_of(target, large)
        ratio = slow / max(fast, 1e-6)
        if slow < LEAST_S or ratio <= MOST_RATIO:
            return ratio
    raise FindingError(
        f"{target.name}: {shape}: {ratio:.1f} times the CPU time for {TIMES} times the input ({slow:.3f} s)"
    )


def check_shape_memory(target: Target, shape: str) -> int:
    """Bytes that reading an input of a shape takes. Raises FindingError when it is more than the target may."""
    data = target.shapes[shape](target.grown // 4)
    work(target, data)
    used = traced_peak(lambda: work(target, data))
    target.memory.check(used, len(data), f"{target.name}: {shape}")
    return used


def check_leaks(target: Target, rounds: int = 40) -> int:
    """Bytes that are held for good after reading the same few inputs many times. Raises FindingError."""
    inputs = target.seeds()[:6]

    def read_all(times: int) -> int:
        for _ in range(times):
            for data in inputs:
                work(target, data)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        held = -read_all(3) + read_all(rounds)
    finally:
        tracemalloc.stop()
    if held > MOST_HELD:
        raise FindingError(f"{target.name}: {held} bytes held after {rounds} rounds of the same inputs")
    return held
