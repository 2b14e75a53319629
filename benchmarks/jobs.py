"""SIGKILL at any moment of a job of the fleet, to core, link or broker: each job happens once, and its end is told.

A real device (core and link as processes, mosquitto with TLS between) is given jobs, one or a few at a time. Each
operation's own duration is measured first; then a moment is drawn evenly over it, or, for a step that was hit too
rarely, near a moment at which it was hit before, and one of the three is killed, half of the cores together with their
children. A kill lands when a job is not over: what it fell into is read from the journal afterwards. Checked is that

- no job is lost: each comes to an end that the fleet hears, and at the end nothing is left to be told,
- none is done twice: rotations are counted by the renames of the key file, restarts by the exits of core, and what
  answers after each burst is what the jobs in their order make of it (two rollbacks are no rollback),
- revisions rise, no revision has two contents, nothing is said after the end,
- of the jobs that a kill of core interrupted in a step, at least 95 % succeed.

With --cuts the path between link and broker is reset after random numbers of bytes instead of the broker being killed.

    python benchmarks/jobs.py [--json] [--kills 1000] [--jobs 2000] [--seed N] [--quick] [--cuts] [--only OP ...]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from daemon import bundle
from jobs_site import PAIR, Given, Proxy, Site

BUDGET_SUCCEEDED = 0.95
#: Kills that must land in each step, when there are this many in all.
EACH, FROM_KILLS = 20, 1000
MEASURED_RUNS = 5
#: Draws of which none lands, after which something is wrong.
MOST_DRAWS = 60
#: What a connection takes to be made, TLS and all.
HANDSHAKE_BYTES = 6_000


@dataclass(frozen=True)
class Op:
    """An operation: arguments from chance, and the names of its steps."""

    name: str
    steps: tuple[str, ...]
    args: Callable[[random.Random], dict]
    lane: str = "normal"


def _version(chance: random.Random) -> dict:
    return {"model": "pair", "version": chance.choice(PAIR)}


OPS = (
    Op("store.gc", ("collect",), lambda chance: {}),
    Op("store.scrub", ("verify",), lambda chance: {}),
    Op("store.rotate-key", ("rotate",), lambda chance: {}),
    Op("model.activate", ("activate",), _version),
    Op("model.rollback", ("activate",), lambda chance: {"model": "pair"}),
    Op("model.pin", ("pin",), lambda chance: {"model": "spare", "pinned": chance.random() < 0.5}),
    Op("model.install", ("verify", "try", "activate", "probation"), _version),
    Op("bench.run", ("try",), lambda chance: {"model": "pair"}),
    Op(
        "config.apply", ("apply", "confirm"), lambda chance: {"config": {"telemetry": {"heat_s": chance.uniform(5, 9)}}}
    ),
    Op("maintenance.plan", ("run",), lambda chance: {"run": ["disk", "ages", "sweep"]}),
    Op("cache.flush", ("flush",), lambda chance: {}),
    Op("diagnostics.collect", ("collect",), lambda chance: {}, "rescue"),
    Op("agent.restart", ("restart",), lambda chance: {}, "rescue"),
)
#: Where a job is when it is in no step.
AROUND = ("on its way", "queued", "to be told")


@dataclass
class Row:
    """What became of the kills of one kind. ``moments``: seconds after the job was given."""

    drawn: int = 0
    landed: int = 0
    moments: list[float] = field(default_factory=list)


class Expected:
    """What the device must look like, the jobs that succeeded having been done once and in their order."""

    def __init__(self) -> None:
        self.active, self.previous = PAIR[1], PAIR[0]
        self.rotations = self.restarts = 0

    def done(self, job: Given, args: dict) -> None:
        """A job has succeeded."""
        if job.op in ("model.activate", "model.install") and args["version"] != self.active:
            self.active, self.previous = args["version"], self.active
        elif job.op == "model.rollback":
            self.active, self.previous = self.previous, self.active
        self.rotations += job.op == "store.rotate-key"
        self.restarts += job.op == "agent.restart"


class Run:
    """The whole experiment."""

    def __init__(self, site: Site, chance: random.Random, ops: Sequence[Op] = OPS) -> None:
        self.site, self.chance = site, chance
        self.victims = ("core", "core", "core", "link", "path" if site.proxy else "broker")
        self.rows: dict[str, Row] = defaultdict(Row)
        self.durations: dict[str, float] = {}
        self.carried: dict[str, int] = {}
        self.expected = Expected()
        self.interrupted: set[str] = set()
        self._args: dict[str, dict] = {}
        self._connections = self._before = 0
        self.ops = ops
        for op in ops:
            for step in op.steps:
                self.rows[f"core: {op.name} {step}"] = Row()
        for victim in dict.fromkeys(self.victims):
            for place in AROUND if victim == "core" else ("on its way", "in a step"):
                self.rows[f"{victim}: {place}"] = Row()

    def set_up(self) -> None:
        """Two versions of one model to switch between, and another model."""
        folder = self.site.device.folder
        for name, version, seed in (("pair", PAIR[0], 1), ("pair", PAIR[1], 2), ("spare", "1.0.0", 3)):
            self.site.device.cli("models", "add", bundle(folder / "next.edgemodel", name, version, seed, variants=1))

    def measure(self, runs: int) -> None:
        """Seconds from giving a job to hearing its end, undisturbed."""
        for op in self.ops:
            before = self._forwarded
            took = [self.burst([op]) for _ in range(runs)]
            self.durations[op.name] = statistics.median(took)
            self.carried[op.name] = (self._forwarded - before) // runs

    @property
    def _forwarded(self) -> int:
        return self.site.proxy.forwarded if self.site.proxy else 0

    # -- bursts -------------------------------------------------------------------------------------------------------

    def burst(self, ops: list[Op], meanwhile: Callable[[list[Given]], Callable[[], None]] | None = None) -> float:
        """Give the jobs, wait for their ends, compare with what must be."""
        jobs = []
        for op in ops:
            args = op.args(self.chance)
            job = self.site.make(op.name, args, lane=op.lane)
            self._args[job.job_id] = args
            jobs.append(job)
        took = self.site.carry_out(jobs, meanwhile(jobs) if meanwhile else lambda: None)
        for job in sorted((job for job in jobs if job.state == "succeeded"), key=lambda job: int(job.job_id[1:])):
            self.expected.done(job, self._args[job.job_id])
        for job in jobs:
            if job.has_ended and job.state != "succeeded":
                self.site.violations.append(f"{job.job_id} {job.op} {job.kills}: {job.heard[-1]['error']}")
        self.compare(jobs)
        return took

    def compare(self, jobs: list[Given]) -> None:
        """What the device is, against what the jobs make of it."""
        shown = self.site.ask("/v1/models/pair")
        found = {
            "active": (shown["active"], self.expected.active),
            "previous": (shown["previous"], self.expected.previous),
            "rotations": (self.site.rotations.count(), self.expected.rotations),
        }
        for name, (is_so, must_be) in found.items():
            if is_so != must_be:
                told = [(job.job_id, job.op, job.state, job.kills) for job in jobs]
                self.site.violations.append(f"{name} is {is_so}, must be {must_be} after {told}")
        self.expected.active, self.expected.previous = shown["active"], shown["previous"]
        self.expected.rotations = found["rotations"][0]

    # -- kills --------------------------------------------------------------------------------------------------------

    def kill_once(self, wanted: list[str]) -> bool:
        """One burst with one kill; whether it landed. ``wanted``: rows that were hit too rarely."""
        name = ""
        if wanted and self.chance.random() < 0.8:
            name = self.chance.choice(wanted)
            self.rows[name].drawn += 1
            victim, _, place = name.partition(": ")
            ops = [next((op for op in self.ops if place.startswith(op.name + " ")), self.chance.choice(self.ops))]
            moments = self.rows[name].moments
        else:
            victim, moments = self.chance.choice(self.victims), []
            ops = self.chance.choices(self.ops, k=self.chance.choice((1, 1, 2, 3)))
        longest = sum(self.durations[op.name] for op in ops)
        at = self.chance.uniform(0, longest)
        if moments and self.chance.random() < 0.7:
            at = self.chance.choice(moments) * self.chance.uniform(0.85, 1.15)
        landed: list[str] = []
        self.burst(ops, lambda jobs: self._killer(victim, at, jobs, landed))
        if landed and landed[0] != name:
            self.rows[landed[0]].drawn += 1
        return bool(landed)

    def _killer(self, victim: str, at: float, jobs: list[Given], landed: list[str]) -> Callable[[], None]:
        began = time.monotonic()
        done = False
        proxy = self.site.proxy if victim == "path" else None
        if proxy is not None:
            self._plan_cut(proxy, sum(self.carried[job.op] for job in jobs))

        def is_due() -> bool:
            return proxy.connections > self._connections if proxy else time.monotonic() - began >= at

        def look() -> None:
            nonlocal done
            if not done and is_due():
                done = True
                landed.extend(self._kill(victim, time.monotonic() - began, jobs))

        return look

    def _plan_cut(self, proxy: Proxy, carried: int) -> None:
        """Within what the jobs will take of the path, and in half of the cases again while the next one is made."""
        if proxy.connections > self._connections:
            self._connections, self._before = proxy.connections, proxy.forwarded
        counts = [proxy.forwarded - self._before + self.chance.randrange(max(1, carried))]
        if self.chance.random() < 0.5:
            counts.append(self.chance.randrange(1, HANDSHAKE_BYTES))
        proxy.cut_after(*counts)

    def _kill(self, victim: str, moment: float, jobs: list[Given]) -> list[str]:
        """Kill, find out what it fell into; the row, if it landed."""
        site, mine = self.site, {job.job_id: job for job in jobs}
        if victim == "core":
            rows = site.kill_core(children_too=self.chance.random() < 0.5)
            place = self._place(mine, rows)
        else:
            ended = all(job.has_ended for job in jobs)
            place = None if ended else "in a step" if jobs[0].heard else "on its way"
            {"link": site.kill_link, "broker": site.kill_broker, "path": lambda: None}[victim]()
        if place is None:
            return []
        name = f"{victim}: {place}"
        row = self.rows[name]
        row.landed += 1
        if len(jobs) == 1:
            row.moments.append(moment)
        for job in jobs:
            job.kills.append(name)
        return [name]

    def _place(self, mine: dict[str, Given], rows: list[tuple[str, str | None, str, int]]) -> str | None:
        """By the journal: the step of the running job, else what there is to be told, else what waits."""
        known = {job_id: (step, state, told) for job_id, step, state, told in rows if job_id in mine}
        for job_id, (step, state, _) in known.items():
            if state == "running" and step is not None:
                self.interrupted.add(job_id)
                return f"{mine[job_id].op} {step}"
        if any(state == "queued" for _, state, _ in known.values()):
            return "queued"
        if any(not told for _, _, told in known.values()):
            return "to be told"
        return "on its way" if len(known) < len(mine) else None

    def go(self, kills: int, jobs: int) -> None:
        """Until so many kills have landed and so many jobs were given."""
        landed = misses = 0
        each = kills >= FROM_KILLS or len(self.ops) < len(OPS)
        wanted: list[str] = []
        while landed < kills or len(self.site.jobs) < jobs or wanted:
            bursts = max(1.0, (jobs - len(self.site.jobs)) / 1.5)
            wanted = [name for name, row in self.rows.items() if row.landed < EACH] if each else []
            if (landed < kills or wanted) and self.chance.random() < max(0.3, (kills - landed) / bursts):
                if self.kill_once(wanted):
                    landed, misses = landed + 1, 0
                else:
                    misses += 1
                    if misses > MOST_DRAWS:
                        raise RuntimeError("kills do not land any more")
            else:
                self.burst(self.chance.choices(self.ops, k=self.chance.choice((1, 2, 3))))
            if sys.stderr.isatty():
                print(f"\r{landed} kills, {len(self.site.jobs)} jobs", end="", file=sys.stderr)

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> dict:
        """What is left when all is quiet, and the report."""
        site = self.site
        deadline = time.monotonic() + 30
        while any(not told for *_, told in site.journal()) and time.monotonic() < deadline:
            site.listen()
            time.sleep(0.1)
        untold = [job_id for job_id, _, _, told in site.journal() if not told]
        still_open = [job_id for job_id, _, state, _ in site.journal() if state in ("queued", "running")]
        jobs = list(site.jobs.values())
        succeeded = sum(site.jobs[job_id].state == "succeeded" for job_id in self.interrupted)
        restarts = sum(job.op == "agent.restart" for job in jobs)
        if site.clean_exits > restarts:
            site.violations.append(f"core ended {site.clean_exits} times for {restarts} restarts")
        return {
            "jobs": len(jobs),
            "states": dict(Counter(job.state for job in jobs)),
            "lost": sum(not job.has_ended for job in jobs) + len(still_open),
            "untold": len(untold),
            "interrupted": len(self.interrupted),
            "interrupted_succeeded": succeeded,
            "documents_said_again": sum(job.again for job in jobs),
            "violations": [*site.violations, *site.complaints()],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="SIGKILLs of core, link and broker while jobs run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--kills", type=int, default=1000, help="kills that must land (default 1000)")
    parser.add_argument("--jobs", type=int, default=2000, help="jobs at least (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (default 1)")
    parser.add_argument("--quick", action="store_true", help="measure each operation once")
    parser.add_argument(
        "--cuts", action="store_true", help="cut the path at random byte counts, no kills of the broker"
    )
    parser.add_argument("--only", nargs="+", choices=[op.name for op in OPS], help="these operations")
    options = parser.parse_args()
    ops = [op for op in OPS if op.name in (options.only or [op.name for op in OPS])]
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="ea-", dir="/tmp") as folder,
        Site(Path(folder), proxied=options.cuts) as site,
    ):
        run = Run(site, random.Random(options.seed), ops)
        run.set_up()
        run.measure(1 if options.quick else MEASURED_RUNS)
        run.go(options.kills, options.jobs)
        report = {"benchmark": "jobs", "seed": options.seed, "cuts": options.cuts, **run.finish()}
    rows = run.rows
    enough = (options.kills < FROM_KILLS and not options.only) or all(row.landed >= EACH for row in rows.values())
    share = report["interrupted_succeeded"] / max(1, report["interrupted"])
    report |= {
        "kills": sum(row.landed for row in rows.values()),
        "seconds": round(time.monotonic() - began),
        "rows": {name: {"drawn": row.drawn, "landed": row.landed} for name, row in rows.items()},
        "durations_ms": {name: round(1000 * took, 1) for name, took in run.durations.items()},
        "share_succeeded": round(share, 4),
        "within_budget": enough
        and not (report["lost"] or report["untold"] or report["violations"])
        and (share >= BUDGET_SUCCEEDED or not report["interrupted"]),
    }
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["within_budget"] else 1)


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'a kill of ... fell into':40}{'drawn':>8}{'landed':>8}"]
    lines += [f"{name:40}{row['drawn']:>8}{row['landed']:>8}" for name, row in report["rows"].items()]
    lines += [f"{name}: {report[name]}" for name in ("jobs", "states", "lost", "untold", "documents_said_again")]
    lines.append(
        f"interrupted in a step: {report['interrupted']}, of which succeeded: {report['interrupted_succeeded']}"
    )
    lines += report["violations"]
    verdict = "within budget" if report["within_budget"] else "OVER BUDGET"
    return "\n".join([*lines, f"{report['kills']} kills in {report['seconds']} s, seed {report['seed']}: {verdict}"])


if __name__ == "__main__":
    main()
