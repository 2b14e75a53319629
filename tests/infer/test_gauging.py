"""What joining requests gains, found in a confined child with the real runtime; and what may not be joined."""

from __future__ import annotations

import io

import numpy as np
import pytest
from onnx import helper

from agent.base.clock import SystemClock
from agent.bundles.manifest import TensorSpec
from agent.infer.gains import decide, not_free
from agent.infer.gauging import gauged
from agent.infer.landlock import abi_version
from agent.infer.runtimes.base import LoadOptions, load_runtime
from agent.infer.trial import Surroundings
from agent.store.memory import hold
from tests import onnx_models, tflite_models
from tests.infer.test_joining import one_more
from tests.infer.test_preparing import CPU, entrant, os_file, plan
from tests.infer.test_tflite import PACKAGES

pytestmark = pytest.mark.skipif(abi_version() == 0, reason="without Landlock nothing is tried")


def gauge(data, size=8, runtime="onnx", provider=CPU, **changes):
    return gauged(entrant(data, runtime, provider), plan(**changes), Surroundings(SystemClock()), size, seconds=0.3)


def golden(data, shift=0.0, count=5):
    """Inputs with the answers that the model gives to one row at a time."""
    session = load_runtime("onnx").load(os_file(data), LoadOptions(CPU))
    x = np.random.default_rng(5).standard_normal((count, session.inputs[0].shape[1])).astype(np.float32)
    y = np.concatenate([session.run({"x": x[i : i + 1]}, ["y"])[0] for i in range(count)]) + np.float32(shift)
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": x, "output/y": y})
    data = stream.getvalue()
    return {
        "open_golden": lambda: hold([memoryview(data)], len(data)),
        "metric": "max_abs",
        "passes": lambda v: v < 1e-3,
    }


def coupled(kind):
    """x[n, 16] -> y[n, 16], each row with something of all rows in it: their largest value, say."""
    return onnx_models.model(
        [
            helper.make_node(kind, ["x", "axis"] if kind == "ReduceSum" else ["x"], ["all"], keepdims=1,
                             **({} if kind == "ReduceSum" else {"axes": [0]})),
            helper.make_node("Sub", ["x", "all"], ["y"]),
        ],
        [onnx_models.tensor("x", ["n", 16])],
        [onnx_models.tensor("y", ["n", 16])],
        [onnx_models.constant("axis", np.array([0], np.int64))],
    )  # fmt: skip


def dynamic():
    """A product of a matrix as dynamic quantization makes it: one scale for all rows."""
    weights = np.random.default_rng(0).integers(-90, 90, (16, 4)).astype(np.int8)
    return onnx_models.model(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["q", "w", "zero"], ["whole"]),
            helper.make_node("Cast", ["whole"], ["real"], to=1),
            helper.make_node("Mul", ["real", "scale"], ["y"]),
        ],
        [onnx_models.tensor("x", ["n", 16])],
        [onnx_models.tensor("y", ["n", 4])],
        [onnx_models.constant("w", weights)],
    )


def test_a_batch_of_a_model_that_reads_many_weights_pays():
    gain = gauge(onnx_models.heavy(side=1024, layers=4), 16)
    assert gain.note == ""
    assert gain.row_bytes == 4096
    assert [rows for rows, _ in gain.times] == [1, 2, 4, 8, 16]
    assert decide(gain, 16, 0.001).size > 1


def test_a_batch_of_a_tiny_model_does_not():
    gain = gauge(onnx_models.linear())
    assert len(gain.times) == 4
    assert decide(gain, 8, 0.001).size == 1
    assert "does not pay" in decide(gain, 8, 0.001).reason


def test_the_golden_set_must_hold_for_batches_too():
    data = onnx_models.heavy(side=64, layers=2)
    assert gauge(data, **golden(data)).note == ""
    assert "disagree with the golden set: max_abs" in gauge(data, **golden(data, shift=1.0)).note


@pytest.mark.parametrize("data", [coupled("ReduceMax"), coupled("ReduceSum"), dynamic()], ids=["max", "sum", "dynamic"])
@pytest.mark.parametrize("with_golden", [True, False])
def test_rows_that_look_at_each_other_are_not_joined(data, with_golden):
    """Even where the golden set would bear it: the rows may be another app's."""
    more = golden(data) | {"passes": lambda value: True} if with_golden else {}
    assert gauge(data, **more).note == "the answer to a row depends on the rows beside it"


def test_answers_that_cannot_be_parted_are_not_joined():
    assert gauge(one_more()).note == "output 0 of 4 rows has the shape [5, 16]"


def test_what_dies_in_batches_is_answered_singly():
    assert "batches could not be tried" in gauge(onnx_models.greedy()).note


def spec(shape, **more):
    return TensorSpec(name="x", datatype="FP32", shape=shape, **more)


def test_which_signatures_have_a_free_first_axis():
    free = spec((-1, 3))
    assert not_free([free], [free]) == ""
    assert not_free([free, spec((3,), optional=True)], [free]) == ""
    assert not_free([spec((1, 3))], [free]) == "the first axis of input 'x' is fixed: 1"
    assert not_free([free], [spec(())]) == "output 'x' has no first axis to join along"
    assert not_free([spec((-1,), any_rank=True)], [free]) == "input 'x' has no first axis to join along"


@pytest.mark.skipif(not PACKAGES, reason="no TFLite package here")
def test_a_tflite_model_with_a_fixed_axis_is_not_joined_and_says_so():
    fixed = tflite_models.passing(tflite_models.FLOAT32, (4,), (4,))
    assert gauge(fixed, runtime="tflite", provider="cpu").note == "the first axis of input 'x' is fixed: 4"
    free = gauge(tflite_models.linear(), runtime="tflite", provider="cpu")
    assert free.note == ""
    assert len(free.times) == 4
