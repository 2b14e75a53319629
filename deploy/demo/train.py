"""Trains the demo model on real data and writes it with its calibration, golden and held-out images.

Data: the handwritten digits that scikit-learn brings along (1797 images of 8 x 8 from 43 people; E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository, CC BY 4.0). The network enlarges them inside its graph and is larger
than the task needs, so that a run takes milliseconds and the choice between its variants means something.

Not needed to run the demo: the files that it writes are in the repository. To make them again:
``pip install -e .[train,pack] && python deploy/demo/train.py`` (some ten minutes on two cores).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
SEED = 20
#: (channels in, channels out, stride, whether the layer's input is added to its output)
LAYERS = [
    (1, 64, 1, False), (64, 96, 1, False), (96, 96, 1, True), (96, 96, 1, True), (96, 96, 1, True), (96, 96, 1, True),
    (96, 96, 2, False), (96, 96, 1, True), (96, 96, 2, False),
]  # fmt: skip
#: Images that calibrate, images with reference answers, images that only the demo sees; the rest trains.
CALIBRATE, GOLDEN, HELD_OUT = 128, 160, 400
#: Opset and IR version that ONNX Runtime 1.18, and much older ones, take.
OPSET, IR_VERSION = 17, 8


class Digits(nn.Module):
    """Images (N, 1, 8, 8) of grey values 0 to 16 to ten class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False) for inside, outside, stride, _ in LAYERS
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _, outside, _, _ in LAYERS)
        self.scores = nn.Linear(LAYERS[-1][1], 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.interpolate(image / 16, scale_factor=4, mode="bilinear", align_corners=False)
        for convolution, norm, (_, _, _, residual) in zip(self.convolutions, self.norms, LAYERS, strict=True):
            y = norm(convolution(x))
            x = functional.relu(x + y if residual else y)
        return self.scores(functional.dropout(x.mean((2, 3)), 0.3, self.training))


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Disjoint parts of the data: name to (images, labels)."""
    digits = load_digits()
    images = digits.images.astype("f4").reshape(-1, 1, 8, 8)
    order = np.random.default_rng(SEED).permutation(len(images))
    ends = np.cumsum([HELD_OUT, GOLDEN, CALIBRATE])
    parts = zip(("heldout", "golden", "calibrate", "train"), np.split(order, ends), strict=True)
    return {name: (images[chosen], digits.target[chosen].astype("i8")) for name, chosen in parts}


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images turned, shifted and scaled a little, each otherwise, as another writer's hand would."""
    count = len(images)
    angle, scale = (torch.rand(2, count, generator=generator) - 0.5) * torch.tensor([[0.5], [0.3]])
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.4
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(images: np.ndarray, labels: np.ndarray, epochs: int) -> Digits:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    model = Digits().to(memory_format=torch.channels_last)  # Faster by half on a CPU.
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    batch = 64
    steps = -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            loss = functional.cross_entropy(model(moved(x[chosen], generator)), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1:3} of {epochs}: loss {total / len(x):.4f}", file=sys.stderr, flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def folded(model: Digits, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a convolution with its batch normalization multiplied in."""
    norm = model.norms[index]
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    weight = model.convolutions[index].weight * factor[:, None, None, None]
    return weight.detach().numpy(), (norm.bias - norm.running_mean * factor).detach().numpy()


def export(model: Digits) -> onnx.ModelProto:
    """The trained network as ONNX, node by node: batch axis free, nothing in it but what runs."""
    nodes, weights = [], []

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    x = node("Mul", ["image", constant("sixteenth", np.float32([1 / 16]).reshape(1, 1, 1, 1))], "grey")
    scales = constant("scales", np.float32([1, 1, 4, 4]))
    x = node("Resize", [x, "", scales], "enlarged", mode="linear", coordinate_transformation_mode="half_pixel")
    for index, (_, _, stride, residual) in enumerate(LAYERS):
        weight, bias = folded(model, index)
        inputs = [x, constant(f"weight{index}", weight), constant(f"bias{index}", bias)]
        y = node("Conv", inputs, f"conv{index}", kernel_shape=[3, 3], pads=[1] * 4, strides=[stride] * 2)
        x = node("Relu", [node("Add", [x, y], f"sum{index}") if residual else y], f"relu{index}")
    x = node("Flatten", [node("GlobalAveragePool", [x], "mean")], "features")
    scores = constant("score_weight", model.scores.weight.detach().numpy())
    node("Gemm", [x, scores, constant("score_bias", model.scores.bias.detach().numpy())], "scores", transB=1)
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edge-agent-demo")
    onnx.checker.check_model(made, full_check=True)
    return made


def scores_of(made: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["scores"], {"image": images})[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="train the demo model")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    parts = split()
    model = train(*parts["train"], options.epochs)
    made = export(model)
    for name, (images, labels) in parts.items():
        scores = scores_of(made, images)
        with torch.no_grad():
            np.testing.assert_allclose(scores, model(torch.from_numpy(images)).numpy(), atol=1e-3)
        print(f"{name}: {len(images)} images, accuracy {np.mean(scores.argmax(1) == labels):.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "digits.onnx").write_bytes(made.SerializeToString())
    # Grey values are whole numbers: stored as such they are a quarter of the size and exact.
    for name in ("calibrate", "golden", "heldout"):
        images, labels = parts[name]
        np.savez_compressed(options.out / f"digits-{name}.npz", image=images, label=labels)


if __name__ == "__main__":
    main()
