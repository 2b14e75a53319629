"""Devices with TFLite alone, as 32-bit ARM is, with no runtime at all, and with a broken one: the whole daemon."""

from __future__ import annotations

import hashlib
import io
import json
import signal

import numpy as np
import pytest

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest
from tests import onnx_models, tflite_models
from tests.core.conftest import Agent
from tests.environments import environment, requirements
from tests.infer.test_tflite_runtime import NUMPY_2, TFLITE

X = np.arange(32, dtype=np.float32).reshape(2, 16)


@pytest.fixture
def device_with(short_dir):
    """``device_with(name, requirements)``: a device whose daemon and command line are of another environment."""
    devices = []

    def make(name, wanted):
        devices.append(Agent(short_dir, environment(name, wanted)))
        return devices[-1]

    yield make
    for device in devices:
        if device.process is not None:
            device.process.kill()
            device.process.wait()


def both(path):
    """A bundle with an ONNX and two TFLite variants of one model, one of them wrong, and a golden set."""
    x = np.random.default_rng(7).standard_normal((64, 16)).astype(np.float32)
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": x, "output/y": x @ tflite_models.weights_of()})
    files = {
        "onnx.onnx": onnx_models.linear(),
        "lite.tflite": tflite_models.linear(),
        "wrong.tflite": tflite_models.linear(seed=3),
        "golden.npz": stream.getvalue(),
    }

    def ref(name):
        return {"name": name, "sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}

    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": "both",
            "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            "variants": [
                {"id": name, "runtime": runtime, "precision": "fp32", "file": ref(f"{name}.{runtime}")}
                for name, runtime in (("onnx", "onnx"), ("lite", "tflite"), ("wrong", "tflite"))
            ],
            "golden": {"file": ref("golden.npz"), "metric": "cosine", "threshold": 0.99},
        }
    )
    with path.open("wb") as target:
        write(manifest, files, target)
    return path


def outcomes(explained):
    return {row["id"]: (row["outcome"], "; ".join(row["why"])) for row in explained["candidates"]}


def answers(device, model):
    with device.client() as client:
        np.testing.assert_allclose(client.infer(model, {"x": X})["y"], X @ tflite_models.weights_of(), rtol=1e-4)


def test_a_bare_tflite_file_answers_beside_onnx(running):
    lite, other = running.folder / "door.tflite", running.folder / "window.onnx"
    lite.write_bytes(tflite_models.linear())
    other.write_bytes(onnx_models.linear())
    assert running.json("models", "check", lite)["runs"]
    assert running.json("models", "add", lite)["chosen"] == "fp32@cpu"
    running.json("models", "add", other)
    answers(running, "door")
    answers(running, "window")
    backends = {row["model"]: row["backend"] for row in running.json("status")["loaded"]}
    assert backends == {"door": "cpu", "window": "CPUExecutionProvider"}
    weights = tflite_models.weights_of().T.tobytes()[:64]
    assert not any(weights in file.read_bytes() for file in running.state.rglob("*") if file.is_file())
    running.restart(signal.SIGKILL)
    answers(running, "door")


def test_variants_of_both_runtimes_are_tried_against_each_other(running):
    explained = running.json("models", "add", both(running.folder / "both.edgemodel"))["choice"]["explain"]
    seen = outcomes(explained)
    assert seen["wrong@cpu"][0] == "rejected"
    assert {seen["lite@cpu"][0], seen["onnx@CPUExecutionProvider"][0]} == {"winner", "lost"}
    keys = {row["id"]: row["measured"]["key"] for row in explained["candidates"] if row["measured"]}
    assert keys["lite@cpu"]["runtime_version"].endswith(")")  # names the package: the two count differently
    assert keys["lite@cpu"]["provider"] == "cpu"
    answers(running, "both")


