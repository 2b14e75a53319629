"""What is wrong with the agent as an installed service: units, accounts, sockets, devices, credentials, control groups.

For the command line and not for core, whose sandbox hides most of it. Only looks. The machine is a folder, so that a
test can be one; what the service manager knows is asked of a callable.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agent.core.health import Finding
from agent.hardware.dropin import Allowance

CORE = "edge-agent-core.service"
LINK = "edge-agent-link.service"
TARGET = "edge-agent.target"
_OWN = "etc/systemd/system"
_UNIT_DIRS = (
    _OWN,
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
_DROPIN = f"{_OWN}/{CORE}.d/50-device.conf"
_INSTALL = "run deploy/install.sh again, or reinstall the package"
#: Base64 of the first bytes of a credential that was sealed with an empty key, as in the unit's own guard.
_EMPTY_KEY = "BYRp2vb1QySABUnaD46i+"
_USERS = ("edge-agent", "edge-agent-link")
_APPS = "edge-agent-apps"
_MANY_RESTARTS = 3

#: Properties of a unit, by name; nothing where no service manager answers.
Ask = Callable[[str], Mapping[str, str]]


def ask_systemd(unit: str) -> Mapping[str, str]:
    """What systemd knows of ``unit``."""
    try:
        done = subprocess.run(
            ["systemctl", "show", "--property=ActiveState,Result,NRestarts,NeedDaemonReload", unit],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def shipped_units() -> Path:
    """The unit files that came with this program."""
    return Path(sys.prefix, "share/edge-agent/systemd")


def check_service(allowed: Allowance, ask: Ask, root: Path = Path("/"), shipped: Path | None = None) -> list[Finding]:
    """All findings; one that it is no service where it is none."""
    if _unit(root, CORE) is None:
        mend = "deploy/install.sh makes it one: docs/how-to/install.md"
        return [Finding("service", "note", "the agent is not installed as a service", mend)]
    found = [
        *_units(root, shipped or shipped_units()),
        *_running(ask),
        *_accounts(root),
        *_sockets(root),
        *_devices(root, allowed),
        *_credentials(root),
        *_control_groups(root),
    ]
    return found or [Finding("service", "ok", "units, accounts, sockets, devices and credentials are as installed")]


def _unit(root: Path, name: str) -> Path | None:
    return next((path for folder in _UNIT_DIRS if (path := root / folder / name).is_file()), None)


def _units(root: Path, shipped: Path) -> Iterator[Finding]:
    for path in sorted(shipped.glob("edge*.*")) if shipped.is_dir() else ():
        if path.suffix in {".sysusers", ".tmpfiles"}:
            continue
        unit = _unit(root, path.name)
        if unit is None:
            yield Finding("unit", "error", f"{path.name} is missing", _INSTALL)
        elif unit.read_bytes() != path.read_bytes():
            mend = f"{_INSTALL}; settings of your own belong into a drop-in: systemctl edit {path.name}"
            yield Finding("unit", "warning", f"{unit} is not the one of this version", mend)
    if not _enabled(root):
        yield Finding("unit", "warning", "the agent does not start at boot", f"systemctl enable {TARGET}")
    program = root / "opt/edge-agent/current/bin/edge-agent"
    if not program.exists():
        yield Finding("program", "error", "/opt/edge-agent/current leads to no program", _INSTALL)


def _enabled(root: Path) -> bool:
    return any((wants / TARGET).is_symlink() for folder in _UNIT_DIRS for wants in (root / folder).glob("*.wants"))


def _running(ask: Ask) -> Iterator[Finding]:
    for unit in (CORE, LINK):
        state = ask(unit)
        if state.get("ActiveState") == "failed":
            text, mend = (
                f"{unit} failed ({state.get('Result', '?')})",
                f"journalctl -u {unit}; systemctl restart {unit}",
            )
            yield Finding("unit", "error", text, mend)
        elif (count := state.get("NRestarts", "")).isdigit() and int(count) >= _MANY_RESTARTS:
            yield Finding("unit", "warning", f"{unit} has been restarted {count} times", f"journalctl -u {unit}")
        if state.get("NeedDaemonReload") == "yes":
            mend = f"systemctl daemon-reload; systemctl restart {unit}"
            yield Finding("unit", "warning", f"{unit} was changed and the change is not in force", mend)


def _rows(root: Path, name: str) -> dict[str, list[str]]:
    """``etc/passwd`` or ``etc/group`` by name. Names only: what is not in them is what is asked here."""
    try:
        text = (root / "etc" / name).read_text(errors="replace")
    except OSError:
        return {}
    return {line.split(":", 1)[0]: line.split(":") for line in text.splitlines() if line.count(":") >= 3}


def _accounts(root: Path) -> Iterator[Finding]:
    users, groups = _rows(root, "passwd"), _rows(root, "group")
    for kind, names, known in (("user", _USERS, users), ("group", (*_USERS, _APPS), groups)):
        for name in names:
            if name not in known:
                yield Finding("accounts", "error", f"there is no {kind} {name}", "systemd-sysusers edge-agent.conf")
    for name in _USERS:
        if members := _members(groups, name):
            text = f"{members} is in the group {name}, which is for the service alone"
            yield Finding("accounts", "warning", text, f"gpasswd -d {members.split(',')[0]} {name}")
    if _APPS in groups and not _members(groups, _APPS):
        text = f"nobody is in the group {_APPS}: only root can ask for answers"
        yield Finding("accounts", "note", text, f"usermod -aG {_APPS} USER, for the user of each app")


def _members(groups: Mapping[str, list[str]], name: str) -> str:
    return groups[name][3].strip() if name in groups else ""


def _sockets(root: Path) -> Iterator[Finding]:
    groups = _rows(root, "group")
    for name, group in (("infer", _APPS), ("admin", "edge-agent-link")):
        path, unit = root / f"run/edge-agent/{name}.sock", f"edge-agent-{name}.socket"
        try:
            status = path.stat()
        except OSError:
            yield Finding("socket", "error", f"there is no /run/edge-agent/{name}.sock", f"systemctl restart {unit}")
            continue
        owner = groups[group][2] if group in groups else ""
        if status.st_mode & 0o777 != 0o660 or str(status.st_gid) != owner:
            text = (
                f"/run/edge-agent/{name}.sock has mode {status.st_mode & 0o777:04o} and is not of group {group} alone"
            )
            if str(status.st_gid) == owner:
                text = f"/run/edge-agent/{name}.sock has mode {status.st_mode & 0o777:04o} and not 0660"
            yield Finding("socket", "warning", text, f"systemctl stop {CORE}; systemctl restart {unit} {CORE}")


def _devices(root: Path, allowed: Allowance) -> Iterator[Finding]:
    mend = f"edge-agent units >/{_DROPIN}; systemctl daemon-reload; systemctl restart {CORE}"
    files = [path for folder in _UNIT_DIRS for path in (root / folder / f"{CORE}.d").glob("*.conf")]
    lines = [line for path in files for line in path.read_text(errors="replace").splitlines()]
    opened = " ".join(line.removeprefix("DeviceAllow=") for line in lines if line.startswith("DeviceAllow=")).split()
    if missing := [device for device in allowed.devices if device not in opened]:
        text = (
            f"core may not use {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} ({', '.join(allowed.kinds)})"
        )
        yield Finding("devices", "warning", text, mend)
    elif not (root / _DROPIN).is_file():
        yield Finding("devices", "note", "the unit has no limit of memory: there is no drop-in for this device", mend)


def _credentials(root: Path) -> Iterator[Finding]:
    for name in ("device-secret", "device-secret-next"):
        path = root / "etc/credstore.encrypted" / name
        shown = f"/etc/credstore.encrypted/{name}"
        try:
            head = "".join(path.read_text(errors="replace").split())[: len(_EMPTY_KEY)]
        except FileNotFoundError:
            head = ""
        except OSError as error:
            yield Finding("credential", "note", f"cannot look at {shown}: {error.strerror}", "run doctor as root")
            head = ""
        if head == _EMPTY_KEY:
            mend = f"systemd-creds encrypt --name={name} --with-key=host, or rotate to a new secret"
            yield Finding("credential", "error", f"{shown} is sealed with an empty key, which anybody has", mend)
        if (root / "etc/credstore" / name).exists():
            mend = "systemd-creds encrypt it into /etc/credstore.encrypted, then shred it"
            yield Finding("credential", "warning", f"/etc/credstore/{name} is not encrypted, and core ignores it", mend)
    folder = root / "etc/credstore.encrypted"
    if folder.is_dir() and folder.stat().st_mode & 0o077:
        text = f"/etc/credstore.encrypted has mode {folder.stat().st_mode & 0o777:04o}"
        yield Finding("credential", "warning", text, "chmod 0700 /etc/credstore.encrypted")


def _control_groups(root: Path) -> Iterator[Finding]:
    try:
        controllers = (root / "sys/fs/cgroup/cgroup.controllers").read_text().split()
    except OSError:
        return
    if "memory" not in controllers:
        yield Finding(
            "cgroups",
            "warning",
            "the memory control group is off: MemoryMax= and MemorySwapMax= have no effect",
            "append cgroup_enable=memory to the line in /boot/firmware/cmdline.txt and reboot",
        )
