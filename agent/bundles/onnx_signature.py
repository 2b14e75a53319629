"""The signature of an ONNX file, read from its bytes: inputs, outputs, opset, producer, precision.

Needs neither the ``onnx`` package nor a runtime, so that core can describe a file that it would not run. Refuses what
the agent could not serve: tensors kept in other files, and inputs or outputs that are no tensors.
Source: onnx/onnx.proto3 of the ONNX project (field numbers), onnx/docs/IR.md (initializers and inputs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.base.datatypes import Datatype
from agent.base.errors import PeerError, UnsupportedError
from agent.bundles.manifest import Precision, TensorSpec, is_tensor_name
from agent.bundles.protobuf import Message, WireReader, signed

#: TensorProto.DataType in the words of the Open Inference Protocol.
_DATATYPES: dict[int, Datatype] = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip
_FLOATS = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}
#: TypeProto's other cases.
_NOT_TENSORS = {4: "a sequence", 5: "a map", 7: "an opaque value", 8: "a sparse tensor", 9: "an optional value"}
_INT8_OPERATORS = frozenset({
    "QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv",
    "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
})  # fmt: skip
_INT4_OPERATORS = frozenset({"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"})
#: AttributeProto's floats (7), ints (8) and short strings (9), which tree ensembles have by the million.
_PLAIN_LISTS = re.compile(
    rb"(?:\x3d.{4}|\x40[\x80-\xff]{0,9}[\x00-\x7f]|\x4a(?:%s))+"
    % b"|".join(b"\\x%02x.{%d}" % (n, n) for n in range(17)),
    re.DOTALL,
)
_MAX_NAME_BYTES = 1024
_MAX_SPECS = 256
#: onnx/docs/IR.md: from this version on an input that is also an initializer may be given or left out.
_OVERRIDABLE_FROM_IR = 4
#: More inputs with defaults than this are weights.
_MOST_DEFAULTS = 16
#: Before IR version 4 a graph listed its initializers among the inputs.
_MAX_LISTED_INPUTS = 1 << 16
_MAX_AXES = 32
#: Names of initializers and inputs kept while reading, all together.
_MAX_NAMES_BYTES = 8 << 20
_EXTERNAL = 1


@dataclass(frozen=True, slots=True)
class Signature:
    """What an ONNX file says about itself. ``opset`` is that of the default domain, 0 when it names none."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    producer: str
    precision: Precision


@dataclass(slots=True)
class _Found:
    """Gathered while walking the file once."""

    inputs: list[Message] = field(default_factory=list)
    outputs: list[Message] = field(default_factory=list)
    initializers: set[str] = field(default_factory=set)
    name_bytes: int = 0
    operators: set[str] = field(default_factory=set)
    float_bytes: dict[int, int] = field(default_factory=dict)


def read_signature(descriptor: int, size: int) -> Signature:
    """The signature of the ONNX file in the first ``size`` bytes of ``descriptor``.

    PeerError: no ONNX file, damaged, tensors in other files. UnsupportedError: an input or output that is no tensor, or
    of a datatype that the protocol lacks. Reads with ``pread``; time and memory are bounded whatever the file holds.
    """
    reader = WireReader(descriptor, size)
    found = _Found()
    graph: Message | None = None
    opset = ir_version = 0
    producer: list[str] = ["", ""]
    for number, value in reader.fields(reader.whole):
        if number == 1 and isinstance(value, int):
            ir_version = value
        elif number in (2, 3) and isinstance(value, Message):
            producer[number - 2] = reader.text(value, _MAX_NAME_BYTES)
        elif number == 8 and isinstance(value, Message):
            opset = max(opset, _default_opset(reader, value))
        elif number == 7 and isinstance(value, Message):
            if graph is not None:
                raise PeerError("cannot read model file: it holds two graphs")
            graph = value
            _walk_graph(reader, value, found, top=True)
        elif number == 25 and isinstance(value, Message):
            _walk_function(reader, value, found)
    if graph is None or not ir_version:
        raise PeerError("cannot read model file: it is no ONNX file (no graph in it)")
    inputs = _inputs(reader, found, overridable=ir_version >= _OVERRIDABLE_FROM_IR)
    outputs = tuple(_specs(reader, found.outputs, "output", frozenset()))
    if not inputs or not outputs:
        raise UnsupportedError(f"cannot use model file: its graph has no {'outputs' if inputs else 'inputs'}")
    return Signature(inputs, outputs, opset, ir_version, " ".join(filter(None, producer)), _precision(found))


