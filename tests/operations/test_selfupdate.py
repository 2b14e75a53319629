"""The job ``agent.update``: fetched, asked for, waited for over restarts, and ended with what came of it.

Repository, desk, store and root's updater are real; environments are those of ``tests.updater.grounds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from agent.base.clock import SystemClock, TrustedClock
from agent.base.errors import AgentError, ConflictError, PeerError, RefusedError, TryLaterError, UnsupportedError
from agent.operations import selfupdate as subject
from agent.operations.origin import Origin
from agent.operations.selfupdate import SelfUpdate
from agent.operations.updates import Updates
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.trust.releases import Request
from agent.work.jobs import Order
from agent.work.steps import Pause, Turn
from tests.operations.deliveries import Mirror, Operator
from tests.updater.grounds import Machine, operator_with


class Killed(BaseException):
    """Stands for SIGKILL."""


class Device:
    """A device with a job under way. ``running`` is the release whose code runs the job."""

    def __init__(self, machine: Machine, store: Store, mirror: Mirror) -> None:
        self.machine, self.store, self.mirror = machine, store, mirror
        self.updates = machine.updates
        self.saved: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self.told: list[dict[str, Any]] = []
        self.at: Callable[[], None] = lambda: None
        root = (machine.ground.root / "etc/edge-agent/root.json").read_bytes()
        always = TrustedClock(SystemClock(), "always", datetime.fromtimestamp(0, timezone.utc))
        self.origin = Origin(
            desk=mirror.desk,
            metadata=machine.ground.state_dir / "repository",
            root=lambda: root,
            clock=always,
            device=lambda: "cam-1",
            view=None,  # type: ignore[arg-type]  # nothing is chosen
        )

    def update(self, version: str) -> SelfUpdate:
        pause: Callable[[float], None] = lambda seconds: None  # noqa: E731
        return SelfUpdate(version, self.store, self.origin, self.updates, lambda: True, pause)

    def turn(self) -> Turn:
        order = Order("j1", 1, 1, "agent.update", "change", "normal", 5, {}, None, 60.0, 60.0, None, b"")

        def save() -> None:
            self.saved = dict(self.notes)
            self.at()

        def tell(event: Any) -> None:
            self.told.append(dict(event))
            self.at()

        return Turn(order, self.notes, 1, "0" * 32, tell=tell, go_on=self.at, save=save)

    def kill(self) -> None:
        self.notes = dict(self.saved)
        self.at = lambda: None

    def run(self, version: str, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """All steps; ``meanwhile`` happens whenever one waits for the world."""
        result: dict[str, Any] = {}
        for step in self.update(version).steps():
            for _ in range(30):
                try:
                    result |= step.do(self.turn()) or {}
                except Pause:
                    self.saved = dict(self.notes)
                    meanwhile()
                else:
                    break
            else:
                raise AssertionError(f"{step.name} waits without end")
            self.saved = dict(self.notes)
        return result

    def take_back(self, version: str) -> list[AgentError]:
        troubles = []
        for step in reversed(self.update(version).steps()):
            try:
                if step.undo is not None:
                    step.undo(self.turn())
            except AgentError as error:
                troubles.append(error)
        return troubles


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return operator_with(
        tmp_path_factory.mktemp("fleet"), "0.1.1", "0.1.2", "0.1.3", v0_1_2=["broken"], v0_1_3=["poison"]
    )


@pytest.fixture
def device(tmp_path: Path, fleet: Operator) -> Iterator[Device]:
    machine = Machine(tmp_path / "root", fleet)
    state = machine.ground.state_dir
    with Store(state / "store", DeviceKeys(state / "keys", None), 1 << 30) as store, Mirror(fleet.site) as mirror:
        yield Device(machine, store, mirror)


def root_of(device: Device) -> Callable[[], None]:
    return lambda: device.machine.updater().run()


def test_it_succeeds_once_the_release_was_confirmed(device: Device) -> None:
    assert device.run("0.1.1", root_of(device)) == {"version": "0.1.1", "before": "0.1.0"}
    assert device.machine.links() == ["0.1.1", "0.1.0", "0.1.1"]
    assert sorted(path.name for path in device.updates.folder.iterdir()) == ["request.json", "verdict.json"]
    assert device.store.stats().reserved_bytes == 0
    phases = [event.get("phase") for event in device.told]
    assert "downloading" in phases


@pytest.mark.parametrize(
    ("version", "said"), [("0.1.2", "does not work here: its import failed"), ("0.1.3", "core did not start, 3 times")]
)
def test_it_fails_with_what_root_says(device: Device, version: str, said: str) -> None:
    with pytest.raises(RefusedError, match=said) as caught:
        device.run(version, root_of(device))
    assert str(caught.value).startswith("cannot ")
    assert device.take_back(version) == []
    assert not device.updates.tar.exists()
    assert device.machine.running == "0.1.0"


def test_the_release_that_already_runs_is_nothing_to_do(device: Device) -> None:
    assert device.run("0.1.0") == {"version": "0.1.0", "before": "0.1.0"}
    assert device.mirror.asked == [] and not device.updates.folder.exists()


def test_the_new_release_ends_what_the_old_one_began(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core is another process from the switch on: only the journal's notes and root's own file are left."""
    device.machine.confirms = device.machine.attended = False

    def switched() -> None:
        device.machine.updater().run()
        raise Killed

    with pytest.raises(Killed):
        device.run("0.1.1", switched)
    device.kill()
    monkeypatch.setattr(subject, "__version__", "0.1.1")
    steps = {step.name: step for step in device.update("0.1.1").steps()}
    assert steps["install"].holds is not None and steps["install"].holds(device.turn())
    with pytest.raises(Pause):
        steps["probation"].do(device.turn())
    device.machine.confirms = device.machine.attended = True
    device.machine.start()
    device.machine.run()
    assert steps["probation"].do(device.turn()) == {"version": "0.1.1", "before": "0.1.0"}


