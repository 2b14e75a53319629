"""The attacks of the design's table on an installation: each is refused by its code, leaves nothing, and what was
installed goes on answering.

Whoever attacks has the mirror, and in some tests keys that were stolen; nobody has enough of them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from agent.base.errors import RefusedError, UnsupportedError
from agent.fleet.keys import Passwords
from agent.fleet.repository import Edition, data_of, load, write_metadata
from agent.fleet.roles import Role, RoleKeys
from agent.trust.jobkeys import TARGET, encode_table, parse_table
from agent.trust.wants import payload_target, target_file
from agent.work.jobs import Failure
from agent.work.steps import HaltedError
from tests import onnx_models
from tests.operations.deliveries import NAME, Device, Job, Mirror, Operator, device_at, install, two_variants

PUBLIC = "2XnkJsPgtpP5hF5eo3E3xIYcUXNTAQdbykm9uCuskpk="


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """With versions 1.0.0 and 2.0.0; ``before`` is the site as it was with 1.0.0 alone."""
    made = Operator(tmp_path_factory.mktemp("operator"))
    made.publish("1.0.0", two_variants(1))
    shutil.copytree(made.site, made.scratch / "before")
    made.publish("2.0.0", two_variants(2), golden_from=onnx_models.linear(2))
    return made


@pytest.fixture
def site(operator: Operator, tmp_path: Path) -> Path:
    """What the attacker serves: a copy of the operator's files, to be changed."""
    return Path(shutil.copytree(operator.site, tmp_path / "hostile"))


@pytest.fixture
def mirror(operator: Operator) -> Iterator[Mirror]:
    with Mirror(operator.scratch / "before") as made:
        yield made


