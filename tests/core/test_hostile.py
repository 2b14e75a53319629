"""The whole daemon under apps and models that mean harm: it goes on answering everybody else, and stops in time."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from agent.base.errors import AgentError
from agent.client import Client
from tests import onnx_models

X = np.ones((1, 16), np.float32)
EVER = np.array([1 << 62])


def add(agent, name, data):
    path = agent.folder / f"{name}.onnx"
    path.write_bytes(data)
    return agent.json("models", "add", path, "--name", name)


@pytest.fixture
def hogged(running):
    """A daemon with a harmless model, one whose input says how long it runs, and apps that keep asking for ever."""
    add(running, "good", onnx_models.linear())
    add(running, "loop", onnx_models.counting())
    with running.client() as client:
        client.infer("good", {"x": X})
        assert client.infer("loop", {"n": np.array([3])})["y"] == [3]
        assert client.infer("loop", {"n": np.array([3])})["y"] == [3]
    over = threading.Event()

    def hog():
        while not over.is_set():
            try:
                with Client(str(running.run / "infer.sock"), timeout=10) as client:
                    client.infer("loop", {"n": EVER})
            except AgentError:
                time.sleep(0.01)

    hogs = [threading.Thread(target=hog, daemon=True) for _ in range(6)]
    for thread in hogs:
        thread.start()
    yield running
    over.set()
    if running.process is not None:
        running.stop(signal.SIGKILL)
    for thread in hogs:
        thread.join(15)


def test_endless_requests_of_one_app_starve_nobody(hogged):
    time.sleep(0.5)
    with Client(str(hogged.run / "infer.sock"), timeout=8) as client:
        for _ in range(20):
            assert client.infer("good", {"x": X})["y"].shape == (1, 4)
        assert client.ready()
    assert hogged.json("status")["version"]


def test_the_stop_ends_them_and_says_0(hogged):
    hogged.config.write_text("")
    time.sleep(0.5)
    began = time.monotonic()
    hogged.process.send_signal(signal.SIGTERM)
    assert hogged.process.wait(timeout=45) == 0
    assert time.monotonic() - began < 40  # the unit's TimeoutStopSec is 45
    hogged.process = None


def test_memory_that_one_value_asks_for_is_refused_or_given_back(running):
    add(running, "fill", onnx_models.filling())
    with running.client() as client:
        client.infer("fill", {"n": np.array([10])})
        before = running.json("status")["process"]["rss_mb"]
        client.infer("fill", {"n": np.array([150_000_000])})
        with pytest.raises(AgentError, match="out of memory"):
            client.infer("fill", {"n": np.array([1 << 40])})
        assert client.infer("fill", {"n": np.array([10])})["y"] == [10]
    assert running.json("status")["process"]["rss_mb"] < before + 150


@pytest.mark.parametrize("name", ["state", "run"])
def test_a_folder_that_others_may_write_to_is_refused(agent, name):
    # Whoever may rename in it swaps the keys, or puts a socket of his own in the place of admin.sock.
    folder = agent.folder / name
    folder.mkdir()
    folder.chmod(0o777)
    agent.start(ready=False)
    assert agent.process.wait(timeout=30) == 1
    agent.process = None
    assert "other users may write to it" in agent.log.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of somebody else")
@pytest.mark.parametrize("name", ["state", "run"])
def test_a_folder_of_another_user_is_refused(agent, name):
    folder = agent.folder / name
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    agent.start(ready=False)
    assert agent.process.wait(timeout=30) == 1
    agent.process = None
    assert "belongs to another user" in agent.log.read_text()
