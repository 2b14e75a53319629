"""A whole fleet on one broker: the storm in which it connects, a job to all of it, and the same with the broker killed.

Real: mosquitto as deploy/mosquitto sets it up (limits, access list, persistence; TLS with ``--tls``), the link of every
device (``fleet_devices.py``: some hundred in each of a few processes), the operator's desk, books and signatures. The
device's core is a stand-in that verifies and signs. Four roll-outs follow each other: a job that takes no time, one
that takes each device up to ``--work`` seconds, and that twice more with the broker killed (SIGKILL) in the middle, and
gone for ``--outage`` seconds: once while the job is being sent, once while devices report that it has ended.

What must hold, or the status is 1: nowhere more connections in a second than planned (devices / splay, and what chance
adds to a fair draw); every device connected; each job succeeded on each device by the operator's books, and was run
once there; nothing refused by anybody, but what a killed broker says from its memory (old generations, old states).

All devices share the machine with broker and operator: times are of that machine. Where one of the processes stood
still, connections come in a heap that no fleet would make: so as many are allowed in a second as chance may bring in
one and the time that a process was late, and where that was long (``LATE_S``) a storm is told and not judged. Of the
first storm the moments that were drawn are judged in any case.

    python benchmarks/fleet.py [--json] [--devices 2000] [--splay S] [--outage S] [--work S] [--processes N] [--tls]
                               [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from daemon import ROOT

from agent.base.clock import SystemClock
from agent.base.errors import TryLaterError
from agent.fleet.authority import read_authority
from agent.fleet.books import Books
from agent.fleet.desk import Desk
from agent.fleet.documents import TERMINAL
from agent.fleet.enrolment import by_hand, enrol
from agent.fleet.folder import Folder, load_settings
from agent.fleet.founding import Door, Plan, found
from agent.fleet.jobs import Command, Office
from agent.fleet.keys import Passwords, open_signer
from agent.link.backoff import STABLE_S
from agent.trust.envelope import Signer

TENANT, KEY, OP = "acme", "ann", "store.gc"
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
#: Socket, the three files of the outbox, and one for the time of a connect.
FILES_A_DEVICE, FILES_ELSE = 6, 200
#: Part of the fleet that has accepted the job, or ended it, when the broker is killed.
KILL_AT = 0.4
#: Without any progress.
PATIENCE_S = 60.0
#: The peak that fair draws exceed once in a thousand storms.
RARE = 0.999
STORMS = 1000
#: A process of this machine that was later makes all that the broker saw of a storm the machine's.
LATE_S = 1.0
TLS_LINES = (
    "cafile", "certfile", "keyfile", "require_certificate", "use_identity_as_username", "tls_version",
)  # fmt: skip


def main() -> None:
    options = arguments()
    if MOSQUITTO is None:
        sys.exit("cannot run: mosquitto is not installed")
    allow_files(options.devices, options.processes)
    with (
        tempfile.TemporaryDirectory(prefix="ea-fleet-", dir="/tmp") as folder,
        device_folder() as devices,
        contextlib.ExitStack() as stack,
    ):
        report = Benchmark(options, Path(folder), devices, stack).run()
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if not report["wrong"] else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="connect storm, roll-out, and a broker killed in the middle of one")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="100 devices")
    parser.add_argument("--devices", type=int, help="simulated devices (default 2000)")
    parser.add_argument("--processes", type=int, default=4, help="that they are spread over (default 4)")
    parser.add_argument("--splay", type=float, help="seconds over which they connect (default devices/50, at least 10)")
    parser.add_argument("--outage", type=float, help="seconds without a broker (default half of the splay)")
    parser.add_argument(
        "--work", type=float, default=10.0, help="a job, but for the first, takes up to so many seconds"
    )
    parser.add_argument("--tls", action="store_true", help="TLS and certificates, as it is shipped")
    parser.add_argument("--verbose", action="store_true", help="say on stderr what is being done")
    options = parser.parse_args()
    options.devices = options.devices or (100 if options.quick else 2000)
    options.splay = options.splay or max(10.0, options.devices / 50)
    options.outage = options.outage if options.outage is not None else options.splay / 2
    return options


def allow_files(devices: int, processes: int) -> None:
    """As many open files as the fullest process needs; the others inherit the limit."""
    need = max(devices, FILES_A_DEVICE * -(-devices // processes)) + FILES_ELSE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= need or soft == resource.RLIM_INFINITY:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, max(need, hard)))
    except (ValueError, OSError):
        sys.exit(
            f"cannot simulate {devices} devices in {processes} processes: one of the processes needs {need} open files "
            f"and this machine allows {hard}; raise it (ulimit -Hn), or use --processes or --devices"
        )


@contextlib.contextmanager
def device_folder() -> Iterator[Path]:
    """In memory where that is possible: two thousand flash memories are not one disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="ea-fleet-", dir=memory if os.access(memory, os.W_OK) else "/tmp") as path:
        yield Path(path)


