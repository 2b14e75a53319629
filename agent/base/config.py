"""The configuration file: its keys, their defaults and limits.

Invariants: an unknown key is an error, so that a misspelt limit never silently fails to hold; every default serves on
every device; a loaded ``Config`` is frozen, a reload makes a new one. Only ``load`` and ``read_toml`` read the disk.
``read_toml`` and ``describe_problems`` are shared with whoever else reads TOML (hardware profiles).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from agent.base.errors import ConfigError
from agent.base.files import read_bounded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same reader, for Python 3.10

MAX_TOML_BYTES = 1 << 20

#: "auto" leaves a number to the profile of the board or to what is measured.
Auto = Literal["auto"]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Interval = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Hours = Annotated[float, Field(ge=0, le=8_760, allow_inf_nan=False)]
FilePath = Annotated[str, StringConstraints(max_length=4096, pattern=r"^(/[^\x00]*)?$")]
Megabytes = Annotated[int, Field(ge=1, le=1 << 24)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=65_536)]
#: pydantic's patterns are Rust's: "$" is the very end of the text, a newline before it does not match.
#: useradd(8) allows 32 characters; names of a directory service may have dots, '@' and capitals.
AccountName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}$")]
AccountId = Annotated[int, Field(ge=0, le=(1 << 32) - 2)]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


def _mirror(text: str) -> str:
    """The base of a mirror: https, or http of this very machine. What else a URL may have means nothing there."""
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    plain = named and parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    printable = text.isascii() and text.isprintable() and " " not in text
    if not named or not printable or "@" in parts.netloc or "?" in text or "#" in text:
        raise ValueError("be a URL of a host and a path, such as https://models.example/fleet")
    if parts.scheme != "https" and not plain:
        raise ValueError("begin with https:// (http:// is for this machine alone)")
    return text


Mirror = Annotated[str, StringConstraints(max_length=2048), AfterValidator(_mirror)]


class _Section(BaseModel):
    # strict: "30" is not 30, true is not 1. A file written by hand should mean what it says.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _ascending(section: _Section, *names: str) -> None:
    """Limits that contain one another: a smaller one above a larger one could never be reached."""
    for lower, upper in pairwise(names):
        if getattr(section, lower) > getattr(section, upper):
            raise ValueError(f"{lower} must not be above {upper}")


class ServerConfig(_Section):
    """Limits of the sockets: they keep one app from starving the others."""

    deadline_s: Seconds = 30.0
    idle_s: Seconds = 75.0
    max_body_mb: Megabytes = 64
    max_header_kb: Annotated[int, Field(ge=1, le=1024)] = 16
    connections_per_uid: Count = 128
    max_connections: Count = 512
    buffered_mb_per_uid: Megabytes = 128
    max_buffered_mb: Megabytes = 256
    queue_per_model: Count = 64
    drain_s: Seconds = 20.0

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        _ascending(self, "connections_per_uid", "max_connections")
        _ascending(self, "max_body_mb", "buffered_mb_per_uid", "max_buffered_mb")
        return self


class StoreConfig(_Section):
    """The encrypted store."""

    quota_mb: Megabytes = 4096


class SelectionConfig(_Section):
    """How candidates are tried."""

    candidates: Annotated[int, Field(ge=1, le=64)] = 6
    # Halfway each candidate gets a fresh process, hence at least two rounds before and after.
    min_rounds: Annotated[int, Field(ge=4, le=10_000)] = 12
    max_rounds: Annotated[int, Field(ge=4, le=10_000)] = 48
    trial_timeout_s: Seconds = 120.0
    trial_memory_mb: Megabytes | Auto = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"
    quarantine_after: Annotated[int, Field(ge=1, le=100)] = 3
    #: Whether what was chosen is also kept in the form that loads fastest here.
    prepare: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> SelectionConfig:
        _ascending(self, "min_rounds", "max_rounds")
        return self


class MemoryConfig(_Section):
    """Memory for loaded models: how much, and what is in it.

    ``keep_alive_s``: a model that nobody asks for is let go of after so long, or only when others need the room.
    ``preload`` is loaded at the start as far as there is room; ``pin`` is loaded and never let go of.
    """

    budget_mb: Megabytes | Auto = "auto"
    keep_alive_s: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | Literal["forever"] = "forever"
    preload: Annotated[tuple[ModelName, ...], Field(strict=False, max_length=10_000)] = ()
    pin: Annotated[tuple[ModelName, ...], Field(strict=False, max_length=10_000)] = ()


class AccessRule(_Section):
    """Who may use one model: any one of the lists suffices. Empty lists mean nobody but root."""

    # strict=False on the tuple alone: TOML has lists; what is in them stays strict.
    uids: Annotated[tuple[AccountId, ...], Field(strict=False)] = ()
    gids: Annotated[tuple[AccountId, ...], Field(strict=False)] = ()
    users: Annotated[tuple[AccountName, ...], Field(strict=False)] = ()
    groups: Annotated[tuple[AccountName, ...], Field(strict=False)] = ()


class AccessConfig(_Section):
    """Who may use which model. ``default`` holds for models without a rule: whoever may connect, or nobody but root."""

    default: Literal["group", "deny"] = "group"
    models: dict[ModelName, AccessRule] = Field(default_factory=dict)


class TrustConfig(_Section):
    """Whether bundles without a signature may be added on the device."""

    unsigned: Literal["allow", "refuse"] = "allow"


class LogConfig(_Section):
    """What is logged to stderr."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class SocketsConfig(_Section):
    """Owners of the sockets where core itself makes them; under systemd the socket units say so.

    ``infer_group`` is the apps' group ("" = the group that core runs as); ``link_user`` may carry on the admin socket.
    """

    infer_group: AccountName | Literal[""] = ""
    link_user: AccountName = "edge-agent-link"


