"""Whom a device obeys: what may stand in ``trust.toml``, and who may have written it."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent.base.errors import ConfigError, RefusedError
from agent.trust.allegiance import load, parse, public_key, shipped_root, trusted_keys
from agent.trust.envelope import EnvelopeError, Signer

ONE, TWO = Signer(bytes([1]) * 32), Signer(bytes([2]) * 32)
PUBLIC, OTHER = (base64.b64encode(signer.public.raw).decode() for signer in (ONE, TWO))
ADMIN = {"name": "admin", "public": PUBLIC, "classes": ["observe", "change", "destroy"]}
DEVICE = {"tenant": "acme", "device": "cam-1", "keys": [ADMIN]}
WAITING = {"tenant": "acme", "enrolment": {"public": PUBLIC}}


def problem(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as wrong:
        parse(document, "trust.toml")
    assert str(wrong.value).startswith("cannot read trust.toml: ")
    return str(wrong.value)


def test_a_device_with_the_keys_that_it_obeys() -> None:
    keys = [ADMIN, {"name": "look", "public": OTHER, "classes": ["observe"]}]
    found = parse({**DEVICE, "epoch": 3, "keys": keys}, "x")
    assert (found.tenant, found.device, found.epoch, found.enroller) == ("acme", "cam-1", 3, None)
    assert found.public_keys == {ONE.keyid: ONE.public, TWO.keyid: TWO.public}
    assert found.keys[TWO.keyid].classes == {"observe"}


def test_a_device_that_waits_to_be_enrolled() -> None:
    found = parse(WAITING, "x")
    assert (found.tenant, found.device, found.epoch, found.keys) == ("acme", None, 0, {})
    assert found.enroller == ONE.public


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({}, "tenant"),
        ({"tenant": "acme"}, "either device"),
        ({**DEVICE, **WAITING}, "not both"),
        ({**WAITING, "device": "cam-1"}, "would obey nobody"),
        ({**DEVICE, "keys": []}, "would obey nobody"),
        ({**DEVICE, "device": "claim"}, "no name of a device"),
        ({**DEVICE, "device": "a/b"}, "device"),
        ({**DEVICE, "device": ""}, "device"),
        ({**DEVICE, "device": "x" * 65}, "device"),
        ({**DEVICE, "tenant": "+"}, "tenant"),
        ({**DEVICE, "tenant": "acme\n"}, "tenant"),
        ({**DEVICE, "epoch": 0}, "epoch"),
        ({**DEVICE, "epoch": "1"}, "epoch"),
        ({**DEVICE, "epoch": 1 << 53}, "epoch"),
        ({**DEVICE, "epoch": True}, "epoch"),
        ({**DEVICE, "owner": "me"}, "owner: unknown key"),
        ({**DEVICE, "keys": [{**ADMIN, "note": "x"}]}, "note: unknown key"),
        ({**DEVICE, "keys": [{**ADMIN, "classes": []}]}, "classes"),
        ({**DEVICE, "keys": [{**ADMIN, "classes": ["all"]}]}, "classes"),
        ({**DEVICE, "keys": [{**ADMIN, "classes": "observe"}]}, "classes"),
        ({**DEVICE, "keys": [{**ADMIN, "name": ""}]}, "name"),
        ({**DEVICE, "keys": [ADMIN, {**ADMIN, "name": "again"}]}, "are one key"),
        ({**DEVICE, "keys": [{**ADMIN, "public": PUBLIC[:-1]}]}, "public"),
        ({**DEVICE, "keys": [{**ADMIN, "public": PUBLIC[:-2] + "!="}]}, "public"),
        ({**DEVICE, "keys": [{**ADMIN, "public": base64.b64encode(bytes(31)).decode()}]}, "public"),
        ({**DEVICE, "keys": [ADMIN] * 33}, "keys"),
        ({**WAITING, "enrolment": {}}, "enrolment"),
        ({**WAITING, "enrolment": {"public": PUBLIC, "name": "x"}}, "unknown key"),
        ({**WAITING, "enrolment": PUBLIC}, "enrolment"),
    ],
)  # fmt: skip
def test_what_may_not_stand_there(document: dict[str, Any], told: str) -> None:
    assert told in problem(document)


def test_a_public_key_has_one_spelling() -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    at = letters.index(PUBLIC[-2])
    for other in range(64):
        spelling = f"{PUBLIC[:-2]}{letters[other]}="
        if other % 4:  # bits beyond the end of the bytes
            with pytest.raises(ValueError, match="canonical"):
                public_key(spelling)
        else:
            assert (public_key(spelling) == ONE.public) == (other == at)


def test_classes_are_counted_by_keys() -> None:
    rows = [("admin", PUBLIC, ("observe", "change", "destroy")), ("second", OTHER, ("destroy",))]
    found = parse({**DEVICE, "keys": [dict(zip(("name", "public", "classes"), row, strict=True)) for row in rows]}, "x")
    assert found.keys == trusted_keys(rows)
    both, one, two = frozenset((ONE.keyid, TWO.keyid)), frozenset((ONE.keyid,)), frozenset((TWO.keyid,))
    for keyids, kind, count, code in (
        (one, "observe", 1, ""), (both, "observe", 1, ""), (two, "observe", 1, "key_not_allowed"),
        (both, "change", 2, "too_few_signatures"), (both, "destroy", 2, ""), (one, "destroy", 2, "too_few_signatures"),
        (both, "anything", 1, "key_not_allowed"),
    ):  # fmt: skip
        if not code:
            found.require_class(keyids, kind, count)
            continue
        with pytest.raises(EnvelopeError) as refused:
            found.require_class(keyids, kind, count)
        assert refused.value.code == code


# The file.


def write(path: Path, document: dict[str, Any], mode: int = 0o644) -> Path:
    lines = [f"{key} = {json.dumps(value)}" for key, value in document.items() if key not in ("keys", "enrolment")]
    for row in document.get("keys", ()):
        lines += ["[[keys]]", *(f"{key} = {json.dumps(value)}" for key, value in row.items())]
    if "enrolment" in document:
        lines += ["[enrolment]", f'public = "{document["enrolment"]["public"]}"']
    path.write_text("\n".join(lines))
    path.chmod(mode)
    return path


@pytest.mark.parametrize("document", [DEVICE, WAITING])
def test_the_file_is_read(tmp_path: Path, document: dict[str, Any]) -> None:
    assert load(write(tmp_path / "trust.toml", document)) == parse(document, "x")
    assert load(write(tmp_path / "trust.toml", document, 0o600)) == parse(document, "x")


def test_without_a_file_there_is_no_fleet(tmp_path: Path) -> None:
    assert load(tmp_path / "trust.toml") is None


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o777, 0o622])
def test_a_file_that_others_could_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(RefusedError, match="others than root could") as refused:
        load(write(tmp_path / "trust.toml", DEVICE, mode))
    assert "chmod 0644" in refused.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_somebody_elses_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trust.toml", DEVICE)
    os.chown(path, 4242, -1)
    with pytest.raises(RefusedError):
        load(path)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    real, path = write(tmp_path / "real.toml", DEVICE), tmp_path / "trust.toml"
    path.symlink_to(real)
    with pytest.raises(RefusedError):
        load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(RefusedError):
        load(path)
    path.rmdir()
    os.mkfifo(path, 0o600)
    with pytest.raises(RefusedError):
        load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load(real / "trust.toml")


@pytest.mark.parametrize("data", [b"tenant = ", b"\xff\xfe", b"[" * 5000, b"x" * (1 << 20) + b"xx"])
def test_other_bytes_are_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trust.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot read"):
        load(path)


def test_the_repositorys_root_lies_beside_it_and_is_roots_too(tmp_path: Path) -> None:
    trust = tmp_path / "trust.toml"
    assert shipped_root(trust) is None
    (tmp_path / "root.json").write_bytes(b"{}")
    (tmp_path / "root.json").chmod(0o644)
    assert shipped_root(trust) == b"{}"
    (tmp_path / "root.json").chmod(0o666)
    with pytest.raises(RefusedError, match=r"root\.json"):
        shipped_root(trust)
