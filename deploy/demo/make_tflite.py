"""Makes the demo model's TFLite variants from the very weights of ``digits.onnx``: fp32, and int8 with static ranges.

The graph is written operator by operator with the schema that comes with ai-edge-litert, as ``train.py`` writes the
ONNX one: no converter of two gigabytes, and nothing in the file but what runs. TFLite keeps images with their channels
last; with one channel that is a matter of shape alone, so both files take and give what ``digits.onnx`` does.
int8 comes from ai-edge-quantizer, with the images that calibrate the ONNX variants.

Not needed to run the demo: the two files are in the repository. To make them again:
``pip install -e .[tflite-tools] && python deploy/demo/make_tflite.py`` (half a minute).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import onnxruntime as ort
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from ai_edge_quantizer import qtyping, quantizer
from onnx import numpy_helper

HERE = Path(__file__).parent
LARGER = 4  # the network enlarges 8 x 8 to 32 x 32
SIGNATURE = "serving_default"


class Graph:
    """A TFLite graph under construction; activations are tensors with a free batch axis, channels last."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]  # the first one is empty by convention: no constant
        self.operators: list[Any] = []
        self.codes: dict[int, int] = {}

    def activation(self, name: str, *shape: int) -> int:
        return self._tensor(name, [1, *shape], signature=[-1, *shape])

    def constant(self, name: str, value: np.ndarray) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self.buffers.append(buffer)
        kind = {"float32": schema.TensorType.FLOAT32, "int32": schema.TensorType.INT32}[value.dtype.name]
        return self._tensor(name, list(value.shape), kind=kind, buffer=len(self.buffers) - 1)

    def add(self, code: int, inputs: list[int], output: int, options: tuple[int, Any] | None = None) -> int:
        operator = schema.OperatorT()
        operator.opcodeIndex = self.codes.setdefault(code, len(self.codes))
        operator.inputs, operator.outputs = inputs, [output]
        if options is not None:
            operator.builtinOptionsType, operator.builtinOptions = options
        self.operators.append(operator)
        return output

    def _tensor(
        self,
        name: str,
        shape: list[int],
        *,
        signature: list[int] | None = None,
        kind: int = schema.TensorType.FLOAT32,
        buffer: int = 0,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, shape, kind, buffer
        tensor.hasRank = True
        if signature is not None:
            tensor.shapeSignature = signature
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def finish(self, image: int, scores: int) -> bytes:
        """The model with one signature, whose names are those of the ONNX file."""
        subgraph = schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs, subgraph.name = [image], [scores], "digits"
        model = schema.ModelT()
        model.version, model.description = 3, "edge-agent-demo"
        model.operatorCodes = [_code(code) for code in self.codes]
        model.subgraphs, model.buffers = [subgraph], self.buffers
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
        signature.inputs, signature.outputs = [_named("image", image)], [_named("scores", scores)]
        model.signatureDefs = [signature]
        return _packed(model)


def _packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _code(code: int) -> Any:
    made = schema.OperatorCodeT()
    made.builtinCode, made.deprecatedBuiltinCode = code, min(code, 127)
    made.version = 3 if code == schema.BuiltinOperator.RESIZE_BILINEAR else 1  # half-pixel centres came with 3
    return made


def _named(name: str, tensor: int) -> Any:
    made = schema.TensorMapT()
    made.name, made.tensorIndex = name, tensor
    return made


def fp32(model: onnx.ModelProto) -> bytes:
    """``digits.onnx`` as TFLite, layer by layer."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    graph, ops = Graph(), schema.BuiltinOperator
    side = 8
    image = graph.activation("image", 1, side, side)
    shape = graph.constant("channels_last", np.int32([-1, side, side, 1]))
    options = schema.ReshapeOptionsT()
    options.newShape = [-1, side, side, 1]
    turned = graph.activation("turned", side, side, 1)
    x = graph.add(ops.RESHAPE, [image, shape], turned, (schema.BuiltinOptions.ReshapeOptions, options))
    x = _multiplied(graph, x, weights["sixteenth"].reshape(1), graph.activation("grey", side, side, 1))
    side *= LARGER
    options = schema.ResizeBilinearOptionsT()
    options.halfPixelCenters = True
    size = graph.constant("size", np.int32([side, side]))
    enlarged = graph.activation("enlarged", side, side, 1)
    x = graph.add(ops.RESIZE_BILINEAR, [x, size], enlarged, (schema.BuiltinOptions.ResizeBilinearOptions, options))
    layer = 0
    while (name := f"conv{layer}") in nodes:
        stride = next(a.ints[0] for a in nodes[name].attribute if a.name == "strides")
        residual = f"sum{layer}" in nodes
        y, side = _convolution(graph, x, layer, weights, stride, side, relu=not residual)
        x = _sum(graph, x, y, layer, side, weights[f"weight{layer}"].shape[0]) if residual else y
        layer += 1
    return graph.finish(image, _head(graph, x, weights))


def _multiplied(graph: Graph, x: int, factor: np.ndarray, output: int) -> int:
    options = schema.BuiltinOptions.MulOptions, schema.MulOptionsT()
    return graph.add(schema.BuiltinOperator.MUL, [x, graph.constant("sixteenth", factor)], output, options)


def _convolution(
    graph: Graph, x: int, layer: int, weights: dict[str, np.ndarray], stride: int, side: int, *, relu: bool
) -> tuple[int, int]:
    """A 3 x 3 convolution with one pixel of zeros around: what TFLite calls SAME pads otherwise where the stride is 2,
    so there the zeros are put on by hand. The output and its side."""
    weight = weights[f"weight{layer}"]
    outside, inside = weight.shape[:2]
    if stride > 1:
        around = graph.constant(f"around{layer}", np.int32([[0, 0], [1, 1], [1, 1], [0, 0]]))
        padded = graph.activation(f"padded{layer}", side + 2, side + 2, inside)
        x = graph.add(schema.BuiltinOperator.PAD, [x, around], padded, _nothing("PadOptions"))
    options = schema.Conv2DOptionsT()
    options.strideW = options.strideH = stride
    options.dilationWFactor = options.dilationHFactor = 1
    options.padding = schema.Padding.VALID if stride > 1 else schema.Padding.SAME
    options.fusedActivationFunction = _activation(relu)
    side //= stride
    inputs = [
        x,
        graph.constant(f"weight{layer}", weight.transpose(0, 2, 3, 1)),
        graph.constant(f"bias{layer}", weights[f"bias{layer}"]),
    ]
    output = graph.activation(f"relu{layer}" if relu else f"conv{layer}", side, side, outside)
    chosen = schema.BuiltinOptions.Conv2DOptions, options
    return graph.add(schema.BuiltinOperator.CONV_2D, inputs, output, chosen), side


def _sum(graph: Graph, x: int, y: int, layer: int, side: int, channels: int) -> int:
    options = schema.AddOptionsT()
    options.fusedActivationFunction = _activation(relu=True)
    output = graph.activation(f"relu{layer}", side, side, channels)
    return graph.add(schema.BuiltinOperator.ADD, [x, y], output, (schema.BuiltinOptions.AddOptions, options))


def _head(graph: Graph, x: int, weights: dict[str, np.ndarray]) -> int:
    """The mean of each channel, and ten scores of them."""
    score_weight = weights["score_weight"]
    axes = graph.constant("rows_and_columns", np.int32([1, 2]))
    features = graph.activation("features", score_weight.shape[1])
    x = graph.add(schema.BuiltinOperator.MEAN, [x, axes], features, _nothing("ReducerOptions"))
    inputs = [x, graph.constant("score_weight", score_weight), graph.constant("score_bias", weights["score_bias"])]
    scores = graph.activation("scores", score_weight.shape[0])
    return graph.add(schema.BuiltinOperator.FULLY_CONNECTED, inputs, scores, _nothing("FullyConnectedOptions"))


def _nothing(options: str) -> tuple[int, Any]:
    """Options that all stay at their defaults."""
    return getattr(schema.BuiltinOptions, options), getattr(schema, options + "T")()


def _activation(relu: bool) -> int:
    kinds = schema.ActivationFunctionType
    return kinds.RELU if relu else kinds.NONE


def int8(model: bytes, images: np.ndarray) -> bytes:
    """Weights per channel and activations in int8 with ranges from ``images``; what goes in and out stays fp32."""
    work = quantizer.Quantizer(model)
    work.add_static_config(
        regex=".*", operation_name=qtyping.TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8
    )
    for edge in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        work.update_quantization_recipe(".*", edge, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
    ranges = work.calibrate({SIGNATURE: [{"image": image[None]} for image in images]}, num_threads=1)
    made = work.quantize(ranges, enable_progress_report=False).quantized_model
    assert made is not None
    return _with_free_batch(bytes(made))


def _with_free_batch(data: bytes) -> bytes:
    """The quantizer's new output tensor has lost the mark that its first axis is free."""
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))  # weights behind the FlatBuffer come into it
    graph = model.subgraphs[0]
    for index in graph.outputs:
        tensor = graph.tensors[index]
        tensor.shapeSignature = [-1, *list(tensor.shape)[1:]]
    return _packed(model)


def scores_of(model: bytes, images: np.ndarray) -> np.ndarray:
    run = Interpreter(model_content=model, num_threads=1).get_signature_runner(SIGNATURE)
    return np.concatenate([run(image=image[None])["scores"] for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description="make the demo model's TFLite variants")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    model = onnx.load(str(HERE / "digits.onnx"))
    made = {"fp32": fp32(model)}
    made["int8"] = int8(made["fp32"], np.load(HERE / "digits-calibrate.npz")["image"].astype("f4"))
    with np.load(HERE / "digits-heldout.npz") as held_out:
        images, labels = held_out["image"].astype("f4"), held_out["label"]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = session.run(["scores"], {"image": images})[0]
    np.testing.assert_allclose(scores_of(made["fp32"], images), reference, atol=1e-3)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (options.out / f"digits-{name}.tflite").write_bytes(data)
        accuracy = np.mean(scores_of(data, images).argmax(1) == labels)
        print(f"digits-{name}.tflite: {len(data)} bytes, held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
