"""Providers that failed while they ran: told as an alarm, tried again in a child with growing pauses, taken back.

A child of its own tells whether the device is well: what a broken driver does to a process must not happen to this
one. When the child is well and the model cannot be loaded here, this process holds a broken context: only a new start
helps, and the alarm says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from agent.base.errors import AgentError
from agent.core.health import Finding
from agent.infer.shelf import Option

_LOG = logging.getLogger("edge_agent.accelerators")
_FIRST_S, _LONGEST_S = 5.0, 600.0


class Regaining(Protocol):
    """What is needed of the engine."""

    async def regain(self, provider: str) -> str: ...


#: Whether the option runs in a fresh child: empty, or why not. Called on the event loop's thread, takes its time.
Probe = Callable[[Option], Awaitable[str]]


@dataclass(slots=True)
class _Lost:
    option: Option
    reason: str
    since: float
    pause_s: float = _FIRST_S
    tries: int = 0
    #: A child was well, and this process was not.
    stuck: bool = False


class Accelerators:
    """``lose`` and ``stop`` are for the event loop's thread."""

    def __init__(self, engine: Callable[[], Regaining], probe: Probe, *, first_s: float = _FIRST_S) -> None:
        self._engine = engine
        self._probe = probe
        self._first_s = first_s
        self._lost: dict[str, _Lost] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: When a provider came back, and the pause before the next try had it not: what fails again is no news.
        self._before: dict[str, tuple[float, float]] = {}
        self.losses = 0

    def lose(self, option: Option, reason: str) -> None:
        """That option's provider has failed."""
        provider = option.provider
        if (known := self._lost.get(provider)) is not None:
            known.reason = reason
            return
        self.losses += 1
        _LOG.error("%s is lost: %s", provider, reason)
        now = time.monotonic()
        came_back, pause_s = self._before.get(provider, (-_LONGEST_S, 0.0))
        pause_s = max(self._first_s, pause_s) if now - came_back < _LONGEST_S else self._first_s
        self._lost[provider] = _Lost(option, reason, now, pause_s)
        task = self._tasks[provider] = asyncio.get_running_loop().create_task(self._mend(provider))
        task.add_done_callback(lambda _: self._tasks.pop(provider, None))

    def stop(self) -> None:
        """End; harmless when repeated."""
        for task in self._tasks.values():
            task.cancel()

    async def _mend(self, provider: str) -> None:
        lost = self._lost[provider]
        while True:
            await asyncio.sleep(lost.pause_s)
            lost.pause_s = min(_LONGEST_S, lost.pause_s * 2)
            lost.tries += 1
            try:
                why = await self._probe(lost.option)
                if not why:
                    why = await self._engine().regain(provider)
                    lost.stuck = bool(why)
            except AgentError as error:
                why = str(error)
            if not why:
                _LOG.warning("%s is well again", provider)
                del self._lost[provider]
                self._before[provider] = (time.monotonic(), lost.pause_s)
                return
            lost.reason = why
            _LOG.warning("%s is still lost, tried again in %.0f s: %s", provider, lost.pause_s, why)

    def findings(self) -> list[Finding]:
        """An error for each provider that is lost."""
        return [
            Finding(
                "accelerator",
                "error",
                f"{provider} is lost: {lost.reason}",
                "restart the agent: the device is well, this process cannot use it any more"
                if lost.stuck
                else "check the device and its driver; it is tried again by itself",
            )
            for provider, lost in self._lost.items()
        ]

    def status(self) -> list[dict[str, Any]]:
        """For ``status``."""
        now = time.monotonic()
        return [
            {
                "provider": provider,
                "reason": lost.reason,
                "for_s": round(now - lost.since, 1),
                "tries": lost.tries,
                "next_in_s": round(lost.pause_s, 1),
            }
            for provider, lost in self._lost.items()
        ]


def probing(run: Callable[..., Awaitable[str]], memory_mb: int, cpus: tuple[int, ...]) -> Probe:
    """A probe that runs on the operations' thread."""

    async def probe(option: Option) -> str:
        def work(tell: Callable[[dict[str, Any]], None]) -> str:
            from agent.core.trying import try_once  # noqa: PLC0415 - nothing is lost on most devices

            return try_once(option, memory_mb, cpus, partial(tell, {"stage": "try", "candidate": option.candidate}))

        return await run(f"trying {option.provider}", work, lambda event: None)

    return probe
