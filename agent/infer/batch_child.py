"""The child that tries batches: whether requests may be joined, and how long a run of so many rows takes.

A trial child. Joined requests may come from different apps, so it is not enough that a batch's answers are right: one
row's answer must not depend on the other rows. It would where a file's first axis is no batch axis, and where a scale
is taken over all rows, as dynamic quantization does: one app's large values would spoil the others' answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from agent.base.errors import PeerError
from agent.infer.child import Child, Operation, alike, confined, status_kb

#: Requests that are joined to see whether they may be.
_SOME = 4
#: An answer may differ from that to the same rows alone by so much of its size; beside other rows by so much.
_TOLERANCE, _ALIKE = 1e-3, 1e-5
#: What a neighbour's numbers are multiplied with.
_WILD = 1000.0
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 200

Example = Mapping[str, Any]


class BatchChild(Child):
    """As in a trial, with several examples at once."""

    def operations(self) -> dict[str, Operation]:
        return {"prepare": self.prepare, "load": self.load, "together": self.together, "times": self.times}

    def together(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether answers to a batch are right (``agreement`` with the golden set, or ``reason`` empty) and each row's
        is its own."""
        examples = self._rows()
        some = list(islice(cycle(examples), max(2, min(_SOME, int(request["size"])))))
        answers = self._answers(some)
        if reason := _not_parted(answers, len(some)):
            return {"reason": reason}
        if reason := self._coupled(some, answers):
            return {"reason": reason}
        single = all(array.shape[0] == 1 for example in self._loaded().examples for array in example.values())
        if self._golden_descriptor is None or not single:
            for index, example in enumerate(some):
                alone = self._answers([example])
                pairs = zip(answers, alone, strict=True)
                if not all(alike(one[index : index + 1], two, _TOLERANCE) for one, two in pairs):
                    return {"reason": "a batch is answered otherwise than its rows alone"}
            return {"reason": ""}
        return self._judged(examples, int(request["size"]), request["metric"])

    def times(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The shortest run of each size in ms, in rounds of all; sizes that take over ``most_kb`` of memory are left
        out, and so are those behind them."""
        rows = self._rows()
        batches: list[tuple[int, Example]] = []
        before = status_kb("VmHWM")
        for size in request["sizes"]:
            batch = _joined(list(islice(cycle(rows), size)))
            self._run(batch)
            if status_kb("VmHWM") - before > request["most_kb"] and batches:
                break
            batches.append((size, batch))
        best = {size: math.inf for size, _ in batches}
        end = time.perf_counter() + request["seconds"]
        for turn in range(_MOST_ROUNDS):
            if turn >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for size, batch in batches:
                for _ in range(3):
                    start = time.perf_counter()
                    self._run(batch)
                    best[size] = min(best[size], (time.perf_counter() - start) * 1e3)
        return {
            "sizes": list(best),
            "times": list(best.values()),
            "row_bytes": sum(array.nbytes for array in _joined(rows[:1]).values()),
        }

    def _rows(self) -> list[Example]:
        """Examples of one row each."""
        bench = self._loaded()
        rows: list[Example] = []
        for example in bench.examples:
            if any(not array.shape or not array.shape[0] for array in example.values()):
                raise PeerError("an example has no first axis to join along")
            rows.append({name: array[:1] for name, array in example.items()})
        return rows

    def _run(self, batch: Example) -> Sequence[Any]:
        session = self._loaded().session
        return session.run(batch, [spec.name for spec in session.outputs])

    def _answers(self, examples: Sequence[Example]) -> Sequence[Any]:
        return self._run(_joined(examples))

    def _coupled(self, some: Sequence[Example], answers: Sequence[Any]) -> str:
        """Whether the first row is answered otherwise beside other rows; empty when it is not."""
        tried = False
        for change in (_wild, _turned):
            try:
                others = self._answers([some[0], *(change(example) for example in some[1:])])
            except PeerError:  # such numbers may be nonsense to this model
                continue
            tried = True
            if _not_parted(others, len(some)) or not all(
                alike(one[:1], two[:1], _ALIKE) for one, two in zip(answers, others, strict=True)
            ):
                return "the answer to a row depends on the rows beside it"
        return "" if tried else "no other rows could be tried beside one"

    def _judged(self, examples: Sequence[Example], size: int, metric: Any) -> dict[str, Any]:
        """Agreement of the golden set's examples, run in batches, with its outputs."""
        from agent.bundles.agreement import DisagreementError, agreement, join  # noqa: PLC0415 - imports numpy

        golden = self._golden()
        names = list(golden.outputs)
        session = self._loaded().session
        found: list[dict[str, Any]] = []
        for begin in range(0, len(examples), size):
            part = examples[begin : begin + size]
            answers = session.run(_joined(part), names)
            found += [
                {name: answer[index : index + 1] for name, answer in zip(names, answers, strict=True)}
                for index in range(len(part))
            ]
        reference = {name: array[: len(found)] for name, array in golden.outputs.items()}
        joined = join(found)
        shaped = {n: a.reshape(reference[n].shape) if a.size == reference[n].size else a for n, a in joined.items()}
        try:
            value = agreement(metric, reference, shaped)
        except DisagreementError as error:
            return {"reason": str(error)}
        return {"reason": "", "agreement": value if math.isfinite(value) else None}


def _joined(examples: Sequence[Example]) -> Example:
    import numpy as np  # noqa: PLC0415 - imported inside the confinement

    return {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}


def _not_parted(answers: Sequence[Any], rows: int) -> str:
    for index, answer in enumerate(answers):
        if not answer.shape or answer.shape[0] != rows:
            return f"output {index} of {rows} rows has the shape {list(answer.shape)}"
    return ""


def _wild(example: Example) -> Example:
    """The same with large numbers; texts and whole numbers, which may be indices, stay."""
    return {
        name: array * array.dtype.type(_WILD) if array.dtype.kind == "f" else array for name, array in example.items()
    }


def _turned(example: Example) -> Example:
    """The same values in another order; where they are all alike, zeros in their place."""
    import numpy as np  # noqa: PLC0415 - imported inside the confinement

    turned = {}
    for name, array in example.items():
        other = np.roll(array.reshape(-1), 1).reshape(array.shape)
        alike = array.dtype.kind in "iufb" and bool((other == array).all())
        turned[name] = np.zeros_like(array) if alike else other
    return turned


def main() -> None:
    """Entry, as of a trial child."""
    confined(lambda start: BatchChild(start["model"], start["golden"]).operations())
