"""How hard-pressed the device is for memory, by heat and by power caps: one look, cheap enough for every few seconds.

Trip points and names of zones hardly ever change, so that they are read once and again after a while; a look then reads
one file for each zone, cooling device and clock. What the machine does not tell is None. Sources, in Linux'
Documentation/: accounting/psi.rst, admin-guide/cgroup-v2.rst, driver-api/thermal/sysfs-api.rst, admin-guide/pm/
cpufreq.rst, power/powercap/powercap.rst; for power modes NVIDIA's nvpmodel.

Below a root whose folders are all named by numbers each of these is a machine of its own: the one whose number of
seconds has passed since the start is looked at. So a recorded course of states is replayed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.hardware.cgroup import own_groups
from agent.hardware.facts import ThermalZone
from agent.hardware.heat import read_throttle_word, read_zones
from agent.hardware.parse import available_kb, celsius, meminfo, number, pressure_avg10, throttled_now
from agent.hardware.probe import read_power_mode
from agent.hardware.tree import Tree

_CPUFREQ = "sys/devices/system/cpu/cpufreq"
_THERMAL = "sys/class/thermal"
_RAPL = "sys/class/powercap/intel-rapl:0"
#: What throttles, by the ``type`` of a cooling device; the others are fans and the like.
_THROTTLES = re.compile(r"(?i)processor|cpufreq|cpu|devfreq|gpu|npu|dla|intel_powerclamp|tcc offset|thermal-")
#: Firmware is asked by starting a program where it has no file.
_FIRMWARE_S = 30.0


@dataclass(frozen=True, slots=True)
class Strain:
    """One look. Shares are of 1; ``*_c`` are degrees left to a trip point, negative beyond it.

    ``events`` counts how often a limit of memory was met since the start. ``capped`` is the share of the clock, or of
    the power, that is left of the most that was seen since the agent began to look; 1 when nothing is capped.
    """

    memory_some: float | None = None
    memory_full: float | None = None
    available: float | None = None
    available_mb: int | None = None
    events: int | None = None
    throttle_c: float | None = None
    critical_c: float | None = None
    hottest: str = ""
    throttled: bool | None = None
    capped: float | None = None
    power_mode: str | None = None


@dataclass(slots=True)
class _Known:
    """What hardly ever changes."""

    at: float
    zones: list[tuple[str, ThermalZone]] = field(default_factory=list)
    cooling: list[str] = field(default_factory=list)
    clocks: list[tuple[str, int]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


class StrainGauge:
    """Call it with the seconds of a monotonic clock. For one thread at a time."""

    def __init__(self, root: Path | None = None, *, again_s: float = 60.0) -> None:
        self._root = root
        self._again_s = again_s
        self._began: float | None = None
        self._tree: Tree | None = None
        self._place: Path | None = None
        self._known: _Known | None = None
        self._most: dict[str, float] = {}
        self._word: tuple[float, int | None] | None = None

    def __call__(self, now: float) -> Strain:
        """One look. NotFoundError where the root is no folder."""
        tree = self._at(now)
        known = self._known
        if known is None or now - known.at >= self._again_s:
            known = self._known = _survey(tree, now)
        memory = meminfo(tree.text("proc/meminfo", 1 << 16))
        available, total = available_kb(memory), memory.get("MemTotal")
        shares = [available / total] if available is not None and total else []
        room = None if available is None else available // 1024
        for group in known.groups:
            left, limit = _group_room(tree, group)
            if left is not None and limit:
                shares.append(left / limit)
                room = left >> 20 if room is None else min(room, left >> 20)
        pressures = [tree.text("proc/pressure/memory"), *(tree.text(f"{g}/memory.pressure") for g in known.groups[-1:])]
        throttle, critical, hottest = _heat(tree, known)
        mode = read_power_mode(tree)
        return Strain(
            memory_some=_most(pressure_avg10(text, "some") for text in pressures),
            memory_full=_most(pressure_avg10(text, "full") for text in pressures),
            available=min(shares, default=None),
            available_mb=room,
            events=_events(tree, known.groups[-1]) if known.groups else None,
            throttle_c=throttle,
            critical_c=critical,
            hottest=hottest,
            throttled=self._throttled(tree, known, now),
            capped=self._capped(tree, known, mode),
            power_mode=mode,
        )

    def _at(self, now: float) -> Tree:
        """The machine to look at now."""
        self._began = now if self._began is None else self._began
        place = _state(self._root, now - self._began) if self._root is not None else None
        if self._tree is None or place != self._place:
            self._place, self._tree = place, Tree(place)
            self._known = None
        return self._tree if self._tree.live else Tree(place)  # links of a recorded one may have been swung

    def _throttled(self, tree: Tree, known: _Known, now: float) -> bool | None:
        """Whether firmware or kernel hold the clock back now."""
        if self._word is None or not tree.live or now - self._word[0] >= _FIRMWARE_S:
            self._word = (now, read_throttle_word(tree))
        found = throttled_now(self._word[1])
        states = [number(tree.line(f"{path}/cur_state")) for path in known.cooling]
        seen = [state > 0 for state in states if state is not None]
        return found if not seen else bool(found) or any(seen)

    def _capped(self, tree: Tree, known: _Known, mode: str | None) -> float | None:
        """The least share of what each cap has ever allowed."""
        values: dict[str, float] = {}
        for path, most in known.clocks:
            if (allowed := number(tree.line(f"{path}/scaling_max_freq"), most=1 << 32)) is not None:
                values[path] = min(allowed, most)
        if limit := number(tree.line(f"{_RAPL}/constraint_0_power_limit_uw")):
            values[_RAPL] = float(limit)
        if watts := re.search(r"(?i)(?<![0-9.])(\d{1,3}) ?w(?![a-z])", mode or ""):
            values["mode"] = float(watts[1])
        for name, value in values.items():
            self._most[name] = max(value, self._most.get(name, 0.0))
        return min((value / self._most[name] for name, value in values.items() if self._most[name]), default=None)


def _state(root: Path, elapsed: float) -> Path:
    """The recorded state that holds so long after the start, or the root itself."""
    try:
        names = [path.name for path in root.iterdir()]
    except OSError:
        return root
    if not names or not all(re.fullmatch(r"\d{1,6}(\.\d{1,3})?", name) for name in names):
        return root
    begun = [name for name in names if float(name) <= elapsed]
    return root / max(begun or [min(names, key=float)], key=float)


def _survey(tree: Tree, now: float) -> _Known:
    folders = [name for name in tree.names(_THERMAL) if re.fullmatch(r"thermal_zone\d{1,4}", name)]
    zones = zip(folders, read_zones(tree), strict=False)
    cooling = [name for name in tree.names(_THERMAL) if re.fullmatch(r"cooling_device\d{1,4}", name)]
    policies = [name for name in tree.names(_CPUFREQ) if re.fullmatch(r"policy\d{1,4}", name)]
    clocks = []
    for name in policies[:64]:
        most = number(tree.line(f"{_CPUFREQ}/{name}/cpuinfo_max_freq"), most=1 << 32)
        if most:
            clocks.append((f"{_CPUFREQ}/{name}", most))
    return _Known(
        now,
        [(f"{_THERMAL}/{name}", zone) for name, zone in zones if zone.trips],
        [
            f"{_THERMAL}/{name}"
            for name in cooling[:64]
            if _THROTTLES.search(tree.line(f"{_THERMAL}/{name}/type") or "")
            and "fan" not in (tree.line(f"{_THERMAL}/{name}/type") or "").lower()
        ],
        clocks,
        own_groups(tree),
    )


def _heat(tree: Tree, known: _Known) -> tuple[float | None, float | None, str]:
    """Degrees left to throttling, to the trip points beyond it, and which zone is nearest.

    A zone with several passive points throttles at the highest one: the lower ones start a regulator that may yet do
    nothing, and when it does something, its cooling devices show it.
    """
    throttle: float | None = None
    critical: float | None = None
    hottest = ""
    for path, zone in known.zones:
        degrees = celsius(tree.line(f"{path}/temp"), zone=zone.name)
        if degrees is None:
            continue
        passive = [trip.celsius for trip in zone.trips if trip.kind == "passive"]
        beyond = [trip.celsius for trip in zone.trips if trip.kind in {"hot", "critical"}]
        points = [max(passive)] if passive else beyond
        left = min((point - degrees for point in points), default=None)
        if left is not None and (throttle is None or left < throttle):
            throttle, hottest = left, f"{zone.name} {degrees:.0f} °C"
        for point in beyond:
            critical = point - degrees if critical is None else min(critical, point - degrees)
    return throttle, critical, hottest


def _group_room(tree: Tree, group: str) -> tuple[int | None, int | None]:
    """Bytes left in a control group that has a limit, and the limit. File pages that can go count as left."""
    limits = [number(tree.line(f"{group}/{name}"), most=1 << 60) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit]
    current = number(tree.line(f"{group}/memory.current"))
    if not known or current is None:
        return None, None
    stat = re.search(r"(?m)^inactive_file (\d{1,18})$", tree.text(f"{group}/memory.stat", 1 << 14) or "")
    return max(0, min(known) - current + (int(stat[1]) if stat else 0)), min(known)


def _events(tree: Tree, group: str) -> int | None:
    """How often the own group met ``memory.high`` or ``memory.max``, or was killed in."""
    found: Mapping[str, str] = dict(
        re.findall(r"(?m)^(high|max|oom) (\d{1,18})$", tree.text(f"{group}/memory.events") or "")
    )
    return sum(map(int, found.values())) if found else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
