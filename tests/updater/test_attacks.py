"""What somebody who has taken core over may hand to root: none of it is installed, run, or read through a link."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from agent.bundles.ustar import encode_header
from agent.fleet import shipping
from agent.fleet.keys import Passwords
from agent.fleet.repository import Repository
from agent.fleet.shipping import publish_release
from agent.trust.releases import Course, Request
from tests.operations.deliveries import Operator
from tests.updater.grounds import Machine, operator_with, wheelhouse


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return operator_with(tmp_path_factory.mktemp("fleet"), "0.1.1")


@pytest.fixture
def machine(tmp_path: Path, fleet: Operator) -> Iterator[Machine]:
    """Whatever is handed over, the version before runs at the end and nothing else is there."""
    made = Machine(tmp_path / "root", fleet)
    yield made
    assert made.links() == ["0.1.0", None, "0.1.0"] and "restart" not in made.log
    assert not any(line.startswith("try") for line in made.log), "nothing of it was run"
    made.require_tidy("0.1.0")


def refused(machine: Machine, said: str) -> Course:
    course = machine.run()
    assert course.stage == "refused" and said in course.reason, course
    return course


# -- the tar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1] + b"\1", "wrong_content"),
        (lambda data: data[:5000], "5000 bytes or more"),
        (lambda data: data + b"more", "belong there"),
        (lambda data: b"", "0 bytes or more"),
    ],
    ids=["another content", "cut off", "longer", "empty"],
)
def test_a_tar_that_is_not_the_one_that_was_signed(
    machine: Machine, change: Callable[[bytes], bytes], said: str
) -> None:
    machine.hand_over("0.1.1")
    machine.updates.tar.write_bytes(change(machine.updates.tar.read_bytes()))
    refused(machine, said)


def a_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def a_second_name(path: Path, elsewhere: Path) -> None:
    os.link(elsewhere, path)


def a_pipe(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("trick", [a_link, a_second_name, a_pipe, a_folder])
def test_what_is_no_plain_file_is_not_read(machine: Machine, trick: Callable[[Path, Path], None]) -> None:
    machine.hand_over("0.1.1")
    elsewhere = machine.ground.root / "elsewhere.tar"
    machine.updates.tar.rename(elsewhere)
    trick(machine.updates.tar, elsewhere)
    refused(machine, "cannot")


def test_a_link_in_the_place_of_the_folder_is_not_followed(machine: Machine) -> None:
    machine.hand_over("0.1.1")
    folder = machine.updates.folder
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")
    machine.updater().run()
    assert machine.ground.course() is None, "not even the request was read"


def published(fleet: Operator, folder: Path, name: str, make: Callable[[Path], None]) -> None:
    """A tar of our making, signed by the fleet as if it were a release: what its own machine might be made to sign."""
    wheels = wheelhouse(folder / f"wheels-{name}", name)
    made = folder / f"{name}.tar"
    make(made)
    before = shipping._pieces
    shipping._pieces = lambda wheels: iter([made.read_bytes()])  # type: ignore[assignment]
    try:
        with Repository(fleet.folder, Passwords(), datetime.now(timezone.utc)) as repository:
            publish_release(repository, wheels)
    finally:
        shipping._pieces = before


WHEEL = "edge_agent-{}-py3-none-any.whl"


def member(name: str, **fields: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            info = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(bytes(info.size)))

    return make


def raw(*parts: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(b"".join(parts)) and None


@pytest.mark.parametrize(
    ("number", "make", "said"),
    [
        (1, member("../../etc/cron.d/x.whl"), "no name of a wheel"),
        (2, member("/etc/cron.d/x.whl"), "no name of a wheel"),
        (3, member("folder/x.whl"), "no name of a wheel"),
        (4, member(".whl"), "no name of a wheel"),
        (5, member("install.sh"), "no name of a wheel"),
        (6, member("x.whl", type=tarfile.SYMTYPE, linkname="/etc/shadow"), "a symbolic link"),
        (7, member("x.whl", type=tarfile.LNKTYPE, linkname="/etc/shadow"), "a hard link"),
        (8, member("x.whl", type=tarfile.CHRTYPE), "a character device"),
        (9, member("x.whl", type=tarfile.DIRTYPE), "a directory"),
        (10, raw(encode_header("x.whl", 8**11 - 1), bytes(1024)), "too much"),
        (11, raw(encode_header("x.whl", 600), bytes(512)), "ends too early"),
        (12, raw(b"no tar at all" * 100), "cannot read release"),
        (13, raw(*[encode_header("x.whl", 0)] * 2, bytes(1024)), "twice in it"),
        (14, raw(encode_header("x-1-py3-none-any.whl", 0), bytes(1024)), "the agent's own wheel must be in it once"),
        (15, raw(encode_header(WHEEL.format("1.0.15"), 0), bytes(1024), b"more"), "something follows its end"),
        (16, raw(*[encode_header(f"x{n}.whl", 0) for n in range(300)], bytes(1024)), "too much"),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_a_signed_tar_that_is_none_of_wheels(
    machine: Machine, fleet: Operator, tmp_path: Path, number: int, make: Callable[[Path], None], said: str
) -> None:
    published(fleet, tmp_path, f"1.0.{number}", make)
    machine.hand_over(f"1.0.{number}")
    refused(machine, said)
    assert not list(machine.ground.root.rglob("x.whl"))


# -- what vouches for it ----------------------------------------------------------------------------------------------


def test_another_fleets_release(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    theirs = Machine(tmp_path / "theirs", operator_with(tmp_path / "foreign", "0.1.1"))
    theirs.hand_over("0.1.1")
    shutil.copytree(theirs.updates.folder, machine.updates.folder)
    refused(machine, "bad_signature")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("timestamp.json", None, "not_found"),
        ("targets.json", None, "not_found"),
        ("timestamp.json", "{}", "malformed"),
        ("snapshot.json", "[" * 9000, "not_found"),
        ("targets.json", "[" * 900, "mixed"),
        ("targets.json", "x" * (5 << 20), "not_found"),
    ],
)
def test_metadata_that_is_missing_or_damaged(machine: Machine, name: str, text: str | None, said: str) -> None:
    machine.hand_over("0.1.1")
    path = machine.updates.folder / "metadata" / name
    path.unlink() if text is None else path.write_text(text)
    refused(machine, said)


def test_a_version_that_nobody_ships(machine: Machine) -> None:
    machine.hand_over("0.1.1")
    machine.updates.ask(Request(id="job-1-j2", version="0.1.9"))
    refused(machine, "not_listed")


def test_what_is_written_by_hand_beside_what_was_signed(machine: Machine) -> None:
    machine.hand_over("0.1.1")
    path = machine.updates.folder / "metadata/targets.json"
    path.write_text(path.read_text().replace("0.1.1", "0.1.9"))
    machine.updates.ask(Request(id="job-1-j2", version="0.1.9"))
    refused(machine, "mixed")


def test_a_release_that_was_withdrawn_is_refused_though_its_metadata_is_whole(tmp_path: Path) -> None:
    """Root remembers by itself what it has seen: an older state of the repository does not come back."""
    fleet = operator_with(tmp_path, "0.1.1", "0.1.4")
    machine = Machine(tmp_path / "root", fleet)
    machine.believed("0.1.4")
    machine.hand_over("0.1.4", as_id="job-1-j1")
    old = shutil.copytree(machine.updates.folder, tmp_path / "old")
    fleet.ok("withdraw-release", "0.1.4", "--yes")
    assert machine.update("0.1.1", as_id="job-1-j2").stage == "kept"
    shutil.rmtree(machine.updates.folder)
    shutil.copytree(old, machine.updates.folder)
    machine.updates.ask(Request(id="job-1-j3", version="0.1.4"))
    refused(machine, "rollback")
    # Also where the metadata itself is lost: what was seen is noted beside it.
    shutil.rmtree(machine.ground.own / "metadata")
    machine.updates.ask(Request(id="job-1-j4", version="0.1.4"))
    refused(machine, "rollback")


def test_metadata_whose_time_is_over(tmp_path: Path) -> None:
    fleet = operator_with(tmp_path, "0.1.1")
    machine = Machine(tmp_path / "root", fleet)
    with fleet.opened(days=-90) as repository:
        repository.save()
    machine.hand_over_unchecked("0.1.1")
    machine.ground.prepare()
    soon = datetime.now(timezone.utc) - timedelta(days=1)
    (machine.ground.own / "marks.json").write_text(f'{{"floor": "{soon.isoformat()}", "root": "", "marks": {{}}}}')
    refused(machine, "expired")


def test_without_a_root_nothing_is_believed(machine: Machine) -> None:
    machine.hand_over("0.1.1")
    (machine.ground.root / "etc/edge-agent/root.json").unlink()
    refused(machine, "was given no root")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's file takes root")
def test_a_root_that_core_could_write_is_not_believed(machine: Machine) -> None:
    machine.hand_over("0.1.1")
    os.chown(machine.ground.root / "etc/edge-agent/root.json", 4711, 4711)
    refused(machine, "whoever writes it commands this device")


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "x" * 20_000, '{"format": "edge-update-request/1", "id": "a", "version": "../../etc"}',
        '{"format": "edge-update-request/1", "id": "a/b", "version": "0.1.1"}',
        '{"format": "edge-update-request/2", "id": "a", "version": "0.1.1"}',
        '{"format": "edge-update-request/1", "id": "a", "version": 1}',
        '{"format": "edge-update-request/1", "id": "a", "version": "0.1.1\\n"}',
    ],
)  # fmt: skip
def test_a_request_that_is_none(machine: Machine, text: str) -> None:
    machine.hand_over("0.1.1")
    (machine.updates.folder / "request.json").write_text(text)
    machine.updater().run()
    assert machine.ground.course() is None


def test_requests_without_end_are_rested_after(machine: Machine) -> None:
    """Each that comes to nothing costs ten seconds in which nothing is done."""
    machine.hand_over("0.1.1")
    left = 5

    def again(step: str) -> None:
        nonlocal left
        if step == "after: refused" and left:
            left -= 1
            machine.updates.ask(Request(id=f"again-{left}", version="0.1.9"))

    machine.updates.tar.write_bytes(b"")
    machine.updater(again).run()
    assert left == 0 and machine.clock == 60.0


@pytest.mark.parametrize("current", ["0.1.0", "0.1.1"])
def test_where_its_own_note_is_damaged_the_version_that_was_confirmed_runs(
    tmp_path: Path, fleet: Operator, current: str
) -> None:
    machine = Machine(tmp_path / "root", fleet)
    machine.environment("0.1.1")
    machine.ground.point("current", current)
    machine.ground.prepare()
    (machine.ground.own / "state.json").write_text('{"stage": "swit')
    (machine.ground.own / "pending").touch()
    machine.updater().run()
    assert machine.ground.link("current") == "0.1.0"
    assert machine.running == "0.1.0" and ("restart" in machine.log) == (current != "0.1.0")
    machine.require_tidy("0.1.0")
