"""What the threads of ONNX Runtime do between two operators, and between two requests."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from agent.infer.runtimes.base import LoadOptions
from agent.infer.runtimes.onnx import CPU_PROVIDER, OnnxRuntime, spinning
from tests import onnx_models


@pytest.mark.parametrize(
    ("version", "briefly"),
    [("1.18.1", False), ("1.25.9", False), ("1.26.0", True), ("2.0.0.dev20270101+cu13", True), ("mine", False)],
)
def test_only_a_release_that_can_be_told_for_how_long_spins_at_all(version, briefly):
    entries = spinning(version)
    assert entries["session.intra_op.allow_spinning"] == ("1" if briefly else "0")
    assert ("session.intra_op.spin_duration_us" in entries) is briefly


def at_rest(session, seconds):
    """The share of one core that the process takes between two requests."""
    x = {"x": np.ones((64, 512), np.float32)}
    session.run(x, ["y"])
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a second thread needs a second core")
def test_threads_sleep_between_two_requests():
    """ONNX Runtime's own default would have a thread look out for work through all of this pause."""
    runtime = OnnxRuntime()
    descriptor = os.memfd_create("model")
    os.write(descriptor, onnx_models.heavy())
    try:
        session = runtime.load(descriptor, LoadOptions(CPU_PROVIDER, 2))
        assert min(at_rest(session, 0.02) for _ in range(5)) < 0.3
        session.close()
    finally:
        os.close(descriptor)
