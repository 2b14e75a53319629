"""Targets of the store: age headers, stanzas, whole age files, the STREAM payload, sealing, keys, the catalog."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyrage

from agent.base.errors import PeerError
from agent.store import age, bech32, sealing, stream
from agent.store.age import AgeError, Header, Identity, Recipient, Stanza
from agent.store.document import CatalogDocument, decode, encode
from agent.store.stream import CHUNK_BYTES
from tests.fuzz.target import Memory, Shape, Target, many, nested

VECTORS = Path(__file__).parents[1] / "vectors" / "store"
IDENTITY = Identity(bytes(range(32)))
FILE_KEY = bytes(range(16))
KEK = bytes(range(32, 64))
PURPOSE = sealing.blob_purpose("m", "1.0.0", "m.onnx", 5, "0" * 64)


def fixed_random() -> Any:
    """Bytes that count up: the same seeds every time."""
    state = [0]

    def draw(count: int) -> bytes:
        state[0] += 1
        return bytes((state[0] * 7 + index) % 256 for index in range(count))

    return draw


# Headers.


def holds_header(data: bytes, header: Header) -> None:
    """A header has one spelling: written again from its parts it is the same bytes."""
    written = age.write_header(header.stanzas, FILE_KEY)
    assert written[: len(header.signed)] == header.signed == data[: len(header.signed)]
    assert age.parse_header(written).stanzas == header.stanzas
    assert data[: header.length].endswith(b"\n")
    assert data[len(header.signed) : header.length] == b" " + age.encode_base64(header.mac).encode() + b"\n"
    # What follows the header is no part of it, and nothing of it may be missing.
    assert age.parse_header(data[: header.length]) == header
    for end in {0, len(header.signed), header.length - 1}:
        try:
            age.parse_header(data[:end])
        except AgeError:
            continue
        raise AssertionError(f"a header cut at {end} passes")


def header_seeds() -> list[bytes]:
    """Of one recipient, of several stanzas of odd sizes, of the device's own kind."""
    odd = [Stanza("a", ("!", "~" * 5), bytes(size)) for size in (0, 47, 48, 49, 200)]
    return [
        age.write_header([age.seal_x25519(FILE_KEY, IDENTITY.recipient(), bytes(range(1, 33)))], FILE_KEY),
        age.write_header(odd, FILE_KEY),
        sealing.seal(FILE_KEY, "0123456789abcdef", KEK, PURPOSE, bytes(16)),
    ]


_VERSION = b"age-encryption.org/v1\n"
AGE_SHAPES = {
    "body lines": many(b"A" * 64 + b"\n", _VERSION + b"-> a\n"),
    "stanzas": many(b"-> a\n\n", _VERSION),
    "arguments": many(b" b", _VERSION + b"-> a", b"\n\n"),
    "long line": many(b"a", _VERSION + b"-> "),
}

# Whole files.


def with_mac(data: bytes) -> bytes:
    """The file with the MAC that belongs to its header, which mutation alone would never find."""
    try:
        header = age.parse_header(data)
    except AgeError:
        return data
    return age.write_header(header.stanzas, FILE_KEY) + data[header.length :]


def read_file(data: bytes) -> bytes:
    return b"".join(stream.decrypt_file([IDENTITY], io.BytesIO(with_mac(data)).read))


def holds_file(data: bytes, plain: bytes) -> None:
    """Another implementation opens it too, to the same bytes; and it does not matter how the bytes come in."""
    data = with_mac(data)
    theirs = pyrage.x25519.Identity.from_str(IDENTITY.text())
    assert pyrage.decrypt(data, [theirs]) == plain
    source = io.BytesIO(data)
    assert b"".join(stream.decrypt_file([IDENTITY], lambda count: source.read(min(count, 77)))) == plain


def read_strictly(data: bytes) -> bytes:
    """As ``read_file``; what we refuse, the other implementation must refuse as well."""
    try:
        return read_file(data)
    except AgeError:
        _refused_there(with_mac(data))
        raise


def _refused_there(data: bytes) -> None:
    theirs = pyrage.x25519.Identity.from_str(IDENTITY.text())
    try:
        pyrage.decrypt(data, [theirs])
    except pyrage.DecryptError:
        return
    raise AssertionError("pyrage opens a file that we refuse")


def file_seeds() -> list[bytes]:
    """Empty, short, and with a second recipient."""
    other = Identity(bytes(range(100, 132))).recipient()

    def made(content: bytes, *recipients: Recipient) -> bytes:
        random = fixed_random()
        stanzas = [age.seal_x25519(FILE_KEY, recipient, random(32)) for recipient in recipients]
        return age.write_header(stanzas, FILE_KEY) + b"".join(stream.encrypt(FILE_KEY, random(16), [content]))

    mine = IDENTITY.recipient()
    return [made(b"", mine), made(b"hello", mine), made(b"for two", other, mine)]


# Payloads: the input says which chunks there are, each sealed rightly, and the reader must find out what is amiss.

_NONCE = bytes(range(16))
_SIZES = (0, 1, 100, CHUNK_BYTES - 1, CHUNK_BYTES)


def chunks_of(data: bytes) -> list[tuple[int, int, bool]]:
    """Index, size and flag of up to five chunks: a byte each."""
    return [(byte & 7, _SIZES[(byte >> 3 & 7) % len(_SIZES)], bool(byte & 0x80)) for byte in data[:5]]


def payload_of(data: bytes) -> bytes:
    """The chunks in their order, then the rest of the input as it is, all after the nonce."""
    chunks = stream.Chunks(FILE_KEY, _NONCE)
    parts = [chunks.seal(index, bytes(size), last=last) for index, size, last in chunks_of(data)]
    return _NONCE + b"".join(parts) + data[5:]


