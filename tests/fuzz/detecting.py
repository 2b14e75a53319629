"""Targets of detection and configuration: kernel texts, whole trees, hardware profiles, the configuration file."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.base import config
from agent.base.errors import ConfigError
from agent.hardware import auxv, boards, cpuinfo, parse
from agent.hardware.document import _ranges, describe, document
from agent.hardware.facts import FEATURES, Facts
from agent.hardware.probe import probe
from agent.hardware.profiles import Profile, choose_profile, load_profiles, parse_profile, shipped_profiles_dir
from agent.hardware.sensors import read_sensors
from tests.fuzz.target import Memory, Target, many, nested
from tests.hardware.sysroot import A53, A55, A76, arm_board, build, meminfo, x86
from tests.hardware.sysroot import cpuinfo as arm_cpuinfo

ROOT = Path(__file__).parents[2]

# Texts of the kernel.


def read_cpuinfo(data: bytes) -> cpuinfo.CpuInfo:
    return cpuinfo.parse_cpuinfo(data.decode("utf-8", "replace").replace("\r\n", "\n"))


def holds_cpuinfo(data: bytes, info: cpuinfo.CpuInfo) -> None:
    """Every question has an answer; a cut file makes nothing up and takes nothing away that it does not show."""
    assert all(0 <= cpu <= cpuinfo.MAX_CPU for cpu in info.cpus)
    arch = cpuinfo.arch_of(info)
    for guess in (arch, "aarch64", "armv7l", "x86_64", "riscv64", None):
        features = cpuinfo.features_of(info, guess)
        assert set(features) == set(FEATURES)
        assert all(value in (True, False, None) for value in features.values())
    kinds = cpuinfo.kinds_of(info, None)
    assert set(cpuinfo.core_names(kinds)) == set(kinds)
    assert auxv.is_own_x86(info, 0) in (True, False)
    whole = cpuinfo.features_of(info, arch)
    doubled = read_cpuinfo(data + data) if data.endswith(b"\n\n") else info
    assert cpuinfo.features_of(doubled, arch) == whole or cpuinfo.arch_of(doubled) != arch


def read_texts(data: bytes) -> dict[str, Any]:
    """Every parser of a short kernel text, on the same text."""
    text = data.decode("utf-8", "replace")
    values = parse.meminfo(text)
    return {
        "cpus": parse.cpu_list(text),
        "number": parse.number(text),
        "hex": parse.hex_number(text, digits=4),
        "meminfo": values,
        "available": parse.available_kb(values),
        "limit": parse.memory_limit(text),
        "quota": parse.cpu_quota(*(text.split(" ", 1) if " " in text else (text, "100000"))),
        "cgroups": parse.cgroup_paths(text),
        "celsius": parse.celsius(text),
        "throttle": parse.throttle_word(text),
        "throttled": parse.throttled_now(parse.throttle_word(text)),
        "strings": parse.device_tree_strings(data),
        "string": parse.device_tree_string(data),
        "board": parse.without_revision(text),
        "l4t": parse.jetpack_of(parse.l4t_release(text)),
        "mode": parse.power_mode(text),
        "os": parse.os_name(text),
        "pressure": parse.pressure_avg10(text, "some"),
        "revision": boards.parse_revision(text),
        "vector": auxv.parse_vector(data),
    }


def holds_texts(data: bytes, found: dict[str, Any]) -> None:
    """What is given out is within bounds and can be shown."""
    if (cpus := found["cpus"]) is not None:
        assert cpus == tuple(sorted(set(cpus))) and cpus[0] >= 0 and cpus[-1] <= cpuinfo.MAX_CPU
        assert parse.cpu_list(_ranges(cpus)) == cpus
    assert found["number"] is None or 0 <= found["number"] <= 1 << 62
    assert found["limit"] is None or 0 <= found["limit"] < 1 << 60
    assert found["quota"] is None or 0 <= found["quota"] <= cpuinfo.MAX_CPU + 1
    assert found["celsius"] is None or -60 <= found["celsius"] <= 200
    assert found["pressure"] is None or 0 <= found["pressure"] < 1000
    for path in found["cgroups"].values():
        assert ".." not in path.split("/") and not path.startswith("/")
    strings = found["strings"]
    assert len(strings) <= 64 and all(text and text.isprintable() and len(text) <= 256 for text in strings)
    for name in ("string", "mode", "os"):
        assert found[name] is None or found[name].isprintable()
    identity = boards.identify(
        found["string"], strings, revision=found["revision"], old_hardware=found["string"], part_hint=found["string"]
    )
    assert identity.board is None or identity.board.isprintable()
    assert parse.soc_of(strings) is None or parse.soc_of(strings)
    fours = struct.unpack(f"<{len(data) // 4}i", data[: len(data) // 4 * 4])
    capacities = dict(enumerate(fours[:8]))
    parse.big_cores(capacities, capacities, {}, (), capacities)


# Whole trees.

PI = arm_board("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712", cores=(A55, A55, A76, A76))
BOARD: dict[str, str | bytes] = PI | {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "45000\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "110000\n",
    "proc/self/cgroup": "0::/a/b\n3:memory,cpu:/c\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 1024 0 5\n",
    "proc/pressure/memory": "some avg10=0.12 avg60=0.00 avg300=0.00 total=0\n",
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.max": "1073741824\n",
    "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/cpuset.cpus.effective": "0-3\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpuset/cpuset.cpus": "0-3\n",
    "sys/devices/system/cpu/cpu2/cpu_capacity": "1024\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x1e60\n",
    "sys/bus/pci/devices/0000:01:00.0/device": "0x2864\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    "sys/bus/usb/devices/1-1/idVendor": "18d1\n",
    "sys/bus/usb/devices/1-1/idProduct": "9302\n",
    "sys/class/hwmon/hwmon0/name": "ina3221\n",
    "sys/class/hwmon/hwmon0/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon0/in1_input": "5000\n",
    "sys/class/hwmon/hwmon0/curr1_input": "900\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "5\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "50\n",
    "sys/class/tpm/tpm0/tpm_version_major": "2\n",
    "sys/class/dmi/id/product_name": "Something\n",
    "sys/devices/platform/soc:firmware/get_throttled": "0\n",
    "cmd/vcgencmd_get_throttled.txt": "throttled=0x0\n",
    "cmd/getconf_PAGE_SIZE.txt": "16384\n",
    "cmd/nvpmodel_q.txt": "NV Power Mode: 15W\n2\n",
    "cmd/uname_r.txt": "6.6.31\n",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 3.1, GCID: 1\n",
    "etc/os-release": 'PRETTY_NAME="Debian"\n',
    "proc/device-tree/system/linux,revision": b"\0\xb0\x31\x70",
    "proc/device-tree/nvidia,dtsfilename": b"a/tegra234-p3701-0000-p3737-0000.dts\0",
    "dev/hailo0": "",
}
PATHS = tuple(BOARD)


@functools.lru_cache(maxsize=1)
def _root() -> Path:
    """The board's files, in memory where there is some; removed when the process ends."""
    import atexit  # noqa: PLC0415

    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="edge-agent-fuzz-", dir=place))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return build(folder, BOARD)


