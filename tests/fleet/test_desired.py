"""How devices should be: said by the operator, kept by the broker, seen by the device whenever it comes."""

from __future__ import annotations

import pytest

from agent.base.errors import PeerError
from agent.fleet.desiring import changed, parse_settings
from tests.fleet.conftest import Fleet
from tests.fleet.waiting import until


def test_what_is_desired_reaches_a_device_that_comes_later(fleet: Fleet) -> None:
    device = fleet.enrolled("cam-1")
    assert fleet.ok("desired", "set", "log.level=debug", "--device", "cam-1") == {"devices": {"cam-1": 1}}
    assert fleet.ok("desired", "set", "telemetry.heat_s=10", "--all") == {"devices": {"cam-1": 2}}
    fleet.connect(device)
    until(lambda: device.desired, "the device has it")
    (seen,) = device.desired  # the first one was replaced before anybody saw it
    assert seen.version == 2 and seen.config == {"log": {"level": "debug"}, "telemetry": {"heat_s": 10}}
    device.say_reported()
    (shown,) = fleet.ok("desired", "show")["devices"]
    assert (shown["version"], shown["reported_version"], shown["there"]) == (2, 0, False)
    fleet.ok("desired", "set", "log.level=null", "--device", "cam-1")
    until(lambda: len(device.desired) == 2, "and the next")
    assert device.desired[-1].config == {"telemetry": {"heat_s": 10}} and device.refused == {}
    fleet.ok("desired", "set", "--replace", "--config", '{"log": {"level": "info"}}', "--device", "cam-1")
    until(lambda: len(device.desired) == 3, "and the last")
    assert device.desired[-1].config == {"log": {"level": "info"}}


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["log.level=debug"], 2, "say of which devices"),
        (["--all"], 2, "nothing was given"),
        (["level=debug", "--all"], 1, "it is not like log.level=debug"),
        (["log.level", "--all"], 1, "it is not like"),
        (["log.level=a", "log.level=b", "--all"], 1, "given twice"),
        (["--config", "[]", "--all"], 2, "one JSON object"),
        (["--config", '{"log": 1}', "--all"], 1, "a table is expected"),
        (["--config", '{"log": {"x": NaN}}', "--all"], 1, "JSON has no NaN"),
        (["log.level=debug", "--device", "cam-9"], 1, "cannot find device"),
        (["log.level=debug", "--all", "--sign", "eve"], 1, "there is no such key"),
    ],
)
def test_what_cannot_be_desired(fleet: Fleet, arguments: list[str], status: int, reason: str) -> None:
    fleet.enrolled("cam-1")
    done = fleet.run("desired", "set", *arguments)
    assert (done.status, reason in done.err) == (status, True), done.err
    assert fleet.ok("desired", "show", "--offline")["devices"][0]["version"] == 0


def test_settings_are_laid_over_one_another() -> None:
    words = ["a.x=1", "a.y=true", "b.z=0 2 * * *", "b.w=NaN", 'c.l=["p", 2]']
    assert parse_settings(words) == {
        "a": {"x": 1, "y": True},
        "b": {"z": "0 2 * * *", "w": "NaN"},
        "c": {"l": ["p", 2]},
    }
    assert changed({"a": {"x": 1, "y": 2}}, {"a": {"x": None}, "b": {"z": 3}}) == {"a": {"y": 2}, "b": {"z": 3}}
    assert changed({"a": {"x": 1}}, {"a": {"x": None}}) == {}
    with pytest.raises(PeerError):
        parse_settings([".x=1"])