class LinkConfig(_Section):
    """The broker. Without ``host`` the agent has no fleet to talk to, and needs none.

    Files are opened by the user of link. Empty ``cert_file`` and ``key_file`` mean those that enrolment gave to it.
    """

    host: Annotated[str, StringConstraints(max_length=253, pattern=r"^[A-Za-z0-9.:_-]*$")] = ""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8883
    tls: bool = True
    ca_file: FilePath = ""
    cert_file: FilePath = ""
    key_file: FilePath = ""
    #: Where and with what a device asks to be enrolled; "" and 0 mean the same as above.
    claim_host: Annotated[str, StringConstraints(max_length=253, pattern=r"^[A-Za-z0-9.:_-]*$")] = ""
    claim_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    claim_cert_file: FilePath = ""
    claim_key_file: FilePath = ""
    username: Annotated[str, StringConstraints(max_length=256)] = ""
    password_file: FilePath = ""
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 60
    #: The first connection after a start is made within so many seconds, drawn: a fleet comes back spread out.
    splay_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 10.0
    outbox_mb: Annotated[int, Field(ge=1, le=4096)] = 16
    #: How fast telemetry is handed over, above all that of an outage; 0 = as fast as it goes.
    outbox_kib_s: Annotated[int, Field(ge=0, le=1 << 30)] = 1024
    #: A configuration that the fleet applied is taken back when the link has not come back with it by then.
    confirm_s: Seconds = 300.0


class DeliveryConfig(_Section):
    """Where link fetches models from: mirrors of the repository, tried in turn, else blocks through the broker.

    A mirror is the URL below which ``metadata`` and ``targets`` lie. ``rate_kib_s`` 0 = as fast as it comes.
    """

    mirrors: Annotated[tuple[Mirror, ...], Field(strict=False, max_length=16)] = ()
    ca_file: FilePath = ""
    rate_kib_s: Annotated[int, Field(ge=0, le=1 << 30)] = 0
    blocks: bool = True


class TelemetryConfig(_Section):
    """Seconds between the records of a stream; 0 = never."""

    status_s: Interval = 60.0
    models_s: Interval = 60.0
    heat_s: Interval = 60.0
    memory_s: Interval = 60.0
    energy_s: Interval = 60.0
    health_s: Interval = 300.0


class MaintenanceConfig(_Section):
    """The maintenance plan: hours between two runs of a task (0 = never), and when it may run."""

    #: Five cron fields that say when maintenance may begin; "" = at any time.
    window: Annotated[str, StringConstraints(max_length=120)] = ""
    duration_s: Annotated[int, Field(ge=60, le=7 * 86_400)] = 7200
    tz: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "UTC"
    scrub_h: Hours = 168.0
    sweep_h: Hours = 24.0
    golden_h: Hours = 24.0
    remeasure_h: Hours = 24.0
    ages_h: Hours = 24.0
    disk_h: Hours = 6.0
    clock_h: Hours = 6.0
    repository_h: Hours = 24.0


