"""What fits a device is judged from what it said of itself as the device would judge it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.bundles.manifest import parse_manifest
from agent.fleet.fit import facts_from_document, fit, inventory_from_document, profile_from_document
from agent.hardware.document import document
from agent.hardware.probe import probe
from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir
from agent.selection.inventory import assumed_inventory, inventory_document
from agent.selection.prior import rank_by_prior
from agent.selection.rules import accepted, candidates, memory_headroom_mb
from tests.fleet.conftest import ROOT, Fleet

PROFILES, _ = load_profiles([shipped_profiles_dir()])
#: A variant for each kind of board, and one for none.
MANIFEST = parse_manifest(
    json.dumps(
        {
            "format": "edge-model/1",
            "name": "m",
            "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}],
            "variants": [
                {
                    "id": name,
                    "runtime": runtime,
                    "precision": precision,
                    "file": {"name": f"{name}.{runtime}", "sha256": f"{index:064x}", "size": size},
                    "requires": requires,
                }
                for index, (name, runtime, precision, size, requires) in enumerate(
                    [
                        ("fp32", "onnx", "fp32", 14_000_000, {}),
                        ("int8-arm", "onnx", "int8", 4_000_000, {"arch": ["aarch64"], "all_features": ["dotprod"]}),
                        ("fp16-gpu", "onnx", "fp16", 7_000_000, {"accelerator": "cuda"}),
                        ("lite", "tflite", "int8", 3_000_000, {}),
                        ("huge", "onnx", "fp32", 900_000_000, {"min_memory_mb": 9000}),
                    ]
                )
            ],
        }
    ).encode()
)


def said(root: Path) -> dict[str, Any]:
    """``Info`` of a recorded board, as it comes over the wire: without the long texts, as plain JSON."""
    facts = probe(root)
    profile = choose_profile(facts, PROFILES)
    found = {
        key: value
        for key, value in document(facts, profile).items()
        if key not in ("notes", "profile_notes", "compatible")
    }
    inventory = inventory_document(assumed_inventory(facts, profile.providers))
    return json.loads(json.dumps({"facts": found, "profile": profile.id, "inventory": inventory}))


def test_from_afar_the_verdicts_are_those_of_the_board_itself(boards: Path) -> None:
    roots = sorted(path for path in boards.iterdir() if path.is_dir())
    verdicts = set()
    for root in roots:
        facts = probe(root)
        profile = choose_profile(facts, PROFILES)
        inventory = assumed_inventory(facts, profile.providers)
        here = candidates(MANIFEST, facts, profile.providers, inventory, memory_headroom_mb(facts, profile))
        ranked = [prior.candidate.id for prior in rank_by_prior(accepted(here), facts, profile)]
        there = fit(MANIFEST, root.name, said(root))
        assert there.explanation is not None, there.problem
        seen = {entry["id"]: entry for entry in there.explanation["candidates"]}
        assert {verdict.candidate.id: verdict.accepted for verdict in here} == {
            name: entry["outcome"] != "refused" for name, entry in seen.items()
        }, root.name
        order = sorted((entry for entry in seen.values() if entry["prior"]), key=lambda entry: entry["prior"]["rank"])
        assert [entry["id"] for entry in order] == ranked, root.name
        assert there.best == (ranked[0] if ranked else "") and there.runs == bool(ranked)
        verdicts.add(tuple(sorted(name for name, entry in seen.items() if entry["outcome"] != "refused")))
    assert len(roots) > 20 and len(verdicts) > 5  # the boards do differ


def test_reasons_name_the_variants_that_they_hold_for(boards: Path) -> None:
    found = fit(MANIFEST, "x", said(next(path for path in sorted(boards.iterdir()) if path.is_dir())))
    reasons = found.reasons()
    assert len(reasons) == len(set(reasons)) and any("huge@" in reason and "MB" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        (None, "has not said yet"),
        ({"facts": {}, "inventory": {"runtimes": {}}}, "there is no plan"),
        ({"facts": {"plan": []}, "inventory": {}}, "there is no plan"),
        ({"facts": {"plan": {}, "arch": 5}, "inventory": {"runtimes": {}}}, "facts.arch"),
        ({"facts": {"plan": {}, "core_types": [["A", "four"]]}, "inventory": {"runtimes": {}}}, "facts.core_types"),
        ({"facts": {"plan": {}, "mem_limit_mb": True}, "inventory": {"runtimes": {}}}, "facts.mem_limit_mb"),
        ({"facts": {"plan": {"providers": "all"}}, "inventory": {"runtimes": {}}}, "facts.plan.providers"),
        ({"facts": {"plan": {"int8_gain": "x"}}, "inventory": {"runtimes": {}}}, "facts.plan.int8_gain"),
        ({"facts": {"plan": {}}, "inventory": {}}, "inventory.runtimes"),
        ({"facts": {"plan": {}}, "inventory": {"runtimes": {"onnx": 1}}}, "inventory.runtimes.onnx"),
        ({"facts": {"plan": {}}, "inventory": {"runtimes": {}, "absent": []}}, "inventory.absent"),
    ],
)
def test_a_device_that_says_nonsense_is_judged_alone(info: Any, problem: str) -> None:
    found = fit(MANIFEST, "x", info)
    assert not found.runs and found.best == "" and problem in found.reasons()[0]


def test_what_a_newer_agent_adds_is_passed_over() -> None:
    facts = facts_from_document({"board": "X", "flux": 1, "features": {"neon": True, "newer": False}})
    assert facts.board == "X" and facts.features["newer"] is False
    profile = profile_from_document({"plan": {"memory_budget_mb": 1000}, "profile": 7}, facts)
    assert profile.id == "fallback"
    assert inventory_from_document({"runtimes": {}, "newer": 1}).runtimes == {}


def test_the_command_tells_who_can_run_a_bundle_and_why_not(fleet: Fleet) -> None:
    good, small = fleet.enrolled("cam-1"), fleet.enrolled("cam-2")
    small.facts = {**small.facts, "mem_available_mb": 5}
    for device in (good, small):
        fleet.connect(device)
    fleet.enrolled("cam-3")
    bundle = str(ROOT / "deploy" / "demo" / "digits.onnx")
    told = fleet.ok("fit", bundle)
    assert {row["device"]: row["runs"] for row in told["devices"]} == {"cam-1": True, "cam-2": False, "cam-3": False}
    plain = fleet.run("fit", bundle)
    assert "1 of 3 devices can run it" in plain.out and "5 MB may be used" in plain.out
    assert "has not said yet" in plain.out
    assert fleet.run("fit", bundle, "--device", "cam-2").status == 1
    assert "no device is meant" in fleet.run("fit", bundle, "--where", "board=Coral*").err
    assert "No such file" in fleet.run("fit", "/nowhere").err
