"""What ``edge-agent detect`` prints: plain JSON with fixed keys, and a page that a person can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.hardware.document import describe, document
from agent.hardware.facts import FEATURES
from agent.hardware.probe import probe
from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir
from tests.hardware.sysroot import A55, A76, arm_board, build

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "detect.md"
PROFILES, _ = load_profiles([shipped_profiles_dir()])


def found_in(root: Path, files: dict[str, str | bytes]) -> dict[str, object]:
    facts = probe(build(root, files))
    return document(facts, choose_profile(facts, PROFILES), ["cannot read profile x.toml: id: missing"])


def test_a_person_learns_what_the_machine_is_and_what_models_may_use(tmp_path: Path) -> None:
    files = arm_board("Orange Pi 5", "xunlong,orangepi-5", "rockchip,rk3588s", cores=(A55,) * 4 + (A76,) * 4) | {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1073741824\n",
        "sys/class/thermal/thermal_zone0/type": "soc-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
    }
    text = describe(found_in(tmp_path, files))
    for part in (
        "Orange Pi 5",
        "rk3588",
        "4 x Cortex-A55 + 4 x Cortex-A76",
        "the fast ones are 4-7",
        "CPUs 4-7 with 4 threads",
        "limited to 1024",
        "models may take 614",
        "rknpu (its driver is not there",
        "48.5 °C",
        "id: missing",
    ):
        assert part in " ".join(text.split())
    assert all(len(line) <= 100 for line in text.split("\n"))


@pytest.mark.parametrize("files", [{}, {"cmd/uname_m.txt": "riscv64\n"}, {"cmd/uname_m.txt": "armv7l\n"}])
def test_a_machine_that_tells_little_still_gets_a_page(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    found = found_in(tmp_path, files)
    assert "Unknown board" in describe(found)
    assert set(found["features"]) == set(FEATURES)  # type: ignore[call-overload]
    json.dumps(found, allow_nan=False)


def test_every_key_is_in_the_reference() -> None:
    text = REFERENCE.read_text()
    facts = probe(None)
    found = document(facts, choose_profile(facts, PROFILES))
    missing = [key for key in [*found, *found["plan"]] if f"`{key}`" not in text]
    assert missing == []