def _default_opset(reader: WireReader, message: Message) -> int:
    domain, version = "", 0
    for number, value in reader.fields(message):
        if number == 1 and isinstance(value, Message):
            domain = reader.text(value, _MAX_NAME_BYTES)
        elif number == 2 and isinstance(value, int):
            version = value
    return version if domain in ("", "ai.onnx") else 0


def _walk_graph(reader: WireReader, graph: Message, found: _Found, *, top: bool = False) -> None:
    """Gather from a graph and all below it; only the top one's inputs, outputs and initializer names count."""
    for number, value in reader.fields(graph):
        if not isinstance(value, Message):
            continue
        if number == 1:
            _walk_node(reader, value, found)
        elif number == 5:
            name = _walk_tensor(reader, value, found)
            if top:
                _keep_name(found, name)
        elif number == 15:
            _walk_sparse(reader, value, found)
        elif top and number in (11, 12):
            specs = found.inputs if number == 11 else found.outputs
            specs.append(value)
            if len(specs) > _MAX_LISTED_INPUTS:
                raise UnsupportedError(f"cannot use model file: its graph has more than {_MAX_LISTED_INPUTS} inputs")


def _walk_function(reader: WireReader, function: Message, found: _Found) -> None:
    for number, value in reader.fields(function):
        if number == 7 and isinstance(value, Message):
            _walk_node(reader, value, found)
        elif number == 11 and isinstance(value, Message):  # attributes with their defaults
            _walk_attribute(reader, value, found)


def _walk_node(reader: WireReader, node: Message, found: _Found) -> None:
    for number, value in reader.fields(node):
        if number == 4 and isinstance(value, Message):
            operator = reader.text(value, _MAX_NAME_BYTES)
            if operator in _INT8_OPERATORS or operator in _INT4_OPERATORS:
                found.operators.add(operator)
        elif number == 5 and isinstance(value, Message):
            _walk_attribute(reader, value, found)


def _walk_attribute(reader: WireReader, attribute: Message, found: _Found) -> None:
    """Constants and the bodies of If, Loop and Scan hang on attributes, and may point at other files as well."""
    for number, value in reader.fields(attribute, _PLAIN_LISTS):
        if not isinstance(value, Message):
            continue
        if number in (5, 10):
            _walk_tensor(reader, value, found)
        elif number in (6, 11):
            _walk_graph(reader, value, found)
        elif number in (22, 23):
            _walk_sparse(reader, value, found)


def _walk_sparse(reader: WireReader, sparse: Message, found: _Found) -> None:
    for number, value in reader.fields(sparse):
        if number in (1, 2) and isinstance(value, Message):
            _walk_tensor(reader, value, found)


def _walk_tensor(reader: WireReader, tensor: Message, found: _Found) -> str:
    name, datatype, size = "", 0, 0
    for number, value in reader.fields(tensor):
        if number == 2 and isinstance(value, int):
            datatype = value
        elif number == 8 and isinstance(value, Message):
            name = reader.text(value, _MAX_NAME_BYTES)
        elif number in (4, 5, 9, 10) and isinstance(value, Message):
            size += value.end - value.start
        elif number == 13 or (number == 14 and value == _EXTERNAL):
            raise PeerError(
                f"cannot use model file: tensor {name or '(unnamed)'!r} is kept in another file (external data)",
                hint="save the model as one file: onnx.save_model(model, path, save_as_external_data=False)",
            )
    if datatype in _FLOATS:
        found.float_bytes[datatype] = found.float_bytes.get(datatype, 0) + size
    return name


def _keep_name(found: _Found, name: str) -> None:
    if name not in found.initializers:
        found.initializers.add(name)
        found.name_bytes += len(name) + 64
        if found.name_bytes > _MAX_NAMES_BYTES:
            raise PeerError("cannot read model file: its tensors have too many names")


