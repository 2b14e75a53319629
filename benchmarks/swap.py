"""How fast a model comes back into memory: DESIGN's rows on swap-in, cold minus warm, and the hot lease.

swap-in   from the warm plaintext to the first answer, less a steady run, through the agent's engine; beside
          ``InferenceSession(path)`` and its first run, less its steady run. Models are added by the agent's installer
          first, so what is loaded, and how, is what the agent chose by measuring on this machine with this release.
cold      the first answer of a cold model less that of a warm one; beside the cipher over the same bytes and copying
          them into fresh memory, which nobody can avoid. Only where the bytes are enough to be seen.
lease     the right to run on a session that is hot, taken and given back.

Everything is interleaved, round by round, and a row is judged by the median. A second environment with the oldest
release that the agent supports is made below .cache/venvs and measured alike; there the budget is "never slower".

    python benchmarks/swap.py [--json] [--quick] [--only NAME] [--rounds N] [--newest-only]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import device
import numpy as np
import store as cold_parts

from agent.infer.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
COLD_BUDGET, LEASE_BUDGET_US = 1.3, 20.0
#: On another release than the newest: no slower than the plain file, but for what a thread's wake-up takes.
NEVER_SLOWER = 0.95
#: Steady runs after each swap, before the next one.
_STEADY = 12
#: A wake-up of two threads is seen in what is smaller than this.
_LEAST_COLD_MB = 8
_LEASES = 2000
#: How many times faster than its plain file each model has to be back.
FASTER = {"mobilenet-fp32": 5.0, "mobilenet-int8": 1.5, "minilm-fp32": 5.0, "minilm-int8": 4.0, "tflite-fp32": 10.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A model file, what to send it, and how many times faster than the plain file it has to be back."""

    name: str
    path: Path
    budget: float
    inputs: Mapping[str, np.ndarray]
    shapes: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def runtime(self) -> str:
        return "tflite" if self.path.suffix == ".tflite" else "onnx"


def cases(files: Mapping[str, str]) -> list[Case]:
    """The cases of these files by name."""
    image = np.random.default_rng(3).standard_normal((1, 3, 224, 224)).astype(np.float32)
    tokens = np.random.default_rng(4).integers(1000, 29000, (1, 32))
    sentence = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    shapes = {name: list(array.shape) for name, array in sentence.items()}
    known = {
        "mobilenet-fp32": ({"image": image}, {}),
        "mobilenet-int8": ({"image": image}, {}),
        "minilm-fp32": (sentence, shapes),
        "minilm-int8": (sentence, shapes),
        "tflite-fp32": ({"image": np.ascontiguousarray(image.transpose(0, 2, 3, 1))}, {}),
    }
    return [Case(name, Path(files[name]), FASTER[name], *known[name]) for name in known if name in files]


def model_files() -> tuple[dict[str, str], list[str]]:
    """The files that there are, and why others are not there."""
    # Imported here: with an older release the files come from this one.
    import models  # noqa: PLC0415
    import sentences  # noqa: PLC0415
    import tflite_model  # noqa: PLC0415

    made = models.build().variants
    found = {"mobilenet-fp32": made["fp32"], "mobilenet-int8": made["int8-static"]}
    missing = []
    if (embedders := sentences.find()) is not None:
        found |= {f"minilm-{name}": path for name, path in embedders.variants.items()}
    else:
        missing.append("minilm: export it first, see benchmarks/sentences.py")
    try:
        found["tflite-fp32"] = tflite_model.build(made["fp32"])
    except ImportError as error:
        missing.append(f"tflite: {error}")
    return {name: str(path) for name, path in found.items()}, missing


# -- measuring --------------------------------------------------------------------------------------------------------


async def measure(device_: device.Device, case: Case, rounds: int) -> dict[str, Any]:
    """One model. Times in ms."""
    engine = device_.engine(2000.0)
    try:
        plain = plain_loader(case)
        asked = device.request(case.inputs)
        expected = plain()(case.inputs)
        answer = await device.ask(engine, case.name, asked)
        assert _same(answer.outputs[0].array, expected), (
            f"{case.name}: the engine answers otherwise than the plain file"
        )
        samples: dict[str, list[float]] = {name: [] for name in ("warm", "hot", "cold", "plain", "plain_hot")}
        for turn in range(rounds + 1):  # the first only warms up
            taken = await _round(engine, case, plain, asked)
            if turn:
                for name, values in taken.items():
                    samples[name] += values
        lease_us = await _lease_us(engine, case.name)
    finally:
        await engine.close()
    ms = {name: 1000 * statistics.median(values) for name, values in samples.items()}
    record = device_.record(case.name)
    ours, theirs = ms["warm"] - ms["hot"], ms["plain"] - ms["plain_hot"]
    forms = record.get("forms") or []
    return {
        "name": case.name,
        "forms": [_form_name(one) for one in forms] or ["plain"],
        "note": record.get("note", ""),
        "swap_ms": round(ours, 3),
        "plain_ms": round(theirs, 3),
        "hot_ms": round(ms["hot"], 3),
        "plain_hot_ms": round(ms["plain_hot"], 3),
        "ratio": round(theirs / max(ours, 1e-3), 2),
        "best_ratio": round(_best(samples, "plain") / max(_best(samples, "warm"), 1e-6), 2),
        "budget": case.budget,
        "lease_us": round(lease_us, 1),
        "cold_ms": round(ms["cold"] - ms["warm"], 3),
        "bytes": forms[0]["size"] if forms else case.path.stat().st_size,
    }


