"""The limits that control groups set on this process: memory, CPU time, CPUs.

Those of the own group and of every group above it apply, so the smallest counts. Where the own path does not exist
below the mount (a container sees its own group as the mount's top), the files at the top are the own group's.
Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/{memory,cpusets}.rst, cgroups(7).
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.hardware.parse import cgroup_paths, cpu_list, cpu_quota, memory_limit
from agent.hardware.tree import Tree

_MOUNT = "sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class Limits:
    """What applies, None where nothing does. ``memory_bytes``; ``cpus``: CPUs' worth of time; ``cpuset``: CPU ids."""

    memory_bytes: int | None = None
    cpus: float | None = None
    cpuset: tuple[int, ...] | None = None
    version: str | None = None


def read_limits(tree: Tree, online: tuple[int, ...] | None) -> Limits:
    """The smallest limits along the own group's path, of both hierarchies where both are mounted."""
    paths = cgroup_paths(tree.text("proc/self/cgroup", 1 << 16))
    folders = tree.names(_MOUNT)
    hybrid = "unified" in folders
    groups = _groups(tree, f"{_MOUNT}/unified" if hybrid else _MOUNT, paths.get(""))
    memory = [_memory(tree, f"{group}/memory.max") for group in groups]
    quotas = [_quota_v2(tree, f"{group}/cpu.max") for group in groups]
    sets = [_cpuset(tree, (f"{group}/cpuset.cpus.effective",)) for group in groups]
    mounts = {name: _mount_of(folders, name) for name in ("memory", "cpu", "cpuset")}
    memory += [_memory(tree, f"{group}/memory.limit_in_bytes") for group in _v1(tree, mounts, paths, "memory")]
    quotas += [_quota_v1(tree, group) for group in _v1(tree, mounts, paths, "cpu")]
    sets += [
        _cpuset(tree, (f"{group}/cpuset.effective_cpus", f"{group}/cpuset.cpus"))
        for group in _v1(tree, mounts, paths, "cpuset")
    ]
    cpuset = _narrowest(sets, online)
    if online and cpuset is not None and len(cpuset) < len(online):
        quotas.append(float(len(cpuset)))
    return Limits(
        memory_bytes=min((limit for limit in memory if limit is not None), default=None),
        cpus=min((quota for quota in quotas if quota is not None), default=None),
        cpuset=cpuset,
        version=_version(folders, hybrid=hybrid, v1=any(mounts.values())),
    )


def own_groups(tree: Tree) -> list[str]:
    """The folders of the unified hierarchy from below its top down to the own group; the top itself has no limits."""
    path = cgroup_paths(tree.text("proc/self/cgroup", 1 << 16)).get("")
    mount = f"{_MOUNT}/unified" if "unified" in tree.names(_MOUNT) else _MOUNT
    groups = _groups(tree, mount, path)
    return [group for group in groups if tree.exists(f"{group}/memory.current")]


def _version(folders: tuple[str, ...], *, hybrid: bool, v1: bool) -> str | None:
    if v1:
        return "hybrid" if hybrid else "v1"
    return "v2" if any(name.startswith("cgroup.") for name in folders) else None


def _mount_of(folders: tuple[str, ...], controller: str) -> str | None:
    """The folder of a v1 controller: its own name, or mounted together with others (``cpu,cpuacct``)."""
    matches = [name for name in folders if controller in name.split(",")]
    return f"{_MOUNT}/{matches[0]}" if matches else None


def _v1(tree: Tree, mounts: dict[str, str | None], paths: dict[str, str], controller: str) -> list[str]:
    mount = mounts[controller]
    return _groups(tree, mount, paths.get(controller)) if mount else []


def _groups(tree: Tree, mount: str, path: str | None) -> list[str]:
    """The folders from the mount's top down to the own group."""
    groups = [mount]
    if path and tree.exists(f"{mount}/{path}"):
        for part in path.split("/"):
            groups.append(f"{groups[-1]}/{part}")
    return groups


def _memory(tree: Tree, path: str) -> int | None:
    text = tree.line(path)
    limit = memory_limit(text)
    if text not in {None, "max", "-1"} and limit is None and not (text or "").isdigit():
        tree.note(f"{path}: not a memory limit, ignored")
    return limit


def _quota_v2(tree: Tree, path: str) -> float | None:
    text = tree.line(path)
    if text is None:
        return None
    quota, _, period = text.partition(" ")
    # A period that is left out is the kernel's default of 100 ms.
    return _quota(tree, path, quota, period or "100000")


def _quota_v1(tree: Tree, group: str) -> float | None:
    quota = tree.line(f"{group}/cpu.cfs_quota_us")
    period = tree.line(f"{group}/cpu.cfs_period_us")
    return None if quota is None else _quota(tree, f"{group}/cpu.cfs_quota_us", quota, period or "100000")


def _quota(tree: Tree, path: str, quota: str, period: str) -> float | None:
    value = cpu_quota(quota, period)
    if value is None and quota not in {"max", "-1"}:
        tree.note(f"{path}: not a CPU quota, ignored")
    return value


def _cpuset(tree: Tree, paths: tuple[str, ...]) -> tuple[int, ...] | None:
    text = next((line for path in paths if (line := tree.line(path)) is not None), None)
    cpus = cpu_list(text)
    if text is not None and cpus is None:
        tree.note(f"{paths[0]}: not a list of CPUs, ignored")
    return cpus


def _narrowest(sets: list[tuple[int, ...] | None], online: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The CPUs that every set on the path allows, of those online; None where no set says anything."""
    known = [frozenset(cpus) for cpus in sets if cpus]
    if not known:
        return None
    allowed = frozenset.intersection(*known, *([frozenset(online)] if online else []))
    return tuple(sorted(allowed)) or None
