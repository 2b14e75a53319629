"""An operator gives jobs by the command line: a real broker, devices that are simulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.wire import messages as wire
from tests.fleet.conftest import Fleet, edge_fleet
from tests.fleet.device import WELL
from tests.fleet.waiting import until


def test_a_job_is_given_done_and_told(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.result = {"freed": 3}
    done = fleet.ok("job", "store.gc", "--device", "cam-1", "--wait", "--timeout", "20s")
    assert done["devices"][0]["state"] == "succeeded" and done["devices"][0]["said"]["result"] == {"freed": 3}
    assert [job.op for job in device.done] == ["store.gc"] and device.refused == {}
    listed = fleet.ok("job", "list", "--offline")["jobs"]
    assert [(row["job"], row["devices"]) for row in listed] == [(done["job"], {"cam-1": "succeeded"})]
    assert fleet.ok("job", "list", "--unfinished", "--offline")["jobs"] == []


def test_arguments_options_and_deadlines_reach_the_device_as_they_were_meant(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    fleet.ok(
        "job", "model.activate", "model=digits", "version=1.0", "--device", "cam-1", "--priority", "9",
        "--not-after", "2h", "--window", "0 2 * * *", "--window-for", "90m", "--window-tz", "Europe/Berlin",
        "--step-timeout", "5m", "--total-timeout", "2d", "--this-start", "--id", "my-job", "--wait", "--timeout", "20s",
    )  # fmt: skip
    (job,) = device.done
    assert job.args == {"model": "digits", "version": "1.0"} and job.priority == 9 and job.job_id == "my-job"
    assert job.window == wire.Window(cron="0 2 * * *", duration_s=5400, tz="Europe/Berlin")
    assert (job.step_timeout_s, job.total_timeout_s, job.boot_nonce) == (300.0, 172_800.0, device.nonce)
    assert job.not_after is not None and job.kind == "change" and job.lane == "normal"
    config = fleet.scratch / "night.toml"
    config.write_text("[log]\nlevel = 'debug'\n")
    fleet.ok("job", "config.apply", f"config=@{config}", "--device", "cam-1", "--wait", "--timeout", "20s")
    fleet.ok("job", "maintenance.plan", "--args", '{"run": ["scrub"]}', "--device", "cam-1", "--wait")
    assert [job.args for job in device.done[1:]] == [{"config": {"log": {"level": "debug"}}}, {"run": ["scrub"]}]


def test_the_exit_status_is_0_only_when_all_succeeded(fleet: Fleet) -> None:
    good, bad = fleet.online("cam-1"), fleet.online("cam-2")
    bad.plays = lambda job: [("queued", "accepted", None), ("failed", None, "step_timeout")]
    done = fleet.run("job", "store.gc", "--all", "--wait", "--timeout", "20s")
    assert done.status == 1
    assert "succeeded" in done.out and "step_timeout: because of step_timeout" in done.out
    assert "cam-2  failed" in done.err  # one line for each that moved
    assert good.done and bad.done


def test_waiting_ends_in_time_and_says_who_is_not_done(fleet: Fleet) -> None:
    fleet.online("cam-1")
    fleet.enrolled("cam-2")
    done = fleet.run("job", "store.gc", "--all", "--wait", "--timeout", "2s")
    assert done.status == 1 and "succeeded" in done.out and "sent" in done.out


def test_a_queue_of_jobs_flows_one_document_at_a_time(fleet: Fleet) -> None:
    """The doorbell holds one document; the next one rings when the device has answered."""
    device = fleet.enrolled("cam-1")
    jobs = [fleet.ok("job", "store.gc", "--device", "cam-1")["job"] for _ in range(4)]
    assert [fleet.states(job)["cam-1"] for job in jobs] == ["sent", "waiting", "waiting", "waiting"]
    fleet.connect(device)
    last = fleet.ok("job", "store.scrub", "--device", "cam-1", "--wait", "--timeout", "20s")
    assert last["devices"][0]["state"] == "succeeded"
    assert [job.job_id for job in device.done] == [*jobs, last["job"]] and device.refused == {}
    assert [document.generation for document in device.documents] == [1, 2, 3, 4, 5]
    assert {fleet.states(job)["cam-1"] for job in jobs} == {"succeeded"}


def test_states_that_came_while_nobody_was_there_are_not_missed(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.plays = lambda job: WELL[:1]
    job = fleet.ok("job", "store.gc", "--device", "cam-1")["job"]
    until(lambda: device.done, "the device has the job")
    device.say_state(device.done[0], "running", "installing")
    device.say_state(device.done[0], "succeeded")  # the operator is away
    assert fleet.states(job) == {"cam-1": "succeeded"}


def test_the_registry_and_the_broker_survive_a_restart_of_the_broker(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.plays = lambda job: WELL[:2]
    job = fleet.ok("job", "store.gc", "--device", "cam-1")["job"]
    until(lambda: device.done, "the device has the job")
    fleet.broker.stop()
    assert fleet.run("job", "show", job).status == 0  # from the books, with a warning
    assert "cannot connect" in fleet.run("job", "show", job).err
    fleet.broker.start()
    until(device.connection.client.is_connected, "the device is back")
    device.say_state(device.done[0], "succeeded")
    assert fleet.states(job) == {"cam-1": "succeeded"}


def test_a_job_for_some_devices_goes_to_those_that_match_now(fleet: Fleet) -> None:
    pi, other = fleet.enrolled("cam-1"), fleet.enrolled("cam-2")
    other.facts = {**other.facts, "board": "Jetson Orin Nano", "mem_total_mb": 7600}
    for device in (pi, other):
        fleet.connect(device)
    done = fleet.ok("job", "store.gc", "--where", "board=raspberry*", "--wait", "--timeout", "20s")
    assert [each["device"] for each in done["devices"]] == ["cam-1"]
    done = fleet.ok("job", "store.gc", "--where", "facts.mem_total_mb>=7000", "--wait", "--timeout", "20s")
    assert [each["device"] for each in done["devices"]] == ["cam-2"]
    assert "no device is meant" in fleet.run("job", "store.gc", "--where", "board=Coral*").err
    (fleet.folder / "fleet.toml").write_text(
        (fleet.folder / "fleet.toml").read_text() + 'orins = ["board=Jetson*", "memory>1000"]\n'
    )
    assert [each["device"] for each in fleet.ok("devices", "list", "--where", "group=orins")["devices"]] == ["cam-2"]
    assert fleet.ok("devices", "groups")["groups"] == {"orins": 1}


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_a_job_that_nobody_has_seen_is_taken_back(fleet: Fleet) -> None:
    device = fleet.enrolled("cam-1")
    first, second = (fleet.ok("job", op, "--device", "cam-1")["job"] for op in ("store.gc", "store.scrub"))
    assert fleet.ok("job", "cancel", second)["devices"] == {"cam-1": "withdrawn"}
    fleet.connect(device)
    until(lambda: fleet.states(first) == {"cam-1": "succeeded"}, "the first is done")
    assert fleet.states(second) == {"cam-1": "void"} and [job.op for job in device.done] == ["store.gc"]


def test_a_published_job_of_an_absent_device_never_runs_once_it_is_cancelled(fleet: Fleet) -> None:
    device = fleet.enrolled("cam-1")
    jobs = [fleet.ok("job", op, "--device", "cam-1")["job"] for op in ("device.reboot", "store.gc")]
    assert fleet.ok("job", "cancel", jobs[0])["devices"] == {"cam-1": "asked"}
    fleet.connect(device)
    until(lambda: fleet.states(jobs[1]) == {"cam-1": "succeeded"}, "the later job is done")
    assert [job.op for job in device.done] == ["ping", "store.gc"] and device.refused == {}
    assert device.cancelled == [jobs[0]] and fleet.states(jobs[0]) == {"cam-1": "void"}


def test_a_running_job_is_told_to_stop(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.plays = lambda job: WELL[:2] if job.op == "bench.run" else WELL
    job = fleet.ok("job", "bench.run", "model=digits", "--device", "cam-1")["job"]
    until(lambda: fleet.states(job) == {"cam-1": "running"}, "it runs")
    assert fleet.ok("job", "cancel", job)["devices"] == {"cam-1": "asked"}
    until(lambda: device.cancelled == [job], "the device knows")
    device.say_state(device.done[0], "cancelled", None, "cancelled")
    assert fleet.states(job) == {"cam-1": "cancelled"}
    again = fleet.run("job", "cancel", job)
    assert again.status == 1 and "it has ended" in again.err


# -- destroy ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def second_person(fleet: Fleet) -> Path:
    """Somebody else with a folder of his own, whose public key the fleet knows."""
    theirs = fleet.scratch / "bob"
    assert edge_fleet(theirs, "keys", "add", "bob", "--classes", "destroy", "--no-password").status == 0
    public = edge_fleet(theirs, "keys", "export", "bob").out.strip()
    fleet.ok("keys", "add", "bob", "--classes", "destroy", "--public", public)
    return theirs


def test_destroying_needs_two_people(fleet: Fleet, second_person: Path) -> None:
    device = fleet.online("cam-1")
    alone = fleet.run("job", "model.remove", "model=digits", "--device", "cam-1", "--yes")
    assert alone.status == 1 and "needs 1 more signature" in alone.err and "--export FILE" in alone.err
    file = fleet.scratch / "wipe.job"
    job = fleet.ok("job", "model.remove", "model=digits", "--device", "cam-1", "--export", str(file), "--yes")["job"]
    assert "1 of 2 signatures" in fleet.run("job", "submit", str(file)).err
    assert device.documents == [] and fleet.states(job) == {"cam-1": "draft"}
    signed = edge_fleet(second_person, "keys", "sign", str(file), "--yes")
    assert signed.status == 0 and 'model.remove (destroy) {"model": "digits"}' in signed.err
    twice = edge_fleet(second_person, "keys", "sign", str(file), "--yes")
    assert twice.status == 1 and "has signed it already" in twice.err
    assert fleet.ok("job", "submit", str(file), "--wait", "--timeout", "20s")["devices"][0]["state"] == "succeeded"
    assert [job.op for job in device.done] == ["model.remove"]
    assert "it is answered" in fleet.run("job", "submit", str(file)).err


def test_an_exported_job_is_for_one_start_and_one_moment(fleet: Fleet, second_person: Path) -> None:
    device = fleet.online("cam-1")

    def exported(name: str) -> Path:
        file = fleet.scratch / name
        fleet.ok("job", "model.remove", "model=digits", "--device", "cam-1", "--export", str(file), "--yes")
        assert edge_fleet(second_person, "keys", "sign", str(file), "--yes").status == 0
        return file

    file = exported("one.job")
    device.restart()
    assert "has started anew since" in fleet.run("job", "submit", str(file)).err
    file = exported("two.job")
    fleet.ok("job", "store.gc", "--device", "cam-1", "--wait", "--timeout", "20s")
    assert "was given a later one since" in fleet.run("job", "submit", str(file)).err
    assert [job.op for job in device.done] == ["store.gc"]


def test_an_exported_job_that_somebody_changed_is_refused(fleet: Fleet, second_person: Path) -> None:
    fleet.online("cam-1")
    file = fleet.scratch / "wipe.job"
    fleet.ok("job", "model.remove", "model=digits", "--device", "cam-1", "--export", str(file), "--yes")
    document = json.loads(file.read_text())
    for broken in (
        document | {"format": "other"}, {"format": document["format"]}, document | {"documents": []},
        document | {"documents": [{"device": "cam-1", "envelope": "%%%"}]}, [], "x", document | {"extra": 1},
        document | {"documents": [document["documents"][0] | {"device": "cam-2"}]},
    ):  # fmt: skip
        file.write_text(json.dumps(broken))
        done = fleet.run("job", "submit", str(file))
        assert done.status == 1 and done.err.startswith("error: cannot "), broken
    file.write_bytes(b"\xff\xfe")
    assert fleet.run("job", "submit", str(file)).err.startswith("error: cannot read")
