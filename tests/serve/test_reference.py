"""docs/reference/http.md says what the code does: routes, statuses, limits, and its examples as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.serve.exchange import REASONS
from agent.serve.inference import Inference
from agent.serve.limits import MIB, Limits
from agent.serve.routes import RouteTable
from tests.serve.running import serving
from tests.serve.toy import ToyModels

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "http.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_routes_are_those_of_the_table() -> None:
    written = set(re.findall(r"^\| (GET|POST) \| `([^`]+)` \|", section("Routes"), re.MULTILINE))
    table = RouteTable(Inference(ToyModels(), limits=Limits()).routes())
    short = {(method, path.replace("/versions/{version}", "")) for method, path in written}
    assert {(route.method, route.pattern) for route in table.routes} == written | short


def test_the_statuses_are_those_that_are_given() -> None:
    rows = re.findall(r"^\| ([0-9, ]+) \|", section("Statuses"), re.MULTILINE)
    written = {int(status) for row in rows for status in row.split(",")}
    # 409 is for the admin socket; 2xx are not errors.
    assert written == {status for status in REASONS if status >= 400} - {409}


def test_the_limits_are_the_defaults() -> None:
    limits, text = Limits(), section("Limits")
    for row, value in {
        "to its answer": f"{limits.request_s:g} s",
        "taking an answer": f"{limits.write_s:g} s",
        "without a request": f"{limits.idle_s:g} s",
        "| body": f"{limits.body_bytes // MIB} MiB",
        "| JSON": f"{limits.json_bytes // MIB} MiB",
        "request line and header": f"{limits.head_bytes // 1024} KiB",
        "header fields": f"{limits.head_fields}",
        "connections of one user": f"{limits.connections_per_uid}, {limits.connections}",
        "bodies and answers": f"{limits.bytes_per_uid // MIB} MiB, {limits.bytes_total // MIB} MiB",
    }.items():
        line = next(line for line in text.splitlines() if row in line)
        assert f"| {value} |" in line


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_examples_print_what_they_say(short_dir: Path) -> None:
    running, _ = serving(short_dir / "infer.sock")
    block = PAGE.split("```console\n")[1].split("```")[0]
    examples = re.findall(r"^\$ (.*)\n(.*)$", block, re.MULTILINE)
    assert len(examples) == 2
    with running:
        for command, printed in examples:
            done = subprocess.run(
                ["sh", "-c", command], cwd=short_dir, capture_output=True, text=True, check=True, timeout=60
            )
            assert done.stdout == printed
