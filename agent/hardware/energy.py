"""A running total of the energy that the device has used, from whichever sensor it has."""

from __future__ import annotations

from pathlib import Path

from agent.base.clock import Clock, SystemClock
from agent.hardware.sensors import Energy, joules_between, read_energy, read_power
from agent.hardware.tree import Tree


class EnergyMeter:
    """Call it for the joules since it was made; None where no sensor tells.

    A counter (RAPL) is read as it is. A power sensor (INA3221) is integrated between calls with the power at the later
    one, which is what its own averaging shows of the time before.
    """

    def __init__(self, root: Path | None = None, clock: Clock | None = None) -> None:
        self._root = root
        self._clock = clock or SystemClock()
        self._joules = 0.0
        self._counter: Energy | None = None
        self._at = self._clock.monotonic()

    def __call__(self) -> float | None:
        tree = Tree(self._root)
        before, self._counter = self._counter, read_energy(tree)
        since, self._at = self._at, self._clock.monotonic()
        if self._counter is not None:
            self._joules += joules_between(before, self._counter) or 0.0
            return self._joules
        watts = read_power(tree)
        if watts is None:
            return None
        self._joules += watts * (self._at - since)
        return self._joules
