"""The bridge between the event loop and the blocking operations.

Operations run one at a time in a thread of their own, so that the catalog has one writer and trials never compete; what
they ask of the serving side is done on the event loop's thread, which alone changes the engine. A stop ends what is
under way at its next step (``go_on``, or its next word of progress): a trial may have minutes to go.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from agent.base.errors import TryLaterError

_T = TypeVar("_T")
#: Operations that may wait for their turn; each holds a connection and perhaps a descriptor.
_MOST_WAITING = 16
#: How often who waits for a turn is asked whether still to.
_LOOK_S = 0.5

Progress = Callable[[Mapping[str, Any]], None]


class Operations:
    """Runs blocking work one piece at a time. ``start`` and ``run`` are for the event loop's thread."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="operation")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._futures: set[asyncio.Future[Any]] = set()
        self._doing = ""
        self._since = 0.0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Remember the loop on which the serving side lives."""
        self._loop = loop

    @property
    def under_way(self) -> dict[str, Any] | None:
        """What is being done now and for how many seconds, for ``status``."""
        if not self._doing:
            return None
        return {"operation": self._doing, "seconds": round(time.monotonic() - self._since, 1)}

    async def run(
        self,
        name: str,
        work: Callable[[Progress], _T],
        progress: Progress,
        at_end: Callable[[], None] = lambda: None,
    ) -> _T:
        """Do ``work`` when its turn comes; its progress arrives on this thread. TryLaterError when too many wait.

        A caller that goes away does not stop the work: half an installation helps nobody. ``at_end`` is called when
        the work is over, or was never begun; what the work needs must live until then, and the caller may not.
        """
        loop = asyncio.get_running_loop()

        def tell(event: Mapping[str, Any]) -> None:
            self.go_on()
            loop.call_soon_threadsafe(progress, event)

        def named() -> _T:
            self.go_on()
            self._doing, self._since = name, time.monotonic()
            try:
                return work(tell)
            finally:
                self._doing = ""

        try:
            self._require_room(name)
            future = loop.run_in_executor(self._executor, named)
        except BaseException:
            at_end()
            raise
        self._futures.add(future)
        future.add_done_callback(self._done)
        future.add_done_callback(lambda _: at_end())
        return await asyncio.shield(future)

    def submit(self, name: str, work: Callable[[], None]) -> None:
        """From any thread: have ``work`` done in its turn, without waiting. TryLaterError when too many wait."""
        self._require_room(name)
        self._submit(name, work)

    def in_turn(self, name: str, work: Callable[[], _T], look: Callable[[], None]) -> _T:
        """From a job's thread: the result of ``work``, done in its turn. TryLaterError when the agent is stopping.

        While it waits ``look`` is called now and then, and may be so when ``work`` has just begun; what it raises is
        raised, and ``work`` not begun.
        """
        future = self._submit(name, work)
        while not wait([future], _LOOK_S).done:
            if not future.running():
                try:
                    look()
                except BaseException:
                    if future.cancel():
                        raise  # else it has just begun, and asks for itself
        return future.result()

    def _submit(self, name: str, work: Callable[[], _T]) -> Future[_T]:
        loop = self._loop
        if loop is None:
            raise TryLaterError(f"cannot start {name}: the agent has not started")

        def named() -> _T:
            self.go_on()
            self._doing, self._since = name, time.monotonic()
            try:
                return work()
            finally:
                self._doing = ""

        def adopt() -> None:
            wrapped = asyncio.wrap_future(future)
            self._futures.add(wrapped)
            wrapped.add_done_callback(self._done)

        try:
            future = self._executor.submit(named)
        except RuntimeError as error:  # shut down
            raise TryLaterError(f"cannot start {name}: the agent is stopping") from error
        loop.call_soon_threadsafe(adopt)
        return future

    def _require_room(self, name: str) -> None:
        self.go_on()
        if len(self._futures) >= _MOST_WAITING:
            raise TryLaterError(f"cannot start {name}: {len(self._futures)} operations are waiting already")

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._futures.discard(future)
        if not future.cancelled():
            future.exception()  # seen, also when the caller went away

    def go_on(self) -> None:
        """TryLaterError once the agent is stopping. For operations to ask between steps, from their own thread."""
        if self._stopping.is_set():
            raise TryLaterError("cannot go on: the agent is stopping", hint="try again when it runs again")

    def on_loop(self, work: Callable[[], _T]) -> _T:
        """From the operations' thread: do ``work`` on the event loop's thread and wait for its result."""

        async def call() -> _T:
            return work()

        return self.await_on_loop(call())

    def tell_loop(self, work: Callable[[], object]) -> None:
        """From any thread: have ``work`` done on the event loop's thread some time, if it turns."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def await_on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        """From the operations' thread: run a coroutine on the event loop's thread and wait for its result."""
        if self._loop is None:
            work.close()
            raise TryLaterError("cannot reach the serving side: it has not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """Begin the end: what is under way ends at its next step, what waits is not begun."""
        self._stopping.set()

    async def close(self) -> None:
        """Wait for what is under way. The loop goes on turning meanwhile: the work may be waiting for it."""
        self.stop()
        if self._futures:
            await asyncio.wait(list(self._futures))
        # Not here: what was handed over just before the stop is not among them, and may need this thread.
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
