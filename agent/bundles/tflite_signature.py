"""The signature of a TFLite file, read from its bytes: inputs, outputs, precision, how they are quantized.

Needs neither the ``tflite`` package nor a runtime, so that core can describe a file that it would not run. The whole
structure is checked on the way, as the FlatBuffers verifier would: tflite-runtime 2.14 checks nothing and crashes on a
damaged file. Refuses what the agent could not serve: weights in other files, inputs or outputs that are no tensors.
Source: schema.fbs of TFLite (field numbers), version 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from agent.base.datatypes import Datatype
from agent.base.errors import PeerError, UnsupportedError
from agent.bundles.flatbuffer import FlatReader, Layout, Table, Vector, malformed
from agent.bundles.manifest import Precision, TensorSpec, is_tensor_name

_LAYOUT = Layout(
    tables={
        "Model": (
            "4", "[OperatorCode", "[SubGraph", "s", "[Buffer", "[4", "[Metadata", "[SignatureDef",
            "[ExternalBufferGroup", "[ExternalBuffer",
        ),
        "OperatorCode": ("1", "s", "4", "4"),
        "SubGraph": ("[Tensor", "[4", "[4", "[Operator", "s", "4"),
        "Tensor": ("[4", "1", "4", "s", "Quantization", "1", "Sparsity", "[4", "1", "[VariantSubType", "4"),
        "Quantization": ("[4", "[4", "[4", "[8", "1", "|QuantizationDetails", "4"),
        "CustomQuantization": ("[1",),
        "BlockwiseQuantization": ("4", "4", "4", "[4"),
        "MultiAxisQuantization": ("", "", "", "[4"),
        "Sparsity": ("[4", "[4", "[DimensionMetadata"),
        "DimensionMetadata": ("1", "4", "1", "|IndexVector", "1", "|IndexVector"),
        "Int32Vector": ("[4",),
        "Uint16Vector": ("[2",),
        "Uint8Vector": ("[1",),
        "VariantSubType": ("[4", "1", "1"),
        "Operator": (
            "4", "[4", "[4", "1", "|Options", "[1", "1", "[1", "[4", "8", "8", "1", "|Options2", "4",
        ),
        "ConcatEmbeddingsOptions": ("4", "[4", "[4"),
        "ListOptions": ("[4",),
        "VarHandleOptions": ("s", "s"),
        "Buffer": ("[1", "8", "8"),
        "Metadata": ("s", "4"),
        "SignatureDef": ("[TensorMap", "[TensorMap", "s", "", "4"),
        "TensorMap": ("s", "4"),
    },
    unions={
        "QuantizationDetails": {1: "CustomQuantization", 2: "BlockwiseQuantization", 3: "MultiAxisQuantization"},
        "IndexVector": {1: "Int32Vector", 2: "Uint16Vector", 3: "Uint8Vector"},
        # Options whose fields are all scalars need no layout: 17 reshape, 30 squeeze, 115 bucketize hold one list.
        "Options": {3: "ConcatEmbeddingsOptions", 17: "ListOptions", 30: "ListOptions", 111: "VarHandleOptions",
                    115: "ListOptions"},
        "Options2": {},
    },
)  # fmt: skip
#: TensorType in the words of the Open Inference Protocol.
_DATATYPES: dict[int, Datatype] = {
    0: "FP32", 1: "FP16", 2: "INT32", 3: "UINT8", 4: "INT64", 5: "BYTES", 6: "BOOL", 7: "INT16", 9: "INT8",
    10: "FP64", 12: "UINT64", 15: "UINT32", 16: "UINT16", 18: "BF16",
}  # fmt: skip
_NOT_SERVED = {8: "a complex number", 11: "a complex number", 13: "a resource", 14: "a variant", 17: "int4", 19: "int2"}
#: What a tensor's bytes count for, by TensorType; whole numbers only where they are quantized.
_FLOATS: dict[int, Precision] = {0: "fp32", 1: "fp16", 10: "mixed", 18: "bf16"}
_QUANTIZED: dict[int, Precision] = {3: "int8", 9: "int8", 17: "int4", 19: "int4", 20: "int4"}
_SCHEMA_VERSION = 3
_DEFAULT_KEY = "serving_default"
_MAX_NAME_BYTES = 1024
_MAX_SPECS = 256
_MAX_AXES = 32
_MAX_SIGNATURES = 1024


@dataclass(frozen=True, slots=True)
class TfliteSignature:
    """What a TFLite file says about itself. ``key`` is the signature that is served, empty where the file has none.

    ``quantization``: scale and zero point by the name of a quantized input or output: real = scale * (stored - zero).
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    key: str = ""
    producer: str = ""
    quantization: Mapping[str, tuple[float, int]] = field(default_factory=dict)


