"""Models in memory as a user sees them: the configuration, the repository API and the parameters of a request."""

from __future__ import annotations

import json
import time

import numpy as np
import onnxruntime
import pytest

from agent.infer.landlock import abi_version
from agent.store import stream
from tests import onnx_models
from tests.core.test_daemon import X, linear_file
from tests.serve.running import ask, post


def in_memory(device):
    return {row["model"]: row["pinned"] for row in device.json("status")["loaded"]}


def wait_for(device, wanted):
    deadline = time.monotonic() + 30
    while in_memory(device) != wanted:
        assert time.monotonic() < deadline, (in_memory(device), wanted)
        time.sleep(0.05)


def repository(device, model, what, **parameters):
    body = json.dumps({"parameters": parameters}).encode()
    status, said, _ = ask(device.run / "infer.sock", post(f"/v2/repository/models/{model}/{what}", body))
    assert status == 200, said


def test_what_the_configuration_wants_in_memory_is_there_after_a_start(agent):
    agent.config.write_text('[memory]\npreload = ["a", "unknown"]\npin = ["b", "gone"]\n')
    agent.start()
    for name in "abc":
        agent.cli("models", "add", linear_file(agent.folder, ord(name)), "--name", name)
    agent.restart()
    wait_for(agent, {"a": False, "b": True})
    log = agent.log.read_text()
    assert "model unknown is not loaded ahead" in log
    assert "model gone is not pinned" in log


def test_a_model_is_loaded_unloaded_pinned_and_kept_as_asked(running):
    running.cli("models", "add", linear_file(running.folder, 1), "--name", "m")
    wait_for(running, {"m": False})
    repository(running, "m", "unload")
    wait_for(running, {})
    repository(running, "m", "load", pin=True)
    wait_for(running, {"m": True})
    with running.client() as client:
        client.infer("m", {"x": X}, parameters={"pin": False, "keep_alive": 0})
        wait_for(running, {})
        assert running.json("status")["memory"]["held_mb"] == 0
        assert client.infer("m", {"x": X})["y"].shape == (1, 4)
    wait_for(running, {"m": False})


@pytest.mark.skipif(abi_version() == 0, reason="without Landlock nothing is prepared")
def test_a_prepared_form_is_encrypted_used_lost_without_harm_and_made_anew(running):
    """Three hundred small layers: most of a load is the graph, so that the prepared file gains on any machine."""
    data = onnx_models.heavy(side=64, layers=300)
    model = running.folder / "deep.onnx"
    model.write_bytes(data)
    x = np.ones((1, 64), np.float32)
    expected = onnxruntime.InferenceSession(data).run(None, {"x": x})[0]

    def prepared():
        versions = running.json("models", "show", "deep")["versions"].values()
        return [record["part"] for version in versions for record in version["forms"].values() if record.get("part")]

    def answers():
        with running.client() as client:
            result = client.infer("deep", {"x": x})
        np.testing.assert_allclose(result["y"], expected, rtol=1e-4, atol=1e-5)
        assert result.parameters["degraded"] is False

    running.cli("models", "add", model, "--name", "deep")
    answers()
    if not prepared():  # on a device where the plain model answers as soon
        return
    assert running.json("status")["loaded"][0]["form"] != "plain"
    running.stop()
    for file in (running.state / "store" / "blobs").iterdir():
        if len(file.name) == 64:
            text = bytearray(file.read_bytes())
            assert b"ORTM" not in text
            if len(text) != stream.payload_size(len(data)):  # the model as it came stays whole
                text[-1] ^= 1
                file.write_bytes(bytes(text))
    running.start()
    answers()
    wait_until_reviewed(running)
    assert prepared()
    repository(running, "deep", "unload")
    answers()


def wait_until_reviewed(device):
    deadline = time.monotonic() + 120
    while device.json("status")["under_way"] is not None or "is prepared anew" not in device.log.read_text():
        assert time.monotonic() < deadline, device.log.read_text()
        time.sleep(0.1)
