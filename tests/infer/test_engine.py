"""The engine with real ONNX Runtime sessions: loading, evicting, falling back, deadlines, switching."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import numpy as np
import pytest

from agent.base.errors import DamagedError, DeadlineError, NotFoundError, PeerError, TryLaterError
from agent.bundles.manifest import TensorSpec
from agent.infer.engine import Engine, EngineLimits
from agent.infer.runtimes.base import load_runtime
from agent.infer.shelf import Option, Served, Shelf
from agent.infer.tensors import InferRequest, RequestedOutput, Tensor
from tests import onnx_models

CPU = "CPUExecutionProvider"
X = np.arange(16, dtype=np.float32).reshape(1, 16)
SLOW = 5.0  # a p95 in ms that keeps a model off the event loop


class Opened:
    def __init__(self, data):
        self.fd = os.memfd_create("model", os.MFD_CLOEXEC)
        os.write(self.fd, data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)


class Blob:
    """A stored variant: counts how often it is opened, can be slow or broken."""

    def __init__(self, data, *, gate=None, broken=False):
        self.data, self.gate, self.broken, self.opened = data, gate, broken, 0

    def __call__(self):
        self.opened += 1
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.broken:
            raise DamagedError("cannot read blob: chunk 3 is not authentic")
        return Opened(self.data)


def option(blob, variant="fp32", need_mb=10.0, p95_ms=SLOW, provider=CPU):
    return Option(
        f"{variant}@{provider}", variant, "onnx", provider, 1, need_mb, blob, p95_ms, digest=variant + str(id(blob))
    )


def served(model, *options, version="1.0.0", inputs=None, outputs=None):
    return Served(
        model,
        version,
        inputs or (TensorSpec(name="x", datatype="FP32", shape=(-1, 16)),),
        outputs or (TensorSpec(name="y", datatype="FP32", shape=(-1, 4)),),
        tuple(options),
    )


def shelf(*models):
    return Shelf({(m.model, m.version): m for m in models}, {m.model: m.version for m in models})


def ask(data=X, **more):
    return InferRequest((Tensor("x", "FP32", data),), **more)


def soon(seconds=20.0):
    return time.monotonic() + seconds


def drive(story, budget_mb=100.0, queue=8, places=2, load=load_runtime):
    """Run ``story(engine)`` on a loop of its own, and close the engine whatever happens."""

    async def main():
        damage = []
        engine = Engine(EngineLimits(budget_mb, queue, places), load, lambda key, opt, reason: damage.append(reason))
        engine.damage = damage
        try:
            return await asyncio.wait_for(story(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(main())


async def answer(engine, model, request=None, version=None, deadline=None):
    result = engine.infer(model, version, request or ask(), deadline or soon())
    return await result if asyncio.iscoroutine(result) else result


def test_the_first_request_loads_and_the_answer_says_what_ran():
    blob = Blob(onnx_models.linear())

    async def story(engine):
        engine.put(shelf(served("m", option(blob))))
        assert engine.loaded() == []
        first = await answer(engine, "m", ask(id="7"))
        assert (first.model_name, first.model_version, first.id) == ("m", "1.0.0", "7")
        assert first.parameters["variant"] == first.parameters["requested_variant"] == "fp32"
        assert first.parameters["backend"] == CPU
        assert first.parameters["degraded"] is False
        weights = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
        np.testing.assert_allclose(first.outputs[0].array, X @ weights, rtol=1e-4)
        await answer(engine, "m")
        assert blob.opened == 1

    drive(story)


@pytest.mark.usefixtures("unhurried")
def test_a_fast_model_runs_on_the_loop_and_a_slow_one_does_not():
    async def story(engine):
        engine.put(
            shelf(
                served("fast", option(Blob(onnx_models.linear()), p95_ms=0.02)),
                served("slow", option(Blob(onnx_models.linear()))),
            )
        )
        await answer(engine, "fast")
        await answer(engine, "slow")
        assert not asyncio.iscoroutine(engine.infer("fast", None, ask(), soon()))
        later = engine.infer("slow", None, ask(), soon())
        assert asyncio.iscoroutine(later)
        await later

    drive(story)


class OneAtATime:
    """ONNX Runtime whose sessions say that they take one run at a time, and notice when they get two."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.runs, self.at_once, self.most_at_once = 0, 0, 0

    def __call__(self, name):
        runtime, watch = load_runtime(name), self

        class Session:
            concurrent = False
            stoppable = True

            def __init__(self, session):
                self._session = session
                self.inputs, self.outputs, self.provider = session.inputs, session.outputs, session.provider
                self.close = session.close

            def run(self, inputs, outputs, halt):
                watch.at_once += 1
                watch.runs += 1
                watch.most_at_once = max(watch.most_at_once, watch.at_once)
                try:
                    assert watch.gate.wait(20)
                    return self._session.run(inputs, outputs, halt)
                finally:
                    watch.at_once -= 1

        class Runtime:
            def load(self, descriptor, options):
                return Session(runtime.load(descriptor, options))

        return Runtime()


