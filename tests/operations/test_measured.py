"""Whether what was measured of a version still holds on this device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.hardware.facts import Facts
from agent.hardware.profiles import FALLBACK
from agent.operations.measured import DeviceView, Known, key_on, known_of, outdated, runtimes_for
from agent.selection.inventory import InstalledRuntime, RuntimeInventory
from agent.selection.measurements import Measurement
from agent.selection.rules import candidate_of
from agent.store.document import VersionEntry
from tests.operations.test_choosing import manifest

CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
MANIFEST = manifest()


def installed(*providers, version="1.24.1", **others):
    runtimes = {"onnx": InstalledRuntime(version, providers)} if providers else {}
    return RuntimeInventory({**runtimes, **others})


def device(inventory):
    return DeviceView(Facts(), FALLBACK, 1, (0,), lambda: inventory, lambda: 1000, lambda: None)


def tried_with(inventory, provider):
    """What the catalog keeps of a version whose winner ran on ``provider``."""
    candidate = candidate_of(MANIFEST.variants[0], provider)
    key = key_on(device(inventory), candidate, inventory, MANIFEST)
    measured = Measurement.from_samples(candidate.id, key, "s", [[1.0] * 5] * 12)
    return Known({candidate.id: measured.to_json()}, runtimes=runtimes_for(MANIFEST, inventory)), candidate.id


BOTH, ALONE = installed(OPENVINO, CPU), installed(CPU)


@pytest.mark.parametrize(
    ("then", "chosen", "now", "changes"),
    [
        (BOTH, OPENVINO, BOTH, ()),
        (BOTH, OPENVINO, installed(CPU, OPENVINO), ()),  # the order of a list means nothing
        # Another build of the same release: only its providers differ.
        (BOTH, OPENVINO, ALONE, (f"onnx: 1.24.1 with {CPU}, {OPENVINO} -> 1.24.1 with {CPU}",)),
        (ALONE, CPU, BOTH, (f"onnx: 1.24.1 with {CPU} -> 1.24.1 with {CPU}, {OPENVINO}",)),
        (BOTH, CPU, installed(OPENVINO, CPU, version="1.25.0"), ("runtime_version: 1.24.1 -> 1.25.0",)),
        # A runtime that the version has no variant for.
        (ALONE, CPU, installed(CPU, tflite=InstalledRuntime("2.1", ("cpu",))), ()),
    ],
)
def test_a_version_is_tried_again_when_who_could_be_tried_has_changed(then, chosen, now, changes):
    known, candidate = tried_with(then, chosen)
    assert outdated(device(now), MANIFEST, known, candidate) == changes


def test_a_runtime_that_is_gone_or_new_is_a_change():
    known, candidate = tried_with(BOTH, OPENVINO)
    assert outdated(device(installed()), MANIFEST, known, candidate)
    other = MANIFEST.variants[0].model_copy(update={"id": "lite", "runtime": "tflite"})
    two = MANIFEST.model_copy(update={"variants": (*MANIFEST.variants, other)})
    known = replace(known, runtimes=runtimes_for(two, BOTH))
    lite = installed(OPENVINO, CPU, tflite=InstalledRuntime("2.1", ("cpu",)))
    assert outdated(device(lite), two, known, candidate) == ("tflite: none -> 2.1 with cpu",)


def test_what_an_older_agent_kept_is_believed():
    known, candidate = tried_with(BOTH, OPENVINO)
    assert outdated(device(ALONE), MANIFEST, replace(known, runtimes={}), candidate) == ()


def test_the_catalog_gives_back_what_was_noted():
    entry = VersionEntry(
        manifest=MANIFEST, origin="unsigned", added_at="2026-11-01T00:00:00Z", blobs={}, chosen=None,
        choice={"order": [], "runtimes": runtimes_for(MANIFEST, BOTH)}, measurements={}, quarantine={},
    )  # fmt: skip
    assert known_of(entry).runtimes == {"onnx": {"version": "1.24.1", "providers": [CPU, OPENVINO]}}
    assert known_of(entry.model_copy(update={"choice": None})).runtimes == {}
