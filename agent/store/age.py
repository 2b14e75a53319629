"""The age v1 file format: header, stanzas, X25519 recipients (https://c2sp.org/age).

Pure: bytes in, bytes out; file keys, nonces and ephemeral secrets are arguments. Reading is strict, so that one header
has one spelling: canonical unpadded base64, single spaces, bodies wrapped at 64 columns. Every departure raises
``AgeError``, whose text never holds key material. The payload is in ``agent.store.stream``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from agent.store import bech32

FILE_KEY_BYTES = 16
#: A header longer than this is refused before it is parsed: room for some five hundred recipients.
MAX_HEADER_BYTES = 1 << 16

_VERSION_LINE = b"age-encryption.org/v1\n"
_X25519_LABEL = b"age-encryption.org/v1/X25519"
_RECIPIENT_PREFIX = "age"
_IDENTITY_PREFIX = "age-secret-key-"
_ZERO_NONCE = bytes(12)
_TAG_BYTES = 16
_COLUMNS = 64
_ARGUMENT = re.compile(rb"[!-~]+")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*")


class AgeError(ValueError):
    """The bytes are not a valid age file, or not for the key at hand."""


@dataclass(frozen=True, slots=True)
class Stanza:
    """One wrapping of the file key: its type, further arguments (printable ASCII, no spaces) and body."""

    type: str
    arguments: tuple[str, ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. ``length`` bytes of the input belong to it; ``signed`` is what the MAC covers."""

    stanzas: tuple[Stanza, ...]
    mac: bytes
    signed: bytes
    length: int


@dataclass(frozen=True, slots=True)
class Identity:
    """An X25519 secret key (32 bytes), never shown."""

    secret: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Identity:
        """From ``AGE-SECRET-KEY-1…``. Raises AgeError."""
        return cls(_decode_key(text, _IDENTITY_PREFIX, "identity"))

    def text(self) -> str:
        """The ``AGE-SECRET-KEY-1…`` spelling: a secret."""
        return bech32.encode(_IDENTITY_PREFIX, self.secret).upper()

    def recipient(self) -> Recipient:
        """The public half."""
        return Recipient(X25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw())


@dataclass(frozen=True, slots=True)
class Recipient:
    """An X25519 public key (32 bytes)."""

    public: bytes

    @classmethod
    def parse(cls, text: str) -> Recipient:
        """From ``age1…``. Raises AgeError."""
        return cls(_decode_key(text, _RECIPIENT_PREFIX, "recipient"))

    def text(self) -> str:
        """The ``age1…`` spelling."""
        return bech32.encode(_RECIPIENT_PREFIX, self.public)


