"""The configuration from afar: what may be set, its probation, and its way back over kills. The store is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.base.config import Config, parse
from agent.base.errors import ConflictError, DeadlineError, PeerError, TryLaterError
from agent.operations.configure import REMOTE, RemoteConfig, drift, effective
from agent.store.keys import DeviceKeys
from agent.store.store import Store

ONE, TWO = {"telemetry": {"heat_s": 1.0}}, {"telemetry": {"heat_s": 2.0}, "log": {"level": "debug"}}


class Device:
    """A remote configuration on a store in ``folder``. ``restart`` is a kill and a new start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file = Config()
        self.held: list[Config] = []
        self.link_back = True
        self.now = 0.0
        self.asked = 0
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.store = Store(self._folder / "store", DeviceKeys(self._folder / "keys"), 1 << 24)
        self.store.__enter__()
        self.remote = RemoteConfig(
            self.store, lambda: self.file, self.held.append, lambda: self.link_back, lambda: self.now, self._sleep
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def go_on(self) -> None:
        self.asked += 1

    @property
    def state(self) -> tuple[str, dict[str, Any]]:
        return self.remote.entry.state, self.remote.entry.config

    def settle(self, config: dict[str, Any], mark: str) -> None:
        self.remote.apply(config, mark)
        self.remote.confirm(mark, self.go_on)


@pytest.fixture
def device(tmp_path: Path):
    found = Device(tmp_path)
    yield found
    found.store.close()


def test_what_is_set_lies_over_the_file() -> None:
    base = parse({"telemetry": {"heat_s": 7.0, "status_s": 8.0}, "link": {"host": "a"}}, "x")
    found = effective(base, TWO)
    assert (found.telemetry.heat_s, found.telemetry.status_s) == (2.0, 8.0)
    assert (found.log.level, found.link.host) == ("debug", "a")
    assert effective(base, {}) == base


@pytest.mark.parametrize("section", sorted(set(Config.model_fields) - REMOTE))
def test_what_is_the_integrators_alone(section: str) -> None:
    assert section in ("store", "trust", "sockets", "update")
    with pytest.raises(PeerError, match=f"cannot set '{section}' from afar") as refused:
        effective(Config(), {section: {}})
    assert "telemetry" in refused.value.hint


@pytest.mark.parametrize(
    "over",
    [{"no": {}}, {"telemetry": None}, {"telemetry": []}, {"telemetry": {"heat_s": -1}}, {"telemetry": {"heat": 1}},
     {"link": {"host": "a b"}}, {"link": {"port": 0}}, {"server": {"max_body_mb": 1 << 30}}, {"log": {"level": "all"}},
     {"access": {"models": {"../x": {}}}}],
)  # fmt: skip
def test_what_cannot_be_is_the_fleets_fault(over: dict[str, Any], device: Device) -> None:
    for call in (lambda: effective(Config(), over), lambda: device.remote.check(over),
                 lambda: device.remote.apply(over, "job-1-a")):  # fmt: skip
        with pytest.raises(PeerError):
            call()
    assert device.state == ("default", {})
    assert device.held == []


def test_a_fleet_names_the_mirrors() -> None:
    found = effective(Config(), {"delivery": {"mirrors": ["https://m.example"], "rate_kib_s": 64}}).delivery
    assert (found.mirrors, found.rate_kib_s, found.blocks) == (("https://m.example",), 64, True)


def test_applied_it_holds_and_confirmed_it_stays(device: Device) -> None:
    device.remote.apply(ONE, "a")
    assert device.state == ("confirming", ONE)
    assert [config.telemetry.heat_s for config in device.held] == [1.0]
    assert device.remote.holds("a")
    device.remote.confirm("a", device.go_on)
    assert device.state == ("applied", ONE)
    device.restart()
    assert device.state == ("applied", ONE)
    assert device.remote.current().telemetry.heat_s == 1.0
    device.remote.apply(ONE, "a")  # the same, said again
    assert len(device.held) == 1


def test_without_the_link_it_is_taken_back(device: Device) -> None:
    device.settle(ONE, "a")
    device.link_back = False
    device.remote.apply(TWO, "b")
    with pytest.raises(DeadlineError, match="did not come back"):
        device.remote.confirm("b", device.go_on)
    assert device.asked > 0
    assert device.state == ("reverted", ONE)
    assert [config.telemetry.heat_s for config in device.held] == [1.0, 2.0, 1.0]
    assert not device.remote.holds("b")
    device.remote.apply(TWO, "b")  # the job is resumed: it does not begin anew
    assert device.state == ("reverted", ONE)
    with pytest.raises(ConflictError, match="no longer in force"):
        device.remote.confirm("b", device.go_on)


def test_the_time_is_that_of_the_new_configuration(device: Device) -> None:
    """It may need longer than the one before would have given it."""
    device.link_back = False
    device.remote.apply({"link": {"confirm_s": 86_000.0}}, "a")
    with pytest.raises(DeadlineError):
        device.remote.confirm("a", device.go_on)
    assert device.now >= 86_000


@pytest.mark.parametrize("point", ["before", "probation", "after"])
def test_killed_at_any_point_the_way_back_is_open(device: Device, point: str) -> None:
    device.settle(ONE, "a")
    if point != "before":
        device.remote.apply(TWO, "b")
    if point == "after":
        device.remote.confirm("b", device.go_on)
    device.restart()
    device.remote.revert("b")
    assert device.state == (("applied", ONE) if point == "before" else ("reverted", ONE))
    device.remote.revert("b")
    assert device.state[1] == ONE
    device.settle(TWO, "c")
    assert device.state == ("applied", TWO)


def test_one_change_at_a_time(device: Device) -> None:
    device.remote.apply(ONE, "a")
    with pytest.raises(ConflictError, match="has not been confirmed"):
        device.remote.apply(TWO, "b")
    assert device.state == ("confirming", ONE)
    device.remote.revert("b")  # not in force: nothing to take back
    assert device.state == ("confirming", ONE)


def test_a_stop_leaves_it_on_probation(device: Device) -> None:
    device.link_back = False

    def stopping() -> None:
        raise TryLaterError("cannot go on: the agent is stopping")

    device.remote.apply({"link": {"confirm_s": 3600.0}}, "a")
    with pytest.raises(TryLaterError, match="stopping"):
        device.remote.confirm("a", stopping)
    assert device.state[0] == "confirming"
    device.restart()
    device.link_back = True
    device.remote.confirm("a", device.go_on)
    assert device.state[0] == "applied"


def test_refused_is_noted_once_and_changes_nothing(device: Device) -> None:
    device.settle(ONE, "a")
    device.remote.refuse("b")
    assert device.state == ("refused", ONE)
    assert device.remote.entry.mark == "b"
    assert device.remote.current().telemetry.heat_s == 1.0


def test_what_no_longer_fits_a_newer_file_is_left_out(device: Device) -> None:
    """The agent comes up with the file alone rather than not at all."""
    device.settle({"server": {"max_connections": 200}}, "a")
    device.file = parse({"server": {"connections_per_uid": 400}}, "x")
    assert device.remote.current() == device.file


def test_drift_is_what_differs() -> None:
    config = parse({"telemetry": {"heat_s": 5.0}}, "x")
    assert drift({"telemetry": {"heat_s": 5.0}}, config) == []
    assert drift(
        {"telemetry": {"heat_s": 6.0, "no": 1}, "trust": {"unsigned": "refuse"}, "x": 1, "y": {"z": 1}}, config
    ) == [
        {"key": "telemetry.heat_s", "desired": 6.0, "actual": 5.0},
        {"key": "telemetry.no", "desired": 1, "actual": None},
        {"key": "trust.unsigned", "desired": "refuse", "actual": "allow"},
        {"key": "y.z", "desired": 1, "actual": None},
    ]
