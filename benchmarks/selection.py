"""The choice of a variant against brute force: DESIGN's row "choice of a variant".

The product's own path chooses (filter, prior, trials in confined children, decision), again and again, among variants
of MobileNetV2's size: fp32, fp16, int8 static and dynamic, one that is fast but wrong and one that is accurate but
slow. The truth comes from elsewhere: every variant run in turn, round after round, in several fresh processes that
know nothing of trials. Regret is how much worse the chosen one truly is, by the policy's own measure, than the truly
best of those that keep the policy's limits. Energy is estimated from nominal watts: there is no sensor on most
machines.

Copies: the same network under two names with different bytes, so that nothing but the statistics can call it a tie.

    python benchmarks/selection.py [--json] [--repeats 20] [--threads N] [--only NAME ...]

Ends with status 1 when a budget is missed. On a machine that is busy with other things the brute force is as uncertain
as everything else: the load is printed, and so is how far the truth itself moved (drift). ``chrt -r 1`` in front gives
the measuring the CPU at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from agent.base.clock import SystemClock
from agent.base.config import Config
from agent.base.paths import Paths
from agent.bundles.agreement import agreement, load_golden
from agent.bundles.manifest import Manifest, parse_manifest
from agent.core.device import look_at_device
from agent.infer.runtimes.onnx import spinning
from agent.infer.trial import Surroundings
from agent.operations.choosing import DeviceView, Known, TrialSettings, VariantChooser
from agent.selection.inventory import InstalledRuntime, RuntimeInventory
from agent.selection.rules import memory_headroom_mb

REGRET_BUDGET, AGREE_BUDGET = 0.05, 0.95
CPU = "CPUExecutionProvider"
WATTS = 15.0
PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "int8-static": "int8", "int8-dynamic": "int8"}
SCHEMES = {"int8-static": {"form": "QDQ"}, "int8-dynamic": {"ranges": "dynamic"}}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A wish, and how the golden set judges: ``threshold`` -1 lets every answer pass."""

    name: str
    policy: dict[str, Any]
    threshold: float = -1.0
    #: Repeats are counted against the budget of agreement.
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Truth:
    """What a variant is really like on this machine."""

    ms: float
    p95_ms: float
    peak_mb: float
    quality: float


def scenarios(truths: Mapping[str, Truth]) -> list[Scenario]:
    """Every policy, then the corners in which the wrong and the accurate one may win, or not."""
    between = (truths["fp32"].p95_ms * truths["accurate-slow"].ms) ** 0.5
    return [
        Scenario("latency", {"prefer": "latency", "min_quality": 0.9}),
        Scenario("energy", {"prefer": "energy", "min_quality": 0.9}),
        Scenario("memory", {"prefer": "memory", "min_quality": 0.9}),
        Scenario("accuracy", {"prefer": "accuracy"}),
        Scenario("anything goes", {"prefer": "latency"}, counted=False),
        Scenario("golden set refuses", {"prefer": "latency"}, threshold=0.9, counted=False),
        Scenario("exact only", {"prefer": "latency", "min_quality": 0.995}, counted=False),
        Scenario("accurate in time", {"prefer": "accuracy", "max_latency_ms": between}, counted=False),
    ]


# -- the product's choice ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _File:
    """A model as the trial opens it: in a memory file, which the confined child may open again by its descriptor."""

    fd: int

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def chooser(threads: int | None) -> tuple[VariantChooser, dict[str, Any]]:
    """The product's chooser on this machine, with nominal watts and files in place of blobs."""
    device = look_at_device(Paths(), Config())
    profile = replace(device.profile, watts_load=WATTS)
    installed = InstalledRuntime(onnxruntime.__version__, tuple(onnxruntime.get_available_providers()))
    view = DeviceView(
        facts=device.facts,
        profile=profile,
        threads=threads or device.threads,
        cpus=device.cpus,
        inventory=lambda: RuntimeInventory({"onnx": installed}),
        headroom_mb=lambda: memory_headroom_mb(device.facts, profile) or 1024,
        power_mode=lambda: None,
    )
    config = Config().selection
    settings = TrialSettings(8, config.min_rounds, config.max_rounds, config.trial_timeout_s, None)
    about = {
        "board": device.facts.board,
        "cpu": device.facts.cpu_model,
        "profile": profile.id,
        "threads": view.threads,
        "onnxruntime": onnxruntime.__version__,
        "rounds": [config.min_rounds, config.max_rounds],
    }

    def open_file(path: Any) -> Any:
        memory = os.memfd_create("model", os.MFD_CLOEXEC)
        os.write(memory, path.read_bytes())
        return _File(memory)

    return VariantChooser(view, open_file, settings, Surroundings(SystemClock())), about


