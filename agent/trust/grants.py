"""Grants: the file key of a published payload, sealed to one device for one purpose (docs/spec/delivery.md 5).

Pure. Invariants: a grant opens for the device, enrolment, model, version and payload that it was made for and for
nothing else, since all five are in the HPKE context; it names the key that it is sealed to, so that a device that holds
an old and a new grant identity takes the right one and says so when it has neither.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from agent.base.errors import RefusedError
from agent.trust import hpke

FILE_KEY_BYTES = 16
SEALED_BYTES = hpke.KEY_BYTES + FILE_KEY_BYTES + hpke.TAG_BYTES

_LABEL = b"edge-agent/grant/1"
_LENGTH = struct.Struct(">I")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RECIPIENT = re.compile(r"[0-9a-f]{16}")
_FIELDS = {"to", "blob", "sealed"}


class GrantError(RefusedError):
    """A grant is refused. ``code``: malformed, unknown_recipient, not_for_this (docs/spec/delivery.md 5)."""

    def __init__(self, code: str, text: str, *, hint: str = "") -> None:
        super().__init__(f"cannot use grant: {text}", hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a grant is for. ``blob`` is the SHA-256 (hex) of the payload, ``epoch`` the number of the enrolment."""

    device: str
    epoch: int
    model: str
    version: str
    blob: str

    def info(self) -> bytes:
        """The HPKE context: each field with its length before it, so that no two purposes give the same bytes."""
        fields = (self.device, str(self.epoch), self.model, self.version, self.blob)
        return _LABEL + b"".join(_LENGTH.pack(len(each.encode())) + each.encode() for each in fields)


@dataclass(frozen=True, slots=True)
class Grant:
    """A sealed file key: ``to`` names the recipient's key, ``blob`` the payload (hex SHA-256 of its bytes)."""

    to: str
    blob: str
    sealed: bytes = field(repr=False)

    def document(self) -> dict[str, str]:
        """As it stands in a job's arguments."""
        return {"to": self.to, "blob": self.blob, "sealed": base64.b64encode(self.sealed).decode()}

    @classmethod
    def parse(cls, document: Any) -> Grant:
        """From a job's arguments. GrantError malformed."""
        if not isinstance(document, dict) or set(document) != _FIELDS:
            raise GrantError("malformed", "its fields are not to, blob and sealed")
        to, blob, text = document["to"], document["blob"], document["sealed"]
        if not isinstance(to, str) or not _RECIPIENT.fullmatch(to):
            raise GrantError("malformed", "'to' is no key id of 16 hex digits")
        if not isinstance(blob, str) or not _DIGEST.fullmatch(blob):
            raise GrantError("malformed", "'blob' is no SHA-256 in hex")
        return cls(to, blob, _decoded(text))


def recipient_id(public: bytes) -> str:
    """The name of a grant key: 16 hex digits, the first 8 bytes of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def seal_grant(
    public: bytes, purpose: Purpose, file_key: bytes, random: Callable[[int], bytes] = secrets.token_bytes
) -> Grant:
    """``file_key`` (16 bytes) for the owner of ``public`` (X25519, 32 bytes) and for ``purpose`` alone."""
    if len(file_key) != FILE_KEY_BYTES:
        raise ValueError(f"a file key has {FILE_KEY_BYTES} bytes")
    sealed = hpke.seal(public, purpose.info(), file_key, random(hpke.KEY_BYTES))
    return Grant(recipient_id(public), purpose.blob, sealed)


def open_grant(grant: Grant, identities: Iterable[bytes], purpose: Purpose) -> bytes:
    """The file key, by whichever of ``identities`` (X25519 secrets) it is sealed to. GrantError."""
    if grant.blob != purpose.blob:
        raise GrantError("not_for_this", f"it is for the payload {grant.blob[:16]}, not for {purpose.blob[:16]}")
    for secret in identities:
        if recipient_id(hpke.public_of(secret)) == grant.to:
            return _opened(grant, secret, purpose)
    raise GrantError(
        "unknown_recipient",
        f"it is sealed to key {grant.to}, which this device does not have",
        hint="the device's key was changed since, or it is another device's: grant again",
    )


def _opened(grant: Grant, secret: bytes, purpose: Purpose) -> bytes:
    try:
        file_key = hpke.open_sealed(secret, purpose.info(), grant.sealed)
    except hpke.HpkeError as error:
        raise GrantError(
            "not_for_this", f"it is not for {purpose.model} {purpose.version} on this device in this enrolment: {error}"
        ) from error
    if len(file_key) != FILE_KEY_BYTES:
        raise GrantError("malformed", f"what it holds has {len(file_key)} bytes, a file key has {FILE_KEY_BYTES}")
    return file_key


def _decoded(text: Any) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise GrantError("malformed", "'sealed' is no base64") from error
    if len(data) != SEALED_BYTES or base64.b64encode(data).decode() != text:
        raise GrantError("malformed", f"'sealed' is not the base64 of {SEALED_BYTES} bytes")
    return data
