"""Where the device secret comes from, what is refused, and what a rotation does to each provider."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.base.errors import DamagedError, RefusedError, TryLaterError, UnsupportedError
from agent.store import keys as keys_module
from agent.store.keys import CREDENTIAL_NEXT, FILE_NEXT, NAME, DeviceKeys, derive
from agent.store.store import Store
from tests.store.conftest import MIB, install, plain


def credential(folder: Path, name: str, secret: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(secret)
    (folder / name).chmod(0o400)


def test_a_file_is_made_at_first_start_and_found_again(tmp_path: Path) -> None:
    (made,) = DeviceKeys(tmp_path / "keys").load(create=True)
    assert made.source == "file" and made.weak
    path = tmp_path / "keys" / NAME
    assert (path.stat().st_mode & 0o7777, path.stat().st_size) == (0o600, 32)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert DeviceKeys(tmp_path / "keys").load(create=False) == (made,)


def test_without_create_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="no credential"):
        DeviceKeys(tmp_path / "keys").load(create=False)
    assert not (tmp_path / "keys").exists()


def test_a_credential_comes_before_the_file(tmp_path: Path) -> None:
    DeviceKeys(tmp_path / "keys").load(create=True)
    credential(tmp_path / "creds", NAME, b"c" * 32)
    first, second = DeviceKeys(tmp_path / "keys", tmp_path / "creds").load(create=True)
    assert (first.source, second.source) == ("credential", "file")
    assert not first.weak and first == derive(b"c" * 32, "credential", NAME)


def test_with_a_credential_no_file_is_made(tmp_path: Path) -> None:
    credential(tmp_path / "creds", NAME, b"c" * 32)
    DeviceKeys(tmp_path / "keys", tmp_path / "creds").load(create=True)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o700])
def test_a_file_that_others_could_use_is_refused(tmp_path: Path, mode: int) -> None:
    DeviceKeys(tmp_path / "keys").load(create=True)
    (tmp_path / "keys" / NAME).chmod(mode)
    with pytest.raises(RefusedError, match=f"mode {mode:04o}") as caught:
        DeviceKeys(tmp_path / "keys").load(create=True)
    assert "chmod" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    DeviceKeys(tmp_path / "keys").load(create=True)
    os.chown(tmp_path / "keys" / NAME, 12345, -1)
    with pytest.raises(RefusedError, match="belongs to user 12345"):
        DeviceKeys(tmp_path / "keys").load(create=True)


def test_links_and_folders_are_not_secrets(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"s" * 32)
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="not a plain file"):
        DeviceKeys(folder).load(create=True)
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME)
    with pytest.raises(RefusedError, match="not a plain file"):
        DeviceKeys(folder).load(create=True)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
@pytest.mark.parametrize("where", ["file", "credential"])
def test_a_secret_of_another_size_is_refused(tmp_path: Path, size: int, where: str) -> None:
    folder = tmp_path / where
    folder.mkdir()
    (folder / NAME).write_bytes(b"s" * size)
    (folder / NAME).chmod(0o600)
    keys = DeviceKeys(folder) if where == "file" else DeviceKeys(tmp_path / "none", folder)
    with pytest.raises(DamagedError, match=f"{size} bytes, 32 expected"):
        keys.load(create=True)


def test_a_credential_open_to_others_is_refused(tmp_path: Path) -> None:
    credential(tmp_path / "creds", NAME, b"c" * 32)
    (tmp_path / "creds" / NAME).chmod(0o444)
    with pytest.raises(RefusedError):
        DeviceKeys(tmp_path / "keys", tmp_path / "creds").load(create=True)


def test_kek_grant_identity_and_id_are_unrelated_and_never_shown() -> None:
    secret = derive(b"s" * 32, "file", NAME)
    other = derive(b"t" * 32, "file", NAME)
    values = [secret.kek, secret.grant_identity.secret, other.kek, other.grant_identity.secret, b"s" * 32]
    assert len(set(values)) == len(values)
    assert secret.key_id != other.key_id and len(secret.key_id) == 16
    assert not any(secret.key_id in value.hex() for value in values)
    for value in values:
        assert value.hex() not in repr(secret) and repr(value)[2:-1] not in repr(secret)


def test_what_a_kill_left_while_a_secret_was_written_is_dropped(tmp_path: Path) -> None:
    DeviceKeys(tmp_path / "keys").load(create=True)
    leftover = tmp_path / "keys" / ".tmp-device-secret.next-0123"
    leftover.write_bytes(b"x" * 32)
    DeviceKeys(tmp_path / "keys").load(create=False)
    assert not leftover.exists()


def test_a_store_without_its_secret_says_so_and_makes_no_other(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB):
        pass
    (tmp_path / "keys" / NAME).unlink()
    with pytest.raises(DamagedError, match="no credential"):
        Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB).open()
    assert not (tmp_path / "keys" / NAME).exists()


def test_a_store_under_another_secret_says_which(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        key_id = store.secret.key_id
    (tmp_path / "keys" / NAME).write_bytes(os.urandom(32))
    with pytest.raises(DamagedError, match=f"sealed under key {key_id}"):
        Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB).open()


def test_the_file_moves_to_a_credential_by_rotation(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"weights"})
        assert [finding.code for finding in store.doctor()] == ["key-weak"]
    credential(tmp_path / "creds", NAME, os.urandom(32))
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys", tmp_path / "creds"), MIB) as store:
        assert store.secret.source == "file"  # it still opens
        assert {finding.code for finding in store.doctor()} == {"key-weak", "key-spare"}
        assert store.rotate_key().action == ""
        assert store.secret.source == "credential" and store.doctor() == ()
        assert plain(store, ref) == b"weights"
    assert list((tmp_path / "keys").iterdir()) == []


def test_a_credential_rotates_with_the_integrators_help(tmp_path: Path) -> None:
    creds = tmp_path / "creds"
    credential(creds, NAME, b"1" * 32)

    def opened() -> Store:
        return Store(tmp_path / "store", DeviceKeys(tmp_path / "keys", creds), MIB).open()

    with opened() as store:
        (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"weights"})
        with pytest.raises(UnsupportedError, match="only root") as caught:
            store.rotate_key()
        assert CREDENTIAL_NEXT in caught.value.hint
    credential(creds, CREDENTIAL_NEXT, b"2" * 32)
    with opened() as store:
        first = store.rotate_key()
        assert CREDENTIAL_NEXT in first.action
        assert store.rotate_key().new_key == first.new_key  # again is harmless, and does not go back
    os.replace(creds / CREDENTIAL_NEXT, creds / NAME)
    with opened() as store:
        assert plain(store, ref) == b"weights"
        assert store.secret.key_id == first.new_key and store.doctor() == ()


def test_a_credential_gives_way_to_a_file_where_that_is_wanted(tmp_path: Path) -> None:
    creds = tmp_path / "creds"
    credential(creds, NAME, b"1" * 32)
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys", creds), MIB) as store:
        (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"weights"})
        report = store.rotate_key(to_file=True)
        assert NAME in report.action
        assert store.secret.weak and plain(store, ref) == b"weights"
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        assert store.secret.key_id == report.new_key and plain(store, ref) == b"weights"


def test_a_move_to_a_credential_that_was_cut_off_before_the_file_went_is_finished(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"weights"})
    left = (tmp_path / "keys" / NAME).read_bytes()
    credential(tmp_path / "creds", NAME, b"1" * 32)
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys", tmp_path / "creds"), MIB) as store:
        moved = store.rotate_key().new_key
        (tmp_path / "keys" / NAME).write_bytes(left)
        (tmp_path / "keys" / NAME).chmod(0o600)
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys", tmp_path / "creds"), MIB) as store:
        report = store.rotate_key()
        assert (report.old_key, report.new_key, report.headers) == (moved, moved, 0)
        assert plain(store, ref) == b"weights" and store.doctor() == ()
    assert list((tmp_path / "keys").iterdir()) == []


def test_rotation_waits_for_blobs_under_way(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        ref = store.add_blob("digits", "1.0.0", "m.onnx", [b"x"])
        with pytest.raises(TryLaterError, match="being added"):
            store.rotate_key()
        store.discard([ref])
        store.rotate_key()


def test_a_rotation_goes_on_past_a_damaged_header(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        a, b = install(store, "digits", "1.0.0", {"a.onnx": b"A", "b.onnx": b"B"})
        (store.root / "blobs" / a.header).write_bytes(b"rubbish")
        report = store.rotate_key()
        assert [blob.ref for blob in report.damaged] == [a] and report.headers == 1
        assert store.document.models["digits"].versions["1.0.0"].damaged == ("a.onnx",)
        assert plain(store, b) == b"B"
        codes = {finding.code: finding.level for finding in store.doctor()}
        assert codes["blob-damaged"] == "error"


def test_after_a_rotation_the_old_secret_opens_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        install(store, "digits", "1.0.0", {"m.onnx": b"weights"})
        old = (tmp_path / "keys" / NAME).read_bytes()
        store.rotate_key()
        old_id = derive(old, "file", NAME).key_id
        on_disk = [path.read_bytes() for path in store.root.rglob("*") if path.is_file()]
        assert not any(old_id.encode() in data for data in on_disk)
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [NAME]
    assert (tmp_path / "keys" / NAME).read_bytes() != old


def test_names_are_what_the_units_say() -> None:
    assert (keys_module.NAME, CREDENTIAL_NEXT, FILE_NEXT) == (
        "device-secret",
        "device-secret-next",
        "device-secret.next",
    )