@pytest.fixture
def device(operator: Operator, mirror: Mirror) -> Iterator[Device]:
    """It has installed 1.0.0 while only that was there."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        device_at(Path(folder), mirror, operator.folder.shipped_root.read_bytes()) as made,
    ):
        install(made, operator, "1.0.0")
        yield made


def require_refused(device: Device, operator: Operator, code: str, site: Path | None = None, **options: Any) -> None:
    """2.0.0 from that site is refused by that code, and 1.0.0 answers as if nothing had been."""
    if site is not None:
        device.mirror.site = site
    before = device.blobs()
    with pytest.raises(RefusedError, match=rf"^cannot install 'm' 2\.0\.0: {code}: "):
        install(device, operator, "2.0.0", **options)
    assert device.models() == {NAME: ("1.0.0", ["1.0.0"])}
    assert device.blobs() == before and device.left_behind() == []
    assert device.store.verify().damaged == ()


def forge(
    operator: Operator, site: Path, role: Role, change: Callable[[Edition], None], keys: int, *above: Role
) -> None:
    """Change a role and sign it with so many of its keys, and what is above it as it should be."""
    edition, held = load(site), RoleKeys(operator.folder)
    change(edition)
    for each in (role, *above):
        metadata: Metadata[Any] = edition.of(each)
        metadata.signed.version += 1
        if each == "snapshot":
            edition.snapshot.signed.meta[f"{role}.json"] = _named(edition, role)
        if each == "timestamp":
            edition.timestamp.signed.snapshot_meta = _named(edition, "snapshot")
        metadata.signatures.clear()
        for keyid in edition.rule(each).keyids[: keys if each == role else None]:
            metadata.sign(held.signer(keyid, Passwords()), append=True)
        write_metadata(site, each, metadata)


def _named(edition: Edition, role: Role) -> Any:
    metadata = edition.of(role)
    return MetaFile.from_data(metadata.signed.version, data_of(metadata), ["sha256"])


UP: tuple[Role, Role] = ("snapshot", "timestamp")


def test_what_is_right_is_installed(device: Device, operator: Operator) -> None:
    """Or the tests below would show nothing."""
    device.mirror.site = operator.site
    install(device, operator, "2.0.0")
    assert device.models() == {NAME: ("2.0.0", ["1.0.0", "2.0.0"])}


def test_mix_and_match(device: Device, operator: Operator, site: Path) -> None:
    """Each file was signed once by the right keys; together they never were what the operator published."""
    newest, before = load(site), load(operator.scratch / "before")
    name = f"{newest.models.signed.version}.models.json"
    (site / "metadata" / name).write_bytes(
        (operator.scratch / "before" / "metadata" / f"{before.models.signed.version}.models.json").read_bytes()
    )
    require_refused(device, operator, "mixed", site)


def test_freeze(device: Device, operator: Operator) -> None:
    """An old state is believed until its timestamp ends, and is said to be old then; what is installed stays."""
    require_refused(device, operator, "not_listed")
    device.hand.moment += timedelta(days=31)
    require_refused(device, operator, "expired")


@pytest.mark.parametrize("lost", [False, True], ids=["with its copies", "without them"])
def test_rollback(device: Device, operator: Operator, lost: bool) -> None:
    device.mirror.site = operator.site
    device.rejects = {"fast", "small"}
    with pytest.raises(UnsupportedError, match="no variant passed"):
        install(device, operator, "2.0.0")  # the new state has been seen
    if lost:
        shutil.rmtree(device.folder / "repository")
    require_refused(device, operator, "rollback", operator.scratch / "before")


def test_rollback_after_a_start(device: Device, operator: Operator) -> None:
    """The marks are in the catalog: a new start, and copies that are lost with the power, change nothing."""
    device.mirror.site = operator.site
    device.rejects = {"fast", "small"}
    with pytest.raises(UnsupportedError):
        install(device, operator, "2.0.0")
    shutil.rmtree(device.folder / "repository")
    device.store.close()
    device.store.open()
    device.install_jobs()
    require_refused(device, operator, "rollback", operator.scratch / "before")


def test_endless_data(device: Device, operator: Operator) -> None:
    device.mirror.site = operator.site
    device.mirror.tamper = lambda path, data: (data or b"") + bytes(1 << 20) if "timestamp" in path else data
    require_refused(device, operator, "too_long")


@pytest.mark.parametrize("more", [1, 1 << 20])
def test_a_payload_of_wrong_length(device: Device, operator: Operator, more: int) -> None:
    device.mirror.site = operator.site
    device.mirror.tamper = lambda path, data: (data or b"") + bytes(more) if "/payload/" in path else data
    require_refused(device, operator, "too_long")


def test_a_manifest_that_does_not_fit_its_payloads(device: Device, operator: Operator, site: Path) -> None:
    """Signed by all keys there are: the length of a payload still belongs to the manifest's."""

    def change(edition: Edition) -> None:
        path = payload_target(NAME, "2.0.0", "fast.onnx")
        targets = edition.models.signed.targets
        targets[path] = TargetFile(targets[path].length + 1, targets[path].hashes, path)

    forge(operator, site, "models", change, 2, *UP)
    require_refused(device, operator, "mixed", site)


def test_slow_retrieval_ends_with_the_steps_time(device: Device, operator: Operator) -> None:
    """A mirror that never ends what it began holds the job no longer than the step may take."""
    device.mirror.tamper = lambda path, data: (data or b"")[:-1] if "/payload/" in path else data
    device.mirror.site = operator.site
    grants = operator.grants("2.0.0", device.recipient)
    job = Job(device, {"model": NAME, "version": "2.0.0", "grants": grants})
    asked = 0

    def deadline() -> None:
        nonlocal asked
        asked += job.begun[-1:] == ["fetch"]
        if asked > 4:
            raise HaltedError("failed", Failure("step_timeout", "it takes too long"))

    job.at = deadline
    with pytest.raises(HaltedError):
        job.run()
    job.at = lambda: None
    job.take_back()
    assert device.models() == {NAME: ("1.0.0", ["1.0.0"])} and device.left_behind() == []


