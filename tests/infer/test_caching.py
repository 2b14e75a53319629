"""The result cache in the engine, with real ONNX Runtime sessions: who gets which answer, and what a change does."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from agent.base.errors import PeerError
from agent.infer.shelf import CacheLimits
from tests import onnx_models
from tests.infer.test_engine import SLOW, Blob, OneAtATime, X, answer, ask, drive, option, served, shelf, soon

KEPT = CacheLimits(60.0, 1 << 20)
WARMED = CacheLimits(60.0, 1 << 20, prewarm=True)


def cached(*options, limits=KEPT, **more):
    return replace(served("m", *options, **more), cache=limits)


def value(response):
    return response.outputs[0].array.tolist()


async def said(engine, request=None, model="m", **more):
    return (await answer(engine, model, request, **more)).parameters["cache"]


@pytest.mark.parametrize("p95_ms", [SLOW, 0.02])
def test_an_equal_request_is_answered_at_once_and_says_what_ran(p95_ms):
    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear()), p95_ms=p95_ms))))
        first = await answer(engine, "m", ask(id="a"))
        hit = engine.infer("m", None, ask(id="b"), soon())
        assert (first.parameters["cache"], hit.parameters["cache"]) == ("miss", "hit")
        assert hit.id == "b"
        assert value(hit) == value(first)
        same = {name: hit.parameters[name] for name in ("variant", "backend", "requested_variant", "degraded")}
        assert same.items() <= first.parameters.items()
        assert hit.parameters["compute_us"] == 0
        assert await said(engine, ask(X + 1)) == "miss"
        assert await said(engine, ask(np.concatenate([X, X]))) == "miss"
        assert await said(engine, ask(parameters={"temperature": 1})) == "miss"
        assert await said(engine, ask(parameters={"priority": 3, "timeout": 10**6})) == "hit"
        (row,) = engine.caches()
        assert (row["hits"], row["misses"], row["entries"]) == (2, 4, 4)

    drive(story)


def test_it_is_off_unless_asked_for_and_a_request_may_go_without():
    async def story(engine):
        engine.put(
            shelf(served("plain", option(Blob(onnx_models.linear()))), cached(option(Blob(onnx_models.linear()))))
        )
        assert [await said(engine, model="plain") for _ in range(2)] == ["off", "off"]
        without = ask(parameters={"cache": False})
        assert [await said(engine, without) for _ in range(2)] == ["off", "off"]
        assert await said(engine) == "miss"
        assert await said(engine, without) == "off"
        with pytest.raises(PeerError, match=r"parameters\.cache: must be true or false"):
            await answer(engine, "m", ask(parameters={"cache": "no"}))

    drive(story)


def test_a_hit_needs_no_model_in_memory_and_unload_forgets_the_answers_too():
    blob = Blob(onnx_models.linear())

    async def story(engine):
        engine.put(
            shelf(cached(option(blob, need_mb=60.0)), served("other", option(Blob(onnx_models.linear()), need_mb=60.0)))
        )
        first = await answer(engine, "m")
        await answer(engine, "other")  # both do not fit
        assert [row["model"] for row in engine.loaded()] == ["other"]
        assert value(await answer(engine, "m")) == value(first)
        assert blob.opened == 1
        engine.unload("m")
        assert await said(engine) == "miss"
        assert blob.opened == 2

    drive(story)


def test_a_degraded_answer_is_never_given_for_the_chosen_variant():
    right, stand_in = Blob(onnx_models.linear(1), broken=True), Blob(onnx_models.linear(2))

    async def story(engine):
        model = cached(option(right), option(stand_in, "int8"))
        engine.put(shelf(model))
        first = await answer(engine, "m")
        assert (first.parameters["variant"], first.parameters["degraded"]) == ("int8", True)
        hit = await answer(engine, "m")
        assert (hit.parameters["cache"], hit.parameters["variant"], hit.parameters["degraded"]) == ("hit", "int8", True)
        engine.put(shelf())
        await asyncio.sleep(0.05)
        right.broken = False
        engine.put(shelf(model))
        again = await answer(engine, "m")
        assert (again.parameters["cache"], again.parameters["variant"]) == ("miss", "fp32")
        assert value(again) != value(first)

    drive(story)


def test_another_version_never_gets_the_answers_of_the_one_before():
    async def story(engine):
        old = cached(option(Blob(onnx_models.linear(1))))
        new = cached(option(Blob(onnx_models.linear(2))), version="1.1.0")
        engine.put(shelf(old))
        first = await answer(engine, "m")
        both = replace(shelf(new), versions={**shelf(old).versions, **shelf(new).versions})
        engine.put(both)
        second = await answer(engine, "m")
        assert (second.model_version, second.parameters["cache"]) == ("1.1.0", "miss")
        assert value(second) != value(first)
        named = await answer(engine, "m", version="1.0.0")
        assert (named.model_version, value(named)) == ("1.0.0", value(first))
        assert value(await answer(engine, "m")) == value(second)

    drive(story)


def test_equal_requests_at_once_make_one_run_and_an_error_is_everybodys_own():
    watch = OneAtATime()

    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear())))))
        seen = await asyncio.gather(*(answer(engine, "m", ask(id=str(n))) for n in range(8)))
        assert watch.runs == 1
        assert sorted(response.parameters["cache"] for response in seen) == ["joined"] * 7 + ["miss"]
        assert [response.id for response in seen] == [str(n) for n in range(8)]
        wrong = ask(np.zeros((1, 3), np.float32))
        failed = await asyncio.gather(*(answer(engine, "m", wrong) for _ in range(4)), return_exceptions=True)
        assert all(isinstance(error, PeerError) for error in failed)
        assert engine.caches()[0]["entries"] == 1

    drive(story, load=watch)


def test_a_caller_that_goes_leaves_the_run_to_those_who_wait_for_it():
    watch = OneAtATime()

    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear())))))
        watch.gate.clear()
        first, second = (asyncio.ensure_future(answer(engine, "m")) for _ in range(2))
        while not watch.at_once:
            await asyncio.sleep(0.001)
        first.cancel()
        await asyncio.sleep(0.01)
        watch.gate.set()
        assert (await second).parameters["cache"] == "miss"
        assert first.cancelled()

    drive(story, load=watch)


def test_what_is_kept_counts_towards_the_budget_and_goes_first_when_memory_is_short():
    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear())), limits=CacheLimits(60.0, 20 << 20))))
        rows = np.zeros((200_000, 16), np.float32)
        for number in range(3):
            rows[0, 0] = number
            await answer(engine, "m", ask(rows[: 100_000 + number]))
        held = engine.caches()[0]["bytes"]
        assert held > 4 << 20
        memory = engine.memory()
        assert memory["cached_mb"] == pytest.approx(held / (1 << 20), abs=0.1)
        loaded = engine.loaded()
        engine.press(1.0)
        assert engine.loaded() == loaded
        assert 0 < engine.memory()["cached_mb"] < memory["cached_mb"]
        engine.press(100.0)
        assert engine.memory()["cached_mb"] == 0
        while engine.loaded():
            await asyncio.sleep(0.01)

    drive(story)


def warm_up(engine, count):
    """So many inputs, each asked for three times."""

    async def warm():
        for number in range(count):
            for _ in range(3):
                await answer(engine, "m", ask(X + number))

    return warm()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_the_hottest_inputs_are_answered_ahead_by_the_new_version():
    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear(1))), limits=WARMED)))
        await warm_up(engine, 5)
        before = await answer(engine, "m")
        assert len(engine.hottest("m")) == 5
        engine.put(shelf(cached(option(Blob(onnx_models.linear(2))), limits=WARMED, version="1.1.0")))
        assert engine.caches()[0]["entries"] == 0
        await engine.preload("m")
        await until(lambda: engine.caches()[0]["rewarmed"] == 5)
        for number in range(5):
            hit = await answer(engine, "m", ask(X + number))
            assert (hit.model_version, hit.parameters["cache"]) == ("1.1.0", "hit")
        assert value(await answer(engine, "m")) != value(before)

    drive(story)


def test_nothing_is_answered_ahead_while_live_requests_run_and_a_live_one_ends_what_is_under_way():
    watch = OneAtATime()

    async def story(engine):
        plain = served("plain", option(Blob(onnx_models.linear())))
        engine.put(shelf(cached(option(Blob(onnx_models.linear(1))), limits=WARMED), plain))
        await warm_up(engine, 3)
        await answer(engine, "plain")
        watch.gate.clear()
        live = asyncio.ensure_future(answer(engine, "plain"))
        await until(lambda: watch.at_once == 1)
        engine.put(shelf(cached(option(Blob(onnx_models.linear(2))), limits=WARMED, version="1.1.0"), plain))
        await engine.preload("m")
        await asyncio.sleep(0.1)
        assert watch.at_once == 1
        watch.gate.set()
        await live
        watch.gate.clear()
        await until(lambda: watch.at_once == 1)  # now it runs ahead
        runs = watch.runs
        live = asyncio.ensure_future(answer(engine, "plain"))
        await asyncio.sleep(0.05)
        watch.gate.set()
        await live
        await until(lambda: engine.caches()[0]["rewarmed"] == 3)
        assert watch.runs >= runs + 1 + 3  # the one that had to give way was made again

    drive(story, load=watch)


def test_the_next_change_ends_what_is_computed_ahead():
    watch = OneAtATime()

    async def story(engine):
        def version(number):
            return cached(option(Blob(onnx_models.linear(number))), limits=WARMED, version=f"1.{number}.0")

        engine.put(shelf(version(1)))
        await warm_up(engine, 3)
        engine.put(shelf(version(2)))
        watch.gate.clear()
        await engine.preload("m")
        await until(lambda: watch.at_once == 1)
        engine.put(shelf(version(3)))
        watch.gate.set()
        await asyncio.sleep(0.1)
        assert engine.caches()[0]["entries"] == 0
        await engine.preload("m")
        await until(lambda: engine.caches()[0]["rewarmed"] == 3)
        hit = await answer(engine, "m")
        assert (hit.model_version, hit.parameters["cache"]) == ("1.3.0", "hit")

    drive(story, load=watch)


def test_inputs_that_the_new_version_does_not_take_are_left_out():
    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear(1))), limits=WARMED)))
        await warm_up(engine, 2)
        for _ in range(3):
            await answer(engine, "m", ask(np.concatenate([X, X])))
        fixed = cached(option(Blob(onnx_models.linear(2))), limits=WARMED, version="2.0.0")
        fixed = replace(fixed, inputs=(fixed.inputs[0].model_copy(update={"shape": (1, 16)}),))
        engine.put(shelf(fixed))
        await engine.preload("m")
        await until(lambda: engine.caches()[0]["rewarmed"] == 2)

    drive(story)


def test_no_caller_can_change_a_kept_answer():
    async def story(engine):
        engine.put(shelf(cached(option(Blob(onnx_models.linear())))))
        for _ in range(2):
            response = await answer(engine, "m")
            with pytest.raises(ValueError, match="read-only"):
                response.outputs[0].array[0, 0] = 7

    drive(story)
