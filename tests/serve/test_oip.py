"""The codec: every datatype in JSON and binary, and every lie about size, shape and type refused by its name."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.base.datatypes import DATATYPES, NUMPY_NAME, encode_bytes_elements
from agent.base.errors import AgentError, PeerError, TooLargeError, UnsupportedError
from agent.infer.tensors import InferResponse, RequestedOutput, Tensor
from agent.serve.oip import Decoded, classify, decode_request, encode_response

CAP = 1 << 20


def decode(document: Any, tail: bytes | None = None) -> Decoded:
    """A request of that JSON document, with binary data behind it where ``tail`` is given."""
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    if tail is None:
        return decode_request(head, None, CAP)
    return decode_request(head + tail, len(head), CAP)


def one(datatype: str, shape: Any, data: Any) -> dict[str, Any]:
    """A request with one JSON input."""
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]}


def one_binary(datatype: str, shape: Any, size: Any) -> dict[str, Any]:
    """A request with one binary input."""
    entry = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    return {"inputs": [entry]}


def refusal(document: Any, tail: bytes | None = None) -> str:
    """The text that refuses a request."""
    with pytest.raises(PeerError) as refused:
        decode(document, tail)
    return str(refused.value)


# What comes in.

JSON_CASES = [
    ("BOOL", [2], [True, False]),
    ("UINT8", [2], [0, 255]),
    ("UINT16", [2], [0, 65535]),
    ("UINT32", [2], [0, 2**32 - 1]),
    ("UINT64", [2], [0, 2**64 - 1]),
    ("INT8", [2], [-128, 127]),
    ("INT16", [2], [-(2**15), 2**15 - 1]),
    ("INT32", [2], [-(2**31), 2**31 - 1]),
    ("INT64", [2], [-(2**63), 2**63 - 1]),
    ("FP16", [3], [1.5, -2, 65504]),
    ("FP32", [3], [1.5, -2, 2.0**127]),
    ("FP64", [3], [1.5, -2, 1e308]),
    ("BYTES", [2], [b"caf\xc3\xa9", b""]),
]


@pytest.mark.parametrize(("datatype", "shape", "values"), JSON_CASES)
def test_every_datatype_from_json(datatype: str, shape: list[int], values: list[Any]) -> None:
    given_values = [value.decode() if isinstance(value, bytes) else value for value in values]
    tensor = decode(one(datatype, shape, given_values)).request.inputs[0]
    assert tensor.datatype == datatype
    assert tensor.array.dtype == np.dtype(NUMPY_NAME[datatype])
    assert tensor.array.tolist() == values


def test_bf16_from_json_is_rounded_to_the_nearest() -> None:
    tensor = decode(one("BF16", [4], [1.0, -2.5, 1.00390625, 3.0e38])).request.inputs[0]
    assert tensor.array.dtype == np.dtype("<u2")
    assert [hex(bits) for bits in tensor.array.tolist()] == ["0x3f80", "0xc020", "0x3f80", "0x7f62"]


@pytest.mark.parametrize(("datatype", "shape", "values"), JSON_CASES)
def test_every_datatype_from_binary(datatype: str, shape: list[int], values: list[Any]) -> None:
    packed = np.array(values, NUMPY_NAME[datatype])
    tail = encode_bytes_elements(values) if datatype == "BYTES" else packed.tobytes()
    tensor = decode(one_binary(datatype, shape, len(tail)), tail).request.inputs[0]
    assert tensor.array.tolist() == values


def test_nested_and_flat_data_are_the_same() -> None:
    flat = decode(one("INT32", [2, 1, 2], [1, 2, 3, 4])).request.inputs[0].array
    nested = decode(one("INT32", [2, 1, 2], [[[1, 2]], [[3, 4]]])).request.inputs[0].array
    assert flat.tolist() == nested.tolist() == [[[1, 2]], [[3, 4]]]


@pytest.mark.parametrize(
    ("shape", "data"),
    [([], 5), ([], [5]), ([0], []), ([2, 0], [[], []]), ([2, 0], []), ([0, 3], []), ([1] * 32, [5])],
)
def test_scalars_empty_tensors_and_many_axes(shape: list[int], data: Any) -> None:
    array = decode(one("FP32", shape, data)).request.inputs[0].array
    assert array.shape == tuple(shape)
    assert decode(one_binary("FP32", shape, array.nbytes), array.tobytes()).request.inputs[0].array.shape == tuple(
        shape
    )


def test_binary_inputs_are_views_of_the_body() -> None:
    head = json.dumps(one_binary("FP32", [4], 16)).encode()
    body = bytearray(-len(head) % 16 + len(head) + 16)
    start = -len(head) % 16
    body[start : start + len(head)] = head
    tensor = decode_request(memoryview(body)[start:], len(head), CAP).request.inputs[0]
    assert tensor.array[2] == 0.0
    body[-8:-4] = np.float32(7).tobytes()
    assert tensor.array[2] == 7.0


def test_inputs_may_be_mixed_and_misaligned() -> None:
    document = {
        "inputs": [
            {"name": "a", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}},
            {"name": "j", "datatype": "INT64", "shape": [1], "data": [9]},
            {"name": "b", "datatype": "FP64", "shape": [2], "parameters": {"binary_data_size": 16}},
        ]
    }
    a, j, b = decode(document, b"\x05" + np.array([1.5, 2.5]).tobytes()).request.inputs
    assert (a.array.tolist(), j.array.tolist(), b.array.tolist()) == ([5], [9], [1.5, 2.5])
    assert b.array.flags.aligned


def test_outputs_id_and_parameters() -> None:
    document = one("FP32", [1], [1.0]) | {
        "id": "42",
        "parameters": {"timeout": 1000, "priority": 2, "binary_data_output": True},
        "outputs": [
            {"name": "a"},
            {"name": "b", "parameters": {"binary_data": False}},
            {"name": "c", "parameters": {"classification": 3}},
        ],
        "unknown": {"is": "ignored"},
    }
    decoded = decode(document)
    assert decoded.binary
    assert decoded.request.id == "42"
    assert decoded.request.parameters == {"timeout": 1000, "priority": 2}
    assert decoded.request.outputs == (
        RequestedOutput("a", binary=True),
        RequestedOutput("b", binary=False),
        RequestedOutput("c", binary=True, classification=3),
    )


BIG = 10**30
REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([1], "JSON object"),
    "no inputs": ({}, "inputs"),
    "inputs no list": ({"inputs": {"x": 1}}, "inputs"),
    "input no object": ({"inputs": [1]}, "inputs[0]"),
    "no name": ({"inputs": [{"datatype": "FP32", "shape": [1], "data": [1]}]}, "inputs[0].name"),
    "name no text": ({"inputs": [{"name": 1, "datatype": "FP32", "shape": [1], "data": [1]}]}, "inputs[0].name"),
    "unknown datatype": (one("FP8", [1], [1]), "datatype"),
    "no datatype": ({"inputs": [{"name": "x", "shape": [1], "data": [1]}]}, "datatype"),
    "datatype no text": (one([1], [1], [1]), "datatype"),
    "no shape": ({"inputs": [{"name": "x", "datatype": "FP32", "data": [1]}]}, "shape"),
    "no data": ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}, "data"),
    "negative size": (one("FP32", [-1], [1]), "shape"),
    "size true": (one("FP32", [True], [1]), "shape"),
    "size 1.0": (one("FP32", [1.0], [1]), "shape"),
    "size text": (one("FP32", ["1"], [1]), "shape"),
    "33 axes": (one("FP32", [1] * 33, [1]), "shape"),
    "huge size": (one("FP32", [2**31], [1]), "shape"),
    "huge product": (one("FP32", [2**20, 2**20], [1]), "shape"),
    "huge empty": (one("FP32", [0, 2**30, 2**30], []), "shape"),
    "size beyond 64 bits": (one("FP32", [BIG], [1]), "shape"),
    "too few values": (one("FP32", [3], [1, 2]), "2 values"),
    "too many values": (one("FP32", [1], [1, 2]), "2 values"),
    "data no list": (one("FP32", [1], 5), "data"),
    "data null": (one("FP32", [1], None), "data"),
    "ragged": (one("FP32", [2, 2], [[1, 2], [3]]), "nest"),
    "nested too deep": (one("FP32", [2], [[1], [2]]), "nest"),
    "nested not deep enough": (one("FP32", [1, 2, 1], [[1, 2]]), "nest"),
    "half nested": (one("FP32", [2, 1], [[1], 2]), "nest"),
    "text for a number": (one("FP32", [1], ["1"]), "numbers"),
    "null for a number": (one("FP32", [1], [None]), "numbers"),
    "object for a number": (one("FP32", [1], [{}]), "numbers"),
    "true for a number": (one("INT32", [2], [1, True]), "whole numbers (value 1 is not)"),
    "true for a float": (one("FP32", [1], [True]), "numbers"),
    "fraction for an integer": (one("INT8", [1], [1.0]), "whole numbers"),
    "1 for true": (one("BOOL", [1], [1]), "true or false"),
    "number for a text": (one("BYTES", [1], [1]), "texts"),
    "lone surrogate": (one("BYTES", [1], ["\ud800"]), "not Unicode"),
    "over INT8": (one("INT8", [1], [128]), "range of INT8"),
    "under INT8": (one("INT8", [1], [-129]), "range of INT8"),
    "under UINT64": (one("UINT64", [1], [-1]), "range of UINT64"),
    "over INT64": (one("INT64", [1], [2**63]), "range of INT64"),
    "huge integer": (one("INT64", [1], [BIG]), "range of INT64"),
    "over FP16": (one("FP16", [1], [65520]), "range of FP16"),
    "over FP32": (one("FP32", [1], [1e39]), "range of FP32"),
    "over BF16": (one("BF16", [1], [3.4e38]), "range of BF16"),
    "huge integer as float": (one("FP64", [1], [10**400]), "range of FP64"),
    "over FP64": (b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[1e999]}]}', "range of FP64"),
    "NaN": (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', "NaN"),
    "Infinity": (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[-Infinity]}]}', "Infinity"),
    "not UTF-8": (b'{"inputs":"\xff"}', "UTF-8"),
    "UTF-16": ('{"inputs":[]}'.encode("utf-16"), "UTF-8"),
    "byte order mark": (b'\xef\xbb\xbf{"inputs":[]}', "JSON"),
    "cut off": (b'{"inputs":[', "JSON"),
    "two documents": (b"{}{}", "JSON"),
    "empty": (b"", "JSON"),
    "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "objects 100,000 deep": (b'{"a":' * 100_000, "nested too deep"),
    "data 100,000 deep": (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        "nested too deep",
    ),
    "integer of a million digits": (
        b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[' + b"9" * 1_000_000 + b"]}]}",
        "digits",
    ),
    "binary size without binary data": (one_binary("FP32", [1], 4), "left"),
    "id no text": (one("FP32", [1], [1]) | {"id": 1}, "id"),
    "id too long": (one("FP32", [1], [1]) | {"id": "a" * 1000}, "id"),
    "parameters no object": (one("FP32", [1], [1]) | {"parameters": [1]}, "parameters"),
    "parameter no plain value": (one("FP32", [1], [1]) | {"parameters": {"a": {}}}, "parameters.a"),
    "too many parameters": (one("FP32", [1], [1]) | {"parameters": {str(n): 1 for n in range(99)}}, "parameters"),
    "binary_data_output no flag": (
        one("FP32", [1], [1]) | {"parameters": {"binary_data_output": 1}},
        "binary_data_output",
    ),
    "output without name": (one("FP32", [1], [1]) | {"outputs": [{}]}, "outputs[0].name"),
    "output twice": (one("FP32", [1], [1]) | {"outputs": [{"name": "y"}, {"name": "y"}]}, "outputs"),
    "binary_data no flag": (
        one("FP32", [1], [1]) | {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
        "binary_data",
    ),
    "classification negative": (
        one("FP32", [1], [1]) | {"outputs": [{"name": "y", "parameters": {"classification": -1}}]},
        "classification",
    ),
    "1,000 inputs": ({"inputs": one("FP32", [1], [1])["inputs"] * 1000}, "inputs"),
}
REFUSED_BINARY: dict[str, tuple[Any, bytes, str]] = {
    "size too small for the shape": (one_binary("FP32", [2], 4), b"a" * 4, "binary_data_size 4"),
    "size too large for the shape": (one_binary("FP32", [1], 8), b"a" * 8, "binary_data_size 8"),
    "size negative": (one_binary("FP32", [1], -4), b"a" * 4, "binary_data_size"),
    "size no number": (one_binary("FP32", [1], "4"), b"a" * 4, "binary_data_size"),
    "size true": (one_binary("INT8", [1], True), b"a", "binary_data_size"),
    "size beyond the body": (one_binary("FP32", [256], 1024), b"a" * 8, "8 bytes are left"),
    "size beyond everything": (one_binary("FP32", [2**28], 2**30), b"a" * 8, "8 bytes are left"),
    "bytes left over": (one_binary("FP32", [1], 4), b"a" * 9, "5 bytes left over"),
    "BOOL of 2": (one_binary("BOOL", [2], 2), b"\x01\x02", "0 or 1"),
    "BYTES cut off": (one_binary("BYTES", [1], 6), b"\x05\0\0\0ab", "5 bytes announced"),
    "BYTES too many": (one_binary("BYTES", [1], 10), b"\x01\0\0\0a\x01\0\0\0b", "left over"),
    "BYTES lying count": (one_binary("BYTES", [200_000], 5), b"\x01\0\0\0a", "need at least"),
    "data and size": (
        {"inputs": [one("INT8", [1], [1])["inputs"][0] | {"parameters": {"binary_data_size": 1}}]},
        b"a",
        "both",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    document, words = REFUSED[name]
    text = refusal(document)
    assert words in text
    assert len(text) < 400


@pytest.mark.parametrize("name", REFUSED_BINARY)
def test_refused_binary(name: str) -> None:
    document, tail, words = REFUSED_BINARY[name]
    assert words in refusal(document, tail)


@pytest.mark.parametrize("length", [0, 100])
def test_a_wrong_header_length_is_refused(length: int) -> None:
    with pytest.raises(PeerError, match="Inference-Header-Content-Length"):
        decode_request(b"{}", length, CAP)


def test_json_over_the_cap_is_refused_with_the_mend() -> None:
    with pytest.raises(TooLargeError) as refused:
        decode_request(b" " * 101, None, 100)
    assert "binary" in refused.value.hint


def test_too_many_elements_of_bytes_are_refused() -> None:
    with pytest.raises(TooLargeError, match="300000"):
        decode(one_binary("BYTES", [300_000], 1_200_000), b"\0" * 1_200_000)


def test_shared_memory_is_refused_by_name() -> None:
    document = one("FP32", [1], [1])
    document["inputs"][0]["parameters"] = {"shared_memory_region": "r"}
    with pytest.raises(UnsupportedError, match="input 'x'"):
        decode(document)


def test_lies_about_sizes_cost_no_memory() -> None:
    lies = [
        (one_binary("FP32", [2**28], 2**30), b""),
        (one_binary("BYTES", [200_000], 2**40), b""),
        (one("FP64", [2**27], [1]), None),
        (one("FP32", [0, 2**28], []), None),
    ]
    for document, tail in lies[:3]:
        tracemalloc.start()
        try:
            refusal(document, tail)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 200_000
    assert decode(lies[3][0]).request.inputs[0].array.nbytes == 0


# What goes out.


def response(*outputs: Tensor) -> InferResponse:
    """A model's answer."""
    return InferResponse("m", "1.0.0", outputs, "", {"variant": "int8", "degraded": False})


