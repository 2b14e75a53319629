"""The whole life of an installed service on a booted machine: install, upgrade, a bad upgrade, uninstall, purge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import onnx_models
from tests.deploy.conftest import INSTALL, Releases
from tests.deploy.machine import boot

pytestmark = [pytest.mark.slow, pytest.mark.main_only]
#: A core that dies while it starts.
BROKEN = ("agent/core/daemon.py", "def run_core(", "raise SystemExit('error: cannot start')\n\n\ndef run_core(")


@pytest.fixture(scope="module")
def seen(releases: Releases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("machine")
    binds = []
    for version, changes in (("0.1.0", ()), ("0.1.1", ()), ("0.1.2", (BROKEN,))):
        binds.append((releases.make(version, *changes), f"wheels-{version}"))
        (folder / f"wheels-{version}").mkdir()
    shutil.copy(Path(__file__).with_name("booted.py"), folder)
    shutil.copy(INSTALL, folder)
    (folder / "linear.onnx").write_bytes(onnx_models.linear())
    (folder / "x.json").write_text(json.dumps([[1.0] * 16]))
    return boot(folder, "service", *binds)


def test_one_command_and_the_device_answers(seen: dict[str, Any]) -> None:
    assert seen["before"] == []
    assert seen["install"]["rc"] == 0, seen["install"]
    assert seen["states"] == ["active"] * 4
    assert seen["added"]["rc"] == 0, (seen["added"], seen["journal"])
    assert len(seen["answer"]["outputs"]["y"][0]) == 4
    assert (seen["core"]["User"], seen["link"]["User"]) == ("edge-agent", "edge-agent-link")
    levels = {finding["level"] for finding in seen["doctor"]["json"]["findings"]}
    assert levels <= {"ok", "note"}, seen["doctor"]["out"]


def test_link_has_a_fifth_of_what_core_has_and_memory_has_limits(seen: dict[str, Any]) -> None:
    core, link = seen["core"], seen["link"]
    assert core["Slice"] == link["Slice"] == "edgeagent.slice"
    assert int(core["CPUWeight"]) == 5 * int(link["CPUWeight"])
    assert core["DropInPaths"].endswith("50-device.conf")
    assert int(core["MemoryHigh"]) < int(core["MemoryMax"]) < int(seen["detect"]["json"]["mem_total_mb"]) << 20


def test_it_says_first_what_it_does_and_a_second_run_does_nothing(seen: dict[str, Any]) -> None:
    said = seen["install"]["out"].splitlines()
    planned = [line.removeprefix("  - ") for line in said if line.startswith("  - ")]
    done = [line.removeprefix("doing: ") for line in said if line.startswith("doing: ")]
    assert planned == done and len(done) > 8
    assert seen["again"]["rc"] == 0
    assert "nothing to do: it is installed like that" in seen["again"]["out"], seen["again"]
    assert seen["left alone"], "core runs on"


def test_an_upgrade_loses_no_request_and_keeps_state_and_configuration(seen: dict[str, Any]) -> None:
    assert seen["upgrade"]["rc"] == 0, seen["upgrade"]
    assert seen["version"]["version"] == "0.1.1"
    answers, failures, _ = seen["asked"]
    assert answers > 20 and failures == []
    assert seen["answer after upgrade"]["outputs"] == seen["answer"]["outputs"]
    assert seen["state kept"]
    assert "debug" in seen["config kept"]


def test_a_version_that_cannot_start_gives_way_to_the_one_before(seen: dict[str, Any]) -> None:
    assert seen["bad upgrade"]["rc"] == 1
    assert "error: cannot start version 0.1.2: 0.1.1 is back in its place" in seen["bad upgrade"]["err"]
    assert seen["version after bad upgrade"]["version"] == "0.1.1"
    assert seen["current"] == ["0.1.1", "0.1.0"]
    assert seen["answer after bad upgrade"]["outputs"] == seen["answer"]["outputs"]


def test_doctor_names_what_was_damaged_and_its_mend(seen: dict[str, Any]) -> None:
    findings = {(row["check"], row["text"].split()[0]): row for row in seen["doctor of damage"]["json"]["findings"]}
    assert findings["unit", "the"]["mend"] == "systemctl enable edge-agent.target"
    assert findings["unit", "/etc/systemd/system/edge-agent-link.service"]["level"] == "warning"
    assert "0666" in findings["socket", "/run/edge-agent/infer.sock"]["text"]
    assert "50-device.conf" in findings["devices", "the"]["mend"]


def test_a_device_from_an_image_writes_its_drop_in_itself(seen: dict[str, Any]) -> None:
    assert seen["device unit"]["rc"] == 0, seen["device unit"]
    assert "MemoryMax=" in seen["drop-in"]
    assert seen["limits"]["MemoryMax"] == seen["core"]["MemoryMax"]


def test_uninstall_leaves_state_and_configuration_and_they_serve_again(seen: dict[str, Any]) -> None:
    assert seen["uninstall"]["rc"] == 0, seen["uninstall"]
    assert seen["left"] == ["/etc/edge-agent", "/var/lib/edge-agent", "/var/lib/edge-agent-link"]
    assert seen["state after uninstall"]
    assert "nothing to do" in seen["uninstall again"]["out"]
    assert seen["installed again"]["rc"] == 0, seen["installed again"]
    assert seen["answer of what was kept"]["outputs"] == seen["answer"]["outputs"]


def test_purge_leaves_nothing(seen: dict[str, Any]) -> None:
    assert seen["purge"]["rc"] == 0, seen["purge"]
    assert seen["left after purge"] == [] and seen["users after purge"] == []
