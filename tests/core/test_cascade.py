"""A cascade on a real daemon: from the manifest, from the configuration, switched off; its figures for people."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from tests.core.test_daemon import bundle
from tests.infer.test_cascade import LARGE, SMALL, expected, linear, rows
from tests.serve.running import ask as fetch
from tests.serve.running import get

SMALL_FILE, LARGE_FILE = linear(SMALL), linear(LARGE)
CASCADE = {"first": "small", "then": "large", "threshold": 0.8}
MIX = (True, False, True, True)


def add(device, **policy):
    variants = {"large": ("fp32", LARGE_FILE), "small": ("int8", SMALL_FILE)}
    path = bundle(
        device.folder / "m.edgemodel", variants, golden_from=LARGE_FILE, threshold=0.0, prefer="accuracy", **policy
    )
    device.cli("models", "add", path)


@pytest.fixture
def device(agent):
    agent.config.write_text("[selection]\nmin_rounds = 4\nmax_rounds = 4\n[governor]\nenabled = false\n")
    agent.start()
    return agent


def configure(device, text):
    base = device.config.read_text().partition("[models")[0]
    device.config.write_text(base + text)
    device.process.send_signal(signal.SIGHUP)


def wait_for(device, wanted):
    deadline = time.monotonic() + 30
    while [(row["in_force"], row["why"]) for row in device.json("status")["cascades"]] != wanted:
        assert time.monotonic() < deadline, (device.json("status")["cascades"], device.log.read_text())
        time.sleep(0.05)


def test_a_manifest_brings_its_cascade_and_the_figures_tell_what_it_saved(device):
    add(device, cascade=CASCADE)
    (row,) = device.json("status")["cascades"]
    assert (row["first"], row["then"], row["threshold"], row["in_force"]) == ("small", "large", 0.8, True)
    x = rows(*MIX)
    with device.client() as client:
        answer = client.infer("m", {"x": x})
        np.testing.assert_allclose(answer["y"], expected(x, MIX), rtol=1e-3, atol=1e-4)
        told = answer.parameters
        assert (told["cascade"], told["cascade_rows"], told["cascade_escalated"]) == ("both", 4, 1)
        assert told["degraded"] is False
        assert client.infer("m", {"x": x[:1]}).parameters["cascade"] == "first"
        picked = client.infer("m", {"x": x}, parameters={"variant": "large"})
        np.testing.assert_allclose(picked["y"], x @ LARGE, rtol=1e-3, atol=1e-4)
        (stats,) = client.statistics()
    assert (stats["cascade_stats"]["first"], stats["cascade_stats"]["then"]) == (4, 1)
    _, text, _ = fetch(device.run / "infer.sock", get("/metrics"))
    assert b'edge_agent_cascade_rows_total{model="m",version="1.0.0",stage="then"} 1' in text


def test_the_configuration_sets_a_cascade_and_takes_one_away(device):
    add(device)
    assert device.json("status")["cascades"] == []
    configure(device, '[models.m.cascade]\nfirst = "small"\nthen = "large"\nthreshold = 0.8\n')
    wait_for(device, [(True, "")])
    x = rows(*MIX)
    with device.client() as client:
        np.testing.assert_allclose(client.infer("m", {"x": x})["y"], expected(x, MIX), rtol=1e-3, atol=1e-4)
    configure(device, '[models.m.cascade]\nfirst = "tiny"\nthen = "large"\nthreshold = 0.8\n')
    wait_for(device, [(False, "there is no variant tiny")])
    configure(device, "[models.m]\ncascade = false\n")
    wait_for(device, [])
    with device.client() as client:
        assert "cascade" not in client.infer("m", {"x": x}).parameters
    shown = device.cli("config", "show").stdout
    assert "m = {" in shown
    assert "None" not in shown