def encoded(
    answer: InferResponse, *, binary: bool = False, outputs: tuple[RequestedOutput, ...] = ()
) -> dict[str, Any]:
    """The JSON part of an HTTP answer; binary tails under ``tail`` by output name."""
    decoded = decode(one("FP32", [1], [1.0]) | {"id": "7"})
    request = type(decoded.request)(decoded.request.inputs, outputs, "7")
    made = encode_response(answer, Decoded(request, binary), CAP)
    body = b"".join(made.parts)
    length = int(dict(made.headers).get("Inference-Header-Content-Length", len(body)))
    document: dict[str, Any] = json.loads(body[:length], parse_constant=pytest.fail)
    document["tail"] = body[length:]
    document["type"] = made.content_type
    return document


def test_an_answer_says_model_version_id_and_what_ran() -> None:
    document = encoded(response(Tensor("y", "FP32", np.array([[1.5, 2]], "<f4"))))
    assert document["model_name"] == "m"
    assert document["model_version"] == "1.0.0"
    assert document["id"] == "7"
    assert document["parameters"] == {"variant": "int8", "degraded": False}
    assert document["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]}]
    assert document["type"] == "application/json"


def test_outputs_are_chosen_and_each_has_its_own_form() -> None:
    tensors = [Tensor(name, "INT16", np.array([number], "<i2")) for number, name in enumerate("abc")]
    document = encoded(response(*tensors), outputs=(RequestedOutput("c", binary=True), RequestedOutput("a")))
    assert [output["name"] for output in document["outputs"]] == ["c", "a"]
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 2}
    assert document["outputs"][1]["data"] == [0]
    assert document["tail"] == b"\x02\x00"
    assert document["type"] == "application/octet-stream"