@functools.lru_cache(maxsize=1)
def _profiles() -> tuple[Profile, ...]:
    return tuple(load_profiles([shipped_profiles_dir()])[0])


def files_of(data: bytes) -> dict[str, bytes]:
    """Files that are other than the board's: each a number of the table, a length of two bytes, and content."""
    files: dict[str, bytes] = {}
    place = 0
    while place < len(data):
        length = int.from_bytes(data[place + 1 : place + 3], "little")
        files[PATHS[data[place] % len(PATHS)]] = data[place + 3 : place + 3 + length]
        place += 3 + length
    return files


def _entry(path: str, content: bytes) -> bytes:
    return bytes([PATHS.index(path)]) + struct.pack("<H", len(content)) + content


def read_tree(data: bytes) -> Facts:
    files = files_of(data)
    build(_root(), files)
    try:
        facts = probe(_root())
        found = document(facts, choose_profile(facts, _profiles()))
        text = json.dumps(found, allow_nan=False) + describe(found)
        assert text.replace("\n", "").isprintable(), "something that is not printable is shown"
        json.dumps(asdict(read_sensors(_root())), allow_nan=False)
    finally:
        build(_root(), {path: BOARD[path] for path in files})
    return facts


def holds_tree(data: bytes, facts: Facts) -> None:
    """Numbers within what a machine can have; limits never above the machine; everything shown can be printed."""
    if facts.mem_total_mb is not None and facts.mem_limit_mb is not None:
        assert facts.mem_limit_mb <= facts.mem_total_mb
    if facts.mem_total_mb is not None and facts.mem_available_mb is not None:
        assert facts.mem_available_mb <= facts.mem_total_mb
    if facts.online_cpus is not None:
        assert facts.cores_online == len(facts.online_cpus)
        assert set(facts.big_cores or ()) <= set(facts.online_cpus)
        assert set(facts.usable_cpus or ()) <= set(facts.online_cpus)
    assert facts.cpu_limit is None or 0 <= facts.cpu_limit <= cpuinfo.MAX_CPU + 1
    for text in (facts.board, facts.soc, facts.governor, facts.power_mode, facts.kernel, facts.os, *facts.notes):
        assert text is None or text.isprintable(), f"{text!r} would be shown"


