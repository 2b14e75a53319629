"""Requests joined by the engine, with real ONNX Runtime sessions: answers, failures, deadlines, what is not joined."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.base.errors import DeadlineError, PeerError
from agent.bundles.manifest import TensorSpec
from agent.infer.gains import Batching, Gain
from agent.infer.runtimes.base import load_runtime
from agent.infer.runtimes.failures import ProviderLostError
from agent.infer.tensors import InferRequest, RequestedOutput, Tensor
from tests import onnx_models
from tests.infer.test_engine import Blob, OneAtATime, answer, ask, drive, option, served, shelf, soon

TIMES = ((1, 0.2), (8, 0.25))
WEIGHTS = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def joined(data, size=8, delay_s=0.0, reason="", **more):
    """An option whose requests are joined."""
    return replace(option(Blob(data), **more), batching=Batching(size, delay_s, Gain(TIMES), reason))


def rows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)


def batches(responses):
    return sorted(response.parameters["batch_requests"] for response in responses)


class Held(OneAtATime):
    """Sessions that wait at a gate; as many runs at once as are asked for."""

    def __init__(self, *, concurrent=True):
        super().__init__()
        self.shapes = []
        self.concurrent = concurrent

    def __call__(self, name):
        runtime, watch = super().__call__(name), self

        class Runtime:
            def load(self, descriptor, options):
                session = runtime.load(descriptor, options)
                type(session).concurrent = watch.concurrent
                run = session.run

                def noted(inputs, outputs, halt):
                    watch.shapes.append({name: array.shape for name, array in inputs.items()})
                    return run(inputs, outputs, halt)

                session.run = noted
                return session

        return Runtime()

    async def busy(self):
        while not self.at_once:
            await asyncio.sleep(0.001)


async def behind_a_run(engine, watch, requests, model="m"):
    """All of them come while a first one runs."""
    watch.gate.clear()
    first = asyncio.ensure_future(answer(engine, model))
    await watch.busy()
    others = [asyncio.ensure_future(answer(engine, model, *request)) for request in requests]
    await asyncio.sleep(0.05)
    watch.gate.set()
    await first
    return await asyncio.gather(*others, return_exceptions=True)


def test_what_comes_while_a_run_goes_on_runs_together_and_each_gets_its_own_rows():
    watch = Held()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear()))))
        given = [rows(count, seed) for seed, count in enumerate((1, 3, 2, 1))]
        seen = await behind_a_run(engine, watch, [(ask(x, id=str(i)),) for i, x in enumerate(given)])
        assert watch.runs == 2
        for index, (x, response) in enumerate(zip(given, seen, strict=True)):
            assert response.id == str(index)
            np.testing.assert_allclose(response.outputs[0].array, x @ WEIGHTS, rtol=1e-4, atol=1e-5)
            assert (response.parameters["batch"], response.parameters["batch_requests"]) == (7, 4)
            assert response.parameters["queue_us"] > 0
        [row] = engine.loaded()
        assert (row["batching"]["size"], row["batching"]["runs"], row["batching"]["requests"]) == (8, 2, 5)

    drive(story, places=1, load=watch)


def test_without_being_asked_for_nothing_is_joined():
    watch = Held()

    async def story(engine):
        engine.put(shelf(served("m", option(Blob(onnx_models.linear())))))
        seen = await behind_a_run(engine, watch, [()] * 4)
        assert watch.runs == 5
        assert all("batch" not in response.parameters for response in seen)
        assert engine.loaded()[0]["batching"] is None

    drive(story, places=1, load=watch)


def test_where_it_does_not_pay_each_runs_alone_and_status_says_why():
    watch = Held()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear(), 1, reason="does not pay"))))
        await behind_a_run(engine, watch, [()] * 4)
        assert watch.runs == 5
        assert engine.loaded()[0]["batching"]["reason"] == "does not pay"

    drive(story, places=1, load=watch)


def test_one_bad_member_fails_alone():
    """An index out of range is found only when the model runs."""
    spec = {"inputs": (TensorSpec(name="x", datatype="FP32", shape=(-1,)),)}
    spec["outputs"] = (TensorSpec(name="y", datatype="FP32", shape=(-1,)),)
    watch = Held()

    def one(value):
        return (ask(np.array([value], np.float32)),)

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.picky()), **spec)))
        await answer(engine, "m", *one(1))
        watch.gate.clear()
        first = asyncio.ensure_future(answer(engine, "m", *one(1)))
        await watch.busy()
        others = [asyncio.ensure_future(answer(engine, "m", *one(value))) for value in (1, 99, 2, 3)]
        await asyncio.sleep(0.05)
        watch.gate.set()
        await first
        seen = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(seen[1], PeerError)
        assert "out of" in str(seen[1])
        assert [response.outputs[0].array.tolist() for response in (seen[0], *seen[2:])] == [[1.0]] * 3
        assert {"x": (4,)} in watch.shapes

    drive(story, places=1, load=watch)


def test_a_wrong_request_is_refused_before_it_joins_and_costs_the_others_nothing():
    watch = Held()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear()))))
        wrong = ask(outputs=(RequestedOutput("z"),))
        seen = await behind_a_run(engine, watch, [(), (ask(np.ones((1, 15), np.float32)),), (wrong,), ()])
        assert [isinstance(one, PeerError) for one in seen] == [False, True, True, False]
        assert watch.runs == 2
        assert engine.unload("m") == 1
        while engine.loaded():  # nobody holds it any more, the refused ones neither
            await asyncio.sleep(0.01)

    drive(story, places=1, load=watch)


def test_only_the_same_shapes_outputs_and_parameters_are_joined():
    spec = {"inputs": (TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),)}
    spec["outputs"] = (TensorSpec(name="y", datatype="FP32", shape=(-1, -1)),)
    watch = Held()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.identity(TensorProto.FLOAT)), **spec)))
        given = [
            ask(np.ones((1, 2), np.float32)), ask(np.ones((1, 3), np.float32)), ask(np.ones((2, 2), np.float32)),
            ask(np.ones((1, 2), np.float32), parameters={"temperature": 1}), ask(np.ones((1, 3), np.float32)),
            ask(np.ones((1, 2), np.float32), parameters={"temperature": True}),
            ask(np.ones((1, 2), np.float32), parameters={"priority": 3, "timeout": 5_000_000}),
        ]  # fmt: skip
        seen = await behind_a_run(engine, watch, [(request,) for request in given])
        assert [one.outputs[0].array.shape for one in seen] == [one.inputs[0].array.shape for one in given]
        assert [one.parameters["batch"] for one in seen] == [4, 2, 4, 1, 2, 1, 4]

    drive(story, places=1, load=watch)


class Turnstile:
    """A gate that lets through as many runs as it is told to."""

    def __init__(self):
        self._free = threading.Semaphore(0)
        self.set = self._free.release

    def wait(self, timeout):
        return self._free.acquire(timeout=timeout)


def test_a_deadline_ends_one_member_and_not_the_batch():
    watch = Held()
    watch.gate = Turnstile()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear()))))
        first = asyncio.ensure_future(answer(engine, "m"))
        await watch.busy()
        before = asyncio.ensure_future(answer(engine, "m", deadline=time.monotonic() + 0.05))
        while_it_runs = asyncio.ensure_future(answer(engine, "m", deadline=time.monotonic() + 0.5))
        patient = asyncio.ensure_future(answer(engine, "m"))
        with pytest.raises(DeadlineError):
            await before
        watch.gate.set()
        await first
        with pytest.raises(DeadlineError):
            await while_it_runs
        watch.gate.set()
        assert (await patient).parameters["batch_requests"] == 2

    drive(story, places=1, load=watch)


def test_whoever_goes_away_leaves_the_others_in_peace_and_the_session_free():
    watch = Held()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear()))))
        watch.gate.clear()
        first = asyncio.ensure_future(answer(engine, "m"))
        await watch.busy()
        waiting = [asyncio.ensure_future(answer(engine, "m")) for _ in range(3)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        first.cancel()
        await asyncio.sleep(0.01)
        watch.gate.set()
        seen = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in seen] == [True, True, False, False]
        assert batches(seen[2:]) == [2, 2]
        engine.unload("m")
        while engine.memory()["hot"]:
            await asyncio.sleep(0.01)

    drive(story, places=1, load=watch)


def test_the_urgent_go_first():
    watch = Held()
    order = []

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear(), size=2))))

        async def tell(name, priority):
            await answer(engine, "m", ask(parameters={"priority": priority}))
            order.append(name)

        watch.gate.clear()
        first = asyncio.ensure_future(answer(engine, "m"))
        await watch.busy()
        given = [("low", 500), ("low", 500), ("usual", 0), ("usual", 0), ("urgent", 1), ("urgent", 1)]
        others = [asyncio.ensure_future(tell(*one)) for one in given]
        await asyncio.sleep(0.05)
        watch.gate.set()
        await asyncio.gather(first, *others)
        assert order == ["urgent", "urgent", "usual", "usual", "low", "low"]

    drive(story, places=1, load=watch)


def test_a_session_that_takes_one_run_at_a_time_gets_one_batch_at_a_time():
    watch = Held(concurrent=False)

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear()))))
        with_default = InferRequest((Tensor("x", "FP32", rows(1)), Tensor("x", "FP32", rows(1))))
        seen = await asyncio.gather(
            *(answer(engine, "m") for _ in range(20)), answer(engine, "m", with_default), return_exceptions=True
        )
        assert isinstance(seen.pop(), PeerError)
        assert all(one.outputs[0].array.shape == (1, 4) for one in seen)
        assert watch.most_at_once == 1
        assert watch.runs < 20

    drive(story, queue=64, places=4, load=watch)


def test_a_session_whose_requests_wait_is_not_closed_for_another_model():
    watch = Held()

    async def story(engine):
        engine.put(
            shelf(
                served("m", joined(onnx_models.linear(), need_mb=60.0)),
                served("other", joined(onnx_models.linear(1), need_mb=60.0)),
            )
        )
        watch.gate.clear()
        first = asyncio.ensure_future(answer(engine, "m"))
        await watch.busy()
        waiting = [asyncio.ensure_future(answer(engine, "m")) for _ in range(3)]
        other = asyncio.ensure_future(answer(engine, "other"))
        await asyncio.sleep(0.05)
        assert [row["model"] for row in engine.loaded()] == ["m"]
        watch.gate.set()
        assert batches(await asyncio.gather(first, *waiting)) == [1, 3, 3, 3]
        await other
        assert [row["model"] for row in engine.loaded()] == ["other"]

    drive(story, places=1, load=watch)


def one_more():
    """x[n, 16] -> y[m, 16]: the rows, and another one. The signature does not show that nothing can be parted."""
    return onnx_models.model(
        [helper.make_node("Concat", ["x", "last"], ["y"], axis=0)],
        [onnx_models.tensor("x", ["n", 16])],
        [onnx_models.tensor("y", ["m", 16])],
        [onnx_models.constant("last", np.ones((1, 16), np.float32))],
    )


def test_a_model_whose_answers_cannot_be_parted_is_found_out_and_answered_singly():
    watch = Held()

    async def story(engine):
        spec = (TensorSpec(name="y", datatype="FP32", shape=(-1, 16)),)
        on_the_shelf = shelf(served("m", joined(one_more()), outputs=spec))
        engine.put(on_the_shelf)
        given = [rows(2, seed) for seed in range(3)]
        seen = await behind_a_run(engine, watch, [(ask(x),) for x in given])
        for x, response in zip(given, seen, strict=True):
            np.testing.assert_array_equal(response.outputs[0].array, np.concatenate([x, np.ones((1, 16), np.float32)]))
        assert "output 'y' of 6 rows has the shape [7, 16]" in engine.loaded()[0]["batching"]["reason"]
        ran = watch.runs
        await behind_a_run(engine, watch, [()] * 3)
        assert watch.runs == ran + 4
        engine.unload("m")
        await behind_a_run(engine, watch, [()] * 3)
        assert watch.runs == ran + 8, "forgotten with the session"

    drive(story, places=1, load=watch)


class LongTogether(Held):
    """One member's values make a batch endless: it runs until it is told to end."""

    def __call__(self, name):
        runtime = super().__call__(name)

        class Runtime:
            def load(self, descriptor, options):
                session = runtime.load(descriptor, options)
                run = session.run

                def endless(inputs, outputs, halt):
                    while len(inputs["x"]) > 1 and not halt.requested:
                        time.sleep(0.005)
                    if halt.requested:
                        raise DeadlineError("cannot run model: it was told to end")
                    return run(inputs, outputs, halt)

                session.run = endless
                return session

        return Runtime()


