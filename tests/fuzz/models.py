"""Targets of model files and arrays: bare ONNX and TFLite files, ``.npz`` and ``.npy``."""

from __future__ import annotations

import functools
import importlib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from agent.base.errors import PeerError, UnsupportedError
from agent.bundles.arrays import dump_arrays, load_arrays
from agent.bundles.bare import describe
from agent.bundles.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from agent.bundles.onnx_signature import _DATATYPES
from tests import onnx_models, tflite_models
from tests.fuzz.target import Memory, Shape, Target, many

# Bare ONNX files.


@functools.lru_cache(maxsize=1)
def _memfd() -> int:
    return os.memfd_create("fuzz")


def read_onnx(data: bytes) -> Manifest:
    descriptor = _memfd()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    return describe(descriptor, file_name="A Model (2).onnx")


def holds_onnx(data: bytes, manifest: Manifest) -> None:
    """Where the onnx package reads the file too, it sees the same inputs and outputs."""
    assert parse_manifest(manifest.to_json()) == manifest
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:
        return
    made = {tensor.name for tensor in model.graph.initializer}
    made |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    inputs = [info for info in model.graph.input if info.name not in made]
    required = [spec for spec in manifest.inputs if not spec.optional]
    assert {spec.name for spec in manifest.inputs if spec.optional} <= made
    for specs, infos in ((required, inputs), (list(manifest.outputs), list(model.graph.output))):
        assert [spec.name for spec in specs] == [info.name for info in infos]
        for spec, info in zip(specs, infos, strict=True):
            tensor = info.type.tensor_type
            assert spec.datatype == _DATATYPES.get(tensor.elem_type)
            if spec.any_rank:
                assert not tensor.HasField("shape")
            else:
                axes = [max(axis.dim_value, -1) if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
                assert list(spec.shape) == axes


def onnx_seeds() -> list[bytes]:
    """Small models of every kind that the tests have."""
    tensor, constant, helper = onnx_models.tensor, onnx_models.constant, onnx.helper
    quantized = onnx_models.model(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])],
        [tensor("x", [1, "n"]), tensor("s", [])],
        [tensor("y", None, onnx.TensorProto.INT8)],
        [constant("s", np.float32(1)), constant("z", np.int8(0))],
    )
    others = [b"\x00\x00\x00\x00ORTM", b"version https://git-lfs"]
    return [onnx_models.linear(features=2, classes=2), onnx_models.endless(), quantized, *others]


def _length(size: int) -> bytes:
    out = b""
    while size > 127:
        out += bytes([size & 127 | 128])
        size >>= 7
    return out + bytes([size])


def _field(number: int, content: bytes) -> bytes:
    return _length(number << 3 | 2) + _length(len(content)) + content


def _deep(size: int) -> bytes:
    body = b""
    while len(body) < size:
        body = _field(1, _field(5, _field(6, body)))
    return b"\x08\x08" + _field(7, body)


_MODEL = b"\x08\x08"


def _graph(part: Shape) -> Shape:
    """A model whose graph is such a part."""
    return lambda size: _MODEL + _field(7, part(size))


def _attribute(part: Shape) -> Shape:
    """A model with one node with one attribute of such content."""
    return _graph(lambda size: _field(1, _field(5, part(size))))