def tree_seeds() -> list[bytes]:
    return [
        b"",
        _entry("proc/cpuinfo", x86("avx2 aes").encode()) + _entry("cmd/uname_m.txt", b"x86_64\n"),
        _entry("proc/meminfo", meminfo(8_000_000, 5_000_000).encode()) + _entry("proc/self/cgroup", b"0::/a\n"),
        *(_entry(path, content if isinstance(content, bytes) else content.encode()) for path, content in BOARD.items()),
    ]


# Profiles.


def read_profile(data: bytes) -> Profile:
    return parse_profile(data, origin="a.toml")


def holds_profile(_data: bytes, profile: Profile) -> None:
    """Within its bounds, and usable for any machine."""
    assert profile.id and 0 <= profile.ram_slack <= 0.9 and 0.05 <= profile.memory_share <= 0.95
    for facts in (Facts(), _board_facts()):
        chosen = choose_profile(facts, [profile])
        json.dumps(document(facts, chosen), allow_nan=False)


@functools.lru_cache(maxsize=1)
def _board_facts() -> Facts:
    return probe(_root())


def profile_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(shipped_profiles_dir().glob("*.toml"))]


TOML_SHAPES = {
    "digits": many(b"1", b"a = "),
    "hex digits": many(b"F", b"threads = 0x"),
    "hex digits in a section": many(b"F", b"[server]\nmax_body_mb = 0x"),
    "list": many(b"1,", b"a = [", b"]"),
    "depth": nested(b"[", b"]", b"a = "),
    "inline depth": nested(b"{a=", b"}", b"a = ", b"1"),
    "keys": many(b"k%d = 1\n"),
    "tables": many(b"[t%d]\n"),
    "entries": many(b"[[notes]]\n"),
    "models": many(b"[access.models.m%d]\n"),
    "text": many(b"a", b'title = "', b'"'),
    "escapes": many(b"\\u00e9", b'title = "', b'"'),
    "comments": many(b"#\n"),
    "blanks": many(b" "),
    "patterns": many(b"*a", b'id = "a"\ntitle = "b"\n[match]\ncompatible = ["', b'"]'),
}


# The configuration file.


@functools.lru_cache(maxsize=1)
def _file() -> Path:
    return Path(f"/proc/self/fd/{os.memfd_create('fuzz')}")


def read_config(data: bytes) -> config.Config:
    descriptor = int(_file().name)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    return config.load(_file(), explicit=True)


def holds_config(_data: bytes, loaded: config.Config) -> None:
    """What was loaded loads again to the same."""
    assert config.parse(loaded.model_dump(), "the same") == loaded