def test_a_batch_that_takes_far_too_long_is_ended_and_its_members_run_alone():
    watch = LongTogether()

    async def story(engine):
        quick = replace(joined(onnx_models.linear()), batching=Batching(8, 0.0, Gain(((1, 0.001), (8, 0.002)))))
        engine.put(shelf(served("m", quick)))
        seen = await behind_a_run(engine, watch, [()] * 3)
        assert [one.outputs[0].array.shape for one in seen] == [(1, 4)] * 3
        assert all("batch" not in one.parameters for one in seen)

    drive(story, places=1, load=watch)


@pytest.mark.usefixtures("unhurried")
def test_a_lone_request_for_a_fast_model_runs_on_the_loop_and_a_crowd_is_joined():
    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear(), p95_ms=0.02))))
        await answer(engine, "m")
        alone = engine.infer("m", None, ask(), soon())
        assert not asyncio.iscoroutine(alone)
        await asyncio.sleep(0)
        assert not asyncio.iscoroutine(engine.infer("m", None, ask(), soon()))
        seen = await asyncio.gather(*(answer(engine, "m") for _ in range(6)))
        assert max(one.parameters.get("batch", 1) for one in seen) > 1
        threads = threading.active_count()
        seen = await asyncio.gather(*(answer(engine, "m", ask(rows(1, seed))) for seed in range(6)))
        assert batches(seen) == [6] * 6
        for seed, one in enumerate(seen):
            np.testing.assert_allclose(one.outputs[0].array, rows(1, seed) @ WEIGHTS, rtol=1e-4, atol=1e-5)
        assert threading.active_count() == threads
        for _ in range(200):  # and when the crowd is gone, on the loop again
            await answer(engine, "m")
            await asyncio.sleep(0)
        assert not asyncio.iscoroutine(engine.infer("m", None, ask(), soon()))

    drive(story)