# -- the broker -------------------------------------------------------------------------------------------------------


class Mosquitto:
    """One mosquitto; every client that it lets in is noted with the time at which it said so."""

    def __init__(self, config: Path, ports: Sequence[int]) -> None:
        self._config, self._ports = config, ports
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        #: Time and client id; what else it said.
        self.clients: list[tuple[float, str]] = []
        self.said: Counter[str] = Counter()

    def start(self) -> None:
        command = [str(MOSQUITTO), "-c", str(self._config)]
        self._process = process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        until(self._listens, "mosquitto listens", 20.0)

    def _listens(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            sys.exit(f"mosquitto has ended: {dict(self.said)}")
        return all(connects(port) for port in self._ports)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            _, _, text = line.strip().partition(": ")
            if text.startswith("New client connected from "):
                self.clients.append((time.monotonic(), text.split(" as ")[1].split(" ")[0]))
            elif not text.startswith(("New connection from ", "Client ")):
                self.said[text.split(" (")[0][:120]] += 1

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def of_devices(self, since: float) -> list[float]:
        """When devices were let in."""
        return sorted(moment for moment, name in list(self.clients) if moment >= since and "@" not in name)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def until(condition: Callable[[], bool], what: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {patience_s:.0f} s: {what}")
        time.sleep(0.02)


class Lateness:
    """How late this process was at worst, which notes when devices were let in, and has the operator's work to do."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            due = time.monotonic() + 0.05
            time.sleep(0.05)
            self.worst_s = max(self.worst_s, time.monotonic() - due)


# -- the devices' processes -------------------------------------------------------------------------------------------


class Crowd:
    """A process of simulated devices, and what it has said."""

    def __init__(self, plan: dict, folder: Path, number: int) -> None:
        path = folder / f"plan-{number}.json"
        path.write_text(json.dumps(plan))
        self.size = len(plan["devices"])
        self.accepted = 0
        self._log = (folder / f"devices-{number}.log").open("w+")
        self._answers: list[dict] = []
        self._heard = threading.Condition()
        command = [sys.executable, str(Path(__file__).with_name("fleet_devices.py")), str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            document = json.loads(line)
            with self._heard:
                if "accepted" in document:
                    self.accepted = document["accepted"]
                else:
                    self._answers.append(document)
                self._heard.notify_all()
        with self._heard:
            self._answers.append({"end": True})
            self._heard.notify_all()

    def tell(self, do: str, **more: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()

    def answer(self, name: str, patience_s: float = 120.0):
        with self._heard:
            if not self._heard.wait_for(lambda: self._answers, patience_s):
                raise TimeoutError(f"the devices do not say {name!r}")
            document = self._answers.pop(0)
        if name not in document:
            raise RuntimeError(f"the devices say {document}, not {name!r}\n{self.log()}")
        return document[name]

    def ask(self, do: str, name: str):
        self.tell(do)
        return self.answer(name)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)
        self._log.close()


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Storm:
    """When devices were let in, in seconds from the beginning."""

    moments: list[float]
    splay_s: float
    devices: int
    #: The worst that a process on this machine was late meanwhile.
    late_s: float

    def report(self) -> dict:
        planned = self.devices / self.splay_s
        per_second = Counter(int(moment) for moment in self.moments)
        last = max(self.moments, default=0.0)
        return {
            "connections": len(self.moments),
            "planned_per_s": round(planned, 2),
            "peak_per_s": peak(np.array(sorted(self.moments))),
            "late_s": round(self.late_s, 2),
            "chance_per_s": chance_peak(self.devices, self.splay_s),
            "allowed_per_s": chance_peak(self.devices, self.splay_s, 1.0 + self.late_s),
            "all_connected_s": round(last, 2),
            "per_s": [per_second[second] for second in range(int(last) + 1)],
        }


def peak(moments: np.ndarray, window_s: float = 1.0) -> int:
    """The most within any window of that length."""
    if not len(moments):
        return 0
    ends = np.searchsorted(moments, moments + window_s, side="left")
    return int((ends - np.arange(len(moments))).max())


def chance_peak(devices: int, splay_s: float, window_s: float = 1.0) -> int:
    """The peak that one storm in a thousand exceeds when each device draws its moment evenly from the splay."""
    draw = np.random.default_rng(1)
    peaks = [peak(np.sort(draw.uniform(0.0, splay_s, devices)), window_s) for _ in range(STORMS)]
    return int(np.quantile(peaks, RARE))


@dataclass
class Rollout:
    """One job to all devices, as the operator saw it; times in seconds from the beginning of giving it."""

    name: str
    job_id: str = ""
    given_s: float = 0.0
    rung_s: float = 0.0
    #: When the operator had verified the last state of a device.
    ended: dict[str, float] = field(default_factory=dict)
    killed_s: float | None = None
    back_s: float | None = None
    warnings: list[str] = field(default_factory=list)
    storm: dict | None = None
    states: dict[str, int] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    operator_cpu_s: float = 0.0

    def until_part(self, part: float, devices: int) -> float | None:
        """Seconds until this part of the fleet had ended; None if it never did."""
        moments = sorted(self.ended.values())
        need = max(1, -(-int(part * devices * 1000) // 1000))
        return round(moments[need - 1], 2) if len(moments) >= need else None

    def report(self, devices: int) -> dict:
        return {
            "name": self.name,
            "signed_s": round(self.given_s, 2),
            "published_s": round(self.rung_s, 2),
            **{f"ended_{part}": self.until_part(part / 100, devices) for part in (50, 99, 100)},
            "killed_s": self.killed_s and round(self.killed_s, 2),
            "broker_back_s": self.back_s and round(self.back_s, 2),
            "states": self.states,
            "devices_by_runs": self.runs,
            "duplicates": self.duplicates,
            "operator_cpu_s": round(self.operator_cpu_s, 2),
            "warnings": self.warnings,
            "storm": self.storm,
        }


class Benchmark:
    """One fleet from its founding to its end."""

    def __init__(self, options: argparse.Namespace, folder: Path, devices: Path, stack: contextlib.ExitStack) -> None:
        self._options = options
        self._scratch = folder
        self._device_folder = devices
        self._stack = stack
        self._folder = Folder(folder / "fleet")
        self._clock = SystemClock()
        self._ports = free_ports(3)
        self._names = [f"d{number:05d}" for number in range(options.devices)]
        self._began = time.monotonic()
        self._wrong: list[str] = []
        self._refused: dict[str, int] = {}
        self._lateness = Lateness()

    def run(self) -> dict:
        options = self._options
        load = os.getloadavg()[0]
        self._found()
        self._books = self._stack.enter_context(Books(self._folder.database))
        rows = self._enrol()
        self._broker = Mosquitto(self._configure(), self._ports[:2])
        self._broker.start()
        self._stack.callback(self._broker.stop)
        self._crowds = self._start_devices(rows)
        storm = self._storm()
        memory = self._memory()
        rollouts = []
        with Desk(self._folder, load_settings(self._folder), self._books, self._clock) as desk:
            rollouts.append(self._roll_out(desk, "no work", 0.0))
            rollouts.append(self._roll_out(desk, f"up to {options.work:g} s of work", options.work))
            self._require_nothing_refused()
            rollouts.append(self._roll_out(desk, "broker killed while it is sent", options.work, self._accepted))
            self._say("until the connections are good ones")
            time.sleep(STABLE_S)
            rollouts.append(self._roll_out(desk, "broker killed while it ends", options.work, self._ended))
            self._check_rollouts(rollouts)
        looks = [crowd.ask("look", "look") for crowd in self._crowds]
        broker = usage(self._broker.pid)
        self._end()
        return {
            "benchmark": "fleet",
            "devices": options.devices,
            "processes": options.processes,
            "tls": options.tls,
            "splay_s": options.splay,
            "cores": os.cpu_count(),
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
            "open_files_allowed": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "storm": storm,
            "memory": memory,
            "rollouts": [each.report(options.devices) for each in rollouts],
            "devices_cpu_s": round(sum(look["cpu_s"] for look in looks), 1),
            "broker": broker,
            "broker_said": dict(self._broker.said),
            "refused": self._refused,
            "seconds": round(time.monotonic() - self._began, 1),
            "wrong": self._wrong,
        }

    def _say(self, text: str) -> None:
        if self._options.verbose:
            print(f"{time.monotonic() - self._began:7.1f} s  {text}", file=sys.stderr, flush=True)

    # -- before -------------------------------------------------------------------------------------------------------

    def _found(self) -> None:
        device, operator, claim = (Door("localhost", port) for port in self._ports)
        plan = Plan(
            TENANT, device, operator, claim, KEY, ("observe", "change"), tls=self._options.tls,
            username="" if self._options.tls else "@ops", server_names=["localhost", "127.0.0.1"],
        )  # fmt: skip
        found(self._folder, plan, None, self._clock.now())

    def _configure(self) -> Path:
        """The configuration that is shipped; without TLS who connects is believed in who he is, and no more."""
        (self._scratch / "data").mkdir()
        settings = {
            "PORT": self._ports[0], "OPERATOR_PORT": self._ports[1], "CLAIM_PORT": self._ports[2],
            "DATA": self._scratch / "data", "CLAIM_DATA": self._scratch / "data",
        }  # fmt: skip
        render = [str(ROOT / "deploy" / "mosquitto" / "render.sh"), TENANT, str(self._folder.broker)]
        subprocess.run([*render, *(f"{name}={value}" for name, value in settings.items())], check=True, stdout=-3)
        path = self._folder.broker / "broker.conf"
        lines = path.read_text().replace("connection_messages false", "connection_messages true").splitlines()
        if not self._options.tls:
            lines = [line for line in lines if not line.startswith(TLS_LINES)]
            lines = [line.replace("allow_anonymous false", "allow_anonymous true") for line in lines]
        owner = ["user root"] if os.geteuid() == 0 else []  # as root it would give up the right to its files
        path.write_text("\n".join([*owner, *lines]) + "\n")
        return path

    def _enrol(self) -> list[dict]:
        """Every device in the operator's books; the rows for their processes."""
        self._say("enrolling")
        authority = None
        if self._options.tls:
            key = Passwords().open(self._folder.authority_key("devices"))
            authority = read_authority(self._folder.authority("devices").read_bytes(), key)
        rows = []
        for name in self._names:
            seed = secrets.token_bytes(32)
            folder = self._device_folder / name
            folder.mkdir()
            broker = {"host": "127.0.0.1", "port": self._ports[0], "tls": self._options.tls, "keepalive_s": 60}
            csr = ""
            if authority is not None:
                csr = request(folder / "device.key")
            enrolled = enrol(
                self._books, name, by_hand(Signer(seed).public, csr, self._clock.now()), authority, self._clock.now()
            )
            if authority is None:
                broker["username"] = name
            else:
                (folder / "device.pem").write_text(enrolled.certificate)
                broker |= {
                    "ca_file": str(self._folder.operator / "server-ca.pem"), "cert_file": str(folder / "device.pem"),
                    "key_file": str(folder / "device.key"),
                }  # fmt: skip
            rows.append(
                {
                    "name": name,
                    "seed": seed.hex(),
                    "epoch": enrolled.device.epoch,
                    "folder": str(folder),
                    "broker": broker,
                }
            )
        return rows

    def _start_devices(self, rows: list[dict]) -> list[Crowd]:
        self._say("starting the devices' processes")
        keys = [
            {"name": key.name, "public": key.public, "classes": list(key.classes)}
            for key in self._books.registry.signing_keys()
        ]
        settings = {
            "version": 1, "state": "enrolled", "tenant": TENANT, "keyid": "0" * 32, "outbox_mb": 1,
            "splay_s": self._options.splay,
        }  # fmt: skip
        crowds = []
        for number in range(self._options.processes):
            plan = {
                "tenant": TENANT,
                "keys": keys,
                "settings": settings,
                "devices": rows[number :: self._options.processes],
            }
            crowd = Crowd(plan, self._scratch, number)
            self._stack.callback(crowd.close)
            crowds.append(crowd)
        for crowd in crowds:
            crowd.answer("ready", 300.0)
        return crowds

    # -- the storm ----------------------------------------------------------------------------------------------------

    def _storm(self) -> dict:
        self._say(f"connecting over {self._options.splay:g} s")
        self._forget_lateness()
        for crowd in self._crowds:
            crowd.tell("go")
        began = min(crowd.answer("gone") for crowd in self._crowds)
        self._until_connected(began, "all devices are connected")
        drawn = [moment for crowd in self._crowds for moment in crowd.ask("look", "look")["drawn"]]
        return self._storm_report("connections at the start", began, drawn)

    def _forget_lateness(self) -> None:
        self._lateness.worst_s = 0.0
        for crowd in self._crowds:
            crowd.tell("calm")

    def _until_connected(self, since: float, what: str) -> None:
        """Until the broker has let in so many since then, and their links have told their cores of it."""
        patience_s = 6 * self._options.splay + PATIENCE_S
        until(lambda: len(self._broker.of_devices(since)) >= self._options.devices, what, patience_s)
        until(lambda: self._connected() == self._options.devices, what, patience_s)

    def _connected(self) -> int:
        time.sleep(0.5)
        return sum(crowd.ask("look", "look")["connected"] for crowd in self._crowds)

    def _storm_report(self, name: str, began: float, drawn: Sequence[float] = ()) -> dict:
        moments = [moment - began for moment in self._broker.of_devices(began)]
        late_s = max(self._lateness.worst_s, *(crowd.ask("look", "look")["lag_s"] for crowd in self._crowds))
        report = Storm(moments, self._options.splay, self._options.devices, late_s).report()
        if drawn:
            report["drawn_peak_per_s"] = found = peak(np.array(sorted(drawn)))
            if found > report["chance_per_s"]:
                self._wrong.append(f"{name}: {found} were drawn for one second, chance allows {report['chance_per_s']}")
        report["judged"] = late_s <= LATE_S
        if report["judged"] and report["peak_per_s"] > report["allowed_per_s"]:
            self._wrong.append(
                f"{name}: {report['peak_per_s']} in one second, {report['planned_per_s']:g} were planned, chance and a "
                f"process that was {late_s:.2f} s late allow {report['allowed_per_s']}"
            )
        if report["connections"] != self._options.devices:
            self._wrong.append(f"{name}: {report['connections']} connections of {self._options.devices} devices")
        return report

    def _memory(self) -> dict:
        looks = [crowd.ask("look", "look") for crowd in self._crowds]
        grown = {
            name: sum(look["memory"][name] - look["memory_before"][name] for look in looks)
            for name in ("VmRSS", "RssAnon")
        }
        return {
            "device_kb": round(1024 * grown["VmRSS"] / self._options.devices, 1),
            "device_anonymous_kb": round(1024 * grown["RssAnon"] / self._options.devices, 1),
            "process_without_devices_mb": round(looks[0]["memory_before"]["VmRSS"], 1),
            "processes_mb": round(sum(look["memory"]["VmRSS"] for look in looks), 1),
            "files_a_device": round(sum(look["files"] for look in looks) / self._options.devices, 2),
        }

    # -- a job to all -------------------------------------------------------------------------------------------------

    def _roll_out(
        self, desk: Desk, name: str, work_s: float, kill_by: Callable[[Rollout], int] | None = None
    ) -> Rollout:
        """Give a job and see it through; the broker is killed when what ``kill_by`` counts has come so far."""
        self._say(f"a job to all: {name}")
        for crowd in self._crowds:
            crowd.tell("work", seconds=work_s)
            crowd.answer("works")
        rollout = Rollout(name)
        before = [crowd.ask("look", "look")["duplicates"] for crowd in self._crowds]
        began, cpu = time.monotonic(), time.process_time()
        killer = threading.Thread(target=self._kill, args=(rollout, began, kill_by), daemon=True)
        if kill_by is not None:
            killer.start()
        office = Office(self._books, TENANT)
        devices = self._books.registry.devices()
        signer = open_signer(self._folder.signing_key(KEY), Passwords())
        rollout.job_id, _ = office.give(Command(OP), devices, [signer], self._clock.now())
        rollout.given_s = time.monotonic() - began
        self._patiently(rollout, lambda: desk.ring(self._names))
        rollout.rung_s = time.monotonic() - began
        self._hear_ends(desk, rollout, began, PATIENCE_S + work_s + 3 * self._options.splay * (kill_by is not None))
        rollout.operator_cpu_s = time.process_time() - cpu
        if kill_by is not None:
            killer.join()
            since = began + (rollout.back_s or 0.0)
            self._until_connected(since, "all devices are connected again")
            rollout.storm = self._storm_report(f"connections, {name}", since)
        self._settle(rollout, before)
        return rollout

    def _hear_ends(self, desk: Desk, rollout: Rollout, began: float, patience_s: float) -> None:
        """Until the job has ended on every device, or nothing more has for so long."""
        last = time.monotonic()
        while len(rollout.ended) < len(self._names) and time.monotonic() < last + patience_s:
            for event in self._patiently(rollout, lambda: desk.pump(0.5)) or ():
                if event.kind == "job" and event.data["job_id"] == rollout.job_id and event.data["state"] in TERMINAL:
                    last = time.monotonic()
                    rollout.ended.setdefault(event.device, last - began)

    def _patiently(self, rollout: Rollout, work: Callable):
        """As the operator's commands do: what may succeed later is told, and gone on with."""
        try:
            return work()
        except TryLaterError as error:
            rollout.warnings.append(str(error))
            return None

    def _accepted(self, _: Rollout) -> int:
        return sum(crowd.accepted for crowd in self._crowds)

    def _ended(self, rollout: Rollout) -> int:
        return len(rollout.ended)

    def _kill(self, rollout: Rollout, began: float, count: Callable[[Rollout], int]) -> None:
        enough = count(rollout) + KILL_AT * self._options.devices
        until(lambda: count(rollout) >= enough, f"{enough:g} devices have got on", PATIENCE_S)
        self._broker.kill()
        rollout.killed_s = time.monotonic() - began
        self._say("the broker is killed")
        time.sleep(self._options.outage)
        self._forget_lateness()
        rollout.back_s = time.monotonic() - began
        self._broker.start()
        self._say("the broker is back")

    def _settle(self, rollout: Rollout, duplicates: list[int]) -> None:
        """What the books and the devices say in the end."""
        looks = [crowd.ask("look", "look") for crowd in self._crowds]
        runs = Counter(job.get(rollout.job_id, 0) for look in looks for job in look["runs"].values())
        rollout.runs = {str(count): devices for count, devices in sorted(runs.items())}
        rollout.states = dict(Counter(each.state for each in self._books.documents.outcomes(rollout.job_id)))
        rollout.duplicates = sum(look["duplicates"] for look in looks) - sum(duplicates)

    def _check_rollouts(self, rollouts: list[Rollout]) -> None:
        for rollout in rollouts:
            if rollout.states != {"succeeded": self._options.devices}:
                self._wrong.append(f"{rollout.name}: by the operator's books {rollout.states}")
            if rollout.runs != {"1": self._options.devices}:
                self._wrong.append(f"{rollout.name}: devices by how often they ran it: {rollout.runs}")
        self._require_nothing_refused({"devices: old_generation", "operator: job: out_of_order"})
        if overdue := sum(crowd.ask("look", "look")["overdue"] for crowd in self._crowds):
            self._wrong.append(f"{overdue} links make no progress")

    def _require_nothing_refused(self, but: Collection[str] = ()) -> None:
        """``but``: what comes from a broker that was killed, and goes back to what it had on disk."""
        refused: Counter[str] = Counter()
        for crowd in self._crowds:
            for reason, count in crowd.ask("look", "look")["refused"].items():
                refused[f"devices: {reason}"] += count
        for row in self._books.words.dropped():
            refused[f"operator: {row['what']}: {row['reason']}"] += row["count"]
        self._refused = dict(refused)
        if wrong := {reason: count for reason, count in refused.items() if reason not in but}:
            self._wrong.append(f"refused: {wrong}")

    def _end(self) -> None:
        self._say("goodbye")
        for crowd in self._crowds:
            crowd.tell("stop")
        for crowd in self._crowds:
            crowd.answer("stopped")
            if told := crowd.log():
                self._wrong.append(f"the devices complain: {told[-300:]}")


def request(path: Path) -> str:
    """A new key in ``path``; the request for its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(pem).decode()


def usage(pid: int) -> dict[str, float]:
    """CPU seconds and resident megabytes of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu_s": round((int(fields[11]) + int(fields[12])) / ticks, 1),
        "rss_mb": round(int(fields[21]) * page / (1 << 20), 1),
    }


# -- telling ----------------------------------------------------------------------------------------------------------


def table(report: dict) -> str:
    """The report for people."""
    memory, storms = report["memory"], {"at the start": report["storm"]}
    for rollout in report["rollouts"]:
        if rollout["storm"] is not None:
            storms[f"after kill {len(storms)}"] = rollout["storm"]
    lines = [
        f"{report['devices']} devices in {report['processes']} processes, {'TLS' if report['tls'] else 'plain TCP'}, "
        f"{report['cores']} cores, load {report['load_average'][0]} before and {report['load_average'][1]} after, "
        f"{report['seconds']} s in all",
        "",
        f"{'connections':20} {'planned/s':>9} {'peak/s':>7} {'chance':>7} {'late s':>7} {'allowed/s':>9} "
        f"{'all after s':>11}",
    ]
    for name, storm in storms.items():
        lines.append(
            f"{name:20} {storm['planned_per_s']:9.1f} {storm['peak_per_s']:7} {storm['chance_per_s']:7} "
            f"{storm['late_s']:7.2f} {storm['allowed_per_s']:9} {storm['all_connected_s']:11.1f}"
            f"{'' if storm['judged'] else '  NOT JUDGED: the machine stood still'}"
        )
    lines.append(f"  at the start {report['storm']['drawn_peak_per_s']} were drawn for the fullest second")
    lines += [f"  in each second, {name}: {' '.join(map(str, storm['per_s']))}" for name, storm in storms.items()]
    lines += ["", f"{'a job to all':30} {'signed':>7} {'sent':>7} {'50 %':>7} {'99 %':>7} {'100 %':>7}  states; runs"]
    for rollout in report["rollouts"]:
        times = (rollout[name] for name in ("signed_s", "published_s", "ended_50", "ended_99", "ended_100"))
        cells = " ".join(f"{'never' if moment is None else f'{moment:.1f}':>7}" for moment in times)
        lines.append(f"{rollout['name']:30} {cells}  {rollout['states']}; {rollout['devices_by_runs']}")
        if rollout["killed_s"] is not None:
            lines.append(
                f"  killed after {rollout['killed_s']} s, back after {rollout['broker_back_s']} s; "
                f"{rollout['duplicates']} documents came twice"
            )
        lines += [f"  warning: {text}" for text in rollout["warnings"]]
    lines += [
        "",
        f"memory of a device {memory['device_kb']} kB ({memory['device_anonymous_kb']} kB its own), beside "
        f"{memory['process_without_devices_mb']} MB for each process; {memory['files_a_device']} open files",
        f"CPU: devices {report['devices_cpu_s']} s, operator "
        f"{sum(rollout['operator_cpu_s'] for rollout in report['rollouts']):.1f} s; broker since its restart "
        f"{report['broker']['cpu_s']} s, {report['broker']['rss_mb']} MB",
        f"the broker said: {report['broker_said']}; refused: {report['refused'] or 'nothing'}",
    ]
    return "\n".join([*lines, *(f"WRONG: {text}" for text in report["wrong"] or ())])


if __name__ == "__main__":
    main()