def read_payload(data: bytes) -> bytes:
    return b"".join(stream.decrypt(FILE_KEY, io.BytesIO(payload_of(data)).read))


def holds_payload(data: bytes, plain: bytes) -> None:
    """Only whole files pass: counted from 0, all full but the last, the last alone flagged and not empty."""
    specs = chunks_of(data)
    assert len(data) <= 5, "something after the last chunk passes"
    assert [index for index, _, _ in specs] == list(range(len(specs)))
    assert [last for _, _, last in specs] == [False] * (len(specs) - 1) + [True]
    assert all(size == CHUNK_BYTES for _, size, _ in specs[:-1])
    assert specs[-1][1] or len(specs) == 1
    assert len(plain) == sum(size for _, size, _ in specs)
    assert stream.plaintext_size(len(payload_of(data))) == len(plain)


def payload_seeds() -> list[bytes]:
    """Whole ones, an empty last chunk, none flagged, one twice."""
    full, some = 4 << 3, 2 << 3
    whole = [[0x80], [0x80 | some], [full, 0x81 | full], [full, 1 | full, 2 | full, 0x83 | some]]
    return [bytes(chunks) for chunks in (*whole, [full, 0x81], [full], [full, full, 0x82])]


# Our own stanza.


def read_sealed(data: bytes) -> bytes:
    header = age.parse_header(with_mac(data))
    return sealing.unseal(header, sealing.key_id_of(header), KEK, PURPOSE)


def holds_sealed(data: bytes, file_key: bytes) -> None:
    """Nothing but what was sealed opens."""
    assert file_key == FILE_KEY
    header = age.parse_header(data)
    original = age.parse_header(header_seeds()[2])
    assert header.stanzas == original.stanzas
    for other in (sealing.blob_purpose("n", "1.0.0", "m.onnx", 5, "0" * 64), sealing.catalog_purpose(5)):
        try:
            sealing.unseal(header, "0123456789abcdef", KEK, other)
        except AgeError:
            continue
        raise AssertionError("the header opens for another purpose")


# Keys.


def read_key(data: bytes) -> Identity | Recipient:
    text = data.decode("utf-8", "surrogateescape")
    return Identity.parse(text) if text[:4].isupper() else Recipient.parse(text)


def holds_key(data: bytes, key: Identity | Recipient) -> None:
    text = data.decode()
    assert key.text() == text
    if isinstance(key, Identity):
        assert str(pyrage.x25519.Identity.from_str(text).to_public()) == key.recipient().text()
    else:
        assert str(pyrage.x25519.Recipient.from_str(text)) == text


def key_seeds() -> list[bytes]:
    """Both kinds, a foreign one, one in the wrong case."""
    foreign = bech32.encode("age1pq", bytes(32))
    texts = [IDENTITY.text(), IDENTITY.recipient().text(), foreign, IDENTITY.text().lower()]
    return [text.encode() for text in texts]


# The catalog.


def holds_document(_data: bytes, document: CatalogDocument) -> None:
    """Written and read again the same; what it reaches can be found."""
    encoded = encode(document)
    data, checked = encoded.data, encoded.document
    assert checked == document or b"null" in data  # numbers that are not finite become null
    assert decode(data) == checked
    assert encode(checked, encoded).data == data
    for ref in document.refs():
        assert document.find(ref.model, ref.version, ref.part) == ref


def document_seeds() -> list[bytes]:
    """The empty one, that of the store's vectors, and one with opaque entries."""
    vector = json.loads((VECTORS / "store.json").read_text())["catalog"]["document"]
    rich = json.loads(json.dumps(vector))
    model = next(iter(rich["models"].values()))
    version = next(iter(model["versions"].values()))
    version["measurements"] = {"a": {"p50": 1.5, "list": [1, None, "x", {"y": []}]}}
    version["quarantine"] = {"fp32": {"deaths": 3}}
    version["choice"] = {"chosen": "fp32"}
    version["damaged"] = list(version["blobs"])
    return [b"{}", json.dumps(vector).encode(), json.dumps(rich).encode()]


def _within(shape: Shape) -> Shape:
    """A catalog with something grown among what is opaque to it."""
    head, tail = document_seeds()[2].split(b'[1, null, "x", {"y": []}]')
    return lambda size: head + shape(size) + tail


DOCUMENT_SHAPES = {
    "opaque numbers": _within(many(b"1,", b"[", b"1]")),
    "depth": _within(nested(b"[", b"]")),
    "unknown fields": many(b'"%d":0,', b"{", b'"a":0}'),
    "models": many(b'"m%d":{},', b'{"models":{', b'"m":{}}}'),
}
KEY_SHAPES = {"letters": many(b"q", b"age1"), "separators": many(b"1"), "capitals": many(b"A")}
TARGETS = (
    Target(
        "age-header", age.parse_header, holds_header, (AgeError,), header_seeds, "age", AGE_SHAPES,
        grown=age.MAX_HEADER_BYTES - 64,
    ),
    Target("age-file", read_strictly, holds_file, (AgeError,), file_seeds, "age", memory=Memory(2 << 20, 64)),
    Target(
        "age-payload", read_payload, holds_payload, (AgeError,), payload_seeds, "age-payload", most_bytes=64,
        memory=Memory(4 << 20, 64),
    ),
    Target("age-sealed", read_sealed, holds_sealed, (AgeError,), lambda: [header_seeds()[2]], "age"),
    Target(
        "age-key", read_key, holds_key, (AgeError,), key_seeds, "age-key", KEY_SHAPES, most_bytes=256, grown=1 << 16
    ),
    Target(
        "catalog", decode, holds_document, (PeerError,), document_seeds, "catalog", DOCUMENT_SHAPES,
        memory=Memory(2 << 20, 400),
    ),
)  # fmt: skip
