"""Variants made elsewhere join the pack: TFLite beside ONNX, measured by their own runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from agent.bundles import archive
from agent.cli.fleet import main
from tests import onnx_models, tflite_models

ROOT = Path(__file__).resolve().parents[2]
litert = pytest.mark.skipif(
    not (find_spec("ai_edge_litert") or find_spec("tflite_runtime")), reason="no TFLite package for this Python"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with one model in both formats, another one, and golden inputs."""
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(onnx_models.linear())
    Path("m.tflite").write_bytes(tflite_models.linear())
    Path("other.tflite").write_bytes(tflite_models.linear(seed=5))
    Path("wide.tflite").write_bytes(tflite_models.linear(features=17))
    np.savez("golden.npz", x=np.random.default_rng(1).normal(size=(40, 16)).astype("f4"), label=np.arange(40) % 4)
    return tmp_path


def packed(capsys, *arguments):
    assert main(["pack", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failed(capsys, *arguments, status=1):
    assert main(["pack", *arguments]) == status
    return capsys.readouterr().err


@litert
def test_added_files_are_measured_and_travel_in_the_bundle(folder, capsys):
    report = packed(
        capsys, "m.onnx", "--golden", "golden.npz", "--variants", "fp32",
        "--add", "m.tflite", "--add", "other.tflite:wrong", "-o", "m.edgemodel",
    )  # fmt: skip
    rows = {row["id"]: row for row in report["variants"]}
    assert list(rows) == ["fp32", "tflite-fp32", "wrong"]
    assert rows["tflite-fp32"]["agreement"] == 1.0
    assert rows["tflite-fp32"]["accuracy"] == rows["fp32"]["accuracy"]
    assert rows["wrong"]["agreement"] < 0.9
    with Path("m.edgemodel").open("rb") as stream:
        reader = archive.read(stream)
        manifest = reader.read_manifest()
        files = {ref.name: b"".join(chunks) for ref, chunks in reader.files()}
    variant = manifest.variant("tflite-fp32")
    assert (variant.runtime, variant.precision, variant.file.name) == ("tflite", "fp32", "tflite-fp32.tflite")
    assert files["tflite-fp32.tflite"] == Path("m.tflite").read_bytes()


def test_without_a_golden_set_nothing_needs_to_run(folder, capsys):
    report = packed(capsys, "m.onnx", "--variants", "fp32", "--add", "m.tflite:lite")
    assert [row["id"] for row in report["variants"]] == ["fp32", "lite"]


def test_a_file_that_does_not_fit_is_an_error_that_names_it(folder, capsys):
    Path("broken.tflite").write_bytes(tflite_models.linear()[:300])
    for add, text in (
        ("wide.tflite", "variant tflite-fp32: cannot pack m: variant tflite-fp32 does not fit the manifest"),
        ("broken.tflite", "cannot read broken.tflite: it is no TFLite file, or it is damaged or cut short"),
        ("nothing.tflite", "cannot pack nothing.tflite: no such file"),
        ("m.tflite:fp32", "fp32 named more than once"),
    ):
        assert text in failed(capsys, "m.onnx", "--golden", "golden.npz", "--variants", "fp32", "--add", add)
    with pytest.raises(SystemExit) as ended:
        main(["pack", "m.onnx", "--add", "m.tflite:Not An Id"])
    assert ended.value.code == 2
    assert "--add is for an .onnx file" in failed(capsys, ".", "--add", "m.tflite", status=2)
    assert not list(folder.glob("*.edgemodel"))


def test_where_tflite_is_missing_an_added_file_is_left_out_with_the_reason(folder):
    """The packages are hidden from a process of its own: then only ONNX Runtime measures."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('ai_edge_litert', 'tflite_runtime')));"
        "from agent.cli.fleet import main;"
        "sys.exit(main('pack m.onnx --golden golden.npz --variants fp32 --add m.tflite --json'.split()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["id"] for row in report["variants"]] == ["fp32"]
    assert "cannot load runtime 'tflite'" in report["left_out"]["tflite-fp32"]


@litert
def test_a_folder_holds_variants_of_both_runtimes(folder, capsys):
    document = {
        "format": "edge-model/1",
        "name": "both",
        "version": "1.0.0",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        "variants": [
            {"id": "onnx", "runtime": "onnx", "precision": "fp32", "file": "m.onnx"},
            {"id": "lite", "runtime": "tflite", "precision": "fp32", "file": "m.tflite"},
        ],
    }
    Path("model.json").write_text(json.dumps(document))
    assert [row["id"] for row in packed(capsys, ".")["variants"]] == ["onnx", "lite"]
    document["variants"][0]["runtime"] = "tflite"
    Path("model.json").write_text(json.dumps(document))
    assert "variant onnx does not fit the manifest: its file is onnx, not tflite" in failed(capsys, ".")
    document["variants"] = [{"id": "wide", "runtime": "tflite", "precision": "fp32", "file": "wide.tflite"}]
    Path("model.json").write_text(json.dumps(document))
    assert "input 'x' has shape [-1, 17], not [-1, 16]" in failed(capsys, ".")
