"""The pure parts of choosing: who is tried first, and whether a loaded model is the one that the manifest describes."""

from __future__ import annotations

import pytest

from agent.bundles.manifest import Manifest
from agent.operations.choosing import _order, departure, spread
from agent.selection.choice import choose
from agent.selection.measurements import Measurement, measurement_key
from agent.selection.prior import Prior
from agent.selection.rules import Candidate


def prior(variant, provider, score):
    return Prior(Candidate(variant, "onnx", provider, "fp32"), score, "")


def test_every_variant_gets_a_turn_before_one_takes_all_places():
    ranked = [
        prior("int8", "CUDA", 4), prior("int8", "CPU", 3), prior("fp16", "CUDA", 2),
        prior("fp32", "CPU", 1), prior("fp16", "CPU", 0.5),
    ]  # fmt: skip
    assert [candidate.id for candidate in spread(ranked)] == [
        "int8@CUDA", "fp16@CUDA", "fp32@CPU", "int8@CPU", "fp16@CPU",
    ]  # fmt: skip


def test_only_who_was_tried_and_right_may_answer_when_the_winner_fails():
    def measured(candidate, ms):
        key = measurement_key(
            variant_digest=candidate, runtime="onnx", runtime_version="1", provider="CPU", threads=1, features={}
        )
        return Measurement.from_samples(candidate, key, "s", [[ms] * 5] * 12)

    bad = Measurement.rejected("bad@CPU", measured("bad@CPU", 1.0).key, "crash", "crashed")
    ranked = [prior(name, "CPU", 1) for name in ("untried", "slow", "bad", "fast")]
    seen = choose(manifest().policy, [measured("slow@CPU", 9.0), measured("fast@CPU", 1.0), bad], ranked)
    assert _order(seen) == ["fast@CPU", "slow@CPU"]


def manifest(shape=(-1, 16), datatype="FP32", *, optional=False):
    return Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": "m",
            "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": datatype, "shape": list(shape), "optional": optional}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            "variants": [
                {"id": "v", "runtime": "onnx", "precision": "fp32",
                 "file": {"name": "v.onnx", "sha256": "0" * 64, "size": 1}}
            ],
        }
    )  # fmt: skip


def spec(name="x", datatype="FP32", shape=(-1, 16), **more):
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


Y = spec("y", shape=(-1, 4))


@pytest.mark.parametrize(
    ("said", "inputs", "outputs", "text"),
    [
        (manifest(), [spec()], [Y], ""),
        (manifest((1, 16)), [spec()], [Y], ""),  # the file takes more than the manifest promises
        (manifest(), [spec(), spec("extra", optional=True)], [Y, spec("more")], ""),
        (manifest(), [spec(shape=(-1,), any_rank=True)], [Y], ""),
        (manifest(), [spec("z")], [Y], "input 'x' of the manifest is not in the file"),
        (manifest(), [spec(), spec("extra")], [Y], "input 'extra' of the file is not in the manifest"),
        (manifest(), [spec(datatype="FP16")], [Y], "input 'x' is FP16 in the file, FP32 in the manifest"),
        (manifest(), [spec(shape=(1, 16))], [Y], r"input 'x' is [1, 16] in the file, [-1, 16] in the manifest"),
        (manifest(), [spec(shape=(-1, 8))], [Y], r"input 'x' is [-1, 8] in the file, [-1, 16] in the manifest"),
        (manifest(), [spec(shape=(-1, 16, 1))], [Y], r"input 'x' is [-1, 16, 1] in the file"),
        (manifest(), [spec()], [spec("other")], "output 'y' of the manifest is not in the file"),
    ],
)
def test_a_file_that_is_not_what_the_manifest_says_is_found_out(said, inputs, outputs, text):
    found = departure(said, inputs, outputs)
    assert found.startswith(text)
    assert bool(found) == bool(text)
