"""The link at work and at rest: how fast a question is answered, what it takes of memory and CPU, whom it disturbs.

Real processes on this machine: core, link, mosquitto with TLS, an operator who signs. A question goes operator ->
broker -> link -> core and its answer all the way back; the time is that from before it is signed until the answer's
signature is checked. At rest means connected, with the default rates of telemetry and keepalive.

What a busy link costs inference: core and an app that asks without a pause have one core of the CPU, link and broker
another. In turns, in an order by chance, link is stopped, hands over an outbox of many days that does not end before
the turn, or is stopped while a loop that does nothing keeps the other core busy; the app counts its answers. The budget
is for link as it comes, which hands over ``outbox_kib_s``; ``--rate 0`` shows what it costs as fast as it goes.

    python benchmarks/link.py [--json] [--quick] [--questions N] [--turns N] [--rate KIB_S]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from agent.link.outbox import Outbox
from agent.trust.envelope import PublicKey, open_envelope
from agent.wire.messages import RpcAnswer, decode
from tests import onnx_models
from tests.core.fleet_device import FleetDevice
from tests.link.broker import Broker, until

BUDGETS = {
    "rpc_p99_ms": 50.0,
    "link_rss_mb": 45.0,
    "core_rss_mb": 48.0,
    "link_idle_cpu_percent": 0.5,
    "core_idle_cpu_percent": 0.5,
    "slowed_by_busy_link_percent": 2.0,
}
#: Records of an outage, more than are handed over within a turn, and what they fit into; seconds of a turn; turns.
_RECORDS, _OUTBOX_MB, _TURN_S, _TURNS = 60_000, 512, 2.0, 24
#: An app: asks without a pause, and says at each line of its input how many answers it has had.
_APP = """
import sys, threading
import numpy as np
from agent.client import Client
count, x = 0, np.ones((1, 512), np.float32)
def tell():
    for line in sys.stdin:
        print(count, flush=True)
threading.Thread(target=tell, daemon=True).start()
with Client(sys.argv[1]) as client:
    while True:
        client.infer("heavy", {"x": x})
        count += 1
