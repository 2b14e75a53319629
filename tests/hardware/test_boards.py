"""Detection against recorded machines: every case of a folder of boards, each key that its ``expected.json`` settles.

The folder is read in place: ``EDGE_AGENT_BOARDS``, or ``shared/boards`` beside the checkout. Without it the tests are
skipped, and say so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent.hardware.document import describe, document
from agent.hardware.probe import probe
from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir

BOARDS = Path(os.environ.get("EDGE_AGENT_BOARDS") or Path(__file__).resolve().parents[3] / "shared" / "boards")
CASES = sorted(path.parent for path in BOARDS.glob("*/expected.json"))

pytestmark = pytest.mark.skipif(not CASES, reason=f"no recorded boards in {BOARDS} (set EDGE_AGENT_BOARDS)")

MEGABYTES = {"mem_total_mb", "mem_available_mb", "mem_limit_mb"}
FOR_PEOPLE = {"id", "note"}


def fits(key: str, wanted: Any, found: Any) -> bool:
    """Whether an answer is right: lists without order, sizes within 1, quotas within 0.01, unnamed parts unchecked."""
    if wanted is None or found is None:
        return wanted is found
    if key == "features":
        return all(found[name] is value for name, value in wanted.items())
    if key == "accelerators":
        left = list(found)
        for entry in wanted:
            match = next((one for one in left if all(one.get(name) == value for name, value in entry.items())), None)
            if match is None:
                return False
            left.remove(match)
        return not left
    if isinstance(wanted, list):
        return sorted(map(json.dumps, wanted)) == sorted(map(json.dumps, found))
    if key in MEGABYTES:
        return abs(wanted - found) <= 1
    if key == "cpu_limit":
        return abs(wanted - found) <= 0.01
    return type(wanted) is type(found) and wanted == found


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_recorded_machine_is_told_right(case: Path) -> None:
    expected = json.loads((case / "expected.json").read_text())
    profiles, problems = load_profiles([shipped_profiles_dir()])
    facts = probe(case)
    found = json.loads(json.dumps(document(facts, choose_profile(facts, profiles), problems)))
    wrong = {
        key: {"expected": value, "found": found.get(key, "(missing)")}
        for key, value in expected.items()
        if key not in FOR_PEOPLE and not fits(key, value, found.get(key))
    }
    assert wrong == {}
    assert problems == []
    assert (facts.board or "Unknown board") in describe(found)


def test_neither_the_answer_nor_the_folder_name_is_read(tmp_path: Path) -> None:
    """A case under another name, without its answer, gives the same facts."""
    case = next((case for case in CASES if case.name == "rpi-5-8gb"), CASES[0])
    twin = tmp_path / "anything"
    for path in case.rglob("*"):
        if path.is_file() and path.name not in {"expected.json", "SOURCE.txt"}:
            target = twin / path.relative_to(case)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert probe(twin) == probe(case)
