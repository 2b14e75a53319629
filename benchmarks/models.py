"""MobileNetV2-sized models for the benchmarks, made here: no download, the same network on every machine.

The network is MobileNetV2 (Sandler et al., 2018, table 2) with random weights. A net of plain random weights answers
every image alike, which would make agreement meaningless; so each convolution is normalised over a few images as a
trained network's batch normalisation would, and the result is folded into weights and biases.

Variants: ``fp32`` · ``fp16`` · ``int8-static`` (QDQ, per channel) · ``int8-dynamic`` · ``wrong-fast`` (a quarter of
the width,
other weights) · ``accurate-slow`` (two networks; the golden outputs are its own, so that nothing agrees with them
better).

    python benchmarks/models.py             builds below .cache/bench/ and prints the files
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
#: Raised with every change below, so that a cached model is never taken for the new one.
GENERATION = 2

#: Expansion, channels, repeats, stride: table 2 of the paper.
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
INPUT, OUTPUT, CLASSES, SIDE = "image", "logits", 1000, 224
#: How much of the second network is in the reference: enough to be told apart, little enough to agree.
SECOND_SHARE = 0.15
VARIANTS = ("fp32", "fp16", "int8-static", "int8-dynamic", "wrong-fast", "accurate-slow")

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Models:
    """Paths of the variants by id, and of the golden set: an ``.npz`` of ``input/image`` and ``output/logits``."""

    variants: dict[str, Path]
    golden: Path


def build(cache: Path = CACHE) -> Models:
    """All variants and the golden set, from the cache where they are there (made in about 5 s otherwise)."""
    folder = cache / f"mobilenet-{GENERATION}-ort{onnxruntime.__version__}-onnx{onnx.__version__}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            _make(_models(made))
            # Another benchmark may have been quicker: a full folder is not replaced, and both are the same.
            with contextlib.suppress(OSError):
                made.rename(folder)
    return _models(folder)


def _models(folder: Path) -> Models:
    return Models({name: folder / f"{name}.onnx" for name in VARIANTS}, folder / "golden.npz")


def images(count: int, seed: int) -> Array:
    """``count`` made-up images, N x 3 x 224 x 224, zero mean, unit variance: soft blobs, gratings, some noise."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    made = np.empty((count, 3, SIDE, SIDE), np.float32)
    for index in range(count):
        picture = rng.normal(0, 0.2, (3, SIDE, SIDE)).astype(np.float32)
        for _ in range(6):
            cx, cy, width = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.05, 0.5)
            blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
            angle, pitch = rng.uniform(0, np.pi), rng.uniform(2, 40)
            grating = np.sin(pitch * (x * np.cos(angle) + y * np.sin(angle)))
            picture += rng.normal(0, 1, (3, 1, 1)).astype(np.float32) * (blob * (1 + 0.5 * grating))
        made[index] = (picture - picture.mean()) / picture.std()
    return made