def _best(samples: Mapping[str, list[float]], name: str) -> float:
    """The least of a first answer less the least steady run: what a quiet machine would show."""
    return min(samples[name]) - min(samples["hot" if name == "warm" else "plain_hot"])


async def _round(engine: Engine, case: Case, plain: Callable[[], Any], asked: Any) -> dict[str, list[float]]:
    """From warm, steady, from cold; the plain file's load, steady."""
    await device.make_warm(engine, case.name)
    warm = await _timed(engine, case.name, asked)
    for _ in range(_STEADY):  # where another form takes over, it does so now
        await device.ask(engine, case.name, asked)
    await device.settle(engine)
    hot = [await _timed(engine, case.name, asked) for _ in range(_STEADY)]
    engine.unload(case.name)
    await device.settle(engine)
    cold = await _timed(engine, case.name, asked)
    await device.settle(engine)
    gc.collect()
    began = time.perf_counter()
    run = plain()
    run(case.inputs)
    loaded = time.perf_counter() - began
    for _ in range(_STEADY):
        run(case.inputs)
    return {"warm": [warm], "hot": hot, "cold": [cold], "plain": [loaded], "plain_hot": _steady(run, case.inputs)}


def _steady(run: Callable[[Any], Any], inputs: Any) -> list[float]:
    taken = []
    for _ in range(_STEADY):
        began = time.perf_counter()
        run(inputs)
        taken.append(time.perf_counter() - began)
    return taken


async def _timed(engine: Engine, name: str, asked: Any) -> float:
    began = time.perf_counter()
    await device.ask(engine, name, asked)
    return time.perf_counter() - began


