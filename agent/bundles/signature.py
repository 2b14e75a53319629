"""What every model file's signature has, whatever its format, and how two signatures are compared. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.bundles.manifest import Precision, TensorSpec


class ModelSignature(Protocol):
    """What a model file says that it takes and gives, and what most of it is."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def precision(self) -> Precision: ...


def differences(signature: ModelSignature, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
    """What keeps a file from standing for a manifest's ``inputs`` and ``outputs``, in words; empty when nothing does.

    Shapes are compared only where both sides fix an axis: exporters differ in which axes they leave free.
    """
    found: list[str] = []
    for what, have, want in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
        by_name = {spec.name: spec for spec in have}
        for spec in want:
            other = by_name.pop(spec.name, None)
            if other is None:
                found.append(f"it has no {what} {spec.name!r}")
            elif other.datatype != spec.datatype:
                found.append(f"{what} {spec.name!r} is {other.datatype}, not {spec.datatype}")
            elif not (spec.any_rank or other.any_rank or _compatible(other.shape, spec.shape)):
                found.append(f"{what} {spec.name!r} has shape {list(other.shape)}, not {list(spec.shape)}")
        if what == "input":
            found.extend(f"it wants another input, {name!r}" for name in by_name)
    return found


def _compatible(left: Sequence[int], right: Sequence[int]) -> bool:
    return len(left) == len(right) and all(-1 in (a, b) or a == b for a, b in zip(left, right, strict=True))
