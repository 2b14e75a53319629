"""A cascade: a small variant answers, and what it is unsure of goes to a larger one. The measures. Pure.

Confidence is taken of one output along its last axis, the classes; where an answer has several such rows (tokens,
boxes) it is as sure as its least sure one. Scores that are probabilities already are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agent.infer.tensors import InferRequest, InferResponse, RequestedOutput, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from agent.bundles.manifest import TensorSpec

Measure = Literal["max_softmax", "margin", "entropy"]
#: How far from 1 the sums of probabilities may be, and how far below 0 a rounded one.
_ROUNDING = 1e-2


@dataclass(frozen=True, slots=True)
class Cascade:
    """Variants by id; an answer of ``first`` whose confidence in ``output`` is below ``threshold`` is ``then``'s.

    ``by_row``: the batch axis is free, so that only the unsure examples of a batch go on.
    """

    first: str
    then: str
    threshold: float
    output: str
    measure: Measure = "max_softmax"
    by_row: bool = False


def confidences(scores: NDArray[Any], measure: Measure) -> NDArray[Any]:
    """How sure each example along the first axis is, 0 to 1. What is not finite is not sure.

    ``max_softmax``: the largest probability; ``margin``: its distance to the next; ``entropy``: 1 less the entropy
    as a share of the largest that there is.
    """
    import numpy as np  # noqa: PLC0415 - loaded with the first model

    rows = np.asarray(scores, dtype=np.float64)
    examples = rows.shape[0] if rows.ndim > 1 else 1
    if not rows.size:
        return np.zeros(examples)
    rows = rows.reshape(examples, -1, rows.shape[-1] if rows.ndim else 1)
    finite = np.isfinite(rows).all(axis=(1, 2))
    rows = _probabilities(np.where(np.isfinite(rows), rows, 0.0))
    classes = rows.shape[-1]
    if measure == "max_softmax":
        sure = rows.max(axis=-1)
    elif measure == "margin":
        top = np.sort(rows, axis=-1)
        sure = top[..., -1] - top[..., -2] if classes > 1 else np.ones(rows.shape[:-1])
    else:
        entropy = -(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(axis=-1)
        sure = 1 - entropy / np.log(classes) if classes > 1 else np.ones(rows.shape[:-1])
    found: NDArray[Any] = np.where(finite, np.clip(sure, 0.0, 1.0).min(axis=1), 0.0)
    return found


def _probabilities(rows: NDArray[Any]) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415 - as above

    if rows.min() >= -_ROUNDING and np.abs(rows.sum(axis=-1) - 1).max() <= _ROUNDING:
        found: NDArray[Any] = np.clip(rows, 0.0, 1.0)
    else:
        found = np.exp(rows - rows.max(axis=-1, keepdims=True))
        found /= found.sum(axis=-1, keepdims=True)
    return found


def splits(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether the first axis of everything is free: the examples of a batch then stand side by side."""
    return all(not spec.any_rank and spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))


def with_output(request: InferRequest, name: str) -> InferRequest:
    """The request, asking for that output too."""
    if not request.outputs or any(output.name == name for output in request.outputs):
        return request
    wanted = (*request.outputs, RequestedOutput(name, binary=True))
    return InferRequest(request.inputs, wanted, request.id, request.parameters)


def rows_of(request: InferRequest) -> int | None:
    """How many examples the request has, where all its inputs agree."""
    counts = {tensor.array.shape[0] for tensor in request.inputs if tensor.array.ndim}
    return counts.pop() if len(counts) == 1 else None


def part(request: InferRequest, rows: NDArray[Any]) -> InferRequest:
    """Only those examples."""
    inputs = tuple(Tensor(tensor.name, tensor.datatype, tensor.array[rows]) for tensor in request.inputs)
    return InferRequest(inputs, request.outputs, request.id, request.parameters)


def joined(first: InferResponse, then: InferResponse, rows: NDArray[Any]) -> tuple[Tensor, ...] | None:
    """The first answer with those examples replaced; None where the two do not fit together."""
    found = []
    for mine, other in zip(first.outputs, then.outputs, strict=True):
        array = mine.array.copy()
        if other.array.shape != (len(rows), *array.shape[1:]) or mine.datatype != other.datatype:
            return None
        array[rows] = other.array
        found.append(Tensor(mine.name, mine.datatype, array))
    return tuple(found)