def test_a_missing_output_is_our_own_fault() -> None:
    with pytest.raises(AgentError) as failed:
        encoded(response(), outputs=(RequestedOutput("y"),))
    assert not isinstance(failed.value, PeerError)


def test_large_outputs_leave_without_a_copy() -> None:
    array = np.arange(100_000, dtype="<f4")
    decoded = Decoded(decode(one("FP32", [1], [1.0])).request, binary=True)
    parts = encode_response(response(Tensor("y", "FP32", array)), decoded, CAP).parts
    assert isinstance(parts[1], memoryview)
    array[5] = -1
    assert np.frombuffer(parts[1], "<f4")[5] == -1


def test_not_a_number_becomes_null_and_is_counted() -> None:
    array = np.array([1.5, np.nan, np.inf, -np.inf], "<f4")
    output = encoded(response(Tensor("y", "FP32", array)))["outputs"][0]
    assert output["data"] == [1.5, None, None, None]
    assert output["parameters"] == {"non_finite": 3}
    tail = encoded(response(Tensor("y", "FP32", array)), binary=True)["tail"]
    assert np.array_equal(np.frombuffer(tail, "<f4"), array, equal_nan=True)


def test_bytes_that_are_no_text_need_binary() -> None:
    tensor = Tensor("y", "BYTES", np.array([b"\xff", b"ok"], dtype=object))
    with pytest.raises(PeerError) as refused:
        encoded(response(tensor))
    assert "binary_data" in refused.value.hint
    assert encoded(response(tensor), binary=True)["tail"] == b"\x01\0\0\0\xff\x02\0\0\0ok"


