"""The steps of each kind of job: done once, asked whether they hold, done again after a kill, taken back.

The store is real, trials and the serving side are not. A kill is a step that is begun again with the notes that were
saved, whatever its effect had been by then.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.base.clock import SystemClock
from agent.base.config import Config
from agent.base.errors import AgentError, ConflictError, DamagedError, NotFoundError, PeerError
from agent.operations import jobs as subject
from agent.operations.configure import RemoteConfig
from agent.operations.install import AddRequest, Installer, Serving
from agent.operations.jobs import Around, Jobs
from agent.operations.maintain import Maintenance
from agent.operations.measured import Choice
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.wire.ops import OPS
from agent.work.jobs import Order
from agent.work.steps import RestartPending, Step, Turn
from tests import onnx_models
from tests.core.test_daemon import bundle

STARTS = ("0" * 32, "1" * 32)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Device:
    """Everything that the handlers use. ``m`` has versions 1.0.0 and 2.0.0, the second active."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.loads: list[tuple[str, str]] = []
        self.load_error: AgentError | None = None
        self.called: list[str] = []
        serving = Serving(lambda document: None, self._load)
        self.installer = Installer(store, self._choose, serving, SystemClock(), outdated=lambda *_: self.outdated)
        self.outdated: tuple[str, ...] = ()
        self.tried = 0
        self.configured = RemoteConfig(store, Config, lambda config: None, lambda: True)
        around = Around(
            store=store,
            installer=self.installer,
            maintenance=Maintenance(store, lambda document: None),
            configuring=self.configured,
            unload_all=lambda: 3,
            tail=lambda lines: ["line"] * min(lines, 2),
            collect=lambda: {"archive": ""},
            run_tasks=lambda names, go_on: [{"task": name} for name in names],
            task_names=("disk", "scrub"),
            restart=lambda: self.called.append("restart"),
            reboot=lambda: self.called.append("reboot"),
            stay=lambda: self.called.append("stay"),
        )
        self.handlers = Jobs(around).handlers()
        for number, version in enumerate(("1.0.0", "2.0.0")):
            self.add(folder, "m", version, number)

    def add(self, folder: Path, name: str, version: str, seed: int) -> None:
        data = onnx_models.linear(seed)
        path = bundle(folder / "next.edgemodel", {"fp32": ("fp32", data)}, name=name, version=version)
        with path.open("rb") as stream:
            self.installer.add(os.dup(stream.fileno()), AddRequest(file_name=path.name), lambda event: None)

    def _choose(self, *_: Any) -> Choice:
        self.tried += 1
        return Choice("fp32", {})

    def _load(self, name: str, version: str) -> None:
        if self.load_error is not None:
            raise self.load_error
        self.loads.append((name, version))

    def steps(self, op: str, args: Mapping[str, Any]) -> list[Step]:
        return list(self.handlers[op](args))

    def models(self) -> dict[str, tuple[str | None, str | None, bool, list[str]]]:
        return {
            name: (model.active, model.previous, model.pinned, sorted(model.versions))
            for name, model in self.store.document.models.items()
        }


class Job:
    """A job that can be killed: what is noted counts only when it was saved."""

    def __init__(self, device: Device, op: str, args: Mapping[str, Any]) -> None:
        self._plan = lambda: device.steps(op, args)
        self._order = Order("j1", 1, 1, op, OPS[op].kind, "normal", 5, dict(args), None, 60.0, 60.0, None, b"")
        self.saved: dict[str, Any] = {}
        self._notes: dict[str, Any] = {}
        self.start = 0
        #: Called at each save and each safe point.
        self.at: Callable[[], None] = lambda: None

    def turn(self) -> Turn:
        def save() -> None:
            self.saved = dict(self._notes)
            self.at()

        return Turn(
            self._order, self._notes, 1, STARTS[self.start], tell=lambda event: self.at(), go_on=self.at, save=save
        )

    def run(self) -> dict[str, Any]:
        """All steps, as if never interrupted."""
        result: dict[str, Any] = {}
        for step in self._plan():
            result |= step.do(self.turn()) or {}
            self.saved = dict(self._notes)
        return result

    def kill(self) -> None:
        """A new start: only what was saved is known."""
        self.start = 1
        self._notes = dict(self.saved)

    def resume(self, name: str) -> str:
        """The step is asked, and done if it does not hold: "held" or "done"."""
        step = next(step for step in self._plan() if step.name == name)
        if step.holds is not None and step.holds(self.turn()):
            return "held"
        step.do(self.turn())
        return "done"

    def take_back(self) -> None:
        for step in reversed(self._plan()):
            if step.undo is not None:
                step.undo(self.turn())


