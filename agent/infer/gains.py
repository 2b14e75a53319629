"""Whether running several requests as one pays, from what was measured on this device. Pure.

A batch takes some time however many rows it has (weights are read once, each operator begins once) and some for each
row. What joining saves must be more than joining itself costs, or requests are better answered one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.bundles.manifest import TensorSpec

#: What it costs to collect a request, to copy its inputs and to part the answers: seconds.
JOINING_S = 30e-6
#: A batch is used when a row of it takes so much of the time of a lone run, the joining included.
_PAYS = 0.8
#: Sizes whose time for a row differs by less are equally good; the smaller one answers sooner.
_TIE = 1.05


@dataclass(frozen=True, slots=True)
class Gain:
    """What was measured: seconds of one run by the number of its rows; ``note`` says why there are none.

    ``row_bytes``: of the inputs, in one row of what was measured.
    """

    times: tuple[tuple[int, float], ...] = ()
    row_bytes: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object."""
        return {"times": [list(pair) for pair in self.times], "row_bytes": self.row_bytes, "note": self.note}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Gain:
        """The gain in a JSON object of ``to_json``. KeyError, TypeError or ValueError for anything else."""
        times = tuple((int(rows), float(seconds)) for rows, seconds in document["times"])
        if any(rows < 1 or not 0 < seconds < float("inf") for rows, seconds in times):
            raise ValueError("times must be positive")
        return cls(tuple(sorted(times)), int(document["row_bytes"]), str(document["note"]))


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests for an option are joined: at most ``size`` rows, after at most ``delay_s``.

    ``size`` 1: they are not, for the ``reason``.
    """

    size: int
    delay_s: float
    gain: Gain = Gain()
    reason: str = ""

    @property
    def most_bytes(self) -> int:
        """Of the inputs of one batch. Rows may be larger than those that were measured, and so may what a run needs."""
        return max(_LEAST_BYTES, 4 * self.size * self.gain.row_bytes)


_LEAST_BYTES = 1 << 20


def sizes(most: int) -> tuple[int, ...]:
    """The batch sizes that are measured: powers of two, and the most that is asked for."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return tuple(powers if powers[-1] == most else [*powers, most])


def decide(gain: Gain, max_size: int, delay_s: float) -> Batching:
    """The best size of those measured, up to ``max_size``; 1 where none pays."""
    times = dict(gain.times)
    alone = times.get(1)
    larger = {rows: seconds / rows for rows, seconds in times.items() if 1 < rows <= max_size}
    if gain.note or alone is None or not larger:
        return Batching(1, delay_s, gain, gain.note or f"at most {max_size} row is asked for")
    best = min(larger.values())
    size = min(rows for rows, seconds in larger.items() if seconds <= best * _TIE)
    share = (larger[size] + JOINING_S) / alone
    if share > _PAYS:
        return Batching(
            1, delay_s, gain, f"does not pay: {larger[size] * 1e6:.0f} us a row in runs of {size}, and about "
            f"{JOINING_S * 1e6:.0f} us to join them; {alone * 1e6:.0f} us alone",
        )  # fmt: skip
    return Batching(size, delay_s, gain)


def not_free(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Why requests for a model of that signature cannot be joined along the first axis; empty where they may be.

    Inputs that may be left out are not looked at: a request that brings one is answered alone.
    """
    return next(_fixed("input", inputs), "") or next(_fixed("output", outputs), "")


def _fixed(what: str, specs: Sequence[TensorSpec]) -> Iterator[str]:
    for spec in specs:
        if spec.optional:
            continue
        if spec.any_rank or not spec.shape:
            yield f"{what} '{spec.name}' has no first axis to join along"
        elif spec.shape[0] != -1:
            yield f"the first axis of {what} '{spec.name}' is fixed: {spec.shape[0]}"


def described(batching: Batching) -> dict[str, Any]:
    """For ``status`` and ``models explain``."""
    times = {str(rows): round(seconds / rows * 1e6, 1) for rows, seconds in batching.gain.times}
    return {
        "size": batching.size,
        "max_delay_us": round(batching.delay_s * 1e6),
        "us_per_row": times,
        "reason": batching.reason,
    }
