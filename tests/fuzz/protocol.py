"""Targets of the Open Inference Protocol: requests in JSON and with binary tensors, BYTES elements."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from agent.base.datatypes import ITEM_SIZE, NUMPY_NAME, decode_bytes_elements, encode_bytes_elements
from agent.base.errors import PeerError, TooLargeError, UnsupportedError
from agent.infer.tensors import InferResponse, Tensor
from agent.serve.oip import Decoded, decode_request, encode_response
from tests.fuzz.target import Memory, Shape, Target, many, nested

JSON_BYTES = 1 << 20


def read_json_request(data: bytes) -> Decoded:
    return decode_request(data, None, JSON_BYTES)


def read_binary_request(data: bytes) -> Decoded:
    """The first two bytes are the header length, little-endian."""
    return decode_request(data[2:], int.from_bytes(data[:2], "little"), JSON_BYTES)


def holds_json_request(data: bytes, decoded: Decoded) -> None:
    """Arrays are what a plain reading of the JSON gives, and survive being sent back."""
    document = json.loads(data)
    for tensor, entry in zip(decoded.request.inputs, document["inputs"], strict=True):
        assert (tensor.name, tensor.datatype) == (entry["name"], entry["datatype"])
        assert list(tensor.array.shape) == entry["shape"]
        _right_kind(tensor)
        if entry.get("parameters") and entry["parameters"].get("binary_data_size") is not None:
            assert tensor.array.size == 0 or tensor.datatype == "BYTES"
            continue
        wanted = list(_leaves(entry["data"]))
        if tensor.datatype == "BYTES":
            assert tensor.array.ravel().tolist() == [value.encode() for value in wanted]
        elif tensor.datatype in ("FP32", "FP64", "FP16"):
            assert (tensor.array.ravel() == np.array(wanted, "<f8").astype(NUMPY_NAME[tensor.datatype])).all()
        elif tensor.datatype != "BF16":
            assert tensor.array.ravel().tolist() == wanted
    _survive(decoded, binary=True)
    _survive(decoded, binary=False)
    _answered(decoded)


def holds_binary_request(_data: bytes, decoded: Decoded) -> None:
    for tensor in decoded.request.inputs:
        _right_kind(tensor)
    _survive(decoded, binary=True)
    _answered(decoded)


def _leaves(data: Any) -> Any:
    if isinstance(data, list):
        for entry in data:
            yield from _leaves(entry)
    else:
        yield data


def _right_kind(tensor: Tensor) -> None:
    assert tensor.array.dtype == np.dtype(NUMPY_NAME[tensor.datatype])
    assert tensor.array.size == math.prod(tensor.array.shape)
    if tensor.datatype == "BYTES":
        assert all(type(value) is bytes for value in tensor.array.ravel().tolist())
    elif tensor.datatype == "BOOL" and tensor.array.size:
        assert tensor.array.view("u1").max() <= 1


def _raw(tensor: Tensor) -> tuple[Any, ...]:
    values = tensor.array.ravel().tolist() if tensor.datatype == "BYTES" else tensor.array.tobytes()
    return tensor.name, tensor.datatype, tensor.array.shape, values


def _survive(decoded: Decoded, *, binary: bool) -> None:
    """The inputs, answered as outputs and read as inputs again, are the same bit for bit."""
    plain = Decoded(type(decoded.request)(decoded.request.inputs), binary)
    answer = encode_response(InferResponse("m", "1", decoded.request.inputs), plain, 64 << 20)
    head = bytes(answer.parts[0])
    document = {"inputs": json.loads(head)["outputs"]}
    for entry in document["inputs"]:
        assert "non_finite" not in entry.get("parameters", {})
    again = json.dumps(document).encode()
    body = b"".join([again, *(bytes(part) for part in answer.parts[1:])])
    back = decode_request(body, len(again) if binary else None, 64 << 20)
    assert [_raw(tensor) for tensor in back.request.inputs] == [_raw(tensor) for tensor in decoded.request.inputs]


def _answered(decoded: Decoded) -> None:
    """The outputs that the request asks for, classes and all, out of its own inputs: an answer or a plain refusal."""
    inputs = decoded.request.inputs
    outputs = tuple(
        Tensor(wanted.name, inputs[index % len(inputs)].datatype, inputs[index % len(inputs)].array)
        for index, wanted in enumerate(decoded.request.outputs)
    )
    try:
        answer = encode_response(InferResponse("m", "1", outputs or inputs), decoded, JSON_BYTES, ("cat", "dog"))
    except (PeerError, TooLargeError):
        return
    document = json.loads(bytes(answer.parts[0]), parse_constant=_refuse_word)
    sizes = [entry.get("parameters", {}).get("binary_data_size") for entry in document["outputs"]]
    assert [size for size in sizes if size is not None] == [len(part) for part in answer.parts[1:]]


def _refuse_word(word: str) -> None:
    """NaN or Infinity in an answer."""
    raise AssertionError(f"{word} in a JSON answer")


def _entry(name: str, datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if data is not None:
        entry["data"] = data
    if parameters:
        entry["parameters"] = parameters
    return entry


def json_seeds() -> list[bytes]:
    """A request of each datatype, flat, nested, scalar, empty; outputs with parameters."""
    documents = [
        {"inputs": [_entry("x", name, [2, 1], [[1], [0]])]} for name in (*NUMPY_NAME,) if name not in ("BYTES", "BOOL")
    ]
    documents += [
        {
            "inputs": [_entry("t", "BYTES", [2], ["a", "ü€\U0001f600"]), _entry("b", "BOOL", [1, 2], [True, False])],
            "id": "7",
        },
        {
            "inputs": [_entry("s", "FP32", [], 1.5), _entry("e", "INT8", [0, 3], [])],
            "outputs": [
                {"name": "y", "parameters": {"binary_data": True}},
                {"name": "z", "parameters": {"classification": 2}},
            ],
            "parameters": {"priority": 1, "timeout": 1000, "binary_data_output": False},
        },
        {
            "inputs": [
                _entry("f", "FP64", [2, 2], [[1e300, -0.0], [5e-324, 2]]),
                _entry("h", "BF16", [3], [1, 3.3e38, 1e-40]),
            ]
        },
    ]
    return [json.dumps(document, ensure_ascii=False).encode() for document in documents]


def _binary(document: dict[str, Any], tail: bytes) -> bytes:
    head = json.dumps(document).encode()
    return struct.pack("<H", len(head)) + head + tail


def binary_seeds() -> list[bytes]:
    """Binary tensors of each datatype, two of them, BYTES, mixed with JSON."""
    seeds = [
        _binary({"inputs": [_entry("x", name, [3], binary_data_size=3 * size)]}, bytes([1, 0, 1] * size))
        for name, size in ITEM_SIZE.items()
    ]
    texts = encode_bytes_elements([b"", b"abc", b"\xff\x00"])
    seeds.append(
        _binary(
            {"inputs": [_entry("t", "BYTES", [3, 1], binary_data_size=len(texts))], "outputs": [{"name": "t"}]}, texts
        )
    )
    both = {
        "inputs": [
            _entry("j", "INT32", [1], [5]),
            _entry("x", "FP32", [2, 2], binary_data_size=16),
            _entry("e", "FP16", [0], binary_data_size=0),
        ]
    }
    both["parameters"] = {"binary_data_output": True}
    both["outputs"] = [
        {"name": "x", "parameters": {"classification": 1}},
        {"name": "j", "parameters": {"binary_data": False}},
    ]
    seeds.append(_binary(both, struct.pack("<4f", 1, float("nan"), float("-inf"), -0.0)))
    return seeds


def _json_input(datatype: str, data: Callable[[int], bytes], each: int = 0, shape: bytes = b"[%d]") -> Shape:
    """One input; ``each`` bytes of data are a value."""

    def make(size: int) -> bytes:
        count = size // each if each else 1
        fields = datatype.encode(), shape % count, data(count * each if each else size)
        return b'{"inputs":[{"name":"x","datatype":"%s","shape":%s,"data":%s}]}' % fields

    return make


JSON_SHAPES = {
    "numbers": _json_input("FP32", many(b"1.5,", b"[", b"0]"), 4),
    "whole numbers": _json_input("INT64", lambda size: many(b"15,", b"[")(size - 3) + b"7]", 3),
    "rows": _json_input("INT64", lambda size: many(b"[1],", b"[")(size - 4) + b"[1]]", 4, b"[%d,1]"),
    "texts": _json_input("BYTES", lambda size: many(b'"ab",', b"[")(size - 5) + b'"ab"]', 5),
    "depth": _json_input("FP32", nested(b"[", b"]")),
    "unclosed": many(b"["),
    "empty lists": _json_input("FP32", many(b"[],", b"[", b"1]")),
    "digits": _json_input("FP32", many(b"1", b"[", b"]")),
    "exponent": _json_input("FP64", many(b"1", b"[1e", b"]")),
    "fraction": _json_input("FP64", many(b"1", b"[0.", b"]")),
    "escapes": many(b"\\u00e9", b'{"', b'":1}'),
    "keys": many(b'"%d":0,', b"{", b'"a":0}'),
    "tensors": many(b'{"name":"x"},', b'{"inputs":[', b"{}]}"),
}


def _tail(size: int) -> bytes:
    texts = encode_bytes_elements([b"a"] * (size // 5))
    return _binary({"inputs": [_entry("t", "BYTES", [size // 5], binary_data_size=len(texts))]}, texts)


# BYTES elements.


def read_elements(data: bytes) -> list[bytes]:
    """The first four bytes are the count."""
    return decode_bytes_elements(data[4:], int.from_bytes(data[:4], "little"))


def holds_elements(data: bytes, elements: list[bytes]) -> None:
    count = int.from_bytes(data[:4], "little")
    assert len(elements) == count
    assert encode_bytes_elements(elements) == data[4:]
    for wrong in (count - 1, count + 1):
        if wrong >= 0:
            try:
                decode_bytes_elements(memoryview(data[4:]), wrong)
            except ValueError:
                continue
            raise AssertionError(f"{count} elements pass for {wrong}")


def element_seeds() -> list[bytes]:
    cases: list[list[bytes]] = [[], [b""], [b"abc", b"", b"\x00\xff"], [b"x" * 300] * 3]
    return [struct.pack("<I", len(case)) + encode_bytes_elements(case) for case in cases]


_REFUSED = (PeerError, UnsupportedError)
TARGETS = (
    Target(
        "oip-json", read_json_request, holds_json_request, _REFUSED, json_seeds, "oip", JSON_SHAPES,
        memory=Memory(4 << 20, 256),
    ),
    Target(
        "oip-binary", read_binary_request, holds_binary_request, _REFUSED, binary_seeds, "oip",
        {"elements": _tail}, memory=Memory(4 << 20, 256),
    ),
    Target(
        "bytes-elements", read_elements, holds_elements, (ValueError,), element_seeds, "bytes-elements",
        {
            "empty ones": lambda size: struct.pack("<I", size // 4) + bytes(size // 4 * 4),
            "one": lambda size: struct.pack("<II", 1, size) + bytes(size),
        },
    ),
)  # fmt: skip
