"""Root's updater on a machine below a folder: kept, refused, taken back, and cut off at each of its steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.base.errors import TryLaterError
from agent.trust.releases import Verdict
from agent.updater import ground as subject
from tests.operations.deliveries import Operator
from tests.updater.grounds import Machine, operator_with, wheelhouse


class Killed(BaseException):
    """Stands for SIGKILL and for the power: nothing catches it."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """Ships 0.1.1, 0.1.2 (does not work), 0.1.3 (does not start), 0.1.4, and 0.1.5, which cannot be installed."""
    return operator_with(
        tmp_path_factory.mktemp("fleet"), "0.0.9", "0.1.1", "0.1.2", "0.1.3", "0.1.4", "0.1.5",
        v0_1_2=["broken"], v0_1_3=["poison"], v0_1_5=["unbuildable"],
    )  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path, fleet: Operator) -> Iterator[Machine]:
    made = Machine(tmp_path / "root", fleet)
    yield made
    made.start()  # whatever happened, something starts


def test_a_release_that_works_takes_the_place_of_the_one_before(machine: Machine) -> None:
    course = machine.update("0.1.1")
    assert (course.stage, course.reason) == ("kept", "")
    assert machine.links() == ["0.1.1", "0.1.0", "0.1.1"]
    assert machine.units() == ["0.1.1", "0.1.1"]
    assert machine.running == "0.1.1"
    machine.require_tidy("0.1.0", "0.1.1")
    assert machine.update("0.1.4", as_id="job-1-j2").stage == "kept"
    machine.require_tidy("0.1.1", "0.1.4")


def test_it_asks_for_nothing_twice(machine: Machine) -> None:
    machine.update("0.1.1")
    before = list(machine.log)
    assert machine.run().stage == "kept"
    assert machine.log == before


def test_what_does_not_work_is_never_switched_to(machine: Machine) -> None:
    course = machine.update("0.1.2")
    assert course.stage == "refused" and "does not work here: its import failed" in course.reason
    assert machine.links() == ["0.1.0", None, "0.1.0"] and machine.units() == ["0.1.0", "0.1.0"]
    assert "restart" not in machine.log
    machine.require_tidy("0.1.0")


def test_what_cannot_be_installed_says_the_installers_reason(machine: Machine) -> None:
    course = machine.update("0.1.5")
    assert course.stage == "refused" and course.reason.endswith("cannot install: no room")
    machine.require_tidy("0.1.0")


def test_what_does_not_start_gives_way_to_the_one_before(machine: Machine) -> None:
    machine.update("0.1.1")
    course = machine.update("0.1.3", as_id="job-1-j2")
    assert course.stage == "returned" and "core did not start, 3 times: poisoned" in course.reason
    assert machine.links() == ["0.1.1", "0.1.0", "0.1.1"], "the way back leads where it led before"
    assert machine.units() == ["0.1.1", "0.1.1"] and machine.running == "0.1.1"
    machine.require_tidy("0.1.0", "0.1.1")


def test_what_is_not_confirmed_gives_way_too(machine: Machine) -> None:
    machine.confirms = False
    course = machine.update("0.1.1")
    assert course.stage == "returned" and "did not confirm it in 30 s" in course.reason
    assert machine.links() == ["0.1.0", None, "0.1.0"] and machine.running == "0.1.0"
    machine.require_tidy("0.1.0")


def test_during_probation_the_updater_is_the_one_before(machine: Machine) -> None:
    seen = []
    machine.core = lambda version: seen.append((version, machine.units(), machine.ground.link("steady")))
    machine.update("0.1.1")
    assert seen == [("0.1.1", ["0.1.1", "0.1.0"], "0.1.0")]


def test_core_may_give_it_up(machine: Machine) -> None:
    machine.confirms = False
    said = Verdict(id="job-1-j1", say="back", reason="the job was given up")
    machine.core = lambda version: machine.updates.say(said)
    course = machine.update("0.1.1")
    assert course.stage == "returned" and course.reason == "the job was given up"
    assert machine.running == "0.1.0"


def test_the_word_of_another_update_counts_for_nothing(machine: Machine) -> None:
    machine.confirms = False
    machine.core = lambda version: machine.updates.say(Verdict(id="job-1-j0", say="keep"))
    assert machine.update("0.1.1").stage == "returned"


def test_somebody_who_installs_by_hand_meanwhile_is_left_alone(machine: Machine) -> None:
    machine.confirms = machine.attended = False
    machine.hand_over("0.1.1")
    machine.updater().run()
    machine.environment("0.2.0")
    for name in ("current", "steady"):
        machine.ground.point(name, "0.2.0")
    machine.attended = True
    course = machine.run()
    assert course.stage == "returned" and "another version was installed meanwhile" in course.reason
    assert machine.ground.link("current") == machine.ground.link("steady") == "0.2.0"


# -- cuts -------------------------------------------------------------------------------------------------------------


def steps_of(machine: Machine, version: str) -> list[str]:
    seen: list[str] = []
    machine.hand_over(version)
    machine.updater(seen.append).run()
    return seen


@pytest.mark.parametrize(
    ("version", "confirms", "stage"),
    [("0.1.1", True, "kept"), ("0.1.2", True, "refused"), ("0.1.3", True, "returned"), ("0.1.1", False, "returned")],
    ids=["works", "does not work", "does not start", "is not confirmed"],
)
def test_cut_off_at_every_step_it_is_finished_or_taken_back(
    tmp_path: Path, fleet: Operator, version: str, confirms: bool, stage: str
) -> None:
    model = Machine(tmp_path / "model", fleet)
    model.confirms = confirms
    steps = steps_of(model, version)
    assert len(steps) >= 8
    for number, name in enumerate(steps):
        machine = Machine(tmp_path / f"{number}", fleet)
        machine.confirms = confirms
        machine.hand_over(version)
        left = number

        def cut(step: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with pytest.raises(Killed):
            machine.updater(cut).run()
        machine.start()  # the machine boots: core first, the updater some time later
        course = machine.run()
        assert course.stage == stage, f"cut at {number}, {name}: {course}"
        assert machine.links() == model.links() and machine.units() == model.units(), name
        assert machine.running == model.running, name
        machine.require_tidy(*model.ground.environments())
        shutil.rmtree(machine.ground.root)


@pytest.mark.parametrize(("version", "stage"), [("0.1.1", "kept"), ("0.1.2", "refused"), ("0.1.3", "returned")])
def test_cut_off_between_the_note_and_its_mark_it_is_started_again_and_comes_to_rest(
    tmp_path: Path, fleet: Operator, monkeypatch: pytest.MonkeyPatch, version: str, stage: str
) -> None:
    """Systemd starts the updater as long as the mark stands, and core asks while root says nothing of its request."""
    write, forget = subject.write_atomically, subject.Ground.forget
    for number in range(100):
        machine = Machine(tmp_path / f"{number}", fleet)
        machine.hand_over(version)
        left = number

        def burn() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        def write_or_not(path: Path, data: bytes, *, mode: int) -> None:
            burn()
            write(path, data, mode=mode)

        def forget_or_not(ground: subject.Ground) -> None:
            burn()
            forget(ground)

        with monkeypatch.context() as patched, suppress(Killed):
            patched.setattr(subject, "write_atomically", write_or_not)
            patched.setattr(subject.Ground, "forget", forget_or_not)
            machine.updater().run()
        machine.start()
        for _ in range(5):
            course = machine.ground.course()
            if course is not None and not machine.ground.is_pending:
                break
            machine.run()
        else:
            pytest.fail(f"cut at {number}, it never comes to rest: {course}")
        assert course.stage == stage, (number, course)
        machine.require_tidy(*(("0.1.0", "0.1.1") if stage == "kept" else ("0.1.0",)))
        if left >= 0:
            break
    assert number > 5


@pytest.mark.parametrize("version", ["0.1.1", "0.1.3"])
def test_a_service_manager_that_does_not_answer_says_nothing_of_the_release(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """A machine that goes down, say: the next start goes on, whether forward or back."""
    silent = 0

    def no_answer() -> None:
        nonlocal silent
        silent += 1
        raise TryLaterError("cannot restart: Failed to connect to bus")

    machine.hand_over(version)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(machine, "restart", no_answer)
            with pytest.raises(TryLaterError):
                machine.updater().run()
        course = machine.ground.course()
        assert course is not None and not course.has_ended and machine.ground.is_pending
        if version == "0.1.3":
            machine.ground.keep(course.model_copy(update={"restarted": True}))
            machine.start()
    assert silent == 2
    assert machine.run().stage == ("kept" if version == "0.1.1" else "returned")
    assert machine.running == ("0.1.1" if version == "0.1.1" else "0.1.0")


def test_cut_off_again_and_again_it_ends_on_the_version_before(machine: Machine) -> None:
    machine.confirms = False

    def cut(step: str) -> None:
        if step == "restarted":
            raise Killed

    machine.hand_over("0.1.1")
    for _ in range(5):
        with pytest.raises(Killed):
            machine.updater(cut).run()
        machine.start()
        assert machine.running == "0.1.1"
    machine.updater(cut).run()
    course = machine.ground.course()
    assert course is not None and course.stage == "returned" and "interrupted 5 times" in course.reason
    assert machine.running == "0.1.0"


def test_an_older_version_needs_to_say_that_it_may(machine: Machine, fleet: Operator, tmp_path: Path) -> None:
    course = machine.update("0.0.9")
    assert course.stage == "refused" and "does not say that it may take its place" in course.reason
    wheels = fleet.scratch / "wheels-0.0.9"
    fleet.ok("publish-release", str(wheels), "--instead-of", "0.1.0")
    try:
        assert machine.update("0.0.9", as_id="job-1-j2").stage == "kept"
    finally:
        fleet.ok("publish-release", str(wheels))
    assert machine.links() == ["0.0.9", "0.1.0", "0.0.9"]


def test_a_release_that_leaves_no_way_back_is_refused(tmp_path: Path, fleet: Operator) -> None:
    for version, state, reads, said in (
        ("0.3.0", 3, 1, "no way back"),
        ("0.3.1", 4, 2, "reads formats 2"),
    ):
        fleet.ok("publish-release", str(wheelhouse(tmp_path / version, version, state=state, reads=reads)))
        course = Machine(tmp_path / f"root-{version}", fleet).update(version)
        assert course.stage == "refused" and said in course.reason
    fleet.ok("publish-release", str(wheelhouse(tmp_path / "0.3.2", "0.3.2", state=2, reads=1)))
    assert Machine(tmp_path / "root", fleet).update("0.3.2").stage == "kept"
