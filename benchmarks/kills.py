"""SIGKILL at any moment of add, activate, rollback, rotate-key, gc and remove: what was reported as done stays.

The real daemon on one store that lives through all of it. Each operation's own duration is measured first; then it is
begun again and again and the daemon is killed at a moment drawn evenly over that duration, half of the times together
with its children, as a power cut would. A kill counts when the operation had not answered yet. After each the daemon
is started anew and must

- open its store without a complaint, and verify clean,
- hold what it held before the operation, or what it must hold after it, and nothing between,
- answer with the right numbers, every version of every model,
- leave neither temporary files nor blobs that nothing reaches once garbage is collected,
- have left no trial child alive.

A rotation or a collection that was cut off may be under way: the next call must finish it.

    python benchmarks/kills.py [--json] [--kills 200] [--seed N] [--only STEP ...] [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from daemon import SHORT_TRIALS, Daemon, bundle, linear, sample, weights

from agent.base.errors import AgentError
from agent.store.keys import FILE_NEXT

_PR_SET_CHILD_SUBREAPER = 36
#: Undisturbed runs that tell how long a step takes.
MEASURED_RUNS = 5
#: Of kills that come too late; each draw lands with a chance of about one half or better.
MOST_DRAWS = 40
#: A child that has not confined itself yet ends when it finds its parent gone; that takes an interpreter's start.
ORPHAN_S = 10.0
JUNK_FILES = 400
KEPT_VERSIONS = 3


@dataclass(frozen=True)
class Held:
    """What the daemon says that it holds: active, previous and all versions by model; the key in use."""

    models: dict[str, tuple[str | None, str | None, frozenset[str]]]
    key_id: str

    def activated(self, name: str, version: str) -> Held:
        """After ``version`` was added to ``name`` where it was not there, and made the active one."""
        active, previous, versions = self.models.get(name, (None, None, frozenset()))
        if active != version:
            active, previous = version, active
        return replace(self, models={**self.models, name: (active, previous, versions | {version})})

    def without(self, name: str) -> Held:
        """After ``name`` was removed."""
        return replace(self, models={key: held for key, held in self.models.items() if key != name})


#: From what was held before a kill and after it: "before", "under_way", "after"; None where it is neither.
Judge = Callable[[Held, Held], "str | None"]


@dataclass(frozen=True)
class Step:
    """An operation: what makes it possible, the call, and how to tell what became of it."""

    name: str
    prepare: Callable[[], None]
    call: Callable[[], object]
    judge: Judge


@dataclass
class Row:
    """What became of one step's kills."""

    step: str
    duration_s: float = 0.0
    drawn: int = 0
    landed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def document(self) -> dict:
        return {
            "step": self.step,
            "duration_ms": round(1000 * self.duration_s, 1),
            "drawn": self.drawn,
            "landed": self.landed,
            **{name: self.outcomes[name] for name in ("before", "under_way", "after")},
            "violations": self.violations,
        }


