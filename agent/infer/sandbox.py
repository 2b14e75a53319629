"""Confinement of a trial child, put on by the child itself before it touches a model.

After ``confine`` the process cannot open a file outside the given folders, create a socket, start a program, signal,
trace or read another process, gain a privilege, or outgrow its memory limit; what it holds open already (the model, the
golden set, its control socket) stays usable. Two independent walls: Landlock for files and a seccomp filter for system
calls; a kernel may lack Landlock (the answer says so), seccomp is required.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import UnsupportedError
from agent.infer import landlock, seccomp

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_SIGKILL = 9


@dataclass(frozen=True, slots=True)
class Confinement:
    """What was put on. ``landlock_abi`` is 0 where the kernel has no Landlock."""

    landlock_abi: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of the child: bytes of private writable memory, seconds of CPU time, bytes of a file that it is
    given to write (0: it writes none)."""

    data_bytes: int
    cpu_seconds: int
    file_bytes: int = 0


def confine(readable: Sequence[Path], devices: Sequence[Path], limits: Limits) -> Confinement:
    """Give up everything but reading ``readable`` and using ``devices``. UnsupportedError where seccomp is missing, or
    Landlock where a file is to be written: the filter cannot tell one file from another.

    Single-threaded use only: no_new_privs, Landlock and the filter hold for the calling thread and what it starts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_PDEATHSIG, _SIGKILL)
    with contextlib.suppress(OSError):  # masked in some containers; the memory limit below still holds
        Path("/proc/self/oom_score_adj").write_text("1000")
    _set_limits(limits)
    # A core_pattern that pipes to a program (systemd-coredump, apport) takes the dump whatever RLIMIT_CORE says, and a
    # dump of this process holds the model in the clear.
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities(libc)
    abi = landlock.restrict(readable, devices)
    if limits.file_bytes and not abi:
        raise UnsupportedError("cannot confine a child that writes: this kernel has no Landlock")
    seccomp.restrict(rewrites=limits.file_bytes > 0)
    return Confinement(landlock_abi=abi)


def interpreter_folders() -> tuple[Path, ...]:
    """What a confined interpreter must read: itself, its libraries, the agent, the dynamic linker, CPU topology."""
    own = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(__file__).resolve().parents[1]}
    # Only package folders of the path: a development checkout's root may hold anything.
    own |= {path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages") and path.is_dir()}
    system = {Path(name) for name in ("/usr", "/lib", "/lib64", "/opt/nvidia", "/sys/devices/system")}
    files = {Path(name) for name in ("/etc/ld.so.cache", "/proc/cpuinfo", "/proc/meminfo", "/proc/self")}
    files |= {Path("/dev/null"), Path("/dev/urandom"), Path("/dev/zero")}
    return tuple(sorted(path for path in own | system | files if path.exists()))


def _set_limits(limits: Limits) -> None:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, limits.data_bytes)
    _limit(resource.RLIMIT_CPU, limits.cpu_seconds)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    _limit(resource.RLIMIT_NOFILE, 256)


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _prctl(libc: ctypes.CDLL, option: int, argument: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Empty all capability sets (version 3 of the header), so that a child of root is root in name only."""
    header = struct.pack("<Ii", 0x20080522, 0)
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
