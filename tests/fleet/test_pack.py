"""An operator packs a model: variants made, measured, written as one file that a device can read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from agent.bundles import archive
from agent.bundles.agreement import load_golden
from agent.bundles.manifest import Manifest
from agent.cli.fleet import main

RNG = np.random.default_rng(3)


def classifier(path: Path, *, precision: str = "f4", scale: float = 1.0) -> Path:
    """A small convolutional classifier of 8 x 8 images with fixed random weights."""
    rng = np.random.default_rng(5)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((scale * rng.normal(size=shape)).astype(precision), name)

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(precision))
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w1"], ["c1"], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Flatten", ["r1"], ["f"]),
            helper.make_node("MatMul", ["f", "w2"], ["scores"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("image", kind, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", kind, ["n", 10])],
        [weight("w1", 16, 1, 3, 3), weight("w2", 16 * 36, 10)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "calibrate.npz", image=RNG.normal(size=(20, 1, 8, 8)).astype("f4"))
    np.savez(tmp_path / "golden.npz", image=RNG.normal(size=(30, 1, 8, 8)).astype("f4"), label=np.arange(30) % 10)
    return classifier(tmp_path / "My Net.onnx")


def packed(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["pack", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failed(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["pack", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot ")
    return captured.err


def opened(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    with path.open("rb") as stream:
        reader = archive.read(stream)
        return reader.read_manifest(), {ref.name: b"".join(chunks) for ref, chunks in reader.files()}


def test_one_command_makes_measures_and_packs_all_variants(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = packed(model, "--calibrate", "calibrate.npz", "--golden", "golden.npz", capsys=capsys)
    manifest, files = opened(Path("my-net-1.0.0.edgemodel"))
    assert report["file"] == "my-net-1.0.0.edgemodel"
    assert [v.id for v in manifest.variants] == ["fp32", "fp16", "int8-static", "int8-dynamic"]
    assert [v.derived_from for v in manifest.variants] == [None, "fp32", "fp32", "fp32"]
    assert files["fp32.onnx"] == model.read_bytes()
    assert len(files["int8-static.onnx"]) < len(files["fp32.onnx"])
    golden = load_golden(files["golden.npz"])
    assert golden.count == 30
    for variant in manifest.variants:
        # What the manifest says is what the file in the bundle answers, and every file speaks fp32 to the app.
        session = ort.InferenceSession(files[variant.file.name], providers=["CPUExecutionProvider"])
        assert {node.type for node in [*session.get_inputs(), *session.get_outputs()]} == {"tensor(float)"}
        scores = np.concatenate([session.run(None, feed)[0] for feed in golden.examples(manifest.inputs)])
        agreed = float(np.mean(scores.argmax(1) == golden.outputs["scores"].argmax(1)))
        assert variant.quality is not None
        assert (variant.quality.metric, variant.quality.value) == ("top1_agreement", agreed)
        assert variant.parameters["agreement"] == agreed
        assert variant.parameters["accuracy"] == pytest.approx(np.mean(scores.argmax(1) == np.arange(30) % 10))
    assert manifest.variants[0].quality.value == 1.0
    nodes = {node.op_type for node in onnx.load_model_from_string(files["int8-static.onnx"]).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes
    scales = [
        t for t in onnx.load_model_from_string(files["int8-static.onnx"]).graph.initializer if t.name == "w1_scale"
    ]
    assert list(scales[0].dims) == [16]  # One scale for each channel.


def test_the_table_is_for_people_and_progress_only_for_terminals(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(model), "--golden", "golden.npz", "-o", "x.edgemodel"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("packed my-net 1.0.0 into x.edgemodel (")
    assert out.splitlines()[1].split() == ["variant", "precision", "size", "top1", "accuracy"]
    assert "left out: int8-static: static quantization needs --calibrate" in out
    assert {path.name for path in Path().iterdir()} == {"My Net.onnx", "calibrate.npz", "golden.npz", "x.edgemodel"}


def test_what_the_operator_says_lands_in_the_manifest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("labels.txt").write_text("zero\none\n\n", encoding="utf-8")
    packed(
        model, "--golden", "golden.npz", "--name", "net", "--version", "2.1.0-rc1", "--metric", "cosine", "--threshold",
        "0.9", "--prefer", "accuracy", "--min-quality", "0.8", "--max-latency-ms", "50", "--variants", "fp16,fp32",
        "--labels", "labels.txt", "--task", "classify", "--license", "Apache-2.0", "-o", "n.edgemodel", capsys=capsys,
    )  # fmt: skip
    manifest, _ = opened(Path("n.edgemodel"))
    assert (manifest.name, manifest.version, manifest.labels) == ("net", "2.1.0-rc1", ("zero", "one"))
    assert (manifest.policy.prefer, manifest.policy.min_quality, manifest.policy.max_latency_ms) == (
        "accuracy",
        0.8,
        50,
    )
    assert (manifest.golden.metric, manifest.golden.threshold) == ("cosine", 0.9)
    assert [variant.id for variant in manifest.variants] == ["fp16", "fp32"]
    assert manifest.variants[0].quality.metric == "cosine"
    assert 0.99 < manifest.variants[0].quality.value < 1.0


def test_max_abs_is_a_distance_and_not_a_quality(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --threshold" in failed(model, "--golden", "golden.npz", "--metric", "max_abs", capsys=capsys)
    report = packed(model, "--golden", "golden.npz", "--metric", "max_abs", "--threshold", "0.01", capsys=capsys)
    fp32, fp16 = report["variants"][:2]
    assert fp32["agreement"] == 0.0
    assert fp16["agreement"] > 0.01  # Kept all the same: the device judges for itself.
    assert fp16["quality"]["metric"] == "cosine"
    assert main(["pack", str(model), "--golden", "golden.npz", "--metric", "max_abs", "--threshold", "0.01"]) == 0
    assert "beyond 0.01" in capsys.readouterr().out


def test_reference_answers_may_come_with_the_inputs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = RNG.integers(0, 16, (8, 1, 8, 8)).astype("u1")  # Whole numbers stand for floats.
    wrong = np.eye(10, dtype="f4")[np.zeros(8, int)]
    np.savez("own.npz", **{"input/image": images, "output/scores": wrong})
    report = packed(model, "--golden", "own.npz", "--variants", "fp32", capsys=capsys)
    assert report["variants"][0]["agreement"] < 0.9
    _, files = opened(Path(report["file"]))
    assert load_golden(files["golden.npz"]).inputs["image"].dtype == np.float32


def test_without_a_golden_set_nothing_is_measured_and_it_says_so(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(model), "--variants", "fp32", "-o", "x.edgemodel"]) == 0
    assert "no golden set" in capsys.readouterr().out
    manifest, files = opened(Path("x.edgemodel"))
    assert manifest.golden is None
    assert manifest.variants[0].quality is None
    assert list(files) == ["fp32.onnx"]


def test_a_variant_that_breaks_is_left_out_with_its_reason(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("broken.npz", image=np.full((4, 1, 8, 8), np.nan, "f4"))
    options = ("--golden", "golden.npz", "--calibrate", "broken.npz", "-o", "x.edgemodel")
    report = packed(model, *options, capsys=capsys)
    assert list(report["left_out"]) == ["int8-static"]
    assert report["left_out"]["int8-static"]
    assert [v["id"] for v in report["variants"]] == ["fp32", "fp16", "int8-dynamic"]
    assert set(opened(Path("x.edgemodel"))[1]) == {"fp32.onnx", "fp16.onnx", "int8-dynamic.onnx", "golden.npz"}
    assert "variant int8-static: " in failed(model, *options, "--variants", "fp32,int8-static", capsys=capsys)


def test_what_cannot_be_packed_is_said_in_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("other.npz", pixels=np.zeros((3, 1, 8, 8), "f4"))
    np.savez("small.npz", image=np.zeros((3, 1, 7, 7), "f4"))
    np.savez("words.npz", image=np.array(["a"] * 3))
    Path("broken.npz").write_bytes(b"no")
    for data, reason in (
        ("other.npz", "the model has no input 'pixels'; its inputs are image"),
        ("small.npz", "input 'image' is [3, 1, 7, 7], the model takes [-1, 1, 8, 8] per example"),
        ("words.npz", "input 'image' is object, the model takes FP32"),
        ("broken.npz", "cannot read broken.npz"),
        ("none.npz", "no such file"),
    ):
        for option in ("--golden", "--calibrate"):
            assert reason in failed(model, option, data, capsys=capsys)
    assert "it is fp16 already" in failed(classifier(Path("h.onnx"), precision="f2"), capsys=capsys)
    assert "no such file" in failed("missing.onnx", capsys=capsys)
    assert "no ONNX file" in failed("other.npz", capsys=capsys)
    assert "name" in failed(model, "--name", "Not A Name", capsys=capsys)
    assert "version" in failed(model, "--version", "one", capsys=capsys)
    assert "cannot pack: No such file or directory" in failed(model, "-o", "nowhere/x.edgemodel", capsys=capsys)
    assert "needs --calibrate" in failed(model, "--variants", "int8-static", capsys=capsys)
    assert not [path for path in Path().iterdir() if path.name.endswith(".edgemodel") or path.name.startswith(".")]


@pytest.mark.parametrize(
    "arguments",
    [[], ["pack"], ["pack", "x.onnx", "--variants", "int3"], ["pack", "x.onnx", "--threshold", "nan"],
     ["pack", "x.onnx", "--metric", "guess"]],
)  # fmt: skip
def test_wrong_usage_is_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def a_folder(folder: Path, **changes: object) -> Path:
    """A bundle as a person writes it: no digests."""
    folder.mkdir()
    classifier(folder / "a.onnx")
    classifier(folder / "b.onnx", scale=2.0)
    document = {
        "format": "edge-model/1", "name": "hand", "version": "1.0.0",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
        "variants": [
            {"id": "a", "runtime": "onnx", "precision": "fp32", "file": "a.onnx"},
            {"id": "b", "runtime": "onnx", "precision": "fp32", "file": {"name": "b.onnx"}},
        ],
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps({**document, **changes}))
    return folder


def test_a_folder_written_by_hand_gets_its_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_folder(tmp_path / "hand")
    packed(folder, "-o", tmp_path / "x.edgemodel", capsys=capsys)
    manifest, files = opened(tmp_path / "x.edgemodel")
    assert files == {name: (folder / name).read_bytes() for name in ("a.onnx", "b.onnx")}
    # Unpacked again, the folder is complete and packs to the same bytes.
    (folder / "model.json").write_bytes(manifest.to_json())
    packed(folder, "-o", tmp_path / "y.edgemodel", capsys=capsys)
    assert (tmp_path / "x.edgemodel").read_bytes() == (tmp_path / "y.edgemodel").read_bytes()
    (folder / "b.onnx").write_bytes((folder / "a.onnx").read_bytes())
    before = (tmp_path / "y.edgemodel").read_bytes()
    assert "b.onnx" in failed(folder, "-o", tmp_path / "y.edgemodel", capsys=capsys)
    assert (tmp_path / "y.edgemodel").read_bytes() == before


def test_a_folder_that_does_not_hold_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = [{"name": "classes", "datatype": "INT64", "shape": [-1]}]
    folder = a_folder(tmp_path / "a", outputs=output)
    assert "variant a does not fit the manifest: it has no output 'classes'" in failed(folder, capsys=capsys)
    folder = a_folder(tmp_path / "b", inputs=[{"name": "image", "datatype": "UINT8", "shape": [-1, 1, 8, 8]}])
    assert "input 'image' is FP32, not UINT8" in failed(folder, capsys=capsys)
    folder = a_folder(tmp_path / "c", varaints=[])
    assert "varaints: Extra inputs" in failed(folder, capsys=capsys)
    (folder / "model.json").write_text("{")
    assert "model.json:" in failed(folder, capsys=capsys)
    folder = a_folder(tmp_path / "d")
    (folder / "b.onnx").unlink()
    assert "'b.onnx' is not a file in it" in failed(folder, capsys=capsys)
    assert main(["pack", str(folder), "--prefer", "accuracy"]) == 2
    capsys.readouterr()
    (tmp_path / "e").mkdir()
    assert "it has no model.json" in failed(tmp_path / "e", capsys=capsys)


def test_a_missing_extra_is_named_and_folders_pack_without_it(tmp_path: Path) -> None:
    model = classifier(tmp_path / "m.onnx")
    folder = a_folder(tmp_path / "folder")
    # An installation without the extra, as Python sees it: the import fails.
    without = "import sys; sys.modules.update(onnx=None, numpy=None, onnxruntime=None)"
    code = f"{without}; from agent.cli.fleet import main; sys.exit(main())"
    for source, status in ((model, 1), (folder, 0)):
        run = subprocess.run(
            [sys.executable, "-c", code, "pack", source, "-o", tmp_path / "x.edgemodel"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == status, run.stderr
    run = subprocess.run([sys.executable, "-c", code, "pack", model], capture_output=True, text=True, check=False)
    assert run.stderr == "error: cannot pack m.onnx: numpy is not installed\nhint: pip install 'edge-agent[pack]'\n"


def test_the_manifest_tells_where_the_model_comes_from(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.bin"
    data.write_bytes(b"training data")
    made = packed(model, "--variants", "fp32", "--trained-on", data, "--name", "net", capsys=capsys)
    with Path(made["file"]).open("rb") as source:
        manifest = archive.BundleReader(source).read_manifest()
    assert manifest.provenance is not None and manifest.provenance.source_model is not None
    assert manifest.provenance.source_model.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    (trained,) = manifest.provenance.training_data
    assert (trained.name, trained.sha256) == ("train.bin", hashlib.sha256(b"training data").hexdigest())
    assert (
        manifest.provenance.command.startswith("edge-fleet pack") and str(tmp_path) not in manifest.provenance.command
    )


def test_a_model_without_provenance_is_written_as_it_always_was() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1]}
    file = {"name": "a.onnx", "sha256": "0" * 64, "size": 1}
    variant = {"id": "a", "runtime": "onnx", "precision": "fp32", "file": file}
    document = {"format": "edge-model/1", "name": "m", "version": "1.0.0", "inputs": [tensor], "outputs": [tensor]}
    manifest = Manifest.model_validate({**document, "variants": [variant]})
    assert "provenance" not in manifest.model_dump() and b"provenance" not in manifest.to_json()
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
