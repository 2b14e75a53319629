"""A day in the life of a store, one operation after the other, with the state that each leaves.

Used by the tests that cut it off: whatever instant the cut falls on, the folder must hold the state after the last
operation that was reported, or after the one under way.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.store.document import CatalogDocument
from agent.store.keys import FILE_NEXT, DeviceKeys
from agent.store.store import Store
from tests.store.conftest import MIB, install, plain, without_model

#: (model, version, part) to the SHA-256 of its content.
State = dict[tuple[str, str, str], str]
Operation = Callable[[Store], object]


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def operations(size: int) -> Iterator[Operation]:
    """Install, replace, rotate, remove, collect, rotate: every change that a store knows."""
    yield lambda store: install(store, "digits", "1.0.0", {"a.onnx": content(1, size), "b.onnx": content(2, 10)})
    yield lambda store: install(store, "digits", "2.0.0", {"a.onnx": content(3, size)})
    yield lambda store: store.rotate_key()
    yield lambda store: install(store, "faces", "1.0.0", {"c.onnx": content(4, 100)})
    yield lambda store: store.commit(without_model("digits"))
    yield lambda store: store.gc()
    yield lambda store: store.rotate_key()


def states(size: int) -> list[State]:
    """The state before the first operation, and after each."""
    one = {("digits", "1.0.0", "a.onnx"): content(1, size), ("digits", "1.0.0", "b.onnx"): content(2, 10)}
    two = one | {("digits", "2.0.0", "a.onnx"): content(3, size)}
    faces = {("faces", "1.0.0", "c.onnx"): content(4, 100)}
    history = [{}, one, two, two, two | faces, faces, faces, faces]
    return [{key: hashlib.sha256(data).hexdigest() for key, data in state.items()} for state in history]


def opened(folder: Path, step: Callable[[str], None] = lambda _: None) -> Store:
    keys = DeviceKeys(folder / "keys", step=step)
    return Store(folder / "store", keys, 256 * MIB, step=step).open()


def listed(document: CatalogDocument) -> State:
    return {(ref.model, ref.version, ref.part): ref.sha256 for ref in document.refs()}


def require_sound(folder: Path, allowed: list[State], where: str) -> None:
    """The store opens, says nothing odd, verifies clean, holds one of the states allowed, and goes on working."""
    with opened(folder) as store:
        assert store.notes == (), f"{where}: {store.notes}"
        assert listed(store.document) in allowed, f"{where}: {listed(store.document)}"
        assert store.verify().damaged == (), where
        pending = store.rotation_pending
        assert pending == (folder / "keys" / FILE_NEXT).exists()
        if pending:
            store.rotate_key()
        store.gc()
        for ref in store.document.refs():
            assert hashlib.sha256(plain(store, ref)).hexdigest() == ref.sha256, where
        stats = store.stats()
        assert (stats.unreached_bytes, stats.damaged, store.rotation_pending) == (0, 0, False), where
        assert {finding.code for finding in store.doctor()} <= {"key-weak", "disk-slow"}, where
    leftovers = [path for path in folder.rglob(".tmp-*") if path.is_file()]
    assert leftovers == [], where
