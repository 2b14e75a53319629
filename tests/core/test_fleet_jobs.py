"""Jobs over the real path: lanes, priorities, windows, cancelling, restarts, and the last word on each."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import tarfile
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests import onnx_models
from tests.core.fleet_device import PATIENCE_S, FleetDevice, connected
from tests.core.test_daemon import bundle
from tests.link.broker import until

SHORT, LONG = ("[selection]\nmin_rounds = 4\nmax_rounds = 4", "[selection]\nmin_rounds = 9999\nmax_rounds = 10000")


@pytest.fixture(scope="module")
def busy():
    """A connected device with a model whose trial takes minutes, unless somebody ends it."""
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    try:
        with connected(folder, config=SHORT) as device:
            variants = {name: ("fp32", onnx_models.linear()) for name in ("one", "two")}
            device.cli("models", "add", bundle(folder / "slow.edgemodel", variants, name="slow"))
            device.stop()
            device.configure(LONG)
            device.start()
            device.wait_until_known()
            yield device
            assert device.stop() == 0
            assert "Traceback" not in device.logs()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def lane(busy):
    """The normal lane is taken by a trial; its job. It is cancelled at the end."""
    job_id = busy.fleet.give("bench.run", {"model": "slow"})
    busy.fleet.running(job_id, "trying")
    yield job_id
    if busy.fleet.state(job_id) == "running":
        busy.fleet.cancel(job_id)
        assert busy.fleet.ended(job_id)["state"] == "cancelled"


@pytest.fixture
def device(short_dir):
    """A connected device of its own."""
    with connected(short_dir, config=SHORT) as running:
        yield running


def test_every_state_of_a_job_is_told_with_rising_revisions(busy: FleetDevice) -> None:
    job_id = busy.fleet.give("store.scrub")
    busy.fleet.ended(job_id)
    states = busy.fleet.states(job_id)
    assert [state["rev"] for state in states] == sorted({state["rev"] for state in states})
    assert states[-1]["state"] == "succeeded"
    assert {state["epoch"] for state in states} == {1}
    shown = busy.json("jobs", "show", job_id)
    assert (shown["state"], shown["op"], shown["rev"]) == ("succeeded", "store.scrub", states[-1]["rev"])
    assert job_id in busy.cli("jobs", "list").stdout


def test_an_operation_that_there_is_not_is_rejected(busy: FleetDevice) -> None:
    for op, fields, code in (
        ("no.such-op", {}, "unknown_op"),
        ("status", {}, "unknown_op"),  # a question, and no job
        ("store.gc", {"kind": "observe"}, "wrong_class"),
        ("store.gc", {"lane": "rescue"}, "wrong_lane"),
    ):
        ended = busy.fleet.ended(busy.fleet.give(op, **fields))
        assert (ended["state"], ended["error"]["code"]) == ("rejected", code)


def test_a_running_job_is_cancelled_at_its_next_safe_point(busy: FleetDevice, lane: str) -> None:
    busy.fleet.cancel(lane)
    ended = busy.fleet.ended(lane)
    assert (ended["state"], ended["error"]["code"]) == ("cancelled", "cancelled")
    until(lambda: busy.status()["jobs"] == {}, "the lane is free", PATIENCE_S)
    assert busy.fleet.done("store.gc") is not None


def test_a_waiting_job_is_cancelled_without_having_begun(busy: FleetDevice, lane: str) -> None:
    waiting = busy.fleet.give("store.rotate-key")
    until(lambda: busy.fleet.state(waiting) == "queued", "it waits", PATIENCE_S)
    key = busy.admin_get("/v1/store")["key_id"]
    busy.fleet.cancel(waiting)
    ended = busy.fleet.ended(waiting)
    assert (ended["state"], ended["attempt"]) == ("cancelled", 0)
    assert busy.admin_get("/v1/store")["key_id"] == key


def test_what_has_ended_cannot_be_cancelled(busy: FleetDevice) -> None:
    job_id = busy.fleet.give("ping")
    rev = busy.fleet.ended(job_id)["rev"]
    busy.fleet.cancel(job_id, "never-given")
    assert busy.fleet.done("ping") == {"pong": True}
    assert busy.fleet.ended(job_id)["rev"] == rev


def test_rescue_jobs_and_questions_pass_by_a_busy_lane(busy: FleetDevice, lane: str) -> None:
    waiting = busy.fleet.give("store.gc")
    assert busy.fleet.done("ping", lane="rescue") == {"pong": True}
    assert busy.fleet.done("logs.tail", {"lines": 5}, lane="rescue")["lines"]
    assert busy.fleet.done("diagnostics.collect", lane="rescue")["files"]
    assert busy.fleet.ask("ping")["result"] == {"pong": True}
    jobs = busy.fleet.ask("status")["result"]["jobs"]
    assert jobs["normal"]["job_id"] == lane
    assert jobs["normal"]["event"]["stage"] in ("try", "measure")
    assert busy.fleet.state(waiting) == "queued"
    assert busy.fleet.state(lane) == "running"
    listed = {row["job_id"]: row["state"] for row in busy.fleet.ask("jobs.list")["result"]["jobs"]}
    assert (listed[lane], listed[waiting]) == ("running", "queued")


def test_the_urgent_come_first_and_then_the_elder(busy: FleetDevice, lane: str) -> None:
    """Each rotation names the key that the one before it has made: what is told in one go still has its order."""
    fleet = busy.fleet
    order = [fleet.give("store.rotate-key", priority=priority) for priority in (1, 5, 9, 5)]
    until(lambda: all(fleet.state(job) == "queued" for job in order), "all wait", PATIENCE_S)
    fleet.cancel(lane)
    done = {job: fleet.ended(job)["result"] for job in order}
    ran = [done[job] for job in (order[2], order[1], order[3], order[0])]
    assert [one["old_key"] for one in ran[1:]] == [one["new_key"] for one in ran[:-1]]


def test_a_job_waits_for_its_window_and_blocks_nobody(busy: FleetDevice) -> None:
    far = datetime.now(timezone.utc) + timedelta(hours=12)
    window = {"cron": f"{far.minute} {far.hour} * * *", "duration_s": 60}
    waiting = busy.fleet.give("store.rotate-key", window=window)
    busy.fleet.running(waiting, "waiting_window")
    assert busy.fleet.done("store.gc") is not None
    busy.fleet.cancel(waiting)
    assert busy.fleet.ended(waiting)["state"] == "cancelled"


def test_in_its_window_a_job_runs_at_once(busy: FleetDevice) -> None:
    busy.fleet.done("store.gc", window={"cron": "* * * * *", "duration_s": 120, "tz": "Asia/Kolkata"})


def test_a_window_that_makes_no_sense_is_told(busy: FleetDevice) -> None:
    for window in (
        {"cron": "0 0 31 2 *", "duration_s": 60},
        {"cron": "every day at", "duration_s": 60},
        {"cron": "0 0 * * *", "duration_s": 60, "tz": "../../etc/passwd"},
    ):
        ended = busy.fleet.ended(busy.fleet.give("store.gc", window=window))
        assert (ended["state"], ended["error"]["code"]) == ("rejected", "bad_args")


def test_too_late_is_too_late(busy: FleetDevice) -> None:
    ended = busy.fleet.ended(busy.fleet.give("store.gc", not_after="2026-01-01T00:00:00Z"))
    assert (ended["state"], ended["error"]["code"]) == ("rejected", "expired")
    busy.fleet.done("store.gc", not_after="2199-01-01T00:00:00Z")


def test_dates_are_refused_while_nobody_vouches_for_the_clock(device: FleetDevice) -> None:
    device.config.write_text(device.config.read_text().replace('trust = "always"', 'trust = "never"'))
    device.restart()
    device.wait_until_known()
    for fields in (
        {"not_after": "2199-01-01T00:00:00Z"},
        {"window": {"cron": "* * * * *", "duration_s": 60}},
    ):
        ended = device.fleet.ended(device.fleet.give("store.gc", **fields))
        assert (ended["state"], ended["error"]["code"]) == ("rejected", "clock_untrusted")
        assert ended["clock_trusted"] is False
    device.fleet.done("store.gc")


def test_a_step_that_takes_too_long_fails_and_the_lane_goes_on(busy: FleetDevice) -> None:
    for fields, code in (({"step_timeout_s": 0.5}, "step_timeout"), ({"total_timeout_s": 0.5}, "total_timeout")):
        ended = busy.fleet.ended(busy.fleet.give("bench.run", {"model": "slow"}, **fields))
        assert (ended["state"], ended["error"]["code"]) == ("failed", code)
    assert busy.fleet.done("store.gc") is not None


def test_core_restarts_as_a_job(device: FleetDevice) -> None:
    before = device.fleet.nonce
    job_id = device.fleet.give("agent.restart")
    device.wait_until_back()  # that it was about to need not have been told any more
    ended = device.fleet.ended(job_id)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    assert device.fleet.nonce != before
    assert device.fleet.done("ping") == {"pong": True}
    until(lambda: device.status()["link"]["connected"], "the new core knows that link is connected", 10)


def test_a_reboot_is_asked_for_waited_for_and_given_up(device: FleetDevice) -> None:
    """Nobody follows the request here: over a restart of core the job waits on, at its deadline it fails."""
    request = device.state / "reboot-requested"
    job_id = device.fleet.give("device.reboot", step_timeout_s=8.0)
    device.fleet.running(job_id, "rebooting")
    until(request.exists, "root is asked", PATIENCE_S)
    device.restart(signal.SIGKILL)
    until(lambda: device.fleet.states(job_id)[-1]["attempt"] == 2, "it goes on", PATIENCE_S)
    assert device.fleet.states(job_id)[-1]["phase"] == "rebooting"
    assert device.fleet.done("ping", lane="rescue") == {"pong": True}
    ended = device.fleet.ended(job_id)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "step_timeout")
    assert not request.exists()
    assert device.fleet.done("store.gc") is not None


def test_the_end_of_a_job_is_told_by_the_next_start(device: FleetDevice) -> None:
    """Link is gone while it ends; then core is killed too."""
    device.fleet.done("ping")
    device.stop_link(signal.SIGKILL)
    document = device.fleet.sealed(device.fleet.document(device.fleet.job("store.rotate-key")))
    with device.admin() as admin:
        assert admin.call("POST", "/v1/link/received?topic=dn/job", document)["verdict"] == "accepted"
        until(lambda: admin.call("GET", "/v1/jobs/j2")["state"] == "succeeded", "it ends", PATIENCE_S)
    device.restart(signal.SIGKILL)
    assert device.fleet.states("j2") == []
    device.start_link()
    ended = device.fleet.ended("j2")
    assert (ended["state"], ended["result"]["new_key"]) == ("succeeded", device.admin_get("/v1/store")["key_id"])


def test_the_log_is_told(busy: FleetDevice) -> None:
    for lines in (
        busy.fleet.ask("logs.tail", {"lines": 500})["result"]["lines"],
        busy.fleet.done("logs.tail")["lines"],
    ):
        assert any("ready after" in line for line in lines)
    assert busy.fleet.ask("logs.tail", {"lines": 0})["error"]["code"] == "bad_args"
    assert busy.fleet.ask("ping", {"x": 1})["error"]["code"] == "bad_args"


@pytest.mark.parametrize("how", ["job", "rpc"])
def test_diagnostics_tell_everything_but_secrets(busy: FleetDevice, how: str) -> None:
    fleet = busy.fleet
    found = fleet.done("diagnostics.collect") if how == "job" else fleet.ask("diagnostics.collect")["result"]
    data = base64.b64decode(found["archive"])
    assert len(data) <= 22 << 10
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    assert set(files) == set(found["files"]) >= {"status.json", "doctor.json", "config.json", "jobs.json", "log.txt"}
    assert json.loads(files["config.json"])["link"]["host"] == "localhost"
    everything = b"".join(files.values())
    secret = (busy.state / "keys" / "device-secret").read_bytes().strip()
    key = Path(busy.config.read_text().partition('key_file = "')[2].partition('"')[0]).read_bytes().split(b"\n")[1]
    for hidden in (secret, secret[-32:], key, b"PRIVATE KEY", b"AGE-SECRET-KEY"):
        assert hidden not in everything


def test_maintenance_runs_on_request(busy: FleetDevice) -> None:
    tasks = busy.fleet.done("maintenance.plan", {"run": ["disk", "ages", "clock", "sweep", "scrub"]})["tasks"]
    assert [task["task"] for task in tasks] == ["disk", "ages", "clock", "sweep", "scrub"]
    assert all(task["ended_at"] for task in tasks)
    by_name = {row["task"]: row for row in busy.json("maintenance")["tasks"]}
    assert by_name["scrub"]["text"] == tasks[-1]["text"] == f"{by_name['scrub']['data']['blobs']} blobs are whole"
    told = busy.fleet.reports("it ran", lambda said: {row["task"]: row["ok"] for row in said["maintenance"]}["scrub"])
    assert {row["task"] for row in told["maintenance"]} == set(by_name)


def test_golden_sets_are_run_again_on_what_serves(device: FleetDevice) -> None:
    data = onnx_models.linear()
    device.cli("models", "add", bundle(device.folder / "m.edgemodel", {"fp32": ("fp32", data)}, golden_from=data))
    (task,) = device.fleet.done("maintenance.plan", {"run": ["golden"]})["tasks"]
    assert task["ok"] is True
    assert task["data"]["models"]["m"]["value"] == 1.0


def test_a_stop_in_the_middle_of_a_job_is_quick_and_the_job_goes_on_afterwards(busy: FleetDevice, lane: str) -> None:
    began = time.monotonic()
    assert busy.stop() == 0
    assert time.monotonic() - began < 20
    busy.start()
    busy.wait_until_known()
    until(lambda: busy.fleet.states(lane)[-1]["attempt"] == 2, "it goes on", PATIENCE_S)
    assert busy.fleet.states(lane)[-1]["state"] == "running"
