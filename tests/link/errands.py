"""Core's desk behind the real rows on a real socket, and a ``Delivery`` on a loop of its own: no broker, no jobs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from agent.base.config import DeliveryConfig
from agent.core.incoming_api import IncomingApi
from agent.link.blocks import BlockPatience
from agent.link.connection import LOST
from agent.link.core_client import CoreClient
from agent.link.delivery import Delivery, Patiences
from agent.link.progress import Progress
from agent.link.tasks import end
from agent.link.web import Patience
from agent.serve.admin import admin_server
from agent.serve.server import Server
from agent.trust.desk import Desk
from tests.serve.running import Running

#: Short enough for a test. A busy machine makes a good mirror slow, too: it is tried again.
MIRROR, BLOCKS = Patience(1.0, 4096), BlockPatience(0.1, 4)

Say = Callable[[str, bytes], int]


class Site:
    """``with Site(folder, mirrors=[…]) as site``: what the desk wants is brought. ``say`` is the way to the broker."""

    def __init__(
        self, folder: Path, say: Say = lambda topic, payload: LOST, *, longest_s: float = 20.0, **delivery: object
    ) -> None:
        self._patiences = Patiences(MIRROR, BLOCKS, longest_s)
        self.desk = Desk()
        self.config = DeliveryConfig(**delivery)  # type: ignore[arg-type]
        self._path = folder / "admin.sock"
        self._say = say
        self.delivery: Delivery

    def _make(self) -> Server:
        self.api = IncomingApi(self.desk, lambda: self.config)
        self.api.start()
        return admin_server(self.api.routes(), link_uid=None)

    def change(self, **delivery: object) -> None:
        """Another configuration."""
        self.config = DeliveryConfig(**delivery)  # type: ignore[arg-type]
        self._running.look(self.api.wake)

    def __enter__(self) -> Site:
        self._running = Running(self._make, self._path).__enter__()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        made = threading.Event()
        asyncio.run_coroutine_threadsafe(self._run(made), self.loop)
        assert made.wait(30)
        return self

    async def _run(self, made: threading.Event) -> None:
        client = CoreClient(self._path)
        try:
            self.delivery = Delivery(
                client, self._said, Progress(self.loop.time), self._patiences, lambda low, high: min(high, 0.05)
            )
            made.set()
            await self.delivery.run()
        finally:
            client.close()

    def _said(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        answer: asyncio.Future[int] = self.loop.create_future()
        answer.set_result(self._say(topic, payload))
        return answer

    def block(self, xfer: str, payload: bytes) -> None:
        """As if it had come from the broker."""
        self.loop.call_soon_threadsafe(self.delivery.take_block, xfer, payload)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.look(self.api.stop)

        async def work() -> None:
            await end(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

        asyncio.run_coroutine_threadsafe(work(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()
        self._running.__exit__(None, None, None)
