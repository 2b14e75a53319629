"""What changes while the agent runs: heat, throttling, power and memory pressure.

Every reading is None when the machine does not tell; nothing raises for what a file holds. Power is what a sensor
measures, never an estimate. Sources, all in Linux' Documentation/: driver-api/thermal/sysfs-api.rst, hwmon/ina3221.rst,
hwmon/sysfs-interface.rst, power/powercap/powercap.rst, accounting/psi.rst.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.hardware.facts import ThermalZone
from agent.hardware.heat import read_throttle_word, read_zones
from agent.hardware.parse import available_kb, meminfo, number, pressure_avg10, throttled_now
from agent.hardware.tree import Tree

#: Rails of Jetson's INA3221 that carry everything: where one exists the others are parts of it.
_INPUT_RAILS = frozenset({"VDD_IN", "POM_5V_IN", "5V_IN", "VIN", "VDD_TOTAL"})


@dataclass(frozen=True, slots=True)
class Readings:
    """One look at the sensors. ``headroom_c``: degrees to the nearest trip point at which the kernel acts."""

    hottest_c: float | None
    headroom_c: float | None
    throttled_now: bool | None
    power_watts: float | None
    memory_some_avg10: float | None
    memory_full_avg10: float | None
    mem_available_mb: int | None
    zones: tuple[ThermalZone, ...] = ()


@dataclass(frozen=True, slots=True)
class Energy:
    """An energy counter in microjoules that wraps to 0 after ``wraps_at``."""

    microjoules: int
    wraps_at: int


def read_sensors(root: Path | None = None) -> Readings:
    """All sensors of the machine below ``root`` (None: the live one)."""
    tree = Tree(root)
    zones = read_zones(tree)
    pressure = tree.text("proc/pressure/memory")
    available = available_kb(meminfo(tree.text("proc/meminfo", 1 << 16)))
    return Readings(
        hottest_c=max((zone.celsius for zone in zones if zone.celsius is not None), default=None),
        headroom_c=headroom(zones),
        throttled_now=throttled_now(read_throttle_word(tree)),
        power_watts=read_power(tree),
        memory_some_avg10=pressure_avg10(pressure, "some"),
        memory_full_avg10=pressure_avg10(pressure, "full"),
        mem_available_mb=None if available is None else available // 1024,
        zones=zones,
    )


def headroom(zones: Sequence[ThermalZone]) -> float | None:
    """Degrees to the nearest trip point of any zone, negative beyond it. ``active`` ones only turn on a fan."""
    distances = [
        trip.celsius - zone.celsius
        for zone in zones
        if zone.celsius is not None
        for trip in zone.trips
        if trip.kind in {"passive", "hot", "critical"}
    ]
    return min(distances, default=None)


def read_power(tree: Tree) -> float | None:
    """Watts that the board draws now, from its hwmon sensors; None where there are none."""
    rails: dict[str, float] = {}
    for name in tree.names("sys/class/hwmon", 64):
        path = f"sys/class/hwmon/{name}"
        driver = tree.line(f"{path}/name")
        if driver in {"ina3221", "ina3221x"}:
            rails.update(_ina3221(tree, path))
        elif driver in {"ina219", "ina226", "ina238"}:
            microwatts = number(tree.line(f"{path}/power1_input"))
            if microwatts is not None:
                rails[f"{driver} {name}"] = microwatts / 1e6
    total = [watts for rail, watts in rails.items() if rail in _INPUT_RAILS]
    return sum(total or rails.values()) if rails else None


def _ina3221(tree: Tree, path: str) -> dict[str, float]:
    """Watts by rail: channels 1-3 measure volts and amperes, channel 4 and up are sums of the others."""
    rails: dict[str, float] = {}
    for channel in (1, 2, 3):
        label = tree.line(f"{path}/in{channel}_label")
        millivolts = number(tree.line(f"{path}/in{channel}_input"), most=100_000)
        milliamperes = number(tree.line(f"{path}/curr{channel}_input"), most=100_000)
        if label and label != "NC" and millivolts is not None and milliamperes is not None:
            rails[label[:32]] = millivolts * milliamperes / 1e6
    return rails


def read_energy(tree: Tree) -> Energy | None:
    """The processor package's energy counter (RAPL); None where there is none or root alone may read it."""
    packages = [name for name in tree.names("sys/class/powercap") if re.fullmatch(r"intel-rapl:\d{1,3}", name)]
    counters: list[Energy] = []
    for name in packages:
        value = number(tree.line(f"sys/class/powercap/{name}/energy_uj"))
        limit = number(tree.line(f"sys/class/powercap/{name}/max_energy_range_uj"))
        if value is not None and limit:
            counters.append(Energy(value, limit))
    return counters[0] if len(counters) == 1 else None


def joules_between(before: Energy | None, after: Energy | None) -> float | None:
    """Joules between two readings less than one wrap apart."""
    if before is None or after is None:
        return None
    used = after.microjoules - before.microjoules
    return (used if used >= 0 else used + after.wraps_at) / 1e6
