"""What doctor finds in an installed service: the machine is a folder, made as the installer makes one, then damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agent.cli.service import CORE, LINK, TARGET, check_service
from agent.core.health import Finding
from agent.hardware.dropin import Allowance, dropin
from tests.deploy.conftest import ROOT

UNITS = ROOT / "systemd"
NOTHING = Allowance(memory_high_mb=100, memory_max_mb=200)
HAILO = Allowance(kinds=("hailo",), devices=("/dev/hailo0",), memory_high_mb=100, memory_max_mb=200)
ACTIVE = {"ActiveState": "active", "Result": "success", "NRestarts": "0", "NeedDaemonReload": "no"}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """In order, with a user in the apps' group."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for path in UNITS.glob("edge*.*"):
        shutil.copy(path, units)
    (units / "multi-user.target.wants").mkdir()
    (units / "multi-user.target.wants" / TARGET).symlink_to(f"../{TARGET}")
    (units / f"{CORE}.d").mkdir()
    (units / f"{CORE}.d/50-device.conf").write_text(dropin(NOTHING))
    program = tmp_path / "opt/edge-agent/current/bin/edge-agent"
    program.parent.mkdir(parents=True)
    program.touch()
    own = os.getgid()
    (tmp_path / "etc/passwd").write_text("".join(f"{name}:x:9:9::/:\n" for name in ("edge-agent", "edge-agent-link")))
    (tmp_path / "etc/group").write_text(f"edge-agent:x:9:\nedge-agent-link:x:{own}:\nedge-agent-apps:x:{own}:camera\n")
    (tmp_path / "run/edge-agent").mkdir(parents=True)
    for name in ("infer", "admin"):
        path = tmp_path / f"run/edge-agent/{name}.sock"
        path.touch()
        path.chmod(0o660)
        os.chown(path, -1, own)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpu io memory pids\n")
    return tmp_path


def check(machine: Path, allowed: Allowance = NOTHING, **units: dict[str, str]) -> list[Finding]:
    states = {CORE: ACTIVE | units.get("core", {}), LINK: ACTIVE | units.get("link", {})}
    return check_service(allowed, lambda unit: states[unit], machine, UNITS)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_service_in_order_is_one_line(machine: Path) -> None:
    assert only(check(machine)).level == "ok"


def test_no_service_is_no_fault(tmp_path: Path) -> None:
    finding = only(check(tmp_path))
    assert finding.level == "note" and "install.sh" in finding.mend


def test_units_that_are_missing_changed_or_not_enabled(machine: Path) -> None:
    units = machine / "etc/systemd/system"
    (units / LINK).unlink()
    with (units / "edge-agent-infer.socket").open("a") as stream:
        stream.write("SocketMode=0666\n")
    (units / "multi-user.target.wants" / TARGET).unlink()
    levels = {finding.text: finding.level for finding in check(machine)}
    assert levels == {
        f"{LINK} is missing": "error",
        f"{units}/edge-agent-infer.socket is not the one of this version": "warning",
        "the agent does not start at boot": "warning",
    }


def test_a_package_has_its_units_elsewhere(machine: Path) -> None:
    elsewhere = machine / "usr/lib/systemd/system"
    elsewhere.mkdir(parents=True)
    for path in (machine / "etc/systemd/system").glob("edge*.*"):
        if path.is_file():
            path.rename(elsewhere / path.name)
    assert only(check(machine)).level == "ok"


def test_what_systemd_knows(machine: Path) -> None:
    found = check(machine, core={"ActiveState": "failed", "Result": "oom-kill"}, link={"NRestarts": "17"})
    assert [(finding.level, finding.text) for finding in found] == [
        ("error", f"{CORE} failed (oom-kill)"),
        ("warning", f"{LINK} has been restarted 17 times"),
    ]
    assert "journalctl" in found[0].mend
    assert "daemon-reload" in only(check(machine, core={"NeedDaemonReload": "yes"})).mend
    assert only(check_service(NOTHING, lambda unit: {}, machine, UNITS)).level == "ok"


def test_accounts(machine: Path) -> None:
    (machine / "etc/passwd").write_text("edge-agent:x:9:9::/:\n")
    group = machine / "etc/group"
    group.write_text(group.read_text().replace("edge-agent:x:9:", "edge-agent:x:9:eve").replace("camera", ""))
    texts = [finding.text for finding in check(machine)]
    assert texts[0] == "there is no user edge-agent-link"
    assert texts[1].startswith("eve is in the group edge-agent") and texts[2].startswith("nobody is in the group")


def test_sockets(machine: Path) -> None:
    (machine / "run/edge-agent/admin.sock").unlink()
    (machine / "run/edge-agent/infer.sock").chmod(0o666)
    levels = [(finding.level, finding.text.rpartition("/")[2]) for finding in check(machine)]
    assert levels == [("warning", "infer.sock has mode 0666 and not 0660"), ("error", "admin.sock")]


def test_an_accelerator_that_came_after_the_install(machine: Path) -> None:
    finding = only(check(machine, HAILO))
    assert "/dev/hailo0" in finding.text and "edge-agent units" in finding.mend
    (machine / f"etc/systemd/system/{CORE}.d/override.conf").write_text("[Service]\nDeviceAllow=/dev/hailo0 rw\n")
    assert only(check(machine, HAILO)).level == "ok"


def test_credentials(machine: Path) -> None:
    store = machine / "etc/credstore.encrypted"
    store.mkdir(mode=0o755)
    (store / "device-secret").write_text("BYRp2vb1Qy\nSABUnaD46i+QyvL8k8q1UyAAAAABAAAADAAAABAAAAA=")
    (machine / "etc/credstore").mkdir()
    (machine / "etc/credstore/device-secret-next").write_text("plain")
    levels = {finding.text.split()[0]: finding.level for finding in check(machine)}
    assert levels == {
        "/etc/credstore.encrypted/device-secret": "error",
        "/etc/credstore/device-secret-next": "warning",
        "/etc/credstore.encrypted": "warning",
    }
    (store / "device-secret").write_bytes(os.urandom(64))
    assert "error" not in {finding.level for finding in check(machine)}


def test_a_device_without_the_memory_group(machine: Path) -> None:
    (machine / "sys/fs/cgroup/cgroup.controllers").write_text("cpu pids\n")
    assert "cmdline.txt" in only(check(machine)).mend
