"""Start to ready, memory and idle CPU of core: DESIGN's rows "start to ready" and "memory".

The real daemon is started on a store of 20 models of four tried variants each; its start is interleaved with that of a
bare interpreter that imports the same libraries (asyncio, uvloop, pydantic, cryptography), so that a busy machine shows
in both and the ratio tells of the agent. Memory is what the kernel counts as resident, libraries included. Idle means
that nothing was asked for; the second idle figure is with a model loaded and an app connected.

    python benchmarks/startup.py [--json] [--quick] [--models N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from daemon import ROOT, Daemon, bundle, sample

from agent.store.keys import DeviceKeys
from agent.store.store import Store

BUDGETS = {"start_s": 0.6, "idle_rss_mb": 48.0, "serving_rss_mb": 100.0, "idle_cpu_percent": 0.5}
#: After a start, until core gives back what that took; after a load, until what follows it is over.
STARTED_S, LOADED_S = 21.0, 3.0
#: What any daemon with these libraries pays before its own first line.
LIBRARIES = (
    "import asyncio, uvloop\n"
    "from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305\n"
    "from pydantic import BaseModel\n"
    "class One(BaseModel):\n    number: int = 1\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="start to ready, memory and idle CPU of core")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer starts, a shorter look at idle")
    parser.add_argument("--models", type=int, default=20, help="models in the catalog (default 20)")
    options = parser.parse_args()
    starts, idle_s = (4, 5.0) if options.quick else (15, 40.0)
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder:
        report = measure(Path(folder), options.models, starts, idle_s)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


def measure(folder: Path, models: int, starts: int, idle_s: float) -> dict:
    """The whole report."""
    daemon = Daemon(folder)
    fill(daemon, models)
    start = measure_start(daemon, starts)
    with daemon:
        daemon.settle()
        started_memory = daemon.memory()
        time.sleep(STARTED_S)
        idle = measure_idle(daemon, idle_s)
        idle_memory = daemon.memory()
        with daemon.client() as client:
            client.infer("model-0", {"x": sample()})
            serving_memory = daemon.memory()
            time.sleep(LOADED_S)
            serving_idle = measure_idle(daemon, idle_s)
    figures = {
        "start_s": start["start_s"],
        "idle_rss_mb": idle_memory["rss_mb"],
        "serving_rss_mb": serving_memory["rss_mb"],
        "idle_cpu_percent": max(idle["cpu_percent"], serving_idle["cpu_percent"]),
    }
    return {
        "benchmark": "startup",
        "models": models,
        "load_average": round(os.getloadavg()[0], 1),
        "budgets": BUDGETS,
        "figures": figures,
        "start": start,
        "memory": {"just started": started_memory, "idle": idle_memory, "serving": serving_memory},
        "idle": {"nothing loaded": idle, "a model loaded, an app connected": serving_idle},
        "within_budget": all(figures[name] <= BUDGETS[name] for name in BUDGETS),
    }


def fill(daemon: Daemon, models: int) -> None:
    """One model is added and tried for real; the others are copies of it in the catalog, blobs and story included."""
    path = bundle(daemon.folder / "m.edgemodel", "model-0", "1.0.0", seed=0, variants=4)
    with daemon:
        daemon.add(path)
        daemon.stop()
    with Store(daemon.state / "store", DeviceKeys(daemon.state / "keys"), 1 << 30) as store:
        model = store.document.models["model-0"]
        (entry,) = model.versions.values()
        plain = {name: store.read(ref) for name, ref in entry.blobs.items()}
        copies = {}
        for index in range(1, models):
            name = f"model-{index}"
            blobs = {
                part: store.add_blob(name, "1.0.0", part, [data.read_bytes(1 << 20)]) for part, data in plain.items()
            }
            manifest = entry.manifest.model_copy(update={"name": name})
            versions = {"1.0.0": entry.model_copy(update={"manifest": manifest, "blobs": blobs})}
            copies[name] = model.model_copy(update={"versions": versions})
        store.commit(lambda document: document.model_copy(update={"models": {**document.models, **copies}}))
        for data in plain.values():
            data.close()


def measure_start(daemon: Daemon, starts: int) -> dict[str, float]:
    """Medians of ``starts`` starts, each after one of the bare interpreter. The first of both only warms the files."""
    ready, cpu, bare = [], [], []
    for turn in range(starts + 1):
        seconds = bare_start()
        took = daemon.start()
        spent = daemon.cpu_s()
        daemon.stop()
        if turn:
            bare.append(seconds)
            ready.append(took)
            cpu.append(spent)
    return {
        "starts": starts,
        "start_s": round(statistics.median(ready), 3),
        "fastest_s": round(min(ready), 3),
        "cpu_s": round(statistics.median(cpu), 3),
        "libraries_alone_s": round(statistics.median(bare), 3),
        "ratio_to_libraries": round(statistics.median(mine / its for mine, its in zip(ready, bare, strict=True)), 2),
    }


def bare_start() -> float:
    """Seconds for an interpreter with the libraries and nothing of the agent."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LIBRARIES], check=True, cwd=ROOT)
    return time.perf_counter() - began


def measure_idle(daemon: Daemon, seconds: float) -> dict[str, float]:
    """CPU and wake-ups while nobody asks for anything."""
    cpu, wakeups, began = daemon.cpu_s(), daemon.wakeups(), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return {
        "seconds": round(took, 1),
        "cpu_percent": round(100 * (daemon.cpu_s() - cpu) / took, 4),
        "wakeups_per_s": round((daemon.wakeups() - wakeups) / took, 2),
    }


def table(report: dict) -> str:
    """The report for people."""
    start, figures = report["start"], report["figures"]
    names = {
        "start_s": f"start to ready, {report['models']} models, s",
        "idle_rss_mb": "memory idle, no runtime, MB",
        "serving_rss_mb": "memory with ONNX Runtime and a small model, MB",
        "idle_cpu_percent": "CPU when idle, % of a core",
    }
    lines = [f"{'what':48} {'measured':>9} {'budget':>7}"]
    for name, title in names.items():
        mark = "" if figures[name] <= BUDGETS[name] else "  OVER"
        lines.append(f"{title:48} {figures[name]:9.3f} {BUDGETS[name]:7.1f}{mark}")
    lines += [
        "",
        f"fastest start {start['fastest_s']} s, CPU time of a start {start['cpu_s']} s; its libraries alone take "
        f"{start['libraries_alone_s']} s on this machine now (load {report['load_average']}): "
        f"{start['ratio_to_libraries']} x that",
    ]
    lines += [
        f"memory {name}: {memory['anonymous_mb']} MB of its own, {memory['files_mb']} MB of libraries"
        for name, memory in report["memory"].items()
    ]
    lines += [
        f"idle, {name}: {idle['cpu_percent']} % of a core, {idle['wakeups_per_s']} wake-ups/s"
        for name, idle in report["idle"].items()
    ]
    return "\n".join([*lines, "within budget" if report["within_budget"] else "OVER BUDGET"])


if __name__ == "__main__":
    main()
