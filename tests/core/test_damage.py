"""The damage zoo: every file of the state folder hurt in every way, under a real daemon.

For each case holds: the daemon either refuses to start with an error that names the mend, or starts, answers rightly
for every model that is not hurt, never answers wrongly for the one that is, and ``doctor`` names what is damaged.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from agent.base.errors import AgentError
from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import X, bundle, linear_file

#: So that each file of the store is one that was added.
NO_FORMS = "[selection]\nprepare = false\n"
GOOD, HURT = onnx_models.linear(1), onnx_models.linear(2)


def expected(data):
    return onnxruntime.InferenceSession(data).run(None, {"x": X})[0]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A stopped device with model ``good`` (one variant) and model ``hurt`` (two variants of the same answers)."""
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    device = Agent(folder)
    device.config.write_text(NO_FORMS)
    device.start()
    try:
        device.cli("models", "add", linear_file(folder, 1), "--name", "good")
        variants = {"fp32": ("fp32", HURT), "again": ("fp32", HURT)}
        device.cli("models", "add", bundle(folder / "hurt.edgemodel", variants, name="hurt"))
        assert device.stop() == 0
        yield device
    finally:
        if device.process is not None:
            device.process.kill()
            device.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def hurt_device(template, agent):
    """A copy of the template, not started."""
    shutil.copytree(template.state, agent.state)
    shutil.copy(template.folder / "hurt.edgemodel", agent.folder)
    agent.config.write_text(NO_FORMS)
    return agent


def blobs_of(device, model):
    """(payload, header) files of a model, told apart by size: ``hurt`` and ``good`` differ in nothing else."""
    files = sorted((device.state / "store" / "blobs").iterdir())
    payloads = [file for file in files if len(file.name) == 64]
    return payloads, [file for file in files if file not in payloads]


def flip(at):
    def change(file):
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x40
        file.write_bytes(data)

    return change


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def double(file):
    file.write_bytes(file.read_bytes() * 2)


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def delete(file):
    file.unlink()


def folder(file):
    file.unlink()
    file.mkdir()


def link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


WAYS = {
    "first byte": flip(0), "middle byte": flip(0.5), "last byte": flip(1), "cut": cut, "empty": empty,
    "doubled": double, "zeros": zeros, "deleted": delete, "a folder": folder,
}  # fmt: skip


def check(device, *, sound=("good",), may_lack=()):
    """Start, and hold the promises of the module's text. Doctor's findings, or None when it refused to start."""
    device.start(ready=False)
    try:
        device.wait_until_ready()
    except AssertionError:
        log = device.log.read_text()
        assert device.process.wait(timeout=30) == 1, log
        device.process = None
        assert "error: cannot " in log, log
        assert "hint: " in log, log
        assert "Traceback" not in log, log
        return None
    with device.client() as client:
        for name, data in (("good", GOOD), ("hurt", HURT)):
            answer = ask(client, name)
            if isinstance(answer, AgentError):
                assert name not in sound or name in may_lack, answer
            else:
                np.testing.assert_allclose(answer, expected(data), rtol=1e-4)
    device.cli("store", "verify", status=None)
    findings = device.json("doctor", status=None)["findings"]
    assert "Traceback" not in device.log.read_text()
    return findings


def ask(client, name):
    """The model's answer, or the error in its place."""
    try:
        return client.infer(name, {"x": X})["y"]
    except AgentError as error:
        return error


