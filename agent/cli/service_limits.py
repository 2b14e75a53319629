"""Of an installed service: device nodes, limits in force, the clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent.cli.service import CORE, DROPIN, LINK, UNIT_DIRS, Machine
from agent.core.health import Finding

_GROUPS = "sys/fs/cgroup"


def check_devices(machine: Machine) -> Iterator[Finding]:
    """Whether the unit allows what detection found."""
    root, allowed = machine.root, machine.allowed
    mend = f"edge-agent units >/{DROPIN}; systemctl daemon-reload; systemctl restart {CORE}"
    files = [path for folder in UNIT_DIRS for path in (root / folder / f"{CORE}.d").glob("*.conf")]
    lines = [line for path in files for line in path.read_text(errors="replace").splitlines()]
    opened = " ".join(line.removeprefix("DeviceAllow=") for line in lines if line.startswith("DeviceAllow=")).split()
    if missing := [device for device in allowed.devices if device not in opened]:
        text = (
            f"core may not use {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} ({', '.join(allowed.kinds)})"
        )
        yield Finding("devices", "warning", text, mend)
    elif not (root / DROPIN).is_file():
        yield Finding("devices", "note", "the unit has no limit of memory: there is no drop-in for this device", mend)


def check_limits(machine: Machine) -> Iterator[Finding]:
    """Whether the kernel can bound memory, and does."""
    groups = machine.root / _GROUPS
    try:
        controllers = (groups / "cgroup.controllers").read_text().split()
    except FileNotFoundError:
        if groups.is_dir():
            mend = "boot with systemd.unified_cgroup_hierarchy=1"
            yield Finding("cgroups", "note", "control groups are of version 1: not looked at", mend)
        return
    if "memory" not in controllers:
        yield Finding(
            "cgroups",
            "warning",
            "the memory control group is off: MemoryMax= and MemorySwapMax= have no effect",
            "append cgroup_enable=memory to the line in /boot/firmware/cmdline.txt and reboot",
        )
        return
    for unit in (CORE, LINK):
        state = machine.ask(unit)
        group = groups / state.get("ControlGroup", "").strip("/")
        if not state.get("ControlGroup") or not group.is_dir():
            continue
        yield from _in_force(unit, state.get("MemoryMax", "infinity"), group)


def _in_force(unit: str, most: str, group: Path) -> Iterator[Finding]:
    mend = f"systemctl daemon-reload; systemctl restart {unit}"
    held = {name: _read(group / name) for name in ("memory.max", "memory.swap.max")}
    if most.isdigit() and held["memory.max"] == "max":
        yield Finding("limits", "warning", f"MemoryMax= of {unit} is not in force", mend)
    if held["memory.swap.max"] not in ("0", ""):
        text = f"{unit} may be swapped out: decrypted models may reach a disk"
        yield Finding("limits", "warning", text, mend)


def _read(path: Path) -> str:
    """Empty where this kernel has no such file, as without swap accounting."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def check_clock(machine: Machine) -> Iterator[Finding]:
    """Whether something keeps it right: certificates and windows go by it."""
    if machine.synchronized is False:
        mend = "systemctl enable --now systemd-timesyncd, or chrony; without a network a clock with a battery"
        yield Finding("clock", "note", "nothing keeps the clock right, or it has not succeeded yet", mend)
