"""Kernel text → values. Pure; nothing here raises for any text: nonsense gives None.

Numbers are bounded before they are believed, so that no list or range can grow beyond what a kernel could have written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from agent.hardware.cpuinfo import MAX_CPU

_MEMINFO = r"(?am)^(\w+(?:\(\w+\))?):[ \t]+(\d{1,15}) kB[ \t]*$"
_RANGE = r"(?a)(\d{1,5})(?:-(\d{1,5}))?"
_THROTTLED = r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})"
#: Looks behind, so that a long run of blanks is tried from its start only.
_REV = r"(?s)(?<!\s)\s+Rev\s+\d+(?:\.\d+)?(?:\s.*)?\Z"
#: v1 says "no limit" with the largest page-aligned number, which depends on the page size.
_UNLIMITED = 1 << 60
#: Frequency capped, throttled, soft temperature limit: now. Bit 0 is under-voltage, bits 16 and up are the past.
_THROTTLED_NOW = 0b1110


def cpu_list(text: str | None) -> tuple[int, ...] | None:
    """CPU ids of a list such as ``0,2-4``; None for anything else (Documentation/admin-guide/cputopology.rst)."""
    if not text or len(text) > 4096:
        return None
    cpus: set[int] = set()
    for part in text.strip("\0 \t\r\n").split(","):
        found = re.fullmatch(_RANGE, part)
        if not found:
            return None
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last > MAX_CPU:
            return None
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def number(text: str | None, *, most: int = 1 << 62) -> int | None:
    """A non-negative decimal number of at most ``most``."""
    text = (text or "").strip("\0 \t\r\n")
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        return None
    value = int(text)
    return value if value <= most else None


def hex_number(text: str | None, *, digits: int) -> int | None:
    """A hexadecimal number of at most so many digits, with or without ``0x``."""
    found = re.fullmatch(rf"(?:0[xX])?([0-9a-fA-F]{{1,{digits}}})", (text or "").strip())
    return int(found[1], 16) if found else None


def meminfo(text: str | None) -> dict[str, int]:
    """kB by name of the whole lines of ``proc/meminfo``; the first of a name counts. No machine has no memory."""
    values: dict[str, int] = {}
    for name, value in re.findall(_MEMINFO, (text or "")[: 1 << 16]):
        values.setdefault(name, int(value))
    if values.get("MemTotal") == 0:
        del values["MemTotal"]
    return values


def available_kb(values: Mapping[str, int]) -> int | None:
    """MemAvailable; before Linux 3.14 MemFree + Buffers + Cached. None when that exceeds MemTotal, being nonsense."""
    available = values.get("MemAvailable")
    if available is None and {"MemFree", "Buffers", "Cached"} <= values.keys():
        available = values["MemFree"] + values["Buffers"] + values["Cached"]
    total = values.get("MemTotal")
    return available if available is None or total is None or available <= total else None


def memory_limit(text: str | None) -> int | None:
    """Bytes of ``memory.max`` or ``memory.limit_in_bytes``; None for no limit or nonsense."""
    value = number(text, most=1 << 64)
    return value if value is not None and value < _UNLIMITED else None


def cpu_quota(quota: str | None, period: str | None) -> float | None:
    """CPUs' worth of time a period; None for no quota (``max``, ``-1``) or nonsense."""
    share, length = number(quota), number(period)
    cpus = share / length if share and length else None
    return cpus if cpus is not None and cpus <= MAX_CPU + 1 else None


def cgroup_paths(text: str | None) -> dict[str, str]:
    """The own group by controller from ``proc/self/cgroup``; the unified hierarchy has the key ''.

    A path that leads out of the mount (``/..`` inside a namespace) or belongs to a deleted group is left out.
    Source: cgroups(7).
    """
    paths: dict[str, str] = {}
    for line in (text or "").split("\n"):
        identity, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not (identity.isascii() and identity.isdigit()) or not path.startswith("/"):
            continue
        if not path.isprintable() or "\ufffd" in path:  # no file's name here: damaged, or not UTF-8
            continue
        if ".." in PurePosixPath(path).parts or path.endswith(" (deleted)") or path.count("/") > 64:
            continue
        for controller in controllers.split(","):
            paths.setdefault(controller, path.strip("/"))
    return paths


def celsius(text: str | None, *, zone: str = "") -> float | None:
    """Millidegrees → degrees. None for text, for a sensor that is off (-256 °C) and for anything no chip survives."""
    found = re.fullmatch(r"(?a)-?\d{1,10}", (text or "").strip("\0 \t\r\n"))
    if not found:
        return None
    degrees = int(found[0]) / 1000
    # Tegra's PMIC zone reads 100 °C always: a constant of the driver, not a temperature.
    constant = degrees == 100.0 and zone.upper().startswith("PMIC")
    return degrees if -60.0 <= degrees <= 200.0 and not constant else None