def hkdf_sha256(key: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA-256 (RFC 5869): one block of Expand is all that age ever asks for."""
    pseudo_random_key = hmac.digest(salt or bytes(hashlib.sha256().digest_size), key, "sha256")
    return hmac.digest(pseudo_random_key, info + b"\x01", "sha256")


def write_header(stanzas: Iterable[Stanza], file_key: bytes) -> bytes:
    """The header that carries ``stanzas``, authenticated with ``file_key`` (16 bytes)."""
    signed = _VERSION_LINE + b"".join(_write_stanza(stanza) for stanza in stanzas) + b"---"
    return signed + b" " + encode_base64(_mac(file_key, signed)).encode() + b"\n"


def parse_header(data: bytes) -> Header:
    """The header at the start of ``data``; what follows it is ignored. Raises AgeError. The MAC is not yet checked."""
    lines = _Lines(data)
    if lines.next() + b"\n" != _VERSION_LINE:
        raise AgeError("not an age v1 file")
    stanzas: list[Stanza] = []
    while True:
        start = lines.offset
        line = lines.next()
        if line.startswith(b"-> "):
            stanzas.append(_parse_stanza(line, lines))
        elif line.startswith(b"--- ") and stanzas:
            mac = decode_base64(line[4:], length=32)
            return Header(tuple(stanzas), mac, data[: start + 3], lines.offset)
        else:
            raise AgeError("header line is neither stanza nor MAC, or there is no stanza")


def check_mac(header: Header, file_key: bytes) -> None:
    """Raises AgeError unless ``file_key`` made this header."""
    if not hmac.compare_digest(_mac(file_key, header.signed), header.mac):
        raise AgeError("header MAC does not fit")


def seal_x25519(file_key: bytes, recipient: Recipient, ephemeral: bytes) -> Stanza:
    """The stanza that wraps ``file_key`` for ``recipient``; ``ephemeral`` is 32 fresh random bytes."""
    secret = X25519PrivateKey.from_private_bytes(ephemeral)
    share = secret.public_key().public_bytes_raw()
    key = _x25519_wrap_key(secret, recipient.public, share, recipient.public)
    return Stanza("X25519", (encode_base64(share),), ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, file_key, None))


def open_x25519(stanza: Stanza, identity: Identity) -> bytes | None:
    """The file key, or None where the stanza is of another type or for somebody else. AgeError when it is malformed."""
    if stanza.type != "X25519":
        return None
    if len(stanza.arguments) != 1:
        raise AgeError("an X25519 stanza has exactly two arguments")
    share = decode_base64(stanza.arguments[0].encode(), length=32)
    # The length before the key: a longer body could be made to open under several keys (partitioning oracle).
    if len(stanza.body) != FILE_KEY_BYTES + _TAG_BYTES:
        raise AgeError("an X25519 stanza's body has 32 bytes")
    secret = X25519PrivateKey.from_private_bytes(identity.secret)
    key = _x25519_wrap_key(secret, share, share, identity.recipient().public)
    try:
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, stanza.body, None)
    except InvalidTag:
        return None


def open_header(header: Header, identities: Iterable[Identity]) -> bytes:
    """The file key for the first identity that fits, its MAC checked. Raises AgeError."""
    if any(stanza.type == "scrypt" for stanza in header.stanzas) and len(header.stanzas) > 1:
        raise AgeError("a scrypt stanza stands alone or not at all")
    for identity in identities:
        for stanza in header.stanzas:
            file_key = open_x25519(stanza, identity)
            if file_key is not None:
                check_mac(header, file_key)
                return file_key
    raise AgeError("no stanza is for this identity")


def encode_base64(data: bytes) -> str:
    """Unpadded standard base64."""
    return base64.b64encode(data).rstrip(b"=").decode("ascii")


def decode_base64(text: bytes, *, length: int | None = None) -> bytes:
    """Strictly unpadded, canonical base64, of ``length`` bytes where given. Raises AgeError."""
    if not _BASE64.fullmatch(text) or len(text) % 4 == 1:
        raise AgeError("not unpadded base64")
    data = base64.b64decode(text + b"=" * (-len(text) % 4))
    if encode_base64(data).encode() != text:
        raise AgeError("base64 is not canonical")
    if length is not None and len(data) != length:
        raise AgeError(f"base64 of {len(data)} bytes where {length} belong")
    return data


class _Lines:
    """Lines of the header, bounded; a missing line feed is an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = 0

    def next(self) -> bytes:
        end = self._data.find(b"\n", self.offset, MAX_HEADER_BYTES)
        if end < 0:
            raise AgeError("header is cut short or too long")
        line = self._data[self.offset : end]
        self.offset = end + 1
        return line


def _parse_stanza(first: bytes, lines: _Lines) -> Stanza:
    arguments = first[3:].split(b" ")
    if not all(_ARGUMENT.fullmatch(argument) for argument in arguments):
        raise AgeError("a stanza argument is empty or not printable")
    body = b""
    while True:
        line = lines.next()
        if len(line) > _COLUMNS:
            raise AgeError("a stanza line is longer than 64 columns")
        body += decode_base64(line)
        if len(line) < _COLUMNS:
            names = [argument.decode("ascii") for argument in arguments]
            return Stanza(names[0], tuple(names[1:]), body)


def _write_stanza(stanza: Stanza) -> bytes:
    words = [stanza.type, *stanza.arguments]
    if not all(_ARGUMENT.fullmatch(word.encode()) for word in words):
        raise ValueError("stanza arguments are printable ASCII without spaces")
    text = encode_base64(stanza.body)
    # The last line is always shorter than 64 columns, empty when the body fills its lines exactly.
    body = [text[start : start + _COLUMNS] for start in range(0, len(text) + 1, _COLUMNS)]
    return "\n".join(["-> " + " ".join(words), *body, ""]).encode("ascii")


def _mac(file_key: bytes, signed: bytes) -> bytes:
    return hmac.digest(hkdf_sha256(file_key, b"", b"header"), signed, "sha256")


def _x25519_wrap_key(secret: X25519PrivateKey, peer: bytes, share: bytes, recipient: bytes) -> bytes:
    try:
        shared = secret.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise AgeError("X25519 share of low order") from error
    if shared == bytes(32):
        raise AgeError("X25519 share of low order")
    return hkdf_sha256(shared, share + recipient, _X25519_LABEL)


def _decode_key(text: str, prefix: str, what: str) -> bytes:
    try:
        found, data = bech32.decode(text)
    except ValueError as error:
        raise AgeError(f"not an age {what}: {error}") from error
    if found != prefix or len(data) != 32 or (text != text.upper() if what == "identity" else text != text.lower()):
        raise AgeError(f"not an age {what}")
    return data
