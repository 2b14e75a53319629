"""How core is: what is wrong with it, and what ``status`` says.

Each part tells of itself; here they are brought together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import __version__
from agent.base.errors import AgentError
from agent.base.paths import Paths
from agent.core import health
from agent.core.accelerators import Accelerators
from agent.core.device import Device
from agent.core.governing import Governing
from agent.core.guarding import Guarding
from agent.core.operating import Operations
from agent.core.storecheck import StoreCheck
from agent.core.upkeep import Upkeep
from agent.hardware.sensors import read_sensors
from agent.infer.engine import Engine
from agent.infer.runtimes.probe import Runtimes
from agent.serve.limits import MIB
from agent.store.seals import place_of, read_marks
from agent.store.store import Store

if TYPE_CHECKING:
    from agent.core.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Parts:
    """Who is asked. ``fleet`` is None where nobody says whom the device obeys; ``locked``: memory stays out of swap."""

    paths: Paths
    device: Device
    store: Store
    runtimes: Runtimes
    operations: Operations
    engine: Engine
    accelerators: Accelerators
    governing: Governing
    guarding: Guarding
    upkeep: Upkeep
    fleet: Callable[[], Fleet | None]
    locked: bool


class Condition:
    """``started``: when this core began, by ``time.monotonic``."""

    def __init__(self, parts: Parts, started: float) -> None:
        self._parts = parts
        self._started = started
        self._seals = read_marks(parts.paths.run_dir)
        self._store_check = StoreCheck(parts.store, lambda: parts.operations.tell_loop(self._tell_fleet))

    async def look(self) -> None:
        """Look at what costs time to look at, so that ``status`` is up to date."""
        await self._store_check.look()

    def findings(self) -> list[health.Finding]:
        """What is wrong, as far as it is quick to tell; of the store what is known."""
        parts, fleet = self._parts, self._parts.fleet()
        found = [
            *health.check_device(parts.device),
            *self._store_check.findings(),
            *parts.accelerators.findings(),
            *parts.governing.findings(),
            *parts.guarding.findings(),
        ]
        return found if fleet is None else [*found, *fleet.findings()]

    def _tell_fleet(self) -> None:
        if (fleet := self._parts.fleet()) is not None:
            fleet.changed()

    def status(self) -> dict[str, Any]:
        """For ``status``; on the event loop's thread."""
        parts, device, fleet = self._parts, self._parts.device, self._parts.fleet()
        return {
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "board": device.facts.board,
            "profile": device.profile.id,
            "threads": device.threads,
            "memory_budget_mb": round(device.budget_mb),
            "key_source": parts.store.secret.source,
            "key_place": self.key_place(),
            "generation": parts.store.document.generation,
            "models": parts.engine.index(),
            "loaded": parts.engine.loaded(),
            "cascades": parts.engine.cascades(),
            "probation": parts.guarding.probations.status(),
            "memory": parts.engine.memory(),
            "caches": parts.engine.caches(),
            "process": figures(),
            "under_way": parts.operations.under_way,
            "health": health.verdict(self.findings()),
            "throttled": read_sensors().throttled_now,
            "governor": parts.governing.status(),
            "lost": parts.accelerators.status(),
            **parts.upkeep.status(),
            **(fleet.status() if fleet is not None else {"fleet": None, "link": None, "update": None}),
        }

    def diagnose(self) -> list[dict[str, Any]]:
        """The checks, off the event loop: probing a runtime takes up to a second, and a disk may hang."""
        parts, fleet = self._parts, self._parts.fleet()
        checks: list[Callable[[], list[health.Finding]]] = [
            lambda: health.check_device(parts.device),
            lambda: health.check_store(parts.store),
            lambda: health.check_private((parts.paths.state_dir, parts.paths.device_secret.parent)),
            lambda: health.check_runtimes(parts.runtimes.states(), parts.device.facts),
            health.check_confinement,
            lambda: health.check_swap(parts.device.facts, locked=parts.locked),
            lambda: health.check_clock(time.gmtime().tm_year),
            parts.accelerators.findings,
            parts.governing.findings,
            parts.guarding.findings,
            lambda: fleet.findings() if fleet is not None else [],
        ]
        findings: list[health.Finding] = []
        for check in checks:
            try:
                findings.extend(check())
            except AgentError as error:
                findings.append(health.from_error("core", error))
        return health.as_documents(findings)

    def key_place(self) -> str:
        """Where the device secret is: file, or what its credential is sealed with."""
        return place_of(self._parts.store.secret, self._seals)


def figures() -> dict[str, float]:
    """What this process takes: MB of resident memory, seconds of CPU time."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])  # proc(5): resident
    times = os.times()
    return {
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1),
        "cpu_s": round(times.user + times.system, 2),
    }
