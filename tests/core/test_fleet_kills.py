"""Core, link and broker killed while jobs run, and the path between cut: each job happens once, and its end is told.

``benchmarks/jobs.py`` does it, here with fewer kills; its text says what is checked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.core.conftest import ROOT


def killed(kills: int, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, "benchmarks/jobs.py", "--json", "--quick", f"--kills={kills}", f"--jobs={kills}", *options],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stderr
    report: dict = json.loads(done.stdout)
    return report


def hit(report: dict) -> set[str]:
    """What was killed."""
    return {name.partition(":")[0] for name, row in report["rows"].items() if row["landed"]}


def require_once_each(report: dict, kills: int) -> None:
    assert report["violations"] == []
    assert (report["lost"], report["untold"]) == (0, 0)
    assert report["kills"] >= kills
    assert report["states"] == {"succeeded": report["jobs"]}
    assert report["interrupted_succeeded"] == report["interrupted"]
    assert report["within_budget"]


def test_a_few_kills_lose_nothing() -> None:
    require_once_each(killed(4, "--seed", "7"), 4)


@pytest.mark.slow
def test_fifty_kills_lose_nothing() -> None:
    report = killed(50, "--seed", "8")
    require_once_each(report, 50)
    assert {name.partition(":")[0] for name, row in report["rows"].items() if row["landed"]} == {
        "core",
        "link",
        "broker",
    }
    assert report["interrupted"] > 5


@pytest.mark.slow
def test_thirty_kills_and_cuts_at_random_byte_counts_lose_nothing() -> None:
    report = killed(30, "--seed", "9", "--cuts")
    require_once_each(report, 30)
    assert hit(report) == {"core", "link", "path"}
