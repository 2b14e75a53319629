"""Profiles of board families: what files and features cannot tell, kept as data in ``hw_profiles/*.toml``.

A profile is chosen by rules in its own file, so a new board is a new file. The board wins over its features: rules on
the device tree's ``compatible`` come first (the most specific entry that matches), then the board's name or model, then
the CPU's name; profiles that match by architecture and features alone are for what no family claims. A profile of a
later folder (the user's) replaces one of the same id, and wins where both match by board. A broken file is a problem
that names file and field, or the line for syntax; it stops nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from agent.base.errors import ConfigError
from agent.hardware.cpuinfo import MAX_CPU
from agent.hardware.facts import FEATURES, Facts
from agent.hardware.toml_fields import Fields

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
_MAX_FILE = 1 << 16
_MAX_FILES = 512
_ID = r"[a-z0-9][a-z0-9._-]{0,63}"


@dataclass(frozen=True, slots=True)
class Match:
    """When a profile fits. ``compatible``, ``model`` and ``cpu_model`` are patterns with ``*`` and ``?``, of which one
    has to match; all other rules are conditions that have to hold as well. Unknown holds no condition."""

    compatible: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    cpu_model: tuple[str, ...] = ()
    arch: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    features_absent: tuple[str, ...] = ()
    big_core_types: tuple[str, ...] = ()
    emulated: bool | None = None
    supported: bool = True
    #: Among profiles that match by features alone the lowest counts.
    order: int = 100


@dataclass(frozen=True, slots=True)
class HeatLimits:
    """Where the firmware holds the clock back, for boards whose kernel shows no such trip point."""

    throttle_c: float | None = None
    critical_c: float | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing, and where it is from."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A board family. Sizes in MiB; watts of the whole board; the two factors are priors, never verdicts.

    ``int8_gain``: how many times faster int8 is expected to run than fp32 on the CPU. ``fp16_cpu_penalty``: how many
    times slower fp16 is expected to be than fp32 there. ``threads`` None means one for each core that serves.
    """

    id: str
    title: str
    match: Match = field(default_factory=Match)
    ram_classes_mb: tuple[int, ...] = ()
    ram_slack: float = 0.25
    memory_share: float = 0.5
    big_cores: tuple[int, ...] = ()
    threads: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    cpu_precisions: tuple[str, ...] = ("fp32", "int8", "fp16")
    gpu_precisions: tuple[str, ...] = ()
    int8_gain: float = 1.0
    fp16_cpu_penalty: float = 1.5
    heat: HeatLimits | None = None
    watts_idle: float | None = None
    watts_load: float | None = None
    notes: tuple[Note, ...] = ()
    origin: str = "built in"
    #: The position of its folder; a later folder's board rules win.
    layer: int = 0


#: What is left when not one profile could be read: safe everywhere, best nowhere.
FALLBACK = Profile(id="fallback", title="Any machine (no profile could be read)")


def shipped_profiles_dir() -> Path:
    """The folder of the profiles that come with the agent, in a wheel as in a checkout."""
    return Path(__file__).resolve().parent.parent / "hw_profiles"


def load_profiles(directories: Sequence[Path]) -> tuple[list[Profile], list[str]]:
    """The profiles of all folders, later ones winning by id, and the problems met. A missing folder is no problem."""
    profiles: dict[str, Profile] = {}
    problems: list[str] = []
    for layer, directory in enumerate(directories):
        own: dict[str, Profile] = {}
        for path in _profile_files(directory, problems):
            try:
                profile = read_profile(path, layer=layer)
            except ConfigError as error:
                problems.append(str(error))
                continue
            if profile.id in own:
                problems.append(f"cannot read profile {path}: id: {profile.id} is taken by {own[profile.id].origin}")
                continue
            own[profile.id] = profile
        profiles.update(own)
    return list(profiles.values()), problems


def _profile_files(directory: Path, problems: list[str]) -> list[Path]:
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix == ".toml")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"cannot read profiles in {directory}: {error.strerror}")
        return []
    if len(files) > _MAX_FILES:
        problems.append(f"cannot read profiles in {directory}: more than {_MAX_FILES} files, the rest is ignored")
    return files[:_MAX_FILES]