def throttle_word(text: str | None) -> int | None:
    """The Raspberry Pi firmware's word, as ``vcgencmd get_throttled`` or sysfs print it."""
    first = (text or "").strip("\0 \t\r\n").partition("\n")[0]
    found = re.fullmatch(_THROTTLED, first.strip())
    return int(found[1], 16) if found else None


def throttled_now(word: int | None) -> bool | None:
    """Whether the firmware holds the clock back now."""
    return None if word is None else bool(word & _THROTTLED_NOW)


def device_tree_strings(data: bytes | None) -> tuple[str, ...]:
    """The entries of a NUL-separated string list (Devicetree specification, 2.2.4), terminated or not."""
    entries = (_clean(part) for part in (data or b"").split(b"\0"))
    return tuple(entry for entry in entries if entry)[:64]


def device_tree_string(data: bytes | None) -> str | None:
    """The first non-empty string of a property, without what is not printable; None when nothing is left."""
    strings = device_tree_strings(data)
    return strings[0] if strings else None


def _clean(data: bytes) -> str:
    text = "".join(char for char in data.decode("utf-8", "ignore") if char.isprintable())
    return text.strip()[:256]


def without_revision(model: str) -> str:
    """``Raspberry Pi 4 Model B Rev 1.4`` → ``Raspberry Pi 4 Model B``."""
    return re.sub(_REV, "", model)


def soc_of(compatible: Iterable[str]) -> str | None:
    """What stands after the comma in the last entry, passing over entries that name a family of chips.

    A family entry ends in a digit and ``x`` (``tegra23x``) or is the number before it cut short (``exynos5`` after
    ``exynos5800``).
    """
    names = [name for entry in compatible if (name := entry.partition(",")[2])]
    while len(names) > 1:
        before, last = names[-2], names[-1]
        family = re.search(r"\dx\Z", last) or (before.startswith(last) and before[len(last) :].isdigit())
        if not family:
            break
        names.pop()
    return names[-1] if names else None


def big_cores(
    online: Iterable[int],
    capacities: Mapping[int, int],
    kinds: Mapping[int, object],
    little: Iterable[int],
    frequencies: Mapping[int, int],
) -> tuple[int, ...] | None:
    """The online CPUs that are not of the slowest kind; None when all are alike or it cannot be told.

    ``cpu_capacity`` decides where every CPU has one; else the kind of core and its highest frequency: in-order cores
    (``little``) are slower than others, and among equals the lower clock is.
    """
    cpus = sorted(online)
    if not cpus:
        return None
    if all(cpu in capacities for cpu in cpus):
        speed: dict[int, tuple[int, int]] = {cpu: (capacities[cpu], 0) for cpu in cpus}
    elif all(cpu in kinds for cpu in cpus):
        small = frozenset(little)
        clocked = all(cpu in frequencies for cpu in cpus)
        speed = {cpu: (cpu not in small, frequencies[cpu] if clocked else 0) for cpu in cpus}
    else:
        return None
    slowest = min(speed.values())
    return tuple(cpu for cpu in cpus if speed[cpu] != slowest) or None


def l4t_release(text: str | None) -> str | None:
    """``35.3.1`` from ``etc/nv_tegra_release`` (``# R35 (release), REVISION: 3.1, …``)."""
    found = re.match(r"(?a)#\s*R(\d{1,3})\s*\(release\),\s*REVISION:\s*([\d.]{1,16})", text or "")
    return f"{found[1]}.{found[2]}" if found else None


def jetpack_of(l4t: str | None) -> str | None:
    """The JetPack major version that a Jetson Linux release belongs to (NVIDIA, JetPack archive)."""
    major = (l4t or "").partition(".")[0]
    return {"28": "3", "31": "4", "32": "4", "34": "5", "35": "5", "36": "6", "38": "7"}.get(major)


def power_mode(text: str | None) -> str | None:
    """The mode's name from ``nvpmodel -q``; any name is taken as it is."""
    found = re.search(r"^NV Power Mode:[ \t]*(\S[^\n]{0,63})$", text or "", re.MULTILINE)
    return found[1].strip() if found and found[1].isprintable() else None


def os_name(text: str | None) -> str | None:
    """PRETTY_NAME of os-release(5)."""
    found = re.search(r"^PRETTY_NAME=(['\"]?)([^'\"\n]{1,128})\1$", text or "", re.MULTILINE)
    return found[2].strip() if found and found[2].isprintable() else None


def pressure_avg10(text: str | None, kind: str) -> float | None:
    """``avg10`` of the ``some`` or ``full`` line, in percent (Documentation/accounting/psi.rst)."""
    found = re.search(rf"(?am)^{kind} avg10=(\d{{1,3}}\.\d+) ", text or "")
    return float(found[1]) if found else None
