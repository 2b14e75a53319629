"""Open Inference Protocol v2 requests and answers: JSON, and the binary tensor data extension.

Invariants: nothing is allocated for a size or shape that the bytes at hand do not bear out; binary inputs are views of
the request's body; large binary outputs are views of the model's arrays. numpy is imported at first use.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.base.datatypes import NUMPY_NAME, decode_bytes_elements, encode_bytes_elements
from agent.base.errors import AgentError, PeerError, TooLargeError
from agent.infer.tensors import InferRequest, InferResponse, RequestedOutput, Tensor
from agent.serve.exchange import (
    BINARY,
    JSON,
    Part,
    Response,
    encode_json,
    encode_parameters,
    encode_text,
)
from agent.serve.plan import InputPlan, check_elements, make_plan, remembered_plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: JSON parts of binary requests up to this size are remembered: an app sends the same one each time.
_REMEMBERED_BYTES = 2048
#: Outputs up to this size are cheaper to copy than to send apart.
_SMALL_BYTES = 16384
_INT_RANGE = {
    f"{sign}INT{bits}": (0, (1 << bits) - 1) if sign else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    for bits in (8, 16, 32, 64)
    for sign in ("", "U")
}


#: What is larger is decoded, or encoded, in a thread: bytes of JSON or of strings, elements that become text.
_LONG_BYTES = 65536
_LONG_ELEMENTS = 4096
#: From this length on the best classes are found by partition, which does not order equal scores by their index.
_LONG_AXIS = 65536


class Decoded(NamedTuple):
    """A request, and whether outputs that it does not name go out as binary."""

    request: InferRequest
    binary: bool


def decode_request(body: bytes | memoryview, header_length: int | None, json_bytes: int) -> Decoded:
    """The request in ``body``, whose first ``header_length`` bytes are JSON (None: all of it).

    Raises PeerError naming the field, TooLargeError when the JSON is over ``json_bytes``.
    """
    if header_length is None:
        header_length = len(body)
    elif not 0 < header_length <= len(body):
        raise PeerError(
            f"Inference-Header-Content-Length: {header_length}, but the body has {len(body)} bytes"
            if header_length
            else "Inference-Header-Content-Length: 0 (raw binary) is not served, send the JSON part"
        )
    if header_length > json_bytes:
        raise TooLargeError(
            f"cannot read JSON: {header_length} bytes, at most {json_bytes} are taken",
            hint="send tensors as binary data, with Inference-Header-Content-Length",
        )
    if header_length <= _REMEMBERED_BYTES and header_length < len(body):
        plan = remembered_plan(bytes(body[:header_length]))
    else:
        plan = make_plan(body[:header_length])
    request = InferRequest(_tensors(plan.inputs, body, header_length), plan.outputs, plan.id, plan.parameters)
    return Decoded(request, plan.binary)


def takes_long_to_decode(body: bytes | memoryview, header_length: int | None) -> bool:
    """Whether a request holds much that becomes Python objects one by one: JSON, or strings."""
    size = len(body)
    if size <= _LONG_BYTES:
        return False
    json_length = size if header_length is None else min(header_length, size)
    return json_length > _LONG_BYTES or b"BYTES" in bytes(body[:json_length])


def takes_long_to_encode(response: InferResponse, decoded: Decoded) -> bool:
    """Whether an answer holds much that becomes text, or must be sorted."""
    if all(tensor.array.size <= _LONG_ELEMENTS for tensor in response.outputs):
        return False
    return any(
        tensor.array.size > _LONG_ELEMENTS
        and (
            tensor.datatype == "BYTES"
            or not (decoded.binary if wanted is None else wanted.binary)
            or (wanted is not None and wanted.classification > 0)
        )
        for tensor, wanted in _chosen(response, decoded)
    )


def _tensors(inputs: Sequence[InputPlan], body: bytes | memoryview, offset: int) -> tuple[Tensor, ...]:
    """The inputs, the binary ones from ``offset`` on, which they must use up."""
    tensors = []
    for part in inputs:
        if part.size is None:
            array = _from_json(part)
        else:
            end = offset + part.size
            if end > len(body):
                left = len(body) - offset
                raise PeerError(f"input '{part.name}': binary_data_size {part.size}, but {left} bytes are left")
            array = _from_binary(part, body, offset)
            offset = end
        tensors.append(Tensor(part.name, part.datatype, array))
    if offset != len(body):
        raise PeerError(f"binary data: {len(body) - offset} bytes left over after the inputs")
    return tuple(tensors)


# Arrays from bytes and from JSON values.


def _from_binary(part: InputPlan, body: bytes | memoryview, offset: int) -> NDArray[Any]:
    """A view of the body, or a copy where it does not lie as its items need."""
    import numpy as np  # noqa: PLC0415 - a daemon that serves nothing yet never loads it

    if part.datatype == "BYTES":
        view = memoryview(body)[offset : offset + (part.size or 0)]
        try:
            return _objects(decode_bytes_elements(view, part.count), part.shape)
        except ValueError as error:
            raise PeerError(f"input '{part.name}': {error}") from error
    array: NDArray[Any] = np.ndarray(part.shape, _dtype(part.datatype), body, offset)
    if not array.flags.aligned:
        array = array.copy()
    if part.datatype == "BOOL" and part.count and array.view("u1").max() > 1:
        raise PeerError(f"input '{part.name}': BOOL bytes must be 0 or 1")
    return array


@functools.lru_cache(maxsize=32)
def _dtype(datatype: str) -> np.dtype[Any]:
    import numpy as np  # noqa: PLC0415

    return np.dtype(NUMPY_NAME[datatype])


def _objects(elements: Sequence[bytes], shape: tuple[int, ...]) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415

    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _from_json(part: InputPlan) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415

    label = f"input '{part.name}'"
    values = _flat(part.data, part.shape, label)
    if len(values) != part.count:
        raise PeerError(f"{label}: {len(values)} values, but shape {list(part.shape)} has {part.count}")
    check_elements(part.datatype, part.count, label)
    if part.datatype == "BYTES":
        _check_kinds(values, {str}, "texts", part)
        try:
            return _objects([value.encode("utf-8") for value in values], part.shape)
        except UnicodeEncodeError as error:
            raise PeerError(f"{label}: data holds a text that is not Unicode") from error
    if part.datatype == "BOOL":
        _check_kinds(values, {bool}, "true or false", part)
        return np.array(values, dtype="?").reshape(part.shape)
    if part.datatype in _INT_RANGE:
        _check_kinds(values, {int}, "whole numbers", part)
        least, most = _INT_RANGE[part.datatype]
        if values and (min(values) < least or max(values) > most):
            raise PeerError(f"{label}: data holds a number out of the range of {part.datatype}")
        return np.array(values, dtype=NUMPY_NAME[part.datatype]).reshape(part.shape)
    _check_kinds(values, {int, float}, "numbers", part)
    return _floats(values, part.datatype, label).reshape(part.shape)


def _flat(data: Any, shape: tuple[int, ...], label: str) -> list[Any]:
    """The values of ``data``, flat or nested as ``shape`` says, row-major. No recursion: depth is that of the shape."""
    if not isinstance(data, list):
        if shape:
            raise PeerError(f"{label}: data must be a list")
        return [data]
    if list not in set(map(type, data)):
        return data
    level: list[Any] = [data]
    for axis, size in enumerate(shape):
        if any(type(entry) is not list or len(entry) != size for entry in level):
            raise PeerError(f"{label}: data does not nest as shape {list(shape)} says (axis {axis})")
        level = list(itertools.chain.from_iterable(level))
    if list in set(map(type, level)):
        raise PeerError(f"{label}: data nests deeper than shape {list(shape)} says")
    return level


def _check_kinds(values: list[Any], allowed: set[type], words: str, part: InputPlan) -> None:
    # Exact types: True is an int to Python, and must not pass for a number.
    if not set(map(type, values)) <= allowed:
        index = next(index for index, value in enumerate(values) if type(value) not in allowed)
        raise PeerError(f"input '{part.name}': data of {part.datatype} must be {words} (value {index} is not)")


def _floats(values: list[Any], datatype: str, label: str) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415

    try:
        wide = np.array(values, dtype="<f8")
    except OverflowError:
        wide = np.array([np.inf])
    with np.errstate(over="ignore"):
        array: NDArray[Any] = wide.astype("<f4" if datatype == "BF16" else NUMPY_NAME[datatype])
    if datatype == "BF16":
        bits = array.view("<u4")
        array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to the nearest, ties to even
        finite = bool(((array & 0x7F80) != 0x7F80).all())
    else:
        finite = bool(np.isfinite(array).all())
    if not finite:
        raise PeerError(f"{label}: data holds a number out of the range of {datatype}")
    return array


# Answers.


def encode_response(response: InferResponse, decoded: Decoded, json_bytes: int, labels: Sequence[str] = ()) -> Response:
    """The HTTP answer: JSON, then the binary outputs in its order.

    Raises PeerError for what JSON cannot say, TooLargeError for a JSON answer far over ``json_bytes``.
    """
    outputs: list[str] = []
    tails: list[Part] = []
    for tensor, wanted in _chosen(response, decoded):
        if wanted is not None and wanted.classification:
            tensor = classify(tensor, wanted.classification, labels, json_bytes // 8)  # noqa: PLW2901
        if decoded.binary if wanted is None else wanted.binary:
            tail = _to_binary(tensor)
            outputs.append(_binary_entry(tensor.name, tensor.datatype, tensor.array.shape, len(tail)))
            tails.append(tail)
        else:
            outputs.append(_json_entry(tensor, json_bytes))
    said = _answer_start(response.model_name, response.model_version)
    if response.id or decoded.request.id:
        said += f',"id":{encode_text(response.id or decoded.request.id)}'
    if response.parameters:
        said += f',"parameters":{encode_parameters(response.parameters)}'
    head = f'{said},"outputs":[{",".join(outputs)}]}}'.encode("ascii")
    if not tails:
        return Response(200, (head,), JSON)
    return Response(200, (head, *tails), BINARY, (("Inference-Header-Content-Length", str(len(head))),))


@functools.lru_cache(maxsize=64)
def _answer_start(model: str, version: str) -> str:
    return f'{{"model_name":{encode_text(model)},"model_version":{encode_text(version)}'


@functools.lru_cache(maxsize=128)
def _binary_entry(name: str, datatype: str, shape: tuple[int, ...], size: int) -> str:
    parameters = {"binary_data_size": size}
    entry = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
    return encode_json(entry).decode("ascii")


def _json_entry(tensor: Tensor, json_bytes: int) -> str:
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.array.shape}
    return encode_json(entry | _to_json(tensor, json_bytes)).decode("ascii")


def _chosen(response: InferResponse, decoded: Decoded) -> list[tuple[Tensor, RequestedOutput | None]]:
    if not decoded.request.outputs:
        return [(tensor, None) for tensor in response.outputs]
    by_name = {tensor.name: tensor for tensor in response.outputs}
    missing = [wanted.name for wanted in decoded.request.outputs if wanted.name not in by_name]
    if missing:
        raise AgentError(f"output '{missing[0]}': the model gave none")
    return [(by_name[wanted.name], wanted) for wanted in decoded.request.outputs]


def _to_binary(tensor: Tensor) -> Part:
    """Row-major little-endian bytes: a copy when small, else a view of the array."""
    import numpy as np  # noqa: PLC0415

    if tensor.datatype == "BYTES":
        return encode_bytes_elements(_as_bytes(value) for value in tensor.array.ravel().tolist())
    array = np.ascontiguousarray(tensor.array, _dtype(tensor.datatype))
    if array.nbytes <= _SMALL_BYTES:
        return array.tobytes()
    return array.reshape(-1).view("u1").data


def _as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8")


def _to_json(tensor: Tensor, json_bytes: int) -> dict[str, Any]:
    """``data``, flat. NaN and Infinity become null, and are counted in the output's ``parameters.non_finite``."""
    import numpy as np  # noqa: PLC0415

    array = tensor.array
    if array.size > json_bytes // 8:
        raise TooLargeError(
            f"output '{tensor.name}': {array.size} values are too many for JSON", hint="ask for it with binary_data"
        )
    if tensor.datatype == "BYTES":
        return {"data": _texts(tensor)}
    if tensor.datatype == "BF16":
        array = _widened(array)
    values = array.ravel().tolist()
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return {"data": values}
    finite = np.isfinite(array).ravel().tolist()
    plain = [value if good else None for value, good in zip(values, finite, strict=True)]
    return {"parameters": {"non_finite": finite.count(False)}, "data": plain}


