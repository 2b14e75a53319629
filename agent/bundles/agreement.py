"""How far a variant's answers agree with the reference's: one piece of code for the packer and for the device.

Pure but for reading the golden set. A golden set holds ``input/NAME`` and ``output/NAME`` arrays whose first axis
counts the examples. Examples are run one at a time: where an array has as many axes as the model's input, one example
is a slice of length 1 along the first (batch) axis; where it has one more, the axis is taken away.
NaN never agrees. A missing output, a differing shape or kind of answer is a DisagreementError with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.base.errors import PeerError
from agent.bundles.arrays import MAX_BYTES, load_arrays
from agent.bundles.manifest import Golden, GoldenMetric, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

INPUT, OUTPUT = "input/", "output/"


class DisagreementError(PeerError):
    """The answers cannot even be compared: an output is missing or has another shape or kind."""


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """Real inputs and the reference's outputs, by tensor name; ``count`` examples along every first axis."""

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]
    count: int

    def examples(self, specs: Sequence[TensorSpec]) -> Iterator[dict[str, NDArray[Any]]]:
        """One example after the other as the model takes it. PeerError when inputs and signature do not fit."""
        return examples(self.inputs, specs)


def load_golden(source: int | bytes, *, limit: int = MAX_BYTES) -> GoldenSet:
    """The golden set in a descriptor or in bytes; at most ``limit`` bytes of arrays. PeerError, TooLargeError."""
    arrays = load_arrays(source, limit=limit)
    inputs = {name.removeprefix(INPUT): array for name, array in arrays.items() if name.startswith(INPUT)}
    outputs = {name.removeprefix(OUTPUT): array for name, array in arrays.items() if name.startswith(OUTPUT)}
    if not inputs or not outputs:
        raise PeerError("cannot read golden set: it needs input/NAME and output/NAME arrays")
    return GoldenSet(inputs, outputs, count_examples({**_prefixed(INPUT, inputs), **_prefixed(OUTPUT, outputs)}))


def count_examples(arrays: Arrays) -> int:
    """The common length of all first axes, at least 1. PeerError names the array that differs."""
    lengths = {name: (array.shape[0] if array.ndim else 0) for name, array in arrays.items()}
    count = next(iter(lengths.values()), 0)
    for name, length in lengths.items():
        if length != count or length == 0:
            raise PeerError(f"cannot read examples: {name} has {length} of them, {next(iter(lengths))} has {count}")
    return count


def examples(inputs: Arrays, specs: Sequence[TensorSpec]) -> Iterator[dict[str, NDArray[Any]]]:
    """Each example of ``inputs`` as the model of signature ``specs`` takes it. PeerError names what does not fit."""
    known = {spec.name: spec for spec in specs}
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise PeerError(f"cannot use examples: the model has no input {unknown[0]!r}")
    missing = [spec.name for spec in specs if not spec.optional and spec.name not in inputs]
    if missing:
        raise PeerError(f"cannot use examples: input {missing[0]!r} missing")
    for name, array in inputs.items():
        _check_example(array, known[name])
    for index in range(count_examples(inputs)):
        yield {name: _example(array, known[name], index) for name, array in inputs.items()}


def join(answers: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
    """The answers to single examples as arrays whose first axis counts the examples. DisagreementError if they vary."""
    import numpy as np  # noqa: PLC0415

    joined: dict[str, NDArray[Any]] = {}
    for name in answers[0]:
        parts = [np.asarray(answer[name]) for answer in answers]
        if any(part.shape != parts[0].shape for part in parts):
            raise DisagreementError(f"cannot compare output {name!r}: its shape differs from example to example")
        batched = parts[0].ndim > 0 and parts[0].shape[0] == 1
        joined[name] = np.concatenate(parts) if batched else np.stack(parts)
    return joined


def agreement(metric: GoldenMetric, reference: Arrays, got: Arrays) -> float:
    """How ``got`` agrees with ``reference``; the worst output counts. The first axis counts the examples.

    ``top1``: share of equal arg-max along the last axis (whole numbers, truth values and texts: of equal elements).
    ``cosine``: mean over examples of the cosine similarity of the flattened outputs. ``max_abs``: largest absolute
    difference. An answer that is not finite where the reference is never agrees. DisagreementError: not comparable.
    """
    values: list[float] = []
    for name, expected in reference.items():
        answer = got.get(name)
        if answer is None:
            raise DisagreementError(f"cannot compare output {name!r}: missing")
        if answer.shape != expected.shape:
            raise DisagreementError(
                f"cannot compare output {name!r}: shape {list(answer.shape)}, the reference has {list(expected.shape)}"
            )
        if _is_number(answer) != _is_number(expected):
            raise DisagreementError(f"cannot compare output {name!r}: {answer.dtype} with {expected.dtype}")
        value = _METRICS[metric](expected, answer)
        if value is not None:
            values.append(value)
    if not values:
        raise PeerError("cannot compare outputs: top1 needs an output with at least two classes on its last axis")
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values) if metric == "max_abs" else min(values)


