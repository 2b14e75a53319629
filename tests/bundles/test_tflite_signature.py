"""TFLite files describe themselves, whoever wrote them; what is damaged or hostile is refused in bounded time."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.base.errors import AgentError, PeerError, TooLargeError, UnsupportedError
from agent.bundles import flatbuffer
from agent.bundles.bare import describe
from agent.bundles.manifest import parse_manifest
from agent.bundles.tflite_signature import chosen_key, public_names, read_signature
from tests import tflite_models as made
from tests.tflite_models import Graph, T, Table


def opened(data):
    descriptor = os.memfd_create("model")
    os.write(descriptor, data)
    return descriptor


def read(data):
    descriptor = opened(data)
    try:
        return read_signature(descriptor, len(data))
    finally:
        os.close(descriptor)


def described(data, **options):
    descriptor = opened(data)
    try:
        return describe(descriptor, **options)
    finally:
        os.close(descriptor)


def shapes(specs):
    return {spec.name: (spec.datatype, spec.shape) for spec in specs}


def test_a_bare_tflite_file_becomes_a_bundle_of_one_variant():
    manifest = described(made.linear(), file_name="/home/me/Door Camera.tflite")
    assert manifest.name == "door-camera"
    assert shapes(manifest.inputs) == {"x": ("FP32", (-1, 16))}
    assert shapes(manifest.outputs) == {"y": ("FP32", (-1, 4))}
    variant = manifest.variants[0]
    assert (variant.runtime, variant.id, variant.precision, variant.file.name) == (
        "tflite", "fp32", "fp32", "model.tflite",
    )  # fmt: skip
    assert variant.parameters == {"producer": "made by a test", "signature": "serving_default"}
    assert parse_manifest(manifest.to_json()) == manifest


def test_reading_it_needs_no_package():
    code = (
        "import sys, agent.bundles.bare;"
        "print([m for m in ('numpy', 'flatbuffers', 'ai_edge_litert', 'tflite_runtime') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_file_without_a_signature_goes_by_its_tensors():
    assert shapes(read(made.linear(signature=None)).inputs) == {"x:0": ("FP32", (-1, 16))}


def test_of_several_signatures_the_default_one_is_served_else_the_first_by_name():
    graph = Graph([T("a", made.FLOAT32, (1,)), T("b", made.FLOAT32, (1,))], [0], [0])
    both = [("train", {"t": 0}, {"u": 1}, 0), ("serving_default", {"x": 1}, {"y": 0}, 0)]
    assert list(shapes(read(made.model([graph], both)).inputs)) == ["x"]
    others = [("zoo", {"z": 0}, {"u": 1}, 0), ("ant", {"x": 1}, {"y": 0}, 0)]
    assert read(made.model([graph], others)).key == "ant"
    assert chosen_key(()) == ""


def test_a_signature_may_be_for_a_later_graph():
    first = Graph([T("a", made.FLOAT32, (1,))], [0], [0])
    second = Graph([T("b", made.INT8, (7,))], [0], [0])
    data = made.model([first, second], [("serving_default", {"x": 0}, {"y": 0}, 1)])
    assert shapes(read(data).inputs) == {"x": ("INT8", (7,))}


def test_tensors_without_a_usable_name_get_one():
    graph = Graph([T("", made.FLOAT32, (1,)), T("", made.INT32, ()), T("y" * 300, made.BOOL, (2, 3))], [0, 1], [2])
    seen = read(made.model([graph]))
    assert shapes(seen.inputs) == {"input0": ("FP32", (1,)), "input1": ("INT32", ())}
    assert shapes(seen.outputs) == {"output0": ("BOOL", (2, 3))}
    assert public_names(["a", "a"], "input") == ["input0", "input1"]


@pytest.mark.parametrize(
    ("kind", "datatype"),
    [
        (made.FLOAT32, "FP32"), (made.FLOAT16, "FP16"), (made.INT32, "INT32"), (made.UINT8, "UINT8"),
        (made.INT64, "INT64"), (made.STRING, "BYTES"), (made.BOOL, "BOOL"), (made.INT16, "INT16"),
        (made.INT8, "INT8"), (made.FLOAT64, "FP64"), (made.UINT64, "UINT64"), (made.UINT32, "UINT32"),
        (made.UINT16, "UINT16"), (made.BFLOAT16, "BF16"),
    ],
)  # fmt: skip
def test_every_datatype_has_its_word(kind, datatype):
    assert read(made.passing(kind)).inputs[0].datatype == datatype


@pytest.mark.parametrize(
    ("kind", "word"), [(made.COMPLEX64, "complex"), (made.RESOURCE, "resource"), (made.INT4, "int4"), (99, "type 99")]
)
def test_what_is_no_plain_tensor_is_refused_by_name(kind, word):
    with pytest.raises(UnsupportedError, match=f"input 'x' is .*{word}"):
        read(made.passing(kind))


def test_quantized_inputs_and_outputs_say_how():
    variant = described(made.quantized(scale=0.25, zero=-7)).variants[0]
    assert variant.precision == "int8"
    assert variant.technique[0].name == "quantized"
    assert variant.parameters["quantization"] == {
        "x": {"scale": 0.25, "zero_point": -7},
        "y": {"scale": 0.5, "zero_point": -7},
    }


def test_precision_is_what_most_of_the_weights_are():
    def weights(*constants):
        tensors = [T("x", made.FLOAT32, (1,)), *constants]
        return read(made.model([Graph(tensors, [0], [0])])).precision

    small, large = np.zeros(10, np.float32), np.zeros(1000, np.float32)
    assert weights(made.constant("w", large)) == "fp32"
    assert weights(made.constant("w", large.astype("f2")), made.constant("b", small)) == "fp16"
    assert weights(made.constant("w", large.astype("i1"), scale=[0.1] * 10), made.constant("b", small)) == "int8"
    assert weights(made.constant("w", large), made.constant("q", small.astype("i1"), scale=[0.1])) == "fp32"
    assert weights(made.constant("table", large.astype("i1")), made.constant("w", small)) == "fp32"
    assert weights(T("w", made.INT4, (1000,), data=bytes(500), scale=[0.1])) == "int4"
    assert weights() == "fp32"


# -- damaged and hostile ----------------------------------------------------------------------------------------------


def bent(**fields):
    """A sound model with fields of its root replaced."""
    root = made.document([Graph([T("x", made.FLOAT32, (1,))], [0], [0])])
    root.fields.update({int(slot[1:]): value for slot, value in fields.items()})
    return made.Writer().finish(root)


def test_another_schema_version_is_named():
    with pytest.raises(PeerError, match="schema version 4, 3 is known"):
        read(bent(f0=("I", 4)))


def test_weights_in_other_files_are_refused():
    with pytest.raises(PeerError, match="kept in another file"):
        read(bent(f9=[Table({0: ("I", 0)})]))


def test_a_file_without_graph_inputs_or_outputs_is_refused():
    with pytest.raises(PeerError, match="no graph"):
        read(bent(f2=[]))
    with pytest.raises(UnsupportedError, match="no inputs"):
        read(made.model([Graph([T("x", made.FLOAT32, (1,))], [], [0])]))
    with pytest.raises(UnsupportedError, match="no outputs"):
        read(made.model([Graph([T("x", made.FLOAT32, (1,))], [0], [])]))


@pytest.mark.parametrize("index", [-1, 1, 1 << 20])
def test_a_tensor_that_is_not_there_is_damage(index):
    with pytest.raises(PeerError, match="damaged"):
        read(made.model([Graph([T("x", made.FLOAT32, (1,))], [index], [0])]))
    for signature in (("s", {"x": index & 0xFFFF_FFFF}, {"y": 0}, 0), ("s", {"x": 0}, {"y": 0}, 7)):
        with pytest.raises(PeerError, match="damaged"):
            read(made.model([Graph([T("x", made.FLOAT32, (1,))], [0], [0])], [signature]))


def test_buffers_behind_the_flatbuffer_must_be_in_the_file():
    reached = bent(f4=[Table({}), Table({1: ("Q", 64), 2: ("Q", 8)})])
    assert read(reached).precision == "fp32"
    for offset, size in ((64, 1 << 40), (1 << 63, 1), (len(reached), 1), (64, 1 << 63)):
        with pytest.raises(PeerError, match="damaged"):
            read(bent(f4=[Table({}), Table({1: ("Q", offset), 2: ("Q", size)})]))


def test_too_many_of_anything_is_refused():
    many = [T(f"t{n}", made.FLOAT32, (1,)) for n in range(300)]
    with pytest.raises(UnsupportedError, match="more than 256"):
        read(made.model([Graph(many, list(range(300)), [0])]))
    with pytest.raises(UnsupportedError, match="more than 32 axes"):
        read(made.model([Graph([T("x", made.FLOAT32, (1,) * 40)], [0], [0])]))
    with pytest.raises(TooLargeError):
        read(made.model([Graph([T("x" * 2000, made.FLOAT32, (1,))], [0], [0])]))


def test_a_name_that_is_no_text_is_refused():
    data = made.model([Graph([T("input-name", made.FLOAT32, (1,))], [0], [0])]).replace(b"input-name", b"input\xffname")
    with pytest.raises(PeerError, match="not UTF-8"):
        read(data)


def test_every_cut_is_an_error():
    data = made.linear()
    for length in range(len(data)):
        with pytest.raises(AgentError):
            described(data[:length] if length else b"")


def test_millions_of_offsets_to_one_table_cost_bounded_time_and_memory(monkeypatch):
    """The work is counted by visits, not by tables; a vtable of the largest size is not copied for each of them."""
    monkeypatch.setattr(flatbuffer, "MAX_VISITS", 50_000)
    tensor = made._tensor(T("x", made.FLOAT32, (1,)), [])
    tensor.fields[32_000] = ("b", 0)
    graph = Table({0: [tensor] * 2000, 1: made.ints([0]), 2: made.ints([0]), 3: []})
    root = made.document([Graph([T("x", made.FLOAT32, (1,))], [0], [0])])
    root.fields[2] = [graph] * 2000
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match="more than 50000 parts"):
            read(made.Writer().finish(root))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_read_or_refused(data, marked):
    with_mark = data[:4] + b"TFL3" + data[8:] if marked else data
    with contextlib.suppress(AgentError):
        read(with_mark)


@settings(max_examples=300)
@given(st.data())
def test_any_damage_is_read_or_refused(data):
    sound = data.draw(st.sampled_from([made.linear(), made.quantized(), made.gather()]))
    broken = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4]))
        place = data.draw(st.integers(0, len(broken) - width))
        value = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
        broken[place : place + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    try:
        manifest = described(bytes(broken))
    except AgentError:
        return
    assert parse_manifest(manifest.to_json()) == manifest


def test_a_file_that_shrinks_while_it_is_read_is_an_error():
    data = made.linear()
    descriptor = opened(data)
    try:
        os.truncate(descriptor, len(data) // 2)
        with pytest.raises(PeerError, match="damaged or cut short"):
            read_signature(descriptor, len(data))
    finally:
        os.close(descriptor)


def test_whatever_passes_the_check_is_sound_for_the_flatbuffers_package():
    """Flipped bits anywhere but in the weights: what we accept, the schema's own code can walk."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    generator = random.Random(4)
    sound, accepted = made.linear(signature=None), 0
    for _ in range(400):
        broken = bytearray(sound)
        broken[generator.randrange(len(broken))] ^= 1 << generator.randrange(8)
        try:
            seen = read(bytes(broken))
        except AgentError:
            continue
        accepted += 1
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytes(broken)))
        assert len(model.subgraphs[0].inputs) == len(seen.inputs)
    assert accepted > 50
