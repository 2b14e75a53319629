"""In which order the options of a version are asked now: the choice's, unless pressure or a lost provider says else.

Pure: the governor sets the pressure, the engine tells which providers are lost, and an order follows. A step down goes
to the next option that costs less by what was measured, of memory under memory pressure, of energy (else of time) under
heat and power caps. Only options that the policy allows are on the shelf, so that no step leads below its quality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.infer.shelf import Option, Served

#: A step must save so much, or it is none.
_SAVING = 0.95


@dataclass(frozen=True, slots=True)
class Pressure:
    """How many steps down each kind of cost shall go, and why. ``reason`` is for answers, people and logs."""

    memory: int = 0
    compute: int = 0
    reason: str = ""


CALM = Pressure()


class Steering:
    """What stands between the choice and who answers. Changed on the event loop's thread."""

    def __init__(self) -> None:
        self.pressure = CALM
        #: Lost providers, and why.
        self.lost: dict[str, str] = {}

    def order(self, served: Served) -> tuple[Option, ...]:
        """The options of that version, the one that shall answer first."""
        options = served.options
        if self.pressure is not CALM and served.governed and len(options) > 1:
            options = _stepped(options, self.pressure)
        if self.lost and any(option.provider in self.lost for option in options):
            options = tuple(sorted(options, key=lambda option: option.provider in self.lost))
        return options

    def pressed(self, served: Served) -> bool:
        """Whether the pressure makes another option answer than the choice."""
        if self.pressure is CALM or not served.governed or len(served.options) < 2:
            return False
        return _stepped(served.options, self.pressure)[0] is not served.options[0]

    def why(self, option: Option) -> str:
        """Why that option is passed over, where its provider is lost."""
        reason = self.lost.get(option.provider)
        return "" if reason is None else f"{option.candidate}: {option.provider} is lost: {reason}"


def steps(served: Served) -> tuple[int, int]:
    """How many steps down there are: of memory, of compute."""
    if not served.governed:
        return (0, 0)
    return len(_ladder(served.options, _memory)) - 1, len(_ladder(served.options, _compute(served.options))) - 1


def _stepped(options: tuple[Option, ...], pressure: Pressure) -> tuple[Option, ...]:
    """The option that the pressure asks for, then the others, cheapest first."""
    compute = _compute(options)
    lean, cool = _rung(options, _memory, pressure.memory), _rung(options, compute, pressure.compute)
    first, cost = (cool, compute) if lean is options[0] else (lean, _memory)
    if cool is not options[0] and cool.need_mb < first.need_mb:
        first = cool
    if first is options[0]:
        return options
    rest = sorted((option for option in options if option is not first), key=lambda option: cost(option) or 0.0)
    return (first, *rest)


Cost = Callable[[Option], "float | None"]


def _rung(options: tuple[Option, ...], cost: Cost, level: int) -> Option:
    ladder = _ladder(options, cost)
    return ladder[min(level, len(ladder) - 1)]


def _ladder(options: Sequence[Option], cost: Cost) -> list[Option]:
    """From the choice down, each at least a step cheaper than the one before."""
    ladder = list(options[:1])
    known = [option for option in options if cost(option) is not None]
    for option in sorted(known, key=lambda option: cost(option) or 0.0, reverse=True):
        above = cost(ladder[-1])
        if above is not None and (cost(option) or 0.0) < _SAVING * above:
            ladder.append(option)
    return ladder


def _memory(option: Option) -> float | None:
    return option.need_mb


def _compute(options: Sequence[Option]) -> Cost:
    """Joules a run where all were measured, else its time."""
    if all(option.joules is not None for option in options):
        return lambda option: option.joules
    return lambda option: option.p95_ms
