"""What the socket costs beside the run itself: DESIGN's rows on small requests, large bodies and eight clients.

All figures are ratios inside one run, of rounds that are interleaved, so that a busy machine hits all parts alike.

small     p50 of a binary request of 16 floats, beside a stock asyncio ``Protocol`` that echoes the same bytes in a
          process of its own, plus the run in this process; and its p99 beside its own p50.
large     p50 of 1x3x640x640 fp32 in the body, beside the run in this process plus two copies: one into the kernel and
          one out of it, made by a pair of sockets in one thread, with nobody to be woken.
clients   throughput of 8 clients on a MobileNet-class model beside the same session run back to back in this process,
          with the same threads: one fewer than cores.

The models are real ONNX files behind the agent's own engine. ``--engine numpy`` replaces both sides by plain numpy,
which leaves nothing but the serving to be measured, and needs no runtime.

    python benchmarks/overhead.py [--json] [--loop asyncio|uvloop] [--engine onnx|numpy] [--only small|large|clients]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.infer.tensors import InferRequest, InferResponse, Tensor
from agent.serve.inference import Inference, ModelServer
from agent.serve.limits import Limits
from agent.serve.routes import RouteTable
from agent.serve.server import Server

BUDGETS = {"small_ratio": 3.0, "small_p99_over_p50": 3.0, "large_ratio": 1.0, "clients_ratio": 0.95}
CLIENTS = 8
THREADS = max(1, (os.cpu_count() or 2) - 1)

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Model:
    """A model as the benchmark needs it: what to send, and how to run it in this process."""

    name: str
    sample: np.ndarray
    run: Run


# The two engines: real ONNX Runtime sessions, and plain numpy.


def onnx_files(folder: Path) -> dict[str, Path]:
    """A product of 16 floats, a mean over a picture, and MobileNetV2."""
    import models  # noqa: PLC0415 - benchmarks/models.py; needs onnx
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    def save(name: str, nodes: list[Any], shapes: tuple[list[int], list[int]], weights: tuple[Any, ...] = ()) -> Path:
        tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip("xy", shapes, strict=True)]
        graph = helper.make_graph(nodes, name, tensors[:1], tensors[1:], list(weights))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (folder / f"{name}.onnx").write_bytes(made.SerializeToString())
        return folder / f"{name}.onnx"

    weight = numpy_helper.from_array(np.ones((16, 4), np.float32), "w")
    pool = [helper.make_node("GlobalAveragePool", ["x"], ["y"])]
    return {
        "small": save("small", [helper.make_node("MatMul", ["x", "w"], ["y"])], ([1, 16], [1, 4]), (weight,)),
        "large": save("large", pool, ([1, 3, 640, 640], [1, 3, 1, 1])),
        "mobilenet": models.build().variants["fp32"],
    }


NUMPY_RUNS: dict[str, Run] = {
    "small": lambda x: x @ np.ones((16, 4), np.float32),
    "large": lambda x: x.mean((2, 3)),
    "mobilenet": lambda x: x.reshape(-1, 1176)[:, :512] @ np.ones((512, 512), np.float32),
}
SAMPLES = {"small": (1, 16), "large": (1, 3, 640, 640), "mobilenet": (1, 3, 224, 224)}


def in_process(engine: str, folder: Path) -> dict[str, Model]:
    """The models run in this process, exactly as the server's engine runs them."""
    rng = np.random.default_rng(0)
    samples = {name: rng.random(shape, np.float32) for name, shape in SAMPLES.items()}
    if engine == "numpy":
        return {name: Model(name, samples[name], run) for name, run in NUMPY_RUNS.items()}
    from agent.infer.runtimes.base import LoadOptions, load_runtime  # noqa: PLC0415

    runtime = load_runtime("onnx")
    made = {}
    for name, path in onnx_files(folder).items():
        with path.open("rb") as file:
            session = runtime.load(file.fileno(), LoadOptions("CPUExecutionProvider", THREADS))
        made[name] = Model(name, samples[name], _session_run(session))
    return made


def _session_run(session: Any) -> Run:
    given, taken = session.inputs[0].name, session.outputs[0].name
    return lambda x: session.run({given: x}, [taken])[0]