def fill(path):
    """A file that takes all the room there is."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    assert os.statvfs(path).f_bavail == 0


def told(findings):
    return [finding for finding in findings if finding["level"] in ("warning", "error") and finding["mend"]]


@pytest.mark.parametrize("way", WAYS)
def test_a_payload_is_hurt(hurt_device, way):
    payloads, _ = blobs_of(hurt_device, "hurt")
    WAYS[way](payloads[0])
    # Which model it belongs to cannot be told from outside; whichever it is, no answer is wrong and the other answers.
    findings = check(hurt_device, sound=())
    assert told(findings), findings
    again = [hurt_device.folder / "hurt.edgemodel", linear_file(hurt_device.folder, 1)]
    hurt_device.cli("models", "add", again[0])
    hurt_device.cli("models", "add", again[1], "--name", "good")
    assert hurt_device.json("store", "verify")["ok"] is True
    with hurt_device.client() as client:
        np.testing.assert_allclose(client.infer("good", {"x": X})["y"], expected(GOOD), rtol=1e-4)
        seen = client.infer("hurt", {"x": X})
        np.testing.assert_allclose(seen["y"], expected(HURT), rtol=1e-4)
        assert seen.parameters["degraded"] is False


@pytest.mark.parametrize("way", WAYS)
def test_a_header_is_hurt(hurt_device, way):
    _, headers = blobs_of(hurt_device, "hurt")
    WAYS[way](headers[-1])
    assert told(check(hurt_device, sound=()))


def test_two_payloads_are_swapped(hurt_device):
    (one, two, *_), _ = blobs_of(hurt_device, "hurt")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert told(check(hurt_device, sound=()))


def test_headers_are_swapped(hurt_device):
    _, (one, two, *_) = blobs_of(hurt_device, "hurt")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert told(check(hurt_device, sound=()))


@pytest.mark.parametrize("way", WAYS)
def test_the_newest_catalog_is_hurt(hurt_device, way):
    newest = max((hurt_device.state / "store" / "catalog").glob("*.age"))
    WAYS[way](newest)
    # The generation before lacks the last change (the activation of "hurt"), and says so.
    findings = check(hurt_device, may_lack=("hurt",))
    if findings is not None:
        assert told(findings), findings


@pytest.mark.parametrize("way", WAYS)
def test_the_pointer_to_the_catalog_is_hurt(hurt_device, way):
    WAYS[way](hurt_device.state / "store" / "CURRENT")
    check(hurt_device, sound=("good",))


def test_every_catalog_is_gone(hurt_device):
    for file in (hurt_device.state / "store" / "catalog").glob("*.age"):
        file.unlink()
    check(hurt_device, sound=())


def test_an_older_catalog_under_a_newer_number_is_refused(hurt_device):
    older, newest = sorted((hurt_device.state / "store" / "catalog").glob("*.age"))[-2:]
    newest.write_bytes(older.read_bytes())
    findings = check(hurt_device, may_lack=("hurt",))
    assert findings is None or told(findings)


@pytest.mark.parametrize("way", [way for way in WAYS if "byte" not in way and way != "zeros"])
def test_the_key_file_is_hurt(hurt_device, way):
    WAYS[way](hurt_device.state / "keys" / "device-secret")
    assert check(hurt_device) is None
    assert "device" in hurt_device.log.read_text()


@pytest.mark.parametrize("way", ["first byte", "zeros"])
def test_the_key_is_another(hurt_device, way):
    WAYS[way](hurt_device.state / "keys" / "device-secret")
    assert check(hurt_device) is None


def test_the_key_file_is_open_to_others(hurt_device):
    (hurt_device.state / "keys" / "device-secret").chmod(0o644)
    findings = check(hurt_device)
    assert findings is None or told(findings)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_the_key_file_belongs_to_somebody_else(hurt_device):
    os.chown(hurt_device.state / "keys" / "device-secret", 12345, 12345)
    findings = check(hurt_device)
    assert findings is None or told(findings)


def test_a_rotation_was_cut_off_half_way(hurt_device):
    hurt_device.start()
    for _ in range(6):
        rotating = subprocess.Popen(
            [sys.executable, "-m", "agent.cli.device", "store", "rotate-key"],
            env=hurt_device.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(np.random.default_rng().uniform(0.2, 0.6))
        hurt_device.stop(signal.SIGKILL)
        rotating.wait()
        assert check(hurt_device, sound=("good", "hurt")) is not None
        assert hurt_device.json("store", "rotate-key")["damaged"] == 0
        assert hurt_device.json("store", "verify")["ok"] is True


def test_foreign_and_half_written_files_do_no_harm(hurt_device):
    store = hurt_device.state / "store"
    for place in (store, store / "blobs", store / "catalog", hurt_device.state / "keys"):
        (place / "notes.txt").write_text("left by somebody")
        (place / ".tmp-half").write_bytes(b"x" * 1000)
    assert check(hurt_device, sound=("good", "hurt")) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
class TestDisks:
    @pytest.fixture
    def on_small_disk(self, hurt_device):
        """The state folder on a file system of 24 MB."""
        saved = hurt_device.folder / "saved"
        hurt_device.state.rename(saved)
        hurt_device.state.mkdir(mode=0o700)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", str(hurt_device.state)], check=False
        )
        if mounted.returncode != 0:
            pytest.skip("cannot mount here")
        shutil.copytree(saved, hurt_device.state, dirs_exist_ok=True)
        yield hurt_device
        if hurt_device.process is not None:
            hurt_device.process.kill()
            hurt_device.process.wait()
            hurt_device.process = None
        subprocess.run(["umount", "-l", str(hurt_device.state)], check=True)

    def test_a_full_disk_refuses_the_new_model_and_serves_the_old(self, on_small_disk):
        device = on_small_disk
        device.start()
        path = device.folder / "big.onnx"
        path.write_bytes(onnx_models.heavy(side=1024, layers=8))  # 32 MB
        failed = device.cli("models", "add", path, status=1)
        assert failed.stderr.startswith("error: cannot ")
        assert "hint: free" in failed.stderr
        fill(device.state / "filler")
        failed = device.cli("models", "add", linear_file(device.folder, 7), "--name", "more", status=1)
        assert failed.stderr.startswith("error: cannot ")
        with device.client() as client:
            np.testing.assert_allclose(client.infer("good", {"x": X})["y"], expected(GOOD), rtol=1e-4)
        assert told(device.json("doctor", status=None)["findings"])
        (device.state / "filler").unlink()
        device.cli("models", "add", linear_file(device.folder, 7), "--name", "more")
        device.restart(signal.SIGKILL)
        assert device.json("store", "verify")["ok"] is True

    def test_a_full_disk_does_not_keep_the_daemon_from_starting(self, on_small_disk):
        device = on_small_disk
        fill(device.state / "filler")
        assert told(check(device, sound=("good", "hurt")))

    def test_a_read_only_disk_still_serves(self, on_small_disk):
        device = on_small_disk
        subprocess.run(["mount", "-o", "remount,ro", str(device.state)], check=True)
        findings = check(device, sound=("good", "hurt"))
        if findings is not None:
            failed = device.cli("models", "add", linear_file(device.folder, 7), "--name", "more", status=1)
            assert failed.stderr.startswith("error: cannot ")
            with device.client() as client:
                np.testing.assert_allclose(client.infer("good", {"x": X})["y"], expected(GOOD), rtol=1e-4)
            assert told(findings)


@pytest.mark.parametrize("year", ["1970-01-02", "2100-01-01"])
def test_the_clock_is_wrong(hurt_device, year, monkeypatch):
    library = next(
        (path for path in ("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
                           "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1") if os.path.exists(path)), None
    )  # fmt: skip
    if library is None:
        pytest.skip("no libfaketime (package faketime)")
    monkeypatch.setenv("LD_PRELOAD", library)
    monkeypatch.setenv("FAKETIME", f"@{year} 00:00:00")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    findings = check(hurt_device, sound=("good", "hurt"))
    assert findings is not None
    if year.startswith("1970"):
        assert any(finding["check"] == "clock" and finding["level"] == "warning" for finding in findings)
    hurt_device.cli("models", "add", linear_file(hurt_device.folder, 7), "--name", "more")
    monkeypatch.delenv("LD_PRELOAD")
    hurt_device.restart()
    assert hurt_device.json("store", "verify")["ok"] is True
