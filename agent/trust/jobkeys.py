"""The keys whose jobs a fleet's devices obey, as the operator's repository lists them: the target ``keys/jobs.json``.

Pure. The threshold of the role ``targets`` protects the table; its version says which of two is the newer one, and is
compared with that under which a device was enrolled. Closed as every format here: an unknown field is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.base.errors import PeerError
from agent.trust.allegiance import KeyRow, Name, TrustedKey, trusted_keys

TARGET = "keys/jobs.json"
FORMAT: Literal["edge-job-keys/1"] = "edge-job-keys/1"
MAX_TABLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class JobKeys:
    """Who may command the devices of a tenant, by keyid. ``version`` rises with each table."""

    version: int
    tenant: str
    keys: Mapping[str, TrustedKey]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["edge-job-keys/1"] = FORMAT
    version: Annotated[int, Field(ge=1, lt=1 << 53)]
    tenant: Name
    #: None would leave a device that nobody can command.
    keys: Annotated[tuple[KeyRow, ...], Field(strict=False, min_length=1, max_length=32)]


def parse_table(data: bytes) -> JobKeys:
    """The table in ``data`` (UTF-8 JSON). PeerError."""
    if len(data) > MAX_TABLE_BYTES:
        raise PeerError(f"cannot read keys for jobs: larger than {MAX_TABLE_BYTES} bytes")
    try:
        found = _Table.model_validate_json(data)
        return JobKeys(
            found.version, found.tenant, trusted_keys([(key.name, key.public, key.classes) for key in found.keys])
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"])) or "document"
        raise PeerError(f"cannot read keys for jobs: {where}: {problem['msg']}") from error
    except ValueError as error:
        raise PeerError(f"cannot read keys for jobs: {error}") from error


def encode_table(version: int, tenant: str, rows: Sequence[tuple[str, str, Sequence[str]]]) -> bytes:
    """The table of these rows of name, public key in base64 and classes. ValueError when it would not be taken."""
    keys = [{"name": name, "public": public, "classes": list(classes)} for name, public, classes in rows]
    made = _Table.model_validate({"version": version, "tenant": tenant, "keys": keys})
    return made.model_dump_json(indent=1).encode() + b"\n"
