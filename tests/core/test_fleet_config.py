"""The configuration from afar: jobs and the desired twin, its way back, and what is reported of both."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.core.fleet_device import PATIENCE_S, FleetDevice, connected
from tests.link.broker import free_port, until

FAST = {"telemetry": {"memory_s": 1.0}}


@pytest.fixture
def device(short_dir):
    """A connected device of its own."""
    with connected(short_dir) as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.logs()


def broken() -> dict:
    """A configuration with which link finds nobody."""
    return {"link": {"port": free_port(), "confirm_s": 3.0}}


def records(device: FleetDevice, stream: str) -> int:
    return sum(len(message["records"]) for message in device.fleet.heard(f"up/tel/{stream}"))


def test_a_job_changes_the_configuration_at_once_and_over_restarts(device: FleetDevice) -> None:
    before = records(device, "memory")
    device.fleet.done("config.apply", {"config": FAST})
    until(lambda: records(device, "memory") >= before + 3, "the new rate holds", 15)
    device.fleet.reports("it holds", lambda said: (said["config_state"], said["config"]) == ("applied", FAST))
    device.restart(signal.SIGKILL)
    before = records(device, "memory")
    until(lambda: records(device, "memory") >= before + 3, "the rate holds over a restart", 30)
    assert device.status()["config_state"] == "applied"


def test_what_is_set_from_afar_replaces_what_was(device: FleetDevice) -> None:
    device.fleet.done("config.apply", {"config": {"log": {"level": "debug"}}})
    device.fleet.done("config.apply", {"config": FAST})
    device.fleet.reports("the second alone holds", lambda said: said["config"] == FAST)
    device.fleet.done("config.apply", {"config": {}})
    device.fleet.reports("nothing is set", lambda said: said["config"] == {})


@pytest.mark.parametrize(
    "config",
    [
        {"trust": {"unsigned": "refuse"}},
        {"sockets": {"link_user": "root"}},
        {"store": {"quota_mb": 1}},
        {"link": {"port": 70_000}},
        {"link": {"no_such_key": 1}},
        {"telemetry": {"memory_s": "1"}},
        {"selection": {"min_rounds": 100, "max_rounds": 10}},
    ],
)
def test_what_may_not_be_set_is_rejected_and_changes_nothing(device: FleetDevice, config: dict) -> None:
    ended = device.fleet.ended(device.fleet.give("config.apply", {"config": config}))
    assert (ended["state"], ended["error"]["code"]) == ("rejected", "bad_args")
    assert device.status()["config_state"] == "default"


def test_a_configuration_that_breaks_the_link_takes_itself_back(device: FleetDevice) -> None:
    device.fleet.done("config.apply", {"config": FAST})
    ended = device.fleet.ended(device.fleet.give("config.apply", {"config": FAST | broken()}))
    assert (ended["state"], ended["error"]["code"]) == ("failed", "undone")
    assert "the link did not come back" in ended["error"]["text"]
    said = device.fleet.reports("it is reverted", lambda said: said["config_state"] == "reverted")
    assert said["config"] == FAST
    assert device.fleet.done("ping") == {"pong": True}


def test_a_change_of_the_link_that_works_stays(device: FleetDevice) -> None:
    device.fleet.done("config.apply", {"config": {"link": {"keepalive_s": 7, "confirm_s": 20.0}}})
    assert device.fleet.done("ping") == {"pong": True}
    device.fleet.reports("it stays", lambda said: said["config_state"] == "applied")


def on_probation(status: dict[str, Any]) -> bool:
    return status["config_state"] == "confirming" and status["under_way"] is None


def test_killed_on_probation_it_still_takes_itself_back(device: FleetDevice) -> None:
    job_id = device.fleet.give("config.apply", {"config": broken()})
    until(lambda: on_probation(device.status()), "it is on probation, and no operation waits for it", PATIENCE_S)
    device.restart(signal.SIGKILL)
    ended = device.fleet.ended(job_id)
    assert ended["state"] == "failed"
    assert device.status()["config_state"] == "reverted"
    assert device.fleet.done("ping") == {"pong": True}


def test_on_probation_it_takes_itself_back_although_the_job_is_lost(device: FleetDevice) -> None:
    """The journal is damaged in the middle: nobody knows of the job any more, and the way back is open all the same."""
    device.fleet.give("config.apply", {"config": broken()})
    until(lambda: on_probation(device.status()), "it is on probation, and no operation waits for it", PATIENCE_S)
    device.stop(signal.SIGKILL)
    (device.state / "journal.db").write_bytes(b"nothing of use" * 1000)
    device.start()
    until(lambda: device.status()["config_state"] == "reverted", "it is taken back", PATIENCE_S)
    assert device.json("jobs", "reset")["counters_kept"] is False


def test_a_job_of_the_same_name_in_another_enrolment_is_another_job(device: FleetDevice) -> None:
    assert device.fleet.done("config.apply", {"config": FAST}, job_id="settings") == {}
    device.trust(device.keys.trust(device.name, epoch=2))
    device.process.send_signal(signal.SIGHUP)
    until(lambda: device.fleet.info["epoch"] == 2, "the second enrolment began", PATIENCE_S)
    device.fleet.epoch = 2
    device.fleet.done("config.apply", {"config": {"log": {"level": "warning"}}}, job_id="settings")
    device.fleet.reports("the second holds", lambda said: said["config"] == {"log": {"level": "warning"}})


# The twin.


def test_what_is_desired_is_applied_and_reported(device: FleetDevice) -> None:
    version = device.fleet.desire(FAST)
    said = device.fleet.reports("it holds", lambda said: said["config_state"] == "applied")
    assert (said["desired_version"], said["config"], said["drift"]) == (version, FAST, [])
    assert device.fleet.info["desired_version"] == version


def test_drift_is_told_where_a_job_went_over_what_is_desired(device: FleetDevice) -> None:
    device.fleet.desire(FAST)
    device.fleet.reports("it holds", lambda said: said["config"] == FAST)
    device.fleet.done("config.apply", {"config": {"telemetry": {"memory_s": 9.0}}})
    said = device.fleet.reports("there is drift", lambda said: said["drift"])
    assert said["drift"] == [{"key": "telemetry.memory_s", "desired": 1.0, "actual": 9.0}]
    assert device.status()["drift"] == said["drift"]
    device.fleet.desire(FAST)
    device.fleet.reports("the drift is gone", lambda said: not said["drift"])


def test_what_cannot_be_is_said_and_changes_nothing(device: FleetDevice) -> None:
    device.fleet.desire(FAST)
    device.fleet.reports("it holds", lambda said: said["config"] == FAST)
    device.fleet.desire({"trust": {"unsigned": "refuse"}})
    said = device.fleet.reports("it is refused", lambda said: said["config_state"] == "refused")
    assert said["config"] == FAST
    assert said["drift"] == [{"key": "trust.unsigned", "desired": "refuse", "actual": "allow"}]
    device.fleet.desire({})
    device.fleet.reports("the next is good", lambda said: (said["config"], said["config_state"]) == ({}, "applied"))


def test_a_desired_state_that_breaks_the_link_is_taken_back_and_not_tried_again(device: FleetDevice) -> None:
    wanted = broken()
    device.fleet.desire(wanted)
    said = device.fleet.reports("it is reverted", lambda said: said["config_state"] == "reverted")
    assert {row["key"] for row in said["drift"]} == {"link.port", "link.confirm_s"}
    device.restart()
    device.wait_until_known()
    assert device.fleet.done("ping") == {"pong": True}
    assert device.status()["config_state"] == "reverted"


def test_of_many_the_last_holds(device: FleetDevice) -> None:
    for seconds in range(1, 21):
        last = device.fleet.desire({"telemetry": {"heat_s": float(seconds)}})
    said = device.fleet.reports("the last holds", lambda said: said["config"] == {"telemetry": {"heat_s": 20.0}})
    assert (said["desired_version"], said["drift"]) == (last, [])


def test_accepted_and_killed_it_is_applied_by_the_next_start(device: FleetDevice) -> None:
    """The kill comes right after the verdict, at whatever point of applying it."""
    for number in range(1, 6):
        message = device.fleet.sealed(device.fleet.desired_message({"telemetry": {"heat_s": float(number)}}))
        with device.admin() as admin:
            assert admin.call("POST", "/v1/link/received?topic=dn/desired", message)["verdict"] == "accepted"
        device.restart(signal.SIGKILL)
        # "applied" alone may still be said of the one before.
        until(lambda: device.status()["drift"] == [], "it is in force", PATIENCE_S)
        until(lambda: device.status()["config_state"] == "applied", "it has stood its probation", PATIENCE_S)


def test_what_is_too_long_to_report_is_left_out_and_its_size_told(device: FleetDevice) -> None:
    rules = {f"model-{number}": {"uids": list(range(1000, 1040))} for number in range(120)}
    device.fleet.done("config.apply", {"config": {"access": {"models": rules}, **FAST}})
    said = device.fleet.reports("it holds", lambda said: said["config_state"] == "applied")
    assert said["config"]["access"]["models"] == {"left_out_bytes": len(json.dumps(rules))}
    assert said["config"]["telemetry"] == FAST["telemetry"]


def test_a_message_that_was_seen_is_no_second_one(device: FleetDevice) -> None:
    device.fleet.desire(FAST)
    device.fleet.reports("it holds", lambda said: said["config"] == FAST)
    device.fleet.version -= 1
    device.fleet.desire({"telemetry": {"memory_s": 5.0}})
    device.fleet.reports("it is refused", lambda said: said["refused"].get("old_version") == 1)
    assert device.fleet.reported["config"] == FAST