def chosen_key(keys: Collection[str]) -> str:
    """Which of a file's signatures is served: the default one, or the first by name. Empty for none."""
    return _DEFAULT_KEY if _DEFAULT_KEY in keys else min(keys, default="")


def public_names(names: Sequence[str], what: str) -> list[str]:
    """Names that a client can use: the file's own, or ``input0``, ``input1`` … where one is none or there twice."""
    if len(set(names)) == len(names) and all(map(is_tensor_name, names)):
        return list(names)
    return [f"{what}{index}" for index in range(len(names))]


def read_signature(descriptor: int, size: int) -> TfliteSignature:
    """The signature of the TFLite file in the first ``size`` bytes of ``descriptor``, whose structure is checked.

    PeerError: no TFLite file, damaged, weights in other files. UnsupportedError: an input or output that is no tensor,
    or of a datatype that the protocol lacks. Reads with ``pread``; time and memory are bounded whatever the file holds.
    """
    reader = FlatReader(descriptor, size)
    root = reader.root()
    version = reader.scalar(root, 0, 4)
    if version != _SCHEMA_VERSION:
        raise PeerError(f"cannot read model file: TFLite schema version {version}, {_SCHEMA_VERSION} is known")
    reader.check(_LAYOUT, "Model", root)
    if reader.vector(root, 8, 4).count or reader.vector(root, 9, 4).count:
        raise PeerError("cannot use model file: some of its weights are kept in another file")
    graphs = [reader.vector(graph, 0, 4) for graph in reader.children(root, 2)]
    if not graphs:
        raise PeerError("cannot read model file: it holds no graph")
    key, inputs, outputs = _edges(reader, root, graphs)
    if not inputs or not outputs:
        raise UnsupportedError(f"cannot use model file: its graph has no {'outputs' if inputs else 'inputs'}")
    named_inputs, named_outputs = _named(inputs, "input"), _named(outputs, "output")
    return TfliteSignature(
        inputs=tuple(_spec(reader, tensor, "input", name) for name, tensor in named_inputs),
        outputs=tuple(_spec(reader, tensor, "output", name) for name, tensor in named_outputs),
        precision=_precision(_constants(reader, root, size), reader, graphs),
        key=key,
        producer=reader.text(root, 3, _MAX_NAME_BYTES),
        quantization={
            name: scaling
            for name, tensor in (*named_inputs, *named_outputs)
            if (scaling := _scaling(reader, tensor)) is not None
        },
    )


#: A name of the file's, and the tensor behind it.
_Edge = tuple[str, Table]


def _edges(reader: FlatReader, root: Table, graphs: list[Vector]) -> tuple[str, list[_Edge], list[_Edge]]:
    """What goes in and out: of the signature that is served, else of the first graph."""
    signatures: dict[str, tuple[list[_Edge], list[_Edge]]] = {}
    for index, signature in enumerate(reader.children(root, 7)):
        if index >= _MAX_SIGNATURES:
            raise UnsupportedError(f"cannot use model file: it has more than {_MAX_SIGNATURES} signatures")
        graph = reader.scalar(signature, 4, 4)
        if not 0 <= graph < len(graphs):
            raise malformed()
        sides = [_mapped(reader, signature, slot, graphs[graph]) for slot in (0, 1)]
        signatures[reader.text(signature, 2, _MAX_NAME_BYTES)] = (sides[0], sides[1])
    if signatures:
        key = chosen_key(signatures)
        return key, *signatures[key]
    first = next(reader.children(root, 2))
    inputs, outputs = (_listed(reader, first, slot, graphs[0]) for slot in (1, 2))
    return "", inputs, outputs