async def _lease_us(engine: Engine, name: str) -> float:
    """Median of a lease and its release, hot; ten at a time, for a clock has its own cost."""
    standing = engine._standing
    served = engine.served(name)
    taken = []
    for _ in range(_LEASES // 10):
        began = time.perf_counter()
        for _ in range(10):
            resident = await standing.lease(served, None)
            engine._loader.release(resident.name)
        taken.append((time.perf_counter() - began) / 10)
    return 1e6 * statistics.median(taken)


def plain_loader(case: Case) -> Callable[[], Callable[[Any], np.ndarray]]:
    """What anybody would write: a session of the file's path; and what runs it."""
    if case.runtime == "tflite":
        from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415 - only for its case

        def load_tflite() -> Callable[[Any], np.ndarray]:
            interpreter = Interpreter(model_path=str(case.path), num_threads=os.cpu_count())
            interpreter.allocate_tensors()
            runner = interpreter.get_signature_runner()
            return lambda inputs: next(iter(runner(**inputs).values()))

        return load_tflite
    import onnxruntime  # noqa: PLC0415

    def load_onnx() -> Callable[[Any], np.ndarray]:
        session = onnxruntime.InferenceSession(str(case.path), providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]

    return load_onnx


def _same(answer: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(answer, expected, rtol=1e-2, atol=1e-2 * float(np.abs(expected).max())))


def _form_name(figures: Mapping[str, Any]) -> str:
    kind, prepack = figures["route"]
    return kind if prepack else f"{kind}-unpacked"


def least_cold_ms(row: Mapping[str, Any], folder: Path, rounds: int) -> float:
    """What reading a row's bytes takes at the least: the cipher, and copying them into fresh memory."""
    size = -(-row["bytes"] // MIB) * MIB
    (folder / "bytes").write_bytes(os.urandom(MIB) * (size // MIB))
    source = os.open(folder / "bytes", os.O_RDONLY)
    decipher = cold_parts.deciphering(size)
    copy = cold_parts.faster(cold_parts.copy_by_sendfile, cold_parts.copy_by_read_write, source)
    least = cold_parts.interleaved({"least": lambda: (decipher(), copy(source), None)[-1]}, rounds)["least"]
    os.close(source)
    return least * row["bytes"] / size


# -- this release, and the oldest -------------------------------------------------------------------------------------


def measure_here(files: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Every case of these files with the runtimes of this environment."""
    import onnxruntime  # noqa: PLC0415

    rows = []
    for case in cases(files):
        with tempfile.TemporaryDirectory(prefix="edge-agent-bench-") as folder, device.Device(Path(folder)) as made:
            made.add(case.path, case.name, case.shapes)
            row = asyncio.run(measure(made, case, rounds))
            row["least_cold_ms"] = round(least_cold_ms(row, Path(folder), rounds), 3)
            row["cold_ratio"] = round(row["cold_ms"] / row["least_cold_ms"], 2)
            rows.append(row)
            print(f"{row['name']}: {row['ratio']} x", file=sys.stderr, flush=True)
    return {"onnxruntime": onnxruntime.__version__, "python": sys.version.split()[0], "rows": rows}


def oldest_python() -> Path:
    """The Python of an environment with the oldest ONNX Runtime that the agent supports, made where it is not there."""
    toml = __import__("tomllib" if sys.version_info >= (3, 11) else "tomli")
    table = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = table["optional-dependencies"]["onnx"]
    oldest = next(one.partition(">=")[2] for one in extra if one.startswith("onnxruntime>="))
    folder = ROOT / ".cache" / "venvs" / f"bench-ort{oldest}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        # onnxruntime before 1.19 was built for numpy 1.
        wanted = [*table["dependencies"], f"onnxruntime=={oldest}.*", "numpy>=1.24,<2"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / ".made").touch()
    return python


def measure_there(python: Path, files: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """The same in another environment."""
    onnx_only = {name: path for name, path in files.items() if path.endswith(".onnx")}
    done = subprocess.run(
        [str(python), __file__, "--rounds", str(rounds), "--files", json.dumps(onnx_only)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def judge(report: dict[str, Any], *, newest: bool) -> None:
    """Mark each row, and the whole."""
    for row in report["rows"]:
        row["budget"] = row["budget"] if newest else NEVER_SLOWER
        judged = {"swap": row["ratio"] >= row["budget"], "lease": row["lease_us"] <= LEASE_BUDGET_US}
        if row["bytes"] >= _LEAST_COLD_MB * MIB:
            judged["cold"] = row["cold_ratio"] <= COLD_BUDGET
        row["within_budget"] = judged
    report["within_budget"] = all(all(row["within_budget"].values()) for row in report["rows"])


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = []
    for part in report["releases"]:
        lines.append(f"ONNX Runtime {part['onnxruntime']}, Python {part['python']}")
        lines.append(
            "  model           swap-in ms   plain ms   ratio (budget)  best   cold-warm ms / least = ratio"
            "   lease us   hot ms (plain)   forms"
        )
        for row in part["rows"]:
            missed = [name for name, kept in row["within_budget"].items() if not kept]
            lines.append(
                f"  {row['name']:15} {row['swap_ms']:10.2f} {row['plain_ms']:10.2f} {row['ratio']:7.2f}"
                f" ({row['budget']:g}) {row['best_ratio']:9.2f} {row['cold_ms']:10.2f} / {row['least_cold_ms']:5.2f} ="
                f" {row['cold_ratio']:5.2f} {row['lease_us']:10.1f}"
                f" {row['hot_ms']:8.2f} ({row['plain_hot_ms']:.2f})   {', '.join(row['forms'])}"
                f"{'   MISSED: ' + ', '.join(missed) if missed else ''}"
            )
    lines += [f"not measured: {why}" for why in report["not_measured"]]
    lines.append(f"load {report['load_average']:.1f}; {'within budget' if report['within_budget'] else 'OVER BUDGET'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="swap-in, cold minus warm and the hot lease, beside the plain file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="5 rounds in place of 25")
    parser.add_argument("--rounds", type=int, help="interleaved rounds a model (default 25)")
    parser.add_argument("--only", action="append", choices=FASTER, help="a model by name; may be given several times")
    parser.add_argument("--newest-only", action="store_true", help="leave the oldest ONNX Runtime out")
    parser.add_argument("--files", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 25)
    if options.files:  # asked by another environment
        print(json.dumps(measure_here(json.loads(options.files), rounds)))
        return
    files, missing = model_files()
    files = {name: path for name, path in files.items() if not options.only or name in options.only}
    load = os.getloadavg()[0]
    releases = [measure_here(files, rounds)]
    judge(releases[0], newest=True)
    if not options.newest_only:
        releases.append(measure_there(oldest_python(), files, rounds))
        judge(releases[1], newest=False)
    report = {"benchmark": "swap", "releases": releases, "not_measured": missing, "load_average": load}
    report["within_budget"] = not missing and all(part["within_budget"] for part in releases)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


if __name__ == "__main__":
    main()
