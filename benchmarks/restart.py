"""A restart of core under 8 clients, half on kept connections, half on a new one for each request: how long nobody is
answered, and that nobody fails.

The sockets are held as the service manager holds them: bound here, passed to each core, so that whoever connects in
between waits in their queues. ``restart`` is SIGTERM and a new start, as of ``systemctl restart``; ``crash`` is SIGKILL
and a start after the pause that the unit sets. The gap is the longest time between two answers, over all clients.

    python benchmarks/restart.py [--json] [--quick] [--restarts N]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from daemon import ROOT, Daemon, bundle, command, sample, weights
from models import INPUT, build, images

from agent.base.errors import AgentError
from agent.client import Client

BUDGETS = {"gap_s": 1.5, "failed": 0}
CLIENTS = 8
#: As a descriptor that no shell would take for one of its own.
_HIGH = 40


class Activated(Daemon):
    """Core with passed sockets. ``begin`` starts it and does not wait."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.run.mkdir(mode=0o755)
        self.sockets = [self._listen(name) for name in ("infer", "admin")]
        self.times: dict[str, float] = {}

    def _listen(self, name: str) -> int:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.run / f"{name}.sock"))
            listener.listen(1024)
            return fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, _HIGH)

    def begin(self) -> socket.socket:
        """Start it; what it notifies of comes on the socket."""
        self._notify.unlink(missing_ok=True)
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notified.bind(str(self._notify))
        notified.settimeout(30)
        redirections = " ".join(f"{3 + number}<&{fd}" for number, fd in enumerate(self.sockets))
        script = f'LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=infer:admin exec "$@" {redirections}'
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script, "bash", *command(), "core"], env=self._environment(), stderr=log,
                cwd=self.folder, pass_fds=self.sockets,
            )  # fmt: skip
        return notified

    def await_ready(self, notified: socket.socket) -> None:
        with notified:
            while b"READY=1" not in notified.recv(4096):
                pass

    def start(self) -> float:
        began = time.perf_counter()
        self.await_ready(self.begin())
        return time.perf_counter() - began


class Asker(threading.Thread):
    """Asks without a pause; ``kept``: on one connection for as long as that goes. Every answer is checked."""

    def __init__(self, path: str, model: str, inputs: dict, wanted: np.ndarray | None, *, kept: bool) -> None:
        super().__init__(daemon=True)
        self._path, self._model, self._inputs, self._wanted, self._kept = path, model, inputs, wanted, kept
        self.answered: list[float] = []
        self.longest = 0.0
        self.failures: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        client = Client(self._path, timeout=30)
        while not self.ended.is_set():
            began = time.perf_counter()
            try:
                result = client.infer(self._model, self._inputs)
            except AgentError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            else:
                answer = next(iter(result.values()))
                if self._wanted is not None and not np.allclose(answer, self._wanted, rtol=1e-4, atol=1e-5):
                    self.failures.append("wrong answer")
                self.answered.append(time.perf_counter())
                self.longest = max(self.longest, self.answered[-1] - began)
            if not self._kept:
                client.close()
        client.close()


def wait_as_link_does(daemon: Activated, ended: threading.Event) -> None:
    """A question to core that is answered when there is something to say: a stop must not wait for it."""
    while not ended.is_set():
        with contextlib.suppress(AgentError), daemon.admin() as admin:
            admin.call("GET", "/v1/link/outgoing?wait_s=60")


@contextlib.contextmanager
def asking(daemon: Activated, models: list[tuple[str, dict, np.ndarray | None]]) -> Iterator[list[Asker]]:
    """The eight, for as long as the block lasts."""
    path = str(daemon.run / "infer.sock")
    askers = [Asker(path, *models[number % len(models)], kept=number % 2 == 0) for number in range(CLIENTS)]
    for asker in askers:
        asker.start()
    yield askers
    for asker in askers:
        asker.ended.set()
    for asker in askers:
        asker.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description="a restart of core under 8 clients")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer restarts")
    parser.add_argument("--restarts", type=int, help="of each kind (default 20, with --quick 4)")
    options = parser.parse_args()
    count = options.restarts or (4 if options.quick else 20)
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder:
        report = measure(Path(folder), count)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


def measure(folder: Path, count: int) -> dict:
    """The whole report."""
    daemon = Activated(folder)
    daemon.start()
    x = sample()
    models: list[tuple[str, dict, np.ndarray | None]] = []
    for number in range(3):
        daemon.add(bundle(folder / f"{number}.edgemodel", f"tiny-{number}", "1.0.0", number, 1))
        models.append((f"tiny-{number}", {"x": x}, x @ weights(number)))
    daemon.add(build().variants["fp32"], "mobilenet")
    models.append(("mobilenet", {INPUT: images(1, 3)}, None))
    daemon.settle()
    ended = threading.Event()
    threading.Thread(target=wait_as_link_does, args=(daemon, ended), daemon=True).start()
    pause = restart_pause()
    kinds = {
        "restart": [one(daemon, models, signal.SIGTERM, 0.0) for _ in range(count)],
        "crash": [one(daemon, models, signal.SIGKILL, pause) for _ in range(count)],
    }
    ended.set()
    daemon.stop(signal.SIGKILL)
    figures = {name: summary(rows) for name, rows in kinds.items()}
    return {
        "benchmark": "restart",
        "restarts": count,
        "clients": CLIENTS,
        "pause_s": pause,
        "load_average": round(os.getloadavg()[0], 1),
        "budgets": BUDGETS,
        "figures": figures,
        "within_budget": figures["restart"]["gap_s"]["most"] <= BUDGETS["gap_s"]
        and not any(row["failures"] for row in figures.values()),
    }