def _axes(size: int) -> bytes:
    tensor = _field(1, _field(2, b"\x0a\x00" * (size // 2)))
    return _MODEL + _field(7, _field(12, _field(1, b"y") + _field(2, tensor)))


ONNX_SHAPES = {
    "nodes": _graph(many(_field(1, _field(4, b"Add")))),
    "inputs": _graph(many(_field(11, _field(1, b"x")))),
    "initializers": _graph(lambda size: b"".join(_field(5, _field(8, b"%d" % n)) for n in range(size // 10))),
    "numbers": _graph(many(b"\x10\x01")),
    "listed numbers": _attribute(many(b"\x40\x01")),
    "texts": _attribute(many(b"\x4a\x02ab")),
    "functions": many(_field(25, _field(7, b"")), _MODEL),
    "axes": _axes,
    "depth": _deep,
}

# Bare TFLite files.


@functools.lru_cache(maxsize=1)
def _schema() -> Any:
    """The format's own generated code, where a package brings it; else None."""
    try:
        return importlib.import_module("ai_edge_litert.schema_py_generated")
    except ImportError:
        return None


def read_tflite(data: bytes) -> Manifest:
    return read_onnx(data[:4] + b"TFL3" + data[8:])


def holds_tflite(data: bytes, manifest: Manifest) -> None:
    """What passes is sound: the format's own code walks it, but for the operators, which the runtime verifies."""
    assert manifest.variants[0].runtime == "tflite"
    written = manifest.to_json()
    assert len(written) > MAX_MANIFEST_BYTES or parse_manifest(written) == manifest
    if _schema() is not None:
        assert _walk(_schema(), data[:4] + b"TFL3" + data[8:]) > 0


def _walk(schema: Any, data: bytes) -> int:
    """Read every list of the model but its graphs' operators; how many graphs there are."""
    model = schema.Model.GetRootAs(data)
    for name in ("OperatorCodes", "Buffers", "Metadata", "SignatureDefs"):
        kind = getattr(schema, {"SignatureDefs": "SignatureDefT", "Metadata": "MetadataT"}.get(name, f"{name[:-1]}T"))
        for index in range(getattr(model, f"{name}Length")()):
            kind.InitFromObj(getattr(model, name)(index))
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        for tensor in range(graph.TensorsLength()):
            schema.TensorT.InitFromObj(graph.Tensors(tensor))
        graph.InputsAsNumpy(), graph.OutputsAsNumpy(), graph.Name()
    return int(model.SubgraphsLength())


def tflite_seeds() -> list[bytes]:
    """With and without a signature, with weights, quantized."""
    made = tflite_models
    return [made.linear(features=2, classes=2), made.linear(signature=""), made.gather(), made.quantized()]


def _flat(slot: int, rows: Callable[[int], list[Any]]) -> Shape:
    """A model with many rows in one of its lists."""
    return lambda size: tflite_models.Writer().finish(tflite_models.Table({0: ("I", 3), slot: rows(size)}))


def _tables(fields: dict[int, Any], each: int) -> Callable[[int], list[Any]]:
    return lambda size: [tflite_models.Table(fields) for _ in range(size // each)]


_BLANK = tflite_models.Table({})
TFLITE_SHAPES = {
    "buffers": _flat(4, _tables({}, 16)),
    "one buffer many times": _flat(4, lambda size: [_BLANK] * (size // 4)),
    "graphs": _flat(2, _tables({0: [_BLANK] * 50}, 250)),
    "one graph many times": _flat(2, lambda size: [tflite_models.Table({0: [_BLANK] * 50})] * (size // 4)),
    "texts": _flat(1, _tables({1: "a" * 30}, 64)),
    "signatures": _flat(7, _tables({2: "k"}, 40)),
}

# Arrays.

ARRAYS_LIMIT = 1 << 20


def read_arrays(data: bytes) -> dict[str, Any]:
    return load_arrays(data, limit=ARRAYS_LIMIT)


def holds_arrays(data: bytes, arrays: dict[str, Any]) -> None:
    """numpy reads the same arrays; written and read again they are the same."""
    assert sum(array.nbytes for array in arrays.values() if array.dtype != object) <= ARRAYS_LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.lib.npyio.NpzFile(io.BytesIO(data), allow_pickle=False) as theirs:
            for name, array in arrays.items():
                other = theirs[name]
                assert other.shape == array.shape
                if array.dtype == object:
                    values = [value if isinstance(value, bytes) else value.encode() for value in other.ravel().tolist()]
                    assert values == array.ravel().tolist()
                else:
                    assert other.tobytes() == array.tobytes()
    # NUL at the end is refused with words; names may hold anything but NUL, which a ZIP cuts.
    try:
        back = load_arrays(dump_arrays(arrays))
    except PeerError as error:
        if "NUL" in str(error):
            return
        raise
    assert list(back) == sorted(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        assert back[name].ravel().tolist() == array.ravel().tolist() or array.dtype.kind in "fc"


def mended_zip(data: bytes) -> bytes:
    """One array's ``.npy`` in a ZIP of its own: mutation reaches it without having to make checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
        made.writestr(zipfile.ZipInfo("a.npy"), data)
    return out.getvalue()


def array_seeds() -> list[bytes]:
    """As numpy writes them and as we do; texts, empty ones, other byte orders."""
    arrays = {
        "input/x": np.arange(6, dtype="<f4").reshape(2, 3), "output/y": np.array([1, 2], dtype=">i8"),
        "t": np.array(["a", "bc"]), "b": np.array([b"x", b"yz"]), "e": np.zeros((0, 3), "u1"), "s": np.float64(5),
    }  # fmt: skip
    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, **arrays)
    np.savez_compressed(packed, a=np.zeros((3, 4), order="F"), c=np.ones(2, "?"))
    objects = {"k": np.array([b"a", b"bcd"], dtype=object)}
    return [plain.getvalue(), packed.getvalue(), dump_arrays(objects), zlib.compress(b"no zip")]


def npy_seeds() -> list[bytes]:
    """Single arrays of each kind, and in version 2.0."""
    seeds = []
    plain = np.arange(6, dtype="<f4").reshape(2, 3)
    for array in (plain, np.array(5, ">i2"), np.array(["é"]), np.zeros((2, 0)), np.array([1], "M8[s]")):
        out = io.BytesIO()
        np.lib.format.write_array(out, array, allow_pickle=False)
        seeds.append(out.getvalue())
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ones(3), version=(2, 0))
    return [*seeds, out.getvalue()]


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header


def _most(shape: Shape) -> Shape:
    """A header of such content, as long as headers may be."""
    return lambda size: _npy(shape(min(size, 9000)))


NPY_SHAPES = {
    "signs": _most(many(b"-", tail=b"1")),
    "parentheses": _most(many(b"(")),
    "sums": _most(many(b"+1j", b"1")),
    "records": _most(many(b"('a', '<f4'),", b"{'descr': [", b"], 'fortran_order': False, 'shape': (1,)}")),
    "blanks": _most(many(b" ", b"{", b"'descr'")),
    "axes": _most(many(b"1,", b"{'shape': (", b"")),
    "fields": _most(many(b"'descr': '<f4', ", b"{")),
    "data": lambda size: npy_seeds()[0][:-24].replace(b"(2, 3)", b"(%d,)" % (size // 4)) + bytes(size // 4 * 4),
}


def read_npy(data: bytes) -> dict[str, Any]:
    return read_arrays(mended_zip(data))


def holds_npy(data: bytes, arrays: dict[str, Any]) -> None:
    holds_arrays(mended_zip(data), arrays)


_REFUSED = (PeerError, UnsupportedError)
_ARRAYS_MEMORY = Memory(6 * ARRAYS_LIMIT, 100)
TARGETS = (
    Target(
        "onnx-signature", read_onnx, holds_onnx, _REFUSED, onnx_seeds, "onnx", ONNX_SHAPES, memory=Memory(1 << 20, 200)
    ),
    Target(
        "tflite-signature", read_tflite, holds_tflite, _REFUSED, tflite_seeds, "tflite-signature", TFLITE_SHAPES,
        memory=Memory(4 << 20, 200),
    ),
    Target(
        "arrays", read_arrays, holds_arrays, _REFUSED, array_seeds, "arrays", most_bytes=8192, memory=_ARRAYS_MEMORY
    ),
    Target("npy", read_npy, holds_npy, _REFUSED, npy_seeds, "npy", NPY_SHAPES, most_bytes=2048, memory=_ARRAYS_MEMORY),
)  # fmt: skip
