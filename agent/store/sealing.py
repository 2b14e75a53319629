"""Our own stanza: a file key wrapped under the device's key-encryption key, with what it is for as associated data.

Pure. What a header is for (which blob, or which catalog generation) is not written in it but must be said again to open
it: a header put beside another payload, or under another name, does not open. Each stanza has a wrap key of its own,
derived with a random salt, so that no count of headers wears the key-encryption key out. Source: docs/spec/store.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from agent.store.age import (
    FILE_KEY_BYTES,
    AgeError,
    Header,
    Stanza,
    check_mac,
    decode_base64,
    encode_base64,
    hkdf_sha256,
    write_header,
)

STANZA_TYPE = "edge-agent/device-1"
SALT_BYTES = 16
#: One stanza, one MAC line: a header of ours has some 220 bytes.
MAX_OWN_HEADER_BYTES = 1024

_LABEL = b"edge-agent/store/1/"
_TAG_BYTES = 16
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a file key is for: a kind and the fields that identify the thing, in a fixed order."""

    kind: str
    fields: tuple[str, ...]


def blob_purpose(model: str, version: str, part: str, size: int, payload: str) -> Purpose:
    """A blob: its identity, the plaintext's length in bytes and the SHA-256 (hex) of its payload."""
    return Purpose("blob", (model, version, part, str(size), payload))


def catalog_purpose(generation: int) -> Purpose:
    """A catalog generation: its number, so that an old one cannot pass for a newer one."""
    return Purpose("catalog", (str(generation),))


def seal(file_key: bytes, key_id: str, kek: bytes, purpose: Purpose, salt: bytes) -> bytes:
    """A whole header with our one stanza; ``salt`` is 16 fresh random bytes."""
    body = _cipher(kek, purpose, salt).encrypt(bytes(12), file_key, _associated(key_id, purpose))
    return write_header([Stanza(STANZA_TYPE, (key_id, encode_base64(salt)), body)], file_key)


def key_id_of(header: Header) -> str:
    """The id of the device key that the header is sealed under. AgeError when the header is not one of ours."""
    return _own_stanza(header).arguments[0]


def unseal(header: Header, key_id: str, kek: bytes, purpose: Purpose) -> bytes:
    """The file key. AgeError when the header is not ours, not for this key, not for this purpose, or altered."""
    stanza = _own_stanza(header)
    salt = decode_base64(stanza.arguments[1].encode(), length=SALT_BYTES)
    if stanza.arguments[0] != key_id or len(stanza.body) != FILE_KEY_BYTES + _TAG_BYTES:
        raise AgeError("the device stanza is for another key or malformed")
    try:
        file_key = _cipher(kek, purpose, salt).decrypt(bytes(12), stanza.body, _associated(key_id, purpose))
    except InvalidTag as error:
        raise AgeError("the header is altered or belongs to something else") from error
    check_mac(header, file_key)
    return file_key


def _own_stanza(header: Header) -> Stanza:
    stanza = header.stanzas[0]
    if len(header.stanzas) != 1 or stanza.type != STANZA_TYPE or len(stanza.arguments) != 2:
        raise AgeError("the header is not a device header")
    return stanza


def _cipher(kek: bytes, purpose: Purpose, salt: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(hkdf_sha256(kek, salt, _LABEL + purpose.kind.encode()))


def _associated(key_id: str, purpose: Purpose) -> bytes:
    """Each field with its length before it: no two different lists give the same bytes."""
    fields = [field.encode() for field in (purpose.kind, key_id, *purpose.fields)]
    return _LABEL + b"".join(_LENGTH.pack(len(field)) + field for field in fields)
