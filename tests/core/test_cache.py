"""Kept answers as a user sees them: manifest, configuration and its reload, an update, statistics, the commands."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest
from agent.client import Client
from tests import onnx_models
from tests.core.test_daemon import X, linear_file, reference, sha
from tests.serve.running import ask, get


def bundle(path, seed, version, **cache):
    data = onnx_models.linear(seed)
    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": "m",
            "version": version,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            "variants": [
                {"id": "fp32", "runtime": "onnx", "precision": "fp32",
                 "file": {"name": "m.onnx", "sha256": sha(data), "size": len(data)}},
            ],
            "cache": cache or None,
        }
    )  # fmt: skip
    with path.open("wb") as file:
        write(manifest, {"m.onnx": data}, file)
    return path


def kept(device, **more):
    """The one row of what is kept."""
    (row,) = device.json("cache", "show", *more.values())["caches"]
    return row


def said(client, x=X, **parameters):
    return client.infer("m", {"x": x}, parameters=parameters).parameters["cache"]


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_manifest_asks_for_it_and_an_update_computes_the_hottest_again(running):
    running.cli("models", "add", bundle(running.folder / "1.edgemodel", 1, "1.0.0", ttl_s=600, max_mb=1, prewarm=True))
    with running.client() as client:
        first = client.infer("m", {"x": X})
        assert first.parameters["cache"] == "miss"
        hit = client.infer("m", {"x": X})
        assert hit.parameters["cache"] == "hit"
        np.testing.assert_array_equal(hit["y"], first["y"])
        assert said(client, X, cache=False) == "off"
        assert [said(client, X + 1) for _ in range(3)] == ["miss", "hit", "hit"]
        row = kept(running)
        assert (row["version"], row["hits"], row["misses"], row["entries"]) == ("1.0.0", 3, 2, 2)
        assert sorted(one["uses"] for one in kept(running, model="m")["hottest"]) == [2, 3]
        stats = client.statistics("m")[0]
        assert stats["cache"]["hits"] == 3
        assert stats["inference_stats"]["cache_hit"]["count"] == 3
        status, metrics, _ = ask(running.run / "infer.sock", get("/metrics"))
        assert status == 200
        assert b'edge_agent_cache_requests_total{model="m",result="hit"} 3\n' in metrics
        assert running.json("status")["memory"]["cached_mb"] == pytest.approx(row["bytes"] / (1 << 20), abs=0.1)
        assert "cache      2 answers of 1 model" in running.cli("status").stdout

        running.cli("models", "add", bundle(running.folder / "2.edgemodel", 2, "2.0.0", ttl_s=600, prewarm=True))
        running.cli("models", "activate", "m", "2.0.0")
        until(lambda: kept(running)["rewarmed"] == 2)
        now = client.infer("m", {"x": X})
        np.testing.assert_allclose(now["y"], reference(onnx_models.linear(2)), rtol=1e-4)
        assert now.parameters["cache"] == "hit"
        assert now.model_version == "2.0.0"

        assert "forgotten" in running.cli("cache", "clear", "m").stdout
        assert kept(running)["entries"] == 0
        assert said(client) == "miss"
        assert "no such model" in running.cli("cache", "clear", "n", status=1).stderr


def test_the_owner_of_the_device_decides_and_a_reload_is_enough(agent):
    agent.config.write_text("[models.bare]\ncache = {ttl_s = 600, prewarm = true}\n[models.m]\ncache = false\n")
    agent.start()
    agent.cli("models", "add", linear_file(agent.folder, 1), "--name", "bare")
    agent.cli("models", "add", bundle(agent.folder / "m.edgemodel", 1, "1.0.0", ttl_s=600))

    def seen(model):
        with agent.client() as client:
            return [client.infer(model, {"x": X}).parameters["cache"] for _ in range(2)]

    assert seen("bare") == ["miss", "hit"]
    assert seen("m") == ["off", "off"]
    agent.config.write_text("[models.bare]\ncache = false\n")
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: seen("bare") == ["off", "off"])
    assert seen("m") == ["miss", "hit"]
    assert [row["model"] for row in agent.json("status")["caches"]] == ["m"]


def test_rights_come_before_kept_answers_and_their_figures(agent):
    agent.config.write_text("[access.models.m]\n[models.m]\ncache = {ttl_s = 600}\n")
    agent.folder.chmod(0o755)
    agent.start()
    agent.cli("models", "add", linear_file(agent.folder, 1), "--name", "m")
    with agent.client() as client:
        assert [said(client) for _ in range(2)] == ["miss", "hit"]
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    (agent.run / "infer.sock").chmod(0o666)
    child = os.fork()
    if child == 0:  # somebody whom no rule names
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            body = json.dumps(
                {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": X.ravel().tolist()}]}
            ).encode()
            head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            refused, text, _ = ask(agent.run / "infer.sock", head + body)
            _, metrics, _ = ask(agent.run / "infer.sock", get("/metrics"))
            code = 0 if refused == 403 and b"hit" not in text and b'model="m"' not in metrics else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with agent.client() as client:
        assert isinstance(client, Client)
        assert kept(agent)["hits"] == 1