def test_foreign_delegation(device: Device, operator: Operator, site: Path) -> None:
    """Whoever has all keys of the models' role still lists models alone: who commands is not theirs to say."""
    table = encode_table(1 << 40, "acme", [("mallory", PUBLIC, ("observe", "change", "destroy"))])
    target = TargetFile.from_data(TARGET, table, ["sha256"])
    path = site / "targets" / target_file(TARGET, target.hashes["sha256"])
    path.parent.mkdir()
    path.write_bytes(table)
    forge(operator, site, "models", lambda edition: edition.models.signed.targets.update({TARGET: target}), 2, *UP)
    device.mirror.site = site
    install(device, operator, "2.0.0")  # what it may list is as good as before
    assert device.store.document.delivery.job_keys == "" and device.keys_changed == 0


def test_a_swapped_payload_of_the_same_length(device: Device, operator: Operator, site: Path) -> None:
    folder = site / "targets" / "models" / NAME / "2.0.0" / "payload"
    fast, small = (next(folder.glob(f"*.{part}.onnx")) for part in ("fast", "small"))
    assert fast.stat().st_size == small.stat().st_size
    fast.write_bytes(small.read_bytes())
    require_refused(device, operator, "wrong_content", site)


def test_wrong_bytes_of_one_mirror_where_another_has_the_right_ones(device: Device, operator: Operator) -> None:
    """Whoever brings them takes them from another place the second time."""
    spoilt: list[str] = []

    def tamper(path: str, data: bytes | None) -> bytes | None:
        if data is None or "/payload/" not in path or spoilt:
            return data
        spoilt.append(path)
        return bytes(len(data))

    device.mirror.site, device.mirror.tamper = operator.site, tamper
    assert install(device, operator, "2.0.0")["version"] == "2.0.0"
    assert len(spoilt) == 1
    assert [path for path, _ in device.mirror.asked].count(spoilt[0]) == 2
    assert device.models() == {NAME: ("2.0.0", ["1.0.0", "2.0.0"])} and device.left_behind() == []


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "models.json"])
def test_metadata_of_one_mirror_that_nobody_believes_where_another_has_the_right_one(
    device: Device, operator: Operator, name: str
) -> None:
    def first_mirror(path: str, data: bytes | None) -> bytes | None:
        hostile = path.startswith("metadata/") and path.endswith(name) and not device.mirror.desk.doubts
        return b"{}" if hostile else data

    device.mirror.site = operator.site
    device.mirror.tamper = first_mirror
    install(device, operator, "2.0.0")
    assert device.models() == {NAME: ("2.0.0", ["1.0.0", "2.0.0"])}
    assert device.mirror.desk.doubts == 1


def test_a_payload_swapped_in_the_metadata(device: Device, operator: Operator, site: Path) -> None:
    """With every key of the repository: the job's grant is for the payload that the operator granted."""

    def change(edition: Edition) -> None:
        targets = edition.models.signed.targets
        fast, small = (payload_target(NAME, "2.0.0", f"{part}.onnx") for part in ("fast", "small"))
        targets[fast] = TargetFile(targets[small].length, targets[small].hashes, fast)
        folder = site / "targets" / "models" / NAME / "2.0.0" / "payload"
        shutil.copy(next(folder.glob("*.small.onnx")), folder / f"{targets[small].hashes['sha256']}.fast.onnx")

    forge(operator, site, "models", change, 2, *UP)
    require_refused(device, operator, "not_for_this", site)


def test_the_grant_of_another_device(device: Device, operator: Operator) -> None:
    device.mirror.site = operator.site
    require_refused(device, operator, "not_for_this", name="cam-2")
    require_refused(device, operator, "not_for_this", epoch=2)
    grants = operator.grants("2.0.0", bytes([9]) + bytes(31))  # sealed to somebody else's key
    with pytest.raises(RefusedError, match="unknown_recipient"):
        Job(device, {"model": NAME, "version": "2.0.0", "grants": grants}).run()


def test_the_grants_of_another_version(device: Device, operator: Operator) -> None:
    device.mirror.site = operator.site
    wanted = operator.grants("2.0.0", device.recipient)
    old = operator.grants("1.0.0", device.recipient)
    job = Job(device, {"model": NAME, "version": "2.0.0", "grants": {**wanted, **old}})
    with pytest.raises(RefusedError, match="not_for_this"):
        job.run()
    job.take_back()
    assert device.left_behind() == []


