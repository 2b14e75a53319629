"""The whole daemon: one line from a file to an answer, over restarts, damage and wrong input."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import onnxruntime
import pytest

from agent.base.errors import NotFoundError, PeerError
from agent.bundles.archive import write
from agent.bundles.manifest import Manifest
from tests import onnx_models

X = np.arange(16, dtype=np.float32).reshape(1, 16)


def reference(data, x=X):
    return onnxruntime.InferenceSession(data).run(None, {"x": x})[0]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def bundle(
    path, variants, *, golden_from=None, name="m", version="1.0.0", threshold=0.95, requires_agent=None, **policy
):
    """A bundle file of ``{id: (precision, bytes)}`` over the signature of ``onnx_models.linear``."""
    files = {f"{key}.onnx": data for key, (_, data) in variants.items()}
    golden = None
    if golden_from is not None:
        x = np.random.default_rng(7).standard_normal((64, 16)).astype(np.float32)
        stream = io.BytesIO()
        np.savez(stream, **{"input/x": x, "output/y": reference(golden_from, x)})
        files["golden.npz"] = stream.getvalue()
        golden = {
            "file": {"name": "golden.npz", "sha256": sha(files["golden.npz"]), "size": len(files["golden.npz"])},
            "metric": "top1",
            "threshold": threshold,
        }
    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": name,
            "version": version,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            "variants": [
                {
                    "id": key,
                    "runtime": "onnx",
                    "precision": precision,
                    "file": {"name": f"{key}.onnx", "sha256": sha(data), "size": len(data)},
                }
                for key, (precision, data) in variants.items()
            ],
            "golden": golden,
            "policy": policy or {"prefer": "latency"},
            "requires_agent": requires_agent,
        }
    )
    with path.open("wb") as stream:
        write(manifest, files, stream)
    return path


def linear_file(folder, seed=0, name="linear.onnx"):
    path = folder / name
    path.write_bytes(onnx_models.linear(seed))
    return path


def test_a_bare_file_answers_is_encrypted_and_survives_sigkill(running):
    path = linear_file(running.folder)
    added = running.json("models", "add", path, "--name", "tiny")
    assert added["model"] == "tiny"
    assert added["chosen"] == "fp32@CPUExecutionProvider"
    with running.client() as client:
        first = client.infer("tiny", {"x": X})
    np.testing.assert_allclose(first["y"], reference(path.read_bytes()), rtol=1e-4)
    weights = path.read_bytes()[100:164]
    stored = [file.read_bytes() for file in running.state.rglob("*") if file.is_file()]
    assert stored
    assert not any(weights in data for data in stored)

    running.restart(signal.SIGKILL)
    with running.client() as client:
        again = client.infer("tiny", {"x": X})
    np.testing.assert_array_equal(again["y"], first["y"])
    assert again.parameters["variant"] == "fp32"
    assert again.parameters["degraded"] is False


def test_sigterm_drains_and_ends_with_status_0_and_prints_nothing(agent):
    agent.start()
    assert agent.stop() == 0
    assert "stopped" in agent.log.read_text()


def test_a_request_under_way_is_answered_during_the_stop(running):
    path = running.folder / "heavy.onnx"
    path.write_bytes(onnx_models.heavy(side=1024, layers=12))
    running.cli("models", "add", path)
    answers = []

    def ask():
        with running.client() as client:
            answers.append(client.infer("heavy", {"x": np.ones((2048, 1024), np.float32)})["y"].shape)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.15)
    assert running.stop() == 0
    asking.join()
    assert answers == [(2048, 1024)]


def test_a_bundle_is_tried_the_wrong_variant_rejected_and_the_story_told(running):
    good, wrong = onnx_models.linear(0), onnx_models.linear(9)
    path = bundle(running.folder / "m.edgemodel", {"fp32": ("fp32", good), "fast": ("int8", wrong)}, golden_from=good)
    assert running.json("models", "add", path)["chosen"] == "fp32@CPUExecutionProvider"
    explained = running.json("models", "explain", "m")
    outcomes = {row["variant"]: (row["outcome"], row["why"]) for row in explained["candidates"]}
    assert outcomes["fp32"][0] == "winner"
    assert outcomes["fast"][0] == "rejected"
    assert "disagrees with the golden set: top1" in outcomes["fast"][1][0]
    text = running.cli("models", "explain", "m").stdout
    assert "fast" in text
    assert "disagrees" in text


def test_when_every_variant_is_rejected_the_reasons_are_the_error_and_nothing_is_left(running):
    good, wrong = onnx_models.linear(0), onnx_models.linear(9)
    path = bundle(running.folder / "m.edgemodel", {"bad": ("fp32", wrong)}, golden_from=good)
    failed = running.cli("models", "add", path, status=1)
    assert failed.stderr.startswith("error: cannot add model 'm': no variant can run here: bad@CPUExecutionProvider")
    assert "disagrees" in failed.stderr
    assert running.json("models", "list") == {"models": []}
    assert running.json("store", "stats")["used_bytes"] == 0


def test_versions_activate_roll_back_and_are_removed(running):
    one, two = onnx_models.linear(1), onnx_models.linear(2)
    running.cli("models", "add", bundle(running.folder / "1.edgemodel", {"fp32": ("fp32", one)}, version="1.0.0"))
    running.cli("models", "add", bundle(running.folder / "2.edgemodel", {"fp32": ("fp32", two)}, version="2.0.0"))
    with running.client() as client:
        np.testing.assert_allclose(client.infer("m", {"x": X})["y"], reference(two), rtol=1e-4)
        np.testing.assert_allclose(
            client.infer("m", {"x": X}, version="1.0.0")["y"], reference(one), rtol=1e-4, atol=1e-5
        )
        assert "1.0.0 answers again" in running.cli("models", "rollback", "m").stdout
        np.testing.assert_allclose(client.infer("m", {"x": X})["y"], reference(one), rtol=1e-4)
        running.cli("models", "activate", "m", "2.0.0")
        assert client.infer("m", {"x": X}).model_version == "2.0.0"
        assert "it is active" in running.cli("models", "remove", "m", "--version", "2.0.0", status=1).stderr
        running.cli("models", "remove", "m", "--version", "1.0.0")
        with pytest.raises(NotFoundError, match=r"no version '1\.0\.0'"):
            client.infer("m", {"x": X}, version="1.0.0")
        running.cli("models", "remove", "m")
        with pytest.raises(NotFoundError, match="no such model"):
            client.infer("m", {"x": X})
    assert running.json("store", "stats")["blobs"] == 0


def test_adding_the_same_again_changes_nothing_and_another_content_is_refused(running):
    first = bundle(running.folder / "a.edgemodel", {"fp32": ("fp32", onnx_models.linear(1))})
    running.cli("models", "add", first)
    generation = running.json("store", "stats")["generation"]
    assert running.json("models", "add", first)["unchanged"] is True
    assert running.json("store", "stats")["generation"] == generation
    other = bundle(running.folder / "b.edgemodel", {"fp32": ("fp32", onnx_models.linear(2))})
    assert "another content has that version" in running.cli("models", "add", other, status=1).stderr


def test_a_directory_is_added_as_a_bundle(running):
    folder = running.folder / "bundle"
    folder.mkdir()
    data = onnx_models.linear(3)
    (folder / "fp32.onnx").write_bytes(data)
    manifest = {
        "format": "edge-model/1", "name": "dir", "version": "1.0.0",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        "variants": [
            {
                "id": "fp32", "runtime": "onnx", "precision": "fp32",
                "file": {"name": "fp32.onnx", "sha256": sha(data), "size": len(data)},
            }
        ],
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(manifest))
    running.cli("models", "add", folder)
    with running.client() as client:
        np.testing.assert_allclose(client.infer("dir", {"x": X})["y"], reference(data), rtol=1e-4)
    (folder / "fp32.onnx").write_bytes(onnx_models.linear(4))
    manifest["version"] = "1.0.1"
    (folder / "model.json").write_text(json.dumps(manifest))
    assert "fp32.onnx" in running.cli("models", "add", folder, status=1).stderr


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"hello world" * 50, "no ONNX file"),
        (b"\0\0\0\0TFL3" + b"\0" * 600, "TFLite|damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS|pointer"),
        (onnx_models.linear()[:-40], "ONNX|cut|damaged"),
    ],
)
def test_wrong_files_get_a_clear_error_and_leave_nothing(running, content, text):
    path = running.folder / "wrong.onnx"
    path.write_bytes(content)
    failed = running.cli("models", "add", path, status=1)
    assert failed.stderr.startswith("error: cannot ")
    assert re.search(text, failed.stderr), failed.stderr
    assert running.json("store", "stats")["used_bytes"] == 0


def test_a_damaged_blob_falls_back_says_degraded_and_a_verify_marks_it(agent):
    agent.config.write_text("[selection]\nprepare = false\n")  # so that each payload is one that was added
    agent.start()
    running = agent
    data = onnx_models.linear(0)
    variants = {"fp32": ("fp32", data), "copy": ("fp32", data)}
    path = bundle(running.folder / "m.edgemodel", variants)
    chosen = running.json("models", "add", path)["chosen"]
    detail = running.json("models", "show", "m")["versions"]["1.0.0"]
    spare = next(name for name in detail["order"] if name != chosen)
    payloads = sorted((running.state / "store" / "blobs").glob("*"))
    victims = [file for file in payloads if len(file.name) == 64]
    assert len(victims) == 2
    running.stop()
    # Which payload is the chosen one cannot be told from outside: each is damaged in turn.
    outcomes = []
    for victim in victims:
        whole = victim.read_bytes()
        victim.chmod(0o600)
        victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        running.start()
        with running.client() as client:
            seen = client.infer("m", {"x": X})
        np.testing.assert_allclose(seen["y"], reference(data), rtol=1e-4)
        outcomes.append((seen.parameters["degraded"], seen.parameters["variant"]))
        verified = running.json("store", "verify", status=1)
        assert len(verified["damaged"]) == 1
        assert "is damaged" in running.cli("doctor", status=1).stdout
        victim.write_bytes(whole)
        assert running.json("store", "verify")["ok"] is True  # whole again, and the mark is taken away
        running.stop()
    assert sorted(degraded for degraded, _ in outcomes) == [False, True]
    assert (True, spare.split("@")[0]) in outcomes
    running.start()
    victims[0].write_bytes(whole[:-1])
    assert running.json("store", "verify", status=1)["ok"] is False
    running.cli("models", "add", path)  # the mend that doctor names
    assert running.json("store", "verify")["ok"] is True


def test_the_key_is_rotated_under_load_without_a_failed_request(running):
    running.cli("models", "add", linear_file(running.folder), "--name", "m")
    stop, failures, count = threading.Event(), [], [0]

    def load():
        with running.client() as client:
            while not stop.is_set():
                try:
                    client.infer("m", {"x": X})
                    count[0] += 1
                except Exception as error:
                    failures.append(error)

    worker = threading.Thread(target=load)
    worker.start()
    try:
        for _ in range(3):
            result = running.json("store", "rotate-key")
            assert result["headers"] in (1, 2)  # the model, and its prepared form where that answers sooner here
            assert result["old_key"] != result["new_key"]
    finally:
        stop.set()
        worker.join()
    assert not failures
    assert count[0] > 0
    running.restart()
    with running.client() as client:
        client.infer("m", {"x": X})


def test_a_variant_that_hangs_again_and_again_is_quarantined_and_no_longer_tried(agent):
    agent.config.write_text("[selection]\ntrial_timeout_s = 2\nquarantine_after = 2\n")
    agent.start()
    variants = {"fp32": ("fp32", onnx_models.linear()), "stuck": ("int8", onnx_models.endless())}
    agent.cli("models", "add", bundle(agent.folder / "m.edgemodel", variants))

    def stuck():
        rows = agent.json("models", "explain", "m")["candidates"]
        return next((row["outcome"], row["why"]) for row in rows if row["variant"] == "stuck")

    outcome, why = stuck()
    assert outcome == "rejected"
    assert "hung" in why[0]
    agent.cli("bench", "m")
    assert stuck()[0] == "rejected"
    agent.cli("bench", "m")
    outcome, why = stuck()
    assert outcome == "refused"
    assert "hung twice" in " ".join(why)
    with agent.client() as client:
        assert client.infer("m", {"x": X}).parameters["variant"] == "fp32"


def test_a_broken_profile_of_the_user_is_told_and_the_daemon_runs(agent):
    agent.config.write_text("")
    (agent.folder / "hw_profiles").mkdir()
    (agent.folder / "hw_profiles" / "mine.toml").write_text('id = "mine"\ntitle = 3\n')
    agent.start()
    assert "mine.toml" in agent.log.read_text()
    assert "title" in agent.cli("doctor").stdout
    assert "title" in agent.cli("config", "check", status=1).stdout


def test_strings_and_several_tensors_go_through_the_whole_daemon(running):
    for name in ("strings", "two_in_two_out"):
        path = running.folder / f"{name}.onnx"
        path.write_bytes(getattr(onnx_models, name)())
        running.cli("models", "add", path, "--name", name)
    texts = np.array([b"one", "zwölf".encode(), b""], dtype=object)
    with running.client() as client:
        assert list(client.infer("strings", {"s": texts})["t"]) == list(texts)
        both = {"a": np.ones((2, 3), np.float32), "flag": np.array([True, False])}
        seen = client.infer("two_in_two_out", both)
        np.testing.assert_array_equal(seen["sum"], 2 * both["a"])
        np.testing.assert_array_equal(seen["not_flag"], [False, True])
        assert list(client.infer("two_in_two_out", both, outputs=["not_flag"])) == ["not_flag"]


def test_what_was_measured_under_other_conditions_is_measured_again_after_a_restart(agent):
    agent.config.write_text("[selection]\nthreads = 1\n")
    agent.start()
    agent.cli("models", "add", linear_file(agent.folder), "--name", "m")
    before = agent.json("models", "explain", "m")["candidates"][0]["measured"]["key"]
    agent.restart()
    assert agent.json("models", "explain", "m")["candidates"][0]["measured"]["key"] == before
    assert "tried again" not in agent.log.read_text()
    agent.config.write_text("[selection]\nthreads = 2\n")
    agent.restart()
    deadline = time.monotonic() + 30
    while agent.json("models", "explain", "m")["candidates"][0]["measured"]["key"] == before:
        assert time.monotonic() < deadline
        with agent.client() as client:  # it answers all the while
            client.infer("m", {"x": X})
    assert "threads: 1 -> 2" in agent.log.read_text()


def test_a_second_daemon_on_the_same_state_is_refused(running):
    failed = running.cli("--run-dir", running.folder / "run2", "core", status=1)
    assert "another process has it" in failed.stderr
    failed = running.cli("--state-dir", running.folder / "state2", "core", status=1)
    assert "error: cannot listen" in failed.stderr
    with running.client() as client:
        assert client.ready()


def test_sockets_and_state_have_the_right_modes(running):
    def mode(path):
        return stat.S_IMODE(os.stat(path).st_mode)

    assert mode(running.run / "infer.sock") == 0o660
    assert mode(running.run / "admin.sock") == 0o600
    assert mode(running.state) == 0o700
    assert mode(running.state / "keys" / "device-secret") == 0o600


def test_the_unsigned_policy_refuses_local_files(agent):
    agent.config.write_text('[trust]\nunsigned = "refuse"\n')
    agent.start()
    failed = agent.cli("models", "add", linear_file(agent.folder), status=1)
    assert "signed models only" in failed.stderr


def test_a_wrong_configuration_names_the_field_and_a_reload_keeps_the_old_one(agent):
    agent.config.write_text("[server]\ndeadline_s = -1\n")
    failed = agent.cli("core", status=1)
    assert "server.deadline_s" in failed.stderr
    agent.config.write_text("[access]\ndefault = 'group'\n")
    agent.start()
    agent.config.write_text("[access]\ndefalt = 'deny'\n")
    agent.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while "not reloaded" not in agent.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    agent.wait_until_ready()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
def test_rules_by_uid_hold_and_change_with_a_reload(agent):
    agent.config.write_text("[access.models.secret]\nuids = [12345]\n")
    agent.start()
    agent.cli("models", "add", linear_file(agent.folder), "--name", "secret")
    agent.folder.chmod(0o755)
    agent.run.chmod(0o755)
    (agent.run / "infer.sock").chmod(0o666)
    assert ask_as(agent, 12345) == 200
    assert ask_as(agent, 12346) == 403
    agent.config.write_text("[access.models.secret]\nuids = [12346]\n")
    agent.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while ask_as(agent, 12346) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask_as(agent, 12345) == 403


def ask_as(agent, uid):
    """The status of a metadata request by that user, from a child that became it."""
    script = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        "s.sendall(b'GET /v2/models/secret HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
        "sys.stdout.write(s.recv(4096).split()[1].decode())\n"
    )
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", script, str(agent.run / "infer.sock")],
        capture_output=True, text=True, check=True, timeout=30, cwd="/",
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
def test_another_user_can_do_nothing_on_the_admin_socket(running):
    running.folder.chmod(0o755)
    (running.run / "admin.sock").chmod(0o666)  # even if somebody opened it by mistake
    script = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        "for line in (b'GET /v1/status', b'POST /v1/store/gc', b'DELETE /v1/models/x', b'GET /nope'):\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        "    s.sendall(line + b' HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n')\n"
        "    print(s.recv(4096).split()[1].decode())\n"
    )
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", script, str(running.run / "admin.sock")],
        capture_output=True, text=True, check=True, timeout=30, cwd="/",
    )  # fmt: skip
    assert done.stdout.split() == ["403"] * 4


def test_a_process_of_the_same_user_cannot_read_the_daemons_memory(agent):
    """Under an ordinary uid: what root may do is no measure."""
    if os.geteuid() == 0:
        pytest.skip("root may inspect everything; tests/infer/test_sandbox.py covers the child without capabilities")
    agent.start()
    with pytest.raises(PermissionError):
        open(f"/proc/{agent.process.pid}/mem", "rb").close()


def test_it_starts_by_socket_activation_and_keeps_the_sockets(agent):
    agent.run.mkdir()
    listeners = []
    for name in ("infer", "admin"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(agent.run / f"{name}.sock"))
        listener.listen(16)
        listeners.append(listener)
    early = socket.socket(socket.AF_UNIX)  # connects before anybody runs, and waits
    early.connect(str(agent.run / "infer.sock"))
    early.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
    starter = (
        "import os, sys\n"
        "for want, have in ((3, int(sys.argv[1])), (4, int(sys.argv[2]))):\n"
        "    os.dup2(have, want, inheritable=True)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='infer:admin')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'agent.cli.device', 'core'])\n"
    )
    numbers = [os.dup(listener.fileno()) for listener in listeners]
    high = [fcntl.fcntl(number, 0, 50) for number in numbers]
    with agent.log.open("ab") as log:
        agent.process = subprocess.Popen(
            [sys.executable, "-c", starter, *map(str, high)],
            pass_fds=high, env=agent.environment, stderr=log,
        )  # fmt: skip
    early.settimeout(30)
    assert early.recv(4096).startswith(b"HTTP/1.1 200")
    early.close()
    assert agent.stop() == 0
    assert (agent.run / "infer.sock").exists()  # they are the service manager's
    for listener in listeners:
        listener.close()
    for number in (*numbers, *high):
        os.close(number)


def test_wrong_tensors_name_the_field(running):
    running.cli("models", "add", linear_file(running.folder), "--name", "m")
    with running.client() as client:
        with pytest.raises(PeerError, match="input 'x': shape"):
            client.infer("m", {"x": X[:, :5]})
        with pytest.raises(PeerError, match="input 'x': datatype FP64"):
            client.infer("m", {"x": X.astype(np.float64)})
        with pytest.raises(PeerError, match="output 'nope'"):
            client.infer("m", {"x": X}, outputs=["nope"])
        assert client.infer("m", {"x": X})["y"].shape == (1, 4)


def test_infer_from_the_command_line(running):
    running.cli("models", "add", linear_file(running.folder), "--name", "m")
    np.save(running.folder / "x.npy", X)
    shown = running.json("infer", "m", "-i", f"x={running.folder / 'x.npy'}")
    np.testing.assert_allclose(shown["outputs"]["y"], reference(onnx_models.linear()), rtol=1e-4)
    piped = running.cli("infer", "m", "-i", "x=-", "--json", stdin=json.dumps([list(range(16))]))
    np.testing.assert_allclose(json.loads(piped.stdout)["outputs"]["y"], shown["outputs"]["y"])
    assert "shape" in running.cli("infer", "m", "-i", "x=-", stdin="[[1, 2]]", status=1).stderr
    assert "NAME=FILE" in running.cli("infer", "m", "-i", "x", status=1).stderr


def test_status_and_doctor_are_honest(running):
    status = running.json("status")
    assert status["models"] == []
    assert status["key_source"] == "file"
    doctor = running.json("doctor")
    found = {finding["check"]: finding for finding in doctor["findings"]}
    assert found["core"]["level"] == "ok"
    assert found["key-weak"]["mend"]
    running.stop()
    stopped = running.json("doctor", status=1)
    assert stopped["verdict"] == "failing"
    assert next(f for f in stopped["findings"] if f["check"] == "core")["level"] == "error"
    assert running.cli("status", status=1).stderr.startswith("error: cannot reach the agent")
