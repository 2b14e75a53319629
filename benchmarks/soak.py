"""100,000 swaps: DESIGN's row on memory that must not creep and loads that must not become slower; and an idle core.

soak   8 clients ask the agent's engine for models of which a quarter fits into its budget, so that most requests are a
       swap: something is closed, something else is decrypted or opened. 5 % of the requests are for models that cannot
       be loaded: nonsense, or cut short. Memory is weighed after every tenth of the run, once it has been given back;
       the slope is that of a line through all but the first tenth, in which pools and caches fill. Latency is the
       median of a tenth, over that of the plain ``InferenceSession(path)`` of one of the models in between: on a busy
       machine both become slower, on a leaking one only the first.
idle   the daemon with 50 models hot and an app connected: CPU of a core while nobody asks for anything.

    python benchmarks/soak.py [--json] [--quick] [--swaps N] [--only soak|idle]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import device
import many_models
import numpy as np
import onnxruntime
import twins
from daemon import Daemon

from agent.base.errors import DamagedError
from agent.base.memory import resident_mb
from agent.infer.engine import Engine
from agent.infer.runtimes.failures import return_memory
from agent.store.document import VersionEntry

CLIENTS, TENTHS, HOT = 8, 10, 50
BUDGETS = {"mb_per_10000": 1.0, "drift": 1.25, "idle_percent": 0.5}
FAILING = 0.05
#: Good models of each kind, and bad ones.
_GOOD, _BAD = 6, 4
#: One of so many requests is accompanied by a load of the plain file.
_PLAIN_EVERY = 50


# -- soak -------------------------------------------------------------------------------------------------------------


def set_up(made: device.Device, folder: Path) -> tuple[dict[str, tuple[Any, np.ndarray]], list[str], Path]:
    """Good models by name with a request and the answer's beginning, bad ones' names, and a plain file."""
    good: dict[str, tuple[Any, np.ndarray]] = {}
    entries: dict[str, VersionEntry] = {}
    plain = folder / "plain.onnx"
    for kind in [kind for name, kind in many_models.kinds().items() if name in ("20KB", "100KB", "400KB", "2MB")]:
        maker = twins.Twins(made, kind, folder)
        for number in range(_GOOD):
            name, data = f"m{kind.name.lower()}-{number}", twins.changed(kind.model, number + 1)
            entries[name] = maker.make(name, data)
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            good[name] = (
                device.request({"x": kind.sample}),
                session.run(None, {"x": kind.sample})[0].ravel()[:8].copy(),
            )
        plain.write_bytes(data)
    bad = [f"bad-{number}" for number in range(_BAD)]
    for number, name in enumerate(bad):  # whole blobs of what no runtime loads: nonsense, and a file cut in the middle
        entry = maker.make(name, os.urandom(len(data)) if number % 2 else data[: len(data) // 2], prepare=False)
        entries[name] = entry
    twins.commit(made, entries)
    return good, bad, plain


async def soak(made: device.Device, folder: Path, swaps: int) -> dict[str, Any]:
    """The run. Swaps are loads that came to an end, well or not."""
    good, bad, plain = set_up(made, folder)
    for_bad = list(good.values())[-1][0]  # they are of the last kind
    shelf = made.shelf()
    forms = [shelf.find(name).options[0].ways()[0] for name in good]
    budget_mb = sum(form.session + form.size for form in forms) / device.MIB / 4
    engine = made.engine(budget_mb)
    names, chosen = list(good), random.Random(1)
    tenths: list[dict[str, float]] = []
    failures: list[str] = []
    wrong = refused = requests = 0
    taken: list[float] = []
    plains: list[float] = []

    async def client(until: int) -> None:
        nonlocal wrong, refused, requests
        while _swaps(engine) < until:
            requests += 1
            if requests % _PLAIN_EVERY == 0:
                began = time.perf_counter()
                onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
                plains.append(time.perf_counter() - began)
            if chosen.random() < FAILING:
                try:
                    await device.ask(engine, chosen.choice(bad), for_bad)
                except DamagedError:
                    refused += 1
                else:
                    failures.append("a bad model answered")
                continue
            name = chosen.choice(names)
            asked, expected = good[name]
            began = time.perf_counter()
            answer = await device.ask(engine, name, asked)
            taken.append(time.perf_counter() - began)
            wrong += not np.allclose(answer.outputs[0].array.ravel()[:8], expected, rtol=1e-2, atol=1e-2)

    began = time.perf_counter()
    for tenth in range(TENTHS):
        taken.clear()
        plains.clear()
        at = time.perf_counter()
        await asyncio.gather(*(client(swaps * (tenth + 1) // TENTHS) for _ in range(CLIENTS)))
        await device.settle(engine)
        await asyncio.sleep(1.2)  # memory is given back half a second after the last close
        return_memory()
        tenths.append(
            {
                "swaps": _swaps(engine),
                "rss_mb": round(resident_mb(), 2),
                "files_mb": round(many_models.memory_files_mb(os.getpid()), 2),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "p50_ms": round(1000 * statistics.median(taken), 3),
                "p99_ms": round(1000 * sorted(taken)[int(0.99 * len(taken))], 3),
                "plain_ms": round(1000 * statistics.median(plains or [1.0]), 3),
                "seconds": round(time.perf_counter() - at, 1),
            }
        )
        print(json.dumps(tenths[-1]), file=sys.stderr, flush=True)
    memory = engine.memory()
    await engine.close()
    later = tenths[1:]
    mb = [one["rss_mb"] + one["files_mb"] for one in later]
    slope = float(np.polyfit([one["swaps"] / 1e4 for one in later], mb, 1)[0])
    relative = [one["p50_ms"] / one["plain_ms"] for one in later]
    third = max(1, len(relative) // 3)
    return {
        "swaps": _swaps(engine),
        "failed_loads": memory["failed"],
        "requests": requests,
        "seconds": round(time.perf_counter() - began, 1),
        "budget_mb": round(budget_mb, 1),
        "mb_per_10000": round(slope, 3),
        "drift": round(statistics.median(relative[-third:]) / statistics.median(relative[:third]), 3),
        "failures": len(failures),
        "refused": refused,
        "wrong_answers": wrong,
        "tenths": tenths,
    }


def _swaps(engine: Engine) -> int:
    counts = engine.memory()
    return int(counts["loads"] + counts["failed"])


# -- idle -------------------------------------------------------------------------------------------------------------


def idle(folder: Path, seconds: float) -> dict[str, Any]:
    """CPU of the daemon with 50 models hot, an app connected, and nothing to do."""
    kind = many_models.kinds()["400KB"]
    with device.Device(folder) as made:
        maker = twins.Twins(made, kind, folder)
        twins.commit(
            made,
            {f"m{number}": maker.make(f"m{number}", twins.changed(kind.model, number + 1)) for number in range(HOT)},
        )
    with Daemon(folder, "[memory]\nbudget_mb = 1000\n") as daemon, daemon.client() as client:
        daemon.settle()
        for number in range(HOT):
            client.infer(f"m{number}", {"x": kind.sample})
        time.sleep(3.0)  # memory is given back, forms have changed
        hot = daemon.ask("GET", "/v1/status")["memory"]["hot"]
        before, wakeups = daemon.cpu_s(), daemon.wakeups()
        time.sleep(seconds)
        spent = daemon.cpu_s() - before
        return {
            "hot": hot,
            "seconds": seconds,
            "idle_percent": round(100 * spent / seconds, 4),
            "wakeups_s": round((daemon.wakeups() - wakeups) / seconds, 2),
            "rss_mb": daemon.memory()["rss_mb"],
        }


def judge(report: dict[str, Any]) -> None:
    """What was kept of the budgets."""
    kept = {}
    if found := report.get("soak"):
        kept["memory"] = found["mb_per_10000"] <= BUDGETS["mb_per_10000"]
        kept["latency"] = found["drift"] <= BUDGETS["drift"]
        kept["answers"] = not found["failures"] and not found["wrong_answers"]
    if found := report.get("idle"):
        kept["idle"] = found["hot"] >= HOT and found["idle_percent"] <= BUDGETS["idle_percent"]
    report["kept"] = kept
    report["within_budget"] = all(kept.values())


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    if found := report.get("soak"):
        lines.append("  swaps     rss MB   files MB   fds   p50 ms   p99 ms   plain load ms   seconds")
        lines += [
            f"{one['swaps']:7d} {one['rss_mb']:10.1f} {one['files_mb']:10.1f} {one['descriptors']:5d}"
            f" {one['p50_ms']:8.2f} {one['p99_ms']:8.2f} {one['plain_ms']:15.2f} {one['seconds']:9.1f}"
            for one in found["tenths"]
        ]
        lines.append(
            f"{found['swaps']} swaps, {found['failed_loads']} of them failed, in {found['seconds']:g} s:"
            f" {found['mb_per_10000']} MB per 10,000 (1), drift {found['drift']} (1.25);"
            f" wrong answers {found['wrong_answers']}, failures {found['failures']}"
        )
    if found := report.get("idle"):
        lines.append(
            f"{found['hot']} models hot, idle: {found['idle_percent']} % of a core (0.5),"
            f" {found['wakeups_s']} wake-ups a second, {found['rss_mb']} MB"
        )
    lines.append(f"load {report['load_average']:.1f}; kept: {report['kept']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="100,000 swaps with failing loads; an idle core with 50 hot models")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="3,000 swaps, 10 s idle")
    parser.add_argument("--swaps", type=int, help="how many (default 100,000)")
    parser.add_argument("--only", choices=("soak", "idle"))
    options = parser.parse_args()
    logging.getLogger("edge_agent").setLevel(logging.CRITICAL)  # thousands of loads fail on purpose
    report: dict[str, Any] = {"benchmark": "soak", "load_average": os.getloadavg()[0]}
    if options.only in (None, "soak"):
        with tempfile.TemporaryDirectory(prefix="ea-soak-") as folder, device.Device(Path(folder)) as made:
            swaps = options.swaps or (3000 if options.quick else 100_000)
            report["soak"] = asyncio.run(soak(made, Path(folder), swaps))
    if options.only in (None, "idle"):
        with tempfile.TemporaryDirectory(prefix="ea-soak-") as folder:
            report["idle"] = idle(Path(folder), 10.0 if options.quick else 60.0)
    judge(report)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


if __name__ == "__main__":
    main()
