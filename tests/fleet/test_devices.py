"""Devices join, are listed and shown, start anew and are forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.trust.allegiance import load
from tests.fleet.conftest import TENANT, Fleet, edge_fleet
from tests.fleet.device import WELL, Claimant, Identity, SimulatedDevice
from tests.fleet.waiting import until


def test_devices_are_listed_shown_and_forgotten(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    fleet.enrolled("cam-2")
    device.alert("disk", "the disk is full\x1b[2J")
    device.say_reported("disk is full")
    rows = {row["device"]: row for row in fleet.ok("devices", "list")["devices"]}
    assert (
        rows["cam-1"]["online"] is True and rows["cam-1"]["health"] == "disk is full" and rows["cam-1"]["alerts"] == 1
    )
    assert rows["cam-2"]["online"] is None and rows["cam-2"]["heard"] is None
    shown = fleet.run("devices", "show", "cam-1")
    assert "Raspberry Pi 4 Model B" in shown.out and "the disk is full\\x1b[2J" in shown.out
    device.alert("disk", None)
    assert fleet.ok("devices", "show", "cam-1")["alerts"] == []
    assert "nobody can be asked" in fleet.run("devices", "forget", "cam-1").err
    assert fleet.ok("devices", "forget", "cam-1", "--yes") == {"forgotten": "cam-1"}
    assert [row["device"] for row in fleet.ok("devices", "list")["devices"]] == ["cam-2"]


def test_what_was_heard_last_is_shown_when_the_broker_is_gone(fleet: Fleet) -> None:
    fleet.online("cam-1")
    fleet.ok("devices", "list")
    fleet.broker.stop()
    done = fleet.run("devices", "list", "--json")
    assert done.status == 0 and done.json["devices"][0]["online"] is True and "what was heard last" in done.err
    failed = fleet.run("job", "store.gc", "--device", "cam-1")
    assert failed.status == 1 and "cannot connect to localhost" in failed.err
    assert fleet.ok("job", "list", "--offline")["jobs"] == []


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_is_somebody_else_s_is_told_from_one_that_is_away(fleet: Fleet, tmp_path: Path) -> None:
    other = edge_fleet(tmp_path / "other", "init", "--tenant", "b", "--broker", "localhost", "--no-password")
    assert other.status == 0
    (fleet.folder / "operator" / "server-ca.pem").write_bytes((tmp_path / "other/operator/server-ca.pem").read_bytes())
    done = fleet.run("devices", "list")
    assert "its certificate is not to be trusted" in done.err and "ca_file" not in done.out


def test_an_operator_whose_certificate_the_broker_does_not_know_is_told_so(fleet: Fleet, tmp_path: Path) -> None:
    assert edge_fleet(tmp_path / "o", "init", "--tenant", "b", "--broker", "localhost", "--no-password").status == 0
    for name in ("ops.pem", "ops.key"):
        (fleet.folder / "operator" / name).write_bytes((tmp_path / "o" / "operator" / name).read_bytes())
    fleet.enrolled("cam-1")
    done = fleet.run("job", "store.gc", "--device", "cam-1")
    assert done.status == 1 and "cannot connect to localhost" in done.err


# -- enrolment --------------------------------------------------------------------------------------------------------


def test_a_device_announces_itself_and_is_enrolled(fleet: Fleet) -> None:
    """By the claim credential of the image, through the broker for claims and its bridge."""
    fleet.claims.start()
    claimant = fleet.claimant()
    asking = until(lambda: fleet.ok("approve")["announced"], "the announcement has come over")
    assert [(row["keyid"], row["board"]) for row in asking] == [(claimant.keyid, "Raspberry Pi 4 Model B")]
    unasked = fleet.run("approve", "cam-1", "--keyid", claimant.keyid[:6])
    assert unasked.status == 1 and "nobody can be asked" in unasked.err and claimant.keyid[:4] in unasked.err
    made = fleet.ok("approve", "cam-1", "--keyid", claimant.keyid[:6], "--yes")
    assert (made["device"], made["epoch"], made["keys"]) == ("cam-1", 1, ["operator"])
    until(lambda: claimant.enrolments, "the device is told")
    claimant.stop()
    device = live(fleet, claimant)
    assert (
        fleet.ok("job", "ping", "--device", "cam-1", "--wait", "--timeout", "20s")["devices"][0]["state"] == "succeeded"
    )
    assert fleet.ok("approve")["announced"] == [] and device.refused == {}


def live(fleet: Fleet, claimant: Claimant) -> SimulatedDevice:
    """The device under its new name, with the certificate that the enrolment brought."""
    enrolment = claimant.enrolments[-1]
    certificate = fleet.scratch / f"{claimant.keyid}.pem"
    certificate.write_text(enrolment.certificate)
    key = claimant.identity.write_key(fleet.scratch / f"{claimant.keyid}.key")
    device = SimulatedDevice(TENANT, claimant.identity, claimant.allegiance())
    device.files = (fleet.ca, certificate, key)  # type: ignore[attr-defined]
    fleet.connect(device)
    return device


def test_approval_can_wait_until_the_device_is_there(fleet: Fleet) -> None:
    fleet.claims.start()
    claimant = fleet.claimant()
    until(lambda: fleet.ok("approve")["announced"], "the announcement has come over")
    waiting = fleet.start("approve", "cam-1", "--keyid", claimant.keyid, "--yes", "--wait", "30s")
    until(lambda: claimant.enrolments, "the device is told")
    claimant.stop()
    live(fleet, claimant)
    assert waiting.wait(40) == 0


def test_a_device_that_is_enrolled_again_starts_anew(fleet: Fleet) -> None:
    first = fleet.online("cam-1")
    first.plays = lambda job: WELL[:1]
    running = fleet.ok("job", "store.gc", "--device", "cam-1")["job"]
    until(lambda: fleet.states(running) == {"cam-1": "queued"}, "the device has it")
    waiting = fleet.ok("job", "store.scrub", "--device", "cam-1")["job"]
    until(lambda: fleet.states(waiting) == {"cam-1": "queued"}, "and the next one")
    first.go_offline()
    unseen = fleet.ok("job", "store.scrub", "--device", "cam-1")["job"]
    second = fleet.enrolled("cam-1", first.identity)
    assert second.epoch == 2
    assert fleet.states(unseen) == {"cam-1": "void"} and fleet.states(waiting) == {"cam-1": "queued"}
    fleet.connect(second)
    assert fleet.ok("job", "ping", "--device", "cam-1", "--wait", "--timeout", "20s")["devices"][0]["seq"] == 1
    # What the device said in its first life no longer counts.
    second.connection.publish(second.topic(f"up/job/{running}"), first.seal(first.state(first.done[0], "succeeded")))
    assert fleet.states(running) == {"cam-1": "queued"}
    assert ("job", "old_epoch") in {
        (row["what"], row["reason"]) for row in fleet.ok("devices", "show", "cam-1")["dropped"]
    }


def test_a_name_is_not_given_twice(fleet: Fleet) -> None:
    first = fleet.enrolled("cam-1")
    other = fleet.run("approve", "cam-1", "--manual", "--identity", Identity().public, "--yes")
    assert other.status == 1 and "another device has that name" in other.err
    twice = fleet.run("approve", "cam-2", "--manual", "--identity", first.identity.public, "--yes")
    assert "this device is enrolled as 'cam-1'" in twice.err
    out = fleet.scratch / "replaced"
    made = fleet.ok(
        "approve", "cam-1", "--manual", "--identity", Identity().public, "--replace", "--yes", "--out", str(out)
    )
    assert made["epoch"] == 2
    assert "it is there already" in fleet.run(
        "approve", "cam-3", "--manual", "--identity", Identity().public, "--yes", "--out", str(out)
    ).err  # fmt: skip


def test_keys_that_have_changed_reach_a_device_by_its_next_enrolment(fleet: Fleet) -> None:
    fleet.enrolled("cam-1")
    fleet.ok("keys", "add", "ann", "--no-password")
    fleet.ok("keys", "revoke", "operator", "--yes")
    out = fleet.scratch / "again"
    assert fleet.ok("approve", "cam-1", "--manual", "--yes", "--out", str(out))["epoch"] == 2
    allegiance = load(out / "trust.toml")
    assert allegiance is not None and [key.name for key in allegiance.keys.values()] == ["ann"]
    assert (allegiance.device, allegiance.epoch) == ("cam-1", 2) and not (out / "device.pem").exists()


def test_the_number_of_an_enrolment_rises_even_when_a_device_was_forgotten(fleet: Fleet) -> None:
    device = fleet.enrolled("cam-1")
    fleet.ok("devices", "forget", "cam-1", "--yes")
    again = fleet.enrolled("cam-1", device.identity)
    assert again.epoch == 2
