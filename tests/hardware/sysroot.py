"""Small recorded machines, made by the tests themselves: a few files below a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

A53 = (0x41, 0xD03, "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid")
A72 = (0x41, 0xD08, "fp asimd evtstrm crc32 cpuid")
V8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
A55 = (0x41, 0xD05, V8_2)
A76 = (0x41, 0xD0B, V8_2)
V2 = (0x41, 0xD4F, f"{V8_2} sve i8mm bf16")

Core = tuple[int, int, str]


def cpuinfo(cores: Iterable[Core], *, tail: str = "") -> str:
    """What an arm64 kernel prints for these cores, numbered from 0."""
    blocks = [
        f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x{implementer:02x}\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0x{part:03x}\nCPU revision\t: 3\n\n"
        for number, (implementer, part, features) in enumerate(cores)
    ]
    return "".join(blocks) + tail


def x86(flags: str, *, model: str = "Some CPU", cpus: int = 2) -> str:
    """What an x86 kernel prints."""
    flags = f"fpu tsc cx8 cmov mmx fxsr sse sse2 lm pni {flags}"
    blocks = (
        f"processor\t: {n}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 1\nmodel name\t: {model}\n"
        f"flags\t\t: {flags}\nbogomips\t: 4000.00\npower management:\n\n"
        for n in range(cpus)
    )
    return "".join(blocks)


def meminfo(total_kb: int, available_kb: int | None = None) -> str:
    """The first lines of /proc/meminfo."""
    available = f"MemAvailable:   {available_kb:8} kB\n" if available_kb is not None else ""
    rest = "Buffers:           20000 kB\nCached:           300000 kB\n"
    return f"MemTotal:       {total_kb:8} kB\nMemFree:         1000000 kB\n{available}{rest}"


def build(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write the files below ``root`` and return it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    root.mkdir(exist_ok=True)
    return root


def device_tree(model: str, *compatible: str) -> dict[str, bytes]:
    """Model and compatible as the kernel shows them."""
    return {
        "proc/device-tree/model": model.encode() + b"\0",
        "proc/device-tree/compatible": b"".join(entry.encode() + b"\0" for entry in compatible),
    }


def arm_board(
    model: str, *compatible: str, cores: Iterable[Core] = (A53,) * 4, tail: str = ""
) -> dict[str, str | bytes]:
    """An aarch64 board with a device tree."""
    listed = list(cores)
    return {
        **device_tree(model, *compatible),
        "proc/cpuinfo": cpuinfo(listed, tail=tail),
        "proc/meminfo": meminfo(4_000_000, 3_000_000),
        "sys/devices/system/cpu/online": f"0-{len(listed) - 1}\n",
        "cmd/uname_m.txt": "aarch64\n",
        "cmd/getconf_LONG_BIT.txt": "64\n",
    }