def one(daemon: Activated, models: list, number: int, pause: float) -> dict:
    """One restart under load, in phases."""
    logged = daemon.log.stat().st_size
    with asking(daemon, models) as askers:
        wait_for_each(askers)
        assert daemon.process is not None
        marks = {"told to stop": time.perf_counter()}
        daemon.process.send_signal(number)
        daemon.process.wait(60)
        marks["gone"] = time.perf_counter()
        time.sleep(pause)
        marks["started"] = time.perf_counter()
        daemon.await_ready(daemon.begin())
        marks["ready"] = time.perf_counter()
        wait_for_each(askers)
    answers = sorted(at for asker in askers for at in asker.answered)
    begin, end = max(itertools.pairwise(answers), key=lambda pair: pair[1] - pair[0])
    said = re.findall(r"ready after ([0-9.]+) s", daemon.log.read_bytes()[logged:].decode())
    return {
        "gap_s": end - begin,
        "longest_s": max(asker.longest for asker in askers),
        "phases": {
            "last answer after the signal": begin - marks["told to stop"],
            "from the last answer to the exit": marks["gone"] - begin,
            "pause": marks["started"] - marks["gone"],
            "exec and imports": marks["ready"] - marks["started"] - float(said[-1]),
            "from there to ready": float(said[-1]),
            "from ready to the first answer": end - marks["ready"],
        },
        "all_again_s": max(min(at for at in asker.answered if at > begin) for asker in askers) - marks["ready"],
        "failures": [failure for asker in askers for failure in asker.failures],
        "answers": len(answers),
    }


def wait_for_each(askers: list[Asker], timeout_s: float = 60.0) -> None:
    """Until each has had ten answers more."""
    wanted = [len(asker.answered) + 10 for asker in askers]
    end = time.monotonic() + timeout_s
    while any(len(asker.answered) < most for asker, most in zip(askers, wanted, strict=True)):
        if time.monotonic() > end:
            raise RuntimeError(f"a client has no answers: {[asker.failures[-1:] for asker in askers]}")
        time.sleep(0.005)


def restart_pause() -> float:
    """``RestartSec=`` of core's unit."""
    found = re.search(r"^RestartSec=([0-9.]+)$", (ROOT / "systemd/edge-agent-core.service").read_text(), re.MULTILINE)
    assert found
    return float(found[1])


def summary(rows: list[dict]) -> dict:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": round(statistics.median(values), 4), "most": round(max(values), 4)}

    return {
        **{name: spread([row[name] for row in rows]) for name in ("gap_s", "longest_s", "all_again_s")},
        "phases": {name: spread([row["phases"][name] for row in rows]) for name in rows[0]["phases"]},
        "answers": sum(row["answers"] for row in rows),
        "failures": [failure for row in rows for failure in row["failures"]],
    }


def table(report: dict) -> str:
    lines = [
        f"{report['restarts']} of each under {report['clients']} clients, load {report['load_average']}",
        "",
        f"{'':<36}{'restart':>18}{'crash':>18}",
    ]
    figures = [report["figures"][name] for name in ("restart", "crash")]

    def row(name: str, cells: list[dict]) -> str:
        return f"{name:<36}" + "".join(f"{cell['median']:>9.3f}{cell['most']:>9.3f}" for cell in cells)

    lines.append(f"{'seconds':<36}" + f"{'median':>9}{'most':>9}" * 2)
    lines.append(row("nobody answered (budget 1.5)", [one["gap_s"] for one in figures]))
    lines.append(row("the longest that a request took", [one["longest_s"] for one in figures]))
    lines.append(row("ready to an answer for each", [one["all_again_s"] for one in figures]))
    lines += [row(f"  {name}", [one["phases"][name] for one in figures]) for name in figures[0]["phases"]]
    lines.append(f"{'failed requests':<36}" + "".join(f"{len(one['failures']):>18}" for one in figures))
    lines.append(f"{'answers':<36}" + "".join(f"{one['answers']:>18}" for one in figures))
    for failure in sorted({failure for one in figures for failure in one["failures"]})[:5]:
        lines.append(f"  {failure}")
    lines += ["", "within budget" if report["within_budget"] else "BUDGET MISSED"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
