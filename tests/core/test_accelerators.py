"""A lost provider: the alarm, tries in a child with growing pauses, and the way back."""

from __future__ import annotations

import asyncio

import pytest

from agent.base.errors import DamagedError, TryLaterError
from agent.core.accelerators import Accelerators
from agent.core.trying import try_once
from agent.infer.engine import Engine, EngineLimits
from tests import onnx_models
from tests.infer.test_engine import Blob, answer, option, shelf
from tests.infer.test_loading import until
from tests.infer.test_lost_provider import GPU, LOST, Board, is_of, two


class Wall:
    """A probe that says what it is told to, and counts."""

    def __init__(self, why=""):
        self.why, self.tries = why, 0

    async def __call__(self, opt):
        assert opt.provider == GPU
        self.tries += 1
        if isinstance(self.why, Exception):
            raise self.why
        return self.why


def drive(story, wall):
    async def main():
        board = Board()
        watch = Accelerators(lambda: engine, wall, first_s=0.05)
        engine = Engine(EngineLimits(100.0, 64, 2), board, report_loss=watch.lose)
        try:
            engine.put(shelf(two()))
            assert is_of(await answer(engine, "m"), "fp32")
            board.failure = LOST
            assert is_of(await answer(engine, "m"), "int8")
            return await asyncio.wait_for(story(engine, board, watch), 60)
        finally:
            watch.stop()
            await engine.close()

    return asyncio.run(main())


def test_the_alarm_lasts_until_the_device_is_well_and_then_it_answers_again():
    wall = Wall("cannot load model: no device")

    async def story(engine, board, watch):
        (finding,) = watch.findings()
        assert (finding.check, finding.level) == ("accelerator", "error")
        assert f"{GPU} is lost: " in finding.text
        await until(lambda: wall.tries >= 2)
        (row,) = watch.status()
        assert (row["provider"], row["reason"]) == (GPU, "cannot load model: no device")
        assert is_of(await answer(engine, "m"), "int8")
        wall.why, board.failure = "", None
        await until(lambda: not watch.findings())
        said = await answer(engine, "m")
        assert is_of(said, "fp32")
        assert said.parameters["degraded"] is False
        assert watch.losses == 1

    drive(story, wall)


def test_a_process_that_cannot_use_the_device_any_more_says_that_a_restart_helps():
    async def story(engine, board, watch):
        board.failure, board.load_failure = None, DamagedError("cannot load model: context is broken")
        await until(lambda: watch.findings()[0].mend.startswith("restart the agent"))
        assert "context is broken" in watch.findings()[0].text
        board.load_failure = None
        await until(lambda: not watch.findings())

    drive(story, Wall())


def test_a_probe_that_has_to_wait_is_made_later():
    wall = Wall(TryLaterError("cannot start: 16 operations are waiting already"))

    async def story(engine, board, watch):
        await until(lambda: wall.tries == 1)
        wall.why, board.failure = "", None
        await until(lambda: not watch.findings())

    drive(story, wall)


def test_what_fails_again_soon_is_tried_less_often():
    wall = Wall()

    async def story(engine, board, watch):
        for _ in range(3):
            board.failure = None
            await until(lambda: not watch.findings())
            board.failure = LOST
            await answer(engine, "m")
        assert watch.status()[0]["next_in_s"] >= 0.3

    drive(story, wall)


# -- the child --------------------------------------------------------------------------------------------------------


def test_a_model_that_runs_in_a_child_is_well():
    assert try_once(option(Blob(onnx_models.linear())), 512, (), lambda: None) == ""


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (option(Blob(onnx_models.linear()), provider="CUDAExecutionProvider"), "is not in this ONNX Runtime"),
        (option(Blob(b"rubbish" * 99)), "cannot load model"),
    ],
)
def test_a_child_says_why_not(made, text):
    assert text in try_once(made, 512, (), lambda: None)


def test_a_model_that_cannot_be_read_is_the_stores_affair():
    with pytest.raises(DamagedError, match="not authentic"):
        try_once(option(Blob(b"", broken=True)), 512, (), lambda: None)