@pytest.fixture
def device(tmp_path: Path):
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder)
        with Store(path / "store", DeviceKeys(path / "keys"), 64 << 20) as store:
            yield Device(store, tmp_path)


def test_there_is_a_handler_for_each_job_of_the_table_and_no_other(device: Device) -> None:
    assert set(device.handlers) == {row.name for row in OPS.values() if row.job}


def test_steps_have_names_of_their_own(device: Device) -> None:
    args = {"model": "m", "version": "1.0.0", "config": {}, "run": ["disk"]}
    for op, handler in device.handlers.items():
        wanted = {
            name: value
            for name, value in args.items()
            if name in ("model", "version", "config", "run") and _takes(handler, name, args)
        }
        names = [step.name for step in handler(wanted)]
        assert len(names) == len(set(names)) > 0, op


def _takes(handler: Callable[[Mapping[str, Any]], Any], name: str, args: Mapping[str, Any]) -> bool:
    try:
        handler({name: args[name]})
    except PeerError as error:
        return f"unknown '{name}'" not in str(error)
    return True


# Killed before, within and after the effect: it happens once.


#: Operation, arguments, the step with the effect, and what the model is afterwards: active, previous, pinned.
ONCE = [
    ("model.activate", {"model": "m", "version": "1.0.0"}, "activate", ("1.0.0", "2.0.0", False)),
    ("model.activate", {"model": "m", "version": "2.0.0"}, "activate", ("2.0.0", "1.0.0", False)),
    ("model.rollback", {"model": "m"}, "activate", ("1.0.0", "2.0.0", False)),
    ("model.pin", {"model": "m"}, "pin", ("2.0.0", "1.0.0", True)),
    ("model.install", {"model": "m", "version": "1.0.0"}, "activate", ("1.0.0", "2.0.0", False)),
]


