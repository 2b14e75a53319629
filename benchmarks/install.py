"""What an installation costs the apps of a device that serves at half load: failures, and the slowest answers.

One real daemon, one app in a process of its own that asks at a fixed rate, every twice as long as an answer takes. In
turns nothing else happens, and a new version of the very model is added: encrypted, tried beside the active one,
prepared, loaded and switched to. Times count from when a request was due, so that one that is held up holds up the next
ones, too. Both kinds of turns are as long as each other and interleaved. Held against each other are the 99th
percentiles of a turn and of the one after it; what counts is the median of these ratios, which other work on the
machine moves least.

    python benchmarks/install.py [--json] [--quick] [--turns N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from daemon import ROOT, Daemon

from tests import onnx_models

BUDGETS = {"failed": 0, "p99_ratio": 1.2}
QUANTILES = (50, 95, 99)
SIDE, LAYERS, ROWS = 512, 16, 8
#: An app: asks every so many seconds, and says at each line of its input what it has seen since the one before.
_APP = """
import json, sys, threading, time
import numpy as np
from agent.base.errors import AgentError
from agent.client import Client
path, period, rows, side = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
seen, failed, versions, lock = [], [], set(), threading.Lock()
def tell():
    for line in sys.stdin:
        with lock:
            print(json.dumps({"ms": seen, "failed": failed, "versions": sorted(versions)}), flush=True)
            seen.clear(); failed.clear(); versions.clear()
threading.Thread(target=tell, daemon=True).start()
x = np.ones((rows, side), np.float32)
with Client(path) as client:
    due = time.perf_counter()
    while True:
        due = max(due + period, time.perf_counter() - 1.0)
        time.sleep(max(0.0, due - time.perf_counter()))
        try:
            version, error = client.infer("m", {"x": x}).model_version, None
        except AgentError as problem:
            error = str(problem)
        took = (time.perf_counter() - due) * 1e3
        with lock:
            if error is None:
                seen.append(took); versions.add(version)
            else:
                failed.append(error)
"""


class App:
    """See ``_APP``."""

    def __init__(self, socket: Path, period_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _APP, str(socket), str(period_s), str(ROWS), str(SIDE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def told(self) -> dict:
        """What it has seen since it was asked last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def add(daemon: Daemon, number: int) -> None:
    """The next version."""
    path = daemon.folder / "m.onnx"
    path.write_bytes(onnx_models.heavy(SIDE, LAYERS, number))
    daemon.add(path, "m")


def measure(turns: int) -> dict:
    """All turns, on a device of its own."""
    control: list[list[float]] = []
    during: list[list[float]] = []
    failed: list[str] = []
    seconds: list[float] = []
    versions: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="ea-") as folder, Daemon(Path(folder), "") as daemon:
        add(daemon, 0)
        x = np.ones((ROWS, SIDE), np.float32)
        with daemon.client() as client:
            alone = [_timed(client, x) for _ in range(200)][50:]
        period_s = 2 * statistics.median(alone)
        app = App(daemon.run / "infer.sock", period_s)
        try:
            time.sleep(2.0)
            for turn in range(1, turns + 1):
                app.told()
                began = time.perf_counter()
                add(daemon, turn)
                seconds.append(time.perf_counter() - began)
                found = app.told()
                during.append(found["ms"])
                failed += found["failed"]
                time.sleep(1.0)
                app.told()
                time.sleep(seconds[-1])
                found = app.told()
                control.append(found["ms"])
                failed += found["failed"]
                versions |= set(found["versions"])
        finally:
            app.close()
    report = {
        "turns": turns,
        "install_s": round(statistics.median(seconds), 2),
        "period_ms": round(period_s * 1e3, 3),
        "requests": [sum(map(len, control)), sum(map(len, during))],
        "versions": len(versions),
        "failed": len(failed),
        "failures": failed[:3],
        "control_ms": {f"p{q}": round(float(np.percentile(np.concatenate(control), q)), 3) for q in QUANTILES},
        "install_ms": {f"p{q}": round(float(np.percentile(np.concatenate(during), q)), 3) for q in QUANTILES},
    }
    for q in QUANTILES:
        ratios = [np.percentile(b, q) / np.percentile(a, q) for a, b in zip(control, during, strict=True)]
        report[f"p{q}_ratio"] = round(float(np.median(ratios)), 3)
        report[f"p{q}_ratios"] = [round(float(ratio), 2) for ratio in ratios]
    report["within_budget"] = report["failed"] == 0 and report["p99_ratio"] <= BUDGETS["p99_ratio"]
    return report


def _timed(client, x: np.ndarray) -> float:
    began = time.perf_counter()
    client.infer("m", {"x": x})
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one turn")
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    report = measure(1 if arguments.quick else arguments.turns)
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{report['turns']} installations of {report['install_s']:g} s, a request every {report['period_ms']:g} ms")
    for name in ("control", "install"):
        figures = ", ".join(f"{key} {value:g} ms" for key, value in report[f"{name}_ms"].items())
        print(f"{name:<8} {figures}")
    print(f"p50 {report['p50_ratio']:g} x, p95 {report['p95_ratio']:g} x, turns {report['p99_ratios']}")
    print(f"p99 {report['p99_ratio']:g} x (budget {BUDGETS['p99_ratio']:g}), {report['failed']} failed (budget 0)")


if __name__ == "__main__":
    main()
