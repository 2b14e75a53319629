"""Reads one machine's files and returns its ``Facts``: the live machine, or a recorded one below a root.

Invariants: with a root nothing of the live machine leaks in (what a command would have said stands in
``cmd/NAME.txt``); nothing raises for what the files hold; reads and lists are bounded. On the live machine three things
are asked of the kernel beside files: ``uname``, the scheduler's affinity, and the auxiliary vector, which confirms CPU
features.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from agent.hardware import boards, cgroup, cpuinfo, devices, parse
from agent.hardware.auxv import confirm_features
from agent.hardware.cores import LITTLE
from agent.hardware.facts import Disk, Facts
from agent.hardware.heat import read_throttle_word, read_zones
from agent.hardware.tree import Tree

_CPUS = "sys/devices/system/cpu"
_DEVICE_TREES = ("proc/device-tree", "sys/firmware/devicetree/base")
#: Folders of single CPUs are read up to this many; beyond it the machine is a server with cores of one kind.
_MOST_CPU_FOLDERS = 256


@dataclass(frozen=True, slots=True)
class _Cores:
    """What cpuinfo and ``sys/devices/system/cpu`` say together; the names are those of ``Facts``."""

    arch: str | None
    online: tuple[int, ...] | None
    types: tuple[tuple[str, int], ...] | None
    big: tuple[int, ...] | None
    big_types: tuple[str, ...] | None
    features: Mapping[str, bool | None]
    supported: bool
    emulated: bool
    max_mhz: int | None


def probe(root: Path | None = None) -> Facts:
    """The facts of the machine below ``root``; None is the live machine. NotFoundError when root is no folder."""
    tree = Tree(root)
    info = cpuinfo.parse_cpuinfo(tree.text("proc/cpuinfo", cpuinfo.MAX_BYTES) or "")
    model, compatible = _device_tree(tree)
    identity = _identity(tree, info, model, compatible)
    cores = _cores(tree, info)
    limits = cgroup.read_limits(tree, cores.online)
    memory = parse.meminfo(tree.text("proc/meminfo", 1 << 16))
    l4t = parse.l4t_release(tree.text("etc/nv_tegra_release"))
    return Facts(
        board=identity.board,
        soc=parse.soc_of(compatible),
        arch=cores.arch,
        user_bits=_user_bits(tree, cores.arch),
        cores_online=len(cores.online) if cores.online else None,
        core_types=cores.types,
        big_cores=cores.big,
        features=cores.features,
        mem_total_mb=_megabytes(memory.get("MemTotal")),
        mem_available_mb=_megabytes(_available(tree, memory)),
        mem_limit_mb=_limit_mb(memory.get("MemTotal"), limits.memory_bytes),
        cpu_limit=limits.cpus,
        accelerators=devices.accelerators(tree, compatible, identity.jetson),
        throttled_now=parse.throttled_now(read_throttle_word(tree)),
        supported=cores.supported,
        emulated=cores.emulated,
        online_cpus=cores.online,
        usable_cpus=_usable_cpus(tree, cores.online, limits.cpuset),
        big_core_types=cores.big_types,
        cpu_model=info.value("model name") if cpuinfo.family_of(info) == "x86" else None,
        max_mhz=cores.max_mhz,
        governor=tree.line(f"{_CPUS}/cpu0/cpufreq/scaling_governor"),
        compatible=compatible,
        model=model,
        page_size=_page_size(tree),
        thermal_zones=read_zones(tree),
        power_mode=read_power_mode(tree),
        disk=_disk(tree),
        tpm=devices.tpm(tree),
        kernel=_kernel(tree),
        os=parse.os_name(tree.text("etc/os-release")),
        l4t=l4t,
        jetpack=parse.jetpack_of(l4t),
        swap=devices.swap(tree),
        cgroup_version=limits.version,
        live=tree.live,
        notes=tree.notes,
    )


def _cores(tree: Tree, info: cpuinfo.CpuInfo) -> _Cores:
    arch = _arch(tree, info)
    families = cpuinfo.family_of(info), cpuinfo.family_of_arch(arch)
    foreign = None not in families and families[0] != families[1]
    if foreign:
        tree.note(f"proc/cpuinfo: describes {families[0]}, this machine is {arch}: instructions are translated")
    online = _online(tree, info)
    kinds = {} if foreign else cpuinfo.kinds_of(info, online)
    names = cpuinfo.core_names(kinds)
    features = cpuinfo.features_of(info, arch)
    if tree.live:
        features = confirm_features(features, info, arch, tree)
    frequencies = _numbers(tree, online, "cpufreq/cpuinfo_max_freq")
    little = (cpu for cpu, name in names.items() if name in LITTLE)
    big = parse.big_cores(online or (), _numbers(tree, online, "cpu_capacity"), kinds, little, frequencies)
    return _Cores(
        arch=arch,
        online=online,
        types=_core_types(tree, kinds, names),
        big=big,
        big_types=_big_types(names, big),
        features=MappingProxyType(features),
        supported=_supported(arch, features),
        emulated=foreign or any(implementer == 0 for implementer, _ in kinds.values()),
        max_mhz=max(frequencies.values(), default=0) // 1000 or None,
    )


def _device_tree(tree: Tree) -> tuple[str | None, tuple[str, ...]]:
    """Model and compatible, from the first place that has either."""
    for base in _DEVICE_TREES:
        model = parse.device_tree_string(tree.read(f"{base}/model"))
        compatible = parse.device_tree_strings(tree.read(f"{base}/compatible"))
        if model or compatible:
            return model, compatible
    return None, ()


def _identity(tree: Tree, info: cpuinfo.CpuInfo, model: str | None, compatible: tuple[str, ...]) -> boards.Identity:
    revision = boards.parse_revision(info.value("Revision"))
    hint = None
    for base in _DEVICE_TREES:
        binary = tree.read(f"{base}/system/linux,revision")
        if revision is None and binary is not None and len(binary) == 4:
            revision = int.from_bytes(binary, "big")
        hint = hint or parse.device_tree_string(tree.read(f"{base}/nvidia,dtsfilename"))
    return boards.identify(
        model,
        compatible,
        revision=revision,
        old_hardware=info.value("Hardware"),
        old_model=info.value("Model"),
        part_hint=hint,
        product_name=parse.device_tree_string(tree.read("sys/class/dmi/id/product_name")),
    )


def _arch(tree: Tree, info: cpuinfo.CpuInfo) -> str | None:
    if tree.live:
        return os.uname().machine
    word = tree.line("cmd/uname_m.txt")
    if word is not None and re.fullmatch(r"[a-z0-9_]{2,16}", word):
        return word
    if word is not None:
        tree.note("cmd/uname_m.txt: not an architecture, ignored")
    return cpuinfo.arch_of(info)


def _supported(arch: str | None, features: Mapping[str, bool | None]) -> bool:
    """64-bit ARM and x86, and 32-bit ARM unless cpuinfo shows that it has no NEON."""
    if arch in {"aarch64", "x86_64"}:
        return True
    return arch is not None and arch.startswith(("armv7", "armv8")) and features["neon"] is not False


def _online(tree: Tree, info: cpuinfo.CpuInfo) -> tuple[int, ...] | None:
    text = tree.line(f"{_CPUS}/online")
    online = parse.cpu_list(text)
    if text is not None and online is None:
        tree.note(f"{_CPUS}/online: not a list of CPUs, ignored")
    if online is None and not info.cpus and cpuinfo.kinds_of(info, None):
        return (0,)
    return online or tuple(sorted(info.cpus)) or None


def _core_types(
    tree: Tree, kinds: Mapping[int, tuple[int, int]], names: Mapping[int, str | None]
) -> tuple[tuple[str, int], ...] | None:
    """How many of each kind; None as soon as one has no name, since a partial list would mislead."""
    counts: dict[str, int] = {}
    for cpu, name in names.items():
        if name is None:
            implementer, part = kinds[cpu]
            tree.note(f"proc/cpuinfo: core 0x{implementer:02x}/0x{part:03x} has no name here")
            return None
        counts[name] = counts.get(name, 0) + 1
    return tuple(counts.items()) or None


def _big_types(names: Mapping[int, str | None], big: tuple[int, ...] | None) -> tuple[str, ...] | None:
    """The kinds among the big cores, or the one kind that there is; None when that cannot be told."""
    chosen = {names.get(cpu) for cpu in big} if big else set(names.values())
    known = sorted(name for name in chosen if name is not None)
    if len(known) != len(chosen) or not known or (big is None and len(known) > 1):
        return None
    return tuple(known)


def _numbers(tree: Tree, online: tuple[int, ...] | None, name: str) -> dict[int, int]:
    """A positive number of each online CPU's folder, by CPU; those that have none are left out."""
    if not online or len(online) > _MOST_CPU_FOLDERS:
        return {}
    values = {cpu: parse.number(tree.line(f"{_CPUS}/cpu{cpu}/{name}"), most=1 << 32) for cpu in online}
    return {cpu: value for cpu, value in values.items() if value}