def read_profile(path: Path, *, layer: int = 0) -> Profile:
    """One profile file. ConfigError naming file and field, or the line for syntax."""
    try:
        if not path.is_file():
            raise ConfigError(f"cannot read profile {path}: not a file")
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"cannot read profile {path}: {error.strerror}") from error
    if len(data) > _MAX_FILE:
        raise ConfigError(f"cannot read profile {path}: larger than {_MAX_FILE} bytes")
    return parse_profile(data, origin=str(path), layer=layer)


def parse_profile(data: bytes, *, origin: str, layer: int = 0) -> Profile:
    """A profile from TOML. ConfigError as above, naming up to five fields."""
    problems: list[str] = []
    fields = Fields(_toml(data, origin), problems)
    profile = _profile(fields, origin, layer)
    fields.close()
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ConfigError(
            f"cannot read profile {origin}: {'; '.join(problems[:5])}{more}",
            hint="docs/how-to/board-profile.md lists the fields",
        )
    return profile


def _toml(data: bytes, origin: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib  # noqa: PLC0415  nothing but profiles needs it here
    else:
        import tomli as tomllib  # noqa: PLC0415
    try:
        table: dict[str, Any] = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"cannot read profile {origin}: line {line}: not UTF-8") from error
    except ValueError as error:  # TOMLDecodeError is one; int() raises it plain for thousands of digits
        raise ConfigError(f"cannot read profile {origin}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read profile {origin}: nested too deeply") from error
    return table


def _profile(fields: Fields, origin: str, layer: int) -> Profile:
    identity = fields.text("id", required=True)
    if identity and not re.fullmatch(_ID, identity):
        fields.problem("id", "must be lower case letters, digits, '.', '_' and '-'")
    return Profile(
        id=identity,
        title=fields.text("title", required=True),
        match=_match(fields),
        ram_classes_mb=fields.integers("ram_classes_mb", most=1 << 24),
        ram_slack=fields.number("ram_slack", least=0, most=0.9, default=0.25) or 0.0,
        memory_share=fields.number("memory_share", least=0.05, most=0.95, default=0.5) or 0.5,
        big_cores=fields.integers("big_cores", most=MAX_CPU),
        threads=fields.integer("threads", least=1, most=1024),
        providers=fields.texts("providers") or ("CPUExecutionProvider",),
        cpu_precisions=fields.words("cpu_precisions", PRECISIONS) or ("fp32", "int8", "fp16"),
        gpu_precisions=fields.words("gpu_precisions", PRECISIONS),
        int8_gain=fields.number("int8_gain", least=0.05, most=20, default=1.0) or 1.0,
        fp16_cpu_penalty=fields.number("fp16_cpu_penalty", least=0.2, most=20, default=1.5) or 1.5,
        heat=_heat(fields.table("heat")),
        watts_idle=fields.number("watts_idle", least=0.01, most=2000),
        watts_load=fields.number("watts_load", least=0.01, most=2000),
        notes=tuple(_note(entry) for entry in fields.tables("notes")),
        origin=origin,
        layer=layer,
    )


def _match(fields: Fields) -> Match:
    rules = fields.table("match")
    if rules is None:
        fields.problem("match", "missing: without a rule the profile is never chosen")
        return Match()
    supported = rules.flag("supported")
    order = rules.integer("order", least=0, most=1000)
    match = Match(
        compatible=rules.texts("compatible"),
        model=rules.texts("model"),
        cpu_model=rules.texts("cpu_model"),
        arch=rules.texts("arch"),
        features=rules.words("features", FEATURES),
        features_absent=rules.words("features_absent", FEATURES),
        big_core_types=rules.texts("big_core_types"),
        emulated=rules.flag("emulated"),
        supported=supported is not False,
        order=100 if order is None else order,
    )
    rules.close()
    if supported is not False and not (match.compatible or match.model or match.cpu_model or match.arch):
        fields.problem("match", "needs compatible, model, cpu_model or arch")
    return match


def _heat(table: Fields | None) -> HeatLimits | None:
    if table is None:
        return None
    limits = HeatLimits(table.number("throttle_c", least=30, most=150), table.number("critical_c", least=30, most=150))
    table.close()
    return limits