def _mapped(reader: FlatReader, signature: Table, slot: int, tensors: Vector) -> list[_Edge]:
    """One side of a signature: names of its own for tensors of its graph."""
    _refuse_many(reader.vector(signature, slot, 4).count)
    return [
        (reader.text(entry, 0, _MAX_NAME_BYTES), reader.element(tensors, reader.scalar(entry, 1, 4)))
        for entry in reader.children(signature, slot)
    ]


def _listed(reader: FlatReader, graph: Table, slot: int, tensors: Vector) -> list[_Edge]:
    """One side of a graph: the tensors' own names."""
    _refuse_many(reader.vector(graph, slot, 4).count)
    edges = [reader.element(tensors, int(index)) for index in reader.numbers(graph, slot, "i", _MAX_SPECS)]
    return [(reader.text(tensor, 3, _MAX_NAME_BYTES), tensor) for tensor in edges]


def _refuse_many(count: int) -> None:
    if count > _MAX_SPECS:
        raise UnsupportedError(f"cannot use model file: its graph has more than {_MAX_SPECS} inputs or outputs")


def _named(edges: list[_Edge], what: str) -> list[_Edge]:
    names = public_names([name for name, _ in edges], what)
    return [(name, tensor) for name, (_, tensor) in zip(names, edges, strict=True)]


def _spec(reader: FlatReader, tensor: Table, what: str, name: str) -> TensorSpec:
    kind = reader.scalar(tensor, 1, 1)
    datatype = _DATATYPES.get(kind)
    if datatype is None:
        raise UnsupportedError(
            f"cannot use model file: {what} {name!r} is {_NOT_SERVED.get(kind, f'of TFLite type {kind}')}, which cannot"
            " be served"
        )
    if max(reader.vector(tensor, 0, 4).count, reader.vector(tensor, 7, 4).count) > _MAX_AXES:
        raise UnsupportedError(f"cannot use model file: {what} {name!r} has more than {_MAX_AXES} axes")
    shape = reader.numbers(tensor, 0, "i", _MAX_AXES)
    free = reader.numbers(tensor, 7, "i", _MAX_AXES)  # the same shape with -1 where an axis is free
    return TensorSpec(
        name=name,
        datatype=datatype,
        shape=tuple(max(int(axis), -1) for axis in (free if len(free) == len(shape) else shape)),
    )


def _scaling(reader: FlatReader, tensor: Table) -> tuple[float, int] | None:
    """Scale and zero point of a tensor that has one of each."""
    quantization = reader.child(tensor, 4)
    if quantization is None or reader.vector(quantization, 2, 4).count != 1:
        return None
    scale = float(reader.numbers(quantization, 2, "f", 1)[0])
    zero = reader.numbers(quantization, 3, "q", 1) if reader.vector(quantization, 3, 8).count == 1 else (0,)
    return (scale, int(zero[0])) if math.isfinite(scale) else None


def _constants(reader: FlatReader, root: Table, size: int) -> list[int]:
    """Bytes of each buffer; those of large files lie behind the FlatBuffer, by offset and size."""
    sizes = []
    for buffer in reader.children(root, 4):
        offset, length = (reader.scalar(buffer, slot, 8) & 0xFFFF_FFFF_FFFF_FFFF for slot in (1, 2))
        if offset > 1 and length > size - offset:
            raise malformed()
        sizes.append(length if offset > 1 else reader.vector(buffer, 0, 1).count)
    return sizes


def _precision(constants: list[int], reader: FlatReader, graphs: list[Vector]) -> Precision:
    """What most of the constants are, by bytes; without constants, what the first graph's tensors are."""
    found: dict[Precision, int] = {}
    for tensor in (reader.element(tensors, index) for tensors in graphs for index in range(tensors.count)):
        kind, buffer = reader.scalar(tensor, 1, 1), reader.scalar(tensor, 2, 4)
        quantization = reader.child(tensor, 4)
        quantized = quantization is not None and reader.vector(quantization, 2, 4).count > 0
        precision = _QUANTIZED.get(kind) if quantized else _FLOATS.get(kind)
        if precision is not None:
            found[precision] = found.get(precision, 0) + (constants[buffer] if 0 <= buffer < len(constants) else 0)
    return max(found, key=lambda key: found[key], default="fp32")