@pytest.mark.parametrize("year", [1970, 2100])
def test_a_clock_that_nobody_vouches_for(device: Device, operator: Operator, year: int) -> None:
    """It makes nothing expire, and an installation goes through."""
    device.mirror.site = operator.site
    device.clock.trust = "never"
    device.hand.moment = datetime(year, 1, 1, tzinfo=timezone.utc)
    install(device, operator, "2.0.0")
    assert device.models() == {NAME: ("2.0.0", ["1.0.0", "2.0.0"])}


def test_a_trusted_clock_of_2100_stops_what_is_new_and_nothing_else(device: Device, operator: Operator) -> None:
    moment = device.hand.moment
    device.hand.moment = datetime(2100, 1, 1, tzinfo=timezone.utc)
    require_refused(device, operator, "expired", operator.site)
    device.hand.moment = moment
    install(device, operator, "2.0.0")


def test_a_stolen_targets_key_alone(device: Device, operator: Operator, site: Path) -> None:
    """One of two, with the keys of snapshot and timestamp on top."""
    table = encode_table(1 << 40, "acme", [("mallory", PUBLIC, ("observe", "change", "destroy"))])
    target = TargetFile.from_data(TARGET, table, ["sha256"])
    forge(operator, site, "targets", lambda edition: edition.targets.signed.targets.update({TARGET: target}), 1, *UP)
    require_refused(device, operator, "bad_signature", site)
    assert device.store.document.delivery.job_keys == ""


def test_a_stolen_models_key_alone(device: Device, operator: Operator, site: Path) -> None:
    forge(operator, site, "models", lambda edition: edition.models.signed.targets.clear(), 1, *UP)
    require_refused(device, operator, "bad_signature", site)


# -- keys for jobs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Operator:
    """An operator of the test's own, since these tests publish keys."""
    made = Operator(tmp_path)
    for number in range(1, 5):
        made.publish(f"{number}.0.0", two_variants(number))
    return made


def test_keys_for_jobs_are_adopted_when_they_are_newer(own: Operator) -> None:
    with (
        Mirror(own.site) as mirror,
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        device_at(Path(folder), mirror, own.folder.shipped_root.read_bytes()) as device,
    ):
        install(device, own, "1.0.0")
        assert (device.keys_changed, device.store.document.delivery.job_keys) == (0, "")
        own.ok("keys", "publish")
        install(device, own, "2.0.0")
        first = parse_table(device.store.document.delivery.job_keys.encode())
        assert (device.keys_changed, first.version, [key.name for key in first.keys.values()]) == (1, 1, ["operator"])
        assert "already" in own.ok("keys", "publish").out
        own.ok("keys", "add", "bob", "--classes", "observe", "--no-password")
        own.ok("keys", "publish")
        install(device, own, "3.0.0")
        install(device, own, "4.0.0")
        second = parse_table(device.store.document.delivery.job_keys.encode())
        assert (device.keys_changed, second.version, len(second.keys)) == (2, 2, 2)
        assert own.ok("verify").status == 0


def test_another_root_begins_anew(own: Operator, tmp_path: Path) -> None:
    """A device that is given to somebody else's fleet believes nothing of the former one, and is not locked out."""
    (tmp_path / "other").mkdir()
    other = Operator(tmp_path / "other")
    other.publish("5.0.0", two_variants(5))
    own.ok("keys", "publish")
    with (
        Mirror(own.site) as mirror,
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        device_at(Path(folder), mirror, own.folder.shipped_root.read_bytes()) as device,
    ):
        install(device, own, "1.0.0")
        device.root, mirror.site = other.folder.shipped_root.read_bytes(), other.site
        install(device, other, "5.0.0")
        assert device.store.document.delivery.job_keys == "" and device.keys_changed == 2
        assert device.models()[NAME][0] == "5.0.0"
