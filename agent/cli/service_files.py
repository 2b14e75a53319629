"""Of an installed service: accounts, sockets, folders, versions, space."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from agent.cli.service import CORE, INSTALL, LINK, Machine
from agent.core.health import Finding

_USERS = ("edge-agent", "edge-agent-link")
_APPS = "edge-agent-apps"
_HOME = "opt/edge-agent"
#: Room for one more environment with ONNX Runtime, while the one before is kept.
_UPDATE_MB = 450
#: Path, owner, and the permission bits that nobody may have.
_FOLDERS = (
    ("run/edge-agent", "root", 0o022),
    ("etc/edge-agent", "root", 0o022),
    ("etc/edge-agent/config.toml", "root", 0o022),
    ("etc/edge-agent/trust.toml", "root", 0o022),
    ("etc/edge-agent/link/claim.key", "root", 0o027),
    ("var/lib/edge-agent", "edge-agent", 0o077),
    ("var/lib/edge-agent-link", "edge-agent-link", 0o077),
    (_HOME, "root", 0o022),
)


def _rows(root: Path, name: str) -> dict[str, list[str]]:
    """``etc/passwd`` or ``etc/group`` by name. Names only: what is not in them is what is asked here."""
    try:
        text = (root / "etc" / name).read_text(errors="replace")
    except OSError:
        return {}
    return {line.split(":", 1)[0]: line.split(":") for line in text.splitlines() if line.count(":") >= 3}


def check_accounts(machine: Machine) -> Iterator[Finding]:
    """Users, groups, and who is in them."""
    users, groups = _rows(machine.root, "passwd"), _rows(machine.root, "group")
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


def check_sockets(machine: Machine) -> Iterator[Finding]:
    """That they are there, and who may connect."""
    groups = _rows(machine.root, "group")
    for name, group in (("infer", _APPS), ("admin", "edge-agent-link")):
        path, unit = machine.root / f"run/edge-agent/{name}.sock", f"edge-agent-{name}.socket"
        try:
            status = path.stat()
        except FileNotFoundError:
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


def check_folders(machine: Machine) -> Iterator[Finding]:
    """Owners and modes: who could put something of his own into what root or core reads."""
    users = _rows(machine.root, "passwd")
    for name, user, forbidden in _FOLDERS:
        try:
            status = os.stat(machine.root / name)
        except FileNotFoundError:
            continue
        if stat.S_IMODE(status.st_mode) & forbidden:
            mend = f"chmod {'go-rwx' if forbidden & 0o044 else 'go-w'} /{name}"
            yield Finding("folders", "warning", f"/{name} has mode {stat.S_IMODE(status.st_mode):04o}", mend)
        owner = "0" if user == "root" else users[user][2] if user in users else None
        if owner is not None and str(status.st_uid) != owner:
            yield Finding("folders", "error", f"/{name} does not belong to {user}", f"chown {user}: /{name}")
    try:
        aside = sorted(path.name for path in (machine.root / "var/lib/edge-agent").glob("store.lost*"))
    except PermissionError:
        aside = []
    for name in aside:
        text = f"/var/lib/edge-agent/{name} is kept of a secret that was lost, and takes space"
        yield Finding("folders", "note", text, f"rm -r /var/lib/edge-agent/{name}, once nothing of it is wanted")


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Which version is in use, whether there is a way back, and whether there is room for the next."""
    home = machine.root / _HOME
    current, previous = _target(home / "current"), _target(home / "previous")
    program = home / "current/bin/edge-agent"
    if not program.exists():
        yield Finding("program", "error", "/opt/edge-agent/current leads to no program", INSTALL)
        return
    if previous and not (home / previous).is_dir():
        yield Finding("version", "warning", f"/opt/edge-agent/previous leads to {previous}, which is gone", INSTALL)
    if machine.running and current[:1].isdigit() and not _is_version(current, machine.running):
        text = f"core runs {machine.running}, and {current} is installed"
        yield Finding("version", "warning", text, f"systemctl restart {CORE} {LINK}")
    space = os.statvfs(home)
    free = space.f_bavail * space.f_frsize >> 20
    if free < _UPDATE_MB:
        text = f"{free} MB free at /opt/edge-agent: an update needs {_UPDATE_MB}"
        yield Finding("disk", "warning", text, "free some space")
    back = f", {previous} to go back to" if previous and (home / previous).is_dir() else ""
    yield Finding("version", "ok", f"{current or 'one'} in use{back}, {free} MB free")


def _is_version(name: str, version: str) -> bool:
    """A folder is named by its version; another build of the same version has eight hex digits more."""
    return name == version or (name.startswith(f"{version}.") and len(name) == len(version) + 9)


def _target(link: Path) -> str:
    try:
        return os.readlink(link).rstrip("/").rpartition("/")[2]
    except OSError:
        return ""
