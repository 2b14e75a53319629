"""Models that come and go: what stays in memory, for how long, and that nothing of the others is left."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from agent.base.errors import DamagedError, NotFoundError, PeerError, TryLaterError
from agent.base.memory import resident_mb
from agent.bundles.manifest import TensorSpec
from agent.infer.engine import Engine, EngineLimits
from agent.infer.runtimes.base import load_runtime
from agent.infer.shelf import Form
from agent.infer.wishes import Wishes
from tests import onnx_models
from tests.infer.test_engine import CPU, Blob, answer, ask, option, served, shelf, soon

MB = 1 << 20


def drive(story, load=load_runtime, **limits):
    """As in test_engine, with any limits."""

    async def main():
        engine = Engine(EngineLimits(**{"budget_mb": 100.0, "places": 2, **limits}), load)
        try:
            return await asyncio.wait_for(story(engine), 60)
        finally:
            assert await engine.close()

    return asyncio.run(main())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def kept(blob, need_mb=10.0, size_mb=1.0, variant="fp32"):
    """An option whose plaintext may stay in memory."""
    return replace(option(blob, variant, need_mb), size=int(size_mb * MB))


def hot(engine):
    return sorted(row["model"] for row in engine.loaded())


def small(seed=0):
    return Blob(onnx_models.linear(seed))


def wish(**parameters):
    return ask(parameters=parameters)


def test_a_plaintext_is_kept_while_there_is_room_and_the_model_comes_back_without_reading_it():
    a, b, c = small(), small(), small()

    async def story(engine):
        engine.put(shelf(*(served(name, kept(blob, 10, 2)) for name, blob in zip("abc", (a, b, c), strict=True))))
        for name in "abc":
            await answer(engine, name)
        await until(lambda: len(hot(engine)) == 2)
        assert engine.memory()["evicted"] == 0
        gone = next(name for name in "abc" if name not in hot(engine))
        await answer(engine, gone)
        assert [blob.opened for blob in (a, b, c)] == [1, 1, 1]  # its session had gone, its plaintext had not
        assert engine.memory()["held_mb"] <= 27

    drive(story, budget_mb=27)


def test_the_plaintext_goes_where_room_is_short_and_everything_goes_with_unload():
    blobs = [small() for _ in range(6)]

    async def story(engine):
        engine.put(shelf(*(served(f"m{n}", kept(blob, 4, 8)) for n, blob in enumerate(blobs))))
        for n in range(6):
            await answer(engine, f"m{n}")
        memory = engine.memory()
        assert memory["held_mb"] <= 30
        assert memory["evicted"] > 0
        for n in range(6):
            engine.unload(f"m{n}")
        await until(lambda: engine.memory()["held_mb"] == 0)
        assert (engine.memory()["hot"], engine.memory()["warm"]) == (0, 0)
        await answer(engine, "m0")

    drive(story, budget_mb=30)


def test_each_of_a_hundred_requests_for_ten_models_that_never_fit_together_is_answered():
    weights = [np.random.default_rng(n).standard_normal((16, 4)).astype(np.float32) for n in range(10)]

    async def story(engine):
        engine.put(shelf(*(served(f"m{n}", kept(small(n), 40, 5)) for n in range(10))))
        x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
        seen = await asyncio.gather(*(answer(engine, f"m{n % 10}", ask(x)) for n in range(100)))
        for n, response in enumerate(seen):
            np.testing.assert_allclose(response.outputs[0].array, x @ weights[n % 10], rtol=1e-4, atol=1e-5)
        assert engine.memory()["loads"] < 40

    drive(story, queue_per_model=100)


def test_many_that_go_at_once_for_a_large_one_go_once_each_with_what_they_are_made_of(caplog):
    def model(name, need_mb, size_mb):
        return served(name, replace(kept(small(), need_mb, size_mb), shares=True))

    async def story(engine):
        engine.put(shelf(*(model(f"m{n}", 1, 2) for n in range(12)), model("large", 20, 16)))
        for _ in range(12):
            await asyncio.gather(*(answer(engine, f"m{n}") for n in range(12)))
            await asyncio.gather(answer(engine, "large"), answer(engine, "m0"))
        for n in range(12):
            engine.unload(f"m{n}")
        engine.unload("large")
        await until(lambda: engine.memory()["held_mb"] == 0)
        assert (engine.memory()["hot"], engine.memory()["warm"]) == (0, 0)

    drive(story, budget_mb=38, queue_per_model=100)
    assert "out of step" not in caplog.text


def test_keep_alive_of_a_request_and_of_all():
    async def story(engine):
        engine.put(shelf(served("m", kept(small()))))
        await answer(engine, "m", wish(keep_alive=0))
        await until(lambda: engine.memory()["held_mb"] == 0)
        await answer(engine, "m", wish(keep_alive=-1))
        await asyncio.sleep(0.3)
        assert hot(engine) == ["m"]
        await answer(engine, "m")  # from now on as for all: 0.1 s
        await until(lambda: engine.memory()["held_mb"] == 0)

    drive(story, keep_s=0.1)


@pytest.mark.usefixtures("unhurried")
def test_what_runs_on_the_loop_is_kept_as_long_as_it_is_used():
    async def story(engine):
        engine.put(shelf(served("m", option(small(), p95_ms=0.02))))
        await answer(engine, "m")
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            assert not asyncio.iscoroutine(engine.infer("m", None, ask(), soon()))
            await asyncio.sleep(0.02)
        await until(lambda: hot(engine) == [])

    drive(story, keep_s=0.3)


def test_a_pinned_model_stays_whatever_comes_until_it_is_unpinned():
    async def story(engine):
        engine.put(
            shelf(*(served(name, option(small(), need_mb=need)) for name, need in (("a", 40), ("b", 50), ("c", 50))))
        )
        await answer(engine, "a", wish(pin=True))
        for name in "bcbc":
            await answer(engine, name)
        assert engine.loaded()[0]["model"] == "a"
        assert engine.loaded()[0]["pinned"] is True
        with pytest.raises(TryLaterError, match="cannot pin model 'b': pinned models may hold 50 MB"):
            await answer(engine, "b", wish(pin=True))
        await answer(engine, "a", wish(pin=False))
        await answer(engine, "b", wish(pin=True))
        assert [row["model"] for row in engine.loaded() if row["pinned"]] == ["b"]

    drive(story)


def test_what_pinned_models_leave_no_room_for_is_told_so_and_the_rest_answers():
    async def story(engine):
        engine.put(shelf(served("a", option(small(), need_mb=45)), served("b", option(small(), need_mb=60))))
        await engine.preload("a", wishes=Wishes(pin=True))
        with pytest.raises(TryLaterError, match="pinned models leave it no room"):
            await answer(engine, "b")
        await answer(engine, "a")
        engine.unload("a")
        await answer(engine, "b")

    drive(story)


def test_wrong_wishes_are_told_and_cost_no_load():
    blob = small()

    async def story(engine):
        engine.put(shelf(served("m", option(blob))))
        for parameters, text in (
            ({"keep_alive": "5m"}, "keep_alive: must be a number"),
            ({"keep_alive": True}, "keep_alive"),
            ({"keep_alive": float("nan")}, "keep_alive"),
            ({"pin": 1}, "pin: must be true or false"),
        ):
            with pytest.raises(PeerError, match=text):
                await answer(engine, "m", wish(**parameters))
        assert blob.opened == 0

    drive(story)


def test_preloads_come_when_there_is_room_and_unknown_ones_are_told():
    async def story(engine):
        engine.put(shelf(*(served(name, option(small(), need_mb=40)) for name in "abc")))
        for name in "abc":
            engine.preload_soon(name)
        with pytest.raises(NotFoundError):
            engine.preload_soon("d")
        await until(lambda: hot(engine) == ["a", "b"])
        await asyncio.sleep(0.05)
        assert hot(engine) == ["a", "b"]

    drive(story)


def test_a_model_removed_while_somebody_waits_for_its_turn():
    gate = threading.Event()

    async def story(engine):
        engine.put(
            shelf(
                served("a", option(Blob(onnx_models.linear(), gate=gate), need_mb=80)),
                served("b", option(small(), need_mb=80)),
            )
        )
        first = asyncio.ensure_future(answer(engine, "a"))
        waits = asyncio.ensure_future(answer(engine, "b"))
        await asyncio.sleep(0.05)
        engine.put(shelf(served("a", option(small(), need_mb=80))))
        with pytest.raises(NotFoundError):
            await waits
        gate.set()
        assert (await first).model_name == "a"

    drive(story)


def test_unload_waits_for_who_runs():
    async def story(engine):
        heavy = Blob(onnx_models.heavy(side=1024, layers=24))
        engine.put(shelf(heavy_model("m", option(heavy))))
        await engine.preload("m")
        under_way = asyncio.ensure_future(answer(engine, "m", heavy_request()))
        await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        assert engine.unload("m") == 1
        assert hot(engine) == []
        assert (await under_way).outputs[0].array.shape == (64, 1024)
        await until(lambda: engine.memory()["held_mb"] == 0)

    drive(story)


def heavy_model(name, *options):
    spec = {"datatype": "FP32", "shape": (-1, 1024)}
    return served(name, *options, inputs=(TensorSpec(name="x", **spec),), outputs=(TensorSpec(name="y", **spec),))


def heavy_request():
    return ask(np.ones((64, 1024), np.float32))


# -- two forms of one option ------------------------------------------------------------------------------------------


def two_forms(blob, *, first=None, steady_run_s=0.0, steady=None):
    """An option that answers first in one form and in the long run in another."""
    size = len(onnx_models.linear())
    forms = (
        Form("quick", first or blob, "file", 5 * MB, size, load_s=0.001, run_s=0.01),
        Form("steady", steady or blob, "file", 5 * MB, size, load_s=0.001, run_s=steady_run_s),
    )
    return replace(option(blob), forms=forms, size=size)


def test_the_form_for_the_long_run_takes_over_once_the_first_has_cost_more_than_its_load():
    blob = small()

    async def story(engine):
        engine.put(shelf(served("m", two_forms(blob))))
        await answer(engine, "m")
        assert engine.loaded()[0]["form"] == "quick"
        while engine.loaded()[0]["form"] != "steady":
            assert (await answer(engine, "m")).parameters["degraded"] is False
        await until(lambda: engine.memory()["hot"] == 1)
        assert blob.opened == 1  # both are made of one plaintext
        engine.unload("m")
        await answer(engine, "m")
        assert engine.loaded()[0]["form"] == "quick"

    drive(story)


def test_closing_waits_for_the_session_that_is_let_go_because_a_load_ended_meanwhile():
    gate = threading.Event()
    made = two_forms(small())
    slow = replace(made.forms[1], open_model=Blob(onnx_models.linear(), gate=gate), digest="other")

    async def story(engine):
        engine.put(shelf(served("m", replace(made, forms=(made.forms[0], slow)))))
        while not slow.open_model.opened:
            await answer(engine, "m")
        threading.Timer(0.2, gate.set).start()  # by then the engine is closing

    drive(story)


def test_runs_that_others_slow_down_are_no_reason_for_another_form():
    """On a busy device each run takes many times what was measured, in either form."""
    made = two_forms(small())
    forms = (replace(made.forms[0], run_s=1e-6), replace(made.forms[1], run_s=1e-7, load_s=1e-4))

    async def story(engine):
        engine.put(shelf(served("m", replace(made, forms=forms))))
        for _ in range(20):
            await answer(engine, "m")
        assert engine.loaded()[0]["form"] == "quick"

    drive(story)


def test_a_form_that_does_not_pay_does_not_take_over():
    async def story(engine):
        engine.put(shelf(served("m", two_forms(small(), steady_run_s=10.0))))
        for _ in range(20):
            await answer(engine, "m")
        assert engine.loaded()[0]["form"] == "quick"

    drive(story)


def test_the_form_for_the_long_run_displaces_nobody_and_comes_once_there_is_room():
    async def story(engine):
        models = (served("m", two_forms(small())), served("other", option(small(), need_mb=20)))
        engine.put(shelf(*models))
        for name in ("other", *["m"] * 20):
            await answer(engine, name)
        assert {row["model"]: row["form"] for row in engine.loaded()} == {"m": "quick", "other": "plain"}
        assert engine.memory()["demoted"] == 0
        engine.unload("other")
        while engine.loaded()[0]["form"] != "steady":
            await answer(engine, "m")

    drive(story, budget_mb=30)


def test_a_prepared_form_that_cannot_be_had_leaves_the_plain_one_and_nothing_degrades():
    plain = small()

    async def story(engine):
        engine.put(shelf(served("m", two_forms(plain, first=Blob(b"", broken=True)))))
        seen = await answer(engine, "m")
        assert seen.parameters["degraded"] is False
        assert engine.loaded()[0]["form"] == "plain"

    drive(story)


def test_a_second_form_that_cannot_be_had_leaves_the_first_one():
    async def story(engine):
        blob = small()
        made = two_forms(blob)
        broken = replace(made.forms[1], open_model=Blob(b"rubbish"), digest="other", size=7)
        engine.put(shelf(served("m", replace(made, forms=(made.forms[0], broken)))))
        for _ in range(20):
            assert (await answer(engine, "m")).parameters["variant"] == "fp32"
        assert engine.loaded()[0]["form"] == "quick"

    drive(story)


def test_a_pin_passes_on_to_the_form_that_takes_over():
    async def story(engine):
        engine.put(
            shelf(served("m", two_forms(small())), *(served(name, option(small(), need_mb=60)) for name in "ab"))
        )
        await answer(engine, "m", wish(pin=True))
        while engine.loaded()[0]["form"] != "steady":
            await answer(engine, "m")
        for name in "abab":
            await answer(engine, name)
        assert engine.loaded()[0]["form"] == "steady"

    drive(story)


# -- nothing stays behind ---------------------------------------------------------------------------------------------


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_hundreds_of_swaps_with_failing_loads_leave_nothing_behind():
    good = onnx_models.heavy(side=256, layers=4)  # a megabyte of weights
    spoiled = good[: len(good) // 2]
    x = ask(np.ones((1, 256), np.float32))

    def model(name, data):
        spec = {"datatype": "FP32", "shape": (-1, 256)}
        option_ = kept(Blob(data), 4, 1.1)
        return served(name, option_, inputs=(TensorSpec(name="x", **spec),), outputs=(TensorSpec(name="y", **spec),))

    async def story(engine):
        engine.put(shelf(*(model(f"m{n}", good) for n in range(4)), *(model(f"bad{n}", spoiled) for n in range(2))))
        for turn in range(260):
            if turn == 60:
                await until(lambda: not engine._loader._tasks)
                files, memory = descriptors(), resident_mb()
            if turn % 20 == 0:
                with pytest.raises(DamagedError):
                    await answer(engine, f"bad{turn // 20 % 2}", x)
            await answer(engine, f"m{turn % 4}", x)
        await until(lambda: not engine._loader._tasks)
        assert engine.memory()["loads"] > 200
        assert descriptors() == files
        assert resident_mb() - memory < 10
        assert engine.memory()["held_mb"] <= 11

    drive(story, budget_mb=11)


def test_what_a_load_that_was_given_up_brings_in_the_end_is_closed():
    gate = threading.Event()
    blob = Blob(onnx_models.linear(), gate=gate)

    async def main():
        engine = Engine(EngineLimits(100.0, load_s=0.2), load_runtime)
        engine.put(shelf(served("m", kept(blob))))
        load_runtime("onnx")
        files = descriptors()
        with pytest.raises(DamagedError, match="not done within"):
            await answer(engine, "m")
        assert engine.memory()["held_mb"] == 0
        assert not await engine.close()
        gate.set()
        deadline = time.monotonic() + 30
        while descriptors() != files and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert descriptors() <= files

    asyncio.run(main())


def test_a_runtime_that_is_short_of_memory_is_asked_once_more_with_more_room():
    tries = []

    class Short:
        """Fails for want of memory while anything else is loaded."""

        def __init__(self, runtime):
            self._runtime = runtime

        def load(self, descriptor, options):
            tries.append(1)
            if len(tries) == 2:
                raise TryLaterError("cannot load model: out of memory")
            return self._runtime.load(descriptor, options)

    runtime = Short(load_runtime("onnx"))

    async def story(engine):
        engine.put(shelf(served("a", option(small(), need_mb=40)), served("b", option(small(), need_mb=55))))
        await answer(engine, "a")
        await answer(engine, "b")
        assert len(tries) == 3
        assert hot(engine) == ["b"]

    drive(story, load=lambda name: runtime)


def test_the_backend_is_told_as_before():
    async def story(engine):
        engine.put(shelf(served("m", option(small()))))
        assert (await answer(engine, "m")).parameters["backend"] == CPU
        assert engine.loaded() == [
            {
                "model": "m", "version": "1.0.0", "requested_variant": "fp32", "requested_backend": CPU,
                "variant": "fp32", "backend": CPU, "form": "plain", "mb": 10.0, "degraded": False, "reason": "",
                "threads": 1, "on_request": False, "batching": None, "pinned": False,
            }
        ]  # fmt: skip

    drive(story)
