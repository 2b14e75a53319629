"""What micro-batching gains: the same model with and without it, behind the real daemon's socket.

Each model is installed twice, once with ``batching`` in its manifest. Closed-loop clients on real connections, each
with one request of one row under way, ask the one and the other by turns, so that a busy machine hits both alike.
Reported: throughput, latency (p50, p99), the daemon's CPU time for a request, and the ratio of the throughputs; the
budget is 2 for the models that gain. What does not pay must be found out by the device itself and switched off: there
the ratio may not be below 0.8. Other work on the same cores makes long runs wait for their slice: look at the load.

mlp        eight matrices of 1024 x 1024, 32 MB: a run of one row reads every weight to use it once
sequence   a small recurrent network (0.2 MB, 120 steps of 128), for comparison: it gains, and no budget is set
tiny       one product of 16 x 4: a run takes less than the joining

    python benchmarks/batching.py [--quick] [--json] [--clients 16]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from daemon import SHORT_TRIALS, Daemon, linear
from onnx import TensorProto, helper, numpy_helper

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest

BUDGET, OFF_BUDGET = 2.0, 0.8
POLICY = {"max_size": 16, "max_delay_us": 1000}
STEPS, HIDDEN, SIDE, LAYERS = 120, 128, 1024, 8


def mlp() -> bytes:
    """x[n, 1024] -> y[n, 1024] by eight matrices."""
    generator = np.random.default_rng(0)
    names = ["x", *(f"h{index}" for index in range(1, LAYERS)), "y"]
    weights = [generator.standard_normal((SIDE, SIDE)).astype(np.float32) / SIDE**0.5 for _ in range(LAYERS)]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    return _model(nodes, ["n", SIDE], ["n", SIDE], {f"w{index}": array for index, array in enumerate(weights)})


def sequence() -> bytes:
    """x[n, 120, 16] -> y[n, 8]: a GRU over 120 steps and a product."""
    generator = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) / 8).astype(np.float32)

    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["steps", "W", "R"], ["", "last"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["last", "axis"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "o"], ["y"]),
    ]
    arrays = {"W": weight(1, 3 * HIDDEN, 16), "R": weight(1, 3 * HIDDEN, HIDDEN), "o": weight(HIDDEN, 8)}
    return _model(nodes, ["n", STEPS, 16], ["n", 8], {**arrays, "axis": np.array([0], np.int64)})


def _model(nodes: list[Any], taken: list[Any], given: list[Any], arrays: dict[str, np.ndarray]) -> bytes:
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", taken), ("y", given))]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "model", tensors[:1], tensors[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return made.SerializeToString()


#: Name, file, axes of a request and its answer, whether batching must pay (None: whatever it does).
MODELS: tuple[tuple[str, Callable[[], bytes], tuple[int, ...], tuple[int, ...], bool | None], ...] = (
    ("mlp", mlp, (1, SIDE), (1, SIDE), True),
    ("sequence", sequence, (1, STEPS, 16), (1, 8), None),
    ("tiny", lambda: linear(0), (1, 16), (1, 4), False),
)


def install(daemon: Daemon, name: str, data: bytes, shapes: tuple[tuple[int, ...], ...], joined: bool) -> None:
    """Add it as a bundle of one variant."""
    taken, given = shapes
    file = {"name": "model.onnx", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": name,
            "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *taken[1:]]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, *given[1:]]}],
            "variants": [{"id": "fp32", "runtime": "onnx", "precision": "fp32", "file": file}],
            **({"batching": POLICY} if joined else {}),
        }
    )
    path = daemon.folder / f"{name}.edgemodel"
    with path.open("wb") as bundle:
        write(manifest, {"model.onnx": data}, bundle)
    daemon.add(path)


def request_of(name: str, array: np.ndarray) -> bytes:
    """A binary request as it goes over the socket."""
    data = array.tobytes()
    entry = {"name": "x", "datatype": "FP32", "shape": list(array.shape), "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    lines = [
        f"POST /v2/models/{name}/infer HTTP/1.1",
        "Host: localhost",
        f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(head) + len(data)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + head + data


def drive(path: Path, message: bytes, clients: int, seconds: float) -> list[float]:
    """So many connections, each with one request under way: microseconds of each answer."""
    waiting = selectors.DefaultSelector()
    began: dict[socket.socket, float] = {}
    for _ in range(clients):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        waiting.register(sock, selectors.EVENT_READ)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    for key in waiting.get_map().values():
        began[key.fileobj] = time.perf_counter()
        key.fileobj.sendall(message)
    while began:
        for key, _ in waiting.select(30):
            sock = key.fileobj
            _read_answer(sock)
            now = time.perf_counter()
            taken.append((now - began.pop(sock)) * 1e6)
            if now < end:
                began[sock] = now
                sock.sendall(message)
    for key in list(waiting.get_map().values()):
        key.fileobj.close()
    waiting.close()
    return taken


def _read_answer(sock: socket.socket) -> None:
    """Read one answer whole."""
    data = sock.recv(65536)
    if not data.startswith(b"HTTP/1.1 200"):
        raise SystemExit(data.decode(errors="replace"))
    end = data.index(b"\r\n\r\n") + 4
    start = data.index(b"Content-Length: ") + 16
    left = end + int(data[start : data.index(b"\r\n", start)]) - len(data)
    while left > 0:
        left -= len(sock.recv(65536))


def figures(samples: list[list[float]], seconds: float) -> dict[str, float]:
    """Of the rounds: medians of throughput, p50 and p99 in microseconds."""
    ordered = [sorted(taken) for taken in samples]
    return {
        "per_s": statistics.median(len(taken) / seconds for taken in ordered),
        "p50_us": statistics.median(taken[len(taken) // 2] for taken in ordered),
        "p99_us": statistics.median(taken[int(len(taken) * 0.99)] for taken in ordered),
    }


def measure(
    daemon: Daemon, name: str, shape: tuple[int, ...], clients: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Both by turns; the first round only warms up."""
    path = daemon.run / "infer.sock"
    sample = np.random.default_rng(1).random(shape, dtype=np.float32)
    messages = {which: request_of(name + which, sample) for which in ("", "-joined")}
    samples: dict[str, list[list[float]]] = {which: [] for which in messages}
    spent_s = dict.fromkeys(messages, 0.0)
    for turn in range(rounds + 1):
        for which in list(messages)[:: 1 if turn % 2 else -1]:
            before_s = daemon.cpu_s()
            taken = drive(path, messages[which], clients, seconds)
            if turn:
                samples[which].append(taken)
                spent_s[which] += daemon.cpu_s() - before_s
    alone, joined = (
        {**figures(samples[which], seconds), "cpu_us": spent_s[which] / sum(map(len, samples[which])) * 1e6}
        for which in messages
    )
    ratios = [len(b) / len(a) for a, b in zip(samples[""], samples["-joined"], strict=True)]
    return {"clients": clients, "alone": alone, "joined": joined, "ratio": statistics.median(ratios)}


