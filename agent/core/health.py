"""One verdict from checks: what ``doctor`` prints, and whether ``status`` says healthy.

A finding tells what was found, what it means and what mends it. Checks only look; they change nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from agent.base.errors import AgentError
from agent.core.device import Device
from agent.hardware.facts import Facts
from agent.infer.landlock import abi_version
from agent.infer.runtimes.probe import RuntimeState
from agent.selection.inventory import install_hint
from agent.store.store import Store

Level = Literal["ok", "note", "warning", "error"]
_ORDER: tuple[Level, ...] = ("ok", "note", "warning", "error")
_LEAST_FREE_BYTES = 64 << 20
_EARLIEST_YEAR = 2024


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's answer. ``mend`` is empty where there is nothing to do."""

    check: str
    level: Level
    text: str
    mend: str = ""


def verdict(findings: Iterable[Finding]) -> str:
    """``healthy``, ``degraded`` (a warning) or ``failing`` (an error)."""
    worst = max((_ORDER.index(finding.level) for finding in findings), default=0)
    return ("healthy", "healthy", "degraded", "failing")[worst]


def as_documents(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON objects."""
    return [asdict(finding) for finding in findings]


def check_device(device: Device) -> list[Finding]:
    """Board, profile, heat, memory."""
    facts = device.facts
    found = [Finding("profile", "warning", problem, "correct or remove the file") for problem in device.problems]
    if not facts.supported:
        found.append(Finding("device", "error", f"{facts.arch or 'this machine'} cannot run models", ""))
    else:
        found.append(Finding("device", "ok", f"{facts.board or facts.arch}, profile {device.profile.id}"))
    if facts.throttled_now:
        found.append(Finding("heat", "warning", "the device is throttled now", "cool it, or check its power supply"))
    return found


def check_swap(facts: Facts, *, locked: bool) -> list[Finding]:
    """Whether plaintext of models could reach a disk through swap."""
    areas = [area for area in facts.swap or () if area.kind != "zram"]
    if areas and not locked:
        return [
            Finding(
                "swap",
                "warning",
                f"swap on {areas[0].path} is in use and memory is not locked: decrypted models may reach the disk",
                "run as the systemd service (LimitMEMLOCK=infinity, MemorySwapMax=0), or swapoff",
            )
        ]
    return [Finding("swap", "ok", "no swap on a disk" if not areas else "memory is locked")]


def check_confinement() -> list[Finding]:
    """What trial children are confined by."""
    abi = abi_version()
    if abi == 0:
        return [
            Finding(
                "landlock",
                "warning",
                "this kernel has no Landlock: trial children are confined by seccomp alone and could read files",
                "boot with lsm=landlock,... or use a kernel of 5.13 or newer",
            )
        ]
    return [Finding("landlock", "ok", f"ABI {abi}")]


def check_runtimes(states: Mapping[str, RuntimeState], facts: Facts) -> list[Finding]:
    """At least one runtime must work; one that is there and does not work is worth a warning."""
    found = []
    for state in states.values():
        if state.usable:
            found.append(Finding("runtime", "ok", f"{state.name} {state.version}: {', '.join(state.providers)}"))
        elif state.installed:
            found.append(Finding("runtime", "warning", f"{state.name} does not work: {state.reason}", state.mend))
        else:
            found.append(Finding("runtime", "note", f"{state.name}: {state.reason}"))
    if not any(state.usable for state in states.values()):
        mend = " or ".join(dict.fromkeys(install_hint(name, facts) for name in states))
        found.append(Finding("runtime", "error", "no inference runtime works here: no model can answer", mend))
    return found


def check_store(store: Store) -> list[Finding]:
    """Key provider, recovery notes, damage, space."""
    stats, problems = store.examine()
    found = [Finding(item.code, item.level, item.text, item.mend) for item in problems]
    if stats.disk_free_bytes < _LEAST_FREE_BYTES:
        found.append(Finding("disk", "warning", f"{stats.disk_free_bytes >> 20} MB free", "free some space"))
    return found or [Finding("store", "ok", f"generation {stats.generation}, {stats.blobs} blobs")]


def check_private(folders: Iterable[Path]) -> list[Finding]:
    """Whether nobody else can look into them. One that is not there is another check's affair."""
    found = []
    for folder in folders:
        mode = stat.S_IMODE(folder.stat().st_mode) if folder.is_dir() else 0
        if mode & 0o077:
            found.append(Finding("mode", "warning", f"{folder} has mode {mode:04o}", f"chmod go-rwx {folder}"))
    return found


def check_clock(year: int) -> list[Finding]:
    """A clock without a battery starts in the past."""
    if year < _EARLIEST_YEAR:
        return [Finding("clock", "warning", f"the clock says {year}", "set it, or run a time service")]
    return [Finding("clock", "ok", str(year))]


def check_folder(path: Path) -> list[Finding]:
    """Whether the state folder is there, private, and has room. For use without a running core."""
    try:
        status = os.stat(path)
        space = os.statvfs(path)
    except OSError as error:
        return [Finding("state", "error", f"cannot use {path}: {error.strerror}", "create it, or check its owner")]
    free = space.f_bavail * space.f_frsize
    if status.st_mode & 0o077:
        return [Finding("state", "warning", f"{path} is open to others", f"chmod 700 {path}")]
    if free < _LEAST_FREE_BYTES:
        return [Finding("disk", "warning", f"{free >> 20} MB free at {path}", "free some space")]
    return [Finding("state", "ok", f"{path}, {free >> 20} MB free")]


def from_error(check: str, error: AgentError) -> Finding:
    """An error as a finding."""
    return Finding(check, "error", str(error), error.hint)
