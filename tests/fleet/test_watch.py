"""An operator watches: what changes is shown, and queues flow meanwhile."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import threading
import time
from typing import Any

from tests.fleet.conftest import Fleet
from tests.fleet.device import WELL
from tests.fleet.waiting import until


class Watching:
    """``edge-fleet watch --json`` in a process of its own."""

    def __init__(self, fleet: Fleet, *arguments: str) -> None:
        self._process = fleet.start("watch", *arguments, stdout=subprocess.PIPE)
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, list(self.lines)) if event["event"] == kind]

    def stop(self) -> int:
        self._process.send_signal(2)
        status = self._process.wait(20)
        self._thread.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status


def test_watching_streams_events_and_lets_queues_flow(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    other = fleet.enrolled("cam-2")
    watching = Watching(fleet, "--json")
    until(lambda: watching.events("device"), "it says how things are")
    jobs = [fleet.ok("job", "store.gc", "--all")["job"] for _ in range(3)]
    until(lambda: [e["job_id"] for e in watching.events("job") if e["state"] == "succeeded"] == jobs, "the queue flows")
    fleet.connect(other)  # comes late, and gets all three
    until(lambda: len(other.done) == 3, "the other's queue flows, too")
    device.alert("heat", "throttled")
    until(lambda: any(e["id"] == "heat" for e in watching.events("alert")), "an alert is shown")
    device.alert("heat", None)
    until(lambda: any(e.get("over") for e in watching.events("alert")), "and its end")
    fleet.broker.stop()
    until(lambda: any(not e["connected"] for e in watching.events("connection")), "a lost connection is told")
    fleet.broker.start()
    until(lambda: any(e["connected"] for e in watching.events("connection")), "and that it is back")
    until(device.connection.client.is_connected, "the device is back")
    device.say_reported("warm")
    until(lambda: any(e["health"] == "warm" for e in watching.events("reported")), "and goes on")
    assert watching.stop() == 130
    assert fleet.ok("job", "list", "--unfinished", "--offline")["jobs"] == []


def test_watching_without_json_prints_lines_and_ends_in_time(fleet: Fleet) -> None:
    fleet.online("cam-1").alert("disk", "full\x07")
    done = fleet.run("watch", "--for", "1s")
    assert done.status == 0
    assert "cam-1  is online, healthy, Raspberry Pi 4 Model B" in done.out and "alert disk: full\\x07" in done.out


def test_the_table_on_a_terminal(fleet: Fleet) -> None:
    """A real pseudo-terminal: alerts, jobs and devices are drawn, and the screen is given back."""
    device = fleet.online("cam-1")
    fleet.enrolled("cam-2")
    device.plays = lambda job: WELL[:2]
    device.alert("heat", "throttled")
    fleet.ok("job", "bench.run", "model=digits", "--device", "cam-1")
    until(lambda: device.done, "the device has the job")
    master, slave = pty.openpty()
    environment = {"COLUMNS": "120", "LINES": "30", "TERM": "xterm"}
    running = fleet.start("watch", "--for", "3s", stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        shown += part
    os.close(master)
    assert running.wait(20) == 0
    text = shown.decode()
    for part in ("acme: 1 of 2 devices online", "ALERTS", "throttled", "JOBS UNDER WAY", "bench.run", "cam-2"):
        assert part in text, text
    assert text.index("\x1b[?1049h") < text.index("acme:") < text.rindex("\x1b[?1049l") < text.rindex("\x1b[?25h")


def test_commands_beside_each_other_leave_the_right_document_behind(fleet: Fleet) -> None:
    """Eight processes give jobs at once; the device gets all of them once, in the order of their numbers."""
    device = fleet.online("cam-1")
    running = [fleet.start("job", "store.gc", "-d", "cam-1", stdout=subprocess.DEVNULL) for _ in range(8)]
    assert [process.wait(60) for process in running] == [0] * 8
    fleet.ok("job", "ping", "--device", "cam-1", "--wait", "--timeout", "30s")
    assert [job.seq for job in device.done] == list(range(1, 10))
    assert len({job.job_id for job in device.done}) == 9


def test_what_a_killed_broker_has_forgotten_is_said_again(fleet: Fleet) -> None:
    """It saves at intervals: what came after the last one is gone, sessions and doorbells alike."""
    device = fleet.enrolled("cam-1")
    watching = Watching(fleet, "--json")
    until(lambda: watching.events("device"), "it watches")
    job = fleet.ok("job", "store.gc", "--device", "cam-1")["job"]
    fleet.ok("desired", "set", "log.level=debug", "--device", "cam-1")
    fleet.broker.stop(signal.SIGKILL)
    shutil.rmtree(fleet.scratch / "data")  # and its disk, to be sure
    (fleet.scratch / "data").mkdir()
    fleet.broker.start()
    until(lambda: [e["connected"] for e in watching.events("connection")][-1:] == [True], "it is back")
    fleet.connect(device)
    until(lambda: [job.job_id for job in device.done] == [job], "the device has the job all the same")
    until(lambda: [each.config for each in device.desired] == [{"log": {"level": "debug"}}], "and what is desired")
    until(lambda: any(e["state"] == "succeeded" for e in watching.events("job")), "its end is heard")
    watching.stop()


def test_a_watch_that_is_killed_again_and_again_misses_nothing(fleet: Fleet) -> None:
    """What was acknowledged is stored: the broker keeps the rest for the next one."""
    devices = [fleet.online(f"cam-{number}") for number in range(3)]
    jobs = [fleet.ok("job", "store.gc", "--all")["job"] for _ in range(30)]
    chance = random.Random(5)
    for _ in range(8):
        watching = fleet.start("watch", "--json", stdout=subprocess.PIPE)
        assert watching.stdout is not None and watching.stdout.readline()  # it is at work
        time.sleep(chance.uniform(0, 0.15))
        watching.kill()
        watching.wait(20)
        watching.stdout.close()
    fleet.ok("job", "ping", "--all", "--wait", "--timeout", "60s")
    for job in jobs:
        assert set(fleet.ok("job", "show", job, "--offline")["devices"][0]["said"]) >= {"state", "rev"}
    listed = fleet.ok("job", "list", "--offline", "--last", "1000")["jobs"]
    assert {state for row in listed for state in row["devices"].values()} == {"succeeded"}
    for device in devices:
        assert [job.job_id for job in device.done[:30]] == jobs and device.refused == {}


def test_answers_that_nobody_kept_are_asked_for_again(fleet: Fleet) -> None:
    """The operator's session at the broker was lost, or there never was one, while the device answered."""
    device = fleet.online("cam-1")
    job = fleet.ok("job", "store.gc", "--device", "cam-1")["job"]
    (fleet.folder / "session.id").write_text("0123456789abcdef")  # another name: nothing was kept for that
    until(lambda: device.done, "the device has it")
    fleet.ok("job", "list")
    until(lambda: fleet.states(job) == {"cam-1": "succeeded"}, "it says again what became of it")
    assert len(device.done) == 1


def test_the_end_of_a_job_that_went_to_nobody_is_asked_for_again(fleet: Fleet) -> None:
    """The device had answered; when it was done, the broker had no session for the operator any more."""
    device = fleet.online("cam-1")
    device.plays = lambda job: WELL[:2]
    job = fleet.ok("job", "store.gc", "--device", "cam-1")["job"]
    until(lambda: fleet.states(job) == {"cam-1": "running"}, "the device has answered")
    (fleet.folder / "session.id").write_text("0123456789abcdef")  # another name: nothing was kept for that
    device.say_state(device.done[0], *WELL[2])
    fleet.ok("job", "list")
    until(lambda: fleet.states(job) == {"cam-1": "succeeded"}, "it says again how it ended")
    assert len(device.done) == 1 and device.refused == {}
