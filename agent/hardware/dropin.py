"""What the unit of core should allow on this machine, as a drop-in for systemd: nodes of accelerators, and memory.

The unit itself hides every device and allows no page that is both writable and executable. Here is what each kind of
accelerator needs instead, and no more; a machine without one keeps its unit as it is. Pure but for names in ``dev``.

Sources: systemd.exec(5), systemd.resource-control(5); the nodes are those that the drivers' udev rules make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from agent.hardware.facts import Accelerator, Facts
from agent.hardware.profiles import Profile
from agent.hardware.tree import Tree

#: What is left to the rest of the system: a tenth, within these.
_LEAST_RESERVE_MB, _MOST_RESERVE_MB = 128, 512
_FOLDERS = ("", "dri", "nvgpu", "dma_heap")


@dataclass(frozen=True, slots=True)
class Need:
    """What a kind of accelerator needs: names below ``dev`` (patterns), groups of which those that exist are taken,
    device classes of the kernel, whether its runtime makes code while it runs, and sockets to hear of devices."""

    nodes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    makes_code: bool = False
    families: tuple[str, ...] = ()


_NVIDIA = Need(("nvhost-*", "nvmap", "nvidia*", "nvgpu/*", "nvsciipc", "dri/renderD*"), ("video", "render"), (), True)
_NEEDS = {
    "cuda": _NVIDIA,
    "dla": _NVIDIA,
    "hailo": Need(("hailo*",)),
    "edgetpu": Need(("apex_*",), ("apex",)),
    # Its number on the bus changes when the firmware is loaded, so the whole class; libusb hears of that by netlink.
    "edgetpu-usb": Need((), ("plugdev",), ("char-usb_device",), families=("AF_NETLINK",)),
    "intel-igpu": Need(("dri/renderD*",), ("render",), (), True),
    "rknpu": Need(("dri/renderD*", "rknpu", "dma_heap/*"), ("render", "video")),
    "vsi-npu": Need(("galcore",), ("video",)),
    "tidl": Need(("rpmsg*", "remoteproc*", "dma_heap/*")),
}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What this machine's accelerators need of the unit, and the memory that core and its models may take at most."""

    kinds: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    makes_code: bool = False
    memory_high_mb: int | None = None
    memory_max_mb: int | None = None


def allowance(facts: Facts, profile: Profile, tree: Tree) -> Allowance:
    """Of accelerators whose driver is there; one without it gets nothing, as there is nothing to open."""
    kinds = tuple(dict.fromkeys(kind for one in facts.accelerators if one.usable and (kind := _kind(one))))
    needs = [_NEEDS[kind] for kind in kinds]
    present = _nodes(tree)
    nodes = [f"/dev/{name}" for name in present if any(_fits(name, need.nodes) for need in needs)]
    known = _groups(tree)
    high, most = memory_limits(facts, profile)
    return Allowance(
        kinds=kinds,
        devices=(*nodes, *_each(need.classes for need in needs)),
        groups=tuple(group for group in _each(need.groups for need in needs) if group in known),
        families=_each(need.families for need in needs),
        makes_code=any(need.makes_code for need in needs),
        memory_high_mb=high,
        memory_max_mb=most,
    )


def memory_limits(facts: Facts, profile: Profile) -> tuple[int | None, int | None]:
    """``MemoryHigh=`` and ``MemoryMax=`` in MiB: half-way from what models may take to the limit, and the limit.

    Core plans with the profile's share of the limit, so that it lies close to all that there is.
    """
    total = facts.mem_total_mb
    if total is None or total <= 2 * _LEAST_RESERVE_MB:
        return None, None
    most = total - min(max(total // 10, _LEAST_RESERVE_MB), _MOST_RESERVE_MB)
    return int(most * (1 + profile.memory_share) / 2), most


def dropin(allowed: Allowance) -> str:
    """The drop-in's text."""
    lines = ["# What detection found on this device; written anew by every install. Your own settings belong into"]
    lines += ['# another file: "systemctl edit edge-agent-core.service".', "[Service]"]
    if allowed.memory_max_mb is not None:
        lines += [f"MemoryHigh={allowed.memory_high_mb}M", f"MemoryMax={allowed.memory_max_mb}M"]
    if allowed.devices:
        lines += [f"# {', '.join(allowed.kinds)}", "PrivateDevices=no"]
        lines += [f"DeviceAllow={device} rw" for device in allowed.devices]
    if allowed.groups:
        lines.append(f"SupplementaryGroups={' '.join(allowed.groups)}")
    if allowed.families:
        lines.append(f"RestrictAddressFamilies={' '.join(allowed.families)}")
    if allowed.makes_code:
        lines += ["# Its runtime compiles kernels for the device while it runs.", "MemoryDenyWriteExecute=no"]
    return "\n".join(lines) + "\n"


def _kind(accelerator: Accelerator) -> str | None:
    kind = accelerator.kind
    if kind == "edgetpu" and accelerator.detail.startswith("USB"):
        kind = "edgetpu-usb"
    return kind if kind in _NEEDS else None


def _nodes(tree: Tree) -> tuple[str, ...]:
    folders = [(folder, f"dev/{folder}".rstrip("/")) for folder in _FOLDERS]
    return tuple(f"{folder}/{name}".lstrip("/") for folder, path in folders for name in tree.names(path, 4096))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Patterns are of one folder each: a ``*`` does not reach into another."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def _groups(tree: Tree) -> frozenset[str]:
    return frozenset(line.partition(":")[0] for line in (tree.text("etc/group", 1 << 16) or "").splitlines())


def _each(parts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for part in parts for item in part))
