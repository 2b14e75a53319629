"""Keys are kept under a password, opened with it and nothing else, and sign only what they may."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.base.errors import ConflictError, DamagedError, NotFoundError, PeerError, RefusedError
from agent.fleet import keys
from agent.fleet.keys import KeyRow, Passwords, choose_keys
from agent.wire.ops import OpClass
from tests.fleet.conftest import edge_fleet

PASSWORD = b"correct horse battery"


def test_a_key_opens_with_its_password_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "ann.key"
    public = keys.make_signing_key(path, PASSWORD)
    assert b"ENCRYPTED" in path.read_bytes() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.open_signer(path, Passwords(PASSWORD)).public == public
    with pytest.raises(RefusedError, match="the password is wrong"):
        keys.open_signer(path, Passwords(b"another one, wrong"))
    with pytest.raises(RefusedError, match="nobody can be asked"):
        keys.open_signer(path, Passwords())


def test_a_person_is_asked_once_for_all_keys_and_three_times_at_most(tmp_path: Path) -> None:
    first, second = tmp_path / "a.key", tmp_path / "b.key"
    for path in (first, second):
        keys.make_signing_key(path, PASSWORD)
    said = [b"a slip of the hand", PASSWORD]
    asked: list[str] = []
    passwords = Passwords(ask=lambda question: (asked.append(question), said.pop(0))[1])
    keys.open_signer(first, passwords)
    keys.open_signer(second, passwords)
    assert len(asked) == 2 and said == []
    with pytest.raises(RefusedError, match="wrong"):
        keys.open_signer(first, Passwords(ask=lambda _: b"never right at all"))


def test_a_new_password_is_typed_twice_and_is_not_short() -> None:
    said = iter([PASSWORD, PASSWORD])
    assert Passwords(ask=lambda _: next(said)).choose("keys") == PASSWORD
    differing = iter([PASSWORD, b"correct horse batterx"])
    with pytest.raises(PeerError, match="differ"):
        Passwords(ask=lambda _: next(differing)).choose("keys")
    for short in (b"", b"short", b"eleven chars"[:11]):
        with pytest.raises(PeerError, match="shorter than 12"):
            Passwords(short).choose("keys")
    with pytest.raises(RefusedError, match="there is no password"):
        Passwords().choose("keys")


def test_where_a_password_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"from the file \r\nsecond line\n")
    assert keys.read_password({"EDGE_FLEET_PASSWORD": "from outside"}, file) == b"from the file "
    assert keys.read_password({"EDGE_FLEET_PASSWORD": "from outside"}, None) == b"from outside"
    assert keys.read_password({"EDGE_FLEET_PASSWORD": ""}, None) is None
    file.write_bytes(b"\n")
    with pytest.raises(PeerError, match="its first line is empty"):
        keys.read_password({}, file)


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ann.key"
    keys.make_signing_key(path, None)
    before = path.read_bytes()
    with pytest.raises(ConflictError, match="it is there already"):
        keys.make_signing_key(path, None)
    assert path.read_bytes() == before


def test_what_is_no_key_of_ours_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    for data in (b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", os.urandom(500)):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="no private key"):
            keys.open_signer(path, Passwords())
    other = rsa.generate_private_key(65537, 2048)
    path.write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(DamagedError, match="neither an Ed25519, an X25519 nor an EC key"):
        keys.open_signer(path, Passwords())


def test_public_keys_as_people_pass_them_on(tmp_path: Path) -> None:
    public = keys.make_signing_key(tmp_path / "a.key", None)
    text = base64.b64encode(public.raw).decode()
    private = serialization.load_pem_private_key((tmp_path / "a.key").read_bytes(), None)
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for form in (text, f"  {text}\n", f"{text[:20]}\n{text[20:]}", pem.decode()):
        assert keys.parse_public(form) == public
    other = rsa.generate_private_key(65537, 2048).public_key()
    rsa_pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    for wrong in ("", text[:-4], "ü" * 44, "%" * 44, rsa_pem, text + text):
        with pytest.raises(PeerError, match="cannot read public key"):
            keys.parse_public(wrong)


def row(name: str, *classes: OpClass, held: bool = True, revoked: str | None = None) -> KeyRow:
    return KeyRow(name, base64.b64encode(name.ljust(32).encode()).decode(), classes, "2026", revoked, held=held)


def test_the_keys_that_sign_are_as_few_as_suffice() -> None:
    ann, bob, eve = row("ann", "observe", "change"), row("bob", "destroy"), row("eve", "destroy", "change")
    assert choose_keys([ann, bob, eve], ["change"], ()) == [ann]
    assert choose_keys([bob, eve, ann], ["observe", "change"], ()) == [ann]
    assert choose_keys([ann, bob, eve], ["destroy"], ()) == [bob, eve]
    assert choose_keys([ann, bob], ["destroy"], ()) == [bob]
    assert keys.signatures_missing([bob], "destroy") == 1 and keys.signatures_missing([bob, eve], "destroy") == 0
    assert choose_keys([ann, bob, eve], ["change"], ["eve"]) == [eve]


def test_keys_that_may_not_sign_are_told_apart() -> None:
    ann, gone, away = row("ann", "observe"), row("gone", "change", revoked="2026"), row("away", "change", held=False)
    every = [ann, gone, away]
    for named, reason in (
        (["gone"], "was revoked"),
        (["away"], "is not in this folder"),
        (["ann"], "ann may not sign"),
    ):
        with pytest.raises(RefusedError, match=reason):
            choose_keys(every, ["change"], named)
    with pytest.raises(RefusedError, match="no key of this folder may sign operations of class change"):
        choose_keys(every, ["change"], ())
    with pytest.raises(NotFoundError, match="there is no such key"):
        choose_keys(every, ["observe"], ["eve"])


def test_a_second_person_needs_no_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FLEET_PASSWORD", PASSWORD.decode())
    folder = tmp_path / "bob"
    added = edge_fleet(folder, "keys", "add", "bob", "--classes", "destroy", "--json")
    assert added.status == 0 and added.json["held"] and added.json["classes"] == ["destroy"]
    assert edge_fleet(folder, "keys", "export", "bob").out.strip() == added.json["public"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "there is no fleet in it" in edge_fleet(folder, "devices", "list").err
    assert "there are no keys in it" in edge_fleet(tmp_path / "none", "keys", "list").err


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    assert "other users may write to it" in edge_fleet(folder, "keys", "add", "ann", "--no-password").err