def effects_of(device: Device, job: Job, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> bool:
    """Run the job and kill it at the n-th point: a save, before or after a commit of the catalog. Whether it came."""
    points = 0

    def point() -> None:
        nonlocal points
        points += 1
        if points == kill_at:
            raise Killed

    commit = device.store.commit

    def watched(change: Any) -> Any:
        point()
        found = commit(change)
        point()
        return found

    monkeypatch.setattr(device.store, "commit", watched)
    job.at = point
    try:
        job.run()
    except Killed:
        return True
    finally:
        monkeypatch.setattr(device.store, "commit", commit)
        job.at = lambda: None
    return False


@pytest.mark.parametrize(("op", "args", "step", "expected"), ONCE, ids=lambda value: str(value)[:24])
def test_killed_at_any_point_it_happens_once(device: Device, monkeypatch, op, args, step, expected) -> None:
    kill_at = 0
    killed = True
    while killed:
        kill_at += 1
        before = device.models()
        job = Job(device, op, args)
        killed = effects_of(device, job, monkeypatch, kill_at)
        if killed:
            job.kill()
            job.resume(step)
            job.kill()
            assert job.resume(step) == "held" if op != "model.pin" else job.resume(step) == "done"
        assert device.models()["m"][:3] == expected
        job.take_back()
        job.take_back()
        if before["m"][0] != device.models()["m"][0]:
            raise AssertionError(f"killed at {kill_at}: {before} became {device.models()}")
        device.installer.activate("m", "1.0.0")
        device.installer.activate("m", "2.0.0")
    assert kill_at > 2


def test_two_rollbacks_are_none_and_one_that_was_interrupted_is_one(device: Device) -> None:
    for _ in range(2):
        Job(device, "model.rollback", {"model": "m"}).run()
    assert device.models()["m"][0] == "2.0.0"
    job = Job(device, "model.rollback", {"model": "m"})
    job.run()
    job.kill()
    assert job.resume("activate") == "held"
    assert device.models()["m"][0] == "1.0.0"


def test_the_key_is_changed_once(device: Device, monkeypatch) -> None:
    keys = [device.store.secret.key_id]
    for kill_at in range(1, 12):
        job = Job(device, "store.rotate-key", {})
        before = device.store.secret.key_id
        if effects_of(device, job, monkeypatch, kill_at):
            job.kill()
            job.resume("rotate")
            job.kill()
            assert job.resume("rotate") == "held"
        assert device.store.secret.key_id != before
        assert not device.store.rotation_pending
        keys.append(device.store.secret.key_id)
    assert len(set(keys)) == len(keys)


def test_what_is_removed_is_removed_although_nobody_heard_of_it(device: Device, tmp_path: Path) -> None:
    device.add(tmp_path, "gone", "1.0.0", 5)
    job = Job(device, "model.remove", {"model": "gone"})
    assert job.run()["freed_bytes"] > 0
    job.kill()
    assert job.resume("remove") == "held"
    with pytest.raises(NotFoundError):
        Job(device, "model.remove", {"model": "gone"}).run()
    part = Job(device, "model.remove", {"model": "m", "version": "1.0.0"})
    part.run()
    part.kill()
    assert part.resume("remove") == "held"
    assert device.models()["m"] == ("2.0.0", None, False, ["2.0.0"])


# Not done, and taken back.


def test_what_fails_to_load_changes_nothing(device: Device) -> None:
    before = device.models()
    device.load_error = DamagedError("no variant can answer")
    for op, args in (("model.activate", {"model": "m", "version": "1.0.0"}), ("model.rollback", {"model": "m"})):
        job = Job(device, op, args)
        with pytest.raises(DamagedError):
            job.run()
        job.take_back()
    assert device.models() == before


def test_taken_back_when_nothing_was_done(device: Device) -> None:
    before = device.models()
    for op, args, _, _ in ONCE:
        Job(device, op, args).take_back()
    Job(device, "config.apply", {"config": {}}).take_back()
    Job(device, "device.reboot", {}).take_back()
    assert device.models() == before
    assert device.called == ["stay"]


def test_what_was_before_may_be_gone_when_it_is_taken_back(device: Device) -> None:
    job = Job(device, "model.activate", {"model": "m", "version": "1.0.0"})
    job.run()
    device.installer.remove("m", "2.0.0")
    job.take_back()
    assert device.models()["m"][0] == "1.0.0"
    device.installer.remove("m", None)
    job.take_back()


def test_a_pin_is_taken_back_to_what_it_was(device: Device) -> None:
    for before in (False, True):
        device.installer.pin("m", pinned=before)
        for wanted in (False, True):
            job = Job(device, "model.pin", {"model": "m", "pinned": wanted})
            job.run()
            assert device.models()["m"][2] is wanted
            job.kill()
            job.resume("pin")
            job.take_back()
            assert device.models()["m"][2] is before


def test_a_pin_keeps_the_active_version(device: Device) -> None:
    device.installer.pin("m", pinned=True)
    for op, args in (
        ("model.activate", {"model": "m", "version": "1.0.0"}),
        ("model.install", {"model": "m", "version": "1.0.0"}),
        ("model.rollback", {"model": "m"}),
        ("model.remove", {"model": "m"}),
        ("model.remove", {"model": "m", "version": "2.0.0"}),
    ):
        with pytest.raises(ConflictError, match=r"pinned to 2\.0\.0"):
            Job(device, op, args).run()
    Job(device, "model.activate", {"model": "m", "version": "2.0.0"}).run()  # what is so already may be said
    Job(device, "model.remove", {"model": "m", "version": "1.0.0"}).run()


def test_only_what_no_longer_holds_is_tried_again(device: Device) -> None:
    tried = device.tried
    Job(device, "model.install", {"model": "m", "version": "1.0.0"}).run()
    assert device.tried == tried
    device.outdated = ("runtime",)
    Job(device, "model.install", {"model": "m", "version": "2.0.0"}).run()
    assert device.tried == tried + 1
    Job(device, "bench.run", {"model": "m"}).run()
    assert device.tried == tried + 2


# Restarts.


def test_a_restart_is_asked_for_once_it_is_written_down_and_holds_in_another_start(device: Device) -> None:
    job = Job(device, "agent.restart", {})
    with pytest.raises(RestartPending) as pending:
        job.run()
    assert device.called == []
    assert pending.value.then is not None
    job.turn().save()
    pending.value.then()
    assert device.called == ["restart"]
    (step,) = device.steps("agent.restart", {})
    assert step.holds is not None and not step.holds(job.turn())
    job.kill()
    assert step.holds(job.turn())


def test_a_reboot_holds_when_the_kernel_says_so(device: Device, tmp_path: Path, monkeypatch) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("first\n")
    monkeypatch.setattr(subject, "_BOOT_ID", boot)
    job = Job(device, "device.reboot", {})
    with pytest.raises(RestartPending) as pending:
        job.run()
    assert pending.value.then is not None
    job.turn().save()
    pending.value.then()
    assert device.called == ["reboot"]
    (step,) = device.steps("device.reboot", {})
    assert step.holds is not None and step.undo is not None
    job.kill()  # of core alone
    assert not step.holds(job.turn())
    boot.write_text("second\n")
    assert step.holds(job.turn())
    step.undo(job.turn())
    assert device.called == ["reboot", "stay"]


def test_nothing_holds_that_was_not_noted(device: Device) -> None:
    for op in ("agent.restart", "device.reboot"):
        (step,) = device.steps(op, {})
        assert step.holds is not None
        assert not step.holds(Job(device, op, {}).turn())


# The rest.


def test_a_configuration_is_set_by_its_job_and_taken_back_by_it(device: Device) -> None:
    config = {"telemetry": {"heat_s": 4.0}}
    job = Job(device, "config.apply", {"config": config})
    job.run()
    assert (device.configured.entry.state, device.configured.entry.config) == ("applied", config)
    job.kill()
    assert job.resume("apply") == "held"
    job.take_back()
    assert (device.configured.entry.state, device.configured.entry.config) == ("reverted", {})
    with pytest.raises(PeerError, match="from afar"):
        device.steps("config.apply", {"config": {"trust": {}}})


def test_what_only_looks_gives_what_it_saw(device: Device) -> None:
    for op, args, expected in (
        ("ping", {}, {"pong": True}),
        ("cache.flush", {}, {"unloaded": 3}),
        ("logs.tail", {"lines": 1}, {"lines": ["line"]}),
        ("logs.tail", {}, {"lines": ["line", "line"]}),
        ("diagnostics.collect", {}, {"archive": ""}),
        ("maintenance.plan", {"run": ["scrub"]}, {"tasks": [{"task": "scrub"}]}),
    ):
        assert Job(device, op, args).run() == expected
    assert Job(device, "store.scrub", {}).run()["ok"] is True
    assert Job(device, "store.gc", {}).run()["freed_bytes"] == 0


def test_damage_is_found_before_a_version_answers(device: Device) -> None:
    blobs = device.store.root / "blobs"
    entry = device.store.document.models["m"].versions["1.0.0"]
    payload = blobs / entry.blobs["fp32.onnx"].payload
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)
    with pytest.raises(DamagedError, match=r"fp32\.onnx is damaged"):
        Job(device, "model.install", {"model": "m", "version": "1.0.0"}).run()
    assert device.models()["m"][0] == "2.0.0"
    Job(device, "model.install", {"model": "m", "version": "2.0.0"}).run()  # another version's damage is not its own