class Device:
    """The daemon with its store, the files that are added to it, and what each version must answer."""

    def __init__(self, folder: Path) -> None:
        # Without probations: a version during whose probation the agent dies again and again is taken back.
        self.daemon = Daemon(folder, SHORT_TRIALS + "[probation]\nlocal = false\n")
        self.blobs = self.daemon.state / "store" / "blobs"
        self.next_secret = self.daemon.state / "keys" / FILE_NEXT
        self._seeds: dict[tuple[str, str], int] = {}
        self._grown = 0
        self._litter: list[str] = []

    def set_up(self) -> None:
        """Two versions of one model to switch between, one version of another that grows."""
        for version in ("1.0.0", "2.0.0"):
            self.add("pair", version, variants=1)
        self.add_next()

    def add(self, name: str, version: str, variants: int) -> None:
        seed = len(self._seeds)
        path = bundle(self.daemon.folder / "next.edgemodel", name, version, seed, variants)
        self._seeds[name, version] = seed
        self.daemon.add(path)

    def add_next(self) -> None:
        """The next version of ``grown``: two variants, tried against each other."""
        self.add("grown", f"{self._grown}.0.0", variants=2)

    def trim(self) -> None:
        """Another number for the next version, and none too many before it."""
        self._grown += 1
        shown = self.daemon.ask("GET", "/v1/models/grown") if self.held().models.get("grown") else None
        spare = [v for v in shown["versions"] if v not in (shown["active"], shown["previous"])] if shown else []
        for version in spare[: max(0, len(spare) - KEPT_VERSIONS)]:
            self.daemon.ask("DELETE", f"/v1/models/grown?version={version}")

    def switch(self) -> None:
        """Let the other version of ``pair`` answer."""
        self.daemon.ask("POST", "/v1/models/pair/activate", {"version": self.other()})

    def other(self) -> str:
        return "1.0.0" if self.held().models["pair"][0] == "2.0.0" else "2.0.0"

    def have_spare(self) -> None:
        """A model that can be removed."""
        if "spare" not in self.held().models:
            path = self.daemon.folder / "spare.onnx"
            self._seeds["spare", "1.0.0"] = seed = len(self._seeds)
            path.write_bytes(linear(seed))
            version = self.daemon.add(path, "spare")["version"]
            self._seeds["spare", version] = seed

    def litter(self) -> None:
        """Payloads that nothing reaches, as a cut-off installation leaves them."""
        self._litter = [os.urandom(32).hex() for _ in range(JUNK_FILES)]
        for name in self._litter:
            (self.blobs / name).write_bytes(bytes(1024))

    def held(self) -> Held:
        """What it says now."""
        models = {}
        for name in {row["name"] for row in self.daemon.ask("GET", "/v1/models")["models"]}:
            shown = self.daemon.ask("GET", f"/v1/models/{name}")
            models[name] = (shown["active"], shown["previous"], frozenset(shown["versions"]))
        return Held(models, self.daemon.ask("GET", "/v1/store")["key_id"])

    def steps(self) -> list[Step]:
        """The operations in turn."""
        ask = self.daemon.ask
        added = one_of_two(lambda held: held.activated("grown", f"{self._grown}.0.0"))
        switched, removed = one_of_two(_switched), one_of_two(lambda held: held.without("spare"))
        return [
            Step("add", self.trim, self.add_next, added),
            Step("activate", lambda: None, self.switch, switched),
            Step("rollback", lambda: None, lambda: ask("POST", "/v1/models/pair/rollback", {}), switched),
            Step("rotate-key", lambda: None, lambda: ask("POST", "/v1/store/rotate-key", {}), self.rotated),
            Step("gc", self.litter, lambda: ask("POST", "/v1/store/gc", {}), self.collected),
            Step("remove", self.have_spare, lambda: ask("DELETE", "/v1/models/spare"), removed),
        ]

    def rotated(self, before: Held, held: Held) -> str | None:
        """Under way as long as there is a next secret: all is readable, and another call finishes it."""
        if held.models != before.models:
            return None
        if self.next_secret.exists():
            return "under_way"
        return "before" if held.key_id == before.key_id else "after"

    def collected(self, before: Held, held: Held) -> str | None:
        """By the litter that is left."""
        left = sum((self.blobs / name).exists() for name in self._litter)
        if held != before:
            return None
        return "before" if left == len(self._litter) else "under_way" if left else "after"

    # -- what must hold after a kill ------------------------------------------------------------------------------

    def wrong_answers(self, held: Held) -> Iterator[str]:
        """Every version of every model is asked; the active one also without naming it."""
        with self.daemon.client() as client:
            for name, (active, _, versions) in held.models.items():
                for version in (None, *sorted(versions)):
                    expected = sample() @ weights(self._seeds[name, version or active or ""])
                    try:
                        answer = client.infer(name, {"x": sample()}, version=version)
                    except AgentError as error:
                        yield f"{name} {version or '(active)'} does not answer: {error}"
                        continue
                    if answer.model_version != (version or active) or not np.allclose(answer["y"], expected, rtol=1e-4):
                        yield f"{name} {version or '(active)'} answers wrongly, as {answer.model_version}"
                    if answer.parameters["degraded"]:
                        yield f"{name} {version or '(active)'} answers degraded"

    def leftovers(self) -> Iterator[str]:
        """What lies in the state folder and belongs to nothing, garbage having been collected."""
        self.daemon.ask("POST", "/v1/store/gc", {})
        stats = self.daemon.ask("GET", "/v1/store")
        if stats["unreached_bytes"]:
            yield f"{stats['unreached_bytes']} bytes that nothing reaches are left"
        if stats["damaged"]:
            yield f"{stats['damaged']} parts are marked damaged"
        files = len(list(self.blobs.iterdir()))
        if files != 2 * stats["blobs"]:
            yield f"{files} files for {stats['blobs']} blobs"
        yield from (f"temporary file {path.name} is left" for path in self.daemon.state.rglob(".tmp-*"))


def one_of_two(change: Callable[[Held], Held]) -> Judge:
    """Wholly there or not at all."""

    def judge(before: Held, held: Held) -> str | None:
        return "before" if held == before else "after" if held == change(before) else None

    return judge


def _switched(held: Held) -> Held:
    active, previous, versions = held.models["pair"]
    other = previous or "1.0.0"
    return replace(held, models={**held.models, "pair": (other, active, versions)})


def main() -> None:
    parser = argparse.ArgumentParser(description="SIGKILLs drawn over the durations of the operations")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--kills", type=int, default=200, help="kills that must land, in all (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments that are drawn (default 1)")
    parser.add_argument("--quick", action="store_true", help="measure each step once")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="this step; may be repeated")
    options = parser.parse_args()
    # Orphans of a killed daemon become our children, so that none can hide from us.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder:
        device = Device(Path(folder))
        with device.daemon:
            rows = run(
                device, options.kills, random.Random(options.seed), options.only, 1 if options.quick else MEASURED_RUNS
            )
    report = {
        "benchmark": "kills",
        "seed": options.seed,
        "kills": sum(row.landed for row in rows),
        "seconds": round(time.monotonic() - began),
        "steps": [row.document() for row in rows],
        "within_budget": not any(row.violations for row in rows) and sum(row.landed for row in rows) >= options.kills,
    }
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


