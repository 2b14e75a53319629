"""Whose turn it is: what changes the catalog goes one at a time, whoever asks, and a stop lets nobody wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from agent.base.errors import NotFoundError, TryLaterError
from agent.core.operating import Operations

PATIENCE_S = 30.0


class HaltError(Exception):
    pass


def nothing() -> None:
    pass


def beside(work: Callable[[], object]) -> asyncio.Future[object]:
    """In a job's thread."""
    return asyncio.get_running_loop().run_in_executor(None, work)


def story(tell: Callable[[Operations], Coroutine[Any, Any, None]]) -> None:
    """With operations that have started, and are closed in the end."""

    async def run() -> None:
        operations = Operations()
        operations.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(tell(operations), PATIENCE_S)
        finally:
            await operations.close()

    asyncio.run(run())


def test_a_job_s_step_comes_after_what_is_under_way() -> None:
    async def tell(operations: Operations) -> None:
        order: list[str] = []
        begun, go = threading.Event(), threading.Event()

        def adding(progress: object) -> None:
            begun.set()
            assert go.wait(PATIENCE_S)
            order.append("added")

        def step() -> int:
            order.append("step")
            return 7

        added = asyncio.ensure_future(operations.run("add", adding, lambda event: None))
        await beside(lambda: begun.wait(PATIENCE_S))
        assert await beside(lambda: operations.in_turn("job", step, go.set)) == 7
        await added
        assert order == ["added", "step"]
        assert operations.under_way is None

    story(tell)


def test_what_asks_whether_to_wait_may_end_it_and_nothing_is_begun() -> None:
    async def tell(operations: Operations) -> None:
        done, go = [], threading.Event()
        operations.submit("long", lambda: nothing() if go.wait(PATIENCE_S) else None)

        def look() -> None:
            raise HaltError

        with pytest.raises(HaltError):
            await beside(lambda: operations.in_turn("job", partial(done.append, 1), look))
        go.set()
        await operations.run("next", lambda progress: None, lambda event: None)
        assert not done

    story(tell)


def test_what_a_step_raises_is_its_own() -> None:
    def work() -> None:
        raise NotFoundError("cannot find it")

    async def tell(operations: Operations) -> None:
        with pytest.raises(NotFoundError):
            await beside(lambda: operations.in_turn("job", work, nothing))

    story(tell)


def test_a_stop_ends_the_waiting() -> None:
    async def tell(operations: Operations) -> None:
        done, go = [], threading.Event()
        operations.submit("long", lambda: nothing() if go.wait(PATIENCE_S) else None)
        step = beside(lambda: operations.in_turn("job", partial(done.append, 1), nothing))
        await asyncio.sleep(0.1)
        operations.stop()
        go.set()
        with pytest.raises(TryLaterError, match="stopping"):
            await step
        assert not done
        with pytest.raises(TryLaterError):
            await beside(lambda: operations.in_turn("job", nothing, nothing))

    story(tell)
