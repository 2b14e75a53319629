"""The JSON part of an Open Inference Protocol request, checked: what is asked for, and what binary data must follow.

Pure. Unknown fields are ignored, as the protocol's extensions demand; known ones of a wrong type are refused by name. A
shape is only believed as far as the bytes bear it out, which the reader of the binary data checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agent.base.datatypes import DATATYPES, ITEM_SIZE
from agent.base.errors import PeerError, TooLargeError, UnsupportedError
from agent.infer.tensors import RequestedOutput
from agent.serve.exchange import read_json

#: numpy before 2 has 32 axes at most.
MAX_AXES = 32
MAX_TENSORS = 256
MAX_PARAMETERS = 64
MAX_NAME = 256
#: Elements of a BYTES tensor are Python objects, handled one by one on the event loop.
MAX_BYTES_ELEMENTS = 1 << 18
_NO_PARAMETERS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class InputPlan:
    """An input as its JSON describes it: ``size`` bytes of binary data, or ``data`` when ``size`` is None."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    count: int
    size: int | None
    data: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything of a request but its binary data."""

    inputs: tuple[InputPlan, ...]
    outputs: tuple[RequestedOutput, ...]
    id: str
    parameters: Mapping[str, Any]
    binary: bool


def make_plan(data: bytes | memoryview) -> Plan:
    """The plan in ``data``. Raises PeerError naming the field, TooLargeError, UnsupportedError (shared memory)."""
    document = read_json(data)
    if not isinstance(document, dict):
        raise PeerError("request: must be a JSON object")
    parameters = _parameters(document, "parameters")
    binary = _flag(parameters, "binary_data_output", "parameters") or False
    inputs = _list(document, "inputs")
    if not inputs:
        raise PeerError("inputs: missing")
    wanted = _list(document, "outputs")
    outputs = tuple(_output(entry, f"outputs[{index}]", binary) for index, entry in enumerate(wanted))
    names = {output.name for output in outputs}
    if len(names) < len(outputs):
        raise PeerError("outputs: one name twice")
    request_id = document.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > MAX_NAME:
        raise PeerError(f"id: must be a text of at most {MAX_NAME} characters")
    return Plan(
        tuple(_input(entry, f"inputs[{index}]") for index, entry in enumerate(inputs)),
        outputs,
        request_id,
        MappingProxyType({name: value for name, value in parameters.items() if name != "binary_data_output"})
        if parameters
        else _NO_PARAMETERS,
        binary,
    )


#: Keyed by the bytes themselves; what it gives is immutable.
remembered_plan: Callable[[bytes], Plan] = functools.lru_cache(maxsize=64)(make_plan)


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise PeerError(f"{name}: must be a list")
    if len(value) > MAX_TENSORS:
        raise PeerError(f"{name}: more than {MAX_TENSORS}")
    return value


def _parameters(owner: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The plain values of a ``parameters`` object."""
    value = owner.get("parameters")
    if value is None:
        return _NO_PARAMETERS
    if not isinstance(value, dict) or len(value) > MAX_PARAMETERS:
        raise PeerError(f"{where}: must be an object of at most {MAX_PARAMETERS} values")
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, (str, int, float, bool)):
            raise PeerError(f"{where}.{name[:64]}: must be a text, number or boolean")
    return value


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise PeerError(f"{where}.{name}: must be true or false")
    return value


def _whole(parameters: Mapping[str, Any], name: str, where: str) -> int | None:
    value = parameters.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 63):
        raise PeerError(f"{where}.{name}: must be a whole number, not negative")
    return value


def _named(entry: Any, where: str) -> str:
    if not isinstance(entry, dict):
        raise PeerError(f"{where}: must be an object")
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise PeerError(f"{where}.name: must be a text of 1 to {MAX_NAME} characters")
    return name


def _output(entry: Any, where: str, binary: bool) -> RequestedOutput:
    name = _named(entry, where)
    parameters = _parameters(entry, f"{where}.parameters")
    _refuse_shared_memory(parameters, f"output '{name}'")
    own = _flag(parameters, "binary_data", f"output '{name}': parameters")
    classes = _whole(parameters, "classification", f"output '{name}': parameters")
    return RequestedOutput(name, binary if own is None else own, classes or 0)


def _input(entry: Any, where: str) -> InputPlan:
    name = _named(entry, where)
    label = f"input '{name}'"
    datatype = entry.get("datatype")
    if datatype not in DATATYPES:
        raise PeerError(f"{label}: datatype must be one of {', '.join(DATATYPES)}")
    shape = _shape(entry.get("shape"), label)
    count = _count(shape, ITEM_SIZE.get(datatype, 1), label)
    parameters = _parameters(entry, f"{label}: parameters")
    _refuse_shared_memory(parameters, label)
    size = _whole(parameters, "binary_data_size", f"{label}: parameters")
    if size is None:
        if "data" not in entry:
            raise PeerError(f"{label}: data missing (neither 'data' nor 'binary_data_size')")
        return InputPlan(name, datatype, shape, count, None, entry["data"])
    if "data" in entry:
        raise PeerError(f"{label}: both 'data' and 'binary_data_size'")
    if datatype != "BYTES" and size != count * ITEM_SIZE[datatype]:
        wanted = count * ITEM_SIZE[datatype]
        raise PeerError(f"{label}: binary_data_size {size}, but shape {list(shape)} of {datatype} is {wanted} bytes")
    check_elements(datatype, count, label)
    return InputPlan(name, datatype, shape, count, size, None)


def _refuse_shared_memory(parameters: Mapping[str, Any], label: str) -> None:
    if "shared_memory_region" in parameters:
        raise UnsupportedError(f"{label}: shared memory is not served")


def _shape(value: Any, label: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_AXES:
        raise PeerError(f"{label}: shape must be a list of at most {MAX_AXES} sizes")
    if any(type(size) is not int or not 0 <= size < 1 << 31 for size in value):
        raise PeerError(f"{label}: shape must hold whole numbers, not negative and below 2^31")
    return tuple(value)


def _count(shape: Sequence[int], item: int, label: str) -> int:
    """Number of elements. Empty axes do not excuse the others: numpy multiplies what is not zero."""
    volume, count = item, 1
    for size in shape:
        volume *= size or 1
        count *= size
        if volume >= 1 << 31:
            raise PeerError(f"{label}: shape {list(shape)} is too large")
    return count


def check_elements(datatype: str, count: int, label: str) -> None:
    """Raise TooLargeError for a BYTES tensor of too many elements."""
    if datatype == "BYTES" and count > MAX_BYTES_ELEMENTS:
        raise TooLargeError(f"{label}: {count} BYTES elements, at most {MAX_BYTES_ELEMENTS} are taken")
