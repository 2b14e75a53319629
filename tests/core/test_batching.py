"""Micro-batching in a real daemon: asked for, measured, used, switched off, told of."""

from __future__ import annotations

import hashlib
import signal
import threading
import time

import numpy as np
import pytest

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest
from agent.infer.landlock import abi_version
from tests import onnx_models

pytestmark = pytest.mark.skipif(abi_version() == 0, reason="without Landlock nothing is tried")
SIDE = 1024
POLICY = {"max_size": 8, "max_delay_us": 500}


def bundle(folder, name, data, side, outputs, batching=None):
    file = {"name": "model.onnx", "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1", "name": name, "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, side]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, outputs]}],
            "variants": [{"id": "fp32", "runtime": "onnx", "precision": "fp32", "file": file}],
            **({"batching": batching} if batching else {}),
        }
    )  # fmt: skip
    path = folder / f"{name}.edgemodel"
    with path.open("wb") as out:
        write(manifest, {"model.onnx": data}, out)
    return path


def crowd(agent, name, side, clients=6, requests=30):
    """Each client's own rows, and what it got for them."""
    got, wrong = [], []

    def ask(number):
        generator = np.random.default_rng(number)
        with agent.client() as client:
            for _ in range(requests):
                x = generator.standard_normal((1 + number % 3, side)).astype(np.float32)
                try:
                    response = client.infer(name, {"x": x})
                    got.append((x, response))
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    return got


def batching_of(agent, name):
    return next(row["batching"] for row in agent.json("status")["loaded"] if row["model"] == name)


def test_a_model_that_gains_is_joined_and_everybody_gets_the_answer_to_his_own_rows(running, tmp_path):
    data = onnx_models.heavy(side=SIDE, layers=4)
    running.cli("models", "add", bundle(tmp_path, "wide", data, SIDE, SIDE, POLICY))
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((SIDE, SIDE)).astype(np.float32) / SIDE**0.5 for _ in range(4)]
    for x, response in crowd(running, "wide", SIDE):
        np.testing.assert_allclose(response["y"], np.linalg.multi_dot([x, *weights]), rtol=1e-2, atol=1e-3)
    told = batching_of(running, "wide")
    assert told["size"] > 1, told
    assert set(told["us_per_row"]) == {"1", "2", "4", "8"}
    with running.client() as client:
        [stats] = client.statistics("wide")
    assert stats["inference_count"] == 180
    assert stats["execution_count"] < 180
    sizes = {row["batch_size"]: row["compute_infer"]["count"] for row in stats["batch_stats"]}
    assert max(sizes) > 3, "more than one client's rows in a run"
    assert max(sizes) <= 8
    assert "runs of up to" in running.cli("models", "explain", "wide").stdout
    running.restart()
    crowd(running, "wide", SIDE, requests=3)
    assert batching_of(running, "wide")["us_per_row"] == told["us_per_row"], "measured once"


def test_where_it_does_not_pay_it_is_switched_off_and_says_so(running, tmp_path):
    running.cli("models", "add", bundle(tmp_path, "tiny", onnx_models.linear(), 16, 4, POLICY))
    assert all("batch" not in response.parameters for _, response in crowd(running, "tiny", 16, 3, 5))
    assert "does not pay" in batching_of(running, "tiny")["reason"]
    assert "batching: does not pay" in running.cli("models", "explain", "tiny").stdout


def test_the_owner_of_the_device_may_ask_for_it_and_forbid_it(agent, tmp_path):
    agent.start()
    data = onnx_models.heavy(side=SIDE, layers=4)
    agent.cli("models", "add", bundle(tmp_path, "own", data, SIDE, SIDE))
    agent.cli("models", "add", bundle(tmp_path, "theirs", data, SIDE, SIDE, POLICY))
    crowd(agent, "own", SIDE, 1, 1)
    assert batching_of(agent, "own") is None
    agent.stop()
    agent.config.write_text(
        "[models.own]\nbatching = {max_size = 4, max_delay_us = 200}\n[models.theirs]\nbatching = false\n"
    )
    agent.start()
    measured_by = time.monotonic() + 60
    crowd(agent, "theirs", SIDE, 1, 1)
    assert batching_of(agent, "theirs") is None
    while True:  # it is measured after the start, beside everything else
        crowd(agent, "own", SIDE, 1, 1)
        told = batching_of(agent, "own")
        if told["us_per_row"] or time.monotonic() > measured_by:
            break
        assert "not measured" in told["reason"]
        time.sleep(0.2)
    assert set(told["us_per_row"]) == {"1", "2", "4"}
    agent.config.write_text("[models.own]\nbatching = false\n")
    agent.process.send_signal(signal.SIGHUP)
    for _ in range(100):
        crowd(agent, "own", SIDE, 1, 1)
        if batching_of(agent, "own") is None:
            break
        time.sleep(0.05)
    assert batching_of(agent, "own") is None
