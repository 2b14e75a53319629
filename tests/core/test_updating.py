"""When core confirms the release that it is, and what it tells of an update."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import __version__
from agent.core.updating import Updating
from agent.operations.updates import Updates, home_of
from agent.trust.releases import Course, Request, Stage, Verdict
from agent.updater.ground import Ground


class Device:
    """Core's end of an update on a machine below a folder; root's own file is written by hand."""

    def __init__(self, root: Path) -> None:
        self.ground = Ground(root)
        self.ground.home.mkdir(parents=True)
        self.ground.state_dir.mkdir(parents=True)
        self.ground.prepare()
        self.updates = Updates(self.ground.state_dir / "update", self.ground.home)
        self.clock = 0.0
        self.lacks = ""
        self.asked_for_link: list[bool] = []
        self.changes = 0
        self.updating = Updating(self.updates, lambda: 60.0, self._lacking, self._changed, lambda: self.clock)

    def _lacking(self, link: bool) -> str:
        self.asked_for_link.append(link)
        return self.lacks

    def _changed(self) -> None:
        self.changes += 1

    def root_is_at(self, stage: Stage, version: str = __version__, *, restarted: bool = True, reason: str = "") -> None:
        self.ground.keep(Course(id="j", version=version, stage=stage, restarted=restarted, reason=reason))

    def look(self) -> Verdict | None:
        self.updating.look()
        return self.ground.verdict()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_it_confirms_itself_once_it_has_been_up_for_a_while(device: Device) -> None:
    device.root_is_at("probation")
    assert device.look() is None
    assert device.updating.status()["last"]["waits_for"] == "60 s more"
    device.clock = 60.0
    assert device.look() == Verdict(id="j", say="keep")


def test_while_something_is_missing_it_does_not(device: Device) -> None:
    device.updates.ask(Request(id="j", version=__version__, link=True))
    device.root_is_at("probation")
    device.clock, device.lacks = 100.0, "the link, which was connected before"
    assert device.look() is None and device.asked_for_link == [True]
    (finding,) = device.updating.findings()
    assert finding.text.endswith("probation, waits for the link, which was connected before")
    device.lacks = ""
    assert device.look() is not None


def test_the_link_is_not_waited_for_where_there_was_none(device: Device) -> None:
    device.updates.ask(Request(id="another", version=__version__, link=True))
    device.root_is_at("probation")
    device.clock = 100.0
    device.look()
    assert device.asked_for_link == [False]


@pytest.mark.parametrize(
    "stage", ["verifying", "making", "trying", "switching", "returning", "kept", "refused", "returned"]
)
def test_only_a_release_on_probation_is_confirmed(device: Device, stage: Stage) -> None:
    device.root_is_at(stage)
    device.clock = 1000.0
    assert device.look() is None


def test_only_the_release_itself_confirms_and_only_after_its_restart(device: Device) -> None:
    device.clock = 1000.0
    device.root_is_at("probation", "9.9.9")
    assert device.look() is None
    device.root_is_at("probation", restarted=False)
    assert device.look() is None
    device.root_is_at("probation")
    assert device.look() is not None


def test_what_came_to_nothing_is_told_and_the_fleet_hears_of_each_stage(device: Device) -> None:
    assert device.updating.status() == {"version": __version__, "previous": None, "last": None}
    assert device.updating.findings() == [] and device.look() is None and device.changes == 0
    for stage in ("trying", "probation", "returned"):
        device.root_is_at(stage, "9.9.9", reason="core did not start\nat all" if stage == "returned" else "")
        device.look()
    device.look()
    assert device.changes == 3
    (finding,) = device.updating.findings()
    assert (
        finding.level == "note" and "the update to 9.9.9 came to nothing: core did not start\\nat all" in finding.text
    )
    assert device.updating.status()["last"]["stage"] == "returned"


def test_where_it_was_not_installed_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    assert home_of(tmp_path / "env", None) is None
    assert home_of(tmp_path / "env", str(tmp_path)) == tmp_path
    (tmp_path / "env/.installed").touch()
    (tmp_path / "current").symlink_to("env")
    assert home_of(tmp_path / "current", None) == tmp_path
    updates = Updates(tmp_path / "update", None)
    assert not updates.is_possible and updates.course() is None and updates.previous() is None
