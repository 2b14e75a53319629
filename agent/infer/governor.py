"""How far to step down under pressure, and when to step back. Pure: samples and the time go in, a target comes out.

Each cause (memory, heat, power) has a level of its own. It goes down a step while its cause presses for ``down_s``,
and after another ``down_s`` the next; it comes back a step when the cause has been away for ``up_s``. Between the
thresholds for down and for back nothing happens. A cause that returns soon after a step back makes the next step back
wait twice as long, up to ``_MOST_PATIENCE`` times; so that a load which only the step down keeps bearable does not
swing. ``urgent`` samples step down at once, by all steps that there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agent.infer.steering import CALM, Pressure

Cause = Literal["memory", "heat", "power"]
CAUSES: tuple[Cause, ...] = ("memory", "heat", "power")
#: What a sample says of a cause: it is away, it neither presses nor is away, it presses, it cannot wait.
State = Literal["clear", "between", "pressing", "urgent"]
_MOST_PATIENCE = 16
#: A step back that held for so many times ``up_s`` was right: patience starts anew.
_HELD = 8


@dataclass(frozen=True, slots=True)
class Reading:
    """What a sample says of one cause, and in words."""

    state: State = "clear"
    text: str = ""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds: a cause must press for ``down_s`` before a step, and be away for ``up_s`` before a step back."""

    down_s: float = 10.0
    up_s: float = 60.0


@dataclass(slots=True)
class Level:
    """One cause: how many steps down, why, since when."""

    steps: int = 0
    why: str = ""
    since: float = 0.0
    #: When it began to press, or to be away; None while it does neither.
    pressing: float | None = None
    clear: float | None = None
    #: When it last stepped down, and back.
    down_at: float | None = None
    up_at: float | None = None
    patience: int = 1


@dataclass(slots=True)
class Governor:
    """``sample`` for each look; ``levels`` is what came of it."""

    pace: Pace
    levels: dict[Cause, Level] = field(default_factory=lambda: {cause: Level() for cause in CAUSES})
    #: How often any level changed.
    changes: int = 0

    def sample(self, readings: Mapping[Cause, Reading], deepest: Mapping[Cause, int], now: float) -> bool:
        """Take a look in; ``deepest`` is how many steps there are. Whether a level has changed."""
        changed = False
        for cause, level in self.levels.items():
            changed |= self._step(level, readings.get(cause, Reading()), deepest.get(cause, 0), now)
        self.changes += changed
        return changed

    @property
    def pressure(self) -> Pressure:
        """The target: steps down by memory, and by compute, which heat and power share."""
        memory = self.levels["memory"].steps
        compute = max(self.levels["heat"].steps, self.levels["power"].steps)
        if not memory and not compute:
            return CALM
        return Pressure(memory, compute, "governor: " + "; ".join(self.reasons()))

    def reasons(self) -> list[str]:
        """Why, one text for each cause that has stepped down; the same as long as no level changes."""
        return [level.why for level in self.levels.values() if level.steps]

    def _step(self, level: Level, reading: Reading, deepest: int, now: float) -> bool:
        pressing = reading.state in ("pressing", "urgent")
        level.pressing = (now if level.pressing is None else level.pressing) if pressing else None
        level.clear = (now if level.clear is None else level.clear) if reading.state == "clear" else None
        if level.steps > deepest:  # what had these steps is gone
            level.steps, level.up_at = deepest, now
            return True
        if pressing:
            return self._down(level, reading, deepest, now)
        return self._up(level, now)

    def _down(self, level: Level, reading: Reading, deepest: int, now: float) -> bool:
        if level.steps >= deepest or level.pressing is None:
            return False
        waited = now - max(level.pressing, level.down_at if level.down_at is not None else level.pressing)
        if reading.state != "urgent" and waited < self.pace.down_s:
            return False
        held = None if level.up_at is None else now - level.up_at
        if held is not None and held < _HELD * self.pace.up_s:
            level.patience = min(_MOST_PATIENCE, level.patience * 2)
        elif not level.steps:
            level.patience = 1
        if not level.steps:
            level.since = now
        level.steps = deepest if reading.state == "urgent" else level.steps + 1
        level.why, level.down_at, level.up_at = reading.text, now, None
        return True

    def _up(self, level: Level, now: float) -> bool:
        if not level.steps or level.clear is None:
            return False
        last = max(moment for moment in (level.clear, level.down_at, level.up_at) if moment is not None)
        if now - last < self.pace.up_s * level.patience:
            return False
        level.steps -= 1
        level.up_at = now
        if not level.steps:
            level.why = ""
        return True
