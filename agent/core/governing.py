"""The governor at work: looks at the sensors every few seconds, has idle memory given back, steers the engine.

Looks are made in a thread: a sensor behind a slow bus must not hold up requests. Where nothing is loaded there is
nothing to step down, and a look is rare.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from agent.base.config import GovernorConfig
from agent.base.errors import AgentError
from agent.core.health import Finding
from agent.hardware.pressure import Strain, StrainGauge
from agent.infer.governor import CAUSES, Cause, Governor, Pace
from agent.infer.shelf import Shelf
from agent.infer.steering import CALM, Pressure, steps
from agent.infer.strain import Thresholds, judge, missing_mb

_LOG = logging.getLogger("edge_agent.governor")
#: While nothing is loaded a look is so many times rarer.
_IDLE = 6
#: Every so many looks, options that found no room are tried again.
_AGAIN = 12
#: The least that is asked back at once.
_LEAST_MB = 32.0


class Steered(Protocol):
    """What the governor needs of the engine."""

    @property
    def shelf(self) -> Shelf: ...
    @property
    def switches(self) -> int: ...
    def steer(self, pressure: Pressure) -> None: ...
    def press(self, size_mb: float) -> None: ...
    def memory(self) -> dict[str, Any]: ...


class Governing:
    """``start``, ``stop`` and ``reload`` belong to the event loop's thread. ``config`` is what holds now."""

    def __init__(self, config: Callable[[], GovernorConfig], engine: Steered, root: Path | None = None) -> None:
        self._config = config
        self._engine = engine
        self._root = root
        self._settings = config()
        self._governor = Governor(_pace(self._settings))
        self._gauge = self._make_gauge()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="governor")
        self._task: asyncio.Task[None] | None = None
        self._last: Strain | None = None
        self._problem = ""
        self._shelf: Shelf | None = None
        self._deepest: dict[Cause, int] = {}
        self._looks = 0

    def start(self) -> None:
        """Begin to look."""
        if self._settings.enabled:
            self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """End; harmless when repeated."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._reader.shutdown(wait=False)

    def reload(self) -> None:
        """The configuration may be another one. Switched off, the chosen options answer again."""
        settings = self._config()
        if settings == self._settings:
            return
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._settings = settings
        self._gauge, self._last = self._make_gauge(), None
        self._governor.pace = _pace(settings)
        if not settings.enabled:
            self._governor = Governor(_pace(settings))
            self._engine.steer(CALM)
        self.start()

    def _make_gauge(self) -> StrainGauge:
        root = self._root or (Path(self._settings.root) if self._settings.root else None)
        return StrainGauge(root)

    async def _run(self) -> None:
        while True:
            await self._look()
            busy = self._engine.memory()["hot"] or self._governor.pressure is not CALM
            await asyncio.sleep(self._settings.interval_s * (1 if busy else _IDLE))

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            strain = await loop.run_in_executor(self._reader, self._gauge, time.monotonic())
        except AgentError as error:  # the root is gone
            if str(error) != self._problem:
                _LOG.warning("the governor sees nothing: %s", error)
            self._problem, strain = str(error), Strain()
        else:
            self._problem = ""
        self._take(strain, time.monotonic())

    def _take(self, strain: Strain, now: float) -> None:
        """Act on one look."""
        at = _thresholds(self._settings)
        readings = judge(strain, self._last, at)
        self._last = strain
        if readings["memory"].state in ("pressing", "urgent"):  # idle memory first
            everything = readings["memory"].state == "urgent"
            held = float(self._engine.memory()["held_mb"])
            self._engine.press(held if everything else max(_LEAST_MB, missing_mb(strain, at), held / 8))
        self._looks += 1
        if self._governor.sample(readings, self._depths(), now):
            pressure = self._governor.pressure
            _LOG.warning("%s", pressure.reason or "governor: the chosen variants answer again")
            self._engine.steer(pressure)
        elif self._looks % _AGAIN == 0:
            self._engine.steer(self._governor.pressure)

    def _depths(self) -> dict[Cause, int]:
        """How many steps any active version has."""
        shelf = self._engine.shelf
        if shelf is not self._shelf:
            self._shelf = shelf
            active = [shelf.versions[key] for key in shelf.active.items() if key in shelf.versions]
            depths = [steps(served) for served in active if len(served.options) > 1] or [(0, 0)]
            memory, compute = (max(column) for column in zip(*depths, strict=True))
            self._deepest = {"memory": memory, "heat": compute, "power": compute}
        return self._deepest

    # -- telling ------------------------------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """A warning while anything is stepped down; its text is the same until a level changes."""
        if self._problem:
            return [Finding("governor", "warning", self._problem, "correct root in [governor]")]
        reasons = self._governor.reasons()
        if not reasons:
            return []
        mend = "cool the device, check its power supply, or give it less to do"
        return [Finding("governor", "warning", f"stepped down: {'; '.join(reasons)}", mend)]

    def status(self) -> dict[str, Any]:
        """For ``status``: levels with cause and since when, and the last look."""
        now = time.monotonic()
        levels = {
            cause: {
                "level": level.steps,
                "of": self._deepest.get(cause, 0),
                "why": level.why,
                "for_s": round(now - level.since, 1) if level.steps else None,
            }
            for cause, level in self._governor.levels.items()
        }
        return {
            "enabled": self._settings.enabled,
            "levels": levels,
            "changes": self._governor.changes,
            "switches": self._engine.switches,
            "sensors": asdict(self._last) if self._last is not None else None,
        }

    def record(self) -> dict[str, Any]:
        """For telemetry: how far down, and why."""
        levels = self._governor.levels
        return {
            "governor": {cause: levels[cause].steps for cause in CAUSES},
            "governor_why": "; ".join(self._governor.reasons()),
        }

    def metrics(self) -> list[str]:
        """Prometheus text."""
        lines = ["# TYPE edge_agent_governor_level gauge"]
        lines += [
            f'edge_agent_governor_level{{cause="{cause}"}} {level.steps}'
            for cause, level in self._governor.levels.items()
        ]
        lines.append("# TYPE edge_agent_variant_switches_total counter")
        lines.append(f"edge_agent_variant_switches_total {self._engine.switches}")
        return lines


def _pace(config: GovernorConfig) -> Pace:
    return Pace(config.step_down_s, config.step_up_s)


def _thresholds(config: GovernorConfig) -> Thresholds:
    return Thresholds(
        config.memory_some,
        config.memory_full,
        config.available_share,
        config.heat_margin_c,
        config.heat_hysteresis_c,
        config.cap_share,
    )