def test_an_output_far_too_large_for_json_is_refused() -> None:
    with pytest.raises(TooLargeError) as refused:
        encoded(response(Tensor("y", "FP32", np.zeros(CAP, "<f4"))))
    assert "binary_data" in refused.value.hint


def test_odd_arrays_go_out_right() -> None:
    transposed = np.arange(6, dtype=">f4").reshape(2, 3).T
    scalar, empty = np.array(3.5, "<f8"), np.zeros((0, 4), "<f2")
    answer = response(Tensor("t", "FP32", transposed), Tensor("s", "FP64", scalar), Tensor("e", "FP16", empty))
    document = encoded(answer)
    assert [(output["shape"], output["data"]) for output in document["outputs"]] == [
        ([3, 2], [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]),
        ([], [3.5]),
        ([0, 4], []),
    ]
    tail = encoded(answer, binary=True)["tail"]
    assert np.frombuffer(tail[:24], "<f4").tolist() == [0, 3, 1, 4, 2, 5]
    assert np.frombuffer(tail[24:], "<f8").tolist() == [3.5]


def test_classification_gives_the_best_classes_with_their_labels() -> None:
    scores = Tensor("y", "FP32", np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.5]], "<f4"))
    best = classify(scores, 2, ["cat", "dog"])
    assert best.datatype == "BYTES"
    assert best.array.tolist() == [[b"0.700000:1:dog", b"0.200000:2"], [b"0.500000:0:cat", b"0.500000:2"]]
    assert classify(scores, 99, []).array.shape == (2, 3)
    unsigned = Tensor("y", "UINT8", np.array([1, 200, 3], "u1"))
    assert classify(unsigned, 1, []).array.tolist() == [b"200.000000:1"]


