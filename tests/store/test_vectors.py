"""The files of ``docs/spec/store.md``, byte for byte.

python -m tests.store.test_vectors     writes them anew (after a deliberate change of the format)
"""

from __future__ import annotations

import hashlib
import hmac
import io
import itertools
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from agent.base.clock import SystemClock
from agent.store import age, sealing, stream
from agent.store.age import AgeError
from agent.store.document import BlobRef, decode, encode
from agent.store.keys import DeviceKeys, DeviceSecret, derive
from agent.store.store import Store
from tests.store.conftest import MIB, plain, with_version

PATH = Path(__file__).parents[1] / "vectors" / "store" / "store.json"
SECRET = bytes(range(32))
TEXT, TIMES = b"weights ", 10_000


class Midnight(SystemClock):
    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=timezone.utc)


def drawn() -> Callable[[int], bytes]:
    """The random bytes of the vectors: see the specification, "Test vectors"."""
    blocks = (hashlib.sha256(b"edge-agent" + counter.to_bytes(8, "big")).digest() for counter in itertools.count())
    source = itertools.chain.from_iterable(blocks)
    return lambda count: bytes(itertools.islice(source, count))


def secret() -> DeviceSecret:
    return derive(SECRET, "file", "device-secret")


def make() -> dict[str, Any]:
    """Everything, by an ordinary store with an ordinary key file."""
    with TemporaryDirectory() as name:
        folder, random = Path(name), drawn()
        (folder / "keys").mkdir()
        (folder / "keys" / "device-secret").write_bytes(SECRET)
        (folder / "keys" / "device-secret").chmod(0o600)
        with Store(folder / "store", DeviceKeys(folder / "keys"), MIB, Midnight(), random=random) as store:
            data = TEXT * TIMES
            ref = store.add_blob("digits", "1.0.0", "model.onnx", [data])
            store.commit(with_version("digits", "1.0.0", {"model.onnx": data}, [ref]))
            return {
                "secret": SECRET.hex(),
                "keys": {
                    "key_id": store.secret.key_id,
                    "key_encryption_key": store.secret.kek.hex(),
                    "grant_recipient": store.secret.grant_identity.recipient().text(),
                },
                "blob": blob_vector(store, ref),
                "catalog": catalog_vector(store),
                "refused": {
                    "model": "digits2", "version": "1.0.1", "part": "model.onnx ", "size": ref.size + 1,
                    "payload": ref.payload[::-1], "generation": 3,
                },
            }  # fmt: skip


def blob_vector(store: Store, ref: BlobRef) -> dict[str, Any]:
    header_text = (store.root / "blobs" / ref.header).read_text()
    payload = (store.root / "blobs" / ref.payload).read_bytes()
    header = age.parse_header(header_text.encode())
    purpose = sealing.blob_purpose(ref.model, ref.version, ref.part, ref.size, ref.payload)
    return {
        "text": TEXT.decode(),
        "times": TIMES,
        "reference": ref.model_dump(),
        "file_key": sealing.unseal(header, store.secret.key_id, store.secret.kek, purpose).hex(),
        "nonce": payload[:16].hex(),
        "salt": age.decode_base64(header.stanzas[0].arguments[1].encode()).hex(),
        "associated": sealing._associated(store.secret.key_id, purpose).hex(),
        "header": header_text,
        "payload_start": payload[:64].hex(),
        "payload_end": payload[-64:].hex(),
    }


def catalog_vector(store: Store) -> dict[str, Any]:
    number = store.document.generation
    file = store.root / "catalog" / f"{number:012d}.age"
    return {
        "generation": number,
        "file": file.read_bytes().hex(),
        "current": (store.root / "CURRENT").read_text(),
        "document": json.loads(encode(store.document).data),
    }


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    return json.loads(PATH.read_text())


def test_a_store_with_the_same_secret_and_chance_writes_the_same_files(vectors: dict[str, Any]) -> None:
    assert make() == vectors


