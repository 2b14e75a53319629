"""What the core does with a store, day by day."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pyrage
import pytest

from agent.base.errors import ConflictError, DamagedError, NotFoundError, PeerError, TooLargeError, TryLaterError
from agent.store.age import Identity, seal_x25519, write_header
from agent.store.headers import file_key
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.store.stream import CHUNK_BYTES, SEALED_CHUNK_BYTES
from tests.store.conftest import MIB, install, manifest, plain, reopened, with_version, without_model


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 3_000_001])
def test_a_blob_of_any_size_comes_back_after_a_restart(store: Store, size: int) -> None:
    data = os.urandom(size)
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": data})
    assert (ref.size, (store.root / "blobs" / ref.payload).stat().st_size) == (size, ref.payload_size)
    again = reopened(store)
    with again:
        assert plain(again, again.document.models["digits"].versions["1.0.0"].blobs["model.onnx"]) == data


def test_a_file_descriptor_and_a_pipe_are_sources(store: Store, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    (tmp_path / "model").write_bytes(data)
    with (tmp_path / "model").open("rb") as file:
        assert plain(store, store.add_blob("a", "1.0.0", "m", file.fileno())) == data
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    os.close(writer)
    assert plain(store, store.add_blob("a", "1.0.0", "p", reader)) == b"through a pipe"
    os.close(reader)


def test_no_plaintext_and_no_name_reaches_the_disk(store: Store) -> None:
    data = b"SECRET WEIGHTS " * 10_000
    install(store, "digits", "1.0.0", {"model.onnx": data})
    on_disk = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert b"SECRET" not in on_disk and b"digits" not in on_disk and b"onnx" not in on_disk


def test_the_plaintext_is_sealed_and_opens_by_path(store: Store) -> None:
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": b"w" * 100_000})
    with store.read(ref) as plaintext:
        assert Path(plaintext.path).read_bytes() == b"w" * 100_000
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(plaintext.fd, b"x")
        with pytest.raises(PermissionError):
            os.truncate(plaintext.path, 0)
        with plaintext.view() as view:
            assert view[:3] == b"www"


def test_two_processes_cannot_have_it(store: Store) -> None:
    with pytest.raises(ConflictError):
        Store(store.root, DeviceKeys(store.root.parent / "keys"), MIB).open()


def test_a_wrong_digest_leaves_nothing(store: Store) -> None:
    with pytest.raises(PeerError, match="SHA-256"):
        store.add_blob("a", "1.0.0", "m", [b"data"], 4, expected_sha256="0" * 64)
    assert list((store.root / "blobs").iterdir()) == []


def test_the_quota_is_reserved_before_the_first_byte(tmp_path: Path) -> None:
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB).open() as store:

        def never() -> list[bytes]:
            raise AssertionError("read before reserved")

        with pytest.raises(TooLargeError):
            store.add_blob("a", "1.0.0", "m", (never() for _ in range(1)), 2 * MIB)  # type: ignore[misc]
        store.add_blob("a", "1.0.0", "m", [bytes(700_000)], 700_000)
        with pytest.raises(TryLaterError, match="quota"):
            store.add_blob("a", "1.0.0", "n", [bytes(700_000)], 700_000)
        with pytest.raises(TryLaterError, match="quota"):
            store.add_blob("a", "1.0.0", "n", [bytes(100_000)] * 7)  # says nothing of its size
        assert len(list((store.root / "blobs").iterdir())) == 2
        assert store.stats().reserved_bytes == 0


def test_a_failed_change_changes_nothing(store: Store) -> None:
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": b"one"})
    before = store.document

    def vandal(document):
        document.models.clear()
        raise RuntimeError("core failed")

    with pytest.raises(RuntimeError):
        store.commit(vandal)
    with pytest.raises(PeerError, match="points to version"):
        store.commit(lambda document: document.model_copy(
            update={"models": {"digits": document.models["digits"].model_copy(update={"active": "9.9.9"})}}
        ))  # fmt: skip
    gone = ref.model_copy(update={"payload": "0" * 64})
    with pytest.raises(NotFoundError):
        store.commit(with_version("digits", "1.0.0", {"model.onnx": b"one"}, [gone]))
    assert store.document == before
    assert plain(store, ref) == b"one"


def test_removed_versions_give_their_space_back(store: Store) -> None:
    install(store, "digits", "1.0.0", {"model.onnx": bytes(MIB)})
    (kept,) = install(store, "other", "1.0.0", {"model.onnx": b"stays"})
    store.commit(without_model("digits"))
    assert store.stats().unreached_bytes == 0  # the generation before still reaches it
    report = store.gc()
    assert report.files == 2 and report.freed_bytes > MIB
    assert plain(store, kept) == b"stays"
    assert store.gc().files == 0


def test_blobs_that_nobody_committed_are_kept_until_the_end_of_the_process(store: Store) -> None:
    ref = store.add_blob("digits", "1.0.0", "model.onnx", [b"under way"])
    assert store.gc().files == 0
    assert plain(store, ref) == b"under way"
    with reopened(store) as again:
        assert again.gc().files == 2
        with pytest.raises(NotFoundError):
            again.read(ref)


def test_discarded_blobs_are_gone(store: Store) -> None:
    ref = store.add_blob("digits", "1.0.0", "model.onnx", [b"under way"])
    store.discard([ref])
    assert list((store.root / "blobs").iterdir()) == []
    with pytest.raises(NotFoundError):
        store.read(ref)


def test_damage_is_refused_marked_and_healed_by_verify(store: Store) -> None:
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": os.urandom(300_000)})
    path = store.root / "blobs" / ref.payload
    good = path.read_bytes()
    path.write_bytes(good[:100_000] + bytes([good[100_000] ^ 1]) + good[100_001:])
    with pytest.raises(DamagedError, match=r"model\.onnx"):
        store.read(ref)
    assert store.document.models["digits"].versions["1.0.0"].damaged == ("model.onnx",)
    report = store.verify()
    assert [blob.ref for blob in report.damaged] == [ref]
    path.write_bytes(good)
    seen = []
    assert store.verify(lambda done, total: seen.append((done, total))).damaged == ()
    assert seen[-1] == (ref.payload_size, ref.payload_size)
    assert store.document.models["digits"].versions["1.0.0"].damaged == ()


def test_blobs_and_headers_of_two_variants_cannot_be_swapped(store: Store) -> None:
    a, b = install(store, "digits", "1.0.0", {"a.onnx": b"A" * 1000, "b.onnx": b"B" * 1000})
    folder = store.root / "blobs"
    for ref, other in ((a, b), (b, a)):  # the catalog told to use the other's files
        for change in ({"header": other.header}, {"payload": other.payload, "header": other.header}, {"part": "x"}):
            forged = ref.model_copy(update=change)
            store._pending[forged.payload] = forged
            with pytest.raises(DamagedError):
                store.read(forged)
            store._pending.clear()
    one, two = (folder / a.payload).read_bytes(), (folder / b.payload).read_bytes()
    (folder / a.payload).write_bytes(two)
    (folder / b.payload).write_bytes(one)
    for ref in (a, b):
        with pytest.raises(DamagedError):
            store.read(ref)
    assert len(store.verify().damaged) == 2


@pytest.mark.parametrize("which", ["header", "payload"])
def test_any_flipped_bit_cut_or_appendix_is_refused(store: Store, which: str) -> None:
    """Every byte of the header; of the payload the nonce, the first bytes, the seams of the chunks and the end."""
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": os.urandom(2 * CHUNK_BYTES + 50)})
    path = store.root / "blobs" / getattr(ref, which)
    good = path.read_bytes()
    seam = 16 + SEALED_CHUNK_BYTES
    places = range(len(good)) if which == "header" else [*range(20), *range(seam - 20, seam + 4), len(good) - 1]
    wrong = [good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in places]
    for data in [*wrong, good[:-1], good + b"x", b"", good[: len(good) // 2], good[::-1]]:
        path.write_bytes(data)
        with pytest.raises(DamagedError):
            store.read(ref)
    path.unlink()
    with pytest.raises(DamagedError, match="No such file"):
        store.read(ref)
    assert [blob.ref for blob in store.verify().damaged] == [ref]
    path.write_bytes(good)
    store.read(ref).close()


@pytest.mark.skipif(shutil.which("age") is None, reason="Debian's age is not installed (apt install age)")
@pytest.mark.parametrize("size", [0, CHUNK_BYTES, 1_000_000])
def test_a_payload_under_a_header_for_somebody_is_an_age_file(store: Store, tmp_path: Path, size: int) -> None:
    data, somebody = os.urandom(size), Identity(os.urandom(32))
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": data})
    key = file_key(store._blobs, ref, store._ring)
    (tmp_path / "header").write_bytes(write_header([seal_x25519(key, somebody.recipient(), os.urandom(32))], key))
    (tmp_path / "identity").write_text(somebody.text())
    command = 'cat "$0" "$1" | age -d -i "$2"'
    files = [tmp_path / "header", store.root / "blobs" / ref.payload, tmp_path / "identity"]
    opened = subprocess.run(["sh", "-c", command, *files], capture_output=True, check=True)
    assert opened.stdout == data
    theirs = pyrage.x25519.Identity.from_str(somebody.text())
    assert pyrage.decrypt(b"".join(file.read_bytes() for file in files[:2]), [theirs]) == data


def test_names_that_are_none_are_refused_before_anything_is_written(store: Store) -> None:
    for model, version, part in (("Digits", "1.0.0", "m"), ("digits", "1", "m"), ("digits", "1.0.0", "a\nb")):
        with pytest.raises(PeerError, match="cannot name a blob"):
            store.add_blob(model, version, part, [b"x"])
    with pytest.raises(PeerError, match="cannot read source"):
        store.add_blob("digits", "1.0.0", "m", 999)
    assert list((store.root / "blobs").iterdir()) == []


def test_a_source_that_fails_halfway_leaves_nothing(store: Store) -> None:
    def source():
        yield bytes(100_000)
        raise ConnectionResetError("peer went away")

    with pytest.raises(PeerError, match="peer went away"):
        store.add_blob("digits", "1.0.0", "m", source(), 200_000)
    assert list((store.root / "blobs").iterdir()) == [] and store.stats().reserved_bytes == 0


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    for use in (lambda: store.document, lambda: store.add_blob("a", "1.0.0", "m", [b""]), store.gc, store.stats):
        with pytest.raises(ConflictError, match="not open"):
            use()


def test_a_thousand_versions_commit_in_a_blink(store: Store) -> None:
    ref = store.add_blob("m0", "1.0.0", "m.onnx", [b"x"])
    one = with_version("m0", "1.0.0", {"m.onnx": b"x"}, [ref])(store.document).models["m0"]

    def many(document):
        models = {"m0": one}
        for index in range(1, 1000):
            entry = one.versions["1.0.0"].model_copy(update={"blobs": {}})
            models[f"m{index}"] = one.model_copy(update={"versions": {"1.0.0": entry}})
        return document.model_copy(update={"models": models})

    assert len(store.commit(many).models) == 1000
    with reopened(store) as again:
        assert len(again.document.models) == 1000


def test_the_key_rotates_by_headers_only(store: Store) -> None:
    data = os.urandom(200_000)
    (ref,) = install(store, "digits", "1.0.0", {"model.onnx": data})
    old = store.secret.key_id
    payload = (store.root / "blobs" / ref.payload).stat()
    report = store.rotate_key()
    assert (report.old_key, report.headers, report.action) == (old, 1, "") and report.new_key != old
    renewed = store.document.models["digits"].versions["1.0.0"].blobs["model.onnx"]
    assert renewed.payload == ref.payload and renewed.header != ref.header
    assert (store.root / "blobs" / ref.payload).stat() == payload
    assert not (store.root / "blobs" / ref.header).exists()
    assert plain(store, ref) == data  # a reference from before still leads there
    with reopened(store) as again:
        assert again.secret.key_id == report.new_key and not again.rotation_pending
        assert plain(again, renewed) == data


def test_secrets_show_nowhere(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    secret = store.secret
    text = repr(secret) + repr(store._keys) + repr(store.stats()) + caplog.text
    assert secret.kek.hex() not in text and repr(secret.kek) not in text and "kek" not in text


def test_manifest_of_another_version_is_refused(store: Store) -> None:
    ref = store.add_blob("digits", "1.0.0", "m.onnx", [b"x"])
    change = with_version("digits", "1.0.0", {"m.onnx": b"x"}, [ref])

    def wrong(document):
        changed = change(document)
        entry = changed.models["digits"].versions["1.0.0"]
        other = entry.model_copy(update={"manifest": manifest("digits", "2.0.0", {"m.onnx": b"x"})})
        model = changed.models["digits"].model_copy(update={"versions": {"1.0.0": other}})
        return changed.model_copy(update={"models": {"digits": model}})

    with pytest.raises(PeerError, match="manifest says version"):
        store.commit(wrong)
