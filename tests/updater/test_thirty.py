"""Thirty updates by jobs, cut off at drawn moments on either side: in a write of the journal or in a step of root's.

Journal, runner, job, repository, desk and updater are real; environments and services are those of ``grounds``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.operations import selfupdate as subject
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.work.jobs import ENDED
from agent.work.journal import Journal
from agent.work.runner import Runner
from tests.operations.deliveries import Mirror
from tests.operations.test_selfupdate import Device
from tests.updater.grounds import Machine, operator_with
from tests.work.simulation import Handed, Killed, SimulatedClock, order

UPDATES = 30
KINDS = {"good": (), "broken": ("broken",), "poison": ("poison",)}


class Boot:
    """One life of core: what is in memory goes with it."""

    def __init__(self, device: Device, clock: SimulatedClock, step: Callable[[str], None], number: int) -> None:
        self.device, self.clock = device, clock
        self.journal = Journal(device.machine.ground.state_dir / "journal.db", clock, step=step)
        self.todo: list[Callable[[], None]] = []
        self.journal.open()
        try:
            self.journal.begin_epoch(1)
        except BaseException:
            self.journal.close()
            raise
        self.runner = Runner(
            self.journal,
            {"agent.update": lambda args: device.update(args["version"]).steps()},
            Handed(lambda lane, name, work: self.todo.append(work)),
            clock=clock,
            clock_trusted=clock.trusted,
            boot_nonce=f"{number:032x}",
            verify=lambda order: None,
        )

    def work(self) -> None:
        """What the runner wants done now."""
        self.runner.wake()
        while self.todo:
            self.todo.pop(0)()


class Life:
    """The device over its boots. ``fuse``: so many steps until the power goes."""

    def __init__(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.machine = device, device.machine
        self.clock = SimulatedClock()
        self.monkeypatch = monkeypatch
        self.fuse: int | None = None
        self.boots = self.cuts = 0
        self.boot: Boot | None = None

    def step(self, name: str) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                self.cuts += 1
                raise Killed

    def start(self) -> Boot:
        """Systemd starts core, whatever leads to it now: there is always something that starts."""
        self.boots += 1
        while True:
            self.machine.start()
            if not self.machine.failed:
                break
            self.root()  # core does not start: root sees it
        self.monkeypatch.setattr(subject, "__version__", self.machine.running)
        self.boot = Boot(self.device, self.clock, self.step, self.boots)
        return self.boot

    def crash(self) -> None:
        if self.boot is not None:
            self.boot.journal.close()
        self.boot = None

    def root(self) -> None:
        """Root's updater runs, started by the request or by its own mark. Core's restart ends core's life."""
        before = self.machine.log.count("restart")
        self.machine.updater(self.step).run()
        if self.machine.log.count("restart") > before and self.boot is not None:
            self.boot.runner.stop()
            self.crash()

    def run(self, number: int, version: str, fuses: Iterator[int]) -> str:
        """Job ``number`` to its end, cut off whenever a fuse has burnt down; its state."""
        while True:
            self.fuse = next(fuses, None)
            try:
                return self._go(number, version)
            except Killed:
                self.crash()

    def _go(self, number: int, version: str) -> str:
        boot = self.boot or self.start()
        for _ in range(200):
            if boot.journal.last()[1] < number:
                job = order(number, "agent.update", args={"version": version})
                boot.journal.accept(job, epoch=1, generation=number, document=b"%d" % number)
            boot.work()
            status = boot.journal.terminal(f"job-{number}")
            if status is not None:
                return str(status.state)
            self.root()
            boot = self.boot or self.start()
            self.clock.pass_time(2.0)
        raise AssertionError(f"job {number} does not end: {self.machine.ground.course()}")


@pytest.mark.main_only
def test_thirty_updates_cut_off_on_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = random.Random(11)
    kinds = [moments.choice(list(KINDS)) for _ in range(UPDATES)]
    versions = [f"0.2.{number}" for number in range(UPDATES)]
    wheels = {f"v0_2_{number}": KINDS[kind] for number, kind in enumerate(kinds)}
    fleet = operator_with(tmp_path, *versions, **wheels)
    machine = Machine(tmp_path / "root", fleet)
    state = machine.ground.state_dir
    with Store(state / "store", DeviceKeys(state / "keys", None), 1 << 30) as store, Mirror(fleet.site) as mirror:
        life = Life(Device(machine, store, mirror), monkeypatch)
        ends: Counter[str] = Counter()
        for number, (version, kind) in enumerate(zip(versions, kinds, strict=True), 1):
            before = machine.running
            fuses = [moments.randint(0, 70) for _ in range(moments.randint(1, 4))]
            end = life.run(number, version, iter(fuses))
            assert end == ("succeeded" if kind == "good" else "failed"), (number, kind, life.machine.ground.course())
            life.fuse = None
            life.root()  # what root still has to tidy up
            assert machine.running == (version if kind == "good" else before), (number, kind)
            assert len(machine.ground.environments()) <= 2
            ends[kind] += 1
        life.crash()
        with Journal(state / "journal.db", life.clock) as journal:
            statuses = journal.jobs(limit=100)
        assert len(statuses) == UPDATES and all(status.state in ENDED for status in statuses), "no job is lost"
        for status in statuses:
            if status.state == "failed":
                assert status.error is not None and "cannot" in status.error.text, status
    assert life.cuts > UPDATES and set(ends) == set(KINDS)
    print(f"{UPDATES} updates, {life.cuts} cuts, {life.boots} starts of core: {dict(ends)}")
