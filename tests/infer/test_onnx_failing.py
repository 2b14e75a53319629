"""ONNX Runtime when a provider fails in the middle of its work, and what its long messages become."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
import pytest

from agent.base.errors import PeerError, TryLaterError
from agent.infer.runtimes.base import LoadOptions, load_runtime
from agent.infer.runtimes.failures import one_line
from tests import onnx_models

X = np.ones((1, 16), dtype=np.float32)


@pytest.fixture
def loaded(tmp_path):
    """A session, and the descriptor that it was loaded from, closed."""
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_models.linear())
    descriptor = os.open(path, os.O_RDONLY)
    session = load_runtime("onnx").load(descriptor, LoadOptions("CPUExecutionProvider"))
    os.close(descriptor)
    yield session, descriptor
    session.close()


class Broken:
    """The inner session of a provider whose device is gone: runs fail as ONNX Runtime says it then."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def run(self, *_):
        raise onnxruntime.capi.onnxruntime_pybind11_state.EPFail("the device is lost")


def test_a_provider_that_fails_in_a_run_is_not_replaced_behind_our_back(capfd, loaded, tmp_path):
    session, descriptor = loaded
    other = tmp_path / "other.onnx"
    other.write_bytes(onnx_models.linear(seed=9))
    taken = os.open(other, os.O_RDONLY)
    try:
        assert taken == descriptor  # the same number, another model: the fallback would load that one
        session._session._sess = Broken(session._session._sess)
        for _ in range(2):
            with pytest.raises(TryLaterError, match="CPUExecutionProvider failed: the device is lost"):
                session.run({"x": X}, ["y"])
    finally:
        os.close(taken)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_input_is_still_the_callers_fault(loaded):
    session, _ = loaded
    with pytest.raises(PeerError):
        session.run({"x": X[:, :3]}, ["y"])


@pytest.mark.parametrize("length", [1, 299, 300, 301, 5000])
def test_a_long_message_keeps_its_beginning_and_its_end(length):
    text = ("what was done " + "x" * 5000)[: length // 2] + ("y" * 5000 + " the cause")[-(length - length // 2) :]
    line = one_line(RuntimeError(text))
    assert len(line) <= 300
    assert (line == " ".join(text.split())) == (length <= 300)
    if length > 300:
        assert line.startswith("what was done")
        assert line.endswith("the cause")
    assert one_line(RuntimeError("a\x1b[1m\n b")) == "a?[1m b"
    assert one_line(RuntimeError()) == "RuntimeError"
