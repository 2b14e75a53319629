"""What kept answers save and what looking for them costs: issue rows on the result cache.

hit       p50 of a request that is kept beside the p50 of the same one computed, over the socket, in turns.
update    after an activation: the share of hits and the p50 of the first requests of a Zipf-distributed load, with and
          without re-warming, in one daemon by two models of one file.
unique    requests that never come again, to a model that keeps answers beside the same model that does not, in turns:
          at most 3 % more. The first thousand, in which the cache learns that it does not pay, are shown apart.

A real daemon, ONNX Runtime, MobileNetV2 (fp32) and a product of 16 floats as the smallest model there is.

    python benchmarks/cache.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
from daemon import SHORT_TRIALS, Daemon, linear, sample

from agent.client import Client

BUDGETS = {"hit_ratio": 1.0, "unique_ratio": 1.03, "rewarmed_over_cold_hit_rate": 1.0}
CACHE = "cache = {ttl_s = 3600, max_mb = 64, prewarm = %s}"
SHAPE = (1, 3, 224, 224)


def config() -> str:
    """Each model twice: with and without a cache; the updated ones with and without re-warming."""
    tables = {"big-kept": "false", "small-kept": "false", "big-warmed": "true", "big-emptied": "false"}
    return SHORT_TRIALS + "".join(f"[models.{name}]\n{CACHE % prewarm}\n" for name, prewarm in tables.items())


def ask(client: Client, model: str, x: np.ndarray, **parameters: Any) -> tuple[float, str]:
    """Microseconds of one request, and what the cache said."""
    name = "x" if model.startswith("small") else models.INPUT
    began = time.perf_counter_ns()
    result = client.infer(model, {name: x}, parameters=parameters)
    return (time.perf_counter_ns() - began) / 1000, result.parameters["cache"]


def measure_hits(client: Client, rounds: int) -> dict[str, float]:
    """Kept and computed, in turns."""
    found = {}
    for size, x in (("big", np.ones(SHAPE, np.float32)), ("small", sample())):
        model, samples = f"{size}-kept", {"hit": [], "miss": []}
        ask(client, model, x)
        for _ in range(rounds):
            took, said = ask(client, model, x)
            if said == "hit":
                samples["hit"].append(took)
            samples["miss"].append(ask(client, model, x, cache=False)[0])
        hit, miss = (statistics.median(samples[name]) for name in ("hit", "miss"))
        found |= {f"{size}_hit_p50_us": hit, f"{size}_miss_p50_us": miss, f"{size}_hit_over_miss": hit / miss}
        found[f"{size}_hits"] = len(samples["hit"]) / rounds
    found["hit_ratio"] = found["big_hit_over_miss"]
    return found


def measure_unique(client: Client, rounds: int, first: int) -> dict[str, float]:
    """Never the same twice, with and without a cache, by turns."""
    found: dict[str, float] = {}
    worst = 0.0
    for size, base in (("big", np.ones(SHAPE, np.float32)), ("small", sample())):
        x, number = base.copy(), 0
        kept: list[float] = []
        plain: list[float] = []
        first_kept: list[float] = []
        first_plain: list[float] = []
        count = rounds * (1 if size == "big" else 12)
        while len(kept) < count:
            # One of each, and each first as often: whatever else the machine does hits both.
            begun = number >= 2 * first
            pair = [
                (f"{size}-kept", kept if begun else first_kept),
                (f"{size}-plain", plain if begun else first_plain),
            ]
            for model, samples in pair if number % 4 else reversed(pair):
                number += 1
                x.flat[0] = number
                samples.append(ask(client, model, x)[0])
        # Means of the middle: a probe's lookups are few and would vanish in a median, a stall of the machine would not.
        ratio = trimmed(kept) / trimmed(plain)
        found |= {
            f"{size}_unique_mean_us": trimmed(kept), f"{size}_plain_mean_us": trimmed(plain),
            f"{size}_unique_over_plain": ratio, f"{size}_first_over_plain": trimmed(first_kept) / trimmed(first_plain),
        }  # fmt: skip
        worst = max(worst, ratio)
    return found | {"unique_ratio": worst}


def trimmed(values: list[float]) -> float:
    """The mean without the slowest 5 %."""
    kept = sorted(values)[: max(1, int(len(values) * 0.95))]
    return statistics.fmean(kept)


def measure_update(daemon: Daemon, client: Client, folder: Path, requests: int) -> dict[str, float]:
    """The same load before and after an update, by Zipf's law over 40 inputs."""
    rng = np.random.default_rng(0)
    pictures = models.images(40, seed=3)
    weights = 1 / np.arange(1, 41)
    load = rng.choice(40, requests, p=weights / weights.sum())
    for model in ("big-warmed", "big-emptied"):
        for index in load:
            ask(client, model, pictures[index : index + 1])
    found: dict[str, float] = {}
    again = models.build().variants["fp16"]  # another file is another version
    for model in ("big-warmed", "big-emptied"):
        daemon.add(again, model)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        rows = {row["model"]: row for row in daemon.ask("GET", "/v1/cache")["caches"]}
        kept = [one for one in rows["big-warmed"]["hottest"] if one["inputs_kept"]]
        if rows["big-warmed"]["rewarmed"] >= len(kept) and daemon.ask("GET", "/v1/status")["under_way"] is None:
            break
        time.sleep(0.2)
    time.sleep(2)
    samples: dict[str, list[tuple[float, str]]] = {"big-warmed": [], "big-emptied": []}
    for index in load[: requests // 4]:
        for model, seen in samples.items():
            seen.append(ask(client, model, pictures[index : index + 1]))
    rows = {row["model"]: row for row in daemon.ask("GET", "/v1/cache")["caches"]}
    found["rewarmed"] = rows["big-warmed"]["rewarmed"]
    for model, name in (("big-warmed", "with"), ("big-emptied", "without")):
        took = [one for one, _ in samples[model]]
        found[f"{name}_rewarming_hit_rate"] = sum(said == "hit" for _, said in samples[model]) / len(took)
        found[f"{name}_rewarming_first_10_mean_us"] = statistics.fmean(took[:10])
        found[f"{name}_rewarming_mean_us"] = statistics.fmean(took)
    found["rewarmed_over_cold_hit_rate"] = found["with_rewarming_hit_rate"] / max(
        1e-9, found["without_rewarming_hit_rate"]
    )
    return found


def report(options: argparse.Namespace) -> dict[str, Any]:
    """All rows, each with its budget."""
    quick = options.quick
    made: dict[str, Any] = {"benchmark": "cache", "python": sys.version.split()[0], "quick": quick}
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as name:
        folder = Path(name)
        small, big = folder / "small.onnx", models.build().variants["fp32"]
        small.write_bytes(linear(1))
        with Daemon(folder, config()) as daemon, daemon.client() as client:
            for model in ("big-kept", "big-plain", "big-warmed", "big-emptied"):
                daemon.add(big, model)
            for model in ("small-kept", "small-plain"):
                daemon.add(small, model)
            daemon.settle()
            for model, x in (("big", np.zeros(SHAPE, np.float32)), ("small", sample() * 0)):
                for kind in ("kept", "plain"):
                    for _ in range(3):
                        ask(client, f"{model}-{kind}", x, cache=False)
            made["hit"] = measure_hits(client, 60 if quick else 300)
            made["update"] = measure_update(daemon, client, folder, 200 if quick else 600)
            made["unique"] = measure_unique(client, 200 if quick else 1200, 200 if quick else 1000)
    figures = {key: value for part in ("hit", "update", "unique") for key, value in made[part].items()}
    for part in ("hit", "update", "unique"):
        made[part] = {key: round(value, 4) for key, value in made[part].items()}
    made["budgets"] = {
        key: {"limit": limit, "found": figures[key], "within": _within(key, figures[key])}
        for key, limit in BUDGETS.items()
    }
    made["within_budget"] = all(entry["within"] for entry in made["budgets"].values())
    return made


def _within(name: str, value: float) -> bool:
    return value > BUDGETS[name] if name.startswith("rewarmed") else value <= BUDGETS[name]


def table(made: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"Python {made['python']}"]
    for part in ("hit", "update", "unique"):
        lines += [f"  {part:7} {key:32} {value:12.3f}" for key, value in made[part].items()]
    lines += [
        f"{'within' if entry['within'] else 'OVER  '} budget  {key:28} {entry['found']:8.3f}  limit {entry['limit']}"
        for key, entry in made["budgets"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="what kept answers save, and what looking for them costs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    options = parser.parse_args()
    made = report(options)
    print(json.dumps(made, indent=2) if options.json else table(made))
    sys.exit(0 if made["within_budget"] else 1)


if __name__ == "__main__":
    main()
