"""Grants: what one device was given for one payload opens for nothing and nobody else. HPKE by its RFC's vectors."""

from __future__ import annotations

import dataclasses
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from agent.trust import hpke
from agent.trust.grants import SEALED_BYTES, Grant, GrantError, Purpose, open_grant, recipient_id, seal_grant

#: RFC 9180, appendix A.2.1: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305, base mode.
INFO = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
EPHEMERAL = bytes.fromhex("f4ec9b33b792c372c1d2c2063507b684ef925b8c75a42dbcbf57d63ccd381600")
SHARE = bytes.fromhex("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a")
RECEIVER = bytes.fromhex("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
RECEIVER_PUBLIC = bytes.fromhex("4310ee97d88cc1f088a5576c77ab0cf5c3ac797f3d95139c6c84b5429c59662a")
PLAINTEXT = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
AAD = bytes.fromhex("436f756e742d30")
CIPHERTEXT = bytes.fromhex("1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28")

DEVICE = bytes(range(32))
PURPOSE = Purpose("door-7", 3, "digits", "2.0.0", "ab" * 32)
KEY = bytes(range(16))


def test_the_vector_of_the_rfc_is_sealed_and_opened() -> None:
    assert hpke.public_of(RECEIVER) == RECEIVER_PUBLIC and hpke.public_of(EPHEMERAL) == SHARE
    sealed = hpke.seal(RECEIVER_PUBLIC, INFO, PLAINTEXT, EPHEMERAL, AAD)
    assert sealed == SHARE + CIPHERTEXT
    assert hpke.open_sealed(RECEIVER, INFO, sealed, AAD) == PLAINTEXT


def test_what_cryptography_itself_seals_we_open_and_the_other_way_round() -> None:
    other = pytest.importorskip("cryptography.hazmat.primitives.hpke")
    suite = other.Suite(other.KEM.X25519, other.KDF.HKDF_SHA256, other.AEAD.CHACHA20_POLY1305)
    theirs = suite.encrypt(KEY, X25519PublicKey.from_public_bytes(RECEIVER_PUBLIC), info=INFO)
    assert hpke.open_sealed(RECEIVER, INFO, theirs) == KEY
    ours = hpke.seal(RECEIVER_PUBLIC, INFO, KEY, secrets.token_bytes(32))
    assert suite.decrypt(ours, X25519PrivateKey.from_private_bytes(RECEIVER), info=INFO) == KEY


def test_a_share_of_low_order_is_refused() -> None:
    with pytest.raises(hpke.HpkeError, match="low order"):
        hpke.open_sealed(RECEIVER, INFO, bytes(32) + CIPHERTEXT)


def granted() -> Grant:
    return seal_grant(hpke.public_of(DEVICE), PURPOSE, KEY)


def test_a_grant_travels_as_json_and_opens_for_its_device() -> None:
    grant = granted()
    document = grant.document()
    assert Grant.parse(document) == grant and len(grant.sealed) == SEALED_BYTES
    assert document["to"] == recipient_id(hpke.public_of(DEVICE))
    assert open_grant(Grant.parse(document), [DEVICE], PURPOSE) == KEY
    assert KEY.hex() not in repr(grant)


@pytest.mark.parametrize(
    ("changed", "value"),
    [("device", "door-8"), ("epoch", 4), ("model", "digits2"), ("version", "2.0.1"), ("blob", "cd" * 32)],
)
def test_a_grant_that_is_replayed_for_something_else_is_refused(changed: str, value: object) -> None:
    elsewhere = dataclasses.replace(PURPOSE, **{changed: value})
    grant = granted()
    for presented in (grant, dataclasses.replace(grant, blob=elsewhere.blob)):
        with pytest.raises(GrantError) as refused:
            open_grant(presented, [DEVICE], elsewhere)
        assert refused.value.code == "not_for_this"


def test_the_grant_of_another_device_is_refused_even_under_this_ones_name() -> None:
    other = secrets.token_bytes(32)
    grant = seal_grant(hpke.public_of(other), PURPOSE, KEY)
    with pytest.raises(GrantError) as refused:
        open_grant(grant, [DEVICE], PURPOSE)
    assert refused.value.code == "unknown_recipient"
    with pytest.raises(GrantError) as refused:
        open_grant(dataclasses.replace(grant, to=recipient_id(hpke.public_of(DEVICE))), [DEVICE], PURPOSE)
    assert refused.value.code == "not_for_this"


def test_after_a_key_rotation_old_grants_open_while_the_old_identity_is_kept_and_new_ones_replace_them() -> None:
    new = secrets.token_bytes(32)
    old_grant = granted()
    assert open_grant(old_grant, [new, DEVICE], PURPOSE) == KEY
    with pytest.raises(GrantError) as refused:
        open_grant(old_grant, [new], PURPOSE)
    assert refused.value.code == "unknown_recipient" and "grant again" in refused.value.hint
    assert open_grant(seal_grant(hpke.public_of(new), PURPOSE, KEY), [new], PURPOSE) == KEY


@pytest.mark.parametrize("length", [0, 31, 32, 47, SEALED_BYTES - 1])
def test_a_cut_grant_is_refused(length: int) -> None:
    grant = granted()
    with pytest.raises(GrantError):
        open_grant(dataclasses.replace(grant, sealed=grant.sealed[:length]), [DEVICE], PURPOSE)
    document = {
        **grant.document(),
        "sealed": dataclasses.replace(grant, sealed=grant.sealed[:length]).document()["sealed"],
    }
    with pytest.raises(GrantError) as refused:
        Grant.parse(document)
    assert refused.value.code == "malformed"


@given(at=st.integers(0, SEALED_BYTES - 1), flip=st.integers(1, 255))
def test_an_altered_grant_is_refused(at: int, flip: int) -> None:
    sealed = bytearray(granted().sealed)
    sealed[at] ^= flip
    with pytest.raises(GrantError):
        open_grant(dataclasses.replace(granted(), sealed=bytes(sealed)), [DEVICE], PURPOSE)


@pytest.mark.parametrize(
    "document",
    [
        None, [], {}, {"to": "x"}, {"to": "0" * 16, "blob": "0" * 64, "sealed": 5},
        {"to": "0" * 15, "blob": "0" * 64, "sealed": ""}, {"to": "0" * 16, "blob": "F" * 64, "sealed": ""},
        {"to": "0" * 16, "blob": "0" * 64, "sealed": "é"}, {"to": "0" * 16, "blob": "0" * 64, "sealed": "", "more": 1},
    ],
)  # fmt: skip
def test_what_is_no_grant_is_refused(document: object) -> None:
    with pytest.raises(GrantError) as refused:
        Grant.parse(document)
    assert refused.value.code == "malformed"


@given(st.lists(st.text(max_size=8), min_size=4, max_size=4, unique=True), st.integers(0, 9))
def test_no_two_purposes_share_a_context(fields: list[str], epoch: int) -> None:
    device, model, version, blob = fields
    first, second = Purpose(device, epoch, model, version, blob), Purpose(model, epoch, device, version, blob)
    assert first.info() != second.info()
