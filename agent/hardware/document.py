"""The facts as ``edge-agent detect`` prints them: one JSON object, and the same for people.

The object's keys are a contract (docs/reference/detect.md): tools read it, so a key keeps its name and type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agent.hardware.facts import Facts
from agent.hardware.profiles import Profile, memory_budget_mb, ram_class_mb, serving_cpus, thread_count

_INDENT = 15
_WIDTH = 100


def document(facts: Facts, profile: Profile, problems: Sequence[str] = ()) -> dict[str, Any]:
    """Everything known, as plain JSON values. ``problems`` are those met while profiles were loaded."""
    return {
        "board": facts.board,
        "profile": profile.id,
        "soc": facts.soc,
        "arch": facts.arch,
        "user_bits": facts.user_bits,
        "cores_online": facts.cores_online,
        "core_types": None if facts.core_types is None else [list(kind) for kind in facts.core_types],
        "big_cores": None if facts.big_cores is None else list(facts.big_cores),
        "features": dict(facts.features),
        "mem_total_mb": facts.mem_total_mb,
        "mem_available_mb": facts.mem_available_mb,
        "mem_limit_mb": facts.mem_limit_mb,
        "cpu_limit": None if facts.cpu_limit is None else round(facts.cpu_limit, 4),
        "accelerators": [asdict(accelerator) for accelerator in facts.accelerators],
        "throttled_now": facts.throttled_now,
        "supported": facts.supported,
        "emulated": facts.emulated,
        "plan": _plan(facts, profile),
        "profile_title": profile.title,
        "profile_origin": profile.origin,
        "profile_notes": [asdict(note) for note in profile.notes],
        "profile_problems": list(problems),
        **_system(facts),
        "notes": list(facts.notes),
    }


def _plan(facts: Facts, profile: Profile) -> dict[str, Any]:
    """What the agent would do with these facts and this profile, before the configuration has its say."""
    cpus = serving_cpus(facts, profile)
    return {
        "threads": thread_count(facts, profile),
        "cpus": None if cpus is None else list(cpus),
        "memory_budget_mb": memory_budget_mb(facts, profile),
        "ram_class_mb": ram_class_mb(facts, profile),
        "providers": list(profile.providers),
        "cpu_precisions": list(profile.cpu_precisions),
        "gpu_precisions": list(profile.gpu_precisions),
        "int8_gain": profile.int8_gain,
        "fp16_cpu_penalty": profile.fp16_cpu_penalty,
        "watts_idle": profile.watts_idle,
        "watts_load": profile.watts_load,
        "throttle_c": profile.heat.throttle_c if profile.heat else None,
    }


def _system(facts: Facts) -> dict[str, Any]:
    return {
        "model": facts.model,
        "compatible": list(facts.compatible),
        "cpu_model": facts.cpu_model,
        "max_mhz": facts.max_mhz,
        "governor": facts.governor,
        "power_mode": facts.power_mode,
        "big_core_types": None if facts.big_core_types is None else list(facts.big_core_types),
        "online_cpus": None if facts.online_cpus is None else list(facts.online_cpus),
        "usable_cpus": None if facts.usable_cpus is None else list(facts.usable_cpus),
        "page_size": facts.page_size,
        "thermal_zones": [asdict(zone) for zone in facts.thermal_zones],
        "swap": None if facts.swap is None else [asdict(area) for area in facts.swap],
        "disk": None if facts.disk is None else asdict(facts.disk),
        "tpm": None if facts.tpm is None else asdict(facts.tpm),
        "kernel": facts.kernel,
        "os": facts.os,
        "l4t": facts.l4t,
        "jetpack": facts.jetpack,
        "cgroup_version": facts.cgroup_version,
    }


def describe(found: Mapping[str, Any]) -> str:
    """The document for people: what the machine is, what models may use, and what deserves attention."""
    head = " · ".join(str(part) for part in (found["board"] or "Unknown board", found["soc"], found["arch"]) if part)
    lines = [head, f"profile {found['profile']}: {found['profile_title']}", ""]
    if not found["supported"]:
        lines += ["Models cannot run on this machine.", ""]
    for label, text in _rows(found):
        if text:
            lines += _wrapped(label, text)
    remarks = _remarks(found)
    if remarks:
        lines += ["", "Notes", *(line for remark in remarks for line in _wrapped("  -", remark, indent=4))]
    return "\n".join(lines)


def _rows(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    plan = found["plan"]
    yield "Cores", _cores(found)
    yield "Runs on", f"CPUs {_ranges(plan['cpus'])} with {_count(plan['threads'], 'thread')}" if plan["cpus"] else ""
    yield "Features", _features(found["features"])
    yield "Memory", _memory(found)
    yield "Accelerators", "; ".join(_accelerator(entry) for entry in found["accelerators"]) or "none"
    yield "Heat", _heat(found)
    yield "Power", _power(found)
    yield "System", _operating_system(found)
    yield "Storage", _storage(found)
    yield "Runtimes", _runtimes(found.get("runtimes"))


def _cores(found: Mapping[str, Any]) -> str:
    kinds = " + ".join(f"{count} x {name}" for name, count in found["core_types"] or ())
    online = found["cores_online"]
    text = kinds or (_count(online, "core") if online else "unknown")
    if found["cpu_model"]:
        text += f", {found['cpu_model']}"
    if found["max_mhz"]:
        text += f", up to {found['max_mhz']} MHz"
    if found["big_cores"]:
        text += f"; the fast ones are {_ranges(found['big_cores'])}"
    if found["cpu_limit"] is not None:
        text += f"; limited to {found['cpu_limit']:g} CPUs"
    return text


def _features(features: Mapping[str, bool | None]) -> str:
    has = [name for name, value in features.items() if value]
    unknown = [name for name, value in features.items() if value is None]
    return (" ".join(has) or "none known") + (f"; unknown: {' '.join(unknown)}" if unknown else "")


def _memory(found: Mapping[str, Any]) -> str:
    if found["mem_total_mb"] is None:
        return "unknown"
    text = f"{found['mem_total_mb']} MiB"
    if found["plan"]["ram_class_mb"]:
        text += f" of {found['plan']['ram_class_mb'] / 1024:g} GiB fitted"
    if found["mem_available_mb"] is not None:
        text += f", {found['mem_available_mb']} available now"
    if found["mem_limit_mb"] is not None and found["mem_limit_mb"] < found["mem_total_mb"]:
        text += f", limited to {found['mem_limit_mb']}"
    if found["supported"] and found["plan"]["memory_budget_mb"] is not None:
        text += f"; models may take {found['plan']['memory_budget_mb']}"
    return text


def _accelerator(entry: Mapping[str, Any]) -> str:
    state = {True: "usable", False: "its driver is not there", None: "driver unknown"}[entry["usable"]]
    return f"{entry['kind']} ({state}{', ' + entry['detail'] if entry['detail'] else ''})"


def _heat(found: Mapping[str, Any]) -> str:
    zones = [zone for zone in found["thermal_zones"] if zone["celsius"] is not None]
    if not zones:
        return ""
    hottest = max(zones, key=lambda zone: float(zone["celsius"]))
    text = f"{hottest['celsius']:.1f} °C at {hottest['name']}"
    trips = [f"{trip['kind']} at {trip['celsius']:g}" for trip in hottest["trips"]]
    if found["plan"]["throttle_c"] is not None:
        trips.insert(0, f"throttles at {found['plan']['throttle_c']:g}")
    text += f" ({', '.join(trips)})" if trips else ""
    throttled = found["throttled_now"]
    return text if throttled is None else text + ("; throttled now" if throttled else "; not throttled")


def _power(found: Mapping[str, Any]) -> str:
    parts = [f"mode {found['power_mode']}"] if found["power_mode"] else []
    plan = found["plan"]
    watts = [
        f"about {plan[key]:g} W {when}"
        for key, when in (("watts_idle", "idle"), ("watts_load", "under load"))
        if plan[key] is not None
    ]
    return ", ".join(parts + watts)


def _operating_system(found: Mapping[str, Any]) -> str:
    parts = [found["os"], f"Linux {found['kernel']}" if found["kernel"] else None]
    if found["user_bits"]:
        parts.append(f"{found['user_bits']}-bit userland")
    if found["l4t"]:
        jetpack = f" (JetPack {found['jetpack']})" if found["jetpack"] else ""
        parts.append(f"Jetson Linux {found['l4t']}{jetpack}")
    if found["cgroup_version"]:
        parts.append(f"cgroup {found['cgroup_version']}")
    if found["emulated"]:
        parts.append("instructions are translated")
    return ", ".join(part for part in parts if part)


def _storage(found: Mapping[str, Any]) -> str:
    disk, areas, tpm = found["disk"], found["swap"], found["tpm"]
    parts = [f"{disk['free_mb']} of {disk['total_mb']} MiB free at {disk['path']}"] if disk else []
    parts += [f"swap on {area['kind']} {area['path']}" for area in areas or ()]
    if tpm:
        parts.append(f"TPM {tpm['version'] or ''}".strip() + ("" if tpm["usable"] else " without its node"))
    return ", ".join(parts)


def _runtimes(runtimes: Mapping[str, Any] | None) -> str:
    parts = []
    for name, state in (runtimes or {}).items():
        if "version" in state:
            parts.append(f"{name} {state['version']} ({', '.join(state.get('providers', ()))})")
        else:
            parts.append(f"{name}: {state.get('reason', 'not usable')}")
    return "; ".join(parts)


def _remarks(found: Mapping[str, Any]) -> list[str]:
    return [
        *found["profile_problems"],
        *found["notes"],
        *(note["text"] for note in found["profile_notes"]),
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ranges(cpus: Sequence[int]) -> str:
    """``0-1,4`` of 0, 1, 4, as the kernel writes it."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _wrapped(label: str, text: str, *, indent: int = _INDENT) -> list[str]:
    """The text after its label, broken between words."""
    lines: list[str] = []
    line = label.ljust(indent - 1)
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH and len(line) > indent:
            lines.append(line)
            line = " " * (indent - 1)
        line += f" {word}"
    return [*lines, line]