def test_a_new_shelf_changes_how_requests_are_joined():
    watch = Held()

    async def story(engine):
        made = joined(onnx_models.linear())
        engine.put(shelf(served("m", made)))
        await behind_a_run(engine, watch, [()] * 4)
        assert watch.runs == 2
        engine.put(shelf(served("m", replace(made, batching=replace(made.batching, size=2)))))
        await behind_a_run(engine, watch, [()] * 4)
        assert watch.runs == 5
        engine.put(shelf(served("m", replace(made, batching=None))))
        await behind_a_run(engine, watch, [()] * 4)
        assert watch.runs == 10

    drive(story, places=1, load=watch)


def test_the_engine_stops_while_batches_wait_and_run():
    async def main():
        from agent.infer.engine import Engine, EngineLimits  # noqa: PLC0415 - as drive() does it

        engine = Engine(EngineLimits(100.0, 64, 1), load_runtime)
        spec = {"outputs": (TensorSpec(name="y", datatype="FP32", shape=(-1, 4)),)}
        engine.put(shelf(served("m", joined(onnx_models.endless()), **spec)))
        waiting = [asyncio.ensure_future(answer(engine, "m")) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert await engine.close()
        seen = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        assert all(isinstance(one, BaseException) for one in seen)

    asyncio.run(main())


def test_a_batch_that_holds_the_loop_up_is_ended_and_the_model_leaves_the_loop():
    watch = LongTogether()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear(), p95_ms=0.02))))
        await answer(engine, "m")
        seen = await asyncio.gather(*(answer(engine, "m") for _ in range(4)))
        assert [one.outputs[0].array.shape for one in seen] == [(1, 4)] * 4
        later = engine.infer("m", None, ask(), soon())
        assert asyncio.iscoroutine(later)
        await later

    drive(story, places=1, load=watch)


