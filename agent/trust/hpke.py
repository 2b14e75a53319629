"""HPKE, base mode, one suite: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305 (RFC 9180).

Pure; keys are raw bytes, the ephemeral secret is an argument. Written here on ``cryptography``'s primitives because its
own module needs release 47 and this agent runs with 42; docs/decisions/hpke.md. One message a context, as RFC 9180 6.1.
"""

from __future__ import annotations

import hmac
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

KEY_BYTES = 32
TAG_BYTES = 16

_KEM_SUITE = b"KEM" + struct.pack(">H", 0x0020)
_SUITE = b"HPKE" + struct.pack(">HHH", 0x0020, 0x0001, 0x0003)
_BASE_MODE = b"\x00"
_NONCE_BYTES = 12


class HpkeError(ValueError):
    """The message does not open: another key, another context, or altered. The text never holds key material."""


def public_of(secret: bytes) -> bytes:
    """The public half of a 32-byte secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def seal(public: bytes, info: bytes, plaintext: bytes, ephemeral: bytes, aad: bytes = b"") -> bytes:
    """Encapsulated key (32 bytes) and ciphertext for ``public``; ``ephemeral`` is 32 fresh random bytes."""
    share = public_of(ephemeral)
    key, nonce = _schedule(_shared(ephemeral, public, share, public), info)
    return share + ChaCha20Poly1305(key).encrypt(nonce, plaintext, aad)


def open_sealed(secret: bytes, info: bytes, sealed: bytes, aad: bytes = b"") -> bytes:
    """What was sealed to the public half of ``secret`` in the same context. HpkeError."""
    if len(sealed) < KEY_BYTES + TAG_BYTES:
        raise HpkeError("it is cut short")
    share, ciphertext = sealed[:KEY_BYTES], sealed[KEY_BYTES:]
    key, nonce = _schedule(_shared(secret, share, share, public_of(secret)), info)
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, aad)
    except InvalidTag as error:
        raise HpkeError("it is for another key or another context, or it was altered") from error


def _shared(secret: bytes, peer: bytes, share: bytes, recipient: bytes) -> bytes:
    """RFC 9180 4.1: Encap and Decap meet here."""
    try:
        agreed = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:  # all zero (7.1.4), or a wrong length
        raise HpkeError("its key is of low order or malformed") from error
    pseudo_random = _labeled_extract(_KEM_SUITE, b"", b"eae_prk", agreed)
    return _labeled_expand(_KEM_SUITE, pseudo_random, b"shared_secret", share + recipient, 32)


def _schedule(shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 9180 5.1, base mode: key and nonce of the first message."""
    context = _BASE_MODE + b"".join(
        _labeled_extract(_SUITE, b"", label, value) for label, value in ((b"psk_id_hash", b""), (b"info_hash", info))
    )
    secret = _labeled_extract(_SUITE, shared, b"secret", b"")
    return (
        _labeled_expand(_SUITE, secret, b"key", context, KEY_BYTES),
        _labeled_expand(_SUITE, secret, b"base_nonce", context, _NONCE_BYTES),
    )


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, key: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + key, "sha256")


def _labeled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    """At most one block of HKDF-Expand: nothing here is longer than a SHA-256."""
    message = struct.pack(">H", length) + b"HPKE-v1" + suite + label + info
    return hmac.digest(key, message + b"\x01", "sha256")[:length]
