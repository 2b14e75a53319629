"""A new version beside the active one: slower, larger, or only noise."""

from __future__ import annotations

from typing import Any

import pytest

from agent.bundles.manifest import Manifest
from agent.operations.comparing import Bounds, compared, compared_by_record, same_inputs, same_signature
from agent.operations.measured import Active
from agent.selection.measurements import Measurement, MeasurementKey
from agent.store.document import VersionEntry

KEY = MeasurementKey("0" * 64, "onnx", "1.0", "cpu", 1)


def manifest(version: str = "1.0.0", classes: int = 4, features: int = 16, **policy: Any) -> Manifest:
    file = {"name": "f.onnx", "sha256": "0" * 64, "size": 1}
    return Manifest.model_validate(
        {
            "format": "edge-model/1", "name": "m", "version": version,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, features]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, classes]}],
            "variants": [{"id": "fp32", "runtime": "onnx", "precision": "fp32", "file": file}],
            "policy": policy,
        }
    )  # fmt: skip


def measured(ms: float, session: str = "s", rounds: int = 12, **fields: Any) -> Measurement:
    samples = [[ms * (1 + 0.01 * (at % 3))] * 3 for at in range(rounds)]
    return Measurement.from_samples("fp32@cpu", KEY, session, samples, **fields)


def active(measurement: Measurement | None = None, *, slower: bool = False) -> Active:
    entry = VersionEntry(
        manifest=manifest(), origin="unsigned", added_at="", chosen="fp32@cpu",
        measurements={} if measurement is None else {"fp32@cpu": measurement.to_json()},
    )  # fmt: skip
    return Active("1.0.0", entry, slower)


def worse(new: Measurement, old: Measurement | None, *, slower: bool = False, **policy: Any) -> str:
    record = compared(manifest("2.0.0", **policy), new, active(slower=slower), old, Bounds(1.5, 500.0))
    return str(record["worse"])


def test_as_fast_is_taken() -> None:
    record = compared(manifest("2.0.0"), measured(10.0), active(), measured(10.0), Bounds())
    assert (record["worse"], record["how"], record["mend"]) == ("", "measured together", "")
    assert record["latency"]["ratio"] == pytest.approx(1.0)


def test_twice_as_slow_is_not_taken() -> None:
    said = worse(measured(20.0), measured(10.0))
    assert said == "it takes 2.0 x as long as 1.0.0 here (20.2 ms, 10.1 ms), 1.5 x is allowed"
    assert worse(measured(14.0), measured(10.0)) == ""


def test_unless_somebody_wants_it_or_it_keeps_to_its_limit() -> None:
    assert worse(measured(20.0), measured(10.0), slower=True) == ""
    assert worse(measured(20.0), measured(10.0), max_latency_ms=30.0) == ""
    assert worse(measured(20.0), measured(10.0), max_latency_ms=15.0)


def test_nobody_feels_a_fifth_of_a_millisecond() -> None:
    assert worse(measured(0.25), measured(0.05)) == ""
    assert worse(measured(0.45), measured(0.05))


def test_one_round_is_no_proof() -> None:
    assert worse(measured(20.0, rounds=1), measured(10.0, rounds=1)) == ""


def test_figures_of_another_day_count_with_more_room() -> None:
    new, old = measured(20.0, "today"), measured(10.0, "then")
    record = compared(manifest("2.0.0"), new, active(), old, Bounds())
    assert (record["how"], bool(record["worse"])) == ("recorded", True)
    assert record["agreement"]["active"] is None  # it was another golden set's


def test_without_figures_nothing_is_refused() -> None:
    record = compared(manifest("2.0.0"), measured(20.0), active(), None, Bounds())
    assert (record["how"], record["latency"], record["worse"]) == ("not compared", None, "")


def test_what_does_not_fit_is_not_taken_whoever_wants_it() -> None:
    said = worse(measured(1.0, peak_mb=600.0), measured(1.0, peak_mb=20.0), slower=True)
    assert said == "it takes 600 MB, 500 MB are for models"


def test_what_the_catalog_knows_of_both() -> None:
    entry = active(measured(20.0, "then")).entry
    record = compared_by_record(entry, active(measured(10.0, "before")), Bounds(), holds=True)
    assert record["worse"]
    gone = compared_by_record(entry, active(measured(10.0, "before")), Bounds(), holds=False)
    assert (gone["how"], gone["worse"]) == ("not compared", "")
    assert compared_by_record(active().entry, active(measured(10.0)), Bounds(), holds=True) == {}


def test_answers_are_held_against_each_other_where_they_mean_the_same() -> None:
    assert same_signature(manifest(), manifest("2.0.0"))
    assert same_inputs(manifest(), manifest("2.0.0", classes=5))
    assert not same_signature(manifest(), manifest("2.0.0", classes=5))
    assert not same_inputs(manifest(), manifest("2.0.0", features=5))
