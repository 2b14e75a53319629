"""Live adaptation of a real daemon: a small recorded machine whose files change, clients that go on asking."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest

from agent.base.errors import PeerError
from tests import onnx_models
from tests.core.test_daemon import X, bundle, linear_file, reference
from tests.hardware.sysroot import build, meminfo
from tests.serve.running import ask as fetch
from tests.serve.running import get

ZONE = "sys/class/thermal/thermal_zone0"
CALM_PSI = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
TRIALS = "[selection]\nmin_rounds = 4\nmax_rounds = 4\n"
QUICK = "interval_s = 0.05\nstep_down_s = 0.15\nstep_up_s = 0.5\n"


def deep(seed=0, layers=400, noise=0.0):
    """The function of ``onnx_models.linear``, through many small steps that change nothing."""
    weights = np.random.default_rng(seed).standard_normal((16, 4)).astype(np.float32)
    weights += noise * np.random.default_rng(99).standard_normal((16, 4)).astype(np.float32)
    helper = onnx_models.helper
    names = ["h0", *(f"h{index}" for index in range(1, layers)), "y"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h0"])] + [
        helper.make_node(("Add", "Sub")[i % 2], [names[i], "c"], [names[i + 1]]) for i in range(layers)
    ]
    constants = [onnx_models.constant("w", weights), onnx_models.constant("c", np.float32(0.5))]
    return onnx_models.model(
        nodes, [onnx_models.tensor("x", ["n", 16])], [onnx_models.tensor("y", ["n", 4])], constants
    )


FINE, ROUGH = deep(), deep(layers=2, noise=0.4)
EXPECTED = {"fine": reference(FINE), "rough": reference(ROUGH)}


def heat(root, degrees):
    build(root, {f"{ZONE}/temp": f"{degrees}000\n"})


@pytest.fixture
def device(agent):
    """A daemon that reads a recorded machine's sensors, with a model whose better variant costs far more."""
    root = agent.folder / "machine"
    files = {
        f"{ZONE}/type": "cpu-thermal\n",
        f"{ZONE}/temp": "50000\n",
        f"{ZONE}/trip_point_0_type": "passive\n",
        f"{ZONE}/trip_point_0_temp": "85000\n",
        "proc/meminfo": meminfo(4_000_000, 3_000_000),
        "proc/pressure/memory": CALM_PSI,
    }
    agent.root = build(root, files)
    agent.config.write_text(f'{TRIALS}[governor]\nroot = "{root}"\n{QUICK}')
    agent.start()
    variants = {"fine": ("fp32", FINE), "rough": ("int8", ROUGH)}
    path = bundle(agent.folder / "m.edgemodel", variants, golden_from=FINE, threshold=0.3, prefer="accuracy")
    agent.cli("models", "add", path)
    return agent


def ask(client, **parameters):
    """What an answer says of itself, its numbers checked against the variant that it names."""
    answer = client.infer("m", {"x": X}, parameters=parameters)
    np.testing.assert_allclose(answer["y"], EXPECTED[answer.parameters["variant"]], rtol=1e-3, atol=1e-3)
    return answer.parameters


