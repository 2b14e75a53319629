"""Envelopes: one reading of each, no byte unsigned, and the same for whoever else speaks DSSE."""

from __future__ import annotations

import base64
import json
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from agent.trust.envelope import (
    MAX_ENVELOPE_BYTES,
    MAX_SIGNATURES,
    EnvelopeError,
    Opened,
    PublicKey,
    Signer,
    add_signatures,
    keyid_of,
    open_envelope,
    pae,
    peek_payload,
    seal,
)

KIND = "application/vnd.edge-agent.test+json"
ONE, TWO, STRANGER = (Signer(bytes([number]) * 32) for number in (1, 2, 3))
KEYS = {signer.keyid: signer.public for signer in (ONE, TWO)}


def code_of(data: bytes, kind: str = KIND, keys: dict[str, PublicKey] | None = None) -> str:
    """The reason for which an envelope is refused."""
    with pytest.raises(EnvelopeError) as refused:
        open_envelope(data, kind, KEYS if keys is None else keys)
    assert str(refused.value).startswith("cannot accept envelope: ")
    return refused.value.code


def document(data: bytes) -> dict:
    found = json.loads(data)
    assert isinstance(found, dict)
    return found


def changed(data: bytes, **fields: object) -> bytes:
    return json.dumps({**document(data), **fields}).encode()


# What DSSE says.


