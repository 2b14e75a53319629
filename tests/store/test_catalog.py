"""Generations on a disk that somebody wrote to, or that failed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from agent.base import files as files_module
from agent.base.errors import DamagedError, PeerError, TryLaterError
from agent.store.document import CatalogDocument
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from tests.store.conftest import MIB, install, plain, reopened, without_model


def generations(store: Store) -> list[Path]:
    return sorted((store.root / "catalog").iterdir())


def test_two_generations_are_kept(store: Store) -> None:
    for patch in range(5):
        install(store, "digits", f"1.0.{patch}", {"m.onnx": b"x"})
    assert [path.name for path in generations(store)] == ["000000000005.age", "000000000006.age"]
    assert (store.root / "CURRENT").read_text().startswith("6 ")


@pytest.mark.parametrize("place", [0, 30, 100, 150, 200, 230, 300, -1])
def test_when_the_newest_is_damaged_the_one_before_answers(store: Store, place: int) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    install(store, "digits", "2.0.0", {"m.onnx": b"two"})
    newest = generations(store)[-1]
    data = bytearray(newest.read_bytes())
    data[place] ^= 4
    newest.write_bytes(data)
    with reopened(store) as again:
        assert again.document.models["digits"].active == "1.0.0"
        assert any("damaged" in note for note in again.notes)
        assert "catalog" in [finding.code for finding in again.doctor()]
        assert plain(again, next(again.document.refs())) == b"one"
        install(again, "digits", "3.0.0", {"m.onnx": b"three"})
        with reopened(again) as healed:
            assert healed.notes == () and healed.document.models["digits"].active == "3.0.0"


@pytest.mark.parametrize("what", ["cut", "empty", "missing", "appended"])
def test_a_newest_generation_that_is_not_whole_is_not_used(store: Store, what: str) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    install(store, "digits", "2.0.0", {"m.onnx": b"two"})
    newest = generations(store)[-1]
    data = newest.read_bytes()
    newest.write_bytes({"cut": data[:-1], "empty": b"", "missing": b"", "appended": data + b"x"}[what])
    if what == "missing":
        newest.unlink()
    with reopened(store) as again:
        assert again.document.models["digits"].active == "1.0.0" and again.notes


def test_an_old_generation_under_a_newer_number_is_refused(store: Store) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    old = generations(store)[-1].read_bytes()
    install(store, "digits", "2.0.0", {"m.onnx": b"two"})
    install(store, "digits", "3.0.0", {"m.onnx": b"three"})
    generations(store)[-1].write_bytes(old)
    (store.root / "catalog" / "000000000099.age").write_bytes(old)
    with reopened(store) as again:
        assert again.document.models["digits"].active == "2.0.0"


def test_when_both_are_damaged_it_does_not_open_and_deletes_nothing(store: Store) -> None:
    (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    for path in generations(store):
        path.write_bytes(b"rubbish")
    with pytest.raises(DamagedError, match="cannot open catalog") as caught:
        reopened(store)
    assert "secret" in caught.value.hint
    assert (store.root / "blobs" / ref.payload).exists()


def test_a_lost_catalog_is_not_taken_for_a_new_store(store: Store) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    shutil.rmtree(store.root / "catalog")
    with pytest.raises(DamagedError, match="every generation is gone"):
        reopened(store)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"999999999999999999\n", "missing", "digit", "beyond"])
def test_a_damaged_pointer_undoes_no_commit(store: Store, content: bytes | str) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    install(store, "digits", "2.0.0", {"m.onnx": b"two"})
    pointer = store.root / "CURRENT"
    good = pointer.read_bytes()
    if content == "missing":
        pointer.unlink()
    elif isinstance(content, str):
        pointer.write_bytes((b"2" if content == "digit" else b"7") + good[1:])
    else:
        pointer.write_bytes(content)
    with reopened(store) as again:
        assert again.document.models["digits"].active == "2.0.0" and again.notes


def test_the_generation_of_another_store_is_refused(store: Store, tmp_path: Path) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    with Store(tmp_path / "other", DeviceKeys(tmp_path / "otherkeys"), MIB) as other:
        install(other, "digits", "9.0.0", {"m.onnx": b"evil"})
        shutil.copy(generations(other)[-1], generations(store)[-1])
    with reopened(store) as again:
        assert again.document.models == {} and again.notes


@pytest.mark.parametrize("fails", ["write", "rename", "flush"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_commit_on_a_full_disk_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, fails: str, call: int
) -> None:
    """ENOSPC from the n-th write, rename or folder flush of the commit: the disk is the one thing faked here."""
    (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    before, remaining = store.document, call
    target = {"write": (os, "open"), "rename": (os, "replace"), "flush": (files_module, "fsync_directory")}[fails]
    real = getattr(*target)

    def limited(*arguments, **keywords):
        nonlocal remaining
        counts = fails != "write" or str(arguments[0]).rpartition("/")[2].startswith(".tmp-")
        remaining -= counts
        if counts and remaining == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(*target, limited)
        with pytest.raises(TryLaterError, match="No space"):
            store.commit(without_model("digits"))
    assert store.document == before
    with reopened(store) as again:
        assert again.document.models == before.models and again.notes == ()
        assert plain(again, ref) == b"one"


def test_files_that_somebody_left_there_are_reported_and_stay(store: Store) -> None:
    (store.root / "blobs" / "README").write_text("hello")
    (store.root / "blobs").chmod(0o755)
    codes = {finding.code for finding in store.doctor()}
    assert {"foreign", "mode"} <= codes
    store.gc()
    assert (store.root / "blobs" / "README").exists()


def test_what_a_commit_leaves_as_it_was_is_neither_read_again_nor_the_changer_s_to_touch(store: Store) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    install(store, "faces", "1.0.0", {"m.onnx": b"two"})
    before = store.document
    kept: list[CatalogDocument] = []

    def change(document: CatalogDocument) -> CatalogDocument:
        kept.append(document)
        pinned = document.models["digits"].model_copy(update={"pinned": True})
        return document.model_copy(update={"models": {**document.models, "digits": pinned}})

    after = store.commit(change)
    assert after.models["faces"] is before.models["faces"]
    assert after.models["digits"].pinned and not before.models["digits"].pinned
    kept[0].models["faces"].versions.clear()
    kept[0].models["digits"].versions["1.0.0"].blobs.clear()
    assert store.document == after and len(list(store.document.refs())) == 2
    with reopened(store) as again:
        assert again.document == after


@pytest.mark.parametrize("name", ['"', "", "a b", "../a", "a" * 200])
def test_a_name_that_is_none_is_not_written(store: Store, name: str) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    entry = store.document.models["digits"]
    with pytest.raises(PeerError, match="cannot use catalog"):
        store.commit(lambda document: document.model_copy(update={"models": {**document.models, name: entry}}))
    assert list(store.document.models) == ["digits"]
