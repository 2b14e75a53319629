"""Tensors and inference requests as the engine and the server exchange them, and their check against a signature.

numpy is imported only for types here: a daemon that serves nothing yet never loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.base.errors import PeerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agent.bundles.manifest import TensorSpec


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array. ``array.dtype`` is ``datatypes.NUMPY_NAME[datatype]``; BYTES arrays hold ``bytes`` objects."""

    name: str
    datatype: str
    array: NDArray[Any]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the caller wants; ``classification`` > 0 asks for the top classes as BYTES "score:index:label"."""

    name: str
    binary: bool = False
    classification: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request. ``outputs`` empty means all. ``parameters`` are the request's own, already plain JSON values."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResponse:
    """One answer. ``parameters`` say what really ran: variant, backend, degraded, queue and compute time."""

    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def fits(spec: TensorSpec, shape: Sequence[int]) -> bool:
    """Whether an array of that shape may stand for ``spec``: the same rank, equal where an axis is not free."""
    if spec.any_rank:
        return True
    if len(shape) != len(spec.shape):
        return False
    return all(want in (-1, have) for want, have in zip(spec.shape, shape, strict=True))


def check_inputs(specs: Sequence[TensorSpec], inputs: Sequence[Tensor]) -> dict[str, NDArray[np.generic]]:
    """The arrays by name, after comparing them with the signature; PeerError names the input and what is wrong."""
    arrays: dict[str, NDArray[np.generic]] = {}
    by_name = {spec.name: spec for spec in specs}
    for tensor in inputs:
        spec = by_name.get(tensor.name)
        if spec is None:
            raise PeerError(f"input '{tensor.name}': no such input; the model has {', '.join(by_name)}")
        if tensor.name in arrays:
            raise PeerError(f"input '{tensor.name}': given twice")
        if tensor.datatype != spec.datatype:
            raise PeerError(f"input '{tensor.name}': datatype {tensor.datatype}, the model takes {spec.datatype}")
        if not fits(spec, tensor.array.shape):
            raise PeerError(
                f"input '{tensor.name}': shape {list(tensor.array.shape)}, the model takes {list(spec.shape)}"
            )
        arrays[tensor.name] = tensor.array
    missing = [spec.name for spec in specs if not spec.optional and spec.name not in arrays]
    if missing:
        raise PeerError(f"input '{missing[0]}': missing")
    return arrays