@pytest.mark.slow
def test_a_device_with_tflite_alone_detects_adds_tries_and_serves(device_with):
    device = device_with("tflite-runtime", [*TFLITE, "pytest>=8", "hypothesis>=6.100"])
    runtimes = device.json("detect")["runtimes"]
    assert runtimes["onnx"] == {"reason": "not installed"}
    assert runtimes["tflite"]["providers"] == ["cpu"]
    assert runtimes["tflite"]["version"].endswith("(tflite-runtime)")
    device.start()
    added = device.json("models", "add", both(device.folder / "both.edgemodel"))
    assert added["chosen"] == "lite@cpu"
    seen = outcomes(added["choice"]["explain"])
    assert seen["onnx@CPUExecutionProvider"] == ("refused", "the runtime onnx is not installed")
    assert seen["wrong@cpu"][0] == "rejected"
    assert "disagrees with the golden set" in seen["wrong@cpu"][1]
    answers(device, "both")
    bare, other = device.folder / "bare.tflite", device.folder / "other.onnx"
    bare.write_bytes(tflite_models.linear())
    assert device.json("models", "add", bare)["chosen"] == "fp32@cpu"
    answers(device, "bare")
    other.write_bytes(onnx_models.linear())
    refused = device.cli("models", "add", other, status=1).stderr
    assert "the runtime onnx is not installed" in refused
    assert "hint: pip install 'edge-agent[onnx]'" in refused
    damaged = device.folder / "damaged.tflite"
    damaged.write_bytes(tflite_models.linear()[:-40])
    assert "damaged or cut short" in device.cli("models", "add", damaged, status=1).stderr
    levels = {row["text"]: row["level"] for row in device.json("doctor")["findings"] if row["check"] == "runtime"}
    assert "error" not in levels.values()
    device.restart(signal.SIGKILL)
    answers(device, "both")
    assert [row["backend"] for row in device.json("status")["loaded"]] == ["cpu"]
    assert device.stop() == 0


@pytest.mark.slow
def test_a_device_without_any_runtime_manages_and_says_clearly_why_it_adds_nothing(device_with):
    device = device_with("no-runtime", requirements())
    assert device.json("detect")["runtimes"] == {
        "onnx": {"reason": "not installed"},
        "tflite": {"reason": "not installed"},
    }
    device.start()
    assert device.json("status")["models"] == []
    assert device.json("models", "list")["models"] == []
    for name, data in (("a.tflite", tflite_models.linear()), ("b.onnx", onnx_models.linear())):
        path, runtime = device.folder / name, name.partition(".")[2]
        path.write_bytes(data)
        refused = device.cli("models", "add", path, status=1).stderr
        extra = {"tflite": "litert", "onnx": "onnx"}[runtime]
        assert f"the runtime {runtime} is not installed\n" in refused
        assert f"hint: pip install 'edge-agent[{extra}]'\n" in refused
        assert not device.json("models", "check", path, status=1)["runs"]
    refused = device.cli("models", "add", both(device.folder / "both.edgemodel"), status=1).stderr
    assert "hint: pip install 'edge-agent[onnx]' or pip install 'edge-agent[litert]'" in refused
    findings = json.loads(device.cli("doctor", "--json", status=1).stdout)["findings"]
    errors = [row for row in findings if row["level"] == "error"]
    assert [row["text"] for row in errors] == ["no inference runtime works here: no model can answer"]
    assert "edge-agent[litert]" in errors[0]["mend"]
    assert device.json("store", "verify")["ok"]
    assert device.stop() == 0


@pytest.mark.slow
def test_a_broken_runtime_is_named_with_its_mend(device_with):
    device = device_with("tflite-runtime-numpy2", NUMPY_2)
    device.start()
    path = device.folder / "a.tflite"
    path.write_bytes(tflite_models.linear())
    refused = device.cli("models", "add", path, status=1).stderr
    assert "the runtime tflite does not work here: tflite-runtime: it was built for numpy 1" in refused
    findings = json.loads(device.cli("doctor", "--json", status=1).stdout)["findings"]
    (broken,) = (row for row in findings if "does not work" in row["text"])
    assert (broken["level"], broken["mend"]) == ("warning", "pip install 'numpy<2'")
