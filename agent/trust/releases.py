"""Releases of the agent: what is signed of one, and what core and root's updater write for each other. Pure.

A release is a target of the operator's repository, ``releases/VERSION/ARCH-cpXY.tar``: a plain tar of wheels. What
kind of machine it is for, and which formats of store and journal it reads and writes, is signed with it. An unknown
field there says nothing to this agent: a later release must still be judged by an earlier agent.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from agent.base.errors import PeerError, RefusedError

FORMAT: Literal["edge-agent-release/1"] = "edge-agent-release/1"
#: What this agent writes into store and journal. One more with each change that the agent before could not read; a
#: change that it only passes over is none (docs/spec/update.md 5).
STATE_FORMAT = 1
#: The oldest that it reads.
OLDEST_STATE = 1
#: Of a tar of wheels; ONNX Runtime with all that belongs to it takes about 70 MB.
MAX_RELEASE_BYTES = 1 << 30
MAX_WHEELS = 256
MAX_DOCUMENT_BYTES = 16 << 10

Version = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}(\.[0-9]{1,5}){2}(rc[0-9]{1,3})?$")]
Arch = Literal["x86_64", "aarch64", "armv7l"]
_Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
_EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[0-9][0-9A-Za-z.+]{0,63}$")]
_Format = Annotated[int, Field(ge=1, le=1 << 20)]
_WHEEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+!-]{0,127}\.whl", re.ASCII)
_VERSION = re.compile(r"(\d{1,5})\.(\d{1,5})\.(\d{1,5})(?:rc(\d{1,3}))?", re.ASCII)

#: What becomes of an update, in this order; ``kept``, ``refused`` and ``returned`` are ends.
Stage = Literal["verifying", "making", "trying", "switching", "probation", "returning", "kept", "refused", "returned"]
ENDS: frozenset[Stage] = frozenset(("kept", "refused", "returned"))

_Model = TypeVar("_Model", bound=BaseModel)


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Release(_Document):
    """What the operator signs of a release. ``state`` is the format that it writes, ``reads`` the oldest that it reads.

    ``instead_of``: later versions, on the devices of which this one may be installed all the same.
    """

    format: Literal["edge-agent-release/1"] = FORMAT
    version: Version
    arch: Arch
    python: Annotated[str, StringConstraints(pattern=r"^3\.[0-9]{1,2}$")]
    state: _Format = 1
    reads: _Format = 1
    instead_of: Annotated[tuple[Version, ...], Field(strict=False, max_length=32)] = ()


class Request(_Document):
    """What core asks of root. ``link``: whether the fleet could be reached before, so that it must be afterwards."""

    format: Literal["edge-update-request/1"] = "edge-update-request/1"
    id: _Id
    version: Version
    link: bool = False


class Verdict(_Document):
    """What core says of an update under way: keep it, or back."""

    format: Literal["edge-update-verdict/1"] = "edge-update-verdict/1"
    id: _Id
    say: Literal["keep", "back"]
    reason: Annotated[str, StringConstraints(max_length=2000)] = ""


class Course(_Document):
    """How far root is with an update. ``name`` and ``before`` are environments, ``starts`` counts beginnings anew."""

    format: Literal["edge-update/1"] = "edge-update/1"
    id: _Id
    version: Version
    stage: Stage
    at: str = ""
    reason: Annotated[str, StringConstraints(max_length=2000)] = ""
    name: _EnvironmentName | None = None
    before: _EnvironmentName | None = None
    previous: _EnvironmentName | None = None
    restarted: bool = False
    starts: Annotated[int, Field(ge=0)] = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be done."""
        return self.stage in ENDS


def parse(data: bytes, kind: type[_Model]) -> _Model:
    """One of the documents above. PeerError."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "document"
        raise PeerError(f"cannot read {kind.__name__.lower()}: {field}: {problem['msg']}") from error


def parse_release(custom: Mapping[str, Any] | None) -> Release:
    """What is signed of a release. RefusedError where it is none."""
    try:
        return Release.model_validate(custom or {})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "custom"
        raise RefusedError(
            f"cannot update the agent: what is signed of the release: {field}: {problem['msg']}"
        ) from error


# -- machines and versions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """What a release must be made for: the processor that Python was built for, and Python's version."""

    arch: str
    python: str

    @property
    def text(self) -> str:
        """As in the name of a target."""
        return f"{self.arch}-cp{self.python.replace('.', '')}"


def this_kind() -> Kind:
    """Of the interpreter that runs this: under a 64-bit kernel it may be a 32-bit one."""
    machine, bits = os.uname().machine, struct.calcsize("P") * 8
    arch = "armv7l" if bits == 32 and machine in ("armv7l", "armv8l", "aarch64") else machine
    return Kind(arch, f"{sys.version_info[0]}.{sys.version_info[1]}")


def release_target(version: str, kind: Kind) -> str:
    """The target of a release for that kind of machine."""
    return f"releases/{version}/{kind.text}.tar"


def order(version: str) -> tuple[int, ...]:
    """What versions are compared by; a candidate is before its release. PeerError for what is none."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise PeerError(f"cannot read version '{version}': it is not like 1.2.3 or 1.2.3rc1")
    *numbers, candidate = match.groups()
    return (*map(int, numbers), 1000 if candidate is None else int(candidate))


def is_wheel(name: str) -> bool:
    """Whether this is a plain name of a wheel."""
    return _WHEEL.fullmatch(name) is not None


def require_fit(release: Release, version: str, kind: Kind, present: str, state: int = STATE_FORMAT) -> None:
    """RefusedError unless ``release`` is the one that was named, for this machine, and may follow ``present``.

    ``state`` is what the present agent writes: the release must read it, and may write one more at most, since the
    present agent is what is gone back to.
    """
    cannot = f"cannot update the agent to {version}"
    if release.version != version:
        raise RefusedError(f"{cannot}: the repository lists {release.version} under that name")
    if (release.arch, release.python) != (kind.arch, kind.python):
        raise RefusedError(f"{cannot}: it is for {release.arch} with Python {release.python}, this is {kind.text}")
    if order(version) < order(present) and present not in release.instead_of:
        raise RefusedError(
            f"{cannot}: {present} is installed, and the release does not say that it may take its place",
            hint="edge-fleet publish-release --instead-of",
        )
    if not release.reads <= state <= release.state + 1:
        raise RefusedError(
            f"{cannot}: it reads formats {release.reads} to {release.state + 1}, this device has {state}"
        )
    if release.state > state + 1:
        raise RefusedError(
            f"{cannot}: it writes format {release.state}, this agent reads up to {state + 1}: no way back",
            hint="install the releases between, one after the other",
        )
