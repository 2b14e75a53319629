"""A throttled hour replayed in a minute: a real daemon reads recorded states of a machine while clients ask it.

The recorded hour: a slow rise to the trip point, half an hour around it (the sensor swings by three degrees twice a
minute, the firmware holds the clock back), a fall, a second wave that only just touches the threshold, and a spell of
memory pressure. The governor's times are scaled like the hour, so that it looks, waits and steps as on the device.

Held: no request fails; every answer says truly whether it is degraded; the variants step down and have all come back at
the end; no flapping: the number of switches stays below what waves and steps explain.

    python benchmarks/heat.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from daemon import SHORT_TRIALS, Daemon
from onnx import TensorProto, helper, numpy_helper

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest

HOUR_S = 3600.0
STEP_S = 15.0  # of the recorded hour, between two states
CLIENTS = 4
TRIP_C = 85
LAYERS = {"fine": 1200, "middle": 300, "rough": 4}
NOISE = {"fine": 0.0, "middle": 0.15, "rough": 0.4}
#: Two waves and one spell of memory pressure; down and back by two steps each.
MOST_SWITCHES = 12
ZONE = "sys/class/thermal/thermal_zone0"


def degrees(second: float) -> float:
    """The hour's heat, slowly: 55 rising to 84, falling, and a second wave to 81."""
    minute = second / 60
    course = [(0, 55), (8, 60), (14, 84), (30, 85), (36, 66), (42, 81), (48, 81), (52, 62), (60, 55)]
    times, values = zip(*course, strict=True)
    return float(np.interp(minute, times, values)) + 1.5 * math.sin(2 * math.pi * second / 30)


def state(second: float) -> dict[str, str]:
    """The files of the machine at that second of the hour."""
    minute = second / 60
    throttled = 0x8 if 20 <= minute < 28 else 0
    stall = 35.0 if 54 <= minute < 55 else 0.5
    return {
        f"{ZONE}/type": "cpu-thermal\n",
        f"{ZONE}/temp": f"{int(degrees(second) * 1000)}\n",
        f"{ZONE}/trip_point_0_type": "passive\n",
        f"{ZONE}/trip_point_0_temp": f"{TRIP_C}000\n",
        f"{ZONE}/trip_point_1_type": "critical\n",
        f"{ZONE}/trip_point_1_temp": "110000\n",
        "cmd/vcgencmd_get_throttled.txt": f"throttled={throttled:#x}\n",
        "proc/pressure/memory": f"some avg10={stall:.2f} avg60=0.00 avg300=0.00 total=1\n"
        f"full avg10={stall / 10:.2f} avg60=0.00 avg300=0.00 total=1\n",
        "proc/meminfo": "MemTotal: 4000000 kB\nMemFree: 1000000 kB\nMemAvailable: 2500000 kB\n",
    }


def record_hour(root: Path, pace: float) -> None:
    """One folder for each state, named by the second of the replay at which it begins."""
    second = 0.0
    while second <= HOUR_S:
        for name, text in state(second).items():
            path = root / f"{second / pace:.3f}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        second += STEP_S


def network(variant: str) -> bytes:
    """x[n, 16] -> y[n, 4]; the better a variant, the more small steps it takes."""
    layers = LAYERS[variant]
    weights = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    weights += NOISE[variant] * np.random.default_rng(99).standard_normal((16, 4)).astype(np.float32)
    names = [*(f"h{index}" for index in range(layers)), "y"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h0"])] + [
        helper.make_node(("Add", "Sub")[i % 2], [names[i], "c"], [names[i + 1]]) for i in range(layers)
    ]
    graph = helper.make_graph(
        nodes,
        variant,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32(0.5), "c")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def bundle(path: Path) -> Path:
    """Three variants that cost more the better they are, and a policy that wants the best."""
    files = {f"{name}.onnx": network(name) for name in LAYERS}
    inputs = np.random.default_rng(7).standard_normal((128, 16)).astype(np.float32)
    outputs = inputs @ np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": inputs, "output/y": outputs})
    files["golden.npz"] = stream.getvalue()

    def ref(name: str) -> dict[str, Any]:
        return {"name": name, "sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}

    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": "m",
            "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            "variants": [
                {"id": name, "runtime": "onnx", "precision": "fp32", "file": ref(f"{name}.onnx")} for name in LAYERS
            ],
            "golden": {"file": ref("golden.npz"), "metric": "top1", "threshold": 0.3},
            "policy": {"prefer": "accuracy"},
        }
    )
    with path.open("wb") as file:
        write(manifest, files, file)
    return path


@dataclass
class Seen:
    """What the clients were told; times are seconds since the replay began."""

    began: float = 0.0
    answers: list[tuple[float, str, bool]] = field(default_factory=list)
    untrue: int = 0
    errors: list[str] = field(default_factory=list)

    def switches(self) -> list[tuple[float, str]]:
        """When another variant began to answer. Answers of several clients overlap for a moment at each switch."""
        found: list[tuple[float, str]] = []
        answers = sorted(self.answers)
        for index in range(0, len(answers) - 24, 8):
            window = Counter(variant for _, variant, _ in answers[index : index + 24])
            variant, count = window.most_common(1)[0]
            if count >= 20 and (not found or found[-1][1] != variant):
                found.append((answers[index][0], variant))
        return found