# There and back.

numeric = st.sampled_from([datatype for datatype in DATATYPES if datatype != "BYTES"])
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@given(st.data())
def test_binary_there_and_back_keeps_every_bit(data: st.DataObject) -> None:
    datatype = data.draw(numeric)
    array = data.draw(hnp.arrays(NUMPY_NAME[datatype], shapes))
    tail = array.tobytes()
    document = one_binary(datatype, list(array.shape), len(tail)) | {"parameters": {"binary_data_output": True}}
    decoded = decode(document, tail)
    tensor = decoded.request.inputs[0]
    assert tensor.array.shape == array.shape
    parts = encode_response(response(tensor), decoded, CAP).parts
    assert b"".join(parts[1:]) == tail


@given(st.data())
def test_json_there_and_back_keeps_every_value(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from([datatype for datatype in DATATYPES if datatype not in ("BYTES", "BF16")]))
    kind = np.dtype(NUMPY_NAME[datatype])
    elements = {"allow_nan": False, "allow_infinity": False} if kind.kind == "f" else {}
    array = data.draw(hnp.arrays(kind, shapes, elements=hnp.from_dtype(kind, **elements)))
    flat = data.draw(st.booleans())
    sent = array.ravel().tolist() if flat else array.tolist()
    tensor = decode(one(datatype, list(array.shape), sent)).request.inputs[0]
    assert np.array_equal(tensor.array, array)
    back = encoded(response(tensor))["outputs"][0]["data"]
    assert np.array_equal(np.array(back, kind).reshape(array.shape), array)


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_bytes_there_and_back(elements: list[bytes]) -> None:
    tail = encode_bytes_elements(elements)
    decoded = decode(one_binary("BYTES", [len(elements)], len(tail)), tail)
    assert decoded.request.inputs[0].array.tolist() == elements
    assert encoded(response(decoded.request.inputs[0]), binary=True)["tail"] == tail


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from(
    ["inputs", "outputs", "name", "datatype", "shape", "data", "parameters", "binary_data_size", "id", "FP32", "BYTES"]
)
near_requests = st.recursive(
    json_values,
    lambda inner: st.dictionaries(fields, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=12,
)


@given(near_requests, st.none() | st.binary(max_size=40))
def test_whatever_is_sent_is_refused_in_words(document: Any, tail: bytes | None) -> None:
    try:
        decode(json.dumps(document).encode(), tail)
    except (PeerError, UnsupportedError) as refused:
        assert str(refused)  # noqa: PT017 - it may as well be a good request


@given(st.binary(max_size=300), st.none() | st.integers(0, 400))
def test_any_bytes_are_refused_in_words(body: bytes, length: int | None) -> None:
    with pytest.raises(PeerError):
        decode_request(body, length, CAP)
