"""Models in memory as a user sees them: the configuration, the repository API and the parameters of a request."""

from __future__ import annotations

import json
import time

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