def main() -> int:
    """Print a table or one JSON document; status 1 when a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    rounds, seconds = (4, 0.5) if options.quick else (8, 1.5)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ea-") as folder, Daemon(Path(folder), SHORT_TRIALS) as daemon:
        for name, make, taken, given, pays in MODELS:
            data = make()
            for joined in (False, True):
                install(daemon, f"{name}{'-joined' if joined else ''}", data, (taken, given), joined)
            daemon.settle()
            rows = [measure(daemon, name, taken, clients, rounds, seconds) for clients in (1, options.clients)]
            [status] = [row for row in daemon.ask("GET", "/v1/status")["loaded"] if row["model"] == f"{name}-joined"]
            found[name] = {"mb": len(data) / 2**20, "must_pay": pays, "batching": status["batching"], "runs": rows}
    missed = [name for name, result in found.items() if not _kept(result)]
    if options.json:
        print(json.dumps({"budget": BUDGET, "off_budget": OFF_BUDGET, "models": found, "missed": missed}, indent=2))
    else:
        _print(found, missed)
    return 1 if missed else 0


def _kept(result: dict[str, Any]) -> bool:
    if result["must_pay"] is None:
        return True
    ratio, on = result["runs"][-1]["ratio"], result["batching"]["size"] > 1
    return on and ratio >= BUDGET if result["must_pay"] else not on and ratio >= OFF_BUDGET


def _print(found: dict[str, Any], missed: list[str]) -> None:
    for name, result in found.items():
        batching = result["batching"]
        times = ", ".join(f"{rows}: {us:g}" for rows, us in batching["us_per_row"].items())
        said = batching["reason"] or f"runs of up to {batching['size']} rows"
        print(f"{name} ({result['mb']:.2f} MB): {said}")
        print(f"  measured by the device, us a row in a run of so many: {times}")
        for row in result["runs"]:
            print(f"  {row['clients']} clients: {row['ratio']:.2f} x the throughput")
            for which in ("alone", "joined"):
                one = row[which]
                times = f"p50 {one['p50_us']:>7.0f} us  p99 {one['p99_us']:>7.0f} us  CPU {one['cpu_us']:>5.0f} us"
                print(f"    {which:<7}{one['per_s']:>8.0f}/s  {times}")
    print(f"missed: {', '.join(missed)}" if missed else "all budgets are kept")


if __name__ == "__main__":
    sys.exit(main())
