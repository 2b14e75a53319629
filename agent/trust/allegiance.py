"""Whom a device obeys: ``trust.toml`` beside the configuration file, and what an enrolment adds to it.

``trust.toml`` names the tenant, and either the device itself with the keys whose jobs it obeys (``device``, ``epoch``,
``[[keys]]``), or the one key that may enrol it (``[enrolment]``). It is root's file: whoever can write it can give the
device orders, so that a file that others may write is refused. Pure but for ``load``.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from agent.base.config import describe_problems, read_toml
from agent.base.errors import ConfigError, RefusedError
from agent.base.files import read_bounded
from agent.trust.envelope import EnvelopeError, PublicKey

#: Most special last: what a key may sign is named in its row, never implied by another class.
KeyClass = Literal["observe", "change", "destroy"]
#: What a device is shipped with to believe its operator's repository.
ROOT_NAME = "root.json"
MAX_ROOT_BYTES = 128 << 10
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_Public = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A key that may command: its owner's name, and the classes of operations that it may sign."""

    name: str
    public: PublicKey
    classes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Allegiance:
    """Tenant, device and enrolment number, and the keys by keyid. Without ``device`` it still waits to be enrolled.

    ``keys_version`` is that of the fleet's table from which the keys are (``agent.trust.jobkeys``), 0 for none.
    """

    tenant: str
    device: str | None = None
    epoch: int = 0
    keys: Mapping[str, TrustedKey] = field(default_factory=dict)
    enroller: PublicKey | None = None
    keys_version: int = 0

    @property
    def public_keys(self) -> dict[str, PublicKey]:
        """The keys for ``open_envelope``."""
        return {keyid: key.public for keyid, key in self.keys.items()}

    def require_class(self, keyids: frozenset[str], kind: str, signatures: int) -> None:
        """EnvelopeError unless so many of the keys that signed may sign operations of class ``kind``."""
        allowed = [keyid for keyid in keyids if kind in self.keys[keyid].classes]
        if not allowed:
            names = ", ".join(sorted(self.keys[keyid].name for keyid in keyids))
            raise EnvelopeError("key_not_allowed", f"the key of {names} may not sign operations of class {kind}")
        if len(allowed) < signatures:
            raise EnvelopeError(
                "too_few_signatures", f"{len(allowed)} of {signatures} signatures that class {kind} needs"
            )


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeyRow(_Section):
    """A key that may command, as files have it."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    public: _Public
    classes: Annotated[tuple[KeyClass, ...], Field(strict=False, min_length=1, max_length=3)]


class _Enroller(_Section):
    public: _Public


class _File(_Section):
    tenant: Name
    device: Name | None = None
    epoch: Annotated[int, Field(ge=1, lt=1 << 53)] = 1
    keys: Annotated[tuple[KeyRow, ...], Field(strict=False, max_length=32)] = ()
    keys_version: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    enrolment: _Enroller | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _File:
        if self.device is None and self.enrolment is None:
            raise ValueError("give either device and [[keys]], or [enrolment] with the key that may enrol the device")
        if self.device is not None and not self.keys:
            raise ValueError("a device without [[keys]] would obey nobody")
        if self.device is not None and self.enrolment is not None:
            raise ValueError("give device and [[keys]], or [enrolment], not both")
        if self.device == "claim":
            raise ValueError("device: 'claim' is no name of a device")
        return self


def load(path: Path) -> Allegiance | None:
    """What ``path`` says, or None where there is no such file: then the device has no fleet.

    ConfigError names the field; RefusedError when somebody else owns the file or could write to it.
    """
    return parse(read_toml(path), str(path)) if _is_roots(path) else None


def shipped_root(trust_file: Path) -> bytes | None:
    """The root of the operator's repository, ``root.json`` beside ``trust.toml``, or None where there is none.

    RefusedError when somebody else owns the file or could write to it, ConfigError.
    """
    path = trust_file.with_name(ROOT_NAME)
    try:
        return read_bounded(path, MAX_ROOT_BYTES + 1) if _is_roots(path) else None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _is_roots(path: Path) -> bool:
    """Whether there is such a file, which then only root, or we ourselves, can have written."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise RefusedError(
            f"cannot use {path}: whoever writes it commands this device, and others than root could",
            hint=f"chown root {path}; chmod 0644 {path}",
        )
    return True


def parse(document: Mapping[str, Any], source: str) -> Allegiance:
    """A parsed ``trust.toml``. ConfigError names ``source`` and the field."""
    try:
        found = _File.model_validate(dict(document))
        return Allegiance(
            tenant=found.tenant,
            device=found.device,
            epoch=found.epoch if found.device is not None else 0,
            keys=trusted_keys([(key.name, key.public, key.classes) for key in found.keys]),
            enroller=public_key(found.enrolment.public) if found.enrolment else None,
            keys_version=found.keys_version,
        )
    except ValidationError as error:
        raise ConfigError(
            f"cannot read {source}: {describe_problems(error, _File)}", hint="docs/reference/trust.md has every key"
        ) from error
    except ValueError as error:
        raise ConfigError(f"cannot read {source}: {error}") from error


def trusted_keys(rows: Sequence[tuple[str, str, Sequence[str]]]) -> dict[str, TrustedKey]:
    """Rows of name, public key in base64 and classes, by keyid. ValueError for one key twice, or one that is none."""
    keys: dict[str, TrustedKey] = {}
    for name, text, classes in rows:
        public = public_key(text)
        if public.keyid in keys:
            raise ValueError(f"keys: {name} and {keys[public.keyid].name} are one key")
        keys[public.keyid] = TrustedKey(name, public, frozenset(classes))
    return keys


def public_key(text: str) -> PublicKey:
    """A public key from its base64. ValueError."""
    raw = base64.b64decode(text, validate=True)
    if base64.b64encode(raw).decode() != text:
        raise ValueError(f"{text[:60]!r} is not canonical base64")
    return PublicKey(raw)
