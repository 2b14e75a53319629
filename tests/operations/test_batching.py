"""What joining gains, in the catalog: until when it holds, and what becomes of it on the shelf."""

from __future__ import annotations

import pytest

from agent.base.config import BatchingConfig, ModelConfig
from agent.bundles.manifest import BatchingPolicy, Manifest
from agent.infer.gains import Gain
from agent.operations.batching import as_wanted, gain_record, gains_hold, shelved_batching
from agent.operations.shelving import Shelves
from agent.store.document import CatalogDocument, ModelEntry, VersionEntry

CANDIDATE = "fp32@CPUExecutionProvider"
POLICY = BatchingPolicy(max_size=8, max_delay_us=500)
MEASURED = {"key": {"runtime_version": "1.0", "method": 1}, "p95_ms": 1.0}
GAIN = Gain(((1, 0.001), (4, 0.0012), (8, 0.0015)), 64)


def entry(record=None, *, batching=POLICY, chosen=CANDIDATE, measured=MEASURED):
    spec = {"name": "x", "datatype": "FP32", "shape": [-1, 16]}
    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1", "name": "m", "version": "1.0.0", "inputs": [spec], "outputs": [spec],
            "variants": [{"id": "fp32", "runtime": "onnx", "precision": "fp32",
                          "file": {"name": "m.onnx", "sha256": "0" * 64, "size": 1}}],
            "batching": batching,
        }
    )  # fmt: skip
    choice = {"order": [CANDIDATE]} | ({"batching": {CANDIDATE: record}} if record else {})
    return VersionEntry(
        manifest=manifest, origin="unsigned", added_at="2026-01-01T00:00:00Z", blobs={}, chosen=chosen, choice=choice,
        measurements={CANDIDATE: measured} if measured else {},
    )  # fmt: skip


AS_SAID = as_wanted({})
RECORD = gain_record(MEASURED, POLICY, GAIN)


def holds(one):
    return gains_hold(one, AS_SAID)


def shelved(one, wish=AS_SAID):
    return shelved_batching(one, CANDIDATE, wish)


def test_what_was_measured_is_used():
    made = shelved(entry(RECORD))
    assert (made.size, made.delay_s, made.gain) == (8, 0.0005, GAIN)
    assert holds(entry(RECORD))


def test_a_catalog_of_before_is_opened_and_measured():
    assert not holds(entry())
    assert shelved(entry()).size == 1
    assert "not measured" in shelved(entry()).reason
    models = {"m": ModelEntry(active="1.0.0", versions={"1.0.0": entry()})}
    document = CatalogDocument(generation=1, saved_at="2026-01-01T00:00:00Z", models=models)
    assert Shelves(lambda ref: None, 1).shelf(document).versions["m", "1.0.0"].options == ()  # its file is not there


@pytest.mark.parametrize(
    "other",
    [
        entry(RECORD, measured={**MEASURED, "key": {"runtime_version": "1.1", "method": 1}}),
        entry(RECORD, measured=None),
        entry(RECORD, batching=BatchingPolicy(max_size=16, max_delay_us=500)),
        entry({**RECORD, "recipe": 0}),
    ],
    ids=["another-runtime", "never-measured", "more-rows", "another-recipe"],
)
def test_it_holds_as_long_as_the_measurement_and_as_far_as_it_went(other):
    assert not holds(other)
    assert shelved(other).size == 1


def test_fewer_rows_than_measured_need_no_new_measurement():
    fewer = entry(RECORD, batching=BatchingPolicy(max_size=4, max_delay_us=0))
    assert holds(fewer)
    assert shelved(fewer).size == 4


def test_a_model_that_may_not_be_joined_is_not_tried_again_for_more_rows():
    record = gain_record(MEASURED, POLICY, Gain(note="rows look at each other"))
    more = entry(record, batching=BatchingPolicy(max_size=64, max_delay_us=0))
    assert holds(more)
    assert shelved(more).reason == "rows look at each other"


def test_nobody_asks_nothing_is_measured():
    assert holds(entry(batching=None))
    assert shelved(entry(RECORD, batching=None)) is None
    assert holds(entry(chosen=None))
    assert shelved(entry(RECORD), as_wanted({"m": ModelConfig(batching=False)})) is None


def test_the_owner_wins_over_the_manifest():
    own = as_wanted({"m": ModelConfig(batching=BatchingConfig(max_size=4, max_delay_us=7))})
    made = shelved(entry(RECORD, batching=None), own)
    assert (made.size, made.delay_s) == (4, 7e-6)
    assert shelved(entry(RECORD), as_wanted({"m": ModelConfig(), "other": ModelConfig(batching=False)})).size == 8


def test_nonsense_in_the_catalog_joins_nothing():
    for change in ({"times": "x"}, {"times": [[0, 1]]}, {"times": [[1, -1.0]]}, {"row_bytes": None}):
        assert shelved(entry({**RECORD, **change})).size == 1
