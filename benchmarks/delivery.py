"""A large payload over a bad line: what a cut costs, and what it takes of memory.

Real processes on this machine: core with its store and sockets, link, a mirror that speaks HTTPS with ranges, and a
proxy between link and mirror. Core wants one payload; the proxy resets the connection after random counts of bytes,
again and again; a second time link and core are killed instead (SIGKILL, at random moments, in turns). Fetched again is
what went to link's side of the connection (as the kernel counts it, TLS and heads included) beyond where the next
connection went on. Memory is the peak of each process while it fetches, above what it had before.

    python benchmarks/delivery.py [--json] [--quick] [--mb N] [--cuts N] [--kills N] [--seed N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.conftest import ROOT
from tests.link.broker import until
from tests.link.device import LinkProcess
from tests.link.mirror_server import Mirror
from tests.link.proxy import Proxy

MIB = 1 << 20
CHUNK_KIB = 1024.0
BUDGETS = {
    "cut_again_max_kib": CHUNK_KIB,
    "kill_again_max_kib": CHUNK_KIB,
    "link_extra_mb": 32.0,
    "core_extra_mb": 32.0,
}
PATH = "targets/payload"
_PATIENCE_S = 1800.0
_WAY_BYTES = 64 << 10
#: Core as ``edge-agent core`` runs it; when it is told so it wants a payload, as a job does, and says when it is there.
_CORE = """
import asyncio, json, sys, threading
from pathlib import Path
from agent.base import config
from agent.base.paths import resolve_paths
from agent.base.systemd import take_environment
from agent.core.daemon import Core
from agent.trust.wants import Want, ids
folder, path, digest, length = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
below = {name: str(folder / name) for name in ("config.toml", "state", "run")}
paths = resolve_paths({}, config=below["config.toml"], state_dir=below["state"], run_dir=below["run"])
async def main():
    core = Core(paths, config.load(paths.config, explicit=True), take_environment())
    def fetch():
        sys.stdin.readline()
        want = Want(ids()(), path, length, 36000.0, length, digest)
        try:
            core._desk.fetch_file(want, folder / "payload")
            print("done", flush=True)
        except Exception as error:
            print("failed", repr(error), flush=True)
    threading.Thread(target=fetch, daemon=True).start()
    await core.run()
