"""A payload that a publisher encrypted becomes a blob as it is: the bytes stay, the header is the device's."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import pytest

from agent.base.errors import ConflictError, PeerError, TooLargeError
from agent.store import stream
from agent.store.store import Store
from tests.store.conftest import with_version, without_model

KEY = bytes(range(16))


def published(folder: Path, data: bytes, name: str = "download") -> tuple[Path, str]:
    """A payload as a publisher writes it, and its digest."""
    path = folder / name
    path.write_bytes(b"".join(stream.encrypt(KEY, secrets.token_bytes(16), [data])))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def promised(data: bytes, digest: str, **changed: object) -> dict[str, object]:
    found = {"payload": digest, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "file_key": KEY}
    return found | changed


def adopt(store: Store, path: Path, data: bytes, digest: str, **changed: object):
    return store.adopt_blob("m", "1.0.0", "a.onnx", path, **promised(data, digest, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 300_001])
def test_a_published_payload_is_moved_and_read_under_the_devices_own_header(store: Store, size: int) -> None:
    data = os.urandom(size)
    path, payload = published(store.root, data)
    inode = path.stat().st_ino
    ref = adopt(store, path, data, payload)
    assert not path.exists() and ref.payload == payload
    assert (store.root / "blobs" / payload).stat().st_ino == inode
    store.commit(with_version("m", "1.0.0", {"a.onnx": data}, [ref]))
    with store.read(store.document.models["m"].versions["1.0.0"].blobs["a.onnx"]) as plain:
        assert os.pread(plain.fd, size + 1, 0) == data
    assert store.verify().damaged == ()
    store.rotate_key()
    assert (store.root / "blobs" / payload).stat().st_ino == inode
    with store.read(store.document.models["m"].versions["1.0.0"].blobs["a.onnx"]) as plain:
        assert os.pread(plain.fd, size + 1, 0) == data


@pytest.mark.parametrize(
    "change",
    [
        {"payload": "0" * 64}, {"sha256": "0" * 64}, {"file_key": bytes(16)}, {"size": 99_999}, {"size": 100_001},
    ],
    ids=["payload", "content", "key", "shorter", "longer"],
)  # fmt: skip
def test_what_does_not_agree_is_refused_and_the_file_stays_where_it_was(
    store: Store, change: dict[str, object]
) -> None:
    data = os.urandom(100_000)
    path, payload = published(store.root, data)
    with pytest.raises(PeerError):
        adopt(store, path, data, payload, **change)
    assert path.exists() and list((store.root / "blobs").iterdir()) == []


def test_a_cut_or_altered_download_is_refused(store: Store) -> None:
    data = os.urandom(100_000)
    path, payload = published(store.root, data)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole + b"x", whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        path.write_bytes(wrong)
        with pytest.raises(PeerError):
            adopt(store, path, data, payload)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(PeerError):
        adopt(store, path, data, payload)


def test_the_quota_holds_for_what_is_taken_over(store: Store) -> None:
    data = bytes(100_000)
    path, payload = published(store.root, data)
    store._space._quota = 50_000
    with pytest.raises(TooLargeError):
        adopt(store, path, data, payload)


def test_giving_up_a_second_take_over_leaves_the_installed_blob_alone(store: Store) -> None:
    data = os.urandom(1000)
    path, payload = published(store.root, data)
    copy = store.root / "again"
    copy.write_bytes(path.read_bytes())
    ref = adopt(store, path, data, payload)
    store.commit(with_version("m", "1.0.0", {"a.onnx": data}, [ref]))
    again = adopt(store, copy, data, payload)
    store.discard([again])
    with store.read(store.document.models["m"].versions["1.0.0"].blobs["a.onnx"]) as plain:
        assert os.pread(plain.fd, 1001, 0) == data
    store.commit(without_model("m"))
    store.gc()
    assert list((store.root / "blobs").iterdir()) == []


def test_one_payload_is_not_added_for_two_things_at_once(store: Store) -> None:
    data = os.urandom(1000)
    path, payload = published(store.root, data)
    copy = store.root / "again"
    copy.write_bytes(path.read_bytes())
    adopt(store, path, data, payload)
    with pytest.raises(ConflictError):
        store.adopt_blob("m", "2.0.0", "a.onnx", copy, **promised(data, payload))  # type: ignore[arg-type]