class ProbationConfig(_Section):
    """How long a new version is on probation, and what makes it worse than the one before it.

    It ends after so many ``requests`` or ``seconds``. ``shadow``: the share of its requests that the version before
    answers, too, while the device is idle. ``local``: also for versions that somebody adds on the device.
    """

    requests: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    seconds: Seconds = 600.0
    max_error_rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.02
    max_latency_ratio: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 1.5
    shadow: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    min_agreement: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] = 0.5
    local: bool = True


class UpdateConfig(_Section):
    """How long a new release of the agent is on probation: core confirms it after ``settle_s``, if all is well by then.

    Without a confirmation ``within_s`` after its start the release before is put back.
    """

    settle_s: Seconds = 60.0
    within_s: Seconds = 900.0

    @model_validator(mode="after")
    def _consistent(self) -> UpdateConfig:
        _ascending(self, "settle_s", "within_s")
        return self


class ClockConfig(_Section):
    """Whether dates of jobs and windows may be believed: when the kernel's clock is disciplined, always, or never."""

    trust: Literal["auto", "always", "never"] = "auto"


class CacheConfig(_Section):
    """Answers of a model are kept for ``ttl_s`` seconds, in ``max_mb`` of memory."""

    ttl_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    max_mb: Annotated[float, Field(gt=0, le=1 << 24, allow_inf_nan=False)] = 8.0
    prewarm: bool = False


class BatchingConfig(_Section):
    """Joining of concurrent requests for one model."""

    max_size: Annotated[int, Field(ge=1, le=1024)]
    max_delay_us: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class GovernorConfig(_Section):
    """Stepping down to cheaper variants under memory pressure, heat and power caps, and back.

    ``memory_some``, ``memory_full``: percent of the time that somebody, or everybody, waits for memory.
    It presses when ``available_share`` of the memory is left, ``heat_margin_c`` degrees to a trip point, ``cap_share``
    of the clock.
    ``root``: a folder with the files of a recorded machine, or of several in turn, in place of the live one's sensors.
    """

    enabled: bool = True
    interval_s: Annotated[float, Field(ge=0.05, le=3600, allow_inf_nan=False)] = 5.0
    step_down_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 10.0
    step_up_s: Annotated[float, Field(ge=0.05, le=86_400, allow_inf_nan=False)] = 60.0
    memory_some: Percent = 20.0
    memory_full: Percent = 10.0
    available_share: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.05
    heat_margin_c: Annotated[float, Field(ge=0, le=50, allow_inf_nan=False)] = 3.0
    heat_hysteresis_c: Annotated[float, Field(ge=0.5, le=50, allow_inf_nan=False)] = 5.0
    cap_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.9
    root: FilePath = ""


class CascadeConfig(_Section):
    """As ``policy.cascade`` of a manifest: the variant that answers first, and the one that is asked when unsure."""

    first: ModelName
    then: ModelName
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    output: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    measure: Literal["max_softmax", "margin", "entropy"] = "max_softmax"


class ModelConfig(_Section):
    """What the device's owner wants of one model; it wins over the model's manifest. None: as the manifest has it."""

    governed: bool = True
    cache: CacheConfig | Literal[False] | None = None
    batching: BatchingConfig | Literal[False] | None = None
    cascade: CascadeConfig | Literal[False] | None = None


class Config(_Section):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    store: StoreConfig = StoreConfig()
    selection: SelectionConfig = SelectionConfig()
    memory: MemoryConfig = MemoryConfig()
    access: AccessConfig = AccessConfig()
    trust: TrustConfig = TrustConfig()
    log: LogConfig = LogConfig()
    sockets: SocketsConfig = SocketsConfig()
    link: LinkConfig = LinkConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    maintenance: MaintenanceConfig = MaintenanceConfig()
    probation: ProbationConfig = ProbationConfig()
    update: UpdateConfig = UpdateConfig()
    clock: ClockConfig = ClockConfig()
    governor: GovernorConfig = GovernorConfig()
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)


def parse(document: Mapping[str, Any], source: str) -> Config:
    """A parsed TOML document as a Config. ConfigError names ``source``, the field, and what it must be."""
    try:
        return Config.model_validate(dict(document))
    except ValidationError as error:
        raise ConfigError(
            f"cannot read {source}: {describe_problems(error, Config)}",
            hint="every key with its default is in docs/reference/config.md",
        ) from error