def test_a_session_that_takes_one_run_at_a_time_gets_no_second_one():
    watch = OneAtATime()

    async def story(engine):
        engine.put(shelf(served("m", option(Blob(onnx_models.linear())))))
        seen = await asyncio.gather(*(answer(engine, "m", ask(id=str(n))) for n in range(8)))
        assert [response.id for response in seen] == [str(n) for n in range(8)]
        assert watch.runs == 8
        assert watch.most_at_once == 1

    drive(story, places=4, load=watch)


@pytest.mark.usefixtures("unhurried")
def test_a_fast_model_leaves_the_loop_while_another_request_is_at_its_session():
    watch = OneAtATime()

    async def story(engine):
        engine.put(shelf(served("m", option(Blob(onnx_models.linear()), p95_ms=0.02))))
        watch.gate.clear()
        first = asyncio.ensure_future(answer(engine, "m"))  # loads, so it runs in a thread
        while not watch.at_once:
            await asyncio.sleep(0.001)
        second = engine.infer("m", None, ask(), soon())
        assert asyncio.iscoroutine(second)  # on the loop it would run beside the first one
        watch.gate.set()
        await asyncio.gather(first, second)
        assert not asyncio.iscoroutine(engine.infer("m", None, ask(), soon()))
        assert watch.most_at_once == 1

    drive(story, load=watch)


def test_who_gives_up_waiting_for_a_turn_neither_takes_it_nor_keeps_it():
    watch = OneAtATime()

    async def story(engine):
        engine.put(shelf(served("m", option(Blob(onnx_models.linear())))))
        await answer(engine, "m")
        watch.gate.clear()
        first = asyncio.ensure_future(answer(engine, "m"))
        while not watch.at_once:
            await asyncio.sleep(0.001)
        with pytest.raises(DeadlineError):
            await answer(engine, "m", deadline=soon(0.05))
        gone = asyncio.ensure_future(answer(engine, "m"))
        await asyncio.sleep(0)
        gone.cancel()
        engine.put(shelf())  # the session is closed once the first run is done, and not before
        watch.gate.set()
        assert (await first).outputs[0].array.shape == (1, 4)
        assert watch.runs == 2
        engine.put(shelf(served("m", option(Blob(onnx_models.linear())))))
        await answer(engine, "m")

    drive(story, load=watch)


def test_many_at_once_load_one_session():
    gate = threading.Event()
    blob = Blob(onnx_models.linear(), gate=gate)

    async def story(engine):
        engine.put(shelf(served("m", option(blob))))
        asked = [asyncio.ensure_future(answer(engine, "m")) for _ in range(8)]
        await asyncio.sleep(0.05)
        gate.set()
        assert len(await asyncio.gather(*asked)) == 8
        assert blob.opened == 1

    drive(story)


