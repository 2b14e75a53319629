"""A small variant answers, and what it is unsure of goes to the next: the measures, and real sessions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agent.base.errors import PeerError
from agent.bundles.manifest import TensorSpec
from agent.infer.cascade import Cascade, confidences, splits
from agent.infer.steering import Pressure
from agent.infer.tensors import RequestedOutput
from tests import onnx_models
from tests.infer.test_engine import Blob, answer, ask, option, served, shelf
from tests.infer.test_loading import drive

MEASURES = ("max_softmax", "margin", "entropy")


@pytest.mark.parametrize("measure", MEASURES)
def test_one_class_above_all_is_sure_and_all_alike_is_not(measure):
    sure = confidences(np.array([[50.0, 0, 0, 0], [1.0, 1, 1, 1]]), measure)
    assert sure[0] == pytest.approx(1.0)
    assert sure[1] == pytest.approx(0.25 if measure == "max_softmax" else 0.0)


def test_probabilities_are_taken_as_they_are():
    scores = np.array([[0.7, 0.2, 0.1]], np.float32)
    assert confidences(scores, "max_softmax")[0] == pytest.approx(0.7, abs=1e-6)
    assert confidences(scores, "margin")[0] == pytest.approx(0.5, abs=1e-6)


def test_an_example_is_as_sure_as_its_least_sure_row():
    scores = np.zeros((2, 3, 4))
    scores[0, :, 0] = 50
    scores[1, :2, 0] = 50
    assert confidences(scores, "max_softmax").tolist() == pytest.approx([1.0, 0.25])


def test_what_is_not_finite_is_not_sure_and_a_vector_is_one_example():
    assert confidences(np.array([[np.nan, 50.0], [np.inf, 0.0]]), "margin").tolist() == [0.0, 0.0]
    assert confidences(np.array([50.0, 0.0]), "max_softmax") == pytest.approx([1.0])
    assert confidences(np.zeros((0, 4)), "entropy").tolist() == []
    assert confidences(np.zeros((2, 0)), "entropy").tolist() == [0.0, 0.0]


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)),
    st.sampled_from(MEASURES),
)
def test_whatever_comes_confidence_is_between_0_and_1(scores, measure):
    sure = confidences(scores, measure)
    assert len(sure) == (scores.shape[0] if scores.ndim > 1 else 1)
    assert ((sure >= 0) & (sure <= 1)).all()


def test_a_batch_splits_where_every_first_axis_is_free():
    free, fixed, scalar = (TensorSpec(name="x", datatype="FP32", shape=shape) for shape in ((-1, 16), (1, 16), ()))
    assert splits([free], [free])
    assert not splits([free], [fixed])
    assert not splits([scalar], [free])


# -- the engine -------------------------------------------------------------------------------------------------------

SMALL = np.zeros((16, 4), np.float32)
SMALL[:4] = np.eye(4) * 20  # sure of what has one large value among the first four
LARGE = np.random.default_rng(5).standard_normal((16, 4)).astype(np.float32)


def linear(weights):
    return onnx_models.model(
        [onnx_models.helper.make_node("MatMul", ["x", "w"], ["y"])],
        [onnx_models.tensor("x", ["n", 16])],
        [onnx_models.tensor("y", ["n", 4])],
        [onnx_models.constant("w", weights)],
    )


def rows(*sure):
    """Examples of which the small variant is sure, or not."""
    x = np.zeros((len(sure), 16), np.float32)
    x[:, 8:] = np.random.default_rng(1).random((len(sure), 8))
    for index, is_sure in enumerate(sure):
        x[index, index % 4] = 1.0 if is_sure else 0.0
    return x


def expected(x, sure):
    return np.where(np.array(sure)[:, None], x @ SMALL, x @ LARGE)


def cascaded(threshold=0.8, by_row=True, **more):
    small = replace(option(Blob(linear(SMALL)), "small", 5.0, 1.0), p50_ms=1.0)
    large = replace(option(Blob(linear(LARGE)), "large", 20.0, 8.0), p50_ms=8.0)
    return served("m", large, small, **more), Cascade("small", "large", threshold, "y", "max_softmax", by_row)


def put(engine, threshold=0.8, by_row=True):
    version, cascade = cascaded(threshold, by_row)
    engine.put(shelf(replace(version, cascade=cascade)))
    return version


@pytest.mark.parametrize(
    ("sure", "stage", "escalated"),
    [((True,), "first", 0), ((False,), "then", 1), ((True, False, True, False), "both", 2), ((False,) * 3, "then", 3)],
)
def test_only_the_unsure_examples_go_on(sure, stage, escalated):
    async def story(engine):
        put(engine)
        x = rows(*sure)
        said = await answer(engine, "m", ask(x, id="9"))
        np.testing.assert_allclose(said.outputs[0].array, expected(x, sure), rtol=1e-4, atol=1e-5)
        told = said.parameters
        assert (told["cascade"], told["cascade_escalated"], told["cascade_rows"]) == (stage, escalated, len(sure))
        assert told["variant"] == told["requested_variant"] == ("small" if stage == "first" else "large")
        assert (said.id, told["degraded"]) == ("9", False)
        assert engine.memory()["loads"] == (1 if stage == "first" else 2)

    drive(story)


def test_where_examples_cannot_be_told_apart_the_whole_request_goes_on():
    async def story(engine):
        put(engine, by_row=False)
        x = rows(True, False)
        said = await answer(engine, "m", ask(x))
        np.testing.assert_allclose(said.outputs[0].array, x @ LARGE, rtol=1e-4, atol=1e-5)
        assert (said.parameters["cascade"], said.parameters["cascade_rows"]) == ("then", 1)

    drive(story)


def test_sure_answers_save_time_and_unsure_ones_cost_some():
    async def story(engine):
        put(engine)
        saved = (await answer(engine, "m", ask(rows(True)))).parameters["cascade_saved_us"]
        assert 0 < saved <= 8000
        put(engine, threshold=1.0)
        for _ in range(40):  # what the large one really takes is known by then
            cost = (await answer(engine, "m", ask(rows(False)))).parameters["cascade_saved_us"]
        assert cost < saved

    drive(story)


def test_wishes_go_past_the_cascade_and_outputs_are_those_that_were_asked_for():
    async def story(engine):
        put(engine)
        x = rows(True)
        said = await answer(engine, "m", ask(x, parameters={"variant": "large"}))
        np.testing.assert_allclose(said.outputs[0].array, x @ LARGE, rtol=1e-4, atol=1e-5)
        assert "cascade" not in said.parameters
        named = await answer(engine, "m", ask(x, outputs=(RequestedOutput("y"),)))
        assert [tensor.name for tensor in named.outputs] == ["y"]
        with pytest.raises(PeerError, match="shape"):
            await answer(engine, "m", ask(x.reshape(2, 8)))

    drive(story)


def test_under_pressure_the_first_answer_stands_and_says_so():
    async def story(engine):
        put(engine)
        engine.steer(Pressure(compute=1, reason="governor: heat"))
        x = rows(False)
        said = await answer(engine, "m", ask(x))
        np.testing.assert_allclose(said.outputs[0].array, x @ SMALL, rtol=1e-4, atol=1e-5)
        told = said.parameters
        assert (told["cascade"], told["degraded"], told["degraded_because"]) == ("first", True, "governor: heat")
        assert (await answer(engine, "m", ask(rows(True)))).parameters["degraded"] is False

    drive(story)


def test_a_first_variant_that_cannot_be_had_leaves_the_answers_to_the_other():
    async def story(engine):
        version, cascade = cascaded()
        spoiled = option(Blob(b"", broken=True), "small", 5.0, 1.0)
        engine.put(shelf(replace(version, options=(version.options[0], spoiled), cascade=cascade)))
        x = rows(False)
        said = await answer(engine, "m", ask(x))
        np.testing.assert_allclose(said.outputs[0].array, x @ LARGE, rtol=1e-4, atol=1e-5)
        assert said.parameters["degraded"] is True
        assert "not authentic" in said.parameters["degraded_because"]

    drive(story)
