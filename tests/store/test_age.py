"""The age format against the reference vectors, Debian's ``age`` and pyrage, in both directions."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.store import age, bech32, stream
from agent.store.age import AgeError, Identity, Recipient
from agent.store.stream import CHUNK_BYTES

VECTORS = Path(__file__).parents[1] / "vectors" / "store"
CCTV = json.loads((VECTORS / "cctv-age.json").read_text())["vectors"]
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3_333_333]
needs_age = pytest.mark.skipif(shutil.which("age") is None, reason="Debian's age is not installed (apt install age)")


def vector(name: str) -> tuple[dict[str, list[str]], bytes]:
    """A CCTV vector: its keys and the age file."""
    head, _, body = base64.b64decode(CCTV[name]).partition(b"\n\n")
    keys: dict[str, list[str]] = {}
    for line in head.decode().split("\n"):
        key, value = line.split(": ", 1)
        keys.setdefault(key, []).append(value)
    return keys, zlib.decompress(body) if keys.get("compressed") == ["zlib"] else body


def opened(data: bytes, identity: Identity) -> bytes:
    return b"".join(stream.decrypt_file([identity], io.BytesIO(data).read))


def sealed(data: bytes, recipient: Recipient) -> bytes:
    pieces = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    return b"".join(stream.encrypt_file([recipient], pieces, os.urandom))


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity(os.urandom(32))


@pytest.mark.parametrize("name", sorted(CCTV))
def test_reference_vector(name: str) -> None:
    keys, data = vector(name)
    identities = [Identity.parse(text) for text in keys.get("identity", [])]
    expected = keys["expect"][0]
    if "nonce" in name:
        expected = "payload failure"  # the reference counts the nonce as part of the header
    released = bytearray()
    outcome = "header failure"
    try:
        header = age.parse_header(data)
        file_key = age.open_header(header, identities)
        outcome = "payload failure"
        for chunk in stream.decrypt(file_key, io.BytesIO(data[header.length :]).read):
            released += chunk
        outcome = "success"
    except AgeError as error:
        reasons = {"no stanza is for this identity": "no match", "header MAC does not fit": "HMAC failure"}
        outcome = reasons.get(str(error), outcome)
    assert outcome == expected
    if outcome == "success":
        assert hashlib.sha256(released).hexdigest() == keys["payload"][0]
    elif outcome == "payload failure" and "nonce" not in name:
        # The reference may give out one chunk more than we do, who look whether anything follows; never another.
        longest = releasable(file_key, data[header.length :])
        hashes = [
            hashlib.sha256(longest[:end]).hexdigest() for end in {*range(0, len(longest), CHUNK_BYTES), len(longest)}
        ]
        assert keys["payload"][0] in hashes
        assert longest.startswith(released) and hashlib.sha256(released).hexdigest() in hashes


def releasable(file_key: bytes, payload: bytes) -> bytes:
    """Every chunk that is authentic in its place, whether or not flagged as the last."""
    chunks, plain = stream.Chunks(file_key, payload[:16]), b""
    for index, start in enumerate(range(16, len(payload), 65552)):
        for last in (False, True):
            try:
                plain += chunks.open(index, payload[start : start + 65552], last=last)
            except AgeError:
                continue
            break
        else:
            return plain
    return plain


@pytest.mark.parametrize("name", [name for name in sorted(CCTV) if vector(name)[0]["expect"] == ["success"]])
def test_headers_and_payloads_of_the_vectors_are_written_back_alike(name: str) -> None:
    keys, data = vector(name)
    header = age.parse_header(data)
    file_key = bytes.fromhex(keys["file key"][0])
    assert age.write_header(header.stanzas, file_key) == data[: header.length]
    payload = data[header.length :]
    plain = b"".join(stream.decrypt(file_key, io.BytesIO(payload).read))
    assert b"".join(stream.encrypt(file_key, payload[:16], [plain])) == payload


@needs_age
@pytest.mark.parametrize("size", SIZES)
def test_debian_age_opens_ours(identity: Identity, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "key").write_text(identity.text() + "\n")
    result = subprocess.run(
        ["age", "-d", "-i", tmp_path / "key"],
        input=sealed(data, identity.recipient()),
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == data


@needs_age
@pytest.mark.parametrize("size", SIZES)
def test_debian_ages_open_here(identity: Identity, size: int) -> None:
    data = os.urandom(size)
    made = subprocess.run(["age", "-r", identity.recipient().text()], input=data, capture_output=True, check=True)
    assert opened(made.stdout, identity) == data


@needs_age
def test_a_key_made_by_age_keygen_is_read(tmp_path: Path) -> None:
    text = subprocess.run(["age-keygen"], capture_output=True, check=True).stdout.decode()
    secret = text.strip().split("\n")[-1]
    assert f"# public key: {Identity.parse(secret).recipient().text()}" in text
    assert Identity.parse(secret).text() == secret


@pytest.mark.parametrize("size", SIZES)
def test_pyrage_and_we_open_each_others(identity: Identity, size: int) -> None:
    data = os.urandom(size)
    theirs = pyrage.x25519.Identity.from_str(identity.text())
    assert str(theirs.to_public()) == identity.recipient().text()
    assert pyrage.decrypt(sealed(data, identity.recipient()), [theirs]) == data
    assert opened(pyrage.encrypt(data, [theirs.to_public()]), identity) == data


def test_an_age_file_comes_through_a_pipe_in_drops(identity: Identity) -> None:
    data = os.urandom(200_000)
    source, sizes = io.BytesIO(sealed(data, identity.recipient())), itertools.cycle([1, 7, 300, 5000, 70_000])
    assert b"".join(stream.decrypt_file([identity], lambda count: source.read(min(count, next(sizes))))) == data


def test_one_of_several_recipients_opens_it() -> None:
    people = [Identity(os.urandom(32)) for _ in range(3)]
    data = b"".join(stream.encrypt_file([one.recipient() for one in people], [b"for all"], os.urandom))
    assert all(opened(data, one) == b"for all" for one in people)
    with pytest.raises(AgeError, match="no stanza"):
        opened(data, Identity(os.urandom(32)))


def test_any_flipped_bit_is_refused(identity: Identity) -> None:
    """Every byte of the header, the nonce and the seams of the chunks; a bit of each, another one each time."""
    data = sealed(os.urandom(2 * CHUNK_BYTES + 100), identity.recipient())
    length = age.parse_header(data).length
    first = length + 16
    places = [
        *range(first + 40),
        *range(first + CHUNK_BYTES - 5, first + CHUNK_BYTES + 40),
        *range(len(data) - 120, len(data)),
    ]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(AgeError):
            opened(bytes(flipped), identity)


def test_no_cut_and_no_appendix_is_accepted(identity: Identity) -> None:
    data = sealed(os.urandom(2 * CHUNK_BYTES), identity.recipient())
    length = age.parse_header(data).length
    seams = [length, length + 15, length + 16, length + 16 + 65552, length + 16 + 2 * 65552 - 1, 10, 0]
    for wrong in [*(data[:seam] for seam in seams), data + b"x", data + data[-65552:]]:
        with pytest.raises(AgeError):
            opened(wrong, identity)


def test_chunks_cannot_change_places(identity: Identity) -> None:
    data = sealed(os.urandom(3 * CHUNK_BYTES), identity.recipient())
    start = age.parse_header(data).length + 16
    chunks = [data[start + index * 65552 : start + (index + 1) * 65552] for index in range(3)]
    for order in ([1, 0, 2], [0, 2], [0, 1], [0, 1, 1, 2]):
        with pytest.raises(AgeError):
            opened(data[:start] + b"".join(chunks[index] for index in order), identity)


def test_a_wrong_tag_leaves_no_plaintext_behind() -> None:
    chunks = stream.Chunks(bytes(16), bytes(16))
    good = chunks.seal(0, b"plaintext that nobody verified", last=True)
    out = memoryview(bytearray(b"\xff" * (len(good) - 16)))
    with pytest.raises(AgeError):
        chunks.open_into(0, good[:-1] + bytes([good[-1] ^ 1]), out, last=True)
    assert bytes(out) == bytes(len(out))


def test_low_order_shares_are_refused(identity: Identity) -> None:
    stanza = age.Stanza("X25519", (age.encode_base64(bytes(32)),), bytes(32))
    with pytest.raises(AgeError, match="low order"):
        age.open_x25519(stanza, identity)


def test_a_header_without_end_is_not_read_for_ever(identity: Identity) -> None:
    endless = b"age-encryption.org/v1\n-> X " + b"A" * (1 << 20)
    with pytest.raises(AgeError, match="too long"):
        opened(endless, identity)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_bech32_round_trip(data: bytes) -> None:
    text = bech32.encode("age-secret-key-", data)
    assert bech32.decode(text) == bech32.decode(text.upper()) == ("age-secret-key-", data)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        # From BIP 173, "Test vectors"; the last good one is over its length limit, which age does not have.
        ("A12UEL5L", True),
        ("an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1tt5tgs", True),
        ("abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw", True),
        ("\x201nwldj5", False),
        ("pzry9x0s0muk", False),
        ("1pzry9x0s0muk", False),
        ("x1b4n0q5v", False),
        ("li1dgmt3", False),
        ("A1G7SGD8", False),
        ("10a06t8", False),
        ("A12uEL5L", False),
    ],
)
def test_bech32_reference(text: str, holds: bool) -> None:
    if holds:
        prefix, data = bech32.decode(text)
        assert bech32.encode(prefix, data) == text.lower()
    else:
        with pytest.raises(ValueError, match=r"."):
            bech32.decode(text)


@pytest.mark.parametrize("change", ["flip", "case", "prefix", "short"])
def test_keys_that_are_not_keys_are_refused_without_being_shown(identity: Identity, change: str) -> None:
    text = identity.text()
    wrong = {
        "flip": text[:-1] + ("Q" if text[-1] != "Q" else "P"),
        "case": text.lower(),
        "prefix": bech32.encode("age", identity.secret),
        "short": bech32.encode("age-secret-key-", bytes(31)).upper(),
    }[change]
    with pytest.raises(AgeError) as caught:
        Identity.parse(wrong)
    assert wrong not in str(caught.value) and wrong not in repr(caught.value)
    assert text not in repr(identity) and identity.secret.hex() not in repr(identity)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=6))
def test_pieces_of_any_size_are_cut_alike(lengths: list[int]) -> None:
    data = os.urandom(sum(lengths))
    pieces, start = [], 0
    for length in lengths:
        pieces.append(data[start : start + length])
        start += length
    chunks = [(bytes(chunk), last) for chunk, last in stream.cut(pieces)]
    assert b"".join(chunk for chunk, _ in chunks) == data
    assert [last for _, last in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(len(chunk) == CHUNK_BYTES for chunk, _ in chunks[:-1])
    assert chunks[-1][0] or len(chunks) == 1
    size = stream.payload_size(len(data))
    assert stream.plaintext_size(size) == len(data)
    assert len(b"".join(stream.encrypt(bytes(16), bytes(16), pieces))) == size
