"""What a look at the sensors says of memory, heat and power: thresholds with a gap between pressing and away. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.hardware.pressure import Strain
from agent.infer.governor import Cause, Reading

#: So much beyond its threshold memory cannot wait for a step after the other.
_URGENT_STALL, _URGENT_SHARE = 3.0, 0.5
#: So near to where the kernel switches the device off, heat cannot wait.
_URGENT_C = 2.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where a cause begins to press; see ``GovernorConfig`` for each."""

    memory_some: float = 20.0
    memory_full: float = 10.0
    available_share: float = 0.05
    heat_margin_c: float = 3.0
    heat_hysteresis_c: float = 5.0
    cap_share: float = 0.9


def judge(strain: Strain, before: Strain | None, at: Thresholds) -> Mapping[Cause, Reading]:
    """What each cause does now; ``before``: the look before this one. What nobody can tell is away."""
    return {"memory": _memory(strain, before, at), "heat": _heat(strain, at), "power": _power(strain, at)}


def missing_mb(strain: Strain, at: Thresholds) -> float:
    """How much memory would have to come free until none is short; 0 where that cannot be told."""
    if not strain.available or strain.available_mb is None:
        return 0.0
    return max(0.0, strain.available_mb * (2 * at.available_share / strain.available - 1))


def _memory(strain: Strain, before: Strain | None, at: Thresholds) -> Reading:
    stalls = [(strain.memory_some, at.memory_some), (strain.memory_full, at.memory_full)]
    worst = max((value / limit for value, limit in stalls if value is not None), default=0.0)
    left = strain.available
    met = before is not None and None not in (strain.events, before.events) and strain.events != before.events
    if left is not None and left <= at.available_share:
        text = f"memory: {left:.0%} left"
        return Reading("urgent" if left <= at.available_share * _URGENT_SHARE else "pressing", text)
    if worst >= 1:
        text = f"memory: somebody waits for it {strain.memory_some or 0:.0f} % of the time"
        full = strain.memory_full or 0.0
        return Reading("urgent" if full >= at.memory_full * _URGENT_STALL else "pressing", text)
    if met:
        return Reading("pressing", "memory: the limit of the control group was met")
    away = worst < 0.5 and (left is None or left >= 2 * at.available_share)
    return Reading("clear" if away else "between")


def _heat(strain: Strain, at: Thresholds) -> Reading:
    left = strain.throttle_c
    if strain.critical_c is not None and strain.critical_c <= _URGENT_C:
        return Reading("urgent", f"heat: {strain.hottest or 'a sensor'} is about to switch the device off")
    if left is not None and left <= at.heat_margin_c:
        where = f"{left:.0f} °C below" if left > 0 else "at"
        return Reading("pressing", f"heat: {strain.hottest}, {where} its trip point")
    if strain.throttled:
        return Reading("pressing", "heat: the clock is held back")
    away = left is None or left >= at.heat_margin_c + at.heat_hysteresis_c
    return Reading("clear" if away else "between")


def _power(strain: Strain, at: Thresholds) -> Reading:
    if strain.capped is None or strain.capped >= (1 + at.cap_share) / 2:
        return Reading()
    if strain.capped > at.cap_share:
        return Reading("between")
    mode = f" ({strain.power_mode})" if strain.power_mode else ""
    return Reading("pressing", f"power: capped to {strain.capped:.0%}{mode}")
