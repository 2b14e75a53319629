"""``/proc/cpuinfo`` → the CPUs it describes, their features and their kinds.

The format differs by architecture and age: one block a CPU with blank lines between; old ARM kernels print the CPUs'
numbers first and what they share afterwards, or no number at all. A line that is cut off or damaged tells nothing: it
is left out, and so "has it not" is only ever said on the word of a whole line.
Source: Linux ``arch/*/kernel/{setup,cpu,cpuinfo,proc}.c``, Documentation/arch/arm64/elf_hwcaps.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from agent.hardware.cores import ARMV6_PARTS, core_name
from agent.hardware.facts import FEATURES

#: 4096 ARM processors are just under this, 500 of x86 as well. What lies beyond is not read.
MAX_BYTES = 1 << 20
MAX_CPU = 8191

_ARM_WORDS: dict[str, tuple[str, ...]] = {
    "neon": ("asimd", "neon"),
    "fp16": ("asimdhp",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16", "asimdbf16"),
    "sve": ("sve",),
    "aes": ("aes",),
}
_X86_WORDS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("aes", "avx2", "avx512_vnni", "avx_vnni", "amx_int8")
}
_WORDS = {"arm": _ARM_WORDS, "x86": _X86_WORDS}
#: A features line without any of these was not written by a kernel of that architecture.
_USUAL = {
    "arm": frozenset({"fp", "asimd", "evtstrm", "half", "thumb", "fastmult", "vfp", "edsp", "swp", "neon", "vfpv3"}),
    "x86": frozenset({"fpu", "tsc", "msr", "cx8", "cmov", "mmx", "fxsr", "sse", "sse2", "syscall", "lm", "pni"}),
}
_LINE_KEY = {"arm": "Features", "x86": "flags"}
_HEX = r"0x[0-9a-fA-F]{1,4}"


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """CPUs by number, each with its own lines; ``shared`` has the lines that belong to no single CPU."""

    cpus: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def values(self, key: str) -> list[str]:
        """The distinct values that a key has, of the CPUs and of the shared part."""
        found = dict.fromkeys(block[key] for block in self.cpus.values() if key in block)
        if key in self.shared:
            found[self.shared[key]] = None
        return list(found)

    def value(self, key: str) -> str | None:
        """The shared value of a key, else the first CPU's."""
        values = self.values(key)
        return self.shared.get(key, values[0] if values else None)


def parse_cpuinfo(text: str) -> CpuInfo:
    """Sort the lines into CPUs and shared ones. Never raises; what is damaged is left out."""
    lines = text.split("\n")
    lines.pop()  # after the last newline there is nothing, or a line that was cut off
    cpus: dict[int, dict[str, str]] = {}
    shared: dict[str, str] = {}
    block = shared
    split: dict[str, tuple[str, str] | None] = {}
    for line in lines:
        if line not in split:
            split[line] = _pair(line)
        pair = split[line]
        if pair is None:
            if not line.strip():
                block = shared
            continue
        key, value = pair
        if key == "processor" and value.isascii() and value.isdigit():
            block = {}
            if len(value) <= 4 and int(value) <= MAX_CPU:
                block = cpus.setdefault(int(value), block)
            continue
        block.setdefault(key, value)
    _drop_cut_line(cpus, last_is_whole=block is shared)
    return CpuInfo(cpus, shared)


def _pair(line: str) -> tuple[str, str] | None:
    """Key and value of a sound line; None for blank, damaged or other ones."""
    key, colon, value = line.replace("\t", " ").partition(":")
    if not colon or not key.isprintable() or not value.isprintable() or "\ufffd" in value:
        return None
    return key.strip(), value.strip()


def _drop_cut_line(cpus: dict[int, dict[str, str]], *, last_is_whole: bool) -> None:
    """Leave out the last line of a block that ends sooner than the first: a cut line that got a newline after all."""
    numbers = list(cpus)
    if last_is_whole or len(numbers) < 2:
        return
    first, last = cpus[numbers[0]], cpus[numbers[-1]]
    if last and set(last) < set(first) and next(reversed(last)) != next(reversed(first)):
        last.popitem()


def family_of(info: CpuInfo) -> str | None:
    """The architecture family that wrote this cpuinfo (``arm``, ``x86``, another's); None when it does not show."""
    keys = set(info.shared).union(*info.cpus.values()) if info.cpus else set(info.shared)
    if keys & {"CPU implementer", "CPU part", "CPU architecture"}:
        return "arm"
    if "flags" in keys and keys & {"vendor_id", "cpu family", "model name"}:
        return "x86"
    if keys & {"isa", "hart", "mvendorid"}:
        return "riscv"
    for family, key in _LINE_KEY.items():
        if usable_lines(info, family) and key in keys:
            return family
    other = {"CPU Family": "loongarch", "cpu model": "mips", "cpu": "powerpc", "# processors": "s390"}
    return next((name for key, name in other.items() if key in keys), None)