def run(device: Device, kills: int, chance: random.Random, only: list[str], measured_runs: int) -> list[Row]:
    """Measure each step, then kill it, the steps taking turns."""
    device.set_up()
    steps = [step for step in device.steps() if not only or step.name in only]
    rows = [Row(step.name, measured(device, step, measured_runs)) for step in steps]
    for number in range(kills):
        row = rows[number % len(steps)]
        kill(device, steps[number % len(steps)], row, chance)
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{kills} {row.step:12}", end="", file=sys.stderr)
    return rows


def measured(device: Device, step: Step, runs: int) -> float:
    """Median seconds of the step, undisturbed."""
    took = []
    for _ in range(runs):
        step.prepare()
        began = time.perf_counter()
        step.call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def kill(device: Device, step: Step, row: Row, chance: random.Random) -> None:
    """Draw moments until one lands before the answer; check what the daemon holds afterwards."""
    for _ in range(MOST_DRAWS):
        step.prepare()
        before = device.held()
        operation = Operation(step.call)
        row.drawn += 1
        answered = operation.wait(chance.uniform(0, row.duration_s))
        if not answered:
            orphans = kill_daemon(device.daemon, children_too=chance.random() < 0.5)
            answered = operation.join()  # the answer may have been on its way
            where = f"{step.name}, kill {row.landed + 1}"
            row.violations += [
                f"{where}: {problem}" for problem in [*orphans, *check(device, step, before, answered, row)]
            ]
        if answered:
            continue
        row.landed += 1
        return


def check(device: Device, step: Step, before: Held, answered: bool, row: Row) -> Iterator[str]:
    """Start again and compare with what was reported before the kill."""
    already_logged = device.daemon.log.stat().st_size
    try:
        device.daemon.start()
    except RuntimeError as error:
        yield f"does not start: {error}"
        raise
    device.daemon.settle()
    told = device.daemon.log.read_bytes()[already_logged:].decode()
    yield from (f"complains: {line}" for line in told.splitlines() if " W " in line or " E " in line)
    verified = device.daemon.ask("POST", "/v1/store/verify", {})
    if not verified["ok"]:
        yield f"damaged: {verified['damaged']}"
    held = device.held()
    outcome = step.judge(before, held)
    if outcome is None or (answered and outcome != "after"):
        yield f"holds {held}, before it was {before}, answered: {answered}"
    if not answered:
        row.outcomes[outcome or "wrong"] += 1
    if outcome == "under_way":
        step.call()
        if step.judge(before, device.held()) != "after":
            yield "the next call did not finish it"
    yield from device.wrong_answers(held)
    yield from device.leftovers()


class Operation(threading.Thread):
    """A call in a thread of its own, which the kill may cut off."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self._answered = False
        self._error: AgentError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except AgentError as error:
            self._error = error
        else:
            self._answered = True

    def wait(self, seconds: float) -> bool:
        """Whether it answers within that time. RuntimeError when it is refused, with nobody killed."""
        super().join(seconds)
        if self._error is not None:
            raise RuntimeError("an undisturbed operation failed") from self._error
        return self._answered

    def join(self, timeout: float | None = None) -> bool:  # type: ignore[override]
        """Whether it had answered in the end."""
        super().join(timeout)
        return self._answered


def kill_daemon(daemon: Daemon, *, children_too: bool) -> list[str]:
    """SIGKILL; says which children of it were still alive some time later."""
    ours = set(children_of(os.getpid())) - {daemon.pid}
    own = children_of(daemon.pid)
    daemon.stop(signal.SIGKILL)
    if children_too:
        for pid in own:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    end = time.monotonic() + ORPHAN_S
    while orphans := reap(set(children_of(os.getpid())) - ours):
        if time.monotonic() > end:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            return [f"child {pid} outlived it by {ORPHAN_S:g} s" for pid in orphans]
        time.sleep(0.01)
    return []


def reap(pids: set[int]) -> set[int]:
    """Those that have not ended."""
    return {pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)}


def children_of(parent: int) -> list[int]:
    """Processes whose parent that is, zombies included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text()
            except OSError:
                continue  # ended meanwhile
            if int(state.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def table(report: dict) -> str:
    """The report for people."""
    titles = ("takes ms", "drawn", "landed", "before", "under way", "after", "violations")
    lines = [f"{'step':12}" + "".join(f"{title:>11}" for title in titles)]
    for row in report["steps"]:
        counts = [row[name] for name in ("drawn", "landed", "before", "under_way", "after")]
        cells = [row["duration_ms"], *counts, len(row["violations"])]
        lines.append(f"{row['step']:12}" + "".join(f"{cell:>11}" for cell in cells))
    lines += [problem for row in report["steps"] for problem in row["violations"]]
    verdict = "within budget" if report["within_budget"] else "OVER BUDGET"
    return "\n".join(
        [*lines, f"{report['kills']} kills landed in {report['seconds']} s, seed {report['seed']}: {verdict}"]
    )


if __name__ == "__main__":
    main()