def test_a_kill_costs_no_byte_twice(device: Device) -> None:
    steps = {step.name: step for step in device.update("0.1.1").steps()}
    steps["refresh"].do(device.turn())
    device.saved = dict(device.notes)
    steps["fetch"].do(device.turn())
    brought = dict(device.mirror.brought)
    device.kill()
    device.update("0.1.1").steps()[1].do(device.turn())
    assert device.mirror.brought == brought


def test_a_job_that_is_given_up_takes_root_back_with_it(device: Device) -> None:
    device.machine.confirms = device.machine.attended = False
    with pytest.raises(AssertionError, match="waits without end"):
        device.run("0.1.1", lambda: None if device.machine.ground.course() else device.machine.updater().run())
    assert device.machine.running == "0.1.1"
    assert device.take_back("0.1.1") == []
    course = device.machine.run()
    assert course.stage == "returned" and "the job was given up" in course.reason
    assert device.machine.running == "0.1.0"


def test_what_was_confirmed_is_not_taken_back_by_a_late_cancel(device: Device) -> None:
    device.run("0.1.1", root_of(device))
    troubles = device.take_back("0.1.1")
    assert {type(trouble) for trouble in troubles} == {ConflictError}
    assert "was confirmed already, and stays" in str(troubles[0])


def test_where_nobody_answers_it_says_what_to_look_at(device: Device) -> None:
    with pytest.raises(UnsupportedError, match="nobody took the request") as caught:
        device.run("0.1.1")
    assert "edge-agent-update.path" in caught.value.hint
    device.take_back("0.1.1")
    assert device.updates.request() is None, "and nobody takes it later"


def test_one_at_a_time(device: Device) -> None:
    device.machine.confirms = device.machine.attended = False
    device.machine.hand_over("0.1.1", as_id="job-1-other")
    device.machine.updater().run()
    with pytest.raises(ConflictError, match=r"the update to 0\.1\.1 is under way"):
        device.run("0.1.3")


def test_an_update_of_somebody_else_in_between_is_no_success(device: Device) -> None:
    steps = device.update("0.1.1").steps()
    device.notes.update(here=False, before="0.1.0")
    device.updates.ask(Request(id="job-1-other", version="0.1.1"))
    with pytest.raises(RefusedError, match="what came of it is not known"):
        steps[3].do(device.turn())


def test_what_is_refused_before_anything_is_fetched(device: Device, fleet: Operator) -> None:
    for version, error, said in (
        ("0.1.9", RefusedError, "not_listed"),
        ("0.0.1", RefusedError, "not_listed"),
        ("1", PeerError, "not like 1.2.3"),
        ("0.1.1/../x", PeerError, "not like 1.2.3"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            device.run(version)
    assert not any(path.startswith("targets/releases") for path, _ in device.mirror.asked)
    device.updates = Updates(device.updates.folder, None)
    with pytest.raises(UnsupportedError, match="not installed by deploy"):
        device.run("0.1.1")


def test_wrong_bytes_are_asked_for_once_more(device: Device) -> None:
    left = 1

    def wrong_once(path: str, data: bytes | None) -> bytes | None:
        nonlocal left
        if data is None or "releases" not in path or not left:
            return data
        left -= 1
        return bytes(len(data))

    device.mirror.tamper = wrong_once
    assert device.run("0.1.1", root_of(device))["version"] == "0.1.1"
    assert left == 0


def test_wrong_bytes_end_the_job_with_the_reason(device: Device) -> None:
    device.mirror.tamper = lambda path, data: bytes(len(data)) if data and "releases" in path else data
    with pytest.raises(RefusedError, match="wrong_content"):
        device.run("0.1.1")
    device.mirror.tamper = lambda path, data: None if "releases" in path else data
    with pytest.raises(TryLaterError, match="not_found"):
        device.run("0.1.1")
    device.take_back("0.1.1")
    assert device.store.stats().reserved_bytes == 0


def test_what_was_fetched_goes_and_what_a_cut_left_half_written(tmp_path: Path) -> None:
    updates = Updates(tmp_path / "update", None)
    updates.ask(Request(id="job-1-j1", version="0.1.1"))
    for name in ("release.tar", ".tmp-verdict.json-0123"):
        (updates.folder / name).write_bytes(b"half")
    updates.clear()
    assert [path.name for path in updates.folder.iterdir()] == ["request.json"]