def family_of_arch(arch: str | None) -> str | None:
    """The family of a ``uname -m`` word."""
    if arch is None:
        return None
    if arch.startswith(("aarch64", "arm")):
        return "arm"
    if arch == "x86_64" or re.fullmatch(r"i[3-6]86", arch):
        return "x86"
    return next((name for name in ("riscv", "loongarch", "mips", "s390") if arch.startswith(name)), None) or (
        "powerpc" if arch.startswith("ppc") else arch
    )


def arch_of(info: CpuInfo) -> str | None:
    """What ``uname -m`` would have said, as far as cpuinfo tells."""
    family = family_of(info)
    if family == "arm":
        return _arm_arch(info)
    if family == "x86":
        lines = usable_lines(info, "x86")
        return "i686" if lines and not all("lm" in line for line in lines) else "x86_64"
    if family == "riscv":
        return "riscv32" if (info.value("isa") or "rv64").startswith("rv32") else "riscv64"
    return {"loongarch": "loongarch64", "mips": "mips", "powerpc": "ppc64le", "s390": "s390x"}.get(family or "")


def _arm_arch(info: CpuInfo) -> str:
    """64-bit kernels print ``asimd``; 32-bit ones print ``half``, and ``(v6l)`` or ``(v7l)`` in the name."""
    lines = usable_lines(info, "arm")
    names = info.values("model name") + info.values("Processor")
    version = next((found[1] for name in names if (found := re.search(r"\((v\d+)\w*\)", name))), None)
    if any("asimd" in line for line in lines) and not any({"half", "thumb"} & line for line in lines):
        return "aarch64"
    kinds = {kind for block in (*info.cpus.values(), info.shared) if (kind := _kind(block, info.shared))}
    if version in {"v5", "v6"} or any(implementer == 0x41 and part in ARMV6_PARTS for implementer, part in kinds):
        return "armv5tel" if version == "v5" else "armv6l"
    architecture = info.value("CPU architecture") or ""
    if architecture in {"8", "AArch64"}:
        return "armv8l" if lines else "aarch64"
    return "armv7l"


def usable_lines(info: CpuInfo, family: str) -> list[frozenset[str]]:
    """The feature words of each distinct line that a kernel of that family wrote whole."""
    key = _LINE_KEY.get(family)
    if key is None:
        return []
    lines = (frozenset(value.split()) for value in info.values(key))
    return [line for line in lines if line & _USUAL[family]]


def features_of(info: CpuInfo, arch: str | None) -> dict[str, bool | None]:
    """Each feature of ``FEATURES``: what all described CPUs have, what one lacks, or None where no line tells.

    The other architecture's features are false; of a cpuinfo that belongs to another architecture nothing is believed.
    """
    family = family_of_arch(arch)
    if family is None:
        return dict.fromkeys(FEATURES)
    words = _WORDS.get(family, {})
    # ``aes`` is a word of several architectures: false needs a line that lacks it.
    features: dict[str, bool | None] = {name: (None if name in words or name == "aes" else False) for name in FEATURES}
    if family_of(info) == family:
        lines = usable_lines(info, family)
        for name, spellings in words.items():
            if lines:
                features[name] = all(not line.isdisjoint(spellings) for line in lines)
    return features


def _kind(block: Mapping[str, str], shared: Mapping[str, str]) -> tuple[int, int] | None:
    implementer = block.get("CPU implementer", shared.get("CPU implementer", ""))
    part = block.get("CPU part", shared.get("CPU part", ""))
    if not re.fullmatch(_HEX, implementer) or not re.fullmatch(_HEX, part):
        return None
    return int(implementer, 16), int(part, 16)


def kinds_of(info: CpuInfo, online: Iterable[int] | None) -> dict[int, tuple[int, int]]:
    """(implementer, part) of each online CPU that cpuinfo describes; ``online`` None means all that it lists."""
    if family_of(info) != "arm":
        return {}
    # Kernels for one processor number none: what is shared is CPU 0.
    cpus = info.cpus or {0: info.shared}
    wanted = None if online is None else frozenset(online)
    return {
        cpu: kind
        for cpu, block in cpus.items()
        if (wanted is None or cpu in wanted) and (kind := _kind(block, info.shared)) is not None
    }


def core_names(kinds: Mapping[int, tuple[int, int]]) -> dict[int, str | None]:
    """The core's name by CPU."""
    names = {kind: core_name(*kind) for kind in set(kinds.values())}
    return {cpu: names[kind] for cpu, kind in kinds.items()}
