"""Whether a model still answers as its golden set says: the golden set again, on whatever answers now."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from agent.base.clock import SystemClock
from agent.base.errors import TryLaterError
from agent.operations.drift import MOST_EXAMPLES, recheck
from agent.operations.install import AddRequest, Installer, Serving
from agent.operations.measured import Choice
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from tests import onnx_models
from tests.core.test_daemon import bundle

WEIGHTS = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


class Device:
    """A store with one model, installed with a golden set of 64 examples or without one."""

    def __init__(self, store: Store, folder: Path, *, golden: bool = True, measured: float | None = 0.97) -> None:
        data = onnx_models.linear(0)
        path = bundle(folder / "m.edgemodel", {"fp32": ("fp32", data)}, golden_from=data if golden else None)
        figures = {"fp32": {"agreement": measured}} if measured is not None else {}
        serving = Serving(lambda document: None, lambda name, version: None)
        installer = Installer(store, lambda *_: Choice("fp32", {}, measurements=figures), serving, SystemClock())
        with path.open("rb") as stream:
            installer.add(os.dup(stream.fileno()), AddRequest(file_name=path.name), lambda event: None)
        self._store = store
        self.asked: list[np.ndarray] = []
        self.answer = lambda x: x @ WEIGHTS

    def recheck(self):
        entry = self._store.document.models["m"].versions["1.0.0"]
        return recheck(entry, self._store.read, self._ask)

    def _ask(self, arrays):
        self.asked.append(arrays["x"])
        return {"y": self.answer(arrays["x"])}


@pytest.fixture
def store():
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder)
        with Store(path / "store", DeviceKeys(path / "keys"), 64 << 20) as opened:
            yield opened


def test_the_same_answers_are_good(store, tmp_path):
    device = Device(store, tmp_path)
    found = device.recheck()
    assert (found.metric, found.value, found.before, found.ok) == ("top1", 1.0, 0.97, True)
    assert len(device.asked) == MOST_EXAMPLES
    assert {x.shape for x in device.asked} == {(1, 16)}


def test_other_answers_are_told(store, tmp_path):
    device = Device(store, tmp_path)
    device.answer = lambda x: -(x @ WEIGHTS)
    found = device.recheck()
    assert found.ok is False
    assert found.value < 0.5


def test_answers_that_are_no_numbers_are_not_good(store, tmp_path):
    device = Device(store, tmp_path)
    device.answer = lambda x: np.full((1, 4), np.nan, np.float32)
    assert device.recheck().ok is False


def test_without_a_golden_set_nothing_is_asked(store, tmp_path):
    device = Device(store, tmp_path, golden=False)
    assert device.recheck() is None
    assert device.asked == []


def test_what_was_never_measured_has_no_before(store, tmp_path):
    assert Device(store, tmp_path, measured=None).recheck().before is None


def test_an_error_of_whoever_answers_is_passed_on(store, tmp_path):
    device = Device(store, tmp_path)

    def ask(x):
        raise TryLaterError("cannot run: busy")

    device.answer = ask
    with pytest.raises(TryLaterError):
        device.recheck()


def test_the_examples_are_those_of_the_golden_set(store, tmp_path):
    device = Device(store, tmp_path)
    device.recheck()
    expected = np.random.default_rng(7).standard_normal((64, 16)).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(device.asked), expected[:MOST_EXAMPLES])
