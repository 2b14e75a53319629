"""What an operator does wrong is told before anything is signed or sent."""

from __future__ import annotations

import pytest

from tests.fleet.conftest import MOSQUITTO, Fleet


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["job", "store.gc"], 2, "say which devices"),
        (["job", "store.gc", "--device", "cam-9"], 1, "cannot find device 'cam-9'"),
        (["job", "store.gc", "x=1", "--device", "cam-1"], 1, "it takes no such"),
        (["job", "store.gc", "x", "--device", "cam-1"], 1, "it is not like name=value"),
        (["job", "logs.tail", "lines=many", "--device", "cam-1"], 1, "is no whole number"),
        (["job", "model.activate", "model=m", "--device", "cam-1"], 1, "it needs version"),
        (["job", "model.pin", "model=m", "pinned=perhaps", "--device", "cam-1"], 1, "neither true nor false"),
        (["job", "config.apply", "config=1", "--device", "cam-1"], 1, "a table comes by --args"),
        (["job", "store.gc", "--args", "[1]", "--device", "cam-1"], 2, "no JSON object"),
        (["job", "store.gc", "--args", "{", "--device", "cam-1"], 1, "it is no JSON"),
        (["job", "store.gc", "--args", "@/nowhere", "--device", "cam-1"], 1, "No such file"),
        (["job", "store.gc", "--where", "colour=red", "--device", "cam-1"], 1, "there is no field 'colour'"),
        (["job", "store.gc", "--where", "memory>much"], 1, "is no number"),
        (["job", "store.gc", "--where", "group=none"], 1, "cannot find group 'none'"),
        (["job", "store.gc", "--where", "???"], 1, "it is not like"),
        (["job", "store.gc", "--device", "cam-1", "--window", "0 2 * *"], 1, "five fields"),
        (["job", "store.gc", "--device", "cam-1", "--window", "0 2 * * *", "--window-tz", "Moon/Sea"], 1, "Moon/Sea"),
        (["job", "store.gc", "--device", "cam-1", "--not-after", "soon"], 1, "neither a duration"),
        (["job", "store.gc", "--device", "cam-1", "--timeout", "0"], 2, "no duration"),
        (["job", "store.gc", "--device", "cam-1", "--priority", "10"], 2, "invalid choice"),
        (["job", "store.gc", "--device", "cam-1", "--id", "a/b"], 1, "job_id"),
        (["job", "store.gc", "--device", "cam-1", "--sign", "eve"], 1, "there is no such key"),
        (["job", "store.gc", "--device", "cam-1", "--total-timeout", "60d"], 1, "total_timeout_s"),
        (["job", "status", "--device", "cam-1"], 2, "invalid choice"),
        (["job", "show", "none"], 1, "there is none of that id"),
        (["job", "cancel", "none"], 1, "there is none of that id"),
        (["job", "list", "--device", "cam-9"], 1, "cannot find device"),
        (["job", "list", "--last", "0"], 2, "at least 1"),
        (["job", "submit", "/nowhere"], 1, "No such file"),
        (["devices", "show", "cam-9"], 1, "cannot find device"),
        (["devices", "forget", "cam-9", "--yes"], 1, "cannot find device"),
        (["approve", "cam-2", "--manual"], 2, "--manual needs --identity"),
        (["approve", "cam-2", "--manual", "--identity", "AAAA", "--yes"], 1, "not the base64"),
        (["approve", "--keyid", "abcd"], 2, "what the device is to be called"),
        (["approve", "cam-2", "--keyid", "ab"], 1, "at least 4"),
        (["approve", "cam-2", "--keyid", "abcdef"], 1, "nobody with that key id"),
        (["approve", "cam-2", "--yes"], 1, "no devices ask"),
        (["rpc", "ping", "--device", "cam-9"], 1, "cannot find device"),
        (["rpc", "store.gc", "--device", "cam-1"], 2, "invalid choice"),
        (["watch", "--device", "cam-9"], 1, "cannot find device"),
        (["keys", "revoke", "eve", "--yes"], 1, "there is no such key"),
        (["keys", "export", "eve"], 1, "there is no such key"),
        (["keys", "add", "operator"], 1, "there is one of that name"),
        (["keys", "add", "../x"], 1, "letters, digits"),
        (["keys", "add", "ann", "--classes", "all"], 1, "unknown class"),
        (["keys", "certify", "server"], 2, "needs the broker's names"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_sent(
    wrongly_used: Fleet, arguments: list[str], status: int, reason: str
) -> None:
    done = wrongly_used.run(*arguments)
    assert (done.status, reason in done.err) == (status, True), done.err
    assert wrongly_used.ok("job", "list", "--offline")["jobs"] == []


@pytest.fixture(scope="module")
def wrongly_used(tmp_path_factory: pytest.TempPathFactory):
    """A fleet with a device that gets nothing, for all the commands that are wrong."""
    if MOSQUITTO is None:
        pytest.skip("no mosquitto here")
    made = Fleet(tmp_path_factory.mktemp("wrong"))
    made.broker.start()
    device = made.enrolled("cam-1")
    made.connect(device)
    yield made
    assert device.documents == []
    made.close()


def test_a_device_is_not_given_what_it_would_not_obey(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    fleet.ok("keys", "add", "late", "--classes", "observe,change", "--no-password")
    refused = fleet.run("job", "store.gc", "--device", "cam-1", "--sign", "late")
    assert refused.status == 1 and "it was enrolled without these keys" in refused.err
    fleet.ok("keys", "revoke", "operator", "--yes")
    assert "was revoked" in fleet.run("job", "store.gc", "--device", "cam-1", "--sign", "operator").err
    assert fleet.ok("job", "list", "--offline")["jobs"] == [] and device.documents == []


def test_two_devices_of_which_one_would_refuse_get_nothing(fleet: Fleet) -> None:
    """A job is given to all that are meant or to none."""
    fleet.ok("keys", "add", "ann", "--classes", "change", "--no-password")
    fleet.enrolled("cam-1")
    fleet.ok("keys", "revoke", "ann", "--yes")
    fleet.enrolled("cam-2")
    with fleet.books() as books, books.database.transaction():
        books.database.connection.execute("UPDATE keys SET revoked = NULL WHERE name = 'ann'")
    assert "'cam-2'" in fleet.run("job", "store.gc", "--all", "--sign", "ann").err
    assert fleet.ok("job", "list", "--offline")["jobs"] == []