def _inputs(reader: WireReader, found: _Found, *, overridable: bool) -> tuple[TensorSpec, ...]:
    """The graph's inputs; from IR version 4 on one that is also an initializer has that for its default.

    A file that lists all its weights as inputs (some exporters do) means none of them for the caller.
    """
    required = tuple(_specs(reader, found.inputs, "input", found.initializers))
    listed = len(found.inputs) - len(required)
    if not overridable or not required or not 0 < listed <= _MOST_DEFAULTS:
        return required
    names = {spec.name for spec in required}
    defaults = _specs(reader, found.inputs, "input", names)
    return required + tuple(spec.model_copy(update={"optional": True}) for spec in defaults)


def _specs(
    reader: WireReader, messages: list[Message], what: str, without: set[str] | frozenset[str]
) -> Iterator[TensorSpec]:
    """Signature rows of all but the names in ``without``."""
    count = 0
    for message in messages:
        name, type_proto = "", None
        for number, value in reader.fields(message):
            if number == 1 and isinstance(value, Message):
                name = reader.text(value, _MAX_NAME_BYTES)
            elif number == 2 and isinstance(value, Message):
                type_proto = value
        if name in without:
            continue
        count += 1
        if count > _MAX_SPECS:
            raise UnsupportedError(f"cannot use model file: its graph has more than {_MAX_SPECS} {what}s")
        if not 0 < len(name) <= 256:
            raise UnsupportedError(
                f"cannot use model file: an {what} has a name of {len(name)} characters, 1 to 256 fit"
            )
        if not is_tensor_name(name):
            raise UnsupportedError(f"cannot use model file: the name of {what} {name!r} has control characters")
        if type_proto is None:
            raise UnsupportedError(f"cannot use model file: {what} {name!r} has no type")
        yield _spec(reader, type_proto, what, name)


def _spec(reader: WireReader, type_proto: Message, what: str, name: str) -> TensorSpec:
    tensor: Message | None = None
    for number, value in reader.fields(type_proto):
        if number in _NOT_TENSORS:
            raise UnsupportedError(
                f"cannot use model file: {what} {name!r} is {_NOT_TENSORS[number]}, only tensors can be served",
                hint="export without it; for scikit-learn models: zipmap=False",
            )
        if number == 1 and isinstance(value, Message):
            tensor = value
    element, shape = (0, None) if tensor is None else _tensor_type(reader, tensor, f"{what} {name!r}")
    datatype = _DATATYPES.get(element)
    if datatype is None:
        raise UnsupportedError(
            f"cannot use model file: {what} {name!r} has element type {element} of ONNX, unknown here"
        )
    if shape is None:
        return TensorSpec(name=name, datatype=datatype, shape=(-1,), any_rank=True)
    return TensorSpec(name=name, datatype=datatype, shape=shape)


def _tensor_type(reader: WireReader, tensor: Message, what: str) -> tuple[int, tuple[int, ...] | None]:
    element, shape = 0, None
    for number, value in reader.fields(tensor):
        if number == 1 and isinstance(value, int):
            element = value
        elif number == 2 and isinstance(value, Message):
            axes: list[int] = []
            for axis_number, axis in reader.fields(value):
                if axis_number == 1 and isinstance(axis, Message):
                    axes.append(_axis(reader, axis))
                if len(axes) > _MAX_AXES:
                    raise UnsupportedError(f"cannot use model file: {what} has more than {_MAX_AXES} axes")
            shape = tuple(axes)
    return element, shape


def _axis(reader: WireReader, axis: Message) -> int:
    """Its length; -1 where it is free: named, absent or negative."""
    length = -1
    for number, value in reader.fields(axis):
        if number == 1 and isinstance(value, int):
            length = signed(value)
        elif number == 2:
            length = -1
    return max(length, -1)


def _precision(found: _Found) -> Precision:
    """What most of the file is: by its quantizing operators, else by the bytes of its floating-point tensors."""
    if found.operators & _INT4_OPERATORS:
        return "int4"
    if found.operators:
        return "int8"
    if not found.float_bytes:
        return "fp32"
    datatype = max(found.float_bytes, key=lambda key: found.float_bytes[key])
    names: dict[int, Precision] = {1: "fp32", 10: "fp16", 16: "bf16"}
    return names.get(datatype, "mixed")