asyncio.run(main())
"""


class CoreProcess:
    """``start`` it, ``want`` the payload, ``done`` tells whether it is there; ``kill`` it."""

    def __init__(self, folder: Path, digest: str, length: int) -> None:
        self._folder = folder
        self._arguments = [sys.executable, "-c", _CORE, str(folder), PATH, digest, str(length)]
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        with (self._folder / "core.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)

    def want(self) -> None:
        self.process.stdin.write("want\n")
        self.process.stdin.flush()

    def done(self) -> bool:
        line = self.process.stdout.readline()
        if line and line != "done\n":
            raise RuntimeError(f"core: {line}")
        return bool(line)

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(60)
        self.process.stdin.close()
        self.process.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="50 MB, 20 cuts, 6 kills")
    parser.add_argument("--mb", type=int, help="size of the payload (500)")
    parser.add_argument("--cuts", type=int, help="how often the connection is reset (200)")
    parser.add_argument("--kills", type=int, help="how often link or core is killed (20)")
    parser.add_argument("--seed", type=int, default=1, help="of where cuts and kills come")
    options = parser.parse_args()
    size = (options.mb or (50 if options.quick else 500)) * 1_000_000
    cuts = options.cuts or (20 if options.quick else 200)
    kills = options.kills or (6 if options.quick else 20)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="ea-delivery-", dir="/tmp") as name:
        report = measure(Path(name), size, cuts, kills, draw)
    report["load_average"] = round(os.getloadavg()[0], 1)
    report["budgets"] = BUDGETS
    report["within_budget"] = report["right"] and all(
        report["figures"][name] <= limit for name, limit in BUDGETS.items()
    )
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0 if report["within_budget"] else 1


def measure(folder: Path, size: int, cuts: int, kills: int, draw: random.Random) -> dict:
    """Both ways of going wrong, on the same payload."""
    digest = make_payload(folder / "source", size, draw)
    with (folder / "source").open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cut = Line(folder / "cut", data, digest).run_cuts(cuts, draw)
        kill = Line(folder / "kill", data, digest).run_kills(kills, draw)
    return {
        "mb": size / 1e6,
        "right": cut["right"] and kill["right"],
        "figures": {
            "cut_again_max_kib": cut["again_max_kib"],
            "kill_again_max_kib": kill["again_max_kib"],
            "link_extra_mb": cut["link_extra_mb"],
            "core_extra_mb": cut["core_extra_mb"],
        },
        "cuts": cut,
        "kills": kill,
    }


def make_payload(path: Path, size: int, draw: random.Random) -> str:
    """A file with random bytes here and there, and holes between them; its digest."""
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size - 4096, MIB):
            file.seek(at + draw.randrange(min(MIB, size - at) - 4096))
            file.write(draw.randbytes(4096))
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(MIB):
            digest.update(piece)
    return digest.hexdigest()


class Line:
    """Core, link, proxy and mirror in a row, in a folder of their own."""

    def __init__(self, folder: Path, data: mmap.mmap, digest: str) -> None:
        folder.mkdir()
        self._folder = folder
        self._digest = digest
        self._size = len(data)
        self._mirror = Mirror({PATH: data}, folder / "mirror")  # type: ignore[dict-item]  # sliced as bytes are
        self._core = CoreProcess(folder, digest, self._size)
        (folder / "run").mkdir()
        self._link = LinkProcess(folder / "run" / "admin.sock", folder / "link")

    def run_cuts(self, cuts: int, draw: random.Random) -> dict:
        """Reset the connection so often; all of them before the end."""
        with self._mirror, Proxy(self._mirror.port, send_bytes=_WAY_BYTES) as proxy:
            most = int(1.8 * self._size / cuts)
            proxy.cut_after(*(draw.randrange(1, most) for _ in range(cuts)))
            self._start(proxy, rate_kib_s=0)
            core, link = self._core.process.pid, self._link.process.pid
            before = resident_mb(core), resident_mb(link)
            for pid in (core, link):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): VmHWM begins anew
            began = time.monotonic()
            self._core.want()
            until(self._core.done, "the payload is there", _PATIENCE_S)
            took_s = time.monotonic() - began
            peak = peak_mb(core), peak_mb(link)
            self._end()
            return {
                **self._costs(proxy),
                "cuts": cuts,
                "seconds": round(took_s, 1),
                "mb_per_s": round(self._size / 1e6 / took_s, 1),
                "core_extra_mb": round(peak[0] - before[0], 1),
                "link_extra_mb": round(peak[1] - before[1], 1),
            }

    def run_kills(self, kills: int, draw: random.Random) -> dict:
        """Kill link and core in turns, at moments that are spread over the whole of it."""
        with self._mirror, Proxy(self._mirror.port, send_bytes=_WAY_BYTES) as proxy:
            self._start(proxy, rate_kib_s=0)
            self._core.want()
            payload = self._folder / "payload"
            moments = sorted(draw.randrange(1, int(0.95 * self._size)) for _ in range(kills))
            landed = 0
            for number, moment in enumerate(moments):
                until(lambda moment=moment: payload.exists() and payload.stat().st_size >= moment, "bytes", _PATIENCE_S)
                if self._core.done():
                    break
                landed += 1
                if number % 2:
                    self._core.end()
                    self._core.start()
                    self._core.want()
                else:
                    self._link.stop(signal.SIGKILL)
                    self._link.start()
            until(self._core.done, "the payload is there", _PATIENCE_S)
            self._end()
            return {**self._costs(proxy), "kills": landed}

    def _start(self, proxy: Proxy, rate_kib_s: int) -> None:
        (self._folder / "config.toml").write_text(
            f'[delivery]\nmirrors = ["https://localhost:{proxy.port}"]\nca_file = "{self._mirror.ca}"\n'
            f"blocks = false\nrate_kib_s = {rate_kib_s}\n"
        )
        self._core.start()
        until((self._folder / "run" / "admin.sock").exists, "core listens")
        self._link.start()
        time.sleep(3.0)  # both come to rest, so that what a start takes is not counted

    def _end(self) -> None:
        self._link.stop()
        self._core.end(signal.SIGTERM)

    def _costs(self, proxy: Proxy) -> dict:
        """What came, connection by connection, beyond where the next one went on."""
        proxy.reset()
        firsts = [int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in self._mirror.ranges]
        again = [
            first + proxy.sent.get(port, 0) - after
            for first, port, after in zip(firsts, self._mirror.ports, firsts[1:], strict=False)
        ]
        with (self._folder / "payload").open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(MIB):
                digest.update(piece)
        return {
            "right": digest.hexdigest() == self._digest,
            "connections": proxy.connections,
            "again_max_kib": round(max(again, default=0) / 1024, 1),
            "again_mean_kib": round(statistics.fmean(again or [0]) / 1024, 1),
            "again_each_kib": [round(count / 1024) for count in again],
        }


def resident_mb(pid: int) -> float:
    return _status_mb(pid, "VmRSS")


def peak_mb(pid: int) -> float:
    return _status_mb(pid, "VmHWM")


def _status_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field}")


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'':24}{'measured':>10}{'budget':>10}"]
    lines += [f"{name:24}{report['figures'][name]:>10}{limit:>10}" for name, limit in report["budgets"].items()]
    for name in ("cuts", "kills"):
        shown = {key: value for key, value in report[name].items() if key != "again_each_kib"}
        lines.append(f"{name}: {shown}")
    verdict = "within budget" if report["within_budget"] else "OVER BUDGET"
    return "\n".join([*lines, f"{report['mb']:g} MB, load {report['load_average']}: {verdict}"])


if __name__ == "__main__":
    sys.exit(main())