def bundle(variants: Mapping[str, Path], golden: Path, scenario: Scenario) -> tuple[Manifest, dict[str, Path]]:
    """The manifest of a scenario, and its files by name."""
    signature = onnx.load(next(iter(variants.values()))).graph
    document = {
        "format": "edge-model/1",
        "name": "bench",
        "version": "1.0.0",
        "inputs": [_tensor(value) for value in signature.input],
        "outputs": [_tensor(value) for value in signature.output],
        "variants": [
            {
                "id": name,
                "runtime": "onnx",
                "precision": PRECISIONS.get(name, "fp32"),
                "technique": [{"name": "quantized", "parameters": SCHEMES.get(name, {})}],
                "file": _file(path),
            }
            for name, path in variants.items()
        ],
        "golden": {"file": _file(golden), "metric": "cosine", "threshold": scenario.threshold},
        "policy": scenario.policy,
    }
    manifest = parse_manifest(json.dumps(document).encode())
    return manifest, {path.name: path for path in (*variants.values(), golden)}


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    shape = [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim]
    return {"name": value.name, "datatype": "FP32", "shape": shape}


def _file(path: Path) -> dict[str, Any]:
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}


# -- the truth --------------------------------------------------------------------------------------------------------


def brute_force(variants: Mapping[str, Path], golden: Path, threads: int, processes: int = 4) -> dict[str, Truth]:
    """Every variant, measured without the product: latency over interleaved rounds in ``processes`` fresh processes."""
    argument = json.dumps({name: str(path) for name, path in variants.items()})
    runs = [_child("latency", argument, str(golden), str(threads)) for _ in range(processes)]
    peaks = {
        name: [_child("memory", json.dumps({name: str(path)}), str(golden), str(threads))[name] for _ in range(3)]
        for name, path in variants.items()
    }
    reference = load_golden(golden.read_bytes())
    truths = {}
    for name, path in variants.items():
        times = [value for run in runs for value in run[name]]
        truths[name] = Truth(
            ms=statistics.median(times),
            p95_ms=statistics.median(float(np.percentile(run[name], 95)) for run in runs),
            peak_mb=statistics.median(peaks[name]),
            quality=_quality(path, reference),
        )
    return truths


def _quality(path: Path, reference: Any) -> float:
    session = _session(path, 1)
    names = list(reference.outputs)
    count = reference.count
    answers = [session.run(names, {k: v[i : i + 1] for k, v in reference.inputs.items()}) for i in range(count)]
    got = {name: np.concatenate([answer[i] for answer in answers]) for i, name in enumerate(names)}
    return float(agreement("cosine", reference.outputs, got))


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for name, value in spinning(onnxruntime.__version__).items():  # as the agent has it
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(path, options, providers=[CPU])


