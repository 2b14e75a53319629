"""Any order of operations, restarts and attacks on the disk, against a plain dictionary."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from agent.base.errors import DamagedError, NotFoundError, TryLaterError
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from tests.store.conftest import MIB, plain, with_version, without_model

MODELS = st.sampled_from(["digits", "faces"])
VERSIONS = st.sampled_from(["1.0.0", "2.0.0", "2.1.0-rc.1"])
CONTENTS = st.one_of(st.binary(max_size=40), st.sampled_from([b"x" * 65536, b"y" * 65537, b"z" * 200_000]))


class StoreMachine(RuleBasedStateMachine):
    pending = Bundle("pending")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.store = self.opened()
        self.installed: dict[tuple[str, str], bytes] = {}
        self.damaged: set[tuple[str, str]] = set()
        self.waiting: dict[str, bytes] = {}
        # Each run leaves some rules out altogether: without these, most would have nothing to work on.
        for model in ("digits", "faces"):
            self.put(model, "1.0.0", model.encode() * 20_000)

    def opened(self) -> Store:
        return Store(self.folder / "store", DeviceKeys(self.folder / "keys"), 64 * MIB).open()

    @rule(target=pending, model=MODELS, version=VERSIONS, content=CONTENTS)
    def add(self, model, version, content):
        ref = self.store.add_blob(model, version, "m.onnx", [content], len(content))
        self.waiting[ref.payload] = content
        return ref

    @rule(ref=consumes(pending))
    def install(self, ref):
        if ref.payload not in self.waiting:
            return  # a restart came between
        content = self.waiting.pop(ref.payload)
        self.store.commit(with_version(ref.model, ref.version, {"m.onnx": content}, [ref]))
        self.installed[ref.model, ref.version] = content
        self.damaged.discard((ref.model, ref.version))

    @rule(model=MODELS, version=VERSIONS, content=CONTENTS)
    def put(self, model, version, content):
        ref = self.store.add_blob(model, version, "m.onnx", [content], len(content))
        self.store.commit(with_version(model, version, {"m.onnx": content}, [ref]))
        self.installed[model, version] = content
        self.damaged.discard((model, version))

    @rule(ref=consumes(pending))
    def discard(self, ref):
        self.store.discard([ref])
        self.waiting.pop(ref.payload, None)

    @precondition(lambda self: len({model for model, _ in self.installed}) == 2)
    @rule(model=MODELS)
    def remove(self, model):
        self.store.commit(without_model(model))
        self.installed = {key: value for key, value in self.installed.items() if key[0] != model}
        self.damaged = {key for key in self.damaged if key[0] != model}

    @rule()
    def collect(self):
        self.store.gc()
        assert self.store.stats().unreached_bytes == 0

    @rule()
    def rotate(self):
        before = self.store.secret.key_id
        try:
            self.store.rotate_key()
            assert self.store.secret.key_id != before and not self.waiting
        except TryLaterError:
            assert self.waiting

    @rule()
    def restart(self):
        self.store.close()
        self.waiting.clear()
        self.store = self.opened()
        assert self.store.notes == ()

    @rule(
        place=st.floats(0, 1, exclude_max=True),
        which=st.sampled_from(["payload", "header"]),
        how=st.sampled_from(["flip", "cut", "grow", "delete", "another's"]),
        pick=st.integers(0, 100),
    )
    def damage(self, place, which, how, pick):
        """One file of one blob, for good."""
        whole = sorted(set(self.installed) - self.damaged)
        if not whole:
            return
        model, version = whole[pick % len(whole)]
        ref = self.store.document.find(model, version, "m.onnx")
        path = self.store.root / "blobs" / getattr(ref, which)
        data = path.read_bytes()
        at = int(place * len(data))
        if how == "delete":
            path.unlink()
        elif how == "another's":
            # The newest other one, of the same kind: authentic, and not this blob's.
            others = [other for other in self.store.document.refs() if getattr(other, which) != path.name]
            another = self.store.root / "blobs" / getattr(others[-1], which) if others else None
            path.write_bytes(another.read_bytes() if another is not None and another.exists() else b"")
        else:
            flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
            path.write_bytes({"flip": flipped, "cut": data[:at], "grow": data + b"x"}[how])
        if path.exists() and path.read_bytes() == data:
            return
        self.damaged.add((model, version))

    @rule()
    def verify(self):
        found = {(blob.ref.model, blob.ref.version) for blob in self.store.verify().damaged}
        assert found == self.damaged
        marked = {
            (name, version)
            for name, model in self.store.document.models.items()
            for version, entry in model.versions.items()
            if entry.damaged
        }
        assert marked == self.damaged

    @rule(ref=pending)
    def read_pending(self, ref):
        if ref.payload in self.waiting:
            assert plain(self.store, ref) == self.waiting[ref.payload]
        elif self.store.document.find(ref.model, ref.version, ref.part) is None:
            try:
                self.store.read(ref).close()
                raise AssertionError("a blob that is gone was read")
            except NotFoundError:
                pass

    @invariant()
    def what_is_installed_is_there(self):
        document = self.store.document
        assert {(ref.model, ref.version) for ref in document.refs()} == set(self.installed)
        for (model, version), content in self.installed.items():
            ref = document.find(model, version, "m.onnx")
            if (model, version) not in self.damaged:
                assert plain(self.store, ref) == content
                continue
            try:
                self.store.read(ref).close()
                raise AssertionError("damage was not noticed")
            except DamagedError:
                pass

    @invariant()
    def nothing_lies_around(self):
        names = [path.name for path in (self.store.root / "blobs").iterdir()]
        assert not [name for name in names if name.startswith(".tmp-")]
        assert len(list((self.store.root / "catalog").iterdir())) <= 2

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
