"""The payloads inside the envelopes, docs/spec/link.md 3. Pure.

Invariants: strict (``"1"`` is not 1) and closed (an unknown field is an error: a device must not do half of what a
newer fleet meant); every text and list is bounded; each message that commands names tenant, device and enrolment.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from agent.base.errors import PeerError
from agent.wire.ops import Lane, OpClass

_PREFIX = "application/vnd.edge-agent."

#: As ``agent.wire.topics.NAME``. pydantic's "$" is the very end of the text.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Nonce = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]
Recipient = Annotated[str, StringConstraints(pattern=r"^age1[02-9ac-hj-np-z]{58}$")]
Moment = Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
Counter = Annotated[int, Field(ge=1, lt=1 << 53)]
Zero = Annotated[int, Field(ge=0, lt=1 << 53)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400, allow_inf_nan=False)]
OpName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9.-]{0,47}$")]
Text = Annotated[str, StringConstraints(max_length=2000)]

#: Nesting of ``args`` and ``config`` that is taken; the JSON reader itself would follow much deeper.
MAX_DEPTH = 16


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    #: payloadType of the envelope.
    KIND: ClassVar[str] = ""

    def encode(self) -> bytes:
        """UTF-8 JSON."""
        return self.model_dump_json(exclude_none=True).encode()


class _Addressed(_Message):
    """From or to one device of one enrolment."""

    tenant: Name
    device: Name
    epoch: Counter


class Window(_Message):
    """When a job may run: ``cron`` (five fields) says when it opens, in the time zone ``tz``, for ``duration_s``."""

    cron: Annotated[str, StringConstraints(min_length=9, max_length=120)]
    duration_s: Annotated[int, Field(ge=60, le=7 * 86_400)]
    tz: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "UTC"


class Job(_Message):
    """One durable command. ``seq`` rises with each new job of an enrolment; a job id is used once."""

    job_id: Name
    seq: Counter
    op: OpName
    kind: Annotated[OpClass, Field(alias="class")]
    args: dict[str, JsonValue] = Field(default_factory=dict)
    lane: Lane = "normal"
    #: 0 is done last, 9 first.
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    boot_nonce: Nonce | None = None
    not_after: Moment | None = None
    step_timeout_s: Seconds = 3600.0
    total_timeout_s: Seconds = 86_400.0
    window: Window | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, serialize_by_alias=True)


class JobDocument(_Addressed):
    """``dn/job``: the next job and what to cancel. ``generation`` rises with each document of an enrolment."""

    KIND = _PREFIX + "job+json"

    generation: Counter
    job: Job | None = None
    cancel: Annotated[list[Name], Field(max_length=64)] = []

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


class Desired(_Addressed):
    """``dn/desired``: how the device should be. ``version`` rises."""

    KIND = _PREFIX + "desired+json"

    version: Counter
    config: dict[str, JsonValue] = Field(default_factory=dict)


class RpcRequest(_Addressed):
    """``dn/rpc/<op>``: asked now, answered now, never kept. ``n`` is not used twice by a key in one start."""

    KIND = _PREFIX + "rpc+json"

    rpc_id: Name
    n: Counter
    boot_nonce: Nonce
    op: OpName
    args: dict[str, JsonValue] = Field(default_factory=dict)
    not_after: Moment | None = None


class Failure(_Message):
    """Why something did not happen. ``code`` is one of the reason codes of the specification."""

    code: Annotated[str, StringConstraints(max_length=64)]
    text: Text
    hint: Text = ""


JobStateName = Literal["queued", "running", "succeeded", "failed", "rejected", "cancelled"]
PhaseName = Literal[
    "accepted", "waiting_window", "downloading", "verifying", "installing", "trying", "activating", "probation",
    "rebooting",
]  # fmt: skip


class JobState(_Addressed):
    """``up/job/<id>``: where a job is. ``rev`` rises with each state of one job."""

    KIND = _PREFIX + "job-state+json"

    job_id: Name
    seq: Zero
    op: str
    rev: Counter
    state: JobStateName
    phase: PhaseName | None = None
    step: str | None = None
    #: Starts of the job: above 1 after a kill, a power cut or a reboot.
    attempt: Zero = 0
    at: Moment
    #: False while nobody vouches for the device's clock.
    clock_trusted: bool
    result: dict[str, JsonValue] | None = None
    error: Failure | None = None


class RpcAnswer(_Addressed):
    """``up/rpc``."""

    KIND = _PREFIX + "rpc-answer+json"

    rpc_id: Name
    op: str
    boot_nonce: Nonce
    result: dict[str, JsonValue] | None = None
    error: Failure | None = None


class Info(_Addressed):
    """``up/info``: who the device is, for this start. What ``facts`` and ``inventory`` hold is detection's."""

    KIND = _PREFIX + "info+json"

    protocol: Literal[1] = 1
    boot_nonce: Nonce
    at: Moment
    agent_version: str
    identity: Key
    ops: list[OpName]
    last_seq: Zero
    last_generation: Zero
    desired_version: Zero
    facts: dict[str, JsonValue]
    profile: str
    inventory: dict[str, JsonValue]
    #: To whom grants may be sealed (``age1…``), the identity in use first.
    grant: Annotated[list[Recipient], Field(max_length=8)] | None = None
    #: The version of the fleet's table from which the keys are that it obeys; None: they are those of its enrolment.
    keys_version: Counter | None = None


