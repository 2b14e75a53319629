"""What core does about its own memory: once everything is imported, before its pages are locked, and after the start.

Locking makes whatever is resident stay: the kernel then neither reclaims code that nobody runs any more, nor takes
back what the allocator offers (MADV_DONTNEED fails on locked pages). So both are let go of first. Code that is needed
again comes back from the page cache by itself, a fault of well under a microsecond for each 64 KiB.

Sources: madvise(2), mlock2(2), proc(5) "maps", mallopt(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

from agent.base.hardening import lock_memory, unlocked_memory
from agent.infer.runtimes.failures import return_memory

_MADV_DONTNEED = 4


class Pages:
    """This process's pages: kept out of swap where that is wanted and may be, and given back all the same."""

    def __init__(self) -> None:
        #: Whether they stay out of swap.
        self.locked = False

    def lock(self) -> None:
        """Keep them out of swap, where no limit stands against it."""
        self.locked = lock_memory()

    def trim(self) -> None:
        """What only a start needs goes: several megabytes of code alone."""
        with unlocked_memory() if self.locked else contextlib.nullcontext():
            trim()

    def give_back(self) -> None:
        """From any thread: much was freed."""
        with unlocked_memory() if self.locked else contextlib.nullcontext():
            return_memory()


def spare() -> None:
    """Have full collections of the garbage collector pass over what is there now, which is to stay for long.

    **Measured**: a catalog of 1,000 models is 90,000 objects, and a full collection held every thread up for 60 ms.
    They go all the same when nobody refers to them any more; garbage that has come to be in the last moments is
    collected before, as it would never be afterwards.
    """
    gc.collect(1)
    gc.freeze()


def settle() -> None:
    """Give back what the start no longer needs, and spare the garbage collector what it has made.

    Some forty thousand objects live until the end: a full collection would walk them for 20 ms, and for many times that
    on a small board, in the middle of a request.
    """
    gc.freeze()
    trim()


def trim() -> None:
    """Give back what has come to be free, and code that has been run; what is needed again comes back by itself."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # musl has none
        libc.malloc_trim(0)
    for start, end in code_mappings(Path("/proc/self/maps").read_text()):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def code_mappings(maps: str) -> list[tuple[int, int]]:
    """Address ranges of program code mapped from files: executable and never written, hence the same on disk. Pure.

    Nothing else may be dropped: other private mappings hold relocated data, which is nowhere but in memory.
    """
    found = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if (
            len(fields) == 6
            and fields[1] == "r-xp"
            and fields[5].startswith("/")
            and not fields[5].endswith("(deleted)")
        ):
            start, _, end = fields[0].partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found
