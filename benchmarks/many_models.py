"""1,000 models on a device that can hold about 50: DESIGN's row on many models, beside a naive server in the same run.

The agent's daemon serves models of 20 KB to 14 MB from its encrypted store within a budget of bytes; 8 clients ask for
them over the socket, by Zipf's law with exponent 1. The naive server is what is usually written: a cache of 50
sessions by count (``functools.lru_cache``) over ``InferenceSession(path)`` of plain files, called by 8 threads in a
process of its own, without a socket in between. Both get the same requests; they take turns of a few seconds, so that
whatever else the machine does hits both. Every answer is compared with what the plain file answered at set-up.

The models are twins of a few that the agent has really added (``twins.py``). There are two parts. In the first one
clients ask without a pause, which keeps both servers saturated: there the servers are held against each other. In the
second one each client pauses for ``--think-ms`` on average, as apps do: there a class is held against its own cold
answer alone, since what eight clients wait for each other on two cores is no property of a load.

    python benchmarks/many_models.py [--json] [--quick] [--seconds N] [--models N] [--think-ms N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import twins
from daemon import Daemon
from device import Device

from agent.base.errors import AgentError
from agent.client import AdminClient

CLIENTS, HELD = 8, 50
BUDGETS = {"p99_over_cold": 5.0, "p99_over_naive": 0.2, "memory_over_budget": 1.1}
MIB = 1 << 20
#: Of each class out of ten models.
_SHARES = {"20KB": 2, "100KB": 2, "400KB": 2, "2MB": 2, "6MB": 1, "14MB": 1}
_TURN_S = 15.0
#: So much of an answer is kept for the comparison.
_KEPT = 16


def kinds() -> dict[str, twins.Kind]:
    """What the models are, by class."""
    made = [
        twins.dense("20KB", (64, 40, 40, 10)),
        twins.dense("100KB", (128, 96, 96, 64)),
        twins.convolutional("400KB", 0.35, 5, 128, 50, 96),
        twins.convolutional("2MB", 0.5, 6, 256, 200, 96),
        twins.convolutional("6MB", 1.0, 6, 640, 300, 96),
        twins.convolutional("14MB", 1.0, 7, 1280, 1000, 96),
    ]
    return {kind.name: kind for kind in made}


@dataclass(frozen=True, slots=True)
class Model:
    """One model: its class, its plain file, and how its answer begins."""

    name: str
    kind: str
    path: str
    expected: np.ndarray


@dataclass(slots=True)
class Heard:
    """What clients have seen: seconds by class, and what went wrong."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)
    wrong: int = 0

    def add(self, other: Heard) -> None:
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds
        self.failures += other.failures
        self.wrong += other.wrong


# -- set-up -----------------------------------------------------------------------------------------------------------