def test_the_keys_are_derived_as_written(vectors: dict[str, Any]) -> None:
    """By RFC 5869 done here by hand, not by the code under test."""

    def branch(label: str) -> bytes:
        extracted = hmac.digest(bytes(32), bytes.fromhex(vectors["secret"]), "sha256")
        return hmac.digest(extracted, b"edge-agent/device-secret/1/" + label.encode() + b"\x01", "sha256")

    assert branch("key-id")[:8].hex() == vectors["keys"]["key_id"]
    assert branch("key-encryption-key").hex() == vectors["keys"]["key_encryption_key"]
    assert age.Identity(branch("grant-identity")).recipient().text() == vectors["keys"]["grant_recipient"]


def test_the_header_opens_for_its_blob_and_for_nothing_else(vectors: dict[str, Any]) -> None:
    blob, key = vectors["blob"], secret()
    names = ("model", "version", "part", "size", "payload")
    right = {name: blob["reference"][name] for name in names}
    header = age.parse_header(blob["header"].encode())
    file_key = sealing.unseal(header, key.key_id, key.kek, sealing.blob_purpose(**right))
    assert file_key.hex() == blob["file_key"]
    for name in names:
        wrong = sealing.blob_purpose(**{**right, name: vectors["refused"][name]})
        with pytest.raises(AgeError):
            sealing.unseal(header, key.key_id, key.kek, wrong)
    other = derive(bytes(32), "file", "device-secret")
    with pytest.raises(AgeError):
        sealing.unseal(header, other.key_id, other.kek, sealing.blob_purpose(**right))


def test_the_payload_is_what_age_says(vectors: dict[str, Any]) -> None:
    blob = vectors["blob"]
    data = blob["text"].encode() * blob["times"]
    payload = b"".join(stream.encrypt(bytes.fromhex(blob["file_key"]), bytes.fromhex(blob["nonce"]), [data]))
    assert hashlib.sha256(payload).hexdigest() == blob["reference"]["payload"]
    assert (payload[:64].hex(), payload[-64:].hex()) == (blob["payload_start"], blob["payload_end"])
    assert len(payload) == blob["reference"]["payload_size"] == stream.payload_size(len(data))


def test_the_generation_opens_under_its_number_only(vectors: dict[str, Any]) -> None:
    data, key = bytes.fromhex(vectors["catalog"]["file"]), secret()
    header = age.parse_header(data)
    purpose = sealing.catalog_purpose(vectors["catalog"]["generation"])
    file_key = sealing.unseal(header, key.key_id, key.kek, purpose)
    plain_text = b"".join(stream.decrypt(file_key, io.BytesIO(data[header.length :]).read))
    assert json.loads(encode(decode(plain_text)).data) == vectors["catalog"]["document"]
    with pytest.raises(AgeError):
        sealing.unseal(header, key.key_id, key.kek, sealing.catalog_purpose(vectors["refused"]["generation"]))


def test_a_store_laid_out_from_the_vectors_opens(vectors: dict[str, Any], tmp_path: Path) -> None:
    blob, catalog = vectors["blob"], vectors["catalog"]
    ref = BlobRef.model_validate(blob["reference"])
    data = blob["text"].encode() * blob["times"]
    payload = b"".join(stream.encrypt(bytes.fromhex(blob["file_key"]), bytes.fromhex(blob["nonce"]), [data]))
    files = {
        "keys/device-secret": SECRET,
        f"store/blobs/{ref.payload}": payload,
        f"store/blobs/{ref.header}": blob["header"].encode(),
        f"store/catalog/{catalog['generation']:012d}.age": bytes.fromhex(catalog["file"]),
        "store/CURRENT": catalog["current"].encode(),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    with Store(tmp_path / "store", DeviceKeys(tmp_path / "keys"), MIB) as store:
        assert store.notes == () and store.verify().damaged == ()
        assert plain(store, ref) == data


if __name__ == "__main__":
    PATH.write_text(json.dumps(make(), indent=1) + "\n")
