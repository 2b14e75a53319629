"""A second, real execution provider: the whole daemon in an environment whose ONNX Runtime brings OpenVINO.

That package is none of the agent's own: it stands for whatever a board's maker installs. Another environment, whose
ONNX Runtime lacks the provider, takes the same state folder over: for the daemon the provider is gone.
"""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest
from agent.client import AdminClient
from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import linear_file, reference
from tests.environments import environment, requirements

OPENVINO, CPU = "OpenVINOExecutionProvider", "CPUExecutionProvider"
WANTED = [*requirements(), "numpy>=1.24", "onnxruntime-openvino>=1.20"]
SIDE = 65536
#: Measured: 40 additions and products in a row take OpenVINO, which makes one pass of them, an eighth of the CPU
#: provider's time; a single small product takes it four times as long.
CHAIN = onnx_models.chain(SIDE)
X = np.random.default_rng(1).random((1, SIDE), dtype=np.float32)
#: A review that does not end within the test: what it will find out is not known yet.
SLOW_REVIEW = "[selection]\nmin_rounds = 10000\nmax_rounds = 10000\n"
#: A review that ends within the test, but after the first requests.
UNHURRIED_REVIEW = "[selection]\nmin_rounds = 100\nmax_rounds = 100\n"

pytestmark = pytest.mark.slow


@pytest.fixture
def device(short_dir):
    """A device with OpenVINO, whose profile names it first. Not started."""
    device = Agent(short_dir, environment("openvino", WANTED))
    profiles = short_dir / "hw_profiles"
    profiles.mkdir()
    (profiles / "here.toml").write_text(
        f'id = "here"\ntitle = "here"\nproviders = {json.dumps([OPENVINO, CPU])}\n'
        '[match]\narch = ["x86_64", "aarch64"]\norder = 1\n'
    )
    device.config.write_text("")
    yield device
    if device.process is not None:
        device.process.kill()
        device.process.wait()


def move(device, python, config=""):
    """The power goes, and the device comes back with another installation."""
    device.python = str(python)
    device.config.write_text(config)
    device.restart(signal.SIGKILL)


def bundle(path):
    """Two variants of one model and its golden set."""
    x = np.random.default_rng(7).random((4, SIDE), dtype=np.float32)
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": x, "output/y": reference(CHAIN, x)})
    files = {"one.onnx": CHAIN, "two.onnx": CHAIN, "golden.npz": stream.getvalue()}

    def ref(name):
        return {"name": name, "sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}

    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": "chain",
            "version": "1.0.0",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, SIDE]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, SIDE]}],
            "variants": [
                {"id": name, "runtime": "onnx", "precision": "fp32", "file": ref(f"{name}.onnx")}
                for name in ("one", "two")
            ],
            "golden": {"file": ref("golden.npz"), "metric": "cosine", "threshold": 0.99},
        }
    )
    with path.open("wb") as target:
        write(manifest, files, target)
    return path


def add(device, path):
    """The daemon's answer, and the candidates in the order in which they were tried."""
    events = []
    with path.open("rb") as file, AdminClient(device.run / "admin.sock") as admin:
        answer = admin.call(
            "POST", "/v1/models", {"file_name": path.name}, descriptors=(file.fileno(),), on_event=events.append
        )
    return answer, [event["candidate"] for event in events if event.get("stage") == "try"]


def ask(device, model="chain"):
    """What an answer says of itself; that it is right is checked."""
    data, x = (CHAIN, X) if model == "chain" else (onnx_models.linear(), X[:, :16])
    with device.client() as client:
        answer = client.infer(model, {"x": x})
    np.testing.assert_allclose(answer["y"], reference(data, x), rtol=1e-3)
    return answer.parameters


def row(device, model="chain"):
    """The model's row among what ``status`` says is loaded."""
    (found,) = (row for row in device.json("status")["loaded"] if row["model"] == model)
    return found


def explained(device, model="chain"):
    document = device.json("models", "explain", model)
    return document, {row["id"]: row for row in document["candidates"]}


def wait_for_review(device, provider, model="chain"):
    """Until the review after the start is over, with ``provider`` chosen."""
    deadline = time.monotonic() + 240
    while True:
        chosen = explained(device, model)[0]["winner"]
        if chosen.endswith(f"@{provider}") and device.json("status")["under_way"] is None:
            return
        assert time.monotonic() < deadline, (chosen, device.log.read_text())
        time.sleep(0.1)


