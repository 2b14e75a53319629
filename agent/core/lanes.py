"""The fleet's threads: one for each lane of jobs, one for what is desired, and the turn that steps of jobs take.

A job that waits for the world, for bytes say, does so in its lane's thread: adding, verifying and activating go on
meanwhile. The rescue lane waits for nobody; what runs there must bear that.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from agent.base.errors import TryLaterError
from agent.core.operating import Operations
from agent.work.jobs import Lane, Order

_T = TypeVar("_T")


class Lanes:
    """See the module. Any thread may call; ``close`` blocks until what is under way has left."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._threads: dict[Lane, ThreadPoolExecutor] = {
            "normal": ThreadPoolExecutor(1, thread_name_prefix="job"),
            "rescue": ThreadPoolExecutor(1, thread_name_prefix="rescue"),
        }
        self._desired = ThreadPoolExecutor(1, thread_name_prefix="desired")

    def execute(self, lane: Lane, name: str, work: Callable[[], None]) -> None:
        """See ``agent.work.runner.Lanes``."""
        _hand_over(self._threads[lane], name, work)

    def desire(self, name: str, work: Callable[[], None]) -> None:
        """As ``execute``, for a configuration: it waits for the link, and may be what a job that fetches lacks."""
        _hand_over(self._desired, name, work)

    def in_turn(self, order: Order, work: Callable[[], _T], look: Callable[[], None]) -> _T:
        """See ``agent.work.runner.Lanes``."""
        if order.lane == "rescue":
            return work()
        return self._operations.in_turn(f"job {order.job_id} ({order.op})", work, look)

    def close(self) -> None:
        """Wait for what is under way; begin nothing more."""
        for threads in (*self._threads.values(), self._desired):
            threads.shutdown()


def _hand_over(threads: ThreadPoolExecutor, name: str, work: Callable[[], None]) -> None:
    try:
        threads.submit(work)
    except RuntimeError as error:  # shut down
        raise TryLaterError(f"cannot start {name}: the agent is stopping") from error
