"""Installing what was published: only what is needed is fetched, a kill costs nothing, a failure leaves nothing.

Operator, repository, store, desk and mirror are real; what a trial says and what the serving side loads is told.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.base.errors import (
    AgentError,
    ConflictError,
    PeerError,
    RefusedError,
    TooLargeError,
    TryLaterError,
    UnsupportedError,
)
from agent.operations.install import AddRequest
from agent.store.document import FleetEntry
from agent.store.store import Store
from agent.work.jobs import Failure
from agent.work.steps import HaltedError
from tests import onnx_models
from tests.core.test_daemon import bundle
from tests.operations.deliveries import (
    NAME,
    Device,
    Job,
    Mirror,
    Operator,
    device_at,
    install,
    run_or_take_back,
    two_variants,
)


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """With versions 1.0.0 and 2.0.0 of two variants each, the second with a golden set."""
    made = Operator(tmp_path_factory.mktemp("operator"))
    made.publish("1.0.0", two_variants(1))
    made.publish("2.0.0", two_variants(2), golden_from=onnx_models.linear(2))
    made.publish("3.0.0", two_variants(3))
    return made


@pytest.fixture
def mirror(operator: Operator) -> Iterator[Mirror]:
    with Mirror(operator.site) as made:
        yield made


@pytest.fixture
def device(operator: Operator, mirror: Mirror) -> Iterator[Device]:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        device_at(Path(folder), mirror, operator.folder.shipped_root.read_bytes()) as made,
    ):
        yield made


def args(operator: Operator, device: Device, version: str, **options) -> dict:
    return {"model": NAME, "version": version, "grants": operator.grants(version, device.recipient, **options)}


# -- one line from the repository to the version that answers ----------------------------------------------------------


def test_a_published_version_is_fetched_tried_and_active(operator: Operator, device: Device, mirror: Mirror) -> None:
    assert install(device, operator, "2.0.0")["fetched"] == ["fast"]
    assert device.models() == {NAME: ("2.0.0", ["2.0.0"])}
    entry = device.store.document.models[NAME].versions["2.0.0"]
    assert (entry.origin, sorted(entry.blobs)) == ("signed", ["fast.onnx", "golden.npz"])
    assert device.left_behind() == []
    assert device.store.verify().damaged == ()
    # Not one byte of the variant that was not needed, and each payload once.
    assert not [path for path, _ in mirror.asked if "small.onnx" in path]
    lengths = {ref.payload: ref.payload_size for ref in entry.blobs.values()}
    brought = {path.rpartition("/")[2][:64]: count for path, count in mirror.brought.items() if "/payload/" in path}
    assert brought == lengths


def test_what_is_stored_is_what_was_downloaded(operator: Operator, device: Device) -> None:
    install(device, operator, "2.0.0")
    entry = device.store.document.models[NAME].versions["2.0.0"]
    for part, ref in entry.blobs.items():
        (published,) = (operator.site / "targets" / "models" / NAME / "2.0.0" / "payload").glob(f"*.{part}")
        assert published.read_bytes() == (device.store.root / "blobs" / ref.payload).read_bytes()


def test_the_second_variant_is_fetched_when_the_first_is_rejected(
    operator: Operator, device: Device, mirror: Mirror
) -> None:
    device.rejects = {"fast"}
    assert install(device, operator, "2.0.0")["fetched"] == ["small"]
    entry = device.store.document.models[NAME].versions["2.0.0"]
    assert sorted(entry.blobs) == ["golden.npz", "small.onnx"] and entry.chosen == "small@CPUExecutionProvider"
    assert device.blobs() == {ref.payload for ref in entry.blobs.values()}
    assert device.left_behind() == []
    assert len([path for path, _ in mirror.asked if path.endswith("golden.npz")]) == 1


def test_nobody_waits_while_it_fetches_and_trials_take_their_turn(operator: Operator, device: Device) -> None:
    grants = operator.grants("2.0.0", device.recipient)
    job = Job(device, {"model": NAME, "version": "2.0.0", "grants": grants})
    device.rejects = {"fast"}
    seen: list[tuple[str, bool]] = []
    job.at = lambda: seen.append((str(job.events[-1].get("stage")) if job.events else "", job.has_turn))
    assert job.run()["fetched"] == ["small"]
    assert {turn for stage, turn in seen if stage == "fetch"} == {False}
    assert ("try", True) in seen
    trials = [place for place, (stage, _) in enumerate(seen) if stage == "try"]
    assert ("fetch", False) in seen[trials[0] : trials[-1]], "the second variant came after the trial of the first"


def test_when_every_variant_is_rejected_the_version_before_goes_on(operator: Operator, device: Device) -> None:
    install(device, operator, "1.0.0")
    before = device.blobs()
    device.rejects = {"fast", "small"}
    with pytest.raises(UnsupportedError, match=r"no variant passed its trial.*fast.*answers wrongly.*small"):
        install(device, operator, "2.0.0")
    assert device.models() == {NAME: ("1.0.0", ["1.0.0"])}
    assert device.blobs() == before
    assert device.left_behind() == []


def test_a_policy_decides_what_is_fetched_first(operator: Operator, device: Device) -> None:
    variants = {"fast": ("fp32", onnx_models.heavy(16, 9)), "small": ("int8", onnx_models.linear(1))}
    operator.publish("2.2.0", variants, prefer="memory")
    assert install(device, operator, "2.2.0")["fetched"] == ["small"]


def test_the_variants_of_a_cascade_come_together(operator: Operator, device: Device) -> None:
    cascade = {"first": "small", "then": "fast", "threshold": 0.5}
    operator.publish("2.3.0", two_variants(4), prefer="latency", cascade=cascade)
    assert install(device, operator, "2.3.0")["fetched"] == ["small", "fast"]
    assert sorted(device.store.document.models[NAME].versions["2.3.0"].blobs) == ["fast.onnx", "small.onnx"]


def test_an_update_keeps_the_way_back_and_gives_the_rest_its_space(operator: Operator, device: Device) -> None:
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        result = install(device, operator, version)
    assert result["removed"] == ["1.0.0"]
    assert device.models() == {NAME: ("3.0.0", ["2.0.0", "3.0.0"])}
    assert device.store.document.models[NAME].previous == "2.0.0"
    assert device.left_behind() == []


def test_a_version_that_is_here_is_not_fetched_again(operator: Operator, device: Device, mirror: Mirror) -> None:
    install(device, operator, "1.0.0")
    install(device, operator, "2.0.0")
    mirror.asked.clear()
    install(device, operator, "1.0.0")
    assert mirror.asked == []
    assert device.models() == {NAME: ("1.0.0", ["1.0.0", "2.0.0"])}


def test_a_damaged_version_is_mended(operator: Operator, device: Device) -> None:
    install(device, operator, "1.0.0")
    ref = device.store.document.models[NAME].versions["1.0.0"].blobs["fast.onnx"]
    path = device.store.root / "blobs" / ref.payload
    path.write_bytes(path.read_bytes()[:-1])
    assert len(device.store.verify().damaged) == 1
    install(device, operator, "1.0.0")
    assert device.store.verify().damaged == ()
    assert device.left_behind() == []


# -- a kill anywhere ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed_at(operator: Operator, folder: Path, mirror: Mirror, kill_at: int) -> tuple[bool, Device, Job]:
    """Install 2.0.0 beside 1.0.0 with a kill at the n-th save, safe point or step of the store; whether it came."""
    root = operator.folder.shipped_root.read_bytes()
    count = 0

    def point(_: object = None) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            raise Killed

    with device_at(folder, mirror, root) as device:
        device.rejects = {"fast"}
        install(device, operator, "1.0.0")
        job = Job(device, args(operator, device, "2.0.0"))
        job.at = point
        device.store._step = device.store._blobs._step = device.store._catalog._step = point
        mirror.brought.clear()
        try:
            job.run()
        except Killed:
            return True, device, job
    return False, device, job


def test_killed_at_any_point_it_goes_on_and_fetches_nothing_twice(operator: Operator, mirror: Mirror) -> None:
    killed, kills = True, 0
    while killed:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            killed, before, job = killed_at(operator, Path(name), mirror, kills + 1)
            kills += killed
            with device_at(Path(name), mirror, before.root) as device:
                device.rejects = {"fast"}
                job.device = device
                job.kill()
                job.at = lambda: None
                if killed:
                    job.run()
                assert device.models() == {NAME: ("2.0.0", ["1.0.0", "2.0.0"])}, kills
                assert device.left_behind() == [], kills
                entry = device.store.document.models[NAME].versions["2.0.0"]
                assert sorted(entry.blobs) == ["golden.npz", "small.onnx"], kills
                assert device.store.verify().damaged == (), kills
            for path, count in mirror.brought.items():
                if "/payload/" in path:
                    assert count == (operator.site / path).stat().st_size, (kills, path)
    assert kills > 50


def test_cancelled_at_any_point_it_leaves_nothing_and_the_way_back_is_as_it_was(
    operator: Operator, device: Device
) -> None:
    install(device, operator, "3.0.0")
    install(device, operator, "1.0.0")
    before, blobs = device.models(), device.blobs()
    device.rejects = {"fast"}
    cancelled, number = True, 0
    while cancelled:
        number += 1
        count = 0

        def point(number: int = number) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise HaltedError("cancelled", Failure("cancelled", "cancelled by the fleet"))

        job = Job(device, args(operator, device, "2.0.0"), job_id=f"j{number}")
        job.at = point
        try:
            job.run()
            cancelled = False
        except HaltedError:
            job.at = lambda: None
            job.take_back()
            assert (device.models(), device.blobs()) == (before, blobs), number
            assert device.store.document.models[NAME].previous == "3.0.0", number
            assert device.left_behind() == [], number
    assert number > 20
    assert device.models() == {NAME: ("2.0.0", ["1.0.0", "2.0.0"])}


def test_a_version_that_was_overtaken_by_hand_stays_as_the_way_back(operator: Operator, device: Device) -> None:
    """Somebody on the device lets another version answer while the job is not over: the job goes, and harms nothing."""
    for version in ("3.0.0", "1.0.0"):
        install(device, operator, version)
    job = Job(device, args(operator, device, "2.0.0"))

    def point() -> None:
        if job.begun[-1] == "sweep":
            device.installer.activate(NAME, "3.0.0")
            raise HaltedError("failed", Failure("failed", "another version answers now"))

    job.at = point
    with pytest.raises(HaltedError):
        run_or_take_back(job)
    assert device.store.document.models[NAME].active == "3.0.0"
    assert device.store.document.models[NAME].previous == "2.0.0"
    assert device.left_behind() == []


def test_a_version_that_cannot_be_loaded_leaves_nothing(operator: Operator, device: Device) -> None:
    device.load_error = TryLaterError("no memory for it")
    with pytest.raises(TryLaterError, match="no memory"):
        install(device, operator, "1.0.0")
    assert device.models() == {} and device.blobs() == set() and device.left_behind() == []


def test_what_lost_jobs_left_goes_with_the_next_one(operator: Operator, device: Device) -> None:
    job = Job(device, args(operator, device, "1.0.0"), job_id="lost")

    def point() -> None:
        if job.begun[-1] == "try":
            raise Killed

    job.at = point
    with pytest.raises(Killed):
        job.run()
    assert device.left_behind() != []
    install(device, operator, "2.0.0")
    assert device.left_behind() == []


# -- space -------------------------------------------------------------------------------------------------------------


def test_without_room_nothing_is_fetched(operator: Operator, mirror: Mirror) -> None:
    root = operator.folder.shipped_root.read_bytes()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        device_at(Path(folder), mirror, root, quota=700) as device,
    ):
        with pytest.raises(TooLargeError, match="quota of 700"):
            install(device, operator, "2.0.0")
        assert not [path for path, _ in mirror.asked if "/payload/" in path]
        assert device.left_behind() == []


def test_there_is_room_while_one_more_blob_would_fit(operator: Operator, mirror: Mirror) -> None:
    """The variant that is rejected gives its space to the next one: the quota need not hold both."""
    root = operator.folder.shipped_root.read_bytes()
    variants = {"fast": ("fp32", onnx_models.linear(1, 16, 900)), "small": ("int8", onnx_models.linear(2, 16, 800))}
    operator.publish("2.4.0", variants)
    quota = 70_000
    assert 2 * max(len(data) for _, data in variants.values()) > quota
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        device_at(Path(folder), mirror, root, quota=quota) as device,
    ):
        device.rejects = {"fast"}
        assert install(device, operator, "2.4.0")["fetched"] == ["small"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_pin_holds(operator: Operator, device: Device, mirror: Mirror) -> None:
    install(device, operator, "1.0.0")
    device.installer.pin(NAME, pinned=True)
    mirror.asked.clear()
    with pytest.raises(AgentError, match=r"pinned to 1\.0\.0"):
        install(device, operator, "2.0.0")
    assert mirror.asked == [] and device.left_behind() == []


def test_a_version_may_ask_for_a_newer_agent(operator: Operator, device: Device, monkeypatch) -> None:
    operator.publish("4.0.0", two_variants(6), requires_agent=">=99")
    with pytest.raises(UnsupportedError, match=r"needs the agent >=99"):
        install(device, operator, "4.0.0")
    assert device.left_behind() == []
    operator.publish("4.1.0", two_variants(6), requires_agent=">=0.1")
    install(device, operator, "4.1.0")
    assert device.models() == {NAME: ("4.1.0", ["4.1.0"])}


def test_what_no_rule_allows_is_said_with_every_reason(operator: Operator, device: Device, mirror: Mirror) -> None:
    device.headroom_mb = 3
    with pytest.raises(UnsupportedError, match=r"no variant can run here: fast.*needs about .* MB.*small"):
        install(device, operator, "2.0.0")
    assert not [path for path, _ in mirror.asked if "/payload/" in path]


def test_variants_without_a_grant_are_not_fetched(operator: Operator, device: Device) -> None:
    assert install(device, operator, "2.0.0", parts=["small.onnx", "golden.npz"])["fetched"] == ["small"]
    device.installer.withdraw(NAME, "2.0.0")
    with pytest.raises(RefusedError, match="golden set"):
        install(device, operator, "2.0.0", parts=["fast.onnx"])
    job = args(operator, device, "1.0.0") | {"grants": operator.grants("2.0.0", device.recipient, parts=["golden.npz"])}
    with pytest.raises(UnsupportedError, match="no grant came for it"):
        run_or_take_back(Job(device, job))


def test_another_content_of_that_version_stays(operator: Operator, device: Device, tmp_path: Path) -> None:
    path = bundle(tmp_path / "own.edgemodel", {"own": ("fp32", onnx_models.linear(9))}, version="2.0.0")
    descriptor = os.open(path, os.O_RDONLY)
    device.installer.add(descriptor, AddRequest(), lambda event: None)
    os.close(descriptor)
    with pytest.raises(ConflictError, match="another content"):
        install(device, operator, "2.0.0")
    assert device.models() == {NAME: ("2.0.0", ["2.0.0"])} and device.left_behind() == []


def test_a_device_without_a_root_says_what_is_missing(operator: Operator, device: Device, mirror: Mirror) -> None:
    device.root = None
    with pytest.raises(UnsupportedError, match="given no root") as refused:
        install(device, operator, "1.0.0")
    assert "root.json" in refused.value.hint
    assert mirror.asked == []


def test_without_python_tuf_it_is_said_how_to_install_it(operator: Operator, device: Device, monkeypatch) -> None:
    grants = operator.grants("1.0.0", device.recipient)
    for name in [name for name in sys.modules if name.split(".")[0] == "tuf" or name == "agent.trust.repository"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("agent.trust.repository")
    monkeypatch.setitem(sys.modules, "tuf", None)
    job = Job(device, {"model": NAME, "version": "1.0.0", "grants": grants})
    with pytest.raises(UnsupportedError, match="cannot install: python-tuf") as refused:
        run_or_take_back(job)
    assert "edge-agent[delivery]" in refused.value.hint


@pytest.mark.parametrize(
    "grants",
    [
        {"a.onnx": {}},
        {"a.onnx": "text"},
        {"a.onnx": {"to": "0" * 16, "blob": "0" * 64, "sealed": "AAAA"}},
        {f"{number}.onnx": {"to": "0" * 16, "blob": "0" * 64, "sealed": ""} for number in range(200)},
        [],
        "all",
    ],
)
def test_what_is_no_grant_is_a_bad_argument(device: Device, grants: object) -> None:
    with pytest.raises(PeerError, match="cannot take arguments"):
        device.handlers["model.install"]({"model": NAME, "version": "1.0.0", "grants": grants})


def test_a_link_that_is_away_is_waited_for(operator: Operator, device: Device, mirror: Mirror, monkeypatch) -> None:
    away = 3

    def tamper(path: str, data: bytes | None) -> bytes | None:
        nonlocal away
        if away:
            away -= 1
            (want,) = mirror.desk.open_wants()
            mirror.desk.fail(want.id, "unreachable", "no route")
        return data

    mirror.tamper = tamper
    monkeypatch.setattr("agent.operations.delivered._PAUSES_S", (0.01,))
    job = Job(device, args(operator, device, "1.0.0"))
    job.run()
    waits = [event for event in job.events if event.get("stage") == "waiting"]
    assert len(waits) == 3 and "no route" in waits[0]["reason"]
    assert device.models() == {NAME: ("1.0.0", ["1.0.0"])}


# -- the device's key --------------------------------------------------------------------------------------------------


def in_a_fleet(store: Store) -> None:
    store.commit(lambda document: document.model_copy(update={"fleet": FleetEntry(identity="ab" * 32)}))


def test_a_grant_to_the_former_key_opens_until_one_to_the_present_key_has(operator: Operator, device: Device) -> None:
    in_a_fleet(device.store)
    former = device.recipient
    device.store.rotate_key()
    assert device.recipient != former
    assert [identity.recipient().public for identity in device.store.grant_identities] == [device.recipient, former]
    old = {"model": NAME, "version": "1.0.0", "grants": operator.grants("1.0.0", former)}
    run_or_take_back(Job(device, old))
    assert len(device.store.grant_identities) == 2  # the operator has not been seen to know the new one
    install(device, operator, "2.0.0")
    assert [identity.recipient().public for identity in device.store.grant_identities] == [device.recipient]
    again = {"model": NAME, "version": "3.0.0", "grants": operator.grants("3.0.0", former)}
    with pytest.raises(RefusedError, match="unknown_recipient"):
        run_or_take_back(Job(device, again, job_id="j2"))


def test_former_keys_outlive_a_start_and_more_rotations_and_are_bounded(operator: Operator, device: Device) -> None:
    in_a_fleet(device.store)
    seen = [device.recipient]
    for _ in range(6):
        device.store.rotate_key()
        seen.insert(0, device.recipient)
    known = [identity.recipient().public for identity in device.store.grant_identities]
    assert known == seen[:5]


def test_a_device_without_a_fleet_keeps_no_former_key(device: Device) -> None:
    device.store.rotate_key()
    assert len(device.store.grant_identities) == 1