def _child(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, __file__, "--truth", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def truth_child(kind: str, named: str, golden: str, threads: str) -> dict[str, Any]:
    """In a fresh process: latencies of all variants in turn, or the peak memory of one."""
    paths = {name: Path(path) for name, path in json.loads(named).items()}
    with np.load(golden) as arrays:
        inputs = {name.removeprefix("input/"): arrays[name] for name in arrays.files if name.startswith("input/")}
    examples = [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(8)]
    before = _status_mb("VmRSS")
    sessions = {name: _session(path, int(threads)) for name, path in paths.items()}
    if kind == "memory":
        (session,) = sessions.values()
        for example in examples:
            session.run(None, example)
        return {next(iter(paths)): _status_mb("VmHWM") - before}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for index in range(45):
        order = list(sessions)
        for name in order[index % len(order) :] + order[: index % len(order)]:
            for _ in range(4):
                began = time.perf_counter()
                sessions[name].run(None, examples[index % 8])
                if index >= 5:
                    times[name].append((time.perf_counter() - began) * 1e3)
    return dict(times)


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def regret(winner: str | None, truths: Mapping[str, Truth], scenario: Scenario) -> tuple[float, str]:
    """How much worse than the truly best the winner is, and which one that is; infinite outside the limits."""
    policy = scenario.policy
    least = max(scenario.threshold, policy.get("min_quality", -1.0))
    most = policy.get("max_latency_ms", float("inf"))
    allowed = {name: truth for name, truth in truths.items() if truth.quality >= least and truth.p95_ms <= most}
    cost: Callable[[Truth], float] = {
        "latency": lambda truth: truth.ms,
        "energy": lambda truth: truth.ms * WATTS,
        "memory": lambda truth: truth.peak_mb,
        "accuracy": lambda truth: 1 / max(truth.quality, 1e-9),
    }[policy["prefer"]]
    best = min(allowed, key=lambda name: cost(allowed[name]))
    return (cost(allowed[winner]) / cost(allowed[best]) - 1 if winner in allowed else float("inf")), best


# -- copies -----------------------------------------------------------------------------------------------------------


def tiny(path: Path, rows: int = 64) -> None:
    """A network of a digits classifier's size: some 20 µs a run on a small board."""
    rng = np.random.default_rng(5)
    nodes, weights, name = [], [], "x"
    for index, (a, b) in enumerate(((rows, 128), (128, 64), (64, 10))):
        weights.append(numpy_helper.from_array(rng.normal(0, a**-0.5, (a, b)).astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Relu", [f"m{index}"], [f"r{index}" if index < 2 else "y"]))
        name = f"r{index}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, s]) for n, s in (("x", rows), ("y", 10))]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@contextlib.contextmanager
def copies(source: Path) -> Iterator[dict[str, Path]]:
    """``source`` under two names, with bytes that differ in a remark only."""
    with tempfile.TemporaryDirectory(prefix="edge-agent-bench-") as folder:
        made = {}
        for name in ("one", "two"):
            model = onnx.load(source)
            model.doc_string = f"copy {name}"
            made[name] = Path(folder) / f"{name}.onnx"
            onnx.save(model, made[name])
        yield made


def tiny_golden(model: Path, path: Path) -> None:
    inputs = np.random.default_rng(6).normal(size=(16, 64)).astype(np.float32)
    session = _session(model, 1)
    answers = np.concatenate([session.run(None, {"x": row[None]})[0] for row in inputs])
    np.savez(path, **{"input/x": inputs, "output/y": answers})


# -- the benchmark ----------------------------------------------------------------------------------------------------


def run_scenario(
    choose: VariantChooser, variants: Mapping[str, Path], golden: Path, scenario: Scenario, repeats: int
) -> list[dict[str, Any]]:
    """``repeats`` choices from nothing; the explained document of each with the seconds that it took."""
    manifest, files = bundle(variants, golden, scenario)
    outcomes = []
    for index in range(repeats):
        began = time.monotonic()
        choice = choose(manifest, files, Known(), {}, lambda event: None)  # type: ignore[arg-type] # paths as refs
        seconds = time.monotonic() - began
        outcomes.append({"winner": (choice.chosen or "").partition("@")[0] or None, "seconds": seconds,
                         "explain": choice.document["explain"]})  # fmt: skip
        _tell(f"{scenario.name}: {index + 1}/{repeats}")
    _tell("")
    return outcomes


def _tell(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{progress:60}", end="\r", file=sys.stderr, flush=True)


def judge(scenario: Scenario, truths: Mapping[str, Truth], outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    winners = Counter(outcome["winner"] for outcome in outcomes)
    winner, agreed = winners.most_common(1)[0]
    regrets = [regret(outcome["winner"], truths, scenario) for outcome in outcomes]
    worst = max(value for value, _ in regrets)
    needed = -(-len(outcomes) * AGREE_BUDGET // 1) if scenario.counted else len(outcomes)
    return {
        "scenario": scenario.name,
        "policy": scenario.policy,
        "winner": winner,
        "truly_best": regrets[0][1],
        "winners": dict(winners),
        "agree": f"{agreed}/{len(outcomes)}",
        "worst_regret": worst,
        "seconds": statistics.median(outcome["seconds"] for outcome in outcomes),
        "rounds": statistics.median(_rounds(outcome) for outcome in outcomes),
        "within_budget": worst <= REGRET_BUDGET and agreed >= needed,
    }


def _rounds(outcome: Mapping[str, Any]) -> int:
    return max((entry["measured"] or {}).get("rounds", 0) for entry in outcome["explain"]["candidates"])


def judge_copies(name: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ties = sum(bool(outcome["explain"]["ties"]) for outcome in outcomes)
    ratios = [
        entry["measured"]["vs_winner"]["ratio"]
        for outcome in outcomes
        for entry in outcome["explain"]["candidates"]
        if entry["outcome"] == "lost"
    ]
    return {
        "copies": name,
        "ties": f"{ties}/{len(outcomes)}",
        "largest_difference": max((abs(ratio - 1) for ratio in ratios), default=0.0),
        "winners": dict(Counter(outcome["winner"] for outcome in outcomes)),
        "seconds": statistics.median(outcome["seconds"] for outcome in outcomes),
        "within_budget": ties == len(outcomes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="choice of a variant against brute force")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=20, help="choices for each policy (default 20)")
    parser.add_argument("--threads", type=int, help="threads of one run (default: as the device's profile has it)")
    parser.add_argument("--only", action="append", help="only this scenario, or 'copies' (may be repeated)")
    options = parser.parse_args()
    choose, about = chooser(options.threads)
    made = models.build()
    load_before = os.getloadavg()[1]
    truths = brute_force(made.variants, made.golden, about["threads"])
    wanted = [s for s in scenarios(truths) if not options.only or s.name in options.only]
    rows = []
    for scenario in wanted:
        repeats = options.repeats if scenario.counted else max(1, options.repeats // 5)
        rows.append(judge(scenario, truths, run_scenario(choose, made.variants, made.golden, scenario, repeats)))
    alike = []
    if not options.only or "copies" in options.only:
        alike = [_copies_of_mobilenet(choose, made, options.repeats), _copies_of_tiny(choose, options.repeats)]
    again = brute_force(made.variants, made.golden, about["threads"], processes=2)
    report = {
        "benchmark": "selection",
        "row": "choice of a variant",
        "machine": {**about, "cores": os.cpu_count(), "load": [round(load_before, 1), round(os.getloadavg()[1], 1)]},
        "truth": {name: _figures(truth, again[name]) for name, truth in truths.items()},
        "scenarios": rows,
        "copies": alike,
        "within_budget": all(row["within_budget"] for row in (*rows, *alike)),
    }
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0 if report["within_budget"] else 1


def _copies_of_mobilenet(choose: VariantChooser, made: models.Models, repeats: int) -> dict[str, Any]:
    scenario = Scenario("copies", {"prefer": "latency"})
    with copies(made.variants["int8-static"]) as pair:
        return judge_copies("MobileNetV2 int8", run_scenario(choose, pair, made.golden, scenario, repeats))


def _copies_of_tiny(choose: VariantChooser, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edge-agent-bench-") as folder:
        source, golden = Path(folder) / "tiny.onnx", Path(folder) / "golden.npz"
        tiny(source)
        tiny_golden(source, golden)
        with copies(source) as pair:
            outcomes = run_scenario(choose, pair, golden, Scenario("tiny copies", {"prefer": "latency"}), repeats)
    return judge_copies("digits-sized MLP", outcomes)


def _figures(truth: Truth, again: Truth) -> dict[str, float]:
    """``drift`` is how far the machine itself moved between the brute force before and after the choices."""
    return {
        "p50_ms": round(truth.ms, 3),
        "p95_ms": round(truth.p95_ms, 3),
        "peak_mb": round(truth.peak_mb, 1),
        "cosine": round(truth.quality, 4),
        "drift": round(again.ms / truth.ms - 1, 3),
    }


def table(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"choice of a variant · profile {machine['profile']} · {machine['threads']} thread(s) · "
        f"onnxruntime {machine['onnxruntime']}",
        f"{machine['cores']} cores, load {machine['load'][0]} before and {machine['load'][1]} after",
        "",
        f"{'brute force':16}{'p50 ms':>9}{'p95 ms':>9}{'peak MB':>9}{'cosine':>9}{'drift':>8}",
    ]
    for name, truth in report["truth"].items():
        lines.append(
            f"{name:16}{truth['p50_ms']:9.2f}{truth['p95_ms']:9.2f}{truth['peak_mb']:9.1f}{truth['cosine']:9.4f}"
            f"{truth['drift']:8.1%}"
        )
    lines += ["", f"{'policy':20}{'chosen':16}{'truly best':16}{'agree':>7}{'regret':>8}{'rounds':>8}{'s':>6}  budget"]
    for row in report["scenarios"]:
        lines.append(
            f"{row['scenario']:20}{row['winner'] or '-':16}{row['truly_best']:16}{row['agree']:>7}"
            f"{row['worst_regret']:8.1%}{row['rounds']:8.0f}{row['seconds']:6.1f}  {_kept(row)}"
        )
    if report["copies"]:
        lines += ["", f"{'two copies of':20}{'called a tie':>13}{'largest difference':>20}{'s':>6}  budget"]
    for row in report["copies"]:
        lines.append(
            f"{row['copies']:20}{row['ties']:>13}{row['largest_difference']:20.1%}{row['seconds']:6.1f}  {_kept(row)}"
        )
    lines += ["", f"regret at most {REGRET_BUDGET:.0%}, {AGREE_BUDGET:.0%} of the repeats agree, copies always a tie: "
              f"{_kept(report)}"]  # fmt: skip
    return "\n".join(lines)


def _kept(row: Mapping[str, Any]) -> str:
    return "kept" if row["within_budget"] else "MISSED"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--truth"]:
        print(json.dumps(truth_child(*sys.argv[2:6])))
    else:
        sys.exit(main())