def load(path: Path | None, *, explicit: bool) -> Config:
    """The configuration in ``path``. No path, or a missing file that nobody asked for, means the defaults. ConfigError.

    A file that is there and cannot be read is always an error: defaults in its place would lift limits unnoticed.
    """
    if path is None or (not explicit and not os.path.lexists(path)):
        return Config()
    return parse(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML document in ``path``, at most 1 MiB. ConfigError names the file and, for syntax, line and column."""
    try:
        # A pipe that nobody has filled yet would read as empty, and an empty file means the defaults.
        if path.is_fifo():
            raise ConfigError(f"cannot read {path}: it is a pipe, not a file")
        data = read_bounded(path, MAX_TOML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_TOML_BYTES:
        raise ConfigError(f"cannot read {path}: larger than {MAX_TOML_BYTES} bytes")
    try:
        document: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"cannot read {path}: line {line}: not UTF-8 text") from error
    except ValueError as error:  # TOMLDecodeError is one; int() raises it plain for a number of thousands of digits
        raise ConfigError(f"cannot read {path}: {_syntax(str(error))}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read {path}: nested too deeply") from error
    return document


def describe_problems(error: ValidationError, model: type[BaseModel] | None = None, *, limit: int = 5) -> str:
    """``field: must be …`` for each problem, the first ``limit`` of them; near names of ``model`` for unknown keys."""
    lines: list[str] = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        # A table that may be switched off by "false" is a union too: its own name is none of the file's.
        location = [str(part) for part in problem["loc"] if not re.fullmatch(r"[A-Z]\w+Config", str(part))]
        # A union reports each member ("budget_mb.literal['auto']"), a mapping its keys ("models.A B.[key]").
        if location and re.fullmatch(r"(constrained-)?(int|float|str)|.*[\[(].*", location[-1]):
            location.pop()
        field = ".".join(location) or "(file)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown key{_near(problem['loc'], model)}")
        else:
            text = re.sub(r"^(Input|String|Value error,|Tuple|List|Dictionary)( should)? ?", "", problem["msg"])
            lines.append(f"{field}: {_requirement(text)}")
    unique = _join_unions(_without_false(lines))
    more = f" (and {len(unique) - limit} more)" if len(unique) > limit else ""
    return "; ".join(unique[:limit]) + more


def _syntax(message: str) -> str:
    """``Invalid value (at line 3, column 5)`` -> ``line 3, column 5: invalid value``."""
    match = re.fullmatch(r"(?s)(.*?) \(at (.*)\)", message)
    return f"{match[2]}: {match[1][:1].lower()}{match[1][1:]}" if match else message


def _requirement(text: str) -> str:
    """pydantic's sentence without its subject: ``be greater than 0`` -> ``must be greater than 0``."""
    text = re.sub(r"a valid dictionary or instance of \w+", "a table", text)
    return f"must {text}" if text.startswith(("be ", "begin ", "match ", "have ", "not ")) else text


def _near(location: tuple[int | str, ...], model: type[BaseModel] | None) -> str:
    """Suggest the key that was probably meant, among those of the section that the unknown one stands in."""
    section: Any = model
    for part in location[:-1]:
        known = isinstance(section, type) and issubclass(section, BaseModel)
        field = section.model_fields.get(str(part)) if known else None
        section = field.annotation if field else None
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return ""
    import difflib  # noqa: PLC0415 - only where a key is misspelt

    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _without_false(lines: list[str]) -> list[str]:
    """Where a table is wrong within, nobody meant to switch it off by "false"."""
    said = "must be False"
    fields = [line.partition(": ")[0] for line in lines]
    return [
        line.replace(said, "must be false")
        for line in lines
        if not (line.endswith(said) and any(field.startswith(line.removesuffix(f": {said}") + ".") for field in fields))
    ]


def _join_unions(lines: list[str]) -> list[str]:
    """One line a field: the members of a union are joined by "or"."""
    by_field: dict[str, list[str]] = {}
    for line in lines:
        field, _, text = line.partition(": ")
        by_field.setdefault(field, []).append(text)
    return [
        f"{field}: {texts[0]}" + "".join(f" or {text.removeprefix('must ')}" for text in texts[1:])
        for field, texts in by_field.items()
    ]