"""
#: A neighbour on the other core that uses it up and nothing else.
_LOOP = "while True: pass"
_WARM_UP = 20
#: After it a start is over: the inventory told, what only a start needs given back.
_SETTLE_S = 30.0


class Asker:
    """An operator with a connection of its own whose answers wake it at once."""

    def __init__(self, device: FleetDevice, broker: Broker) -> None:
        self._fleet = device.fleet
        identity = PublicKey(base64.b64decode(self._fleet.info["identity"]))
        self._keys = {identity.keyid: identity}
        self._answered = threading.Event()
        self._payload = b""
        self._nonce = self._fleet.nonce
        self._client = client = Client(CallbackAPIVersion.VERSION2, "benchmark", protocol=MQTTv5)
        client.tls_set(
            str(broker.server_ca), str(broker.folder / "ops.pem"), str(broker.folder / "ops.key"),
            tls_version=ssl.PROTOCOL_TLS_CLIENT,
        )  # fmt: skip
        listening = threading.Event()
        client.on_socket_open = lambda _client, _data, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.on_subscribe = lambda *_: listening.set()
        client.on_message = self._on_message
        self._prefix = f"eda/1/{broker.tenant}/{device.name}"
        client.connect("localhost", broker.operator_port)
        client.loop_start()
        client.subscribe(f"{self._prefix}/up/rpc", qos=1)
        listening.wait(30)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self._payload = bytes(message.payload)
        self._answered.set()

    def ask(self, op: str) -> float:
        """Seconds until the answer."""
        self._answered.clear()
        began = time.perf_counter()
        request = self._fleet.question(op)
        self._client.publish(f"{self._prefix}/dn/rpc/{op}", self._fleet.sealed(request), qos=1)
        if not self._answered.wait(30):
            raise RuntimeError(f"no answer to {op}")
        answer = decode(open_envelope(self._payload, RpcAnswer.KIND, self._keys).payload, RpcAnswer)
        took = time.perf_counter() - began
        if answer.rpc_id != request.rpc_id or answer.error is not None:
            raise RuntimeError(f"a wrong answer: {answer}")
        return took

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()


def main() -> None:
    parser = argparse.ArgumentParser(description="the link: questions, memory, idle CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer questions, a shorter look at idle")
    parser.add_argument("--questions", type=int, default=2000, help="pings (default 2000)")
    parser.add_argument("--turns", type=int, default=_TURNS, help=f"turns beside a busy link (default {_TURNS})")
    parser.add_argument("--rate", type=int, default=1024, help="outbox_kib_s of the busy link (default 1024)")
    options = parser.parse_args()
    turns = 2 if options.quick else options.turns
    questions, idle_s = (200, 10.0) if options.quick else (options.questions, 60.0)
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder:
        report = measure(Path(folder), questions, idle_s, turns, options.rate)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


def measure(folder: Path, questions: int, idle_s: float, turns: int, rate_kib_s: int) -> dict:
    """The whole report."""
    (folder / "broker").mkdir()
    with Broker(folder / "broker") as broker, FleetDevice(folder, broker) as device:
        device.configure(keepalive_s=60, outbox_mb=_OUTBOX_MB, outbox_kib_s=rate_kib_s)
        device.connect()
        until(lambda: device.fleet.info["inventory"], "the inventory is told", 60)
        time.sleep(_SETTLE_S)
        idle = measure_idle(device, idle_s)
        memory = {"core": memory_of(core_pid(device)), "link": memory_of(device.link_pid)}
        asker = Asker(device, broker)
        for _ in range(_WARM_UP):
            asker.ask("ping")
        took = {op: sorted(asker.ask(op) for _ in range(count)) for op, count in
                (("ping", questions), ("status", questions // 10), ("logs.tail", questions // 10))}  # fmt: skip
        asker.close()
        after = {"core": memory_of(core_pid(device)), "link": memory_of(device.link_pid)}
        slowed = measure_slowdown(device, broker, folder, turns)
    rpc = {op: {f"p{share}_ms": percentile(times, share) for share in (50, 90, 99)} for op, times in took.items()}
    figures = {
        "rpc_p99_ms": rpc["ping"]["p99_ms"],
        "link_rss_mb": max(memory["link"]["rss_mb"], after["link"]["rss_mb"]),
        "core_rss_mb": memory["core"]["rss_mb"],
        "link_idle_cpu_percent": idle["link"]["cpu_percent"],
        "core_idle_cpu_percent": idle["core"]["cpu_percent"],
        "slowed_by_busy_link_percent": slowed["by_link_percent"],
    }
    return {
        "benchmark": "link",
        "questions": questions,
        "load_average": round(os.getloadavg()[0], 1),
        "budgets": BUDGETS,
        "figures": figures,
        "rpc": rpc,
        "memory": memory,
        "memory_after_questions": after,
        "idle": idle,
        "outbox_kib_s": rate_kib_s,
        "slowdown": slowed,
        "within_budget": all(figures[name] <= BUDGETS[name] for name in BUDGETS),
    }


def core_pid(device: FleetDevice) -> int:
    """Of the running core."""
    assert device.process is not None
    return device.process.pid


def measure_idle(device: FleetDevice, seconds: float) -> dict:
    """CPU time and wake-ups of both processes while nobody asks for anything."""
    pids = {"core": core_pid(device), "link": device.link_pid}
    before = {name: (cpu_s(pid), wakeups(pid)) for name, pid in pids.items()}
    began = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    return {
        name: {
            "cpu_percent": round(100 * (cpu_s(pid) - before[name][0]) / passed, 3),
            "wakeups_per_s": round((wakeups(pid) - before[name][1]) / passed, 2),
        }
        for name, pid in pids.items()
    }


def measure_slowdown(device: FleetDevice, broker: Broker, folder: Path, turns: int) -> dict:
    """Answers a second with link stopped, handing over an outage, and stopped beside a loop."""
    first, *_, last = sorted(os.sched_getaffinity(0))
    if first == last:
        return {"by_link_percent": 0.0, "note": "one core alone: not measured"}
    model = folder / "heavy.onnx"
    model.write_bytes(onnx_models.heavy(side=512, layers=4))
    device.cli("models", "add", model)
    pin(core_pid(device), first)
    pin(broker.process.pid, last)
    os.sched_setaffinity(0, {last})
    command = ["taskset", "-c", str(first), sys.executable, "-c", _APP, str(device.run / "infer.sock")]
    cpu, handed = [], []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=device.environment
    ) as app:

        def answers() -> int:
            app.stdin.write("\n")
            app.stdin.flush()
            return int(app.stdout.readline())

        def rate() -> float:
            before, began = answers(), time.perf_counter()
            time.sleep(_TURN_S)
            return (answers() - before) / (time.perf_counter() - began)

        def quiet() -> float:
            time.sleep(1.0)
            return rate()

        def busy() -> float:
            fill_outbox(device, _RECORDS - records_left(device))
            device.start_link()
            pin(device.link_pid, last)
            before = records_left(device)
            until(lambda: records_left(device) < before, "the outage is being handed over", 60)
            before, used = records_left(device), cpu_s(device.link_pid)
            answered = rate()
            cpu.append(round((cpu_s(device.link_pid) - used) / _TURN_S, 2))
            left = records_left(device)
            if not left:
                raise RuntimeError(f"{before} records were handed over before the turn ended: the link was not busy")
            handed.append(before - left)
            device.stop_link()
            return answered

        def beside_a_loop() -> float:
            with subprocess.Popen(["taskset", "-c", str(last), sys.executable, "-c", _LOOP]) as loop:
                time.sleep(1.0)
                answered = rate()
                loop.kill()
            return answered

        kinds = {"quiet": quiet, "link": busy, "loop": beside_a_loop}
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        try:
            device.stop_link()
            rate()
            for _ in range(turns):
                for kind in random.sample(list(kinds), len(kinds)):
                    rates[kind].append(kinds[kind]())
        finally:
            app.kill()
    (device.state / "link" / "outbox.db").unlink()
    device.start_link()
    slowed = {
        kind: [quiet / other for quiet, other in zip(rates["quiet"], rates[kind], strict=True)]
        for kind in ("link", "loop")
    }
    return {
        **{f"by_{kind}_percent": round(100 * (statistics.median(ratios) - 1), 2) for kind, ratios in slowed.items()},
        "link_cores_used": cpu,
        "records_handed_over": handed,
    }


def fill_outbox(device: FleetDevice, count: int) -> None:
    """Records of many days without a connection, in the file that link opens."""
    box = Outbox(device.state / "link" / "outbox.db", _OUTBOX_MB << 20)
    for first in range(0, count, 500):
        box.add(("heat", {"at": f"{count}-{n}", "pad": "x" * 4000}) for n in range(first, min(count, first + 500)))
    box.close()


def records_left(device: FleetDevice) -> int:
    """In link's file."""
    box = Outbox(device.state / "link" / "outbox.db", _OUTBOX_MB << 20)
    try:
        return box.counts().records
    finally:
        box.close()