def _usable_cpus(tree: Tree, online: tuple[int, ...] | None, cpuset: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if tree.live:
        return tuple(sorted(os.sched_getaffinity(0)))
    return cpuset or online


def _user_bits(tree: Tree, arch: str | None) -> int | None:
    if tree.live:
        return struct.calcsize("P") * 8
    word = tree.line("cmd/getconf_LONG_BIT.txt")
    if word in {"32", "64"}:
        return int(word)
    if word is not None:
        tree.note("cmd/getconf_LONG_BIT.txt: neither 32 nor 64, ignored")
    # A 32-bit kernel runs nothing else; a 64-bit one may run either.
    return 32 if arch is not None and re.fullmatch(r"arm.*|i[3-6]86|riscv32", arch) and arch != "arm64" else None


def _megabytes(kilobytes: int | None) -> int | None:
    return kilobytes // 1024 if kilobytes else (0 if kilobytes == 0 else None)


def _available(tree: Tree, memory: Mapping[str, int]) -> int | None:
    available = parse.available_kb(memory)
    if available is None and "MemAvailable" in memory:
        tree.note("proc/meminfo: MemAvailable exceeds MemTotal, ignored")
    return available


def _limit_mb(total_kb: int | None, cgroup_bytes: int | None) -> int | None:
    known = [value for value in (None if not total_kb else total_kb << 10, cgroup_bytes) if value is not None]
    return min(known) >> 20 if known else None


def _page_size(tree: Tree) -> int | None:
    if tree.live:
        return os.sysconf("SC_PAGE_SIZE")
    return parse.number(tree.line("cmd/getconf_PAGE_SIZE.txt"), most=1 << 30)


def _kernel(tree: Tree) -> str | None:
    if tree.live:
        return os.uname().release
    release = tree.line("cmd/uname_r.txt") or tree.line("proc/sys/kernel/osrelease")
    return release[:128] if release and release.isprintable() else None


def read_power_mode(tree: Tree) -> str | None:
    """nvpmodel's mode on a Jetson: what the command said, or what its state file and configuration say."""
    if not tree.live:
        return parse.power_mode(tree.text("cmd/nvpmodel_q.txt"))
    found = re.match(r"pmode:([0-9]{1,4})", tree.line("var/lib/nvpmodel/status") or "")
    if not found:
        return None
    number = int(found[1])
    config = tree.text("etc/nvpmodel.conf", 1 << 18) or ""
    name = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=(\S{{1,64}})\s*>", config)
    return name[1] if name else str(number)


def _disk(tree: Tree) -> Disk | None:
    """The file system for the agent's state; live only, a recorded machine's disk is not in its files."""
    if not tree.live:
        return None
    for path in ("/var/lib/edge-agent", "/var/lib", "/"):
        try:
            stats = os.statvfs(path)
        except OSError:
            continue
        return Disk(path, stats.f_blocks * stats.f_frsize >> 20, stats.f_bavail * stats.f_frsize >> 20)
    return None
