"""What doctor finds in an installed service: the machine is a folder, made as the installer makes one, then damaged."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from agent.cli.sealing import Sealed
from agent.cli.service import CORE, LINK, PATHS, SOCKETS, TARGET, Machine, check_service
from agent.core.health import Finding
from agent.hardware.dropin import Allowance, dropin
from tests.deploy.conftest import ROOT

UNITS = ROOT / "systemd"
NOTHING = Allowance(memory_high_mb=100, memory_max_mb=200)
HAILO = Allowance(kinds=("hailo",), devices=("/dev/hailo0",), memory_high_mb=100, memory_max_mb=200)
ACTIVE = {"ActiveState": "active", "Result": "success", "NRestarts": "0", "NeedDaemonReload": "no"}
#: As systemd 252 words what our unit says.
WALLED = {
    "NoNewPrivileges": "yes",
    "PrivateNetwork": "yes",
    "ProtectSystem": "strict",
    "RestrictAddressFamilies": "AF_UNIX",
    "CapabilityBoundingSet": "",
    "User": "edge-agent",
    "PrivateDevices": "yes",
    "LimitCORE": "0",
    "WatchdogUSec": "1min",
}


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
    for name in ("etc/edge-agent", "var/lib/edge-agent", "var/lib/edge-agent-link", "var/lib/systemd"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name).chmod(0o700 if "agent" in name and "var" in name else 0o755)
    (units / f"{CORE}.d/50-device.conf").write_text(dropin(NOTHING))
    program = tmp_path / "opt/edge-agent/0.1.0/bin/edge-agent"
    program.parent.mkdir(parents=True)
    program.touch()
    (tmp_path / "opt/edge-agent/current").symlink_to("0.1.0")
    own = os.getgid()
    accounts = ("edge-agent", "edge-agent-link")
    (tmp_path / "etc/passwd").write_text("".join(f"{name}:x:{os.getuid()}:9::/:\n" for name in accounts))
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


def look(machine: Path, allowed: Allowance = NOTHING, **units: Any) -> list[Finding]:
    """Everything that is said. Nothing that this process may do is asked of the machine that it runs on."""
    given = {unit: ACTIVE | units.pop(name, {}) for unit, name in ((CORE, "core"), (LINK, "link"))}
    for unit in (*SOCKETS, *PATHS):
        given[unit] = {"ActiveState": "active"} | units.pop(unit, {})
    return check_service(Machine(allowed, given.__getitem__, machine, UNITS, **units))


def check(machine: Path, allowed: Allowance = NOTHING, **units: Any) -> list[Finding]:
    """What is not in order."""
    return [finding for finding in look(machine, allowed, **units) if finding.level != "ok"]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_service_in_order_is_a_short_line_for_each_area(machine: Path) -> None:
    found = look(machine)
    assert {finding.level for finding in found} == {"ok"}, found
    assert [finding.check for finding in found] == [
        "unit", "sandbox", "accounts", "socket", "folders", "version", "devices", "limits",
    ]  # fmt: skip
    assert all(len(finding.text) < 60 and not finding.mend for finding in found)


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
    assert check(machine) == []


def test_what_systemd_knows(machine: Path) -> None:
    found = check(machine, core={"ActiveState": "failed", "Result": "oom-kill"}, link={"NRestarts": "17"})
    assert [(finding.level, finding.text) for finding in found] == [
        ("error", f"{CORE} failed (oom-kill)"),
        ("warning", f"{LINK} has been restarted 17 times"),
    ]
    assert "journalctl" in found[0].mend
    assert "daemon-reload" in only(check(machine, core={"NeedDaemonReload": "yes"})).mend
    assert {finding.level for finding in check_service(Machine(NOTHING, lambda unit: {}, machine, UNITS))} == {"ok"}
    again = only(check(machine, core={"ActiveState": "activating", "Result": "exit-code"}))
    assert (again.level, again.text) == ("error", f"{CORE} fails again and again (exit-code)")
    assert only(check(machine, link={"ActiveState": "inactive"})).mend == f"systemctl start {TARGET}"


@pytest.mark.parametrize("unit", PATHS)
def test_nobody_who_waits_for_what_core_asks_of_root(machine: Path, unit: str) -> None:
    found = only(check(machine, **{unit: {"ActiveState": "inactive"}}))
    assert (found.level, found.text) == ("error", f"{unit} does not run")
    assert found.mend == f"systemctl start {TARGET}"
    found = only(check(machine, **{unit: {"ActiveState": "failed", "Result": "unit-start-limit-hit"}}))
    assert (found.level, found.text) == ("error", f"{unit} failed (unit-start-limit-hit)")
    (machine / "etc/systemd/system" / unit).unlink()
    assert only(check(machine)).text == f"{unit} is missing"


def test_accounts(machine: Path) -> None:
    (machine / "etc/passwd").write_text(f"edge-agent:x:{os.getuid()}:9::/:\n")
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
    assert check(machine, HAILO) == []


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


HOST = "Whxqht+dQJax1aZeCGLxmgAAAAABAAAADAAAABAAAAA="
SEALED_BY_TPM = "DHzAexF2RZGcSwvqCLwg/iAAAAABAAAADAAAABAAAAA="


@pytest.fixture
def vault(machine: Path) -> Path:
    store = machine / "etc/credstore.encrypted"
    store.mkdir(mode=0o700)
    return store


def test_a_secret_sealed_by_the_tpm_is_in_order_and_one_that_it_has_forgotten_is_lost(
    machine: Path, vault: Path
) -> None:
    (vault / "device-secret").write_text(SEALED_BY_TPM)
    assert check(machine, secrets=lambda: {"device-secret": Sealed("tpm2", "A")}) == []
    lost = {"device-secret": Sealed("tpm2", None, "cannot open it: Object is not in the TPM")}
    finding = only(check(machine, secrets=lambda: lost))
    assert (finding.level, finding.text) == ("error", "cannot open it: Object is not in the TPM")
    assert "edge-agent seal --start-over" in finding.mend


def test_the_key_of_the_machine_on_the_same_disk_and_beside_a_tpm(machine: Path, vault: Path) -> None:
    (vault / "device-secret").write_text(HOST)
    assert check(machine) == []
    (machine / "var/lib/systemd/credential.secret").touch()
    assert "who takes the disk" in only(check(machine)).text
    (machine / "dev").mkdir()
    (machine / "dev/tpmrm0").touch()
    assert only(check(machine)).mend == "edge-agent seal --to tpm2"


def test_a_move_of_the_secret_that_was_cut_off(machine: Path, vault: Path) -> None:
    (vault / "device-secret").write_text(HOST)
    (vault / "device-secret-next").write_text(SEALED_BY_TPM)
    finding = only(check(machine))
    assert finding.level == "warning" and "edge-agent seal" in finding.mend


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not look")
def test_what_an_ordinary_user_may_not_see_is_said_and_no_fault(machine: Path, vault: Path) -> None:
    (vault / "device-secret").write_text(HOST)
    for path in (machine, *machine.parents):  # pytest's own folders are closed to others
        if path.is_relative_to(tempfile.gettempdir()) and path != Path(tempfile.gettempdir()):
            path.chmod(0o755)
    os.chown(vault, 0, 0)
    os.seteuid(4711)
    try:
        found = check(machine)
    finally:
        os.seteuid(0)
    assert only(found).mend == "run doctor as root"
    assert only(found).level == "note" and "could not look" in only(found).text


# -- sandbox, folders, versions, limits, clock ------------------------------------------------------------------------


def test_a_drop_in_that_takes_walls_down_is_named(machine: Path) -> None:
    assert check(machine, core=WALLED) == []
    places = f"/etc/systemd/system/{CORE}.d/50-device.conf /etc/systemd/system/{CORE}.d/override.conf"
    loose = WALLED | {"PrivateNetwork": "no", "User": "root", "DropInPaths": places}
    finding = only(check(machine, core=loose))
    assert (finding.check, finding.level) == ("sandbox", "warning")
    assert "User=root" in finding.text and "PrivateNetwork=no" in finding.text
    assert "override.conf" in finding.mend and "50-device" not in finding.mend
    assert "AF_INET" in only(check(machine, core=WALLED | {"RestrictAddressFamilies": "AF_INET AF_UNIX"})).text
    assert "no watchdog" in only(check(machine, core=WALLED | {"WatchdogUSec": "0"})).text


def test_what_an_accelerator_needs_is_no_hole(machine: Path) -> None:
    (machine / f"etc/systemd/system/{CORE}.d/50-device.conf").write_text(dropin(HAILO))
    assert check(machine, HAILO, core=WALLED | {"PrivateDevices": "no"}) == []
    assert "PrivateDevices=no" in only(check(machine, core=WALLED | {"PrivateDevices": "no"})).text


@pytest.mark.parametrize(
    ("path", "mode"), [("etc/edge-agent", 0o777), ("run/edge-agent", 0o775), ("var/lib/edge-agent", 0o750)]
)
def test_folders_that_others_could_use(machine: Path, path: str, mode: int) -> None:
    (machine / path).chmod(mode)
    finding = only(check(machine))
    assert (finding.check, finding.text) == ("folders", f"/{path} has mode {mode:04o}")
    assert finding.mend.endswith(f"/{path}") and finding.mend.startswith("chmod go-")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_of_somebody_else(machine: Path) -> None:
    os.chown(machine / "var/lib/edge-agent", 4711, -1)
    assert only(check(machine)).mend == "chown edge-agent: /var/lib/edge-agent"


def test_versions(machine: Path) -> None:
    home = machine / "opt/edge-agent"
    (home / "previous").symlink_to("0.0.9")
    assert "0.0.9, which is gone" in only(check(machine)).text
    (home / "0.0.9").mkdir()
    assert "0.0.9 to go back to" in next(found for found in look(machine) if found.check == "version").text
    finding = only(check(machine, running="0.0.9"))
    assert finding.text == "core runs 0.0.9, and 0.1.0 is installed" and "restart" in finding.mend
    assert check(machine, running="0.1.0") == []
    (home / "current").unlink()
    (home / "current").symlink_to("0.1.0.0a1b2c3d")
    (home / "0.1.0").rename(home / "0.1.0.0a1b2c3d")
    assert check(machine, running="0.1.0") == [], "another build of the same version"
    (home / "current").unlink()
    assert only(check(machine)).text == "/opt/edge-agent/current leads to no program"


def test_limits_that_the_kernel_does_not_hold(machine: Path) -> None:
    group = machine / "sys/fs/cgroup/edgeagent.slice" / CORE
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.swap.max").write_text("0\n")
    state = {"ControlGroup": f"/edgeagent.slice/{CORE}", "MemoryMax": "209715200"}
    assert only(check(machine, core=state)).text == f"MemoryMax= of {CORE} is not in force"
    assert check(machine, core=state | {"MemoryMax": "infinity"}) == []
    (group / "memory.max").write_text("209715200\n")
    assert check(machine, core=state) == []
    (group / "memory.swap.max").write_text("max\n")
    assert "swapped out" in only(check(machine, core=state)).text


def test_a_clock_that_nothing_keeps_right(machine: Path) -> None:
    assert only(check(machine, synchronized=False)).level == "note"
    assert check(machine, synchronized=True) == []


def test_a_device_without_the_memory_group(machine: Path) -> None:
    (machine / "sys/fs/cgroup/cgroup.controllers").write_text("cpu pids\n")
    assert "cmdline.txt" in only(check(machine)).mend
