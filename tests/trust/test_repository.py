"""The repository as a device believes it: what a mirror, a stolen key and a wrong clock achieve, one test each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from agent.trust.desk import Desk
from agent.trust.repository import Limits, Marks, Repository, State
from agent.trust.wants import DelayError, DeliveryError, Want
from tests.trust.repositories import NOW, Simulator, clock

PATH = "models/digits/1.0.0/model.json"
CONTENT = b'{"format": "edge-model/1"}'


@pytest.fixture
def mirror() -> Simulator:
    simulator = Simulator()
    simulator.put(PATH, CONTENT)
    simulator.publish()
    return simulator


@pytest.fixture
def device(mirror: Simulator, tmp_path: Path) -> Callable[..., Repository]:
    """A device that was shipped with the first root; each call is a restart of its agent."""
    shipped = mirror.served["metadata/1.root.json"]

    def start(**options: object) -> Repository:
        options.setdefault("shipped_root", shipped)
        options.setdefault("clock", clock())
        return Repository(tmp_path / "metadata", wants=options.pop("wants", mirror), **options)  # type: ignore[arg-type]

    return start


def refused(act: Callable[[], object]) -> DeliveryError:
    with pytest.raises(DeliveryError) as raised:
        act()
    return raised.value


def test_a_target_is_found_and_read(mirror: Simulator, device: Callable[..., Repository]) -> None:
    repository = device()
    state = repository.refresh()
    assert state.marks["timestamp"].version == 2 and state.expires["timestamp"] == NOW + timedelta(days=30)
    assert repository.read(PATH, 1000) == CONTENT
    target = repository.find(PATH)
    want = repository.want(target)
    assert want.path == target.file and want.length == want.most == len(CONTENT) and want.sha256 == target.sha256
    assert mirror.asked[:2] == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_what_another_publisher_lists_with_a_sha_512_alone_is_read_and_not_landed(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    mirror.put("other", b"content", algorithm="sha512")
    mirror.put("odd", b"content", algorithm="md5")
    mirror.publish()
    repository = device()
    assert repository.read("other", 1000) == b"content"
    assert refused(lambda: repository.want(repository.find("other"))).code == "malformed"
    assert refused(lambda: repository.find("odd")).code == "malformed"
    mirror.served[repository.find("other").file] = b"CONTENT"
    assert refused(lambda: repository.read("other", 1000)).code == "wrong_content"


def test_a_second_refresh_fetches_only_what_is_new(mirror: Simulator, device: Callable[..., Repository]) -> None:
    device().refresh()
    mirror.asked.clear()
    device().refresh()
    assert mirror.asked == ["metadata/2.root.json", "metadata/timestamp.json"]
    mirror.put("models/digits/2.0.0/model.json", b"{}")
    mirror.publish()
    device().refresh()
    assert mirror.asked[-2:] == ["metadata/3.snapshot.json", "metadata/3.targets.json"]


# -- a hostile mirror -------------------------------------------------------------------------------------------------


def test_rollback_to_an_older_state_is_refused(mirror: Simulator, device: Callable[..., Repository]) -> None:
    old = mirror.frozen()
    mirror.publish()
    device().refresh()
    mirror.served = old
    assert refused(device().refresh).code == "rollback"


def test_rollback_is_refused_though_the_local_copies_are_lost(
    mirror: Simulator, device: Callable[..., Repository], tmp_path: Path
) -> None:
    old = mirror.frozen()
    mirror.publish()
    marks = device().refresh().marks
    mirror.served = old
    shutil.rmtree(tmp_path / "metadata")
    assert refused(device(marks=marks).refresh).code == "rollback"


def test_a_snapshot_that_goes_back_is_refused(mirror: Simulator, device: Callable[..., Repository]) -> None:
    device().refresh()
    mirror.md["snapshot"].signed.version = 1
    mirror.publish_snapshot()
    mirror.md["timestamp"].signed.version += 1
    mirror.publish_timestamp()
    assert refused(device().refresh).code == "rollback"


def test_targets_that_go_back_or_vanish_from_the_snapshot_are_refused(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    device().refresh()
    mirror.with_hashes = False
    snapshot = mirror.md["snapshot"].signed
    snapshot.meta["targets.json"].version = 1
    snapshot.version += 1
    mirror.publish_snapshot()
    mirror.md["timestamp"].signed.version += 1
    mirror.publish_timestamp()
    assert refused(device().refresh).code == "rollback"
    del snapshot.meta["targets.json"]
    mirror.publish_snapshot()
    assert refused(device().refresh).code == "malformed"


def test_freeze_holds_until_the_timestamp_ends_and_is_then_said(device: Callable[..., Repository]) -> None:
    device().refresh()
    device(clock=clock(NOW + timedelta(days=29))).refresh()
    error = refused(device(clock=clock(NOW + timedelta(days=31))).refresh)
    assert error.code == "expired" and "nothing new is installed" in str(error) and "edge-fleet refresh" in error.hint


@pytest.mark.parametrize("role", ["root", "snapshot", "targets"])
def test_each_role_that_ended_stops_what_is_new(
    mirror: Simulator, device: Callable[..., Repository], role: str
) -> None:
    mirror.md[role].signed.expires = NOW - timedelta(days=1)
    if role == "root":
        mirror.publish_root(old=mirror.signers["root"])
    else:
        mirror.publish()
    assert refused(device().refresh).code == "expired"


def test_mix_and_match_is_refused(mirror: Simulator, device: Callable[..., Repository]) -> None:
    first = mirror.served["metadata/2.targets.json"]
    mirror.put("models/digits/2.0.0/model.json", b"{}")
    mirror.publish()
    snapshot = mirror.served["metadata/2.snapshot.json"]
    mirror.tamper = lambda path, data: snapshot if path == "metadata/3.snapshot.json" else data
    assert refused(device().refresh).code == "mixed"
    mirror.tamper = lambda path, data: first if path == "metadata/3.targets.json" else data
    assert refused(device().refresh).code == "mixed"


def test_mix_and_match_is_refused_where_the_metadata_has_versions_only(tmp_path: Path) -> None:
    mirror = Simulator(with_hashes=False)
    first = mirror.served["metadata/1.targets.json"]
    mirror.put(PATH, CONTENT)
    mirror.publish()
    mirror.tamper = lambda path, data: first if path == "metadata/2.targets.json" else data
    repository = Repository(tmp_path / "m", mirror.served["metadata/1.root.json"], mirror, clock())
    assert refused(repository.refresh).code == "rollback"


@pytest.mark.parametrize(
    "path", ["metadata/2.root.json", "metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/2.targets.json"]
)
def test_endless_data_is_cut_off_at_what_each_file_may_have(
    mirror: Simulator, device: Callable[..., Repository], path: str
) -> None:
    taken = 0

    class Endless:
        def fetch(self, want: Want) -> bytes:
            if want.path != path:
                return mirror.fetch(want)
            desk = Desk()
            threading.Thread(target=desk_feeds, args=(desk,), daemon=True).start()
            return desk.fetch(want)

    def desk_feeds(desk: Desk) -> None:
        nonlocal taken
        (want,) = desk.open_wants(10)

        def pieces():
            nonlocal taken
            while True:
                taken += 4096
                yield bytes(4096)

        with pytest.raises(DeliveryError):
            desk.put(want.id, 0, pieces())

    assert refused(device(wants=Endless()).refresh).code == "too_long"
    assert taken <= Limits().targets_bytes + 4096


def test_whoever_answers_with_too_much_is_refused_whatever_he_checks(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    class Careless:
        def fetch(self, want: Want) -> bytes:
            return bytes(want.most + 1)

    assert refused(device(wants=Careless()).refresh).code == "too_long"


@pytest.mark.parametrize(
    "content", [CONTENT[:-1], CONTENT + b" ", b"X" + CONTENT[1:]], ids=["short", "long", "swapped"]
)
def test_a_target_of_wrong_length_or_content_is_refused(
    mirror: Simulator, device: Callable[..., Repository], content: bytes
) -> None:
    repository = device()
    repository.refresh()
    mirror.tamper = lambda path, data: content if path.startswith("targets/") else data
    assert refused(lambda: repository.read(PATH, 1000)).code in ("wrong_content", "too_long")


def test_a_target_larger_than_asked_for_is_not_fetched(mirror: Simulator, device: Callable[..., Repository]) -> None:
    assert refused(lambda: device().read(PATH, 5)).code == "too_long"
    assert not [path for path in mirror.asked if path.startswith("targets/")]


def test_slow_retrieval_ends_with_its_time(mirror: Simulator, device: Callable[..., Repository]) -> None:
    desk = Desk()
    limits = Limits(patience_s=0.05, least_rate=1e9)
    with pytest.raises(DelayError) as late:
        device(wants=desk, limits=limits).refresh()
    assert late.value.code == "too_slow" and desk.open_wants() == ()


def test_garbage_is_refused_as_malformed(mirror: Simulator, device: Callable[..., Repository]) -> None:
    for garbage in (b"", b"{", b"[]", b"{}", b'{"signed": 5, "signatures": []}', b"[" * 10_000, b"\xff" * 100):
        mirror.tamper = lambda path, data, garbage=garbage: garbage if path.endswith("timestamp.json") else data
        assert refused(device().refresh).code == "malformed"


def test_a_mirror_that_has_nothing_is_late_and_not_wrong(mirror: Simulator, device: Callable[..., Repository]) -> None:
    mirror.served.clear()
    with pytest.raises(DelayError) as late:
        device().refresh()
    assert late.value.code == "not_found"


def test_an_unknown_target_is_said_to_be(device: Callable[..., Repository]) -> None:
    assert refused(lambda: device().find("models/other/1.0.0/model.json")).code == "not_listed"


# -- delegations ------------------------------------------------------------------------------------------------------


def test_a_delegated_role_lists_what_it_may_and_nothing_else(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    mirror.delegate("models", ["models/*/*/payload/*"])
    mirror.put("models/a/1.0.0/payload/a.onnx", b"weights", "models")
    mirror.put("agents/agent-2.0.0.whl", b"evil", "models")
    mirror.publish()
    assert device().find("models/a/1.0.0/payload/a.onnx").length == 7
    assert refused(lambda: device().find("agents/agent-2.0.0.whl")).code == "not_listed"


def test_a_role_that_nobody_delegated_to_is_not_believed(mirror: Simulator, device: Callable[..., Repository]) -> None:
    mirror.delegate("models", ["models/*/*/payload/*"])
    mirror.put("models/a/1.0.0/payload/a.onnx", b"weights", "models")
    mirror.signers["models"] = [mirror.add_key("timestamp")]  # signed by a key that has another role
    mirror.publish()
    assert refused(lambda: device().find("models/a/1.0.0/payload/a.onnx")).code == "bad_signature"


def test_delegations_without_end_are_not_followed(mirror: Simulator, device: Callable[..., Repository]) -> None:
    parent = "targets"
    for number in range(20):
        mirror.delegate(f"role{number}", ["*"], parent)
        parent = f"role{number}"
    mirror.put("deep", b"x", parent)
    mirror.publish()
    repository = device()
    repository.refresh()
    mirror.asked.clear()
    assert refused(lambda: repository.find("deep")).code == "not_listed"
    assert len(mirror.asked) <= Limits().delegations


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_stolen_targets_key_alone_achieves_nothing(tmp_path: Path) -> None:
    mirror = Simulator(thresholds={"targets": (2, 2)})
    repository = Repository(tmp_path / "m", mirror.served["metadata/1.root.json"], mirror, clock())
    repository.refresh()
    stolen = mirror.signers["targets"][:1]
    mirror.put("models/evil/1.0.0/model.json", b"evil")
    mirror.targets.version += 1
    data = mirror.sign("targets", stolen)
    mirror.served["metadata/2.targets.json"] = data
    # The mirror is theirs, too, but not the keys of snapshot and timestamp: nobody comes to see that file.
    repository.refresh()
    assert refused(lambda: repository.find("models/evil/1.0.0/model.json")).code == "not_listed"
    # Even an operator's machine that signs whatever lies there does not help: two must have signed.
    mirror.signers["targets"] = stolen
    mirror.publish(bump=())
    assert refused(repository.refresh).code == "bad_signature"


def test_one_key_that_signs_twice_counts_once(tmp_path: Path) -> None:
    mirror = Simulator(thresholds={"timestamp": (2, 2)})
    mirror.signers["timestamp"] = mirror.signers["timestamp"][:1] * 2
    mirror.publish()
    repository = Repository(tmp_path / "m", mirror.served["metadata/1.root.json"], mirror, clock())
    assert refused(repository.refresh).code == "bad_signature"


def test_a_device_that_slept_follows_the_roots_through_several_versions(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    device().refresh()
    for _ in range(6):
        old = mirror.replace_keys("root")
        mirror.replace_keys("timestamp")
        mirror.publish_root(old=old)
    mirror.publish()
    mirror.asked.clear()
    state = device().refresh()
    assert state.marks["root"].version == 7
    assert mirror.asked[:7] == [f"metadata/{version}.root.json" for version in range(2, 9)]
    mirror.asked.clear()
    device().refresh()
    assert mirror.asked[0] == "metadata/8.root.json"


def test_a_root_that_the_old_keys_did_not_sign_is_refused(mirror: Simulator, device: Callable[..., Repository]) -> None:
    mirror.replace_keys("root")
    mirror.publish_root()
    assert refused(device().refresh).code == "bad_signature"


def test_a_root_that_skips_a_version_or_goes_back_is_refused(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    for version in (1, 3):
        mirror.root.version = version
        mirror.served["metadata/2.root.json"] = mirror.sign("root")
        assert refused(device().refresh).code == "rollback"


def test_keys_that_were_taken_back_sign_nothing_any_more(mirror: Simulator, device: Callable[..., Repository]) -> None:
    device().refresh()
    old = mirror.replace_keys("timestamp")
    mirror.publish_root(old=mirror.signers["root"])
    mirror.md["timestamp"].signed.version += 1
    mirror.served["metadata/timestamp.json"] = mirror.sign("timestamp", old)
    assert refused(device().refresh).code == "bad_signature"


def test_a_version_counted_up_to_the_end_is_mended_by_new_keys(
    mirror: Simulator, device: Callable[..., Repository]
) -> None:
    marks = device().refresh().marks
    mirror.md["timestamp"].signed.version = 2**31
    mirror.publish_timestamp()
    marks = device(marks=marks).refresh().marks
    mirror.md["timestamp"].signed.version = 3
    mirror.publish_timestamp()
    assert refused(device(marks=marks).refresh).code == "rollback"
    mirror.replace_keys("timestamp")
    mirror.publish_root(old=mirror.signers["root"])
    mirror.publish_timestamp()
    assert device(marks=marks).refresh().marks["timestamp"].version == 3


def test_roots_without_end_are_not_followed(mirror: Simulator, device: Callable[..., Repository]) -> None:
    for _ in range(10):
        mirror.publish_root(old=mirror.signers["root"])
    repository = device(limits=Limits(root_rotations=4))
    state = repository.refresh()
    assert state.marks["root"].version == 5


# -- the clock --------------------------------------------------------------------------------------------------------


def moment(year: int) -> datetime:
    return datetime(year, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize("year", [1970, 2100])
def test_a_clock_that_is_not_trusted_stops_nothing(device: Callable[..., Repository], year: int) -> None:
    device(clock=clock(moment(year), trust="never")).refresh()


def test_a_clock_below_its_floor_is_not_believed_even_where_it_always_should_be(
    device: Callable[..., Repository],
) -> None:
    floor = NOW + timedelta(days=31)
    assert refused(device(clock=clock(moment(1970), trust="always", floor=floor)).refresh).code == "expired"


def test_a_trusted_clock_of_2100_stops_what_is_new_and_its_mending_lets_it_go_on(
    device: Callable[..., Repository],
) -> None:
    device().refresh()
    assert refused(device(clock=clock(moment(2100))).refresh).code == "expired"
    assert device().refresh().marks["timestamp"].version == 2


def test_what_is_past_for_sure_is_expired_for_an_untrusted_clock_too(device: Callable[..., Repository]) -> None:
    late = clock(moment(1970), trust="never", floor=NOW + timedelta(days=40))
    assert refused(device(clock=late).refresh).code == "expired"


# -- damage -----------------------------------------------------------------------------------------------------------


def damages() -> list[tuple[str, Callable[[Path], object]]]:
    return [
        ("emptied", lambda path: path.write_bytes(b"")),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
        ("garbled", lambda path: path.write_bytes(os.urandom(200))),
        ("gone", lambda path: path.unlink()),
        ("a folder", lambda path: (path.unlink(), path.mkdir())),
    ]


@pytest.mark.parametrize(("how", "damage"), damages(), ids=[how for how, _ in damages()])
@pytest.mark.parametrize(
    "name", ["timestamp.json", "snapshot.json", "targets.json", "root_history/1.root.json", "root_history/2.root.json"]
)
def test_damaged_copies_are_fetched_again_from_the_root_that_was_shipped(
    mirror: Simulator,
    device: Callable[..., Repository],
    tmp_path: Path,
    name: str,
    how: str,
    damage: Callable[[Path], object],
) -> None:
    mirror.publish_root(old=mirror.signers["root"])
    before = device().refresh()
    damage(tmp_path / "metadata" / name)
    repository = device(marks=before.marks)
    assert repository.refresh() == before
    assert repository.read(PATH, 1000) == CONTENT


def test_a_folder_in_which_nothing_is_right_is_begun_anew(device: Callable[..., Repository], tmp_path: Path) -> None:
    before = device().refresh()
    shutil.rmtree(tmp_path / "metadata" / "root_history")
    (tmp_path / "metadata" / "root_history").write_text("a file")
    assert device().refresh() == before


def test_a_shipped_root_that_is_none_is_said_to_be(device: Callable[..., Repository]) -> None:
    assert refused(device(shipped_root=b"{}").refresh).code == "bad_root"


def test_what_a_kill_left_behind_is_swept(device: Callable[..., Repository], tmp_path: Path) -> None:
    device().refresh()
    (tmp_path / "metadata" / "tmpabc").write_bytes(b"half")
    device().refresh()
    assert not (tmp_path / "metadata" / "tmpabc").exists()


def test_all_that_is_relied_on_is_flushed_with_its_folder(
    device: Callable[..., Repository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    real = os.fsync

    def watched(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    device().refresh()
    folder = tmp_path / "metadata"
    files = {str(path) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert len(files) == 4 and files | {str(folder), str(folder / "root_history")} <= flushed


def test_python_tuf_takes_its_time_from_where_it_is_set(mirror: Simulator, device: Callable[..., Repository]) -> None:
    repository = device(clock=clock(NOW + timedelta(days=3)))
    repository.refresh()
    assert repository._updater is not None
    assert repository._updater._trusted_set.reference_time == NOW + timedelta(days=3)


# -- the desk ---------------------------------------------------------------------------------------------------------


def test_somebody_else_brings_what_verification_waits_for(mirror: Simulator, device: Callable[..., Repository]) -> None:
    desk = Desk()
    ended = threading.Event()

    def carry() -> None:
        while not ended.is_set():
            for want in desk.open_wants(0.05):
                try:
                    desk.put(want.id, 0, [mirror.fetch(want)])
                except DelayError as error:
                    desk.fail(want.id, error.code, "nothing there")

    carrier = threading.Thread(target=carry)
    carrier.start()
    try:
        repository = device(wants=desk)
        found: State = repository.refresh()
        marks: Marks = found.marks
        assert marks["root"].version == 1 and repository.read(PATH, 1000) == CONTENT
    finally:
        ended.set()
        carrier.join()


def test_core_starts_without_tuf() -> None:
    """It is 6 MB that a device without a repository never pays."""
    code = "import sys, agent.core.daemon, agent.trust.desk, agent.trust.grants; print('tuf' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