def _texts(tensor: Tensor) -> list[str]:
    try:
        return [_as_bytes(value).decode("utf-8") for value in tensor.array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise PeerError(
            f"output '{tensor.name}': holds bytes that are not UTF-8, which JSON cannot carry",
            hint="ask for it with binary_data",
        ) from error


def _widened(bits: NDArray[Any]) -> NDArray[np.float32]:
    """BF16 bits as float32: the upper half of its bits."""
    return (bits.astype("<u4") << 16).view("<f4")


def classify(tensor: Tensor, count: int, labels: Sequence[str], most: int = 1 << 20) -> Tensor:
    """The ``count`` largest values along the last axis as BYTES ``score:index[:label]`` (Triton's classification).

    TooLargeError when that makes more than ``most`` texts.
    """
    import numpy as np  # noqa: PLC0415

    if tensor.datatype == "BYTES":
        raise PeerError(f"output '{tensor.name}': classification needs numbers, it has BYTES")
    scores = (_widened(tensor.array) if tensor.datatype == "BF16" else tensor.array).astype("<f8")
    scores = scores.reshape(1) if not scores.shape else scores
    count = min(count, scores.shape[-1])
    if count * math.prod(scores.shape[:-1]) > most:
        raise TooLargeError(f"output '{tensor.name}': classification would give more than {most} classes")
    best = _best(-scores, count)
    values = np.take_along_axis(scores, best, axis=-1)
    texts = [
        f"{value:f}:{index}" + (f":{labels[index]}" if index < len(labels) else "")
        for value, index in zip(values.ravel().tolist(), best.ravel().tolist(), strict=True)
    ]
    return Tensor(tensor.name, "BYTES", _objects([text.encode() for text in texts], best.shape))


def _best(costs: NDArray[Any], count: int) -> NDArray[Any]:
    """Indices of the ``count`` smallest along the last axis, in order; equal ones by index where the axis is short."""
    import numpy as np  # noqa: PLC0415

    if costs.shape[-1] < _LONG_AXIS or count * 2 > costs.shape[-1]:
        return np.argsort(costs, axis=-1, kind="stable")[..., :count]
    some = np.sort(np.argpartition(costs, count, axis=-1)[..., :count], axis=-1)
    order = np.argsort(np.take_along_axis(costs, some, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, axis=-1)