def set_up(folder: Path, count: int) -> tuple[list[Model], float, dict[str, Any]]:
    """The models on the device below ``folder`` and as plain files; the bytes of budget for 50 in MB; notes."""
    import onnxruntime  # noqa: PLC0415 - for the answers of the plain files

    files = folder / "files"
    files.mkdir()
    began = time.perf_counter()
    made: list[Model] = []
    entries: dict[str, Any] = {}
    notes: dict[str, Any] = {"forms": {}, "added_by_trial_s": {}}
    need: list[float] = []
    with Device(folder) as device:
        for kind in kinds().values():
            at = time.perf_counter()
            maker = twins.Twins(device, kind, files)
            notes["added_by_trial_s"][kind.name] = round(time.perf_counter() - at, 1)
            notes["forms"][kind.name] = maker.forms or ["plain"]
            for number in range(max(1, count * _SHARES[kind.name] // 10)):
                name = f"m{kind.name.lower()}-{number}"
                data = twins.changed(kind.model, number + 1)
                path = files / f"{name}.onnx"
                path.write_bytes(data)
                entries[name] = maker.make(name, data)
                session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
                answer = session.run(None, {"x": kind.sample})[0].ravel()[:_KEPT].copy()
                made.append(Model(name, kind.name, str(path), answer))
                del session
        twins.commit(device, entries)
        served = device.shelf()
        for model in made:
            form = served.find(model.name).options[0].ways()[0]
            need.append((form.session + form.size) / MIB)
    random.Random(5).shuffle(made)  # the popularity of a model has nothing to do with its size
    notes["set_up_s"] = round(time.perf_counter() - began, 1)
    notes["plain_mb"] = round(sum(os.path.getsize(model.path) for model in made) / MIB)
    notes["all_in_memory_mb"] = round(sum(need))
    return made, HELD * statistics.mean(need), notes


# -- asking -----------------------------------------------------------------------------------------------------------


def weights(count: int) -> list[float]:
    """Zipf's law: the n-th is asked for 1/n as often as the first."""
    return [1 / rank for rank in range(1, count + 1)]


def clients(ask: Any, models: list[Model], seconds: float, think_s: float, seed: int) -> Heard:
    """Eight threads that ask for that long. ``ask(model)`` is made for each thread by calling ``ask()``."""
    heard = [Heard() for _ in range(CLIENTS)]
    end = time.monotonic() + seconds
    law = weights(len(models))

    def work(number: int) -> None:
        mine, chosen = heard[number], random.Random(seed * CLIENTS + number)
        with ask() as once:
            while time.monotonic() < end:
                (model,) = chosen.choices(models, law)
                began = time.perf_counter()
                try:
                    answer = once(model)
                except (AgentError, RuntimeError, OSError) as error:
                    mine.failures.append(f"{model.name}: {error}"[:200])
                    continue
                mine.seconds[model.kind].append(time.perf_counter() - began)
                mine.wrong += not np.allclose(answer.ravel()[:_KEPT], model.expected, rtol=1e-2, atol=1e-2)
                if think_s:
                    time.sleep(chosen.expovariate(1 / think_s))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Heard()
    for one in heard:
        total.add(one)
    return total


def agent_asker(daemon: Daemon, samples: dict[str, np.ndarray]) -> Any:
    """Over the socket, one connection a thread."""

    @contextlib.contextmanager
    def ask() -> Iterator[Any]:
        with daemon.client() as client:
            yield lambda model: client.infer(model.name, {"x": samples[model.kind]})["y"]

    return ask


class Naive:
    """The naive server, in a process of its own: ``turn`` has it serve for so long."""

    def __init__(self, models: list[Model]) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, other = context.Pipe()
        self._process = context.Process(target=_serve_naively, args=(other, models))
        self._process.start()
        self._line.recv()

    def turn(self, seconds: float, think_s: float, seed: int) -> Heard:
        self._line.send((seconds, think_s, seed))
        found: Heard = self._line.recv()
        return found

    def memory_mb(self) -> float:
        return _resident_mb(self._process.pid or 0, "VmRSS")

    def close(self) -> None:
        self._line.send(None)
        self._process.join()


def _serve_naively(line: Any, models: list[Model]) -> None:
    import onnxruntime  # noqa: PLC0415 - in the process that runs it

    samples = {name: kind.sample for name, kind in kinds().items()}

    @functools.lru_cache(maxsize=HELD)
    def session(path: str) -> Any:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    @contextlib.contextmanager
    def ask() -> Iterator[Any]:
        yield lambda model: session(model.path).run(None, {"x": samples[model.kind]})[0]

    line.send("ready")
    while (asked := line.recv()) is not None:
        found = clients(ask, models, *asked)
        line.send(Heard(dict(found.seconds), found.failures, found.wrong))


def cold_alone(daemon: Daemon, models: list[Model], samples: dict[str, np.ndarray], each: int) -> dict[str, float]:
    """Median seconds of a cold model's answer with nobody else asking, by class; each model is unloaded before."""
    found = {}
    with daemon.client() as client, AdminClient(str(daemon.run / "infer.sock")) as repository:
        for kind, sample in samples.items():
            taken = []
            for model in [model for model in models if model.kind == kind][:each]:
                client.infer(model.name, {"x": sample})  # what a first start takes is no load
                repository.call("POST", f"/v2/repository/models/{model.name}/unload", {})
                time.sleep(0.02)
                began = time.perf_counter()
                client.infer(model.name, {"x": sample})
                taken.append(time.perf_counter() - began)
            found[kind] = statistics.median(taken)
    return found


# -- memory -----------------------------------------------------------------------------------------------------------


class Weighing:
    """Weighs the daemon while it serves: private memory beyond that before the first model, and memory files."""

    def __init__(self, daemon: Daemon, before_mb: float) -> None:
        self._daemon = daemon
        self._before_mb = before_mb
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.held_mb: list[float] = []
        self.weighed_mb: list[float] = []
        self.plaintext_mb: list[float] = []

    def __enter__(self) -> Weighing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            files = memory_files_mb(self._daemon.pid)
            self.plaintext_mb.append(files)
            self.weighed_mb.append(_resident_mb(self._daemon.pid, "RssAnon") - self._before_mb + files)
            self.held_mb.append(self._daemon.ask("GET", "/v1/status")["memory"]["held_mb"])


def memory_files_mb(pid: int) -> float:
    """Megabytes of the memory files that a process holds: each once, however many descriptors and mappings it has."""
    sizes = {}
    folder = f"/proc/{pid}/fd/"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(folder + name).startswith("/memfd:"):
                found = os.stat(folder + name)
                sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values()) / MIB


def _resident_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(name)


# -- the run ----------------------------------------------------------------------------------------------------------


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Set up, measure each class alone, then let both servers take turns, in either part."""
    models, budget_mb, notes = set_up(folder, options.models)
    samples = {name: kind.sample for name, kind in kinds().items()}
    config = f"[memory]\nbudget_mb = {int(budget_mb)}\n[store]\nquota_mb = 1000000\n"
    report: dict[str, Any] = {
        "benchmark": "many_models",
        "models": len(models),
        "seconds": options.seconds,
        "budget_mb": int(budget_mb),
        "notes": notes,
        "parts": {},
    }
    naive = Naive(models)
    try:
        with Daemon(folder, config) as daemon:
            daemon.settle()
            with daemon.client() as client:  # the runtime is imported with the first model
                client.infer("20kb-first", {"x": samples["20KB"]})
            before_mb = _resident_mb(daemon.pid, "RssAnon")
            alone = cold_alone(daemon, models, samples, options.each)
            ask = agent_asker(daemon, samples)
            turns = max(1, round(options.seconds / _TURN_S))
            for part, think_s in (("saturated", 0.0), ("paced", options.think_ms / 1000)):
                ours, theirs, naive_mb = Heard(), Heard(), 0.0
                with Weighing(daemon, before_mb) as weighing:
                    for turn in range(turns):
                        ours.add(clients(ask, models, options.seconds / turns, think_s, turn))
                        theirs.add(naive.turn(options.seconds / turns, think_s, turn))
                        naive_mb = max(naive_mb, naive.memory_mb())
                report["parts"][part] = _part(ours, theirs, alone, weighing, naive_mb) | {"think_ms": 1000 * think_s}
            report["status"] = daemon.ask("GET", "/v1/status")["memory"]
    finally:
        naive.close()
    return report


def _part(ours: Heard, theirs: Heard, alone: dict[str, float], weighing: Weighing, naive_mb: float) -> dict[str, Any]:
    whole = [sorted(second for seconds in heard.seconds.values() for second in seconds) for heard in (ours, theirs)]
    return {
        "classes": [_row(kind, ours.seconds[kind], theirs.seconds[kind], alone[kind]) for kind in alone],
        "requests": [len(one) for one in whole],
        "p99_ms": [_ms(one, 0.99) for one in whole],
        "p50_ms": [_ms(one, 0.5) for one in whole],
        "failures": len(ours.failures),
        "failures_naive": len(theirs.failures),
        "first_failures": ours.failures[:3],
        "wrong_answers": ours.wrong,
        "memory": {
            "held_mb": max(weighing.held_mb),
            "weighed_mb": round(max(weighing.weighed_mb), 1),
            "median_weighed_mb": round(statistics.median(weighing.weighed_mb), 1),
            "plaintext_mb": round(max(weighing.plaintext_mb), 1),
            "naive_mb": round(naive_mb, 1),
        },
    }


def _row(kind: str, ours: list[float], theirs: list[float], alone: float) -> dict[str, Any]:
    ours, theirs = sorted(ours), sorted(theirs)
    return {
        "class": kind,
        "requests": len(ours),
        "cold_alone_ms": round(1000 * alone, 2),
        "p50_ms": _ms(ours, 0.5),
        "p99_ms": _ms(ours, 0.99),
        "naive_p50_ms": _ms(theirs, 0.5),
        "naive_p99_ms": _ms(theirs, 0.99),
        "p99_over_cold": round(_ms(ours, 0.99) / (1000 * alone), 2),
        "p99_over_naive": round(_ms(ours, 0.99) / max(_ms(theirs, 0.99), 1e-6), 3),
    }


def _ms(ordered: list[float], share: float) -> float:
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else 0.0


def judge(report: dict[str, Any]) -> None:
    """What was kept of the budgets. The naive server's p99 is that over all of its requests."""
    for part in report["parts"].values():
        part["p99_over_naive"] = round(part["p99_ms"][0] / max(part["p99_ms"][1], 1e-6), 3)
        part["p99_over_cold"] = max(row["p99_over_cold"] for row in part["classes"])
        part["memory_over_budget"] = round(part["memory"]["weighed_mb"] / report["budget_mb"], 3)
    parts, saturated, paced = report["parts"].values(), report["parts"]["saturated"], report["parts"]["paced"]
    kept = {
        "failures": not any(part["failures"] or part["wrong_answers"] for part in parts),
        "p99_over_cold": paced["p99_over_cold"] <= BUDGETS["p99_over_cold"],
        "p99_over_naive": saturated["p99_over_naive"] <= BUDGETS["p99_over_naive"],
        "memory": all(part["memory_over_budget"] <= BUDGETS["memory_over_budget"] for part in parts),
    }
    report["kept"] = kept
    report["within_budget"] = all(kept.values())


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['models']} models ({report['notes']['plain_mb']} MB plain, {report['notes']['all_in_memory_mb']} MB"
        f" if all were in memory), budget {report['budget_mb']} MB, {CLIENTS} clients,"
        f" {report['seconds']:g} s each; set up in {report['notes']['set_up_s']:g} s",
    ]
    for name, part in report["parts"].items():
        pause = f"a pause of {part['think_ms']:g} ms" if part["think_ms"] else "no pause"
        lines += [
            f"-- {name}: {pause} between two requests of a client",
            "class    requests  cold alone ms   p50 ms   p99 ms  x cold   naive p50   naive p99   p99 / naive   forms",
        ]
        lines += [
            f"{row['class']:7} {row['requests']:9d} {row['cold_alone_ms']:14.2f} {row['p50_ms']:8.2f}"
            f" {row['p99_ms']:8.2f} {row['p99_over_cold']:7.2f} {row['naive_p50_ms']:11.2f} {row['naive_p99_ms']:11.2f}"
            f" {row['p99_over_naive']:13.3f}   {', '.join(report['notes']['forms'][row['class']])}"
            for row in part["classes"]
        ]
        memory = part["memory"]
        lines += [
            f"all     {part['requests'][0]:9d} requests, p99 {part['p99_ms'][0]} ms; naive {part['requests'][1]}"
            f" requests, p99 {part['p99_ms'][1]} ms; ratio {part['p99_over_naive']}"
            f"{' (0.2)' if name == 'saturated' else ''}; at most {part['p99_over_cold']} x cold"
            f"{' (5)' if name == 'paced' else ''}",
            f"failures {part['failures']} (naive {part['failures_naive']}), wrong answers {part['wrong_answers']}",
            f"memory: weighed {memory['weighed_mb']} MB at most, of it decrypted files {memory['plaintext_mb']};"
            f" {part['memory_over_budget']} x budget (1.1); held by its own count {memory['held_mb']};"
            f" the naive server's {memory['naive_mb']}",
        ]
    lines += [
        f"loads {report['status']['loads']}, demoted {report['status']['demoted']},"
        f" evicted {report['status']['evicted']}",
        f"load {report['load_average']:.1f}; kept: {report['kept']}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="1,000 models, room for 50, beside a naive server")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="100 models, 20 s each; room for 50 of them")
    parser.add_argument("--seconds", type=float, help="of each server in each part (default 300)")
    parser.add_argument("--models", type=int, help="how many (default 1000)")
    parser.add_argument("--think-ms", type=float, default=250.0, help="mean pause of a client in the paced part")
    parser.add_argument("--each", type=int, default=12, help="cold answers measured alone, a class")
    parser.add_argument("--folder", type=Path, help="where the models lie meanwhile (8 GB for 1,000)")
    options = parser.parse_args()
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder: no folder {options.folder}")
    options.models = options.models or (100 if options.quick else 1000)
    options.seconds = options.seconds or (20.0 if options.quick else 300.0)
    sys.setswitchinterval(0.0005)  # the clients are threads: one that has its answer must not wait for another's work
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ea-many-", dir=options.folder) as folder:
        report = run(Path(folder), options)
    report["load_average"] = load
    judge(report)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


if __name__ == "__main__":
    main()
