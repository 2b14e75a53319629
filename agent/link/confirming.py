"""Tells core what the broker has taken. What core does not hear now it gives again, and it is published twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from agent.base.errors import DamagedError
from agent.link.core_client import CoreAbsentError, CoreRefusalError
from agent.link.settings import Message

_LOG = logging.getLogger("edge_agent.link")

_MOST = 4096
_AT_ONCE = 256
_RETRY_S = (0.1, 10.0)


class Confirmed(Protocol):
    """What this needs of core."""

    async def confirmed(self, ids: Iterable[int | str]) -> None: ...


class Confirmations:
    """``put`` what was taken; ``run`` until cancelled. Bounded: the oldest go first."""

    def __init__(self, core: Confirmed) -> None:
        self._core = core
        self._waiting: dict[int | str, None] = {}
        self._due = asyncio.Event()

    def put(self, message: Message) -> None:
        """The broker has taken it."""
        if message.confirm:
            while len(self._waiting) >= _MOST:
                self._waiting.pop(next(iter(self._waiting)))
            self._waiting[message.id] = None
            self._due.set()

    async def run(self) -> None:
        """Tell core, while it is there."""
        pause_s = _RETRY_S[0]
        while True:
            await self._due.wait()
            ids = list(self._waiting)[:_AT_ONCE]
            try:
                await self._core.confirmed(ids)
            except CoreAbsentError:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_S[1])
                continue
            except (CoreRefusalError, DamagedError) as error:
                _LOG.warning("confirmations are not taken: %s", error)
            pause_s = _RETRY_S[0]
            for number in ids:
                self._waiting.pop(number, None)
            if not self._waiting:
                self._due.clear()