class NumpyModels:
    """A ``ModelServer`` of the numpy runs: the small one on the loop, the others in a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "numpy", "version": "0", "extensions": []}

    def ready(self) -> bool:
        return True

    def index(self) -> list[dict[str, Any]]:
        return [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in NUMPY_RUNS]

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        return {"name": name, "versions": ["1"]}

    def model_ready(self, name: str, version: str | None) -> bool:
        return name in NUMPY_RUNS

    def infer(
        self, name: str, version: str | None, request: InferRequest, deadline: float
    ) -> InferResponse | Awaitable[InferResponse]:
        def work() -> InferResponse:
            start = time.perf_counter()
            answer = NUMPY_RUNS[name](request.inputs[0].array)
            spent = int((time.perf_counter() - start) * 1e6)
            parameters = {"variant": "numpy", "degraded": False, "queue_us": 0, "compute_us": spent}
            return InferResponse(name, "1", (Tensor("y", "FP32", answer),), request.id, parameters)

        return work() if name == "small" else asyncio.get_running_loop().run_in_executor(self._thread, work)


def onnx_models(folder: Path) -> ModelServer:
    """The agent's engine with the files of ``folder``; p95 as a trial on this machine would have measured it."""
    from agent.bundles.manifest import TensorSpec  # noqa: PLC0415
    from agent.infer.engine import Engine, EngineLimits  # noqa: PLC0415
    from agent.infer.runtimes.base import LoadOptions, load_runtime  # noqa: PLC0415
    from agent.infer.shelf import Option, Served, Shelf  # noqa: PLC0415

    runtime = load_runtime("onnx")
    provider = "CPUExecutionProvider"
    versions = {}
    for name, path in onnx_files(folder).items():
        with path.open("rb") as file:
            session = runtime.load(file.fileno(), LoadOptions(provider, THREADS))
        inputs: tuple[TensorSpec, ...] = session.inputs
        p95 = _p95_ms(_session_run(session), np.ones(SAMPLES[name], np.float32))
        option = Option(f"fp32@{name}", "fp32", "onnx", provider, THREADS, 50.0, _Opening(path), p95, digest=name)
        versions[name, "1.0.0"] = Served(name, "1.0.0", inputs, session.outputs, (option,))
        session.close()
    engine = Engine(EngineLimits(budget_mb=1000.0), load_runtime)
    engine.put(Shelf(versions, dict(versions.keys())))
    return engine


def _p95_ms(run: Run, sample: np.ndarray) -> float:
    """As a trial measures it: this decides whether the engine runs the model on the event loop."""
    samples = []
    for _ in range(40):
        began = time.perf_counter()
        run(sample)
        samples.append((time.perf_counter() - began) * 1000)
    return percentile(samples[10:], 0.95)


@dataclass(frozen=True)
class _Opening:
    """Opens a model file as the store would: a descriptor for as long as the block lasts."""

    path: Path

    def __call__(self) -> Any:
        return _Opened(self.path)


class _Opened:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Opened:
        self.fd = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


# The processes on the other side.


def serve(folder: Path, engine: str, loop: str) -> None:
    """The agent's server with an engine, until standard input ends."""

    async def main() -> None:
        models = NumpyModels() if engine == "numpy" else onnx_models(folder)
        limits = Limits()
        server = Server(RouteTable(Inference(models, limits=limits).routes()), limits)
        server.start_unix(folder / "infer.sock")
        await _until_input_ends()
        await server.drain(1)

    if loop == "uvloop":
        import uvloop  # noqa: PLC0415

        uvloop.run(main())
    else:
        asyncio.run(main())


def echo(folder: Path) -> None:
    """A stock asyncio ``Protocol`` that sends back what comes."""

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    async def main() -> None:
        await asyncio.get_running_loop().create_unix_server(Echo, str(folder / "echo.sock"))
        await _until_input_ends()

    asyncio.run(main())


