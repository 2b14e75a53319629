"""A store in a folder of its own, with a small model in it. Real keys, real files, real memory."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.bundles.manifest import Manifest
from agent.store.document import BlobRef, CatalogDocument, ModelEntry, VersionEntry
from agent.store.keys import DeviceKeys
from agent.store.store import Store

MIB = 1 << 20


def manifest(name: str, version: str, files: dict[str, bytes]) -> Manifest:
    """A manifest with one variant a file."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1]}
    variants = [
        {
            "id": file.split(".")[0],
            "runtime": "onnx",
            "precision": "fp32",
            "file": {"name": file, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)},
        }
        for file, data in files.items()
    ]
    return Manifest.model_validate(
        {"format": "edge-model/1", "name": name, "version": version, "inputs": [tensor], "outputs": [tensor]}
        | {"variants": variants}
    )


def with_version(
    name: str, version: str, files: dict[str, bytes], refs: list[BlobRef]
) -> Callable[[CatalogDocument], CatalogDocument]:
    """The change that installs a version and makes it answer."""
    entry = VersionEntry(
        manifest=manifest(name, version, files),
        origin="unsigned",
        added_at="2026-01-01T00:00:00Z",
        blobs={ref.part: ref for ref in refs},
    )

    def change(document: CatalogDocument) -> CatalogDocument:
        model = document.models.get(name, ModelEntry())
        renewed = ModelEntry(active=version, previous=model.active, versions={**model.versions, version: entry})
        return document.model_copy(update={"models": {**document.models, name: renewed}})

    return change


def without_model(name: str) -> Callable[[CatalogDocument], CatalogDocument]:
    """The change that removes a model."""

    def change(document: CatalogDocument) -> CatalogDocument:
        models = {key: model for key, model in document.models.items() if key != name}
        return document.model_copy(update={"models": models})

    return change


def install(store: Store, name: str, version: str, files: dict[str, bytes]) -> list[BlobRef]:
    """Add the files and commit them, as the core does."""
    refs = [store.add_blob(name, version, file, [data], len(data)) for file, data in files.items()]
    store.commit(with_version(name, version, files, refs))
    return refs


def plain(store: Store, ref: BlobRef) -> bytes:
    """What a blob decrypts to."""
    with store.read(ref) as plaintext:
        return plaintext.read_bytes(1 << 30)


def reopened(store: Store) -> Store:
    """The same folder in a new store."""
    store.close()
    return Store(store.root, DeviceKeys(store.root.parent / "keys"), store.quota_bytes).open()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory where there is one: the tests that kill need no real disk, and its flushes would rule them."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="edge-agent-test-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture
def store(memory_path: Path) -> Iterator[Store]:
    with Store(memory_path / "store", DeviceKeys(memory_path / "keys"), 256 * MIB).open() as opened:
        yield opened
