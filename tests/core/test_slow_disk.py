"""A really slow disk below the state folder: a file system on a loop device that the kernel throttles.

Nothing fails on it, all takes long. What is loaded must not notice.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.base.errors import AgentError, DeadlineError
from tests import onnx_models
from tests.core.test_daemon import X, linear_file, reference
from tests.core.test_stop import Adding, until

SIDE = 512
MB = 1_000_000
#: The size of what is added and loaded slowly: about 2 MB, ten seconds at ``SLOW``.
LAYERS = 2
SLOW = MB // 5
#: So little that nothing comes through: the disk stands still.
STILL = 1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount and to throttle"),
]


def throttles():
    """The folder of the block controller's throttles, where there is one that holds for the whole machine."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and "blkio" in options.split(","):
            return Path(place)
    return None


class Disk:
    """A file system of its own on ``folder``, as fast as the machine until ``throttle`` is called."""

    def __init__(self, image, folder):
        self.folder = folder
        self._limits = throttles()
        if self._limits is None or not (self._limits / "blkio.throttle.read_bps_device").exists():
            pytest.skip("no blkio controller (cgroup 1) to slow a disk down with")
        with image.open("wb") as file:
            file.truncate(128 << 20)
        quiet = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]  # no work of its own afterwards
        subprocess.run(["mkfs.ext4", "-q", "-F", *quiet, str(image)], check=True)
        found = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False)
        if found.returncode != 0:
            pytest.skip(f"cannot set up a loop device: {found.stderr.strip()}")
        self.device = found.stdout.strip()
        self._number = Path(f"/sys/block/{Path(self.device).name}/dev").read_text().strip()
        self.mount()

    def mount(self):
        subprocess.run(["mount", self.device, str(self.folder)], check=True)
        self.folder.chmod(0o700)

    def unmount(self):
        """Nothing of it stays in the page cache."""
        subprocess.run(["umount", str(self.folder)], check=True)

    def throttle(self, *, read=0, write=0):
        """Bytes a second; 0 lifts the limit, also for what is waiting."""
        for what, limit in (("read", read), ("write", write)):
            (self._limits / f"blkio.throttle.{what}_bps_device").write_text(f"{self._number} {limit}")

    def forget(self):
        """Take every file out of the page cache: the next read of it is one from the disk."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def remove(self):
        self.throttle()
        subprocess.run(["umount", "-l", str(self.folder)], check=False)
        subprocess.run(["losetup", "-d", self.device], check=True)


@pytest.fixture
def disk(agent):
    """A file system at the state folder of ``agent``."""
    agent.state.mkdir(mode=0o700)
    made = Disk(agent.folder / "disk.img", agent.state)
    try:
        yield made
    finally:
        made.throttle()  # first: what waits for the disk cannot be killed
        if agent.process is not None:
            agent.process.kill()
            agent.process.wait()
            agent.process = None
        made.remove()


def big_file(folder, seed):
    path = folder / f"big{seed}.onnx"
    path.write_bytes(onnx_models.heavy(SIDE, LAYERS, seed))
    return path


WIDE = np.random.default_rng(3).random((1, SIDE), dtype=np.float32)


class Asking(threading.Thread):
    """An app that asks the hot model without a pause, and a person who looks at the status now and then."""

    def __init__(self, device):
        super().__init__()
        self._device, self._end = device, threading.Event()
        self.times, self.wrong, self.failed = [], 0, []
        self._expected = reference(onnx_models.linear(), X)
        self.start()

    def run(self):
        with self._device.client() as client, self._device.admin() as admin:
            look = 0.0
            while not self._end.wait(0.005):
                start = time.perf_counter()
                try:
                    answer = client.infer("hot", {"x": X})["y"]
                except AgentError as error:
                    self.failed.append(error)
                    continue
                self.times.append(time.perf_counter() - start)
                self.wrong += not np.allclose(answer, self._expected, rtol=1e-4)
                if start - look > 0.5:
                    look = start
                    admin.call("GET", "/v1/status")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end.set()
        self.join()

    @property
    def middle(self):
        assert not self.failed, self.failed[:3]
        assert self.wrong == 0
        return statistics.median(self.times)


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def slowness(device):
    """What ``doctor`` says of a slow disk; empty where it says nothing."""
    found = [row for row in device.json("doctor")["findings"] if row["check"] == "disk-slow"]
    assert all(row["level"] == "warning" and row["mend"] for row in found)
    return "; ".join(row["text"] for row in found)


def with_hot(device):
    """A running device whose model ``hot`` is loaded."""
    device.start()
    device.cli("models", "add", linear_file(device.folder), "--name", "hot")
    return device


def test_adding_to_a_slow_disk_takes_long_and_what_is_hot_does_not_notice(agent, disk):
    device = with_hot(agent)

    def add(seed):
        device.cli("models", "add", big_file(device.folder, seed))

    with Asking(device) as before:
        quick = timed(lambda: add(1))
    assert slowness(device) == ""
    disk.throttle(write=SLOW)
    with Asking(device) as during:
        slow = timed(lambda: add(2))
    waited = big_file(device.folder, 2).stat().st_size / SLOW
    assert slow > quick + waited / 2, "the disk was not slow"
    assert during.middle < 3 * before.middle
    assert max(during.times) < max(waited / 4, 2 * max(before.times))
    assert "writing a model took" in slowness(device)
    assert "the disk is slow: writing a model" in device.log.read_text()
    disk.throttle()
    add(3)
    assert slowness(device) == ""
    assert device.json("store", "verify")["ok"]


def test_a_cold_load_from_a_slow_disk_keeps_its_deadline_and_nobody_else_waits(agent, disk):
    device = with_hot(agent)
    path = big_file(device.folder, 1)
    device.cli("models", "add", path, "--name", "big")
    expected = reference(path.read_bytes(), WIDE)
    device.stop()
    disk.unmount()
    disk.mount()
    disk.throttle(read=SLOW)
    device.start()  # from the slow disk
    wait = path.stat().st_size / SLOW
    with device.client() as client:
        client.infer("hot", {"x": X})
        with Asking(device) as during:
            start = time.perf_counter()
            with pytest.raises(DeadlineError):
                client.infer("big", {"x": WIDE}, parameters={"timeout": 1_000_000})
            gave_up = time.perf_counter() - start
            answer = client.infer("big", {"x": WIDE})  # whoever has the time gets it
            loaded = time.perf_counter() - start
    assert loaded > wait / 2, "the disk was not slow"
    assert gave_up < loaded / 3
    np.testing.assert_allclose(answer["y"], expected, rtol=1e-3)
    assert answer.parameters["degraded"] is False
    with Asking(device) as after, device.client() as client:
        for _ in range(200):
            client.infer("big", {"x": WIDE})
    assert during.middle < 3 * after.middle
    assert max(during.times) < wait / 4
    assert "reading a model took" in slowness(device)


def test_a_disk_that_stands_still_stops_what_needs_it_and_nothing_else(agent, disk):
    device = with_hot(agent)
    device.cli("models", "add", big_file(device.folder, 1), "--name", "big")
    device.stop()
    disk.unmount()
    disk.mount()
    device.start()
    with device.client() as client:
        client.infer("hot", {"x": X})
        with Asking(device) as before:
            until(lambda: len(before.times) > 50, "some answers")
        disk.throttle(read=STILL, write=STILL)
        adding = Adding(device, big_file(device.folder, 2), "new")
        try:
            with Asking(device) as during:
                for _ in range(2):
                    with pytest.raises(DeadlineError):
                        client.infer("big", {"x": WIDE}, parameters={"timeout": 500_000})
                until(lambda: "until now" in slowness(device), "doctor to name what does not end")
                seen = device.json("status")
            assert len(during.times) > 50
            assert during.middle < 3 * before.middle
            assert "add" in seen["under_way"]["operation"]
            assert adding.is_alive()
        finally:
            disk.throttle()
        adding.join(60)
        assert adding.error is None
        client.infer("new", {"x": WIDE})
        assert client.infer("big", {"x": WIDE}).parameters["degraded"] is False
    assert device.json("store", "verify")["ok"]
    assert device.stop() == 0


def test_killed_while_a_slow_disk_writes(agent, disk):
    device = with_hot(agent)
    disk.throttle(write=SLOW)
    adding = Adding(device, big_file(device.folder, 1), "new")
    adding.wait_for("encrypt")
    until(lambda: device.json("status")["under_way"] is not None, "the addition to be under way")
    device.stop(signal.SIGKILL)
    adding.join(60)
    device.start()
    assert [row["name"] for row in device.json("models", "list")["models"]] == ["hot"]
    with device.client() as client:
        np.testing.assert_allclose(client.infer("hot", {"x": X})["y"], reference(onnx_models.linear(), X), rtol=1e-4)
    assert device.json("store", "verify")["ok"]
    disk.throttle()
    device.cli("models", "add", big_file(device.folder, 1), "--name", "new")