def test_the_published_example_of_what_is_signed() -> None:
    """DSSE 1.0.2, protocol.md, "Test Vectors"."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_lengths_are_those_of_the_bytes() -> None:
    assert pae("ü", "ü ".encode()) == b"DSSEv1 2 \xc3\xbc 3 \xc3\xbc "
    assert pae("", b"") == b"DSSEv1 0  0 "


@given(st.tuples(st.text(), st.binary()), st.tuples(st.text(), st.binary()))
def test_no_two_payloads_are_signed_alike(one: tuple[str, bytes], other: tuple[str, bytes]) -> None:
    assert (pae(*one) == pae(*other)) == (one == other)


def test_keys_and_signatures_are_those_of_rfc_8032() -> None:
    """RFC 8032 7.1, TEST 2."""
    signer = Signer(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert signer.public.raw.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert signer.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert signer.keyid == keyid_of(signer.public.raw) == "39f713d0a644253f04529421b9f51b9b"


def test_another_implementation_reads_ours_and_we_read_its() -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signers = pytest.importorskip("securesystemslib.signer")
    private = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)
    key = signers.SSlibKey(ONE.keyid, "ed25519", "ed25519", {"public": ONE.public.raw.hex()})
    theirs = dsse.Envelope(b'{"x":1}', KIND, {})
    theirs.sign(signers.CryptoSigner(private, key))
    assert open_envelope(json.dumps(theirs.to_dict()).encode(), KIND, KEYS) == Opened(
        b'{"x":1}', frozenset((ONE.keyid,))
    )
    ours = dsse.Envelope.from_dict(document(seal(KIND, b'{"x":1}', [ONE])))
    assert list(ours.verify([key], 1)) == [ONE.keyid]
    ours.payload = b'{"x":2}'
    with pytest.raises(pytest.importorskip("securesystemslib.exceptions").VerificationError):
        ours.verify([key], 1)


# Right ones.


@given(st.binary(max_size=2000), st.sets(st.sampled_from([ONE, TWO, STRANGER]), min_size=1))
def test_what_was_sealed_is_opened_by_those_who_are_known(payload: bytes, signers: set[Signer]) -> None:
    data = seal(KIND, payload, signers)
    known = {signer.keyid for signer in signers} & KEYS.keys()
    if known:
        assert open_envelope(data, KIND, KEYS) == Opened(payload, frozenset(known))
    else:
        assert code_of(data) == "unknown_key"
    assert peek_payload(data) == (KIND, payload)


def test_others_may_sign_later() -> None:
    data = add_signatures(seal(KIND, b"{}", [ONE]), [TWO, STRANGER])
    assert open_envelope(data, KIND, KEYS).keyids == {ONE.keyid, TWO.keyid}
    assert data == seal(KIND, b"{}", [ONE, TWO, STRANGER])


def test_a_key_counts_once_however_often_it_signs() -> None:
    data = seal(KIND, b"{}", [ONE] * MAX_SIGNATURES)
    assert open_envelope(data, KIND, KEYS).keyids == {ONE.keyid}
    assert code_of(add_signatures(data, [ONE])) == "malformed"


def test_blanks_between_the_fields_are_json_and_mean_nothing() -> None:
    data = json.dumps(document(seal(KIND, b"{}", [ONE])), indent=4).encode()
    assert open_envelope(data, KIND, KEYS).payload == b"{}"


def test_exactly_64_kib_are_taken() -> None:
    data = seal(KIND, b"{}", [ONE])
    full = data + b" " * (MAX_ENVELOPE_BYTES - len(data))
    assert open_envelope(full, KIND, KEYS).payload == b"{}"
    assert code_of(full + b" ") == "too_large"


def test_what_no_reader_would_take_is_not_made() -> None:
    largest = (MAX_ENVELOPE_BYTES - 400) * 3 // 4
    assert open_envelope(seal(KIND, bytes(largest), [ONE]), KIND, KEYS).payload == bytes(largest)
    with pytest.raises(ValueError, match="65536 are allowed"):
        seal(KIND, bytes(largest + 500), [ONE])


# Wrong ones. More of them, over the whole path: tests/core/hostile.py.


@pytest.mark.parametrize("signers", [[ONE], [ONE, TWO]])
def test_no_other_byte_is_a_second_spelling(signers: list[Signer]) -> None:
    """Every byte made every other one; with two signatures that of the second may be hurt beyond recognition only."""
    data = seal(KIND, b'{"a":1}', signers)
    good = open_envelope(data, KIND, KEYS)
    for at in range(len(data)):
        for value in range(256):
            if value != data[at]:
                attack = data[:at] + bytes((value,)) + data[at + 1 :]
                try:
                    opened = open_envelope(attack, KIND, KEYS)
                except EnvelopeError:
                    continue
                # One key's id is another's now: the other signature still stands, and what it stands for is the same.
                assert len(signers) == 2
                assert opened.payload == good.payload
                assert len(opened.keyids) == 1


def test_every_beginning_is_refused() -> None:
    data = seal(KIND, b'{"a":1}', [ONE])
    assert {code_of(data[:length]) for length in range(len(data))} == {"malformed"}


def test_every_field_that_is_missing_or_of_another_kind() -> None:
    data = seal(KIND, b"{}", [ONE])
    known = document(data)
    for name in known:
        assert code_of(json.dumps({key: value for key, value in known.items() if key != name}).encode()) == "malformed"
        for value in (None, 1, 1.5, True, [], {}, [1], [[]], [None], ["x"]):
            assert code_of(changed(data, **{name: value})) == "malformed", (name, value)
    (signature,) = known["signatures"]
    for name in signature:
        for value in (None, 1, True, [], {}):
            assert code_of(changed(data, signatures=[{**signature, name: value}])) == "malformed", (name, value)
        less = {key: value for key, value in signature.items() if key != name}
        assert code_of(changed(data, signatures=[less])) == "malformed"
    assert code_of(changed(data, signatures=[{**signature, "more": ""}])) == "malformed"
    assert code_of(changed(data, more="")) == "malformed"


def test_a_field_that_is_given_twice() -> None:
    """Two readers might take different ones."""
    data = seal(KIND, b"{}", [ONE]).decode()
    for name in ("payloadType", "payload", "signatures"):
        row = f'"{name}":{json.dumps(document(data.encode())[name])}'
        assert code_of(f"{{{row},{data[1:]}".encode()) == "malformed"
    twice = data.replace('"keyid":', f'"keyid":"{ONE.keyid}","keyid":')
    assert code_of(twice.encode()) == "malformed"
    escaped = data.replace('"payload":', '"p\\u0061yload":"","payload":')
    assert code_of(escaped.encode()) == "malformed"


def spellings(text: str) -> list[str]:
    """Other texts that some reader of base64 takes for the same bytes."""
    found = [
        f" {text}",
        f"{text} ",
        f"{text}\n",
        text[:4] + "\n" + text[4:],
        text.rstrip("="),
        f"{text}=",
        f"{text}====",
    ]
    if "+" in text or "/" in text:
        found.append(text.replace("+", "-").replace("/", "_"))
    if text.endswith("="):  # bits beyond the end
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        bare = text.rstrip("=")
        found.append(bare[:-1] + letters[letters.index(bare[-1]) + 1] + text[len(bare) :])
    return [spelling for spelling in found if spelling != text]


@pytest.mark.parametrize("payload", [b"", b"a", b"ab", b"abc", b"\xfb\xef\xbe", b"\xff" * 40])
def test_base64_has_one_spelling(payload: bytes) -> None:
    data = seal(KIND, payload, [ONE])
    text = base64.b64encode(payload).decode()
    for spelling in spellings(text):
        assert code_of(changed(data, payload=spelling)) == "malformed", spelling
    (signature,) = document(data)["signatures"]
    for spelling in spellings(signature["sig"]):
        assert code_of(changed(data, signatures=[{**signature, "sig": spelling}])) == "malformed", spelling
    assert code_of(changed(data, payload="ä" + text)) == "malformed"


def test_a_known_key_that_signed_something_else_refuses_the_whole() -> None:
    data = seal(KIND, b"{}", [ONE, TWO])
    first, second = document(data)["signatures"]
    swapped = [{**first, "sig": second["sig"]}, {**second, "sig": first["sig"]}]
    assert code_of(changed(data, signatures=swapped)) == "bad_signature"
    assert code_of(changed(data, signatures=[first, {**second, "sig": first["sig"]}])) == "bad_signature"
    for sig in (b"", bytes(63), bytes(64), bytes(65), b"\xff" * 64):
        wrong = [{"keyid": ONE.keyid, "sig": base64.b64encode(sig).decode()}]
        assert code_of(changed(data, signatures=wrong)) == "bad_signature"


def test_the_type_is_signed_and_must_be_the_expected_one() -> None:
    data = seal(KIND, b"{}", [ONE])
    assert code_of(data, "application/vnd.edge-agent.other+json") == "wrong_type"
    assert code_of(changed(data, payloadType="x"), "x") == "bad_signature"
    assert code_of(changed(data, payloadType=KIND + "\n")) == "malformed"


def test_the_name_of_a_key_that_signs_is_checked_against_nothing_but_the_key() -> None:
    """Whoever is listed under another's keyid has not signed: the key that is known under it is asked."""
    data = seal(KIND, b"{}", [STRANGER])
    (signature,) = document(data)["signatures"]
    assert code_of(changed(data, signatures=[{**signature, "keyid": ONE.keyid}])) == "bad_signature"
    assert code_of(data, KIND, {}) == "unknown_key"


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"1", b'"x"', b"[]", b"{}", b"\xff", b"[" * 60_000, b'{"a":' * 9_000, "{}".encode("utf-16"), b"\0",
     b'{"payload": 1e400}', b'{"payload": ' + b"9" * 5_000 + b"}"],
)  # fmt: skip
def test_other_bytes(data: bytes) -> None:
    assert code_of(data) == "malformed"


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    assert code_of(data) == "malformed"


def test_points_that_are_no_keys_verify_nothing() -> None:
    """Not on the curve; of small order (every signature of zeros would do for a careless verifier)."""
    for raw in (b"\xff" * 32, b"\x02" + bytes(31), bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"):
        key = PublicKey(raw)
        data = json.dumps({"payloadType": KIND, "payload": "", "signatures": [
            {"keyid": key.keyid, "sig": base64.b64encode(bytes(64)).decode()}]}).encode()  # fmt: skip
        assert code_of(data, KIND, {key.keyid: key}) == "bad_signature"


def test_keys_have_32_bytes() -> None:
    for raw in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="32 bytes"):
            PublicKey(raw)
    with pytest.raises(ValueError, match="32"):
        Signer(secrets.token_bytes(31))
