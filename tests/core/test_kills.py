"""Killed in the middle of an operation: the daemon opens its store again and nothing that was reported is lost.

``benchmarks/kills.py`` does it, here with fewer kills; its text says what must hold after each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.core.conftest import ROOT

STEPS = ["add", "activate", "rollback", "rotate-key", "gc", "remove"]


def killed(kills: int, seed: int) -> dict:
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", "--json", "--quick", "--kills", str(kills), "--seed", str(seed)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


def require_nothing_lost(report: dict, kills: int) -> None:
    assert [row["step"] for row in report["steps"]] == STEPS
    assert [problem for row in report["steps"] for problem in row["violations"]] == []
    assert sum(row["landed"] for row in report["steps"]) == kills
    for row in report["steps"]:
        assert row["before"] + row["under_way"] + row["after"] == row["landed"] >= kills // len(STEPS)


def test_two_kills_in_each_operation_lose_nothing():
    require_nothing_lost(killed(12, seed=3), 12)


@pytest.mark.slow
@pytest.mark.long
def test_forty_kills_lose_nothing():
    require_nothing_lost(killed(42, seed=4), 42)