def config_seeds() -> list[bytes]:
    """The shipped one, and the same with every key in force."""
    shipped = (ROOT / "deploy" / "config.toml").read_text()
    in_force = re.sub(r"(?m)^# ?(?=\[|\w+ = )", "", shipped)
    rules = (
        '[access]\ndefault = "deny"\n[access.models.digits]\nuids = [0, 1000]\ngroups = ["video"]\nusers = ["a.b@c"]\n'
    )
    return [shipped.encode(), in_force.encode(), rules.encode(), b"[server]\nmax_body_mb = 8\ndeadline_s = 5\n"]


def cpuinfo_seeds() -> list[bytes]:
    old = "Processor\t: ARMv7 Processor rev 4 (v7l)\nprocessor\t: 0\n\nprocessor\t: 1\n\n"
    old += "Features\t: half thumb vfp neon\n"
    old += "CPU implementer\t: 0x41\nCPU part\t: 0xd03\n\nHardware\t: BCM2835\nRevision\t: a02082\n"
    return [arm_cpuinfo([A53, A76]).encode(), x86("avx2 avx512_vnni").encode(), old.encode(), b"isa : rv64\n"]


TEXT_SEEDS = (
    b"0-3,5\n", b"4096\n", b"0x1f\n", meminfo(4_000_000, 3_000_000).encode(), b"max 100000\n", b"45000\n", b"c03115\n",
    b"0::/a/b\n4:memory,cpu:/x\n", b"throttled=0x50005\n", b"raspberrypi,4-model-b\0brcm,bcm2711\0",
    b"nvidia,p3767-0003\0nvidia,tegra234\0", b"# R36 (release), REVISION: 4.0, GCID\n", b"NV Power Mode: MAXN\n0\n",
    b'PRETTY_NAME="Debian GNU/Linux 12"\n', b"some avg10=1.50 avg60=0.10 avg300=0.00 total=5\n",
    struct.pack("@4L", 16, 5, 26, 1), b"Raspberry Pi 4 Model B Rev 1.4\0",
)  # fmt: skip
TEXT_SHAPES = {
    "numbers": many(b"0,"),
    "digits": many(b"1"),
    "lines": many(b"MemFree: 1 kB\n"),
    "groups": many(b"4:memory:/x\n"),
    "slashes": many(b"/a", b"0::"),
    "controllers": many(b"a,", b"0:", b":/"),
    "blanks": many(b" ", b"a", b"b"),
    "revisions": many(b" Rev 1", tail=b"x"),
    "texts": many(b"a,b\0"),
}
CPUINFO_SHAPES = {
    "processors": many(b"processor\t: %d\nFeatures\t: fp asimd\n\n"),
    "lines": many(b"key%d : v\n"),
    "features": many(b"asimd ", b"processor\t: 0\nFeatures\t: fp ", b"\n"),
    "blank lines": many(b"\n"),
}


def _model_line(size: int) -> bytes:
    """An old board's name, with as much between its words as a file of the tree may hold."""
    line = b"Hardware\t: BCM2835\nModel\t\t: Raspberry Pi" + b" " * min(size, 60_000) + b"3\n"
    return _entry("proc/cpuinfo", line) + b"".join(
        _entry(path, b"") for path in PATHS if path.startswith("proc/device-tree")
    )


TARGETS = (
    Target(
        "cpuinfo", read_cpuinfo, holds_cpuinfo, (), cpuinfo_seeds, "cpuinfo", CPUINFO_SHAPES, most_bytes=8192,
        memory=Memory(1 << 20, 200),
    ),
    Target(
        "kernel-texts", read_texts, holds_texts, (), lambda: TEXT_SEEDS, "kernel-texts", TEXT_SHAPES,
        memory=Memory(1 << 20, 200),
    ),
    Target(
        "device-tree", read_tree, holds_tree, (), tree_seeds, "device-tree", {"a board's name": _model_line},
        memory=Memory(4 << 20, 400),
    ),
    Target(
        "profile", read_profile, holds_profile, (ConfigError,), profile_seeds, "toml", TOML_SHAPES, grown=1 << 16,
        memory=Memory(2 << 20, 400),
    ),
    Target(
        "config", read_config, holds_config, (ConfigError,), config_seeds, "toml", TOML_SHAPES, grown=1 << 16,
        memory=Memory(2 << 20, 400),
    ),
)  # fmt: skip
