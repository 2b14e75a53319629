"""Fuzzes the targets one after the other, each in a process of its own, and keeps what it finds as regression inputs.

python -m tests.fuzz [TARGET...] [--seconds N] [--engine auto|atheris|mutation] [--seed N] [--list]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.engine import LastInput
from tests.fuzz.table import TARGETS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".cache" / "fuzz"
FINDINGS = Path(__file__).parent / "findings"
#: Seconds beyond the time asked for after which a process counts as hung.
GRACE_S = 180
#: libFuzzer's exit status for a run that somebody interrupted.
INTERRUPTED = (72, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one target's run gave; ``finding`` is the kept input, or None."""

    target: str
    executions: int
    seconds: float
    corpus: int
    peak_mb: int
    finding: Path | None
    interrupted: bool = False

    @property
    def told(self) -> str:
        """In words."""
        if self.finding is not None:
            return f"FOUND {self.finding.name}"
        return "interrupted" if self.interrupted else "nothing found"


def fuzz(name: str, engine: str, seconds: float, seed: int) -> Outcome:
    """One target for so many seconds. Its own output is shown only when something was found."""
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("artifact-*"), folder / "finding"):
        old.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.engine", engine, name, str(seconds), str(folder), str(seed)]
    log = folder / "log"
    began = time.monotonic()
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=stream, stderr=stream, timeout=seconds + GRACE_S, check=False
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = -1
    elapsed = time.monotonic() - began
    text = log.read_text(errors="replace")
    interrupted = status in INTERRUPTED
    finding = keep(name, folder, text) if status and not interrupted else None
    return Outcome(name, *numbers(text, elapsed), finding, interrupted)


def numbers(text: str, elapsed: float) -> tuple[int, float, int, int]:
    """Executions, seconds, corpus and peak memory in MB, as the loop or libFuzzer tells them."""
    if found := re.search(r"(?m)^result (\{.*\})$", text):
        told = json.loads(found[1])
        return told["executions"], elapsed, told["corpus"], told["rss_mb"]
    stats = dict(re.findall(r"(?m)^stat::(\w+):\s+([0-9]+)$", text))
    corpus = re.findall(r"corp: ([0-9]+)/", text)
    executions = int(stats.get("number_of_executed_units", 0))
    return executions, elapsed, int(corpus[-1]) if corpus else 0, int(stats.get("peak_rss_mb", 0))


def keep(name: str, folder: Path, text: str) -> Path:
    """The input that ended a run, as a regression input; and what was said, for whoever looks."""
    candidates = [folder / "finding", *sorted(folder.glob("artifact-*"))]
    found = next((path.read_bytes() for path in candidates if path.exists()), None)
    if found is None:
        found = LastInput.read(folder / "last") if (folder / "last").exists() else b""
    print("\n".join(text.splitlines()[-40:])[-4000:])
    kept = FINDINGS / name / hashlib.sha1(found).hexdigest()[:12]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(found)
    print(f"kept as {kept.relative_to(ROOT)} ({len(found)} bytes); give it a telling name once it is mended")
    return kept


def main() -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="deploy/fuzz.sh", description="Fuzz the readers of untrusted bytes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default 60)")
    parser.add_argument("--engine", choices=("auto", "atheris", "mutation"), default="auto")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="to repeat a run of the built-in loop")
    parser.add_argument("--list", action="store_true", help="names of the targets, and no more")
    given = parser.parse_args()
    if given.list:
        print("\n".join(TARGETS))
        return 0
    if unknown := [name for name in given.targets if name not in TARGETS]:
        parser.error(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    engine = given.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "mutation"
    print(f"engine: {engine}, seed {given.seed}, {given.seconds:g} s a target")
    print(f"{'target':<18} {'executions':>11} {'a second':>9} {'corpus':>7} {'peak MB':>8}  result")
    outcomes = []
    for name in given.targets or TARGETS:
        outcome = fuzz(name, engine, given.seconds, given.seed)
        outcomes.append(outcome)
        rate = outcome.executions / max(outcome.seconds, 1e-3)
        row = (
            f"{name:<18} {outcome.executions:>11} {rate:>9.0f} {outcome.corpus:>7} {outcome.peak_mb:>8}  {outcome.told}"
        )
        print(row, flush=True)
    found = sum(outcome.finding is not None for outcome in outcomes)
    print(f"{len(outcomes)} targets, {sum(outcome.executions for outcome in outcomes)} executions, {found} findings")
    return 1 if found or any(outcome.interrupted for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
