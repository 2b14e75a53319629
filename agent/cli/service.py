"""What is wrong with the agent as an installed service: units, sandbox, accounts, sockets, versions, devices, secret.

For the command line and not for core, whose sandbox hides most of it. Only looks. The machine is a folder, so that a
test can be one; what the service manager knows is asked of a callable. Where a user may not look, that is said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.cli.sealing import Sealed
from agent.core.health import Finding, Level
from agent.hardware.dropin import Allowance

CORE = "edge-agent-core.service"
LINK = "edge-agent-link.service"
SOCKETS = ("edge-agent-infer.socket", "edge-agent-admin.socket")
#: Whoever waits for what core asks of root: without them a job that updates or reboots would come to nothing.
PATHS = ("edge-agent-update.path", "edge-agent-reboot.path")
SEAL = "edge-agent-seal.service"
TARGET = "edge-agent.target"
OWN = "etc/systemd/system"
UNIT_DIRS = (
    OWN,
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
DROPIN = f"{OWN}/{CORE}.d/50-device.conf"
INSTALL = "run deploy/install.sh again, or reinstall the package"
_MANY_RESTARTS = 3

#: What must hold of both units whatever drop-ins say, as ``systemctl show`` words it. Detection may lift the last two.
_WALLS = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "ProtectProc": "invisible",
    "ProtectClock": "yes",
    "ProtectControlGroups": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "PrivateTmp": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "MemorySwapMax": "0",
    "LimitCORE": "0",
    "DynamicUser": "no",
    "PrivateDevices": "yes",
    "MemoryDenyWriteExecute": "yes",
}
_STATE = ("LoadState", "ActiveState", "Result", "NRestarts", "NeedDaemonReload", "DropInPaths", "ControlGroup")
PROPERTIES = (*_STATE, "User", "PrivateNetwork", "RestrictAddressFamilies", "MemoryMax", "WatchdogUSec", *_WALLS)

#: Properties of a unit, by name; nothing where no service manager answers.
Ask = Callable[[str], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Machine:
    """What is looked at. ``secrets`` opens the credentials, which takes root; ``running`` is the version of core that
    answers; ``synchronized`` tells whether something keeps the clock right, None where the kernel does not tell."""

    allowed: Allowance
    ask: Ask = field(repr=False)
    root: Path = Path("/")
    shipped: Path = field(default_factory=lambda: Path(sys.prefix, "share/edge-agent/systemd"))
    secrets: Callable[[], Mapping[str, Sealed]] = dict
    running: str = ""
    synchronized: bool | None = None

    def unit(self, name: str) -> Path | None:
        """Where a unit is."""
        return next((path for folder in UNIT_DIRS if (path := self.root / folder / name).is_file()), None)


def ask_systemd(unit: str) -> Mapping[str, str]:
    """What systemd knows of ``unit``."""
    try:
        done = subprocess.run(
            ["systemctl", "show", f"--property={','.join(PROPERTIES)}", unit],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def check_service(machine: Machine) -> list[Finding]:
    """All findings, and a short line for each area without one; or that it is no service where it is none."""
    from agent.cli.service_files import check_accounts, check_folders, check_sockets, check_versions  # noqa: PLC0415
    from agent.cli.service_limits import check_clock, check_devices, check_limits  # noqa: PLC0415
    from agent.cli.service_secret import check_secret  # noqa: PLC0415

    if machine.unit(CORE) is None:
        mend = "deploy/install.sh makes it one: docs/how-to/install.md"
        return [Finding("service", "note", "the agent is not installed as a service", mend)]
    found: list[Finding] = []
    for area, check, good in (
        ("unit", _units, "as shipped, enabled, running"),
        ("sandbox", _sandbox, "no drop-in takes a wall down"),
        ("accounts", check_accounts, "users and groups are right"),
        ("socket", check_sockets, "modes and groups are right"),
        ("folders", check_folders, "owners and modes are right"),
        ("version", check_versions, ""),
        ("devices", check_devices, "the unit allows what was detected"),
        ("limits", check_limits, "memory is bounded, swap is off for core"),
        ("credential", check_secret, ""),
        ("clock", check_clock, ""),
    ):
        try:
            rows = list(check(machine))
        except PermissionError as error:
            rows = [Finding(area, "note", f"could not look at {error.filename}", "run doctor as root")]
        found += rows or ([Finding(area, "ok", good)] if good else [])
    return found


# -- units ------------------------------------------------------------------------------------------------------------


def _units(machine: Machine) -> Iterator[Finding]:
    shipped = machine.shipped
    for path in sorted(shipped.glob("edge*.*")) if shipped.is_dir() else ():
        if path.suffix in {".sysusers", ".tmpfiles"}:
            continue
        unit = machine.unit(path.name)
        if _masked(machine.root / OWN / path.name):
            level: Level = "note" if path.name == SEAL else "error"
            yield Finding("unit", level, f"{path.name} is masked", f"systemctl unmask {path.name}")
        elif unit is None:
            yield Finding("unit", "error", f"{path.name} is missing", INSTALL)
        elif unit.read_bytes() != path.read_bytes():
            mend = f"{INSTALL}; settings of your own belong into a drop-in: systemctl edit {path.name}"
            yield Finding("unit", "warning", f"{unit} is not the one of this version", mend)
    if not _enabled(machine.root):
        yield Finding("unit", "warning", "the agent does not start at boot", f"systemctl enable {TARGET}")
    yield from _running(machine.ask)


def _masked(path: Path) -> bool:
    return path.is_symlink() and os.readlink(path) == "/dev/null"


def _enabled(root: Path) -> bool:
    return any((wants / TARGET).is_symlink() for folder in UNIT_DIRS for wants in (root / folder).glob("*.wants"))


def _running(ask: Ask) -> Iterator[Finding]:
    for unit in (*SOCKETS, CORE, LINK, *PATHS):
        state = ask(unit)
        active = state.get("ActiveState", "active")
        if active == "failed" or (active == "activating" and state.get("Result", "success") != "success"):
            text = f"{unit} {'failed' if active == 'failed' else 'fails again and again'} ({state.get('Result', '?')})"
            yield Finding("unit", "error", text, f"journalctl -u {unit}; systemctl restart {unit}")
        elif active in ("inactive", "deactivating"):
            yield Finding("unit", "error", f"{unit} does not run", f"systemctl start {TARGET}")
        elif (count := state.get("NRestarts", "")).isdigit() and int(count) >= _MANY_RESTARTS:
            yield Finding("unit", "warning", f"{unit} has been restarted {count} times", f"journalctl -u {unit}")
        if state.get("NeedDaemonReload") == "yes":
            mend = f"systemctl daemon-reload; systemctl restart {unit}"
            yield Finding("unit", "warning", f"{unit} was changed and the change is not in force", mend)


# -- sandbox ----------------------------------------------------------------------------------------------------------


def _sandbox(machine: Machine) -> Iterator[Finding]:
    for unit, user in ((CORE, "edge-agent"), (LINK, "edge-agent-link")):
        state = machine.ask(unit)
        if not state.get("NoNewPrivileges"):
            continue  # nobody answers
        wanted = {**_WALLS, "User": user}
        if unit == CORE:
            wanted |= {"PrivateNetwork": "yes"}
            if machine.allowed.devices:
                del wanted["PrivateDevices"]
            if machine.allowed.makes_code:
                del wanted["MemoryDenyWriteExecute"]
        down = [f"{name}={state[name]}" for name, value in wanted.items() if state.get(name, value) != value]
        foreign = set(state.get("RestrictAddressFamilies", "AF_UNIX").split()) - {"AF_UNIX", *machine.allowed.families}
        if unit == CORE and foreign:
            down.append(f"RestrictAddressFamilies={' '.join(sorted(foreign))}")
        if down:
            places = [path for path in state.get("DropInPaths", "").split() if not path.endswith("50-device.conf")]
            text = f"{unit} runs with {', '.join(down[:4])}{' …' if len(down) > 4 else ''}"
            where = f"take it out of {', '.join(places)}" if places else f"see systemctl cat {unit}"
            yield Finding("sandbox", "warning", text, f"{where}; systemctl daemon-reload; systemctl restart {unit}")
        if state.get("WatchdogUSec", "1") in ("0", "infinity"):
            yield Finding("sandbox", "warning", f"{unit} has no watchdog: one that hangs stays so", INSTALL)
