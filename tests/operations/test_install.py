"""Adding a version: one commit or none, whatever ends it on the way. The store is real, trial and engine are not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from agent.base.clock import SystemClock
from agent.base.errors import DamagedError, PeerError, TryLaterError, UnsupportedError
from agent.operations.install import AddRequest, Installer, Serving
from agent.operations.measured import Choice
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from tests import onnx_models


class Device:
    """An installer whose choice falls on the first variant, and what its serving side was shown and asked to load."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.shown: list[dict] = []
        self.loads: list[tuple[str, str, dict]] = []
        self.chosen: str | None = "fp32@CPUExecutionProvider"
        self.load_error: Exception | None = None
        self.installer = Installer(store, self.choose, Serving(self.show, self.load), SystemClock())

    def choose(self, manifest, blobs, known, shapes, progress):
        progress({"stage": "try", "candidate": "fp32"})
        return Choice(self.chosen, {"order": [self.chosen], "explain": {}}, why="nothing runs here", hint="")

    def show(self, document):
        self.shown.append(states(document))

    def load(self, name, version):
        self.loads.append((name, version, states(self.store.document)))
        if self.load_error is not None:
            raise self.load_error

    def add(self, path: Path, progress=lambda event: None):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return self.installer.add(descriptor, AddRequest(file_name=path.name), progress)
        finally:
            os.close(descriptor)

    def waste(self):
        stats = self.store.stats()
        return stats.used_bytes if not stats.blobs else stats.unreached_bytes


def states(document):
    """Active version and versions by model."""
    return {name: (model.active, sorted(model.versions)) for name, model in document.models.items()}


@pytest.fixture
def device():
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder)
        with Store(path / "store", DeviceKeys(path / "keys"), 64 << 20) as store:
            yield Device(store)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_models.linear())
    return path


def test_a_version_is_installed_and_made_active_in_one_commit_after_it_was_loaded(device, model):
    before = device.store.document.generation
    assert device.add(model)["chosen"] == "fp32@CPUExecutionProvider"
    assert device.store.document.generation == before + 1
    ((name, version, committed),) = device.loads
    assert committed == {}  # nothing was, while it loaded
    assert states(device.store.document) == {name: (version, [version])}
    # The serving side saw it beside what is committed, not active; then what is committed.
    assert device.shown == [{name: (None, [version])}, {name: (version, [version])}]


def test_a_version_that_cannot_be_loaded_is_not_there_afterwards(device, model):
    device.load_error = DamagedError("no variant can answer")
    with pytest.raises(DamagedError):
        device.add(model)
    assert states(device.store.document) == {}
    assert device.shown[-1] == {}
    assert device.waste() == 0


def test_a_version_of_which_nothing_was_chosen_is_not_there_afterwards(device, model):
    device.chosen = None
    with pytest.raises(UnsupportedError, match="nothing runs here"):
        device.add(model)
    assert states(device.store.document) == {}
    assert device.waste() == 0


@pytest.mark.parametrize("stage", ["encrypt", "try", "load"])
def test_a_stop_at_any_stage_leaves_nothing(device, model, stage):
    def progress(event):
        if event["stage"] == stage:
            raise TryLaterError("the agent is stopping")

    with pytest.raises(TryLaterError):
        device.add(model, progress)
    assert states(device.store.document) == {}
    assert device.waste() == 0
    assert (device.shown or [{}])[-1] == {}
    assert device.add(model)["unchanged"] is False


def test_what_was_active_stays_so_until_the_next_has_loaded_and_is_the_previous_one_then(device, model, tmp_path):
    first = device.add(model)
    other = tmp_path / "next.onnx"
    other.write_bytes(onnx_models.linear(5))
    descriptor = os.open(other, os.O_RDONLY)
    second = device.installer.add(descriptor, AddRequest(name=first["model"]), lambda event: None)
    os.close(descriptor)
    if second["version"] == first["version"]:
        pytest.fail("two contents have one version")
    assert device.loads[-1][2] == {first["model"]: (first["version"], [first["version"]])}
    held = device.store.document.models[first["model"]]
    assert (held.active, held.previous) == (second["version"], first["version"])


def test_neither_file_nor_pipe_is_refused(device):
    reading = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(PeerError, match="neither a file nor a pipe"):
            device.installer.add(reading, AddRequest(), lambda event: None)
    finally:
        os.close(reading)