def _note(table: Fields) -> Note:
    note = Note(table.text("text", required=True), table.text("source", required=True))
    table.close()
    return note


def choose_profile(facts: Facts, profiles: Iterable[Profile]) -> Profile:
    """The profile that fits best; ``FALLBACK`` when none does. Pure; see the module's text for the order."""
    ranked = [(rank, profile) for profile in profiles if (rank := _rank(facts, profile)) is not None]
    return min(ranked, key=lambda pair: (*pair[0], pair[1].id))[1] if ranked else FALLBACK


#: Lower is better: by features only, folder, kind of rule, entry of ``compatible``, vagueness, order.
_Rank = tuple[int, int, int, int, int, int]


def _rank(facts: Facts, profile: Profile) -> _Rank | None:
    match = profile.match
    if facts.supported != match.supported or not _conditions_hold(facts, match):
        return None
    for position, entry in enumerate(facts.compatible):
        if (vagueness := _vagueness((entry,), match.compatible)) is not None:
            return (0, -profile.layer, 0, position, vagueness, match.order)
    names = tuple(name for name in (facts.board, facts.model) if name)
    if (vagueness := _vagueness(names, match.model)) is not None:
        return (0, -profile.layer, 1, 0, vagueness, match.order)
    if (vagueness := _vagueness((facts.cpu_model or "",), match.cpu_model)) is not None:
        return (0, -profile.layer, 2, 0, vagueness, match.order)
    if match.compatible or match.model or match.cpu_model:
        return None
    return (1, -profile.layer, 0, 0, 0, match.order)


def _conditions_hold(facts: Facts, match: Match) -> bool:
    if match.arch and not any(fnmatchcase(facts.arch or "", pattern) for pattern in match.arch):
        return False
    if match.emulated is not None and facts.emulated != match.emulated:
        return False
    if match.big_core_types and not (facts.big_core_types and set(facts.big_core_types) <= set(match.big_core_types)):
        return False
    return all(facts.features.get(name) is True for name in match.features) and all(
        facts.features.get(name) is False for name in match.features_absent
    )


def _vagueness(names: Sequence[str], patterns: Sequence[str]) -> int | None:
    """How loosely the tightest matching pattern matches: 0 for an exact one, else less for more letters; None: none."""
    best: int | None = None
    for pattern in patterns:
        if any(fnmatchcase(name.lower(), pattern.lower()) for name in names):
            letters = len(pattern.replace("*", "").replace("?", ""))
            vagueness = 0 if letters == len(pattern) else 1000 - min(letters, 999)
            best = vagueness if best is None else min(best, vagueness)
    return best


def ram_class_mb(facts: Facts, profile: Profile) -> int | None:
    """The nominal memory that the board was sold with: firmware and GPU keep a part, so "8 GB" may show 6451 MiB."""
    total = facts.mem_total_mb
    if total is None:
        return None
    fitting = [size for size in profile.ram_classes_mb if size * (1 - profile.ram_slack) <= total <= size]
    return min(fitting, default=None)


def memory_budget_mb(facts: Facts, profile: Profile) -> int | None:
    """MiB that models may take in all: the profile's share of what RAM and cgroups allow. What is free now is another
    matter: compare with ``mem_available_mb`` before loading."""
    return None if facts.mem_limit_mb is None else int(facts.mem_limit_mb * profile.memory_share)


def serving_cpus(facts: Facts, profile: Profile) -> tuple[int, ...] | None:
    """The CPUs to run models on: the big ones among those that we may use, all of these where none of them is big."""
    usable = facts.usable_cpus or facts.online_cpus
    if usable is None:
        return None
    big = frozenset(profile.big_cores or facts.big_cores or ())
    return tuple(cpu for cpu in usable if cpu in big) or usable


def thread_count(facts: Facts, profile: Profile) -> int:
    """Threads for one inference: one a serving CPU, within the profile's number and the CPU quota; at least 1."""
    cpus = serving_cpus(facts, profile)
    limits = [len(cpus) if cpus else 1]
    if profile.threads is not None:
        limits.append(profile.threads)
    if facts.cpu_limit is not None:
        limits.append(int(facts.cpu_limit))
    return max(1, min(limits))