def test_a_full_queue_says_try_later_and_the_others_are_answered():
    gate = threading.Event()

    async def story(engine):
        engine.put(shelf(served("m", option(Blob(onnx_models.linear(), gate=gate)))))
        asked = [asyncio.ensure_future(answer(engine, "m")) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(TryLaterError, match="3 requests are waiting"):
            await answer(engine, "m")
        gate.set()
        assert len(await asyncio.gather(*asked)) == 3

    drive(story, queue=3)


def test_a_deadline_ends_the_wait_and_the_load_goes_on_for_the_next():
    gate = threading.Event()
    blob = Blob(onnx_models.linear(), gate=gate)

    async def story(engine):
        engine.put(shelf(served("m", option(blob))))
        with pytest.raises(DeadlineError):
            await answer(engine, "m", deadline=soon(0.1))
        gate.set()
        await answer(engine, "m")
        assert blob.opened == 1

    drive(story)


def test_a_wrong_request_costs_no_load():
    blob = Blob(onnx_models.linear())

    async def story(engine):
        engine.put(shelf(served("m", option(blob))))
        for bad, text in (
            (ask(X.reshape(2, 8)), r"shape \[2, 8\], the model takes \[-1, 16\]"),
            (ask(X.reshape(16)), "shape"),
            (InferRequest((Tensor("z", "FP32", X),)), "no such input"),
            (InferRequest((Tensor("x", "INT32", X.astype(np.int32)),)), "datatype INT32"),
            (InferRequest((Tensor("x", "FP32", X), Tensor("x", "FP32", X))), "given twice"),
            (InferRequest(()), "input 'x': missing"),
        ):
            with pytest.raises(PeerError, match=text):
                await answer(engine, "m", bad)
        assert blob.opened == 0
        with pytest.raises(PeerError, match="output 'nope'"):
            await answer(engine, "m", ask(outputs=(RequestedOutput("nope"),)))
        with pytest.raises(NotFoundError, match="no such model"):
            await answer(engine, "other")
        with pytest.raises(NotFoundError, match=r"no version '2\.0\.0'"):
            await answer(engine, "m", version="2.0.0")

    drive(story)


def test_damage_falls_back_to_the_next_variant_and_says_degraded():
    async def story(engine):
        best, spare = option(Blob(b"", broken=True), "int8"), option(Blob(onnx_models.linear()), "fp32")
        engine.put(shelf(served("m", best, spare)))
        seen = await answer(engine, "m")
        assert seen.parameters["degraded"] is True
        assert (seen.parameters["requested_variant"], seen.parameters["variant"]) == ("int8", "fp32")
        assert "not authentic" in engine.damage[0]
        assert engine.loaded()[0]["reason"].startswith("int8@")

    drive(story)


def test_a_provider_that_is_gone_falls_back_to_the_next_and_says_so():
    async def story(engine):
        blob = Blob(onnx_models.linear())
        lost = option(blob, "fp16", provider="CUDAExecutionProvider")
        engine.put(shelf(served("m", lost, option(blob, "fp32"))))
        seen = (await answer(engine, "m")).parameters
        assert (seen["requested_variant"], seen["requested_backend"]) == ("fp16", "CUDAExecutionProvider")
        assert (seen["variant"], seen["backend"], seen["degraded"]) == ("fp32", CPU, True)

    drive(story)


def test_what_stood_in_is_no_longer_degraded_once_it_is_the_choice():
    async def story(engine):
        lost, spare = option(Blob(b"", broken=True), "int8"), option(Blob(onnx_models.linear()), "fp32")
        engine.put(shelf(served("m", lost, spare)))
        await answer(engine, "m")
        opened = spare.open_model.opened
        engine.put(shelf(served("m", lost, spare)))  # something else has changed
        assert engine.loaded()[0]["degraded"] is True
        engine.put(shelf(served("m", spare, lost)))
        row = engine.loaded()[0]
        assert (row["requested_variant"], row["variant"], row["degraded"], row["reason"]) == ("fp32", "fp32", False, "")
        assert (await answer(engine, "m")).parameters["degraded"] is False
        assert spare.open_model.opened == opened  # the session that stood in goes on

    drive(story)


def test_a_new_choice_takes_over_from_what_stood_in():
    async def story(engine):
        lost, spare = option(Blob(b"", broken=True), "int8"), option(Blob(onnx_models.linear()), "fp32")
        third = option(Blob(onnx_models.linear()), "fp16")
        engine.put(shelf(served("m", lost, spare)))
        await answer(engine, "m")
        engine.put(shelf(served("m", third, lost, spare)))
        while engine.loaded()[0]["variant"] != "fp16":
            await asyncio.sleep(0.005)
        assert (await answer(engine, "m")).parameters["degraded"] is False

    drive(story)


def test_when_no_variant_can_be_read_the_error_names_each_and_other_models_answer():
    async def story(engine):
        engine.put(
            shelf(
                served("bad", option(Blob(b"", broken=True), "int8"), option(Blob(b"garbage" * 99), "fp32")),
                served("good", option(Blob(onnx_models.linear()))),
            )
        )
        with pytest.raises(DamagedError, match=r"int8@.*not authentic.*fp32@.*cannot load model"):
            await answer(engine, "bad")
        await answer(engine, "good")

    drive(story)


def test_the_budget_evicts_the_least_recently_used_and_never_fails_a_request():
    blobs = {name: Blob(onnx_models.linear()) for name in "abc"}

    async def story(engine):
        engine.put(shelf(*(served(name, option(blob)) for name, blob in blobs.items())))
        for name in "abac":
            await answer(engine, name)
        assert {row["model"] for row in engine.loaded()} == {"a", "c"}  # b was used longest ago
        await answer(engine, "b")
        assert blobs["b"].opened == 2
        assert blobs["a"].opened == 1

    drive(story, budget_mb=25)


def test_two_models_that_do_not_fit_together_are_served_in_turn():
    blobs = {name: Blob(onnx_models.linear()) for name in "ab"}

    async def story(engine):
        engine.put(shelf(*(served(name, option(blob, need_mb=80)) for name, blob in blobs.items())))
        asked = [answer(engine, "ab"[index % 2]) for index in range(8)]
        assert len(await asyncio.gather(*asked)) == 8
        assert len(engine.loaded()) == 1

    drive(story)


def test_a_model_larger_than_the_budget_is_still_served():
    async def story(engine):
        engine.put(shelf(served("huge", option(Blob(onnx_models.linear()), need_mb=500))))
        await answer(engine, "huge")

    drive(story)


def test_another_choice_takes_over_once_it_is_loaded_and_removed_models_are_gone():
    old, new = Blob(onnx_models.linear(0)), Blob(onnx_models.linear(1))

    async def story(engine):
        before = option(old, "fp32")
        engine.put(shelf(served("m", before)))
        assert (await answer(engine, "m")).parameters["variant"] == "fp32"
        engine.put(shelf(served("m", option(new, "int8"), before)))
        # Until the new one is loaded the old one goes on answering: nobody waits, nobody fails.
        assert (await answer(engine, "m")).parameters["variant"] == "fp32"
        while (await answer(engine, "m")).parameters["variant"] != "int8":
            await asyncio.sleep(0.01)
        engine.put(shelf())
        assert engine.loaded() == []
        with pytest.raises(NotFoundError):
            await answer(engine, "m")

    drive(story)


def test_a_request_under_way_outlives_the_removal_of_its_model():
    async def story(engine):
        heavy = served(
            "m",
            option(Blob(onnx_models.heavy(side=1024, layers=24))),
            inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1024)),),
            outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1024)),),
        )
        engine.put(shelf(heavy))
        await engine.preload("m")
        request = InferRequest((Tensor("x", "FP32", np.ones((64, 1024), np.float32)),))
        under_way = asyncio.ensure_future(answer(engine, "m", request))
        await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        engine.put(shelf())
        assert (await under_way).outputs[0].array.shape == (64, 1024)

    drive(story)


