"""A provider that fails under a request: another option answers it, and it takes over again when it is well."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from agent.base.errors import DamagedError, PeerError, TryLaterError
from agent.infer.engine import Engine, EngineLimits
from agent.infer.runtimes.base import load_runtime
from agent.infer.runtimes.failures import DoubtfulError, ProviderLostError, is_device_failure
from tests import onnx_models
from tests.infer.test_engine import CPU, Blob, answer, ask, option, served, shelf
from tests.infer.test_loading import until
from tests.infer.test_picking import SEEDS, is_of, rows

GPU = "ToyExecutionProvider"


class Board:
    """ONNX Runtime with a second provider: the processor under another name, which fails when told to."""

    def __init__(self):
        self.runtime = load_runtime("onnx")
        self.failure: Exception | None = None
        self.load_failure: Exception | None = None
        self.runs = 0

    def __call__(self, name):
        board = self

        class Session:
            concurrent = True
            stoppable = False

            def __init__(self, session, provider):
                self._session, self.provider = session, provider
                self.inputs, self.outputs, self.close = session.inputs, session.outputs, session.close

            def run(self, inputs, outputs, halt=None):
                if self.provider == GPU:
                    board.runs += 1
                    if board.failure is not None:
                        raise board.failure
                return self._session.run(inputs, outputs, halt)

        class Runtime:
            def load(self, descriptor, options):
                if options.provider == GPU and board.load_failure is not None:
                    raise board.load_failure
                return Session(board.runtime.load(descriptor, replace(options, provider=CPU)), options.provider)

            def trim(self):
                pass

        return Runtime()


LOST = ProviderLostError("cannot run model: ToyExecutionProvider failed: device lost")


def drive(story):
    async def main():
        board, losses = Board(), []
        engine = Engine(
            EngineLimits(100.0, 64, 2), board, report_loss=lambda opt, why: losses.append((opt.candidate, why))
        )
        try:
            return await asyncio.wait_for(story(engine, board, losses), 60)
        finally:
            await engine.close()

    return asyncio.run(main())


def of(variant, provider=CPU, **more):
    return option(Blob(onnx_models.linear(SEEDS[variant])), variant, provider=provider, **more)


def two(name="m"):
    return served(name, of("fp32", GPU), of("int8"))


def test_the_very_request_is_answered_by_the_next_option_and_all_that_follow():
    async def story(engine, board, losses):
        engine.put(shelf(two(), two("n")))
        assert is_of(await answer(engine, "m"), "fp32")
        await answer(engine, "n")
        board.failure, runs = LOST, board.runs
        said = await answer(engine, "m")
        assert is_of(said, "int8")
        assert (said.parameters["requested_backend"], said.parameters["backend"]) == (GPU, CPU)
        assert said.parameters["degraded"] is True
        assert "device lost" in said.parameters["degraded_because"]
        for name in "mn":
            assert is_of(await answer(engine, name), "int8")
        assert board.runs == runs + 1  # nobody runs into it twice, whatever the model
        assert losses == [(f"fp32@{GPU}", str(LOST))]

    drive(story)


def test_many_requests_at_the_moment_of_the_loss_are_all_answered():
    async def story(engine, board, losses):
        engine.put(shelf(two()))
        await answer(engine, "m")
        asked = [asyncio.ensure_future(answer(engine, "m")) for _ in range(20)]
        await asyncio.sleep(0)
        board.failure = LOST
        asked += [asyncio.ensure_future(answer(engine, "m")) for _ in range(20)]
        for said in await asyncio.gather(*asked):
            assert is_of(said, said.parameters["variant"])
        assert len(losses) == 1

    drive(story)


def test_it_takes_over_again_once_it_is_well_and_no_request_waits_for_that():
    async def story(engine, board, losses):
        engine.put(shelf(two()))
        await answer(engine, "m")
        board.failure = LOST
        await answer(engine, "m")
        board.failure = None
        under_way = asyncio.ensure_future(engine.regain(GPU))
        while not under_way.done():
            said = await answer(engine, "m")
            assert is_of(said, said.parameters["variant"])
        assert await under_way == ""
        said = await answer(engine, "m")
        assert (said.parameters["backend"], said.parameters["degraded"]) == (GPU, False)
        await until(lambda: rows(engine).keys() == {"fp32"})

    drive(story)


def test_a_provider_that_cannot_be_loaded_again_stays_lost():
    async def story(engine, board, losses):
        engine.put(shelf(two()))
        await answer(engine, "m")
        board.failure = LOST
        await answer(engine, "m")
        board.failure, board.load_failure = None, DamagedError("cannot load model: context is broken")
        assert "context is broken" in await engine.regain(GPU)
        assert is_of(await answer(engine, "m"), "int8")
        assert len(losses) == 2
        board.load_failure = None
        assert await engine.regain(GPU) == ""
        assert is_of(await answer(engine, "m"), "fp32")

    drive(story)


def test_where_no_other_option_is_the_error_is_told_and_the_next_request_tries_again():
    async def story(engine, board, losses):
        engine.put(shelf(served("m", of("fp32", GPU))))
        await answer(engine, "m")
        board.failure = LOST
        for _ in range(2):
            with pytest.raises(TryLaterError, match="device lost"):
                await answer(engine, "m")
        with pytest.raises(TryLaterError, match="device lost"):
            await answer(engine, "m", ask(parameters={"variant": "fp32"}))
        board.failure = None
        assert is_of(await answer(engine, "m"), "fp32")
        assert len(losses) == 1

    drive(story)


def test_a_fallback_that_cannot_be_loaded_ends_in_an_error_and_not_in_a_circle():
    async def story(engine, board, losses):
        engine.put(shelf(served("m", of("fp32", GPU), option(Blob(b"", broken=True), "int8"))))
        await answer(engine, "m")
        board.failure = LOST
        with pytest.raises(TryLaterError, match="device lost"):
            await answer(engine, "m")

    drive(story)


def test_a_doubtful_refusal_gets_a_second_opinion():
    async def story(engine, board, losses):
        engine.put(shelf(two()))
        await answer(engine, "m")
        board.failure = DoubtfulError("cannot run model: ToyExecutionProvider: something is wrong")
        for turn in range(3):
            said = await answer(engine, "m")
            assert is_of(said, "int8")
            assert said.parameters["degraded_because"].endswith("something is wrong")
            assert len(losses) == (turn == 2)  # once may be chance
        runs = board.runs
        assert is_of(await answer(engine, "m"), "int8")
        assert board.runs == runs

    drive(story)


def test_when_both_refuse_it_is_the_input_and_nothing_is_lost():
    async def story(engine, board, losses):
        picky = Blob(onnx_models.picky())
        spec = {"inputs": (served("x").inputs[0].model_copy(update={"shape": (-1,)}),)}
        spec["outputs"] = (served("x").outputs[0].model_copy(update={"shape": (-1,)}),)
        gpu, host = option(picky, "fp32", provider=GPU), option(Blob(onnx_models.picky()), "int8")
        engine.put(shelf(served("m", gpu, host, **spec)))
        good, bad = ask(np.zeros(3, np.float32)), ask(np.full(3, 999.0, np.float32))
        await answer(engine, "m", good)
        board.failure = DoubtfulError("cannot run model: refused")
        for _ in range(5):
            with pytest.raises(PeerError, match="out of data bounds"):
                await answer(engine, "m", bad)
        board.failure = None
        assert (await answer(engine, "m", good)).parameters["backend"] == GPU
        assert losses == []

    drive(story)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
        "Non-zero status code returned while running Conv node. CUDA error cudaErrorDevicesUnavailable",
        "CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR",
        "clFinish, error code: -36 CL_INVALID_COMMAND_QUEUE",
        "ZE_RESULT_ERROR_DEVICE_LOST",
        "The GPU device has been suspended: DXGI_ERROR_DEVICE_REMOVED",
        "[GPU] Device lost",
    ],
)
def test_words_of_drivers_are_known(text):
    assert is_device_failure(text)


@pytest.mark.parametrize(
    "text",
    [
        "Got invalid dimensions for input: x for the following indices index: 1 Got: 8 Expected: 16",
        "indices element out of data bounds, idx=1999 must be within the inclusive range [-1005,1004]",
        "OpenVINO does not support the following ONNX operations: Loop",
        "Failed to allocate memory for requested buffer of size 68719476736",
    ],
)
def test_what_an_input_or_a_model_causes_is_no_loss(text):
    assert not is_device_failure(text)