def contents(python):
    """Every file of an environment's packages, but for what Python caches."""
    packages = Path(python).parents[1] / "lib"
    return {
        (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        for path in packages.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_provider_is_tried_and_chosen_goes_away_and_comes_back(device):
    openvino, before = device.python, contents(device.python)
    detected = device.json("detect")
    assert detected["plan"]["providers"] == [OPENVINO, CPU]
    assert set(detected["runtimes"]["onnx"]["providers"]) >= {OPENVINO, CPU}
    device.start()

    # It is tried in the profile's order, agrees with the golden set, and wins where it is faster.
    added, tried = add(device, bundle(device.folder / "chain.edgemodel"))
    assert [candidate.partition("@")[2] for candidate in tried] == [OPENVINO, OPENVINO, CPU, CPU]
    assert added["chosen"].endswith(f"@{OPENVINO}")
    _, rows = explained(device)
    assert {candidate["outcome"] for candidate in rows.values()} == {"winner", "lost"}
    assert all(candidate["measured"]["agreement"] > 0.99 for candidate in rows.values())
    said = ask(device)
    assert (said["backend"], said["requested_backend"], said["degraded"]) == (OPENVINO, OPENVINO, False)
    assert (row(device)["backend"], row(device)["degraded"]) == (OPENVINO, False)
    assert ask(device)["queue_us"] > 0  # in a thread, however fast it is: a run there cannot be ended

    # Where it is slower, the CPU is chosen, whatever the profile's order.
    added, tried = add(device, linear_file(device.folder))
    assert tried == [f"fp32@{OPENVINO}", f"fp32@{CPU}"]
    assert added["chosen"] == f"fp32@{CPU}"

    # Gone: the CPU answers at once, and says so, until there has been time to measure.
    move(device, sys.executable, SLOW_REVIEW)
    said = ask(device)
    assert (said["backend"], said["requested_backend"], said["degraded"]) == (CPU, OPENVINO, True)
    seen = row(device)
    assert (seen["backend"], seen["degraded"]) == (CPU, True)
    assert f"provider {OPENVINO} is not in this ONNX Runtime" in seen["reason"]
    assert ask(device, "linear")["degraded"] is False
    assert device.json("status")["under_way"]["operation"] == "review"

    # Back before that: nothing has changed, nothing is measured anew.
    move(device, openvino)
    measured = explained(device)
    said = ask(device)
    assert (said["backend"], said["degraded"]) == (OPENVINO, False)
    wait_for_review(device, OPENVINO)
    assert explained(device) == measured

    # Gone for longer: the review chooses among what there is, and explains.
    move(device, sys.executable)
    wait_for_review(device, CPU)
    _, rows = explained(device)
    version = device.json("detect")["runtimes"]["onnx"]["version"]
    gone = rows[f"one@{OPENVINO}"]
    assert gone["outcome"] == "refused"
    assert gone["why"] == [f"{OPENVINO} is not in the installed onnx {version}"]
    assert f"{OPENVINO} is not in the installed onnx" in device.cli("models", "explain", "chain").stdout
    winner = next(candidate for candidate in rows.values() if candidate["outcome"] == "winner")
    assert winner["measured"]["key"]["runtime_version"] == version
    said = ask(device)
    assert (said["backend"], said["requested_backend"]) == (CPU, CPU)

    # And back: it is measured again and chosen again.
    move(device, openvino)
    wait_for_review(device, OPENVINO)
    said = ask(device)
    assert (said["backend"], said["requested_backend"], said["degraded"]) == (OPENVINO, OPENVINO, False)
    assert device.json("store", "verify")["ok"]
    assert device.stop() == 0
    assert contents(openvino) == before  # a runtime that somebody else installed stays as it is


def test_a_model_that_the_provider_cannot_load_runs_on_the_next(device):
    device.start()
    path = device.folder / "loop.onnx"
    path.write_bytes(onnx_models.endless(rounds=10))  # OpenVINO's provider fails at loops
    added, tried = add(device, path)
    assert tried == [f"fp32@{OPENVINO}", f"fp32@{CPU}"]
    assert added["chosen"] == f"fp32@{CPU}"
    _, rows = explained(device, "loop")
    failed = rows[f"fp32@{OPENVINO}"]
    assert failed["outcome"] == "rejected"
    (why,) = failed["why"]
    assert why.startswith("cannot load model: ONNX Runtime: ")
    assert "OpenVINO does not support the following ONNX operations" in why  # the end of a message of two thousand
    seen = row(device, "loop")
    assert (seen["backend"], seen["degraded"]) == (CPU, False)
    assert device.stop() == 0


#: Loads a model on OpenVINO, asks for the end of a run after a tenth of its time, and tells whether it ended early.
_HALTED = """
import os, sys, threading, time
import numpy as np
from agent.base.errors import DeadlineError
from agent.infer.halting import Halt
from agent.infer.runtimes.base import LoadOptions, load_runtime
session = load_runtime("onnx").load(os.open(sys.argv[1], os.O_RDONLY), LoadOptions("OpenVINOExecutionProvider"))
x = np.ones((200, 1024), np.float32)
def run(halt):
    try:
        session.run({"x": x}, ["y"], halt)
    except DeadlineError:
        return True
    return False
start = time.perf_counter()
run(None)
halt = Halt()
threading.Timer((time.perf_counter() - start) / 10, halt.request).start()
print(session.provider, session.stoppable, run(halt))
"""


def test_a_session_that_cannot_be_ended_says_so(device):
    """A provider that makes one operator of the whole model looks at no flag; the event loop is no place for it."""
    path = device.folder / "heavy.onnx"
    path.write_bytes(onnx_models.heavy(side=1024, layers=6))
    done = subprocess.run(
        [device.python, "-c", _HALTED, str(path)],
        env=device.environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    provider, stoppable, ended = done.stdout.split()  # and not a word of the runtime's
    assert provider == OPENVINO
    assert stoppable == "False" or ended == "True"


def test_after_the_new_choice_nothing_is_degraded_and_status_says_what_was_asked_for(device):
    device.start()
    add(device, bundle(device.folder / "chain.edgemodel"))
    move(device, sys.executable, UNHURRIED_REVIEW)
    assert ask(device)["degraded"]
    assert row(device)["requested_backend"] == OPENVINO
    wait_for_review(device, CPU)
    said = ask(device)
    assert (said["backend"], said["requested_backend"], said["degraded"]) == (CPU, CPU, False)
    assert (row(device)["degraded"], row(device)["reason"]) == (False, "")