def test_strings_go_in_and_come_out_as_bytes():
    spec = {"datatype": "BYTES", "shape": (-1,)}

    async def story(engine):
        engine.put(
            shelf(
                served(
                    "s",
                    option(Blob(onnx_models.strings())),
                    inputs=(TensorSpec(name="s", **spec),),
                    outputs=(TensorSpec(name="t", **spec),),
                )
            )
        )
        texts = np.array(["käse".encode(), b"", b"x" * 1000], dtype=object)
        seen = await answer(engine, "s", InferRequest((Tensor("s", "BYTES", texts),)))
        assert list(seen.outputs[0].array) == list(texts)
        with pytest.raises(PeerError, match="element 0 is not UTF-8"):
            await answer(engine, "s", InferRequest((Tensor("s", "BYTES", np.array([b"\xff"], dtype=object)),)))

    drive(story)


def test_nothing_new_is_loaded_once_closing():
    async def story(engine):
        engine.put(shelf(served("m", option(Blob(onnx_models.linear())))))
        await engine.close()
        assert not engine.ready()
        assert not engine.model_ready("m")
        with pytest.raises(TryLaterError, match="stopping"):
            await answer(engine, "m")

    drive(story)


def test_metadata_and_index_tell_the_truth():
    async def story(engine):
        empty = Served("broken", "1.0.0", (), (), (), "fp32 is damaged or missing")
        engine.put(shelf(served("m", option(Blob(onnx_models.linear()))), empty))
        assert engine.model_metadata("m") == {
            "name": "m",
            "versions": ["1.0.0"],
            "platform": "onnx_CPUExecutionProvider",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        }
        assert engine.index() == [
            {"name": "broken", "version": "1.0.0", "state": "UNAVAILABLE", "reason": "fp32 is damaged or missing"},
            {"name": "m", "version": "1.0.0", "state": "READY", "reason": ""},
        ]
        engine.put(shelf(empty))
        assert [row["name"] for row in engine.index()] == ["broken"]
        engine.put(shelf(served("m", option(Blob(onnx_models.linear()))), empty))
        assert not engine.model_ready("broken")
        with pytest.raises(DamagedError, match="damaged or missing"):
            await answer(engine, "broken")

    drive(story)
