"""The demo's model is real: trained on real data, honest about what it has seen, worth choosing between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from sklearn.datasets import load_digits

from agent.bundles.agreement import examples
from agent.bundles.arrays import load_arrays
from agent.cli.fleet import main
from agent.fleet.added import answers
from agent.fleet.pack import signature_of

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
PARTS = {name: load_arrays((DEMO / f"digits-{name}.npz").read_bytes()) for name in ("calibrate", "golden", "heldout")}


def test_images_are_the_data_sets_and_none_serves_two_purposes() -> None:
    digits = load_digits()
    known = {image.astype("f4").tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
    seen: set[bytes] = set()
    for part in PARTS.values():
        for image, label in zip(part["image"], part["label"], strict=True):
            assert known[image.tobytes()] == label
            assert image.tobytes() not in seen
            seen.add(image.tobytes())
    assert len(PARTS["heldout"]["label"]) == 400


def test_it_reads_digits_that_it_has_never_seen() -> None:
    session = ort.InferenceSession(DEMO / "digits.onnx", providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": PARTS["heldout"]["image"]})[0]
    assert np.mean(scores.argmax(1) == PARTS["heldout"]["label"]) >= 0.985


def test_its_signature_takes_any_batch_and_its_data() -> None:
    signature = signature_of(DEMO / "digits.onnx")
    assert signature.opset <= 21  # The newest that ONNX Runtime 1.18 takes.
    assert [spec.shape for spec in (*signature.inputs, *signature.outputs)] == [(-1, 1, 8, 8), (-1, 10)]
    assert len(list(examples({"image": PARTS["golden"]["image"]}, signature.inputs))) == 160


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_the_tflite_files_are_the_same_network(name: str) -> None:
    """Made from the weights of ``digits.onnx``: the same signature, nearly the same answers."""
    pytest.importorskip("ai_edge_litert")
    path = DEMO / f"digits-{name}.tflite"
    reference, signature = signature_of(DEMO / "digits.onnx"), signature_of(path)
    assert (signature.inputs, signature.outputs) == (reference.inputs, reference.outputs)
    assert signature.precision == name
    images = PARTS["heldout"]["image"][:100]
    told = np.concatenate([run["scores"] for run in answers("tflite", path, [{"image": images}], lambda n, m: None)])
    session = ort.InferenceSession(DEMO / "digits.onnx", providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": images})[0]
    assert np.mean(told.argmax(1) == scores.argmax(1)) >= 0.98
    if name == "fp32":
        np.testing.assert_allclose(told, scores, atol=1e-3)


def test_it_packs_into_a_small_bundle_whose_variants_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main([
        "pack", str(DEMO / "digits.onnx"), "--calibrate", str(DEMO / "digits-calibrate.npz"),
        "--golden", str(DEMO / "digits-golden.npz"), "--labels", str(DEMO / "digits-labels.txt"),
        "--metric", "cosine", "--threshold", "0.99", "-o", str(tmp_path / "digits.edgemodel"), "--json",
        "--add", str(DEMO / "digits-fp32.tflite"), "--add", str(DEMO / "digits-int8.tflite"),
    ])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert report["size"] <= 15_000_000
    variants = {variant["id"]: variant for variant in report["variants"]}
    made, added = ["fp32", "fp16", "int8-static", "int8-dynamic"], ["tflite-fp32", "tflite-int8"]
    assert sorted([*variants, *report["left_out"]]) == sorted([*made, *added])
    assert list(variants)[:4] == made
    assert all("tflite" in reason for reason in report["left_out"].values())  # where there is no package for it
    assert variants["fp32"]["quality"]["value"] == pytest.approx(1.0)
    assert 0.99 < variants["int8-static"]["quality"]["value"] < 0.99999
    assert all(variant["accuracy"] >= 0.98 for variant in variants.values())
