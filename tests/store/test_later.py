"""A store that a later release of the agent has written to, and one that another process has open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.base.errors import DamagedError, PeerError
from agent.store.document import CatalogDocument, decode, encode
from agent.store.glimpse import Glimpse
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from tests.store.conftest import install


def later(store: Store, **more: Any) -> bytes:
    """The catalog as a release to come writes it: with more than this one knows."""
    document = json.loads(encode(store.document).data)
    document |= {"orbit": {"height": 400}, **more}
    document["models"]["digits"]["colour"] = "red"
    version = document["models"]["digits"]["versions"]["1.0.0"]
    version["weather"] = [1, 2]
    version["manifest"]["aura"] = "none"
    return json.dumps(document).encode()


def test_what_a_later_release_only_added_is_passed_over_where_it_says_so(store: Store) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    assert decode(later(store, readable_from=1)) == store.document


@pytest.mark.parametrize("said", [None, 2, 0, "1", True, 1.0])
def test_where_it_does_not_say_so_nothing_is_dropped(store: Store, said: Any) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    with pytest.raises(PeerError, match="cannot use catalog"):
        decode(later(store, **({} if said is None else {"readable_from": said})))


@pytest.mark.parametrize("wrong", [{"generation": -1}, {"saved_at": []}, {"format": "edge-catalog/2"}])
def test_what_is_wrong_otherwise_is_refused_all_the_same(store: Store, wrong: dict[str, Any]) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    with pytest.raises(PeerError):
        decode(later(store, readable_from=1, **wrong))


def test_a_look_into_a_store_that_is_open_changes_nothing(store: Store) -> None:
    install(store, "digits", "1.0.0", {"m.onnx": b"one"})
    ref = store.document.models["digits"].versions["1.0.0"].blobs["m.onnx"]
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    glimpse = Glimpse(store.root, DeviceKeys(keys_of(store), None))
    assert glimpse.document == store.document
    with glimpse.read(ref) as plaintext:
        assert plaintext.read_bytes(10) == b"one"
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before
    install(store, "digits", "2.0.0", {"m.onnx": b"two"})  # it goes on
    (store.root / "blobs" / ref.payload).unlink()
    with pytest.raises(DamagedError, match="cannot read digits"):
        glimpse.read(ref)


def keys_of(store: Store) -> Path:
    return store.root.parent / "keys"


def test_an_empty_document_is_what_it_was() -> None:
    assert decode(encode(CatalogDocument()).data) == CatalogDocument()
