"""The power goes at random moments of updates of the agent itself: good releases, and a poisoned one in the end.

Each is asked for by a signed job that comes on a stick with its release, as to a device without a network. The moment
is drawn within a stage of the update, so that short stages are cut as often as long ones. After each boot there is an
agent that answers right and an environment that works; in the end each job has ended as it must, and nothing is left
over. The disk is that of ``test_vm_cuts.py``.
"""

from __future__ import annotations

import math
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.core.desk import Desk, Keys
from tests.deploy.test_update import POISON
from tests.operations.deliveries import Operator
from tests.vm.artefacts import Shares, install_by_script
from tests.vm.conftest import CONFIG, SEED, UPDATE_CUTS
from tests.vm.disk import Disk
from tests.vm.image import SHARE
from tests.vm.machine import Kit, Machine
from tests.vm.test_vm import Count, SwitchOn, command, right

pytestmark = [pytest.mark.long, pytest.mark.main_only]

#: Root gives an update up that it began more than five times.
MOST_CUTS = 4
FIRST = "0.2.0"
HOME = "/opt/edge-agent"
UPDATE = "[update]\nsettle_s = 3\nwithin_s = 900\n[clock]\ntrust = 'always'\n"
#: In which order they come, and how long each may take, as a share of an installation: until it has been seen once.
STAGES = {"fetching": 0.2, "verifying": 0.2, "making": 0.8, "trying": 0.3, "switching": 0.1, "probation": 0.3}
ORDER = ("", *STAGES, "returning", "kept", "refused", "returned")
MOST_S = 1800


@dataclass(frozen=True, slots=True)
class Release:
    """One that is there to be updated to, with the job that asks for it. ``cuts`` are the stages to be cut in."""

    version: str
    before: str
    job: str
    poisoned: bool
    cuts: tuple[str, ...]

    @property
    def stick(self) -> str:
        return f"sticks/{self.version}"


def planned(cuts: int, chance: random.Random) -> list[Release]:
    """Two good releases or more, so that none is cut too often, and a poisoned one. Each stage has its share."""
    count = max(3, math.ceil(cuts / MOST_CUTS))
    stages = [list(STAGES)[number % len(STAGES)] for number in range(cuts)]
    chance.shuffle(stages)
    found = []
    for number in range(1, count + 1):
        cut = tuple(sorted(stages[number - 1 :: count], key=ORDER.index))
        found.append(Release(f"0.2.{number}", f"0.2.{number - 1}", f"j{number}", number == count, cut))
    return found


class Watch:
    """Looks how far root is, and learns how long each stage takes on this machine."""

    def __init__(self, machine: Machine, install_s: float) -> None:
        self._machine = machine
        self.seconds = {stage: share * install_s for stage, share in STAGES.items()}
        self._stage: str | None = None
        self._begun: float | None = None

    def stage(self, release: Release) -> str:
        """The stage now."""
        stage: str = self._machine.do("stage", version=release.version, job=release.job)
        now = time.monotonic()
        if stage != self._stage:
            last = self._stage
            # Backward: it is begun anew after a cut, and what was seen until now was an old note.
            if last in self.seconds and self._begun is not None and ORDER.index(stage) > ORDER.index(last):
                self.seconds[last] = now - self._begun
            self._stage, self._begun = stage, None if last is None else now
        return stage

    def reach(self, release: Release, stage: str) -> str:
        """Wait for that stage or a later one; which it is."""
        wanted = ORDER.index(stage)
        self._machine.wait_until(
            f"{release.version}: {stage}", lambda: ORDER.index(self.stage(release)) >= wanted, MOST_S
        )
        return self.stage(release)

    def forget(self) -> None:
        """The machine was off: since when a stage lasts is not known any more."""
        self._stage = self._begun = None


def put(shares: Shares, releases: list[Release], folder: Path) -> Kit:
    """A disk with the first version, a fleet's device, and a stick for each release."""
    operator, keys = Operator(folder), Keys()
    desk = Desk(keys, "cam-1", 1, lambda: "0" * 32)
    share = folder / "fleet-with-releases"
    shutil.copytree(shares.wheels(FIRST), share / FIRST)
    (share / "trust.toml").write_text(keys.trust("cam-1"))
    shutil.copy(operator.folder.shipped_root, share / "root.json")
    for release in releases:
        operator.ok("publish-release", str(shares.wheels(release.version, *((POISON,) if release.poisoned else ()))))
        stick, own = share / release.stick, f"targets/releases/{release.version}"
        shutil.copytree(operator.site / "metadata", stick / "metadata")
        shutil.copytree(operator.site / own, stick / own)
        job = desk.job("agent.update", {"version": release.version})
        assert job.job_id == release.job
        (stick / "job.json").write_bytes(desk.sealed(desk.document(job)))
    return shares.pack(share)


