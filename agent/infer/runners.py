"""The threads that run sessions: as many runs at once as the cores allow, shared fairly among models.

Invariants: a run takes a place for each thread of its session; the next places go to the model that was served longest
ago, also where its run has to wait for several, so that a long queue before one model is no queue before another; a run
that lasts longer than ``patience_s`` gives its places to others and goes on beside them, and its model gets no further
place until it has ended. So no model can hold up the others, however long its runs take.
All methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

#: Runs that may go on beside the places. When they are all taken, a long run keeps its places.
_SPARE = 8


class Job:
    """One run, waiting or under way. ``future`` is done when it has really ended, or was withdrawn."""

    __slots__ = ("future", "long", "model", "started", "width", "work")

    def __init__(self, model: str, width: int, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.model = model
        self.width = width
        self.work = work
        self.future = future
        self.started = self.long = False


class Runners:
    """Runs with ``places`` threads in all at once, and some more that take long."""

    def __init__(self, places: int, patience_s: float = 1.0) -> None:
        self._most = places
        self._executor = ThreadPoolExecutor(places + _SPARE, thread_name_prefix="run")
        self._patience_s = patience_s
        self._places = places
        self._spare = _SPARE
        self._queues: dict[str, deque[Job]] = {}  # in the order in which the models were served last
        self._long: Counter[str] = Counter()
        self._running: set[asyncio.Future[Any]] = set()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and not self._queues

    def submit(self, model: str, work: Callable[[], Any], threads: int = 1) -> Job:
        """Run ``work``, which starts so many threads, in one of ours when its turn comes."""
        job = Job(model, min(threads, self._most), work, asyncio.get_running_loop().create_future())
        self._queues.setdefault(model, deque()).append(job)
        self._start_next()
        return job

    def withdraw(self, job: Job) -> None:
        """Nobody waits for it any more: it is not begun. One that is under way must be ended by other means."""
        if self._take_out(job):
            self._start_next()

    def _take_out(self, job: Job) -> bool:
        if job.started or job.future.done():
            return False
        queue = self._queues[job.model]
        queue.remove(job)
        if not queue:
            del self._queues[job.model]
        job.future.cancel()
        return True

    async def close(self, timeout_s: float) -> bool:
        """Withdraw what waits, wait for what runs; whether all of it has ended."""
        for queue in list(self._queues.values()):
            for job in list(queue):
                self._take_out(job)
        if self._running:
            await asyncio.wait(list(self._running), timeout=timeout_s)
        self._executor.shutdown(wait=not self._running)
        return not self._running

    def _start_next(self) -> None:
        while (job := self._next()) is not None:
            self._places -= job.width
            job.started = True
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._executor, job.work)
            self._running.add(running)
            timer = loop.call_later(self._patience_s, self._let_others, job)
            running.add_done_callback(partial(self._ended, job, timer))

    def _next(self) -> Job | None:
        for model, queue in self._queues.items():
            if not self._long[model]:
                if queue[0].width > self._places:
                    return None
                del self._queues[model]
                job = queue.popleft()
                if queue:
                    self._queues[model] = queue  # behind the others
                return job
        return None

    def _let_others(self, job: Job) -> None:
        if self._spare:
            job.long = True
            self._spare -= 1
            self._long[job.model] += 1
            self._places += job.width
            self._start_next()

    def _ended(self, job: Job, timer: asyncio.TimerHandle, running: asyncio.Future[Any]) -> None:
        timer.cancel()
        self._running.discard(running)
        if job.long:
            self._spare += 1
            self._long[job.model] -= 1
            if not self._long[job.model]:
                del self._long[job.model]
        else:
            self._places += job.width
        error = None if running.cancelled() else running.exception()
        if not job.future.done():
            if running.cancelled():
                job.future.cancel()
            elif error is not None:
                job.future.set_exception(error)
            else:
                job.future.set_result(running.result())
        self._start_next()
