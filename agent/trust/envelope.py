"""DSSE envelopes (github.com/secure-systems-lab/dsse, protocol 1.0.2) with Ed25519 signatures (RFC 8032).

Pure. Invariants: what is signed are the raw payload bytes under their type, so that no parser sees a byte before a key
vouches for it; one reading only of each envelope (plain base64, no unknown or repeated field); a key counts once,
however often it signs; sizes are bounded before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from agent.base.errors import RefusedError

#: An MQTT payload of the link (docs/spec/link.md 1.5).
MAX_ENVELOPE_BYTES = 64 << 10
MAX_SIGNATURES = 8
KEY_BYTES = 32
SIGNATURE_BYTES = 64


class EnvelopeError(RefusedError):
    """An envelope is refused. ``code`` is one of the reason codes of docs/spec/link.md 4."""

    def __init__(self, code: str, text: str, *, hint: str = "") -> None:
        super().__init__(f"cannot accept envelope: {text}", hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A verifying key: 32 raw bytes. ``keyid`` is the first 32 hex digits of their SHA-256."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ValueError(f"an Ed25519 key has {KEY_BYTES} bytes, not {len(self.raw)}")

    @property
    def keyid(self) -> str:
        """The name of the key."""
        return keyid_of(self.raw)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature is this key's over ``message``."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):  # ValueError: the bytes are no point of the curve
            return False
        return True


class Signer:
    """A signing key from its 32-byte seed."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(self._key.public_key().public_bytes_raw())

    @property
    def keyid(self) -> str:
        """The name of the key."""
        return self.public.keyid

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(message)


@dataclass(frozen=True, slots=True)
class Opened:
    """A payload and the keys that vouch for it."""

    payload: bytes
    keyids: frozenset[str]


def keyid_of(raw: bytes) -> str:
    """The name of a raw public key."""
    return hashlib.sha256(raw).hexdigest()[:32]


def pae(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def seal(kind: str, payload: bytes, signers: Iterable[Signer]) -> bytes:
    """The envelope of ``payload`` as UTF-8 JSON. ValueError when it would be larger than a reader takes."""
    message = pae(kind, payload)
    document = {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {"keyid": signer.keyid, "sig": base64.b64encode(signer.sign(message)).decode()} for signer in signers
        ],
    }
    data = json.dumps(document, separators=(",", ":")).encode()
    if len(data) > MAX_ENVELOPE_BYTES:
        raise ValueError(f"the envelope has {len(data)} bytes, {MAX_ENVELOPE_BYTES} are allowed")
    return data


def add_signatures(envelope: bytes, signers: Iterable[Signer]) -> bytes:
    """The same payload with further signatures: how a second person signs. EnvelopeError when it is malformed."""
    kind, payload, signatures = _read(envelope)
    message = pae(kind, payload)
    for signer in signers:
        signatures.append((signer.keyid, signer.sign(message)))
    document = {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": keyid, "sig": base64.b64encode(sig).decode()} for keyid, sig in signatures],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def open_envelope(data: bytes, kind: str, keys: Mapping[str, PublicKey]) -> Opened:
    """The payload, once at least one of ``keys`` (by keyid) has signed it as ``kind``; all of them that did.

    A signature by a key that is not known here is passed over; a wrong one by a known key refuses the whole.
    EnvelopeError: too_large, malformed, wrong_type, unknown_key, bad_signature.
    """
    found_kind, payload, signatures = _read(data)
    if found_kind != kind:
        raise EnvelopeError("wrong_type", f"its type is {found_kind[:80]!r}, {kind!r} belongs here")
    message = pae(kind, payload)
    vouching: set[str] = set()
    for keyid, signature in signatures:
        key = keys.get(keyid)
        if key is None:
            continue
        if not key.verifies(signature, message):
            raise EnvelopeError("bad_signature", f"the signature of key {keyid} is wrong")
        vouching.add(key.keyid)
    if not vouching:
        raise EnvelopeError("unknown_key", "no key that this device knows has signed it")
    return Opened(payload, frozenset(vouching))


def peek_payload(data: bytes) -> tuple[str, bytes]:
    """Type and payload of an envelope whose signatures somebody else has checked or will check. EnvelopeError."""
    kind, payload, _ = _read(data)
    return kind, payload


def _read(data: bytes) -> tuple[str, bytes, list[tuple[str, bytes]]]:
    if len(data) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("too_large", f"{len(data)} bytes, {MAX_ENVELOPE_BYTES} are allowed")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _malformed("it is not JSON") from error
    if not isinstance(document, dict) or set(document) != {"payloadType", "payload", "signatures"}:
        raise _malformed("its fields are not payloadType, payload and signatures")
    kind, payload, signatures = document["payloadType"], document["payload"], document["signatures"]
    if not isinstance(kind, str) or not kind.isprintable() or not isinstance(signatures, list):
        raise _malformed("payloadType must be a text and signatures a list")
    if not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise _malformed(f"{len(signatures)} signatures, 1 to {MAX_SIGNATURES} are allowed")
    return kind, _base64(payload), [_signature(entry) for entry in signatures]


def _signature(entry: Any) -> tuple[str, bytes]:
    if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"} or not isinstance(entry["keyid"], str):
        raise _malformed("a signature has the fields keyid and sig")
    return entry["keyid"], _base64(entry["sig"])


def _base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise _malformed("base64 is expected")
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _malformed("its base64 is wrong") from error
    if base64.b64encode(data) != text.encode("ascii"):  # bits beyond the end: a second spelling of the same bytes
        raise _malformed("its base64 is not canonical")
    return data


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is given twice")
    return found


def _malformed(text: str) -> EnvelopeError:
    return EnvelopeError("malformed", text)
