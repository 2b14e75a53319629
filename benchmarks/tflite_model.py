"""The benchmarks' MobileNetV2 as TFLite: the fp32 network of ``models.py`` written operator by operator.

The schema comes with ai-edge-litert; no converter is needed. Images have their channels last here, so the input is
1 x 224 x 224 x 3; weights are the ONNX file's, and the answers are compared with its.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
#: Raised with every change below.
GENERATION = 1
#: The most that answers may differ from the ONNX file's, as a share of the largest.
_CLOSE = 1e-3


def build(source: Path, cache: Path = CACHE) -> Path:
    """The TFLite file of an ONNX file that ``models.py`` made, from the cache where it is there."""
    made = cache / f"mobilenet-tflite-{GENERATION}" / "fp32.tflite"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=made.parent, delete=False) as file:
            file.write(convert(onnx.load(source)))
        _check(Path(file.name), source)
        with contextlib.suppress(OSError):
            Path(file.name).rename(made)
    return made


def _check(made: Path, source: Path) -> None:
    import onnxruntime  # noqa: PLC0415 - whoever finds the file in the cache does without
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415

    image = np.random.default_rng(5).standard_normal((1, 3, 224, 224)).astype(np.float32)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: image})[0]
    interpreter = Interpreter(model_path=str(made))
    interpreter.allocate_tensors()
    answer = interpreter.get_signature_runner()(image=image.transpose(0, 2, 3, 1))["logits"]
    assert np.abs(answer - expected).max() <= _CLOSE * np.abs(expected).max(), "the TFLite file answers otherwise"


def convert(model: onnx.ModelProto) -> bytes:
    """Conv (plain or depthwise, 1 x 1 or 3 x 3), Clip, Add, GlobalAveragePool, Flatten, Gemm, Identity; no others."""
    graph = _Graph({tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer})
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Clip"}
    side = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    graph.begin(model.graph.input[0].name, side)
    for node in model.graph.node:
        graph.take(node, clipped)
    return graph.finish(model.graph.input[0].name, model.graph.output[0].name)


class _Graph:
    """A TFLite graph under construction. Tensors are known by their ONNX names."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        from ai_edge_litert import schema_py_generated as schema  # noqa: PLC0415 - only where it is installed

        self._schema = schema
        self._weights = weights
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]  # the first one is empty by convention
        self._operators: list[Any] = []
        self._codes: dict[int, int] = {}
        self._known: dict[str, int] = {}
        self._shapes: dict[str, list[int]] = {}

    def begin(self, name: str, side: int) -> None:
        self._shapes[name] = [1, side, side, 3]
        self._known[name] = self._tensor(name, [1, side, side, 3])

    def take(self, node: onnx.NodeProto, clipped: dict[str, str]) -> None:
        """One node of the ONNX graph."""
        given, output = node.input[0], node.output[0]
        if node.op_type == "Conv":
            self._convolve(node, clipped.get(output))
        elif node.op_type == "Add":
            shape = self._shapes[given]
            inputs = [self._known[name] for name in node.input]
            self._add("ADD", inputs, output, shape, ("AddOptions", {}))
        elif node.op_type == "GlobalAveragePool":
            shape = [1, self._shapes[given][-1]]
            axes = self._constant(f"{output}_axes", np.int32([1, 2]))
            self._add("MEAN", [self._known[given], axes], output, shape, ("ReducerOptions", {}))
        elif node.op_type == "Gemm":
            weight, bias = (self._weights[name] for name in node.input[1:])
            inputs = [self._known[given], self._constant("w_last", weight.T), self._constant("b_last", bias)]
            self._add("FULLY_CONNECTED", inputs, output, [1, weight.shape[1]], ("FullyConnectedOptions", {}))
        elif node.op_type in ("Flatten", "Identity"):
            self._known[output], self._shapes[output] = self._known[given], self._shapes[given]
        elif node.op_type != "Clip":  # a part of the convolution before it
            raise ValueError(node.op_type)

    def _convolve(self, node: onnx.NodeProto, clipped: str | None) -> None:
        options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        stride, depthwise, pad = options["strides"][0], options["group"] > 1, options["pads"][0]
        weight, bias = (self._weights[name] for name in node.input[1:3])
        given, output = node.input[0], clipped or node.output[0]
        x, (_, side, _, channels) = self._known[given], self._shapes[given]
        if stride > 1 and pad:  # what TFLite calls SAME pads otherwise there
            around = self._constant(f"{output}_around", np.int32([[0, 0], [pad, pad], [pad, pad], [0, 0]]))
            padded = [1, side + 2 * pad, side + 2 * pad, channels]
            x = self._add("PAD", [x, around], f"{output}_padded", padded, ("PadOptions", {}))
        kinds = self._schema.ActivationFunctionType
        chosen = {
            "strideW": stride,
            "strideH": stride,
            "dilationWFactor": 1,
            "dilationHFactor": 1,
            "padding": self._schema.Padding.VALID if stride > 1 else self._schema.Padding.SAME,
            "fusedActivationFunction": kinds.RELU6 if clipped else kinds.NONE,
        }
        turned = weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)
        inputs = [x, self._constant(f"{output}_w", turned), self._constant(f"{output}_b", bias)]
        kind = ("DepthwiseConv2DOptions", {**chosen, "depthMultiplier": 1}) if depthwise else ("Conv2DOptions", chosen)
        shape = [1, -(-side // stride), -(-side // stride), weight.shape[0]]
        self._add("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", inputs, output, shape, kind)

    def _add(
        self, code: str, inputs: list[int], output: str, shape: list[int], options: tuple[str, dict[str, Any]]
    ) -> int:
        operator = self._schema.OperatorT()
        number = getattr(self._schema.BuiltinOperator, code)
        operator.opcodeIndex = self._codes.setdefault(number, len(self._codes))
        self._known[output], self._shapes[output] = self._tensor(output, shape), shape
        operator.inputs, operator.outputs = inputs, [self._known[output]]
        made = getattr(self._schema, f"{options[0]}T")()
        for name, value in options[1].items():
            setattr(made, name, value)
        operator.builtinOptionsType = getattr(self._schema.BuiltinOptions, options[0])
        operator.builtinOptions = made
        self._operators.append(operator)
        return self._known[output]

    def _constant(self, name: str, value: np.ndarray) -> int:
        buffer = self._schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self._buffers.append(buffer)
        return self._tensor(name, list(value.shape), value.dtype.name, len(self._buffers) - 1)

    def _tensor(self, name: str, shape: list[int], kind: str = "float32", buffer: int = 0) -> int:
        tensor = self._schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer, tensor.hasRank = name, shape, buffer, True
        tensor.type = {"float32": self._schema.TensorType.FLOAT32, "int32": self._schema.TensorType.INT32}[kind]
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def finish(self, given: str, taken: str) -> bytes:
        """The file, with one signature of the ONNX file's names."""
        import flatbuffers  # noqa: PLC0415 - comes with ai-edge-litert

        schema = self._schema
        subgraph, model, signature = schema.SubGraphT(), schema.ModelT(), schema.SignatureDefT()
        subgraph.tensors, subgraph.operators, subgraph.name = self._tensors, self._operators, "mobilenet"
        subgraph.inputs, subgraph.outputs = [self._known[given]], [self._known[taken]]
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = [self._named(given)], [self._named(taken)]
        model.version, model.subgraphs, model.buffers, model.signatureDefs = 3, [subgraph], self._buffers, [signature]
        model.operatorCodes = [self._code(number) for number in self._codes]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _named(self, name: str) -> Any:
        made = self._schema.TensorMapT()
        made.name, made.tensorIndex = name, self._known[name]
        return made

    def _code(self, number: int) -> Any:
        made = self._schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode, made.version = number, min(number, 127), 1
        return made