class Reported(_Addressed):
    """``up/reported``: how the device is. A function of catalog and journal, never stored."""

    KIND = _PREFIX + "reported+json"

    version: Zero
    at: Moment
    desired_version: Zero
    config_state: Literal["default", "applied", "confirming", "reverted", "refused"]
    config: dict[str, JsonValue]
    drift: list[dict[str, JsonValue]]
    health: str
    models: list[dict[str, JsonValue]]
    models_left_out: Zero = 0
    jobs: dict[str, JsonValue]
    maintenance: list[dict[str, JsonValue]]
    refused: dict[str, int]
    #: The release that runs, the one before, and how the last update went.
    agent: dict[str, JsonValue] | None = None


class Announcement(_Message):
    """``claim/<keyid>/up/announce``, signed by the identity that it names: a device that wants to be enrolled."""

    KIND = _PREFIX + "announcement+json"

    tenant: Name
    identity: Key
    boot_nonce: Nonce
    at: Moment
    #: PEM of the certificate request for the link's TLS key.
    csr: Annotated[str, StringConstraints(max_length=4096)]
    agent_version: str
    board: str | None = None
    serial: str | None = None
    facts: dict[str, JsonValue]


class SigningKey(_Message):
    """A key whose jobs a device obeys."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    public: Key
    classes: Annotated[list[OpClass], Field(min_length=1, max_length=3)]


class Enrolment(_Addressed):
    """``claim/<keyid>/dn/enrolment``, signed by the fleet's enrolment key: the device's name, and whom it obeys."""

    KIND = _PREFIX + "enrolment+json"

    identity: Key
    #: PEM, leaf first; empty where the integrator brings his own.
    certificate: Annotated[str, StringConstraints(max_length=16384)] = ""
    keys: Annotated[list[SigningKey], Field(min_length=1, max_length=32)]
    #: The fleet's latest table of keys when this was signed: later ones replace these keys.
    keys_version: Counter | None = None


_M = TypeVar("_M", bound=_Message)


def decode(data: bytes, message: type[_M]) -> _M:
    """The message in a payload. PeerError names the first wrong fields."""
    try:
        _require_plain(json.loads(data.decode("utf-8")))
        return message.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)[:3]
        told = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'message'}: {problem['msg']}" for problem in problems)
        raise PeerError(f"cannot read message: {told}") from error
    except (ValueError, RecursionError) as error:
        raise PeerError("cannot read message: it is not UTF-8 JSON of sensible depth and numbers") from error


def _require_plain(value: Any, depth: int = 0) -> None:
    """Neither nested deeply nor, as Python's JSON and pydantic's would have it, NaN or infinite."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("no number")
    if isinstance(value, dict):
        for item in value.values():
            _require_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _require_plain(item, depth + 1)
