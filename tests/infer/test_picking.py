"""Requests that ask for a variant, a speed or a quality; several options of one version in memory at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from agent.base.errors import PeerError
from agent.infer.picking import pick
from agent.infer.steering import CALM, Pressure, Steering, steps
from agent.infer.wishes import Wishes, wishes_of
from tests import onnx_models
from tests.infer.test_engine import CPU, Blob, answer, ask, option, served, shelf
from tests.infer.test_loading import drive, until

SEEDS = {"fp32": 0, "int8": 1, "tiny": 2}


def of(variant, *, p95_ms=5.0, quality=None, need_mb=10.0, joules=None, **more):
    """An option whose answers tell which one it is."""
    made = option(Blob(onnx_models.linear(SEEDS[variant])), variant, need_mb, p95_ms, **more)
    return replace(made, quality=quality, joules=joules)


def three(**more):
    """The choice, one that is half as good and costs half, one that costs next to nothing."""
    return served(
        "m",
        of("fp32", p95_ms=8.0, quality=1.0, need_mb=40.0),
        of("int8", p95_ms=4.0, quality=0.98, need_mb=20.0),
        of("tiny", p95_ms=1.0, quality=0.9, need_mb=5.0),
        **more,
    )


def is_of(response, variant):
    """Whether the numbers are those of that variant, whatever the answer says of itself."""
    weights = np.random.default_rng(SEEDS[variant]).standard_normal((16, 4)).astype(np.float32)
    x = np.arange(16, dtype=np.float32).reshape(1, 16)
    return np.allclose(response.outputs[0].array, x @ weights, rtol=1e-4)


def rows(engine):
    return {row["variant"]: row for row in engine.loaded()}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"variant": "int8"}, ["int8"]),
        ({"max_latency_ms": 4}, ["int8", "tiny"]),
        ({"max_latency_ms": 8.0, "min_quality": 0.95}, ["fp32", "int8"]),
        ({"min_quality": -1}, ["fp32", "int8", "tiny"]),
        ({"variant": "tiny", "max_latency_ms": 1}, ["tiny"]),
    ],
)
def test_the_options_that_meet_a_wish_in_the_order_of_the_choice(asked, found):
    assert [option.variant for option in pick(three(), wishes_of(asked))] == found


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"variant": "int4"}, r"variant: model 'm' has fp32@.*p95 8 ms, quality 1\).*tiny@"),
        ({"max_latency_ms": 0.5}, r"max_latency_ms: 0\.5 is less than .* takes here: .*tiny@\S+ \(p95 1 ms"),
        ({"min_quality": 2}, r"min_quality: 2 is more than .* has: fp32@"),
        ({"variant": "tiny", "min_quality": 0.95}, r"min_quality: .*: tiny@\S+ \(p95 1 ms, quality 0\.9\)$"),
    ],
)
def test_a_wish_that_nothing_meets_names_what_there_is(asked, text):
    with pytest.raises(PeerError, match=text):
        pick(three(), wishes_of(asked))


def test_what_was_never_measured_meets_no_wish_for_a_figure():
    unmeasured = served("m", of("fp32", p95_ms=None))
    for wishes in (Wishes(max_latency_ms=1e9), Wishes(min_quality=-1e9)):
        with pytest.raises(PeerError, match="never timed"):
            pick(unmeasured, wishes)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"variant": 8}, "variant: must be the id"),
        ({"max_latency_ms": "5"}, "max_latency_ms: must be a number"),
        ({"max_latency_ms": 0}, "above 0"),
        ({"max_latency_ms": True}, "max_latency_ms"),
        ({"min_quality": float("nan")}, "min_quality: must be a number"),
    ],
)
def test_wrong_wishes_are_told_by_their_name(asked, text):
    with pytest.raises(PeerError, match=text):
        wishes_of(asked)


def test_several_options_of_one_version_answer_side_by_side():
    async def story(engine):
        engine.put(shelf(three()))
        for variant in ("int8", "fp32", "tiny", "int8"):
            said = await answer(engine, "m", ask(parameters={"variant": variant}))
            assert is_of(said, variant)
            assert (said.parameters["variant"], said.parameters["requested_variant"]) == (variant, variant)
            assert said.parameters["degraded"] is False
        assert engine.memory()["loads"] == 3
        plain = await answer(engine, "m")
        assert is_of(plain, "fp32")
        assert engine.memory()["loads"] == 3  # the one of the choice was there already
        shown = rows(engine)
        assert [shown[name]["on_request"] for name in ("fp32", "int8", "tiny")] == [False, True, True]
        assert engine.unload("m") == 3

    drive(story)


def test_a_wish_changes_nothing_for_who_has_none():
    async def story(engine):
        engine.put(shelf(three()))
        await answer(engine, "m")
        both = await asyncio.gather(
            *(answer(engine, "m", ask(parameters={"max_latency_ms": 2} if n % 2 else {})) for n in range(16))
        )
        for n, said in enumerate(both):
            assert is_of(said, "tiny" if n % 2 else "fp32")
        assert rows(engine)["fp32"]["on_request"] is False
        engine.put(shelf(three()))  # other blobs: every session is replaced
        await until(lambda: engine.memory()["hot"] == 0)
        assert is_of(await answer(engine, "m"), "fp32")

    drive(story)


def test_sessions_for_wishes_go_first_when_room_is_needed_and_come_back():
    async def story(engine):
        engine.put(shelf(three(), served("other", of("fp32", need_mb=45.0))))
        await answer(engine, "m", ask(parameters={"variant": "fp32"}))
        await answer(engine, "m", ask(parameters={"variant": "int8"}))
        await answer(engine, "other")
        assert engine.memory()["held_mb"] <= 70
        for variant in ("fp32", "int8"):
            assert is_of(await answer(engine, "m", ask(parameters={"variant": variant})), variant)

    drive(story, budget_mb=70.0)


def test_a_wish_whose_only_option_cannot_be_had_is_an_error_and_not_another_answer():
    async def story(engine):
        spoiled = option(Blob(b"", broken=True), "int8")
        engine.put(shelf(served("m", of("fp32"), spoiled)))
        with pytest.raises(Exception, match=r"int8@.*not authentic"):
            await answer(engine, "m", ask(parameters={"variant": "int8"}))
        assert (await answer(engine, "m")).parameters["degraded"] is False

    drive(story)


# -- steering ---------------------------------------------------------------------------------------------------------


def order(version, **pressure):
    steering = Steering()
    steering.pressure = Pressure(**pressure) if pressure else CALM
    return [option.variant for option in steering.order(version)]


def test_steps_follow_what_was_measured():
    version = three()
    assert order(version) == ["fp32", "int8", "tiny"]
    assert order(version, memory=1)[0] == order(version, compute=1)[0] == "int8"
    assert order(version, memory=2)[0] == order(version, compute=9)[0] == "tiny"
    assert steps(version) == (2, 2)
    assert order(replace(version, governed=False), memory=2) == ["fp32", "int8", "tiny"]
    assert steps(replace(version, governed=False)) == (0, 0)


def test_memory_and_compute_step_by_their_own_costs():
    """The small one is slow, the quick one is large: memory pressure and heat call for different ones."""
    version = served(
        "m",
        of("fp32", p95_ms=4.0, need_mb=20.0),
        of("int8", p95_ms=6.0, need_mb=5.0),
        of("tiny", p95_ms=1.0, need_mb=40.0),
    )
    assert steps(version) == (1, 1)
    assert order(version, memory=1)[0] == "int8"
    assert order(version, compute=1)[0] == "tiny"
    assert order(version, compute=1, memory=1)[0] == "int8"  # what does not fit helps nobody


def test_energy_decides_where_it_was_measured_for_all():
    by_time = (of("fp32", p95_ms=4.0), of("int8", p95_ms=2.0))
    assert steps(served("m", *by_time))[1] == 1
    by_joules = tuple(replace(o, joules=j) for o, j in zip(by_time, (0.1, 0.3), strict=True))
    assert steps(served("m", *by_joules))[1] == 0


def test_a_lost_provider_comes_last_whatever_the_pressure():
    version = served("m", of("fp32", provider="CUDAExecutionProvider"), of("int8", p95_ms=9.0))
    steering = Steering()
    steering.lost["CUDAExecutionProvider"] = "gone"
    assert [option.variant for option in steering.order(version)] == ["int8", "fp32"]
    assert "is lost: gone" in steering.why(version.options[0])
    assert steering.why(version.options[1]) == ""


# -- steps of the engine ----------------------------------------------------------------------------------------------

HOT = Pressure(memory=0, compute=1, reason="governor: heat")


def test_a_step_down_and_back_under_load_fails_no_request_and_every_answer_says_why():
    async def story(engine):
        engine.put(shelf(three()))
        seen, stop = [], False

        async def client():
            while not stop:
                said = await answer(engine, "m")
                assert is_of(said, said.parameters["variant"])
                seen.append(said.parameters)

        clients = [asyncio.ensure_future(client()) for _ in range(4)]
        for pressure, variant in ((HOT, "int8"), (replace(HOT, compute=2), "tiny"), (CALM, "fp32")):
            before = len(seen)
            await until(lambda before=before: len(seen) > before + 20)
            engine.steer(pressure)
            await until(lambda variant=variant: rows(engine).keys() == {variant})
            await until(lambda: engine.memory()["hot"] == 1)
        stop = True
        await asyncio.gather(*clients)
        assert {said["variant"] for said in seen} == {"fp32", "int8", "tiny"}
        for said in seen:
            assert said["requested_variant"] == "fp32"
            assert said["degraded"] is (said["variant"] != "fp32")
            if said["degraded"]:
                assert said["degraded_because"] in ("governor: heat", f"fp32@{CPU} is not loaded yet")
        assert engine.switches == 3

    drive(story)


def test_under_pressure_a_model_is_loaded_as_the_step_says_and_wishes_hold():
    async def story(engine):
        engine.steer(HOT)
        engine.put(shelf(three()))
        said = await answer(engine, "m")
        assert is_of(said, "int8")
        assert said.parameters["degraded_because"] == "governor: heat"
        wished = await answer(engine, "m", ask(parameters={"variant": "fp32"}))
        assert is_of(wished, "fp32")
        assert wished.parameters["degraded"] is False
        good = await answer(engine, "m", ask(parameters={"min_quality": 0.95}))
        assert is_of(good, "int8")
        assert (good.parameters["requested_variant"], good.parameters["degraded"]) == ("fp32", True)

    drive(story)


def test_a_step_while_another_is_being_loaded_is_made_after_it():
    async def story(engine):
        engine.put(shelf(three()))
        await answer(engine, "m")
        engine.steer(HOT)
        engine.steer(replace(HOT, compute=2))  # the load of the step before has begun
        await until(lambda: rows(engine).keys() == {"tiny"})
        assert is_of(await answer(engine, "m"), "tiny")

    drive(story)


def test_a_step_to_what_cannot_be_loaded_goes_on_to_the_next_and_is_not_tried_for_ever():
    async def story(engine):
        broken = replace(option(Blob(b"", broken=True), "int8", 20.0, 4.0), quality=0.98)
        engine.put(shelf(served("m", of("fp32", p95_ms=8.0, need_mb=40.0), broken)))
        await answer(engine, "m")
        for _ in range(3):
            engine.steer(replace(HOT))
            await asyncio.sleep(0.05)
        assert broken.open_model.opened <= 2
        assert is_of(await answer(engine, "m"), "fp32")

    drive(story)
