"""How much memory this process holds, how much there is, and a bound to its growth.

Sources: proc_pid_statm(5), proc_meminfo(5), setrlimit(2) RLIMIT_DATA (private writable memory, since Linux 4.7).
"""

from __future__ import annotations

import functools
import os
import resource
import time

_MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: What is available changes slowly, and asking costs some ten microseconds.
_EVERY_S = 0.1
_LEAST_GROWTH = 64 * _MIB
_SHARE = 0.9


def resident_mb() -> float:
    """Resident memory of this process that is not file-backed, in MiB; 0 where /proc does not tell."""
    _, resident, shared, _ = _sizes()
    return (resident - shared) * _PAGE / _MIB


class Fence:
    """Keeps this process from growing beyond the memory that there is: an allocation fails instead.

    A model may be led by its inputs to ask for any amount. Without a bound the kernel grants it, and kills the whole
    process once it is touched. ``limit_mb`` is what the control group allows, None where it allows everything.
    """

    def __init__(self, limit_mb: int | None = None) -> None:
        self._limit = None if limit_mb is None else limit_mb * _MIB
        self._next = 0.0

    def move(self) -> None:
        """Set the bound by what is available now. Harmless from any thread; does nothing when called again soon."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY_S
        _, resident, shared, data = _sizes()
        room = [size for size in (_available(), self._limit) if size is not None]
        if not room or not data:
            return
        if self._limit is not None:
            room[-1] -= (resident - shared) * _PAGE
        growth = max(_LEAST_GROWTH, int(min(room) * _SHARE))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        bound = data * _PAGE + growth
        resource.setrlimit(resource.RLIMIT_DATA, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


def _sizes() -> tuple[int, int, int, int]:
    """Pages: all, resident, of these shared or of files, and private writable ones (with the stack)."""
    try:
        fields = os.pread(_statm(os.getpid()), 256, 0).split()
        return int(fields[0]), int(fields[1]), int(fields[2]), int(fields[5])
    except (OSError, IndexError, ValueError):
        return 0, 0, 0, 0


@functools.lru_cache(maxsize=1)
def _statm(pid: int) -> int:
    """Kept open: each run asks, and to open it takes as long as all the rest."""
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)


def _available() -> int | None:
    """Bytes that can be had without swapping; None where the kernel does not tell."""
    try:
        with open("/proc/meminfo", "rb") as stream:
            for line in stream.read(4096).splitlines():
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    return None