def prepare(machine: Machine) -> float:
    """A device of the fleet with the first version and a model; how long the installation took."""
    command(machine, "mkdir", "-p", "/etc/edge-agent")
    command(machine, "cp", f"{SHARE}/trust.toml", f"{SHARE}/root.json", "/etc/edge-agent")
    machine.do("write", path="/etc/edge-agent/config.toml", text=CONFIG + UPDATE)
    seconds: float = install_by_script(machine, FIRST)["s"]
    added = machine.do("add", file="0.tflite")
    assert added["status"] == 200, added
    return seconds


def look(machine: Machine, release: Release, watch: Watch) -> None:
    """After a boot: a whole environment of one of both versions, a right answer, a store without a fault."""
    command(machine, "test", "-f", f"{HOME}/current/.installed")
    version = command(machine, f"{HOME}/current/bin/edge-agent", "--version")["out"].split()[-1]
    assert version in (release.before, release.version), (version, release)
    # A poisoned release has to die three times before.
    first = machine.do("first_answer", timeout=600)
    assert first.get("status") == 200 and right(first), (release, first)
    # Its job was there: it must be now. Whoever brings the release comes again, first, since an operation that fetches
    # keeps others waiting, the look through the store among them.
    if not has_ended(machine, release) and watch.stage(release) == "fetching":
        machine.do("deliver", stick=release.stick)
    machine.wait_until("the store is looked through", lambda: is_verified(machine))


def is_verified(machine: Machine) -> bool:
    """Whether core came to an end with it: the update may restart it just then."""
    answer = machine.do("ask", method="POST", target="/v1/store/verify", body={})
    assert answer["status"] in (200, 503), answer
    assert answer["status"] == 503 or answer["json"]["ok"], answer
    return bool(answer["status"] == 200)


def job_of(machine: Machine, release: Release) -> dict[str, Any]:
    answer = machine.do("ask", method="GET", target=f"/v1/jobs/{release.job}")
    assert answer["status"] == 200, (release, answer)
    job: dict[str, Any] = answer["json"]
    return job


def has_ended(machine: Machine, release: Release) -> bool:
    return job_of(machine, release)["state"] in ("succeeded", "failed", "rejected", "cancelled")


def require_end(machine: Machine, release: Release, links: list[str]) -> None:
    """The job's end is that of its release, and of the update nothing is left but what runs and the way back."""
    job = job_of(machine, release)
    if release.poisoned:
        assert job["state"] == "failed", job
        assert re.search(r"core did not start, \d+ times: cannot start", job["error"]["text"]), job
    else:
        assert job["state"] == "succeeded", job
        assert job["result"] == {"version": release.version, "before": release.before}
    names = ("current", "previous", "steady")
    assert command(machine, "readlink", *(f"{HOME}/{name}" for name in names))["out"].split() == links
    assert machine.do("ask", method="GET", target="/v1/status")["json"]["version"] == links[0]
    left = set(command(machine, "ls", "-A", HOME)["out"].split())
    assert left == {*links, *names, "update"}
    left = set(command(machine, "ls", "-A", f"{HOME}/update")["out"].split())
    assert left <= {"state.json", "lock", "marks.json", "metadata", "try.txt"}, left
    left = set(command(machine, "ls", "-A", "/var/lib/edge-agent/update")["out"].split())
    assert left <= {"request.json", "verdict.json"}, left
    assert command(machine, "find", "/etc/systemd", "/usr/lib/sysusers.d", "-name", "*.new")["out"] == ""


def test_update_cuts(shares: Shares, switch_on: SwitchOn, tmp_path: Path, count: Count) -> None:
    """Cut, boot, look, until the job has ended; the next release."""
    chance = random.Random(SEED)
    releases = planned(UPDATE_CUTS, chance)
    kit = put(shares, releases, tmp_path)
    machine = switch_on(kit, Disk(kit.image.root))
    install_s = prepare(machine)
    watch, cuts, lost = Watch(machine, install_s), Counter[str](), 0
    links = [FIRST, "", FIRST]
    for release in releases:
        machine.do("deliver", stick=release.stick)
        for stage in release.cuts:
            reached = watch.reach(release, stage)
            time.sleep(chance.uniform(0, watch.seconds.get(reached, 5)))
            cuts[watch.stage(release)] += 1
            lost += machine.cut(chance, survives=chance.choice((0, 0.5)))
            watch.forget()
            machine.boot()
            look(machine, release, watch)
        watch.reach(release, "kept")
        machine.wait_until(f"{release.job} has ended", lambda: has_ended(machine, release))  # noqa: B023 - called here
        if not release.poisoned:
            links = [release.version, release.before, release.version]
        require_end(machine, release, links)
        assert right(machine.do("infer"))
    jobs = machine.do("ask", method="GET", target="/v1/jobs")["json"]["jobs"]
    assert sorted(job["job_id"] for job in jobs) == sorted(release.job for release in releases), "no job is lost"
    machine.off()
    count(
        cuts=sum(cuts.values()), updates=len(releases), kept=len(releases) - 1, returned=1, lost=0, blocks_lost=lost,
        **{f"in_{stage}": cuts[stage] for stage in ORDER if cuts[stage]},
        install_s=install_s, **{f"{stage}_s": round(seconds) for stage, seconds in watch.seconds.items()},
    )  # fmt: skip