async def _until_input_ends() -> None:
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextlib.contextmanager
def others(folder: Path, engine: str, loop: str) -> Iterator[None]:
    """The two processes above, ready."""
    started = []
    for part in ("serve", "echo"):
        command = [
            sys.executable,
            __file__,
            "--part",
            part,
            "--folder",
            str(folder),
            "--engine",
            engine,
            "--loop",
            loop,
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit(f"{part} did not start")
    try:
        yield
    finally:
        for process in started:
            process.communicate(timeout=60)


# This side.


def connect(path: Path) -> socket.socket:
    """A connected blocking socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def request_parts(model: Model) -> tuple[bytes, memoryview]:
    """Head with JSON, and the tensor's bytes: a binary request."""
    data = memoryview(model.sample).cast("B") if model.sample.flags.c_contiguous else memoryview(b"")
    shape = list(model.sample.shape)
    name = "image" if model.name == "mobilenet" else "x"
    document = {
        "inputs": [{"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": len(data)}}],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document).encode()
    lines = [
        f"POST /v2/models/{model.name}/infer HTTP/1.1",
        "Host: localhost",
        f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(head) + len(data)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + head, data


def ask(sock: socket.socket, parts: tuple[bytes, memoryview]) -> None:
    """One request and its whole answer."""
    if len(parts[1]) < 4096:
        sock.sendall(parts[0] + parts[1])
    else:
        sock.sendall(parts[0])
        sock.sendall(parts[1])
    data = sock.recv(65536)
    end = data.index(b"\r\n\r\n") + 4
    if not data.startswith(b"HTTP/1.1 200"):
        raise SystemExit(data.decode())
    start = data.index(b"Content-Length: ") + 16
    left = end + int(data[start : data.index(b"\r\n", start)]) - len(data)
    while left > 0:
        left -= len(sock.recv(65536))


def bounce(sock: socket.socket, data: bytes) -> None:
    """The same bytes there and back."""
    sock.sendall(data)
    left = len(data)
    while left > 0:
        left -= len(sock.recv(65536))


def interleaved(parts: Mapping[str, Callable[[], Any]], rounds: int, block: int) -> dict[str, list[float]]:
    """Microseconds of each call, in blocks by turns; the first round only warms up."""
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            for _ in range(block):
                began = time.perf_counter_ns()
                part()
                if turn:
                    samples[name].append((time.perf_counter_ns() - began) / 1000)
    return samples


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure_small(model: Model, folder: Path, rounds: int) -> dict[str, float]:
    """The row on small requests."""
    parts = request_parts(model)
    whole = parts[0] + parts[1]
    with connect(folder / "infer.sock") as served, connect(folder / "echo.sock") as echoed:
        samples = interleaved(
            {
                "served": lambda: ask(served, parts),
                "echo": lambda: bounce(echoed, whole),
                "in_process": lambda: model.run(model.sample),
            },
            rounds,
            200,
        )
    found = {f"{name}_p50_us": statistics.median(values) for name, values in samples.items()}
    found["served_p99_us"] = percentile(samples["served"], 0.99)
    found["echo_p99_us"] = percentile(samples["echo"], 0.99)
    found["small_ratio"] = found["served_p50_us"] / (found["echo_p50_us"] + found["in_process_p50_us"])
    found["small_p99_over_p50"] = found["served_p99_us"] / found["served_p50_us"]
    return found


def measure_large(model: Model, folder: Path, rounds: int) -> dict[str, float]:
    """The row on a large body."""
    parts = request_parts(model)
    warm = np.empty_like(model.sample)
    with connect(folder / "infer.sock") as served:
        samples = interleaved(
            {
                "served": lambda: ask(served, parts),
                "two_copies": two_copies(parts[1]),
                "in_process": lambda: model.run(model.sample),
                "memcpy": lambda: np.copyto(warm, model.sample),
            },
            rounds,
            10,
        )
    found = {f"{name}_p50_us": statistics.median(values) for name, values in samples.items()}
    found["large_ratio"] = found["served_p50_us"] / (found["in_process_p50_us"] + found["two_copies_p50_us"])
    return found


def two_copies(data: memoryview) -> Callable[[], None]:
    """``data`` into the kernel and out of it by a pair of sockets in this thread, 64 KiB at a time."""
    there, here = socket.socketpair(socket.AF_UNIX)
    memory = memoryview(bytearray(len(data)))

    def copy() -> None:
        for start in range(0, len(data), 65536):
            there.send(data[start : start + 65536])
            got = start
            while got < min(start + 65536, len(data)):
                got += here.recv_into(memory[got : start + 65536])

    return copy


def measure_clients(model: Model, folder: Path, rounds: int, seconds: float) -> dict[str, float]:
    """The row on eight clients: runs a second, by turns in this process and over the socket."""
    alone, served = [], []
    for turn in range(rounds + 1):
        one, eight = _back_to_back(model, seconds), _eight_clients(model, folder, seconds)
        if turn:
            alone.append(one)
            served.append(eight)
    ratio = statistics.median(s / a for s, a in zip(served, alone, strict=True))
    return {
        "threads": THREADS,
        "in_process_per_s": statistics.median(alone),
        "served_per_s": statistics.median(served),
        "clients_ratio": ratio,
    }


def _back_to_back(model: Model, seconds: float) -> float:
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        model.run(model.sample)
        count += 1
    return count / (time.perf_counter() - began)


def _eight_clients(model: Model, folder: Path, seconds: float) -> float:
    parts = request_parts(model)
    counts = [0] * CLIENTS
    go, stop = threading.Barrier(CLIENTS + 1), threading.Event()

    def client(index: int) -> None:
        with connect(folder / "infer.sock") as sock:
            ask(sock, parts)
            go.wait()
            while not stop.is_set():
                ask(sock, parts)
                counts[index] += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    go.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    done, spent = sum(counts), time.perf_counter() - began
    stop.set()
    for thread in threads:
        thread.join()
    return done / spent


def report(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows that were asked for, each with its budget."""
    models = in_process(options.engine, folder)
    made: dict[str, Any] = {
        "benchmark": "overhead",
        "engine": options.engine,
        "loop": options.loop,
        "python": sys.version.split()[0],
    }
    figures: dict[str, float] = {}
    with others(folder, options.engine, options.loop):
        if options.only in (None, "small"):
            figures |= _kept(made, "small", measure_small(models["small"], folder, options.rounds))
        if options.only in (None, "large"):
            figures |= _kept(made, "large", measure_large(models["large"], folder, options.rounds))
        if options.only in (None, "clients"):
            found = measure_clients(models["mobilenet"], folder, options.rounds // 3 or 1, options.seconds)
            figures |= _kept(made, "clients", found)
    made["budgets"] = {
        name: {"limit": limit, "found": figures[name], "within": _within(name, figures[name])}
        for name, limit in BUDGETS.items()
        if name in figures
    }
    made["within_budget"] = all(entry["within"] for entry in made["budgets"].values())
    return made


def _kept(made: dict[str, Any], row: str, found: dict[str, float]) -> dict[str, float]:
    made[row] = {name: round(value, 3) for name, value in found.items()}
    return made[row]


def _within(name: str, value: float) -> bool:
    return value >= BUDGETS[name] if name == "clients_ratio" else value <= BUDGETS[name]


def table(made: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{made['engine']} engine, {made['loop']}, Python {made['python']}"]
    for row in ("small", "large", "clients"):
        for name, value in made.get(row, {}).items():
            lines.append(f"  {row:8} {name:20} {value:12.2f}")
    lines += [
        f"{'within' if entry['within'] else 'OVER  '} budget  {name:20} {entry['found']:8.2f}  limit {entry['limit']}"
        for name, entry in made["budgets"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="the cost of serving beside the run itself")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--engine", choices=("onnx", "numpy"), default="onnx")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default=_best_loop())
    parser.add_argument("--only", choices=("small", "large", "clients"))
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each part of a round with eight clients")
    parser.add_argument("--part", choices=("serve", "echo"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "serve":
        serve(options.folder, options.engine, options.loop)
    elif options.part == "echo":
        echo(options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="ea-bench-") as folder:
            made = report(options, Path(folder))
        print(json.dumps(made, indent=2) if options.json else table(made))


def _best_loop() -> str:
    try:
        import uvloop  # noqa: F401, PLC0415
    except ImportError:
        return "asyncio"
    return "uvloop"


if __name__ == "__main__":
    main()
