"""Stopped, or left alone, in the middle of a long operation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.base.errors import AgentError, TryLaterError
from tests import onnx_models
from tests.core.conftest import ROOT

X = np.ones((1, 16), np.float32)
#: What the service unit allows between SIGTERM and SIGKILL (TimeoutStopSec=).
STOP_TIMEOUT_S = 45.0
PATIENCE_S = 60.0


class Adding(threading.Thread):
    """``models add`` in a thread, as the command line does it; ``error`` is what it raised."""

    def __init__(self, agent, path: Path, name: str, descriptor: int | None = None) -> None:
        super().__init__()
        self._agent, self._path, self._name, self._descriptor = agent, path, name, descriptor
        self.stages: list[str] = []
        self.error: AgentError | None = None
        self.answer = None
        self.start()

    def run(self) -> None:
        with self._path.open("rb") if self._descriptor is None else os.fdopen(self._descriptor, "rb") as file:
            options = {"file_name": f"{self._name}.onnx", "name": self._name}
            with self._agent.admin() as admin:
                try:
                    self.answer = admin.call(
                        "POST", "/v1/models", options, descriptors=(file.fileno(),),
                        on_event=lambda event: self.stages.append(event["stage"]),
                    )  # fmt: skip
                except AgentError as error:
                    self.error = error

    def wait_for(self, stage: str) -> None:
        until(lambda: stage in self.stages, f"stage {stage}")


def until(holds, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.01)


def file(folder: Path, data: bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def children(pid: int) -> list[int]:
    """Living processes whose parent is ``pid``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_ends_a_trial_that_would_take_minutes(running):
    """The model never answers and the trial would wait 120 s for it: the stop ends the child and the operation."""
    adding = Adding(running, file(running.folder, onnx_models.endless(), "endless.onnx"), "endless")
    adding.wait_for("try")
    until(lambda: children(running.process.pid), "a trial child")
    (child,) = children(running.process.pid)
    asked = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - asked < STOP_TIMEOUT_S
    adding.join()
    assert isinstance(adding.error, TryLaterError)
    assert "the agent is stopping" in str(adding.error)
    assert not alive(child)
    running.start()
    assert running.json("models", "list") == {"models": []}
    assert running.json("store", "stats")["used_bytes"] == 0  # given up cleanly: not even waste is left


def test_sigterm_while_others_wait_for_their_turn_begins_none_of_them(running):
    adding = Adding(running, file(running.folder, onnx_models.endless(), "endless.onnx"), "endless")
    adding.wait_for("try")
    waiting = Adding(running, file(running.folder, onnx_models.linear(), "small.onnx"), "small")
    until(lambda: len(open_pipes_and_files(running.process.pid, "small.onnx")) == 1, "the second one to be taken")
    assert running.stop() == 0
    for thread in (adding, waiting):
        thread.join()
        assert "the agent is stopping" in str(thread.error)
    assert waiting.stages == []
    running.start()
    assert running.json("models", "list") == {"models": []}


def test_sigterm_while_a_pipe_gives_nothing(running):
    reading, writing = os.pipe()
    try:
        adding = Adding(running, Path("unused"), "piped", reading)
        until(lambda: running.json("status")["under_way"], "the operation")
        assert running.stop() == 0
        adding.join()
        assert "the agent is stopping" in str(adding.error)
    finally:
        os.close(writing)


def test_the_serving_side_is_reachable_to_the_end_of_an_operation_that_finishes_during_the_stop(agent):
    """An operation that has only its last steps left asks the event loop for them while everything winds down."""
    agent.config.write_text("[selection]\nmin_rounds = 4\nmax_rounds = 4\n")
    path = file(agent.folder, onnx_models.linear(), "small.onnx")
    for number in range(3):
        agent.start()
        adding = Adding(agent, path, f"m{number}")
        adding.wait_for("load")
        asked = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - asked < STOP_TIMEOUT_S
        adding.join()
        agent.start()
        listed = {row["name"] for row in agent.json("models", "list")["models"]}
        assert (f"m{number}" in listed) == (adding.error is None)
        agent.stop()


def test_a_client_that_hangs_up_does_not_stop_the_installation(running):
    """Ctrl-C at the command line: what was begun is finished, and the next operation gets its turn."""
    data = onnx_models.linear(3)
    path = file(running.folder, data, "left.onnx")
    client = subprocess.Popen(
        [sys.executable, "-m", "agent.cli.device", "models", "add", str(path), "--name", "left"],
        env=running.environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: running.json("status")["under_way"], "the operation")
    client.send_signal(signal.SIGKILL)
    client.wait()
    until(lambda: running.json("status")["under_way"] is None, "its end")
    with running.client() as asking:
        assert asking.infer("left", {"x": X}).parameters["variant"] == "fp32"
    running.cli("models", "add", file(running.folder, onnx_models.linear(4), "next.onnx"))


def test_a_client_that_hangs_up_while_it_waits_for_its_turn_loses_nothing_to_others(running):
    """Its descriptor stays open until its turn: the number must not come to mean another caller's file."""
    slow = Adding(running, file(running.folder, onnx_models.heavy(side=256), "slow.onnx"), "slow")
    slow.wait_for("try")
    first, second = onnx_models.linear(1), onnx_models.linear(2)
    client = subprocess.Popen(
        [sys.executable, "-m", "agent.cli.device", "models", "add", str(file(running.folder, first, "first.onnx"))],
        env=running.environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: open_pipes_and_files(running.process.pid, "first.onnx"), "the first one to be taken")
    client.send_signal(signal.SIGKILL)
    client.wait()
    running.cli("models", "add", file(running.folder, second, "second.onnx"))
    slow.join()
    listed = {row["name"] for row in running.json("models", "list")["models"]}
    assert listed == {"slow", "first", "second"}
    with running.client() as asking:
        answers = [asking.infer(name, {"x": X})["y"] for name in ("first", "second")]
    assert not np.allclose(*answers)
    until(lambda: not open_pipes_and_files(running.process.pid, ".onnx"), "the files to be closed")


def open_pipes_and_files(pid: int, ending: str) -> list[str]:
    """Files of that ending which the process holds open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # closed meanwhile
        if target.endswith(ending):
            found.append(target)
    return found


@pytest.mark.parametrize("stage", ["try", "measure"])
def test_a_killed_client_and_a_killed_daemon_leave_no_child_behind(running, stage):
    adding = Adding(running, file(running.folder, onnx_models.heavy(side=256), "slow.onnx"), "slow")
    adding.wait_for(stage)
    until(lambda: children(running.process.pid), "a trial child")
    orphans = children(running.process.pid)
    running.stop(signal.SIGKILL)
    adding.join()
    assert adding.error is not None
    until(lambda: not any(alive(pid) for pid in orphans), "the children's end")
