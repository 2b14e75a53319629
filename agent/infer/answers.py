"""What a trial child answers, as verified values: a number is finite and not negative, a list is bounded. Pure.

A child may say anything, so whatever is missing or of a wrong kind is a ``ChildError`` like a crash: no model may end
an operation of the daemon with its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from agent.bundles.manifest import TensorSpec
from agent.infer.children import ChildError, plain

_MAX_TENSORS = 256
_MAX_TEXT = 300
#: Three hundred years in milliseconds, and more than any board's memory in MB.
_LARGEST = 1e13
_LARGEST_FLOAT = 1e308


def number(answer: Mapping[str, Any], name: str) -> float:
    """A finite number of at least 0. ChildError."""
    return _number(answer.get(name), name)


def numbers(answer: Mapping[str, Any], name: str, most: int) -> list[float]:
    """At most ``most`` numbers above 0: times of runs. ChildError."""
    values = answer.get(name)
    if not isinstance(values, list) or len(values) > most:
        raise _nonsense(name)
    found = [_number(value, name) for value in values]
    if any(value == 0 for value in found):
        raise _nonsense(name)
    return found


def optional_number(answer: Mapping[str, Any], name: str) -> float | None:
    """A finite number of any sign, or None where the child says that there is none. ChildError."""
    value = answer.get(name)
    return None if value is None else _number(value, name, -_LARGEST_FLOAT, _LARGEST_FLOAT)


def text(answer: Mapping[str, Any], name: str) -> str:
    """A text fit for a terminal, cut to a line; empty where there is none. ChildError."""
    value = answer.get(name, "")
    if not isinstance(value, str):
        raise _nonsense(name)
    return plain(value, _MAX_TEXT)


def tensors(answer: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """A signature's rows, each proven to be a ``TensorSpec``. ChildError."""
    rows = answer.get(name)
    if not isinstance(rows, list) or len(rows) > _MAX_TENSORS:
        raise _nonsense(name)
    try:
        for row in rows:
            TensorSpec.model_validate(row)
    except ValidationError as error:
        raise _nonsense(name) from error
    return rows


def _number(value: object, name: str, least: float = 0.0, most: float = _LARGEST) -> float:
    # NaN is within no bounds.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise _nonsense(name)
    return float(value)


def _nonsense(name: str) -> ChildError:
    return ChildError("crashed", f"answered with nonsense for '{name}'")
