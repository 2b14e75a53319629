"""Jobs of the fleet that change models, over the real path, and what answers afterwards."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from agent.base.errors import NotFoundError
from tests import onnx_models
from tests.core.fleet_device import connected
from tests.core.test_daemon import X, bundle

SHORT_TRIALS = "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n[probation]\nseconds = 1"
VERSIONS = {"1.0.0": 1, "2.0.0": 2, "3.0.0": 3}


def reference(version):
    data = onnx_models.linear(VERSIONS[version])
    return onnxruntime.InferenceSession(data).run(None, {"x": X})[0]


def add(device, name, version):
    data = onnx_models.linear(VERSIONS[version])
    path = bundle(device.folder / "next.edgemodel", {"fp32": ("fp32", data)}, name=name, version=version)
    device.cli("models", "add", path)


def require_answer(device, name, version):
    """The version answers, by its own weights."""
    with device.client() as client:
        answer = client.infer(name, {"x": X})
    assert answer.model_version == version
    np.testing.assert_allclose(answer["y"], reference(version), rtol=1e-4)


@pytest.fixture(scope="module")
def fleet_device():
    """A connected device; each test adds the models that it uses."""
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    try:
        with connected(folder, config=SHORT_TRIALS) as device:
            yield device
            assert device.stop() == 0
            assert "Traceback" not in device.logs()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two(fleet_device, request):
    """A model of its own with versions 1.0.0 and 2.0.0, the second active; its name."""
    name = request.node.name.removeprefix("test_")[:40].strip("_").replace("[", "-").replace("]", "")
    for version in ("1.0.0", "2.0.0"):
        add(fleet_device, name, version)
    return name


def failed(device, op, args, **fields):
    """The reason for which a job fails."""
    ended = device.fleet.ended(device.fleet.give(op, args, **fields))
    assert ended["state"] == "failed", ended
    return ended["error"]


def test_another_version_answers(fleet_device, two):
    result = fleet_device.fleet.done("model.activate", {"model": two, "version": "1.0.0"})
    assert result == {"model": two, "version": "1.0.0", "chosen": "fp32@CPUExecutionProvider"}
    require_answer(fleet_device, two, "1.0.0")
    rows = ("name", two), ("active", "1.0.0"), ("previous", "2.0.0")
    fleet_device.fleet.reports(
        "the other is active", lambda said: any(all(model[k] == v for k, v in rows) for model in said["models"])
    )


def test_back_and_forth(fleet_device, two):
    for version in ("1.0.0", "2.0.0", "1.0.0"):
        assert fleet_device.fleet.done("model.rollback", {"model": two})["version"] == version
        require_answer(fleet_device, two, version)


def test_what_is_installed_is_verified_before_it_answers(fleet_device, two):
    assert fleet_device.fleet.done("model.install", {"model": two, "version": "1.0.0"})["version"] == "1.0.0"
    require_answer(fleet_device, two, "1.0.0")


def test_damaged_does_not_answer(fleet_device, two):
    """Its payload is hurt after it was added: the job fails, the version before goes on."""
    before = set((fleet_device.state / "store" / "blobs").iterdir())
    add(fleet_device, two, "3.0.0")
    fleet_device.fleet.done("model.activate", {"model": two, "version": "2.0.0"})
    (payload,) = [
        path
        for path in set((fleet_device.state / "store" / "blobs").iterdir()) - before
        if len(path.name) == 64 and path.stat().st_size > 300
    ]
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    error = failed(fleet_device, "model.install", {"model": two, "version": "3.0.0"})
    assert "damaged" in error["text"]
    require_answer(fleet_device, two, "2.0.0")
    fleet_device.fleet.destroy_done("model.remove", {"model": two, "version": "3.0.0"})


def test_what_is_not_there_cannot_be_activated(fleet_device, two):
    for op in ("model.activate", "model.install"):
        error = failed(fleet_device, op, {"model": two, "version": "9.0.0"})
        assert "no version '9.0.0'" in error["text"]
        assert "no such model" in failed(fleet_device, op, {"model": "nothing", "version": "1.0.0"})["text"]
    require_answer(fleet_device, two, "2.0.0")


def test_nothing_before_the_first(fleet_device):
    add(fleet_device, "single", "1.0.0")
    assert "no previous version" in failed(fleet_device, "model.rollback", {"model": "single"})["text"]
    require_answer(fleet_device, "single", "1.0.0")


def test_a_pin_holds_against_every_job_until_it_is_taken_away(fleet_device, two):
    fleet = fleet_device.fleet
    assert fleet.done("model.pin", {"model": two}) == {"model": two, "pinned": True}
    for op, args in (
        ("model.activate", {"model": two, "version": "1.0.0"}),
        ("model.install", {"model": two, "version": "1.0.0"}),
        ("model.rollback", {"model": two}),
    ):
        error = failed(fleet_device, op, args)
        assert "pinned to 2.0.0" in error["text"]
        assert "model.pin" in error["hint"]
    for args in ({"model": two}, {"model": two, "version": "2.0.0"}):
        assert "pinned" in fleet.ended(fleet.destroy("model.remove", args))["error"]["text"]
    require_answer(fleet_device, two, "2.0.0")
    fleet.destroy_done("model.remove", {"model": two, "version": "1.0.0"})  # what does not answer may go
    fleet.done("model.pin", {"model": two, "pinned": False})
    fleet.destroy_done("model.remove", {"model": two})


def test_removed_is_gone(fleet_device, two):
    fleet = fleet_device.fleet
    result = fleet.destroy_done("model.remove", {"model": two, "version": "1.0.0"})
    assert result["freed_bytes"] > 0
    assert fleet.ended(fleet.destroy("model.remove", {"model": two, "version": "1.0.0"}))["state"] == "failed"
    require_answer(fleet_device, two, "2.0.0")
    fleet.destroy_done("model.remove", {"model": two})
    with fleet_device.client() as client, pytest.raises(NotFoundError):
        client.infer(two, {"x": X})


def test_tried_anew_on_request(fleet_device, two):
    result = fleet_device.fleet.done("bench.run", {"model": two})
    assert result == {"model": two, "version": "2.0.0", "chosen": "fp32@CPUExecutionProvider"}
    assert "no such model" in failed(fleet_device, "bench.run", {"model": "nothing"})["text"]


def test_flushed_models_load_again_when_they_are_asked(fleet_device, two):
    require_answer(fleet_device, two, "2.0.0")
    assert two in {row["model"] for row in fleet_device.status()["loaded"]}
    assert fleet_device.fleet.done("cache.flush")["unloaded"] >= 1
    assert fleet_device.status()["loaded"] == []
    require_answer(fleet_device, two, "2.0.0")


def test_the_store_is_scrubbed_swept_and_gets_another_key(fleet_device, two):
    fleet = fleet_device.fleet
    scrubbed = fleet.done("store.scrub")
    assert scrubbed["ok"] is True
    assert scrubbed["blobs"] >= 2
    litter = fleet_device.state / "store" / "blobs" / ("ab" * 32)
    litter.write_bytes(bytes(1000))
    assert fleet.done("store.gc")["freed_bytes"] >= 1000
    assert not litter.exists()
    before = fleet_device.status()
    rotated = fleet.done("store.rotate-key")
    with fleet_device.admin() as admin:
        assert admin.call("GET", "/v1/store")["key_id"] == rotated["new_key"] != rotated["old_key"]
    assert fleet_device.status()["generation"] > before["generation"]
    require_answer(fleet_device, two, "2.0.0")


BAD_ARGS = {
    "model.activate": ({}, {"model": "m"}, {"model": 1, "version": "1"}, {"model": "m", "version": "1", "force": True}),
    "model.install": ({"version": "1.0.0"}, {"model": "m", "version": None}),
    "model.rollback": ({}, {"model": "m", "version": "1.0.0"}),
    "model.pin": ({"model": "m", "pinned": "yes"}, {"pinned": True}),
    "bench.run": ({}, {"model": ["m"]}),
    "cache.flush": ({"all": True},),
    "config.apply": ({}, {"config": []}, {"config": {"link": 1}}, {"config": {"no-such": {}}}),
    "diagnostics.collect": ({"secrets": True},),
    "logs.tail": ({"lines": 0}, {"lines": 501}, {"lines": 1.5}, {"lines": "10"}, {"lines": True}),
    "maintenance.plan": ({}, {"run": []}, {"run": ["no-such-task"]}, {"run": "disk"}),
    "ping": ({"x": 1},),
    "store.gc": ({"x": None},),
    "store.scrub": ({"x": {}},),
    "store.rotate-key": ({"key": "mine"},),
    "agent.update": (
        {},
        {"version": 1},
        {"version": "1.0"},
        {"version": "1.0.0/../x"},
        {"version": "1.0.0", "now": True},
    ),
    "agent.restart": ({"now": True},),
    "device.reboot": ({"now": True},),
}


@pytest.mark.parametrize("op", BAD_ARGS)
def test_wrong_arguments_are_told_at_once(fleet_device, op):
    for args in BAD_ARGS[op]:
        ended = fleet_device.fleet.ended(fleet_device.fleet.give(op, args))
        assert (ended["state"], ended["error"]["code"]) == ("rejected", "bad_args"), (args, ended)
        assert ended["attempt"] == 0