class _Network:
    """A graph under construction together with the activations of a few images, which set each layer's scale."""

    def __init__(self, prefix: str, seed: int, batch: Array) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.name, self.value = INPUT, batch
        self._rng = np.random.default_rng(seed)

    def convolve(self, channels: int, size: int, stride: int, *, depthwise: bool = False, clip: bool = True) -> None:
        """A normalised convolution, with ReLU6 after it or not."""
        incoming = self.value.shape[1]
        group = incoming if depthwise else 1
        fan_in = size * size * (1 if depthwise else incoming)
        weight = self._rng.normal(0, fan_in**-0.5, (channels, incoming // group, size, size)).astype(np.float32)
        options = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": [size // 2] * 4, "group": group}
        raw = _convolved(self.value, weight, options)
        mean, deviation = raw.mean((0, 2, 3)), raw.std((0, 2, 3)) + 1e-3
        # Before ReLU6 a batch normalisation has learnt a shift: most of the signal passes, some is cut.
        scale, shift = (1.2, 1.0) if clip else (0.7, 0.0)
        gain = (scale / deviation).astype(np.float32)
        bias = (shift - mean * gain).astype(np.float32)
        self._append("Conv", [weight * gain[:, None, None, None], bias], **options)
        self.value = raw * gain[None, :, None, None] + bias[None, :, None, None]
        if clip:
            self._append("Clip", [np.float32(0.0), np.float32(6.0)])
            self.value = np.clip(self.value, 0, 6)

    def bottleneck(self, expansion: int, channels: int, stride: int) -> None:
        """An inverted residual block."""
        before, value = self.name, self.value
        if expansion != 1:
            self.convolve(value.shape[1] * expansion, 1, 1)
        self.convolve(self.value.shape[1], 3, stride, depthwise=True)
        self.convolve(channels, 1, 1, clip=False)
        if stride == 1 and value.shape[1] == channels:
            self._append("Add", [], others=[before])
            self.value = self.value + value

    def classify(self) -> None:
        """Mean over the picture and the linear layer."""
        self._append("GlobalAveragePool", [])
        self._append("Flatten", [], axis=1)
        features = self.value.mean((2, 3))
        weight = self._rng.normal(0, features.shape[1] ** -0.5, (features.shape[1], CLASSES)).astype(np.float32)
        raw = features @ weight
        gain, mean = (2.0 / (raw.std(0) + 1e-3)).astype(np.float32), raw.mean(0)
        self._append("Gemm", [weight * gain, (-mean * gain).astype(np.float32)])

    def _append(self, kind: str, constants: list[Any], others: list[str] | None = None, **attributes: Any) -> None:
        output = f"{self.prefix}{len(self.nodes)}_{kind}"
        names = [f"{output}_{index}" for index in range(len(constants))]
        self.weights += [numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, constants, strict=True)]
        inputs = [self.name, *(others or []), *names]
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        self.name = output


def _convolved(value: Array, weight: Array, options: dict[str, Any]) -> Array:
    """One convolution, run by the runtime: in numpy the 52 of them would take minutes."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], **options)
    shapes = (("x", value.shape), ("w", weight.shape))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in shapes]
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    session = onnxruntime.InferenceSession(_model(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": value, "w": weight})[0], np.float32)


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    # IR 9 and opset 17 are understood by every release of the runtime that the agent supports.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _network(prefix: str, seed: int, width: float) -> _Network:
    network = _Network(prefix, seed, images(4, seed=7))
    network.convolve(_channels(32 * width), 3, 2)
    for expansion, channels, repeats, stride in BLOCKS:
        for repeat in range(repeats):
            network.bottleneck(expansion, _channels(channels * width), stride if repeat == 0 else 1)
    network.convolve(_channels(1280 * max(1.0, width)), 1, 1)
    network.classify()
    return network


def _channels(wanted: float) -> int:
    """The nearest multiple of 8 (the paper's rule, which vector units like)."""
    return max(8, int(wanted + 4) // 8 * 8)


def _save(path: Path, *networks: _Network) -> None:
    """One network, or the weighted sum of two, as a model."""
    nodes = [node for network in networks for node in network.nodes]
    weights = [weight for network in networks for weight in network.weights]
    if len(networks) == 1:
        nodes.append(helper.make_node("Identity", [networks[0].name], [OUTPUT]))
    else:
        weights.append(numpy_helper.from_array(np.float32(SECOND_SHARE), "share"))
        nodes.append(helper.make_node("Mul", [networks[1].name, "share"], ["second_share"]))
        nodes.append(helper.make_node("Add", [networks[0].name, "second_share"], [OUTPUT]))
    inputs = [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, 3, SIDE, SIDE])]
    outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, CLASSES])]
    model = _model(helper.make_graph(nodes, "mobilenet", inputs, outputs, weights))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _make(models: Models) -> None:
    first, second = _network("a", seed=1, width=1.0), _network("b", seed=2, width=1.0)
    _save(models.variants["fp32"], first)
    _save(models.variants["accurate-slow"], first, second)
    _save(models.variants["wrong-fast"], _network("c", seed=3, width=0.25))
    _quantize(models)
    session = onnxruntime.InferenceSession(models.variants["accurate-slow"], providers=["CPUExecutionProvider"])
    pictures = images(16, seed=11)
    answers = [session.run([OUTPUT], {INPUT: picture[None]})[0] for picture in pictures]
    np.savez(models.golden, **{f"input/{INPUT}": pictures, f"output/{OUTPUT}": np.concatenate(answers)})


def _quantize(models: Models) -> None:
    # Imported here: a benchmark that finds the models in the cache does without.
    from onnxruntime import quantization  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[Array] = iter(images(8, seed=13))

        def get_next(self) -> dict[str, Array] | None:
            picture = next(self._left, None)
            return None if picture is None else {INPUT: picture[None]}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(models.variants["fp32"], prepared)
        quantization.quantize_static(
            prepared,
            models.variants["int8-static"],
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        quantization.quantize_dynamic(
            prepared, models.variants["int8-dynamic"], per_channel=True, weight_type=quantization.QuantType.QUInt8
        )
    half = convert_float_to_float16(onnx.load(models.variants["fp32"]), keep_io_types=True)
    onnx.save(half, models.variants["fp16"])


def main() -> None:
    models = build()
    for name, path in models.variants.items():
        print(f"{name:14} {path.stat().st_size / 1e6:6.1f} MB  {path}")
    print(f"{'golden':14} {models.golden.stat().st_size / 1e6:6.1f} MB  {models.golden}")


if __name__ == "__main__":
    sys.exit(main())