def pin(pid: int, cpu: int) -> None:
    """Each of its threads to one core of the CPU."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


def memory_of(pid: int) -> dict[str, float]:
    """Resident MB: in all, of its own, of files; and what is in proportion (PSS)."""
    fields = {"VmRSS": "rss_mb", "RssAnon": "anonymous_mb", "RssFile": "files_mb", "VmHWM": "peak_mb"}
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            found[fields[name]] = round(int(value.split()[0]) / 1024, 1)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            found["pss_mb"] = round(int(line.split()[1]) / 1024, 1)
    return found


def cpu_s(pid: int) -> float:
    """CPU time of its living threads, to the nanosecond."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def wakeups(pid: int) -> int:
    """How often its threads have gone to sleep so far."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                count += int(line.split()[1])
    return count


def percentile(ordered: list[float], share: int) -> float:
    """In milliseconds."""
    if len(ordered) < 2:
        return round(1000 * ordered[0], 2)
    return round(1000 * statistics.quantiles(ordered, n=100, method="inclusive")[share - 1], 2)


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'':24}{'measured':>10}{'budget':>10}"]
    lines += [f"{name:24}{report['figures'][name]:>10}{limit:>10}" for name, limit in report["budgets"].items()]
    lines += [f"{op:12} {figures}" for op, figures in report["rpc"].items()]
    for name in ("memory", "memory_after_questions", "idle"):
        lines += [f"{name} {part}: {figures}" for part, figures in report[name].items()]
    verdict = "within budget" if report["within_budget"] else "OVER BUDGET"
    return "\n".join([*lines, f"load {report['load_average']}, {report['questions']} questions: {verdict}"])


if __name__ == "__main__":
    main()
