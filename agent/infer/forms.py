"""In which form a model is opened, and with how many threads: the choice among what was measured side by side. Pure.

The time that matters to whoever waits is that of the first answer: load and first run. The time that matters in the
long run is that of a steady run. One form serves both where it can; else one answers first and another takes over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agent.infer.runtimes.base import PLAIN, Route

#: The routes that are compared, for ONNX Runtime on the CPU.
ROUTES = (PLAIN, Route("ort"), Route("mapped"), Route("mapped", prepack=False), Route("ort", prepack=False))
#: Runs that differ by less are equally fast: this share, and this many seconds.
_TIE, _TIE_S = 1.1, 20e-6
#: Forms that answer first in so much of the fastest one's time are equally fast: the least memory decides.
_NEAR = 1.1
#: A form is worth its place on the disk when it answers in so much of the plain one's time.
_GAIN = 0.9
#: Two forms are worth two loads when the first one answers in so much of the other's time.
_FIRST_GAIN = 0.75
#: Runs with more threads that save less than this share, or ``_TIE_S``, save nothing.
_THREADS_TIE = 1.05


@dataclass(frozen=True, slots=True)
class Figures:
    """One route as it was measured: seconds (the shortest of several) and bytes.

    ``own``: what a session holds beside the plaintext that it is made from, which has ``size`` bytes. ``shares``: the
    plaintext's pages are its weights.
    """

    route: Route
    load_s: float
    first_s: float
    run_s: float
    own: int
    size: int
    shares: bool = False

    @property
    def answer_s(self) -> float:
        """From a warm plaintext to the first answer."""
        return self.load_s + self.first_s

    @property
    def memory(self) -> int:
        """Bytes that a session cannot do without."""
        return self.own + (self.size if self.shares else 0)

    @property
    def name(self) -> str:
        """For people and for files: ``mapped``, ``ort-unpacked``."""
        return self.route.kind if self.route.prepack else f"{self.route.kind}-unpacked"

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object."""
        return {**asdict(self), "route": [self.route.kind, self.route.prepack]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Figures:
        """The figures in a JSON object of ``to_json``. KeyError, TypeError or ValueError for anything else."""
        kind, prepack = document["route"]
        route = next(route for route in ROUTES if (route.kind, route.prepack) == (kind, prepack))
        load_s, first_s, run_s = (float(document[name]) for name in ("load_s", "first_s", "run_s"))
        own, size = int(document["own"]), int(document["size"])
        return cls(route, load_s, first_s, run_s, own, size, bool(document["shares"]))


def choose_forms(figures: Sequence[Figures]) -> tuple[Figures, ...]:
    """One form, or the one that answers first and the one that takes over; the plain one alone where nothing gains.

    Forms with weights arranged alike run the same operators, wherever these weights lie: where one of them is fast, all
    are (**measured** with three releases of ONNX Runtime). By its own times alone a MobileNet was loaded twice for
    nothing on a noisy machine, from either place.
    """
    plain = next(one for one in figures if one.route == PLAIN)
    best_s = min(one.run_s for one in figures)
    fast = {one.route.prepack for one in figures if one.run_s <= max(best_s * _TIE, best_s + _TIE_S)}
    steady = [one for one in figures if one.route.prepack in fast]
    alone, first = _quickest(steady), _quickest(figures)
    if first.answer_s < _FIRST_GAIN * alone.answer_s:
        return first, min(steady, key=lambda one: (one.memory, one.load_s))
    return (alone,) if alone.answer_s < _GAIN * plain.answer_s else (plain,)


def _quickest(figures: Sequence[Figures]) -> Figures:
    """Which answers first; of several that are near, that which takes the least memory with its plaintext."""
    best_s = min(one.answer_s for one in figures)
    near = (one for one in figures if one.answer_s <= best_s * _NEAR)
    return min(near, key=lambda one: (one.own + one.size, one.answer_s))


def choose_threads(runs: Mapping[int, float]) -> int:
    """The fewest threads that run about as fast as any; ``runs``: seconds of a run by the number of threads.

    Threads that gain nothing are not free: a session starts its own when it is loaded and waits for their end when it
    is closed. **Measured** on two busy cores: 3 ms for a model of 20 KB, in which nothing else of the process ran, and
    models of up to 2 MB ran 10 to 20 % faster without.
    """
    best_s = min(runs.values())
    return min(count for count, run_s in runs.items() if run_s <= max(best_s * _THREADS_TIE, best_s + _TIE_S))


def needs_file(chosen: Sequence[Figures]) -> bool:
    """Whether a prepared file has to be kept for them."""
    return any(one.route != PLAIN for one in chosen)


def without(figures: Sequence[Figures], wrong: Route) -> Iterator[Figures]:
    """All but those of a route that was found wrong."""
    return (one for one in figures if one.route != wrong)