class Clients:
    """Threads that ask without a pause; whatever fails is kept."""

    def __init__(self, device, count=3):
        self.seen, self.errors, self._stop = [], [], threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(device,)) for _ in range(count)]

    def _run(self, device):
        try:
            with device.client() as client:
                while not self._stop.is_set():
                    self.seen.append(ask(client))
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        while not self.seen and not self.errors:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def wait_until(device, condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, (device.json("status")["governor"], device.log.read_text()[-2000:])
        time.sleep(0.05)


def variant_now(device):
    with device.client() as client:
        return ask(client)["variant"]


def test_a_heat_wave_steps_down_and_back_and_no_request_fails(device):
    with device.client() as client:
        said = ask(client)
        assert (said["variant"], said["degraded"]) == ("fine", False)
    with Clients(device) as clients:
        heat(device.root, 84)
        wait_until(device, lambda: clients.seen[-1]["variant"] == "rough")
        status = device.json("status")
        level = status["governor"]["levels"]["heat"]
        assert level["level"] == 1
        assert "its trip point" in level["why"]
        assert level["for_s"] >= 0
        assert status["health"] == "degraded"
        for command in ("status", "doctor"):
            assert "stepped down: heat: cpu-thermal 84" in device.cli(command, status=None).stdout
        heat(device.root, 50)
        wait_until(device, lambda: clients.seen[-1]["variant"] == "fine")
    assert clients.errors == []
    for said in clients.seen:
        assert said["requested_variant"] == "fine"
        assert said["degraded"] is (said["variant"] == "rough")
        if said["degraded"]:
            assert said["degraded_because"].startswith(("governor: heat: cpu-thermal", "fine@CPU"))
    assert device.json("status")["governor"]["switches"] == 2
    assert device.json("status")["health"] == "healthy"


def test_what_a_request_asks_for_holds_whatever_the_heat(device):
    heat(device.root, 84)
    wait_until(device, lambda: variant_now(device) == "rough")
    with device.client() as client:
        said = ask(client, variant="fine")
        assert (said["variant"], said["requested_variant"], said["degraded"]) == ("fine", "fine", False)
        shown = {row["variant"]: row["on_request"] for row in device.json("status")["loaded"]}
        assert shown == {"fine": True, "rough": False}
        with pytest.raises(PeerError, match=r"variant: model 'm' has fine@.*rough@"):
            ask(client, variant="int4")
        with pytest.raises(PeerError, match="max_latency_ms: 1e-06 is less than"):
            ask(client, max_latency_ms=1e-6)
        with pytest.raises(PeerError, match=r"min_quality: 1\.5 is more than"):
            ask(client, min_quality=1.5)
        assert ask(client, min_quality=0.99)["variant"] == "fine"


def test_memory_pressure_lets_idle_models_go_first(device):
    device.cli("models", "add", linear_file(device.folder, 3), "--name", "idle")
    wait_until(device, lambda: {row["model"] for row in device.json("status")["loaded"]} >= {"idle"})
    with Clients(device, 1) as clients:
        build(device.root, {"proc/pressure/memory": CALM_PSI.replace("some avg10=0.00", "some avg10=55.00")})
        wait_until(device, lambda: "idle" not in {row["model"] for row in device.json("status")["loaded"]})
        build(device.root, {"proc/pressure/memory": CALM_PSI})
    assert clients.errors == []


def test_it_can_be_switched_off_for_one_model_and_for_all(device):
    heat(device.root, 84)
    wait_until(device, lambda: variant_now(device) == "rough")
    text = device.config.read_text()
    device.config.write_text(text + "[models.m]\ngoverned = false\n")
    device.process.send_signal(signal.SIGHUP)
    wait_until(device, lambda: variant_now(device) == "fine")
    device.config.write_text(text)
    device.process.send_signal(signal.SIGHUP)
    wait_until(device, lambda: variant_now(device) == "rough")
    device.config.write_text(text.replace("[governor]\n", "[governor]\nenabled = false\n"))
    device.process.send_signal(signal.SIGHUP)
    wait_until(device, lambda: variant_now(device) == "fine")
    assert device.json("status")["governor"]["enabled"] is False


def test_metrics_tell_the_levels(device):
    heat(device.root, 84)
    wait_until(device, lambda: variant_now(device) == "rough")
    _, text, _ = fetch(device.run / "infer.sock", get("/metrics"))
    assert b'edge_agent_governor_level{cause="heat"} 1' in text
    assert b"edge_agent_variant_switches_total 1" in text


def test_a_root_that_is_gone_is_a_warning_and_nothing_steps(device):
    device.config.write_text(f'[governor]\nroot = "{device.folder / "gone"}"\n{QUICK}')
    device.process.send_signal(signal.SIGHUP)
    wait_until(device, lambda: "no such folder" in device.cli("doctor", status=None).stdout)
    assert variant_now(device) == "fine"
