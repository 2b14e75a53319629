"""Confirms CPU features on the live machine through the auxiliary vector, which the kernel gives each process.

On ARM it lists, bit by bit, what the kernel lets this process use on every core; a feature that cpuinfo names and the
kernel does not give is taken back, and one that cpuinfo left open is settled. On x86 it holds only CPUID leaf 1's EDX,
enough to tell whether cpuinfo is this machine's. A feature is never raised from the board's name.
Sources: getauxval(3), proc_pid_auxv(5), Linux ``arch/{arm64,arm}/include/uapi/asm/hwcap.h``, Intel SDM 2A (CPUID).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from agent.hardware.cpuinfo import CpuInfo, family_of, family_of_arch, usable_lines
from agent.hardware.tree import Tree

_ENTRIES = _AT_HWCAP, _AT_HWCAP2 = 16, 26
#: feature → (vector entry, bit)
_ARM64_BITS = {
    "neon": (_AT_HWCAP, 1), "aes": (_AT_HWCAP, 3), "fp16": (_AT_HWCAP, 10), "dotprod": (_AT_HWCAP, 20),
    "sve": (_AT_HWCAP, 22), "i8mm": (_AT_HWCAP2, 13), "bf16": (_AT_HWCAP2, 14),
}  # fmt: skip
_ARM32_BITS = {
    "neon": (_AT_HWCAP, 12), "fp16": (_AT_HWCAP, 23), "dotprod": (_AT_HWCAP, 24), "bf16": (_AT_HWCAP, 26),
    "i8mm": (_AT_HWCAP, 27), "aes": (_AT_HWCAP2, 0),
}  # fmt: skip
_X86_EDX = {"fpu": 0, "tsc": 4, "cx8": 8, "cmov": 15, "mmx": 23, "fxsr": 24, "sse": 25, "sse2": 26}


def confirm_features(
    features: Mapping[str, bool | None], info: CpuInfo, arch: str | None, tree: Tree
) -> dict[str, bool | None]:
    """The features of the live machine after asking the kernel; the tree takes a note of every difference.

    The file comes first: glibc answers getauxval(AT_HWCAP) on x86 with bits of its own. A process that is not dumpable
    may not read the file, and on ARM the C library passes the kernel's words on.
    """
    family = family_of_arch(arch)
    data = tree.read("proc/self/auxv", quiet=True)
    vector = parse_vector(data) if data is not None else _ask_library() if family == "arm" else {}
    if not vector.get(_AT_HWCAP):
        return dict(features)
    if family == "arm":
        bits = _ARM64_BITS if struct.calcsize("P") == 8 else _ARM32_BITS
        given = {name: bool(vector.get(entry, 0) >> bit & 1) for name, (entry, bit) in bits.items()}
        return settle(given, features, tree.note)
    if family == "x86" and family_of(info) == "x86" and not is_own_x86(info, vector[_AT_HWCAP]):
        tree.note("proc/cpuinfo: its flags are not those of this machine's CPU, ignored")
        return {name: (None if value else value) for name, value in features.items()}
    return dict(features)


def settle(
    given: Mapping[str, bool], features: Mapping[str, bool | None], note: Callable[[str], None]
) -> dict[str, bool | None]:
    """cpuinfo's features lowered, or settled where unknown, by what the kernel gives this process. Pure."""
    settled = dict(features)
    for name, kernel in given.items():
        known = settled.get(name)
        if known and not kernel:
            note(f"{name}: named in cpuinfo, not given to this process by the kernel")
        if known is not False:
            settled[name] = kernel
    return settled


def is_own_x86(info: CpuInfo, edx: int) -> bool:
    """Whether cpuinfo's flags agree with CPUID leaf 1's EDX. Pure."""
    words = frozenset[str]().union(*usable_lines(info, "x86"))
    return all((name in words) == bool(edx >> bit & 1) for name, bit in _X86_EDX.items())


def parse_vector(data: bytes) -> dict[int, int]:
    """The capability entries of ``/proc/self/auxv``: pairs of words of this process's own size."""
    size = struct.calcsize("@LL")
    pairs = struct.iter_unpack("@LL", data[: len(data) // size * size])
    return {entry: value for entry, value in pairs if entry in _ENTRIES}


def _ask_library() -> dict[int, int]:
    import ctypes  # noqa: PLC0415  rarely needed, and not free

    getauxval = getattr(ctypes.CDLL(None), "getauxval", None)  # glibc since 2.16, musl
    if getauxval is None:
        return {}
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return {entry: int(getauxval(entry)) for entry in _ENTRIES}