def client(daemon: Daemon, seen: Seen, stop: threading.Event) -> None:
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    with daemon.client() as connection:
        while not stop.is_set():
            try:
                said = connection.infer("m", {"x": x}).parameters
            except Exception as error:  # noqa: BLE001 - whatever fails is what is counted
                seen.errors.append(str(error))
                continue
            lower = said["variant"] != "fine"
            seen.untrue += said["requested_variant"] != "fine" or said["degraded"] is not lower
            seen.untrue += lower and not said.get("degraded_because")
            seen.answers.append((time.monotonic() - seen.began, said["variant"], said["degraded"]))
            time.sleep(0.002)


def replay(length_s: float) -> dict[str, Any]:
    """The hour in so many seconds."""
    pace = HOUR_S / length_s
    with tempfile.TemporaryDirectory(prefix="heat-") as name:
        folder = Path(name)
        hour = folder / "hour"
        record_hour(hour, pace)
        off, on = (
            "[governor]\nenabled = false\n",
            (
                f'[governor]\nroot = "{hour}"\ninterval_s = {max(0.05, 5 / pace):g}\n'
                f"step_down_s = {10 / pace:g}\nstep_up_s = {60 / pace:g}\n"
            ),
        )
        with Daemon(folder, SHORT_TRIALS + off) as daemon:
            chosen = daemon.add(bundle(folder / "m.edgemodel"))["chosen"]
            daemon.settle()
            seen, stop = Seen(), threading.Event()
            threads = [threading.Thread(target=client, args=(daemon, seen, stop)) for _ in range(CLIENTS)]
            (folder / "config.toml").write_text(SHORT_TRIALS + on)
            assert daemon.process is not None
            seen.began = time.monotonic()
            daemon.process.send_signal(signal.SIGHUP)
            for thread in threads:
                thread.start()
            events = watch(daemon, seen.began, length_s)
            governor = daemon.ask("GET", "/v1/status")["governor"]
            stop.set()
            for thread in threads:
                thread.join()
    return judge(seen, events, governor, chosen, length_s)


def watch(daemon: Daemon, began: float, length_s: float) -> list[dict[str, Any]]:
    """Changes of the levels as ``status`` tells them, until the hour is over and what follows it has settled."""
    events: list[dict[str, Any]] = []
    before: dict[str, int] = {}
    while (now := time.monotonic() - began) < length_s * 1.15:
        governor = daemon.ask("GET", "/v1/status")["governor"]
        levels = {cause: level["level"] for cause, level in governor["levels"].items()}
        if levels != before:
            why = "; ".join(level["why"] for level in governor["levels"].values() if level["level"])
            events.append({"at": now, "levels": levels, "why": why})
            before = levels
        time.sleep(0.05)
    return events


def judge(
    seen: Seen, events: list[dict[str, Any]], governor: dict[str, Any], chosen: str, length_s: float
) -> dict[str, Any]:
    switches = seen.switches()
    variants = Counter(variant for _, variant, _ in seen.answers)
    rows = [
        *({"at": event["at"], "what": f"levels {event['levels']} {event['why']}"} for event in events),
        *({"at": at, "what": f"{variant} answers"} for at, variant in switches),
    ]
    for row in rows:
        row["minute"] = round(row["at"] / length_s * 60, 1)
        row["degrees"] = round(degrees(min(HOUR_S, row["at"] / length_s * HOUR_S)))
    held = {
        "no request failed": not seen.errors,
        "every answer said truly what it was": not seen.untrue,
        "variants stepped down": variants["middle"] > 0 and variants["rough"] > 0,
        "the chosen one came back": bool(switches)
        and switches[-1][1] == "fine"
        and not any(events[-1]["levels"].values()),
        f"at most {MOST_SWITCHES} switches": governor["switches"] <= MOST_SWITCHES,
    }
    return {
        "chosen": chosen,
        "seconds": length_s,
        "answers": len(seen.answers),
        "failed": len(seen.errors),
        "errors": sorted(set(seen.errors))[:5],
        "by_variant": dict(variants),
        "degraded_share": round(sum(degraded for *_, degraded in seen.answers) / max(1, len(seen.answers)), 3),
        "switches": governor["switches"],
        "level_changes": governor["changes"],
        "course": sorted(rows, key=lambda row: row["at"]),
        "held": held,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'minute':>7} {'heat':>5}  what happened")
    for row in result["course"]:
        print(f"{row['minute']:>7.1f} {row['degrees']:>4}°  {row['what']}")
    print(
        f"\n{result['answers']} answers, {result['failed']} failed; {result['by_variant']}; "
        f"{result['switches']} switches, {result['level_changes']} changes of level"
    )
    for what, kept in result["held"].items():
        print(f"{'ok  ' if kept else 'MISS'} {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the hour in 25 seconds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = replay(25.0 if arguments.quick else 60.0)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0 if all(result["held"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
