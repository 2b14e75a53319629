"""Inputs whose values, not their size, decide how long a run takes and what memory it asks for."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from agent.base.errors import DamagedError, DeadlineError, TryLaterError
from agent.base.memory import resident_mb
from agent.bundles.manifest import TensorSpec
from agent.infer.runners import Runners
from agent.infer.tensors import InferRequest, Tensor
from tests import onnx_models
from tests.infer.test_engine import Blob, answer, ask, drive, option, served, shelf, soon

EVER = 1 << 62
FAST = 0.02


def counted(name, blob, p95_ms=5.0, need_mb=10.0):
    return served(
        name,
        option(blob, p95_ms=p95_ms, need_mb=need_mb),
        inputs=(TensorSpec(name="n", datatype="INT64", shape=(1,)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(1,)),),
    )


def count(n):
    return InferRequest((Tensor("n", "INT64", np.array([n], np.int64)),))


def small():
    return Blob(onnx_models.linear())


def loops(name="loop", p95_ms=5.0):
    return counted(name, Blob(onnx_models.counting()), p95_ms)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.usefixtures("unhurried")
def test_a_run_that_holds_the_loop_up_is_ended_and_never_comes_back_to_it():
    async def story(engine):
        engine.put(shelf(loops(p95_ms=FAST)))
        await answer(engine, "loop", count(3))
        assert not asyncio.iscoroutine(engine.infer("loop", None, count(3), soon()))  # quick so far: on the loop
        endless = asyncio.ensure_future(answer(engine, "loop", count(EVER), deadline=soon(1)))
        with pytest.raises(DeadlineError):
            await endless
        later = engine.infer("loop", None, count(3), soon())
        assert asyncio.iscoroutine(later)
        assert (await later).outputs[0].array == [3]

    drive(story)


@pytest.mark.usefixtures("unhurried")
def test_shapes_that_never_ran_do_not_run_on_the_loop():
    async def story(engine):
        engine.put(shelf(served("m", option(small(), p95_ms=FAST))))
        await answer(engine, "m")
        assert not asyncio.iscoroutine(engine.infer("m", None, ask(), soon()))
        large = ask(np.ones((100_000, 16), np.float32))
        later = engine.infer("m", None, large, soon())
        assert asyncio.iscoroutine(later)
        await later

    drive(story)


def test_a_deadline_ends_the_run_and_gives_its_thread_back():
    async def story(engine):
        engine.put(shelf(loops(), served("m", option(small()))))
        await answer(engine, "loop", count(1))
        with pytest.raises(DeadlineError):
            await answer(engine, "loop", count(EVER), deadline=soon(0.2))
        await until(lambda: not engine._running.halts)
        await answer(engine, "m")

    drive(story, places=1)


def test_a_caller_that_has_gone_takes_its_run_along():
    async def story(engine):
        engine.put(shelf(loops()))
        await answer(engine, "loop", count(1))
        under_way = asyncio.ensure_future(answer(engine, "loop", count(EVER)))
        await until(lambda: engine._running.halts)
        under_way.cancel()
        await until(lambda: not engine._running.halts)

    drive(story)


def test_one_models_endless_runs_and_long_queue_do_not_hold_up_another():
    async def story(engine):
        engine.put(shelf(loops(), served("m", option(small()))))
        await answer(engine, "loop", count(1))
        await answer(engine, "m")
        hogs = [asyncio.ensure_future(answer(engine, "loop", count(EVER), deadline=soon(30))) for _ in range(8)]
        await until(lambda: engine._running.halts)
        for _ in range(3):
            await answer(engine, "m", deadline=soon(10))
        assert not any(hog.done() for hog in hogs)
        for hog in hogs:
            hog.cancel()
        await asyncio.wait(hogs)

    drive(story, places=1)


def test_the_stop_ends_runs_that_would_go_on_for_ever():
    async def story(engine):
        engine.put(shelf(loops()))
        await answer(engine, "loop", count(1))
        hogs = [asyncio.ensure_future(answer(engine, "loop", count(EVER))) for _ in range(3)]
        await until(lambda: engine._running.halts)
        assert await engine.close()
        for hog in hogs:
            with pytest.raises((DeadlineError, asyncio.CancelledError)):
                await hog

    drive(story, places=1)


def test_a_session_that_took_far_more_than_measured_is_dropped_and_its_memory_comes_back():
    blob = Blob(onnx_models.filling())

    async def story(engine):
        engine.put(shelf(counted("fill", blob)))
        await answer(engine, "fill", count(1000))
        before = resident_mb()
        await answer(engine, "fill", count(100_000_000))
        assert engine.loaded() == []
        await until(lambda: resident_mb() - before < 100)  # the thread that ran it may hold it for a moment
        await answer(engine, "fill", count(1000))
        assert blob.opened == 2

    drive(story)


def test_more_memory_than_there_is_is_try_later():
    async def story(engine):
        engine.put(shelf(counted("fill", Blob(onnx_models.filling()))))
        with pytest.raises(TryLaterError, match="out of memory"):
            await answer(engine, "fill", count(1 << 40))
        await answer(engine, "fill", count(1000))

    drive(story)


def test_a_load_that_never_ends_is_given_up_and_others_load():
    gate = threading.Event()

    async def story(engine):
        engine._limits = type(engine._limits)(100.0, 8, 1, load_s=0.3)
        engine.put(shelf(served("stuck", option(Blob(b"", gate=gate))), served("m", option(small()))))
        with pytest.raises(DamagedError, match="not done within"):
            await answer(engine, "stuck")
        await answer(engine, "m")
        assert not await engine.close()
        gate.set()

    drive(story)


# -- the threads themselves -------------------------------------------------------------------------------------------


def on_runners(story, places=1, patience_s=0.05):
    async def main():
        runners = Runners(places, patience_s)
        try:
            await asyncio.wait_for(story(runners), 30)
        finally:
            await runners.close(5)

    asyncio.run(main())


def test_models_take_turns_however_long_one_queue_is():
    order = []
    gate = threading.Event()

    async def story(runners):
        first = runners.submit("x", lambda: gate.wait(20))
        jobs = [runners.submit("a", lambda n=n: order.append(f"a{n}")) for n in range(4)]
        jobs += [runners.submit("b", lambda n=n: order.append(f"b{n}")) for n in range(2)]
        gate.set()
        await asyncio.gather(first.future, *(job.future for job in jobs))
        assert order == ["a0", "b0", "a1", "b1", "a2", "a3"]

    on_runners(story, patience_s=20)


def test_a_run_takes_a_place_for_each_of_its_threads():
    gates = [threading.Event() for _ in range(4)]

    async def story(runners):
        one = runners.submit("a", lambda: gates[0].wait(20))
        two = runners.submit("b", lambda: gates[1].wait(20))
        wide = runners.submit("c", lambda: gates[2].wait(20), 8)  # as many as there are
        late = runners.submit("d", lambda: gates[3].wait(20))
        assert (one.started, two.started, wide.started, late.started) == (True, True, False, False)
        gates[0].set()
        await one.future
        assert not wide.started
        assert not late.started  # there is a place, but it was not here first
        gates[1].set()
        await two.future
        assert wide.started
        assert not late.started
        gates[2].set()
        await wide.future
        assert late.started
        gates[3].set()
        await late.future
        assert runners._places == 2

    on_runners(story, places=2, patience_s=20)


def test_who_waited_behind_one_that_needed_more_goes_on_when_that_is_withdrawn():
    gate = threading.Event()

    async def story(runners):
        first = runners.submit("a", lambda: gate.wait(20))
        wide = runners.submit("b", lambda: None, 2)
        late = runners.submit("c", lambda: 7)
        assert not late.started
        runners.withdraw(wide)
        assert await late.future == 7
        gate.set()
        await first.future

    on_runners(story, places=2, patience_s=20)


def test_a_long_run_gives_all_its_places_up():
    gate = threading.Event()

    async def story(runners):
        long = runners.submit("a", lambda: gate.wait(20), 2)
        assert await runners.submit("b", lambda: 7, 2).future == 7
        gate.set()
        await long.future
        assert runners._places == 2

    on_runners(story, places=2)


def test_what_nobody_waits_for_is_not_begun():
    ran = []
    gate = threading.Event()

    async def story(runners):
        first = runners.submit("a", lambda: gate.wait(20))
        second = runners.submit("a", lambda: ran.append(2))
        third = runners.submit("a", lambda: ran.append(3))
        runners.withdraw(second)
        runners.withdraw(first)  # under way: nothing happens
        assert second.future.cancelled()
        gate.set()
        assert await first.future
        await third.future
        assert ran == [3]

    on_runners(story, patience_s=20)


def test_a_long_run_gives_its_place_up_and_its_model_waits():
    gate = threading.Event()
    ran = []

    async def story(runners):
        long = runners.submit("a", lambda: gate.wait(20))
        more = runners.submit("a", lambda: ran.append("a"))
        await runners.submit("b", lambda: ran.append("b")).future
        await runners.submit("b", lambda: ran.append("b")).future
        assert not more.started
        gate.set()
        await asyncio.gather(long.future, more.future)
        assert ran == ["b", "b", "a"]
        assert not runners._long

    on_runners(story)


def test_an_error_of_the_work_is_the_jobs_error_and_the_place_is_free_again():
    def fail():
        raise KeyError("x")

    async def story(runners):
        for _ in range(3):
            with pytest.raises(KeyError):
                await runners.submit("a", fail).future
        assert await runners.submit("a", lambda: 7).future == 7

    on_runners(story)


def test_closing_says_whether_all_has_ended():
    gate = threading.Event()

    async def main():
        runners = Runners(1)
        under_way = runners.submit("a", lambda: gate.wait(20))
        waiting = runners.submit("a", lambda: None)
        start = time.monotonic()
        assert not await runners.close(0.1)
        assert time.monotonic() - start < 15
        assert waiting.future.cancelled()
        gate.set()
        await under_way.future

    asyncio.run(main())
