"""The demo's app: held-out handwritten digits, classified over the agent's socket.

``picture FILE`` draws one digit and writes the request for it, ``answer`` reads the JSON answer from standard input,
``all SOCKET BUNDLE`` classifies every held-out digit and compares with a run of the same variant inside this process.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SHADES = " .:-=+*#%@"
WARM_UP = 50


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 1, 8, 8] FP32 and labels [n]."""
    with np.load(HERE / "digits-heldout.npz", allow_pickle=False) as arrays:
        images = next(arrays[name] for name in arrays.files if arrays[name].ndim == 4)
        labels = next(arrays[name] for name in arrays.files if arrays[name].ndim == 1)
    return images, labels


def picture(path: str) -> None:
    images, labels = held_out()
    image = images[7]
    top = float(image.max()) or 1.0
    for row in image[0]:
        print("   " + "".join(SHADES[int(value / top * (len(SHADES) - 1))] * 2 for value in row))
    print(f"   labelled {labels[7]} by hand")
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, *image.shape], "data": image.reshape(-1).tolist()}
    Path(path).write_text(json.dumps({"inputs": [tensor]}))


def answer() -> None:
    document = json.load(sys.stdin)
    scores = document["outputs"][0]["data"]
    said = document["parameters"]
    best = max(range(len(scores)), key=scores.__getitem__)
    print(f"   -> {best}, by {said['variant']} on {said['backend']} in {said['compute_us'] / 1000:.2f} ms")


def classify_all(socket: str, bundle: str) -> None:
    from agent.client import Client

    images, labels = held_out()
    times, right = [], 0
    with Client(socket) as client:
        for image in images[:WARM_UP]:
            client.infer("digits", {"image": image[None]})
        for image, label in zip(images, labels, strict=True):
            start = time.perf_counter()
            result = client.infer("digits", {"image": image[None]})
            times.append(time.perf_counter() - start)
            right += int(np.argmax(next(iter(result.values())))) == label
        variant = result.parameters["variant"]
    own = in_process(bundle, variant, images)
    print(f"{len(labels)} held-out digits: {right} right, accuracy {right / len(labels):.2%}")
    print(f"{'':<28}{'p50':>9}{'p99':>9}")
    for what, values in (("agent.client, over the socket", times), ("the same variant in process", own)):
        p50, p99 = np.percentile(values, [50, 99]) * 1e3
        print(f"{what:<30}{p50:6.2f} ms{p99:6.2f} ms")


def in_process(bundle: str, wanted: str, images: np.ndarray) -> list[float]:
    """Seconds of each run of the variant's plain file in this process, with as many threads as the agent uses."""
    from agent.base.config import Config
    from agent.base.paths import resolve_paths
    from agent.bundles.archive import read
    from agent.core.device import look_at_device

    with Path(bundle).open("rb") as stream:
        reader = read(stream)
        variant = reader.read_manifest().variant(wanted)
        for ref, chunks in reader.files():
            data = b"".join(chunks)
            if ref.name == variant.file.name:
                model = data
    threads = look_at_device(resolve_paths({}), Config()).threads
    run = {"onnx": with_onnx_runtime, "tflite": with_litert}[variant.runtime](model, threads)
    times = []
    for image in [*images[:WARM_UP], *images]:
        start = time.perf_counter()
        run(image[None])
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def with_onnx_runtime(model: bytes, threads: int) -> Callable[[np.ndarray], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def with_litert(model: bytes, threads: int) -> Callable[[np.ndarray], object]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=model, num_threads=threads).get_signature_runner()
    return lambda image: runner(image=image)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", line_buffering=True)
    {"picture": picture, "answer": answer, "all": classify_all}[command](*rest)
