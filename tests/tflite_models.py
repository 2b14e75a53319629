"""Small real TFLite models for tests, written with nothing but the struct module.

A FlatBuffer is written forwards here: a table, then what it points at. So a test can also write what no converter
would. Source: FlatBuffers documentation, "FlatBuffer Internals"; schema.fbs of TFLite (field numbers).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FLOAT32, FLOAT16, INT32, UINT8, INT64, STRING, BOOL, INT16 = range(8)
INT8, FLOAT64, UINT64, UINT32, UINT16, INT4, BFLOAT16 = 9, 10, 12, 15, 16, 17, 18
COMPLEX64, RESOURCE = 8, 13
TYPES = {
    np.dtype("f4"): FLOAT32, np.dtype("f2"): FLOAT16, np.dtype("i4"): INT32, np.dtype("u1"): UINT8,
    np.dtype("i8"): INT64, np.dtype("?"): BOOL, np.dtype("i2"): INT16, np.dtype("i1"): INT8, np.dtype("f8"): FLOAT64,
    np.dtype("u4"): UINT32, np.dtype("u8"): UINT64, np.dtype("u2"): UINT16,
}  # fmt: skip
#: Builtin operators.
ADD, FULLY_CONNECTED, RESHAPE, CUSTOM, GATHER, CAST, WHILE = 0, 9, 22, 32, 36, 53, 119
MUL, TANH, DEQUANTIZE = 18, 28, 6


@dataclass
class Table:
    """A table: field number to value, and a struct code for scalars (``("I", 3)``)."""

    fields: dict[int, Any]


@dataclass
class Raw:
    """A vector of plain elements, the first one aligned to ``align``."""

    data: bytes
    count: int
    align: int = 4


def ints(values):
    return Raw(np.asarray(values, "<i4").tobytes(), len(values))


def longs(values):
    return Raw(np.asarray(values, "<i8").tobytes(), len(values), 8)


def floats(values):
    return Raw(np.asarray(values, "<f4").tobytes(), len(values))


def octets(data):
    return Raw(bytes(data), len(data), 16)


class Writer:
    """Turns tables into bytes."""

    def __init__(self, identifier=b"TFL3"):
        self.buffer = bytearray(4) + identifier

    def finish(self, root):
        self._point(0, self._write(root))
        return bytes(self.buffer)

    def _pad(self, to, ahead=0):
        self.buffer += bytes(-(len(self.buffer) + ahead) % to)

    def _point(self, at, target):
        struct.pack_into("<I", self.buffer, at, target - at)

    def _write(self, value):
        if isinstance(value, Table):
            return self._table(value)
        if isinstance(value, str):
            value = Raw(value.encode() + b"\0", len(value.encode()))
        if isinstance(value, list):
            return self._tables(value)
        self._pad(4)
        self._pad(value.align, 4)
        position = len(self.buffer)
        self.buffer += struct.pack("<I", value.count) + value.data
        return position

    def _tables(self, values):
        """A vector of tables or texts; one that stands in it many times is written once."""
        self._pad(4)
        position = len(self.buffer)
        self.buffer += struct.pack("<I", len(values)) + bytes(4 * len(values))
        written = {}
        for index, value in enumerate(values):
            at = position + 4 + 4 * index
            if id(value) not in written:
                written[id(value)] = self._write(value)
            self._point(at, written[id(value)])
        return position

    def _table(self, table):
        codes = {slot: value[0] if isinstance(value, tuple) else "I" for slot, value in table.fields.items()}
        places, end = {}, 4
        for slot, code in sorted(codes.items(), key=lambda item: -struct.calcsize("<" + item[1])):
            size = struct.calcsize("<" + code)
            end += -end % size
            places[slot] = end
            end += size
        slots = max(codes, default=-1) + 1
        self._pad(2)
        vtable = len(self.buffer)
        self.buffer += struct.pack(
            f"<{2 + slots}H", 4 + 2 * slots, end, *(places.get(slot, 0) for slot in range(slots))
        )
        self._pad(8)
        position = len(self.buffer)
        self.buffer += struct.pack("<i", position - vtable) + bytes(end - 4)
        for slot, value in table.fields.items():
            at = position + places[slot]
            if isinstance(value, tuple):
                struct.pack_into("<" + value[0], self.buffer, at, value[1])
            else:
                self._point(at, self._write(value))
        return position


@dataclass
class T:
    """A tensor. ``shape`` as stored (no -1), ``free`` the same with -1; ``data`` makes it a constant."""

    name: str
    type: int
    shape: Any
    free: Any = None
    data: bytes | None = None
    scale: Any = None
    zero: Any = None


@dataclass
class Op:
    """An operator: code, tensors by index, and its options (union type, table)."""

    code: int
    inputs: list
    outputs: list
    options: tuple[int, Table] | None = None
    custom: str = ""
    version: int = 1


@dataclass
class Graph:
    """A subgraph."""

    tensors: list
    inputs: list
    outputs: list
    ops: list = field(default_factory=list)


def model(graphs, signatures=(), **more):
    """Bytes of a model. ``signatures``: (key, {name: tensor}, {name: tensor}, subgraph)."""
    return Writer(more.pop("identifier", b"TFL3")).finish(document(graphs, signatures, **more))


def document(graphs, signatures=(), version=3):
    """The root table, for tests that bend it before it is written."""
    codes: dict[tuple[int, str, int], int] = {}
    buffers = [Table({})]
    subgraphs = []
    for graph in graphs:
        tensors = [_tensor(tensor, buffers) for tensor in graph.tensors]
        operators = []
        for op in graph.ops:
            index = codes.setdefault((op.code, op.custom, op.version), len(codes))
            fields = {0: ("I", index), 1: ints(op.inputs), 2: ints(op.outputs)}
            if op.options is not None:
                fields |= {3: ("B", op.options[0]), 4: op.options[1]}
            operators.append(Table(fields))
        subgraphs.append(Table({0: tensors, 1: ints(graph.inputs), 2: ints(graph.outputs), 3: operators}))
    operator_codes = [
        Table({0: ("b", min(code, 127)), 2: ("i", op_version), 3: ("i", code), **({1: custom} if custom else {})})
        for code, custom, op_version in codes
    ]
    fields = {0: ("I", version), 1: operator_codes, 2: subgraphs, 3: "made by a test", 4: buffers}
    if signatures:
        fields[7] = [
            Table({0: _names(inputs), 1: _names(outputs), 2: key, 4: ("I", subgraph)})
            for key, inputs, outputs, subgraph in signatures
        ]
    return Table(fields)


def _names(tensors):
    return [Table({0: name, 1: ("I", index)}) for name, index in tensors.items()]


def _tensor(tensor, buffers):
    fields = {0: ints(tensor.shape), 1: ("b", tensor.type), 3: tensor.name, 8: ("?", True)}
    if tensor.data is not None:
        buffers.append(Table({0: octets(tensor.data)}))
        fields[2] = ("I", len(buffers) - 1)
    if tensor.free is not None:
        fields[7] = ints(tensor.free)
    if tensor.scale is not None:
        zero = tensor.zero if tensor.zero is not None else [0] * len(tensor.scale)
        fields[4] = Table({2: floats(tensor.scale), 3: longs(zero)})
    return Table(fields)


def constant(name, array, **more):
    array = np.asarray(array)
    return T(name, TYPES[array.dtype], array.shape, data=array.tobytes(), **more)


# -- models -----------------------------------------------------------------------------------------------------------


def weights_of(seed=0, features=16, classes=4):
    return np.random.default_rng(seed).standard_normal((features, classes)).astype(np.float32)


def linear(seed=0, features=16, classes=4, signature="serving_default"):
    """x[n, features] -> y[n, classes]: the weights of ``onnx_models.linear`` with the same seed."""
    weights = weights_of(seed, features, classes)
    graph = Graph(
        [
            T("x:0", FLOAT32, (1, features), (-1, features)),
            constant("w", np.ascontiguousarray(weights.T)),
            T("y:0", FLOAT32, (1, classes), (-1, classes)),
        ],
        [0],
        [2],
        [Op(FULLY_CONNECTED, [0, 1, -1], [2], (8, Table({})))],
    )
    return model([graph], [(signature, {"x": 0}, {"y": 2}, 0)] if signature else ())


def passing(kind, shape=(1,), free=(-1,)):
    """What goes in comes out, of any datatype: reshaped to one axis."""
    graph = Graph(
        [T("x", kind, shape, free), T("y", kind, shape, free), constant("flat", np.array([-1], np.int32))],
        [0],
        [1],
        [Op(RESHAPE, [0, 2], [1], (17, Table({})))],
    )
    return model([graph])


def gather():
    """values[4], index[n] -> picked[n]: an index out of range makes the run fail."""
    graph = Graph(
        [
            T("values", FLOAT32, (4,)),
            T("index", INT32, (1,), (-1,)),
            T("picked", FLOAT32, (1,), (-1,)),
        ],
        [0, 1],
        [2],
        [Op(GATHER, [0, 1], [2], (23, Table({})))],
    )
    return model([graph])


def quantized(scale=0.5, zero=3):
    """x[n] int8 -> y[n] int8, each its value times ``scale``, plus itself."""
    graph = Graph(
        [
            T("x", INT8, (1,), (-1,), scale=[scale], zero=[zero]),
            T("y", INT8, (1,), (-1,), scale=[scale * 2], zero=[zero]),
        ],
        [0],
        [1],
        [Op(ADD, [0, 0], [1], (11, Table({})))],
    )
    return model([graph])


def unknown_operator():
    """An operator that no runtime has."""
    graph = Graph([T("x", FLOAT32, (1,)), T("y", FLOAT32, (1,))], [0], [1], [Op(CUSTOM, [0], [1], custom="Nonesuch")])
    return model([graph])