def passes(golden: Golden, value: float) -> bool:
    """Whether a value of ``agreement`` is good enough. NaN never is."""
    return value <= golden.threshold if golden.metric == "max_abs" else value >= golden.threshold


def top1_accuracy(outputs: Arrays, labels: NDArray[Any]) -> float | None:
    """Share of examples whose arg-max is the label, over the first output with classes; None where there is none."""
    import numpy as np  # noqa: PLC0415

    for output in outputs.values():
        if output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind == "f" and len(output) == labels.size:
            return float(np.mean(np.argmax(output, axis=1) == labels.ravel()))
    return None


def _prefixed(prefix: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    return {prefix + name: array for name, array in arrays.items()}


def _check_example(array: NDArray[Any], spec: TensorSpec) -> None:
    wanted = spec.shape
    if spec.any_rank or _fits(array.shape[1:], wanted) or _fits((1, *array.shape[1:]), wanted):
        return
    raise PeerError(
        f"cannot use examples: input {spec.name!r} is {list(array.shape)}, the model takes {list(wanted)} per example"
    )


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, have) for want, have in zip(wanted, shape, strict=True))


def _example(array: NDArray[Any], spec: TensorSpec, index: int) -> NDArray[Any]:
    batched = spec.any_rank or array.ndim == len(spec.shape)
    return array[index : index + 1] if batched else array[index]


def _is_number(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "fiub"


def _equal_share(expected: NDArray[Any], answer: NDArray[Any]) -> float:
    import numpy as np  # noqa: PLC0415

    return float(np.mean(np.asarray(expected == answer, dtype=float))) if expected.size else 1.0


def _top1(expected: NDArray[Any], answer: NDArray[Any]) -> float | None:
    import numpy as np  # noqa: PLC0415

    if expected.dtype.kind != "f":
        return _equal_share(expected, answer)
    if expected.ndim < 2 or expected.shape[-1] < 2:
        return None  # One score has no arg-max to compare.
    same = np.argmax(expected, axis=-1) == np.argmax(answer, axis=-1)
    same &= ~(np.isfinite(expected) & ~np.isfinite(answer)).any(axis=-1)
    return float(np.mean(same)) if same.size else 1.0


def _cosine(expected: NDArray[Any], answer: NDArray[Any]) -> float:
    import numpy as np  # noqa: PLC0415

    if not _is_number(expected):
        return _equal_share(expected, answer)
    left, right = _rows(expected), _rows(answer)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products = np.einsum("ij,ij->i", left, right)
    both_zero = ~left.any(axis=1) & ~right.any(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(norms > 0, products / norms, np.where(both_zero, 1.0, products * 0.0))
    return float(np.mean(cosines)) if cosines.size else 1.0


def _max_abs(expected: NDArray[Any], answer: NDArray[Any]) -> float:
    import numpy as np  # noqa: PLC0415

    if not _is_number(expected):
        return 0.0 if _equal_share(expected, answer) == 1.0 else math.inf
    left, right = _rows(expected), _rows(answer)
    with np.errstate(invalid="ignore"):
        # Equal infinities (masked logits) differ by nothing, though their difference is NaN.
        difference = np.where(left == right, 0.0, np.abs(left - right))
    return float(np.max(difference)) if difference.size else 0.0


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype("f8").reshape(len(array), -1)


_METRICS = {"top1": _top1, "cosine": _cosine, "max_abs": _max_abs}
