"""Records for the fleet, and alerts. What is measured and how often is configuration; nothing here blocks for long.

An alert is a retained message while a finding of ``health`` lasts, and an empty one when it is over, so that a fleet
that was away sees what is wrong now and nothing that was wrong before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent.base.clock import TrustedClock, iso
from agent.base.config import TelemetryConfig
from agent.core.health import Finding
from agent.core.outgoing import Outgoing
from agent.hardware.sensors import Readings

_LOG = logging.getLogger("edge_agent.telemetry")
#: Alerts are looked for at least this often, whatever the streams are set to.
ALERTS_S = 30.0
_MOST_MODELS = 200
_NOBODY_S = 2.0


class Telemetry:
    """Runs on the event loop between ``start`` and ``stop``. ``streams`` give one record each, or None for nothing."""

    def __init__(
        self,
        outgoing: Outgoing,
        config: Callable[[], TelemetryConfig],
        streams: Mapping[str, Callable[[], Mapping[str, Any] | None]],
        findings: Callable[[], list[Finding]],
        clock: TrustedClock,
        boot_nonce: str,
        enrolled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._outgoing = outgoing
        self._config = config
        self._streams = streams
        self._findings = findings
        self._clock = clock
        self._nonce = boot_nonce
        self._enrolled = enrolled
        self._started = time.monotonic()
        self._next: dict[str, float] = {}
        self._alerts: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """End; harmless when repeated."""
        if self._task is not None:
            self._task.cancel()

    def wake(self) -> None:
        """The configuration is another one: new rates hold at once."""
        self._next.clear()
        self._news.set()

    async def _run(self) -> None:
        while True:
            wait = self.tick()
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):  # on Python 3.10 a class of its own
                await asyncio.wait_for(self._news.wait(), wait)

    def tick(self) -> float:
        """Say what is due; seconds until something is due again. Nobody listens before the device is enrolled."""
        if not self._enrolled():
            return _NOBODY_S
        now, config = time.monotonic(), self._config()
        for stream, make in self._streams.items():
            interval = getattr(config, f"{stream}_s")
            if interval <= 0:
                self._next.pop(stream, None)
                continue
            if now < self._next.get(stream, 0.0):
                continue
            self._next[stream] = now + interval
            record = make()
            if record is not None:
                self._outgoing.record(stream, self._stamped(record))
        if now >= self._next.get("", 0.0):
            self._next[""] = now + ALERTS_S
            self._look()
        return max(0.5, min(self._next.values()) - time.monotonic())

    def _stamped(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "boot": self._nonce,
            "up_s": round(time.monotonic() - self._started, 1),
            "at": iso(self._clock.clock.now()),
            "clock_trusted": self._clock.trusted(),
            **record,
        }

    def _look(self) -> None:
        """Raise and end alerts. A check that finds several things is one alert with the worst first."""
        found: dict[str, Finding] = {}
        for finding in self._findings():
            if finding.level in ("warning", "error") and (
                finding.check not in found or finding.level == "error" != found[finding.check].level
            ):
                found[finding.check] = finding
        for check, finding in found.items():
            if self._alerts.get(check) != finding.text:
                self._alerts[check] = finding.text
                self._outgoing.say(f"up/alert/{check}", self._alert(check, finding), retain=True, confirm=True)
        for check in [check for check in self._alerts if check not in found]:
            del self._alerts[check]
            self._outgoing.say(f"up/alert/{check}", b"", retain=True, confirm=True)

    def _alert(self, check: str, finding: Finding) -> bytes:
        document = {
            "id": check,
            "level": finding.level,
            "text": finding.text[:500],
            "mend": finding.mend[:500],
            "since": iso(self._clock.clock.now()),
            "clock_trusted": self._clock.trusted(),
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @property
    def alerts(self) -> dict[str, str]:
        """What is raised now."""
        return dict(self._alerts)


def heat_record(readings: Readings) -> dict[str, Any]:
    """Temperatures, the distance to the next trip point, throttling."""
    return {
        "hottest_c": readings.hottest_c,
        "headroom_c": readings.headroom_c,
        "throttled": readings.throttled_now,
        "zones": {zone.name: zone.celsius for zone in readings.zones[:32]},
    }


def memory_record(readings: Readings, process: Mapping[str, Any]) -> dict[str, Any]:
    """What is available, how much the kernel stalls for want of it, and what core itself takes."""
    return {
        "available_mb": readings.mem_available_mb,
        "some_avg10": readings.memory_some_avg10,
        "full_avg10": readings.memory_full_avg10,
        "core_rss_mb": process.get("rss_mb"),
    }


def energy_record(readings: Readings) -> dict[str, Any] | None:
    """Watts, where a sensor tells."""
    return None if readings.power_watts is None else {"watts": round(readings.power_watts, 3), "source": "sensor"}


def models_record(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counters and times of the models that were ever asked, out of the statistics document."""
    rows = []
    for row in document.get("model_stats", ()):
        stats = row["inference_stats"]
        count, failed = stats["success"]["count"], stats["fail"]["count"]
        if count or failed:
            rows.append(
                {
                    "model": row["name"],
                    "version": row["version"],
                    "answered": count,
                    "failed": failed,
                    "mean_ms": round(stats["success"]["ns"] / count / 1e6, 3) if count else None,
                    "queue_ms": round(stats["queue"]["ns"] / count / 1e6, 3) if count else None,
                    "compute_ms": round(stats["compute_infer"]["ns"] / count / 1e6, 3) if count else None,
                    **({"feedback": row["feedback_stats"]} if "feedback_stats" in row else {}),
                }
            )
    rows.sort(key=lambda row: -row["answered"])
    return {"models": rows[:_MOST_MODELS], "left_out": max(0, len(rows) - _MOST_MODELS)} if rows else None