def test_a_bad_member_on_the_loop_fails_alone():
    spec = {"inputs": (TensorSpec(name="x", datatype="FP32", shape=(-1,)),)}
    spec["outputs"] = (TensorSpec(name="y", datatype="FP32", shape=(-1,)),)

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.picky(), p95_ms=0.02), **spec)))
        requests = [ask(np.array([value], np.float32)) for value in (1, 99, 2)]
        await answer(engine, "m", requests[0])
        for _ in range(3):
            seen = await asyncio.gather(*(answer(engine, "m", one) for one in requests), return_exceptions=True)
            assert [isinstance(one, PeerError) for one in seen] == [False, True, False]

    drive(story)


def test_a_provider_that_is_lost_in_a_batch_is_told_to_every_member_at_once():
    """What answers them then is another option's affair: see the tests of lost providers."""
    lost = []

    class Losing(Held):
        def __call__(self, name):
            runtime = super().__call__(name)

            class Runtime:
                def load(self, descriptor, options):
                    session = runtime.load(descriptor, options)
                    run = session.run

                    def failing(inputs, outputs, halt):
                        if len(inputs["x"]) > 1:
                            lost.append(len(inputs["x"]))
                            raise ProviderLostError("cannot run model: the provider failed")
                        return run(inputs, outputs, halt)

                    session.run = failing
                    return session

            return Runtime()

    watch = Losing()

    async def story(engine):
        engine.put(shelf(served("m", joined(onnx_models.linear()))))
        seen = await behind_a_run(engine, watch, [()] * 3)
        assert all(isinstance(one, ProviderLostError) for one in seen)
        assert lost == [3]

    drive(story, places=1, load=watch)
