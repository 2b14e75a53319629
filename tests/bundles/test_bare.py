"""A bare model file describes itself; core reads that from its bytes, whoever made them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from agent.base.errors import AgentError, PeerError, UnsupportedError
from agent.bundles.bare import describe, name_from
from agent.bundles.kinds import kind_of
from agent.bundles.manifest import Manifest, parse_manifest


@contextmanager
def opened(data: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("model")
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        yield descriptor


def described(model: onnx.ModelProto | bytes, **options: str) -> Manifest:
    with opened(model if isinstance(model, bytes) else model.SerializeToString()) as descriptor:
        os.lseek(descriptor, 3, os.SEEK_SET)
        manifest = describe(descriptor, **options)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 3
    return manifest


def value(name: str, kind: int = TensorProto.FLOAT, shape: list[int | str | None] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    weights: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        inputs or [value("x", shape=["N", 3])],
        outputs or [value("y", shape=["N", 3])],
        weights or [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="tests")


def test_a_bare_model_becomes_a_bundle_of_one_variant() -> None:
    file = model()
    manifest = described(file, file_name="/tmp/My Model (v2).onnx")
    assert manifest.name == "my-model-v2"
    variant = manifest.variants[0]
    assert manifest.version == f"0.0.0-sha-{variant.file.sha256[:12]}"
    assert variant.file.size == len(file.SerializeToString())
    assert variant.parameters == {"opset": 17, "ir_version": file.ir_version, "producer": "tests"}
    assert [spec.shape for spec in manifest.inputs] == [(-1, 3)]
    assert described(file, name="other").name == "other"
    assert parse_manifest(manifest.to_json()) == manifest
    assert describe_needs_no_heavy_package()


def describe_needs_no_heavy_package() -> bool:
    code = "import sys, agent.bundles.bare; print([m for m in ('onnx', 'numpy', 'onnxruntime') if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("file", "name"),
    [("Ä.onnx", "model"), ("a" * 99 + ".onnx", "a" * 64), ("-._x-.ONNX", "x"), ("a/b/c", "c"), ("", "model"),
     ("ResNet-50_v1.5", "resnet-50_v1.5"), ("x\n.onnx", "x"), ("../..", "model")],
)  # fmt: skip
def test_a_file_name_is_made_to_fit(file: str, name: str) -> None:
    assert name_from(file) == name


def test_a_name_that_does_not_fit_is_refused_with_the_pattern() -> None:
    with pytest.raises(PeerError, match="cannot describe model file as 'My Model': name") as caught:
        described(model(), name="My Model")
    assert "lower-case" in caught.value.hint


@pytest.mark.parametrize(
    ("onnx_type", "datatype"),
    [("FLOAT", "FP32"), ("DOUBLE", "FP64"), ("FLOAT16", "FP16"), ("BFLOAT16", "BF16"), ("STRING", "BYTES"),
     ("BOOL", "BOOL"), ("INT8", "INT8"), ("INT16", "INT16"), ("INT32", "INT32"), ("INT64", "INT64"),
     ("UINT8", "UINT8"), ("UINT16", "UINT16"), ("UINT32", "UINT32"), ("UINT64", "UINT64")],
)  # fmt: skip
def test_every_datatype_of_the_protocol_is_read(onnx_type: str, datatype: str) -> None:
    kind = getattr(TensorProto, onnx_type)
    manifest = described(model(inputs=[value("x", kind, [1])], outputs=[value("y", kind, [])]))
    assert manifest.inputs[0].datatype == manifest.outputs[0].datatype == datatype
    assert manifest.outputs[0].shape == ()


def test_free_axes_and_unknown_rank() -> None:
    manifest = described(model(inputs=[value("x", shape=["batch", None, -1, 0, 224])], outputs=[value("y")]))
    assert manifest.inputs[0].shape == (-1, -1, -1, 0, 224)
    assert (manifest.outputs[0].shape, manifest.outputs[0].any_rank) == ((-1,), True)
    assert not manifest.inputs[0].any_rank


def test_weights_listed_among_the_inputs_are_none_for_the_caller() -> None:
    weight = numpy_helper.from_array(np.ones((3, 2), "f4"), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    old_style = model(nodes, [value("x", shape=[1, 3]), value("w", shape=[3, 2])], None, [weight])
    old_style.ir_version = 3
    assert [spec.name for spec in described(old_style).inputs] == ["x"]


def test_it_says_what_the_runtime_says() -> None:
    weight = numpy_helper.from_array(np.ones((3, 2), "f4"), "w")
    file = model([helper.make_node("MatMul", ["x", "w"], ["y"])], None, [value("y", shape=["N", 2])], [weight])
    file.ir_version = 8
    session = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    manifest = described(file)
    for specs, nodes in ((manifest.inputs, session.get_inputs()), (manifest.outputs, session.get_outputs())):
        assert [spec.name for spec in specs] == [node.name for node in nodes]
        for spec, node in zip(specs, nodes, strict=True):
            assert list(spec.shape) == [axis if isinstance(axis, int) else -1 for axis in node.shape]


@pytest.mark.parametrize(
    ("operator", "dtype", "precision"),
    [("Add", "f4", "fp32"), ("Add", "f2", "fp16"), ("Add", "f8", "mixed"), ("QLinearConv", "f4", "int8"),
     ("MatMulNBits", "f4", "int4")],
)  # fmt: skip
def test_precision_is_what_most_of_the_file_is(operator: str, dtype: str, precision: str) -> None:
    weight = numpy_helper.from_array(np.ones(1000, dtype), "w")
    manifest = described(model([helper.make_node(operator, ["x", "w"], ["y"])], weights=[weight]))
    assert (manifest.variants[0].id, manifest.variants[0].precision) == (precision, precision)
    assert bool(manifest.variants[0].technique) is precision.startswith("int")


def external() -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/shadow")
    return tensor


def in_a_constant() -> onnx.ModelProto:
    return model([helper.make_node("Constant", [], ["y"], value=external())])


def in_a_branch() -> onnx.ModelProto:
    branch = model(weights=[external()]).graph
    return model([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)])


def in_a_function() -> onnx.ModelProto:
    file = model()
    function = file.functions.add(name="f", domain="d")
    function.node.append(helper.make_node("Constant", [], ["y"], value=external()))
    return file


def in_a_functions_default() -> onnx.ModelProto:
    file = model()
    function = file.functions.add(name="f", domain="d")
    function.attribute_proto.append(helper.make_attribute("a", external()))
    return file


def in_a_sparse_tensor() -> onnx.ModelProto:
    file = model()
    file.graph.sparse_initializer.add().values.CopyFrom(external())
    return file


@pytest.mark.parametrize(
    "make",
    [
        lambda: model(weights=[external()]), in_a_constant, in_a_branch, in_a_function, in_a_functions_default,
        in_a_sparse_tensor,
    ],
)  # fmt: skip
def test_tensors_in_other_files_are_refused_wherever_they_hide(make: Callable[[], onnx.ModelProto]) -> None:
    with pytest.raises(PeerError, match="external data"):
        described(make())


def test_inputs_and_outputs_that_are_no_tensors_are_refused() -> None:
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    with pytest.raises(UnsupportedError, match="output 'y' is a sequence"):
        described(model(outputs=[sequence]))
    mapping = onnx.ValueInfoProto(name="y")
    mapping.type.map_type.key_type = TensorProto.INT64
    with pytest.raises(UnsupportedError, match="output 'y' is a map") as caught:
        described(model(outputs=[mapping]))
    assert "zipmap" in caught.value.hint
    optional = onnx.ValueInfoProto(name="x")
    optional.type.optional_type.elem_type.tensor_type.elem_type = 1
    with pytest.raises(UnsupportedError, match="input 'x' is an optional"):
        described(model(inputs=[optional]))
    with pytest.raises(UnsupportedError, match="element type 14"):
        described(model(inputs=[value("x", TensorProto.COMPLEX64, [1])]))
    with pytest.raises(UnsupportedError, match="has no type"):
        described(model(inputs=[onnx.ValueInfoProto(name="x")]))


def test_a_model_without_inputs_or_with_repeated_names_is_refused() -> None:
    empty = model()
    del empty.graph.input[:]
    with pytest.raises(UnsupportedError, match="no inputs"):
        described(empty)
    with pytest.raises(PeerError, match="x named more than once"):
        described(model(inputs=[value("x", shape=[1]), value("x", shape=[1])]))


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [(b"\x1c\0\0\0TFL3" + bytes(600), "tflite", "damaged or cut short"),
     (b"\x1c\0\0\0ORTM" + bytes(600), "ort", "ORT format"),
     (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer", "Git LFS pointer"),
     (bytes(257) + b"ustar" + bytes(600), "edgemodel", "a bundle"),
     (b"<!doctype html><html>not found</html>", "onnx", "no ONNX file"), (b"", "onnx", "empty"),
     (b"\x08\x08", "onnx", "no graph")],
)  # fmt: skip
def test_other_files_are_named(data: bytes, kind: str, reason: str) -> None:
    assert kind_of(data) == kind
    with pytest.raises(AgentError, match=reason):
        described(data)


def test_a_pipe_is_refused_and_does_not_block() -> None:
    reading, writing = os.pipe()
    with pytest.raises(PeerError, match="not a regular file"):
        describe(reading)
    os.close(reading)
    os.close(writing)


def field(number: int, body: bytes) -> bytes:
    """A length-delimited field."""
    out = bytearray()
    for rest in (number << 3 | 2, len(body)):
        while rest > 0x7F:
            out.append(rest & 0x7F | 0x80)
            rest >>= 7  # noqa: PLW2901
        out.append(rest)
    return bytes(out) + body


def nested(depth: int) -> bytes:
    body = b""
    for _ in range(depth):
        body = field(1, field(5, field(6, body)))
    return field(7, body)


@pytest.mark.parametrize(
    "data",
    [
        nested(300),
        b"\x3a" + b"\xff" * 9 + b"\x01",  # A graph longer than the universe.
        b"\x3a" + b"\xff" * 30,  # A number without end.
        b"\x3b\x3b\x3b",  # Groups.
        b"\x00\x00",  # Field number 0.
        field(7, b"") * 2,
        field(7, field(11, b"") * 70_000),
        field(7, field(11, field(1, b"x" * 5000))),
        field(7, field(11, field(1, b"\xff\xfe"))),
        field(7, field(11, field(1, b"x") + field(2, field(1, b"\x08\x01" + field(2, field(1, b"") * 40))))),
    ],
)
def test_hostile_files_are_refused(data: bytes) -> None:
    with pytest.raises(AgentError):
        described(b"\x08\x08" + data)


def test_millions_of_fields_are_not_all_read() -> None:
    file = b"\x08\x08" + field(7, b"\x0a\x00" * 2_000_000)
    with pytest.raises(AgentError, match="more than 1000000 fields"):
        described(file)


def test_a_forest_of_a_million_branches_is_no_hostile_file() -> None:
    forest = model([
        helper.make_node(
            "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml",
            nodes_values=[0.5] * 800_000, nodes_featureids=list(range(800_000)), nodes_modes=["BRANCH_LEQ"] * 300_000,
        )
    ])  # fmt: skip
    assert described(forest).inputs[0].name == "x"


GOOD = model(weights=[numpy_helper.from_array(np.ones((3, 2), "f4"), "w")]).SerializeToString()


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_manifest_or_an_error(data: bytes) -> None:
    for file in (data, field(7, data), b"\x08\x08" + field(7, field(11, data) + field(12, data))):
        try:
            described(file)
        except AgentError:
            continue


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(1, len(GOOD)))
@settings(max_examples=300, deadline=None)
def test_a_damaged_model_gives_a_manifest_or_an_error(position: int, flip: int, cut: int) -> None:
    for file in (GOOD[:position] + bytes([GOOD[position] ^ flip]) + GOOD[position + 1 :], GOOD[:cut]):
        try:
            described(file)
        except AgentError:
            continue
