"""The governor at work: looks at the sensors every few seconds, has idle memory given back, steers the engine.

Looks are made in a thread: a sensor behind a slow bus must not hold up requests. Where nothing is loaded there is
nothing to step down, and nobody looks: what looks and decides is made with the first look.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent.base.config import GovernorConfig
from agent.base.errors import AgentError
from agent.core.health import Finding
from agent.infer.shelf import Shelf
from agent.infer.steering import CALM, Pressure, steps

if TYPE_CHECKING:
    from agent.hardware.pressure import Strain, StrainGauge
    from agent.infer.governor import Cause, Governor
    from agent.infer.strain import Thresholds

_LOG = logging.getLogger("edge_agent.governor")
_CAUSES = ("memory", "heat", "power")
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
        self._governor: Governor | None = None
        self._gauge: StrainGauge | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="governor")  # its thread comes with the first look
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
        self._gauge = self._last = None
        if self._governor is not None:
            from agent.infer.governor import Pace  # noqa: PLC0415 - loaded with the first look

            self._governor.pace = Pace(settings.step_down_s, settings.step_up_s)
        if not settings.enabled:
            self._governor = None
            self._engine.steer(CALM)
        self.start()

    async def _run(self) -> None:
        while True:
            if self._stepped_down or self._engine.memory()["held_mb"]:
                await self._look()
            await asyncio.sleep(self._settings.interval_s)

    @property
    def _stepped_down(self) -> bool:
        return self._governor is not None and self._governor.pressure is not CALM

    async def _look(self) -> None:
        from agent.hardware.pressure import Strain, StrainGauge  # noqa: PLC0415 - an idle device does not pay for it
        from agent.infer.governor import Governor, Pace  # noqa: PLC0415 - as above

        settings = self._settings
        if self._gauge is None:
            self._gauge = StrainGauge(self._root or (Path(settings.root) if settings.root else None))
        if self._governor is None:
            self._governor = Governor(Pace(settings.step_down_s, settings.step_up_s))
        loop = asyncio.get_running_loop()
        try:
            strain = await loop.run_in_executor(self._reader, self._gauge, time.monotonic())
        except AgentError as error:  # the root is gone
            if str(error) != self._problem:
                _LOG.warning("the governor sees nothing: %s", error)
            self._problem, strain = str(error), Strain()
        else:
            self._problem = ""
        self._take(self._governor, strain, time.monotonic())

    def _take(self, governor: Governor, strain: Strain, now: float) -> None:
        """Act on one look."""
        from agent.infer.strain import judge, missing_mb  # noqa: PLC0415 - as above

        at = _thresholds(self._settings)
        readings = judge(strain, self._last, at)
        self._last = strain
        if readings["memory"].state in ("pressing", "urgent"):  # idle memory first
            everything = readings["memory"].state == "urgent"
            held = float(self._engine.memory()["held_mb"])
            self._engine.press(held if everything else max(_LEAST_MB, missing_mb(strain, at), held / 8))
        self._looks += 1
        if governor.sample(readings, self._depths(), now):
            pressure = governor.pressure
            _LOG.warning("%s", pressure.reason or "governor: the chosen variants answer again")
            self._engine.steer(pressure)
        elif self._looks % _AGAIN == 0:
            self._engine.steer(governor.pressure)

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
        reasons = self._governor.reasons() if self._governor is not None else []
        if not reasons:
            return []
        mend = "cool the device, check its power supply, or give it less to do"
        return [Finding("governor", "warning", f"stepped down: {'; '.join(reasons)}", mend)]

    def status(self) -> dict[str, Any]:
        """For ``status``: levels with cause and since when, and the last look."""
        now = time.monotonic()
        levels = {
            cause: {"level": steps_down, "of": self._of(cause), "why": why, "for_s": since}
            for cause, steps_down, why, since in self._levels(now)
        }
        return {
            "enabled": self._settings.enabled,
            "levels": levels,
            "changes": self._governor.changes if self._governor is not None else 0,
            "switches": self._engine.switches,
            "sensors": asdict(self._last) if self._last is not None else None,
        }

    def _of(self, cause: str) -> int:
        return next((depth for name, depth in self._deepest.items() if name == cause), 0)

    def record(self) -> dict[str, Any]:
        """For telemetry: how far down, and why."""
        levels = self._levels(time.monotonic())
        return {
            "governor": {cause: steps_down for cause, steps_down, _, _ in levels},
            "governor_why": "; ".join(why for _, steps_down, why, _ in levels if steps_down),
        }

    def metrics(self) -> list[str]:
        """Prometheus text."""
        lines = ["# TYPE edge_agent_governor_level gauge"]
        lines += [
            f'edge_agent_governor_level{{cause="{cause}"}} {steps_down}'
            for cause, steps_down, _, _ in self._levels(time.monotonic())
        ]
        lines.append("# TYPE edge_agent_variant_switches_total counter")
        lines.append(f"edge_agent_variant_switches_total {self._engine.switches}")
        return lines

    def _levels(self, now: float) -> list[tuple[str, int, str, float | None]]:
        """Cause, steps down, why, since how many seconds."""
        if self._governor is None:
            return [(cause, 0, "", None) for cause in _CAUSES]
        return [
            (cause, level.steps, level.why, round(now - level.since, 1) if level.steps else None)
            for cause, level in self._governor.levels.items()
        ]


def _thresholds(config: GovernorConfig) -> Thresholds:
    from agent.infer.strain import Thresholds  # noqa: PLC0415 - as above

    return Thresholds(
        config.memory_some,
        config.memory_full,
        config.available_share,
        config.heat_margin_c,
        config.heat_hysteresis_c,
        config.cap_share,
    )
