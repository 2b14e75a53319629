"""The whole story, for machines as a document and for people as a table."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from agent.bundles.manifest import Manifest
from agent.hardware.facts import Accelerator
from agent.hardware.profiles import FALLBACK
from agent.selection.choice import choose
from agent.selection.explanation import explain, explain_text
from agent.selection.inventory import InstalledRuntime, RuntimeInventory
from agent.selection.measurements import Measurement
from agent.selection.prior import rank_by_prior
from agent.selection.rules import accepted, candidates

from .parts import CPU, CUDA, INSTALLED, STATIC, arm, facts, manifest, variant
from .simulation import Device, Truth, key

BUNDLE = manifest(
    variant("fp32"),
    variant("int8", "int8", 4, STATIC),
    variant("copy", "int8", 4, STATIC),
    variant("wrong", "fp32", 7),
    variant("crashing", "int8", 4, STATIC),
    variant("spare", "fp16", 7),
    variant("gpu", "fp16", 7, requires={"accelerator": "cuda", "arch": ["aarch64"]}),
    policy={"prefer": "latency", "min_quality": 0.9},
)
TRUTHS = [
    Truth(f"fp32@{CPU}", 4.1, 57, 0.986),
    Truth(f"int8@{CPU}", 2.1, 26, 0.947),
    Truth(f"copy@{CPU}", 2.1, 26, 0.947),
    Truth(f"wrong@{CPU}", 1.8, 35, 0.003),
]


def story(bundle: Manifest = BUNDLE, *, tried: bool = True) -> dict[str, Any]:
    machine = facts(board="Test board", features={"avx_vnni": True})
    verdicts = candidates(bundle, machine, (CPU,), INSTALLED, 4000)
    priors = rank_by_prior(accepted(verdicts), machine, FALLBACK)
    decision = None
    if tried:
        measured = Device(TRUTHS, 7).trial(bundle.policy, priors)
        name = f"crashing@{CPU}"
        measured.append(Measurement.rejected(name, key(name), "crash", "crashed during 'load': SIGSEGV"))
        decision = choose(bundle.policy, measured, priors)
    return explain(bundle, verdicts, priors, decision, machine, FALLBACK)


def entry(document: dict[str, Any], variant_id: str) -> dict[str, Any]:
    (found,) = (entry for entry in document["candidates"] if entry["variant"] == variant_id)
    return dict(found)


def test_every_variant_has_its_outcome_and_its_reason() -> None:
    document = story()
    assert {e["variant"]: e["outcome"] for e in document["candidates"]} == {
        "int8": "winner" if document["winner"] == f"int8@{CPU}" else "lost",
        "copy": "winner" if document["winner"] == f"copy@{CPU}" else "lost",
        "fp32": "lost",
        "wrong": "excluded",
        "crashing": "rejected",
        "spare": "untried",
        "gpu": "refused",
    }
    assert re.fullmatch(r"[12]\.[089]x slower than the winner \(noise ±.*\)", entry(document, "fp32")["why"][0])
    assert entry(document, "wrong")["why"] == ["cosine 0.003 is below min_quality 0.9"]
    assert entry(document, "crashing")["why"] == ["crashed during 'load': SIGSEGV"]
    assert "needs aarch64, this is x86_64" in entry(document, "gpu")["why"]
    assert "this machine has no cuda" in entry(document, "gpu")["why"]
    loser = entry(document, "copy" if document["winner"].startswith("int8") else "int8")
    assert re.match(r"alike in latency \(within ±\S+ %\), accuracy", loser["why"][0])
    assert loser["why"][0].endswith(f"the prior puts {document['winner']} first")


def test_the_prior_stands_beside_what_was_measured() -> None:
    seen = entry(story(), "fp32")
    assert seen["prior"]["speed"] == 1.0
    assert seen["measured"]["p50_ms"] == pytest.approx(4.1, rel=0.2)
    assert seen["measured"]["vs_winner"]["ratio"] == pytest.approx(4.1 / 2.1, rel=0.05)
    assert seen["measured"]["quality"] == {"metric": "cosine", "value": 0.986, "source": "measured"}
    assert seen["measured"]["rounds"] >= 12
    assert seen["steps"][0]["criterion"] == "latency"


def test_the_document_is_plain_json_without_infinities() -> None:
    document = story()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@pytest.mark.parametrize("tried", [True, False])
@pytest.mark.parametrize("width", [80, 96])
def test_the_table_fits_the_terminal(tried: bool, width: int) -> None:
    text = explain_text(story(tried=tried), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "ExecutionProvider" not in text.replace("CPUExecutionProvider does not use", "")
    for variant_id in ("fp32", "int8", "copy", "wrong", "crashing", "spare", "gpu"):
        assert re.search(rf"^[* ]  {variant_id}\s", text, re.MULTILINE)


def test_the_winner_is_marked_and_comes_first() -> None:
    lines = explain_text(story()).splitlines()
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1
    assert lines[4] == marked[0]
    assert lines[0] == f"digits 1.0.0 runs as {marked[0].split()[1]}"
    assert "policy latency, quality at least 0.9" in lines[1]


def test_before_anything_was_measured_it_says_what_can_run() -> None:
    text = explain_text(story(tried=False))
    assert "digits 1.0.0: 6 of 7 candidates can run" in text
    assert "p50" not in text


def test_when_nothing_may_run_the_closest_is_named() -> None:
    strict = BUNDLE.model_copy(update={"policy": BUNDLE.policy.model_copy(update={"min_quality": 0.999})})
    text = explain_text(story(strict))
    assert "no variant was chosen" in text
    assert "closest is" in text


def test_a_candidate_is_named_with_its_provider_where_there_are_several() -> None:
    machine = arm(board="Jetson", accelerators=(Accelerator("cuda", True),))
    inventory = RuntimeInventory({"onnx": InstalledRuntime("1.20.0", (CUDA, CPU))})
    verdicts = candidates(manifest(variant("v")), machine, (CUDA, CPU), inventory, 4000)
    priors = rank_by_prior(accepted(verdicts), machine, FALLBACK)
    device = Device([Truth(f"v@{CUDA}", 3), Truth(f"v@{CPU}", 30)], 1)
    measured = device.trial(BUNDLE.policy, priors)
    document = explain(manifest(), verdicts, priors, choose(BUNDLE.policy, measured, priors), machine, FALLBACK)
    assert "runs as v@CUDA" in explain_text(document)


def test_what_is_true_of_all_is_said_once() -> None:
    machine = arm(emulated=True)
    verdicts = candidates(manifest(), machine, (CPU,), INSTALLED, 4000)
    priors = rank_by_prior(accepted(verdicts), machine, FALLBACK)
    document = explain(manifest(), verdicts, priors, None, machine, FALLBACK)
    assert explain_text(document).count("instructions are emulated") == 1
