"""Publishing: what an operator's commands make is what devices believe, age opens, and a cut leaves whole."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from agent.base.clock import TrustedClock
from agent.base.errors import ConflictError, NotFoundError, RefusedError
from agent.base.files import exclusive_lock
from agent.bundles.manifest import MAX_MANIFEST_BYTES, parse_manifest
from agent.fleet import publishing, repository
from agent.fleet.books import Books
from agent.fleet.checking import FolderWants, check_site
from agent.fleet.folder import Folder
from agent.fleet.keys import Passwords
from agent.fleet.publishing import grants_for
from agent.fleet.registry import Device
from agent.fleet.releases import Releases
from agent.fleet.roles import open_identity
from agent.store.store import Store
from agent.trust import hpke
from agent.trust.envelope import PublicKey
from agent.trust.grants import GrantError, Purpose, open_grant
from agent.trust.repository import Repository
from agent.trust.wants import DeliveryError, manifest_target, payload_target
from tests.core.conftest import ROOT
from tests.fleet.conftest import Done, edge_fleet
from tests.store.conftest import memory_path, store

__all__ = ["memory_path", "store"]

BUNDLE = ROOT / "tests" / "vectors" / "bundle" / "double.edgemodel"
NAME, VERSION = "double", "1.0.0"
PASSWORD = "correct horse battery"


class Office:
    """An operator with a fleet and a repository."""

    def __init__(self, path: Path, *init: str) -> None:
        self.folder = Folder(path)
        self.site = self.folder.site
        assert self.run("init", "--tenant", "acme", "--broker", "mqtt.example", "--no-password").status == 0
        self.ok("repository", "init", "--no-password", *init)

    def run(self, *arguments: str) -> Done:
        return edge_fleet(self.folder.path, *arguments)

    def ok(self, *arguments: str) -> dict:
        done = self.run(*arguments, "--json")
        assert done.status == 0, done.err
        return done.json

    def device(self, folder: Path, days: float = 0, root: int = 1) -> Repository:
        """A device that was shipped with a root of this fleet, in so many days."""
        moment = datetime.now(timezone.utc) + timedelta(days=days)

        class Then:
            def monotonic(self) -> float:
                return 0.0

            def now(self) -> datetime:
                return moment

        shipped = (self.site / "metadata" / f"{root}.root.json").read_bytes()
        clock = TrustedClock(Then(), "always", datetime.fromtimestamp(0, timezone.utc))
        return Repository(folder, shipped, FolderWants(self.site), clock)

    def opened(self, days: float = 0) -> repository.Repository:
        return repository.Repository(self.folder, Passwords(), datetime.now(timezone.utc) + timedelta(days=days))


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "fleet")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_is_what_a_device_reads(office: Office, tmp_path: Path) -> None:
    made = office.ok("publish", str(BUNDLE))
    assert (made["model"], made["again"]) == (NAME, False)
    device = office.device(tmp_path / "device")
    manifest = parse_manifest(device.read(manifest_target(NAME, VERSION), MAX_MANIFEST_BYTES))
    for ref in manifest.files():
        target = device.find(payload_target(NAME, VERSION, ref.name))
        assert (office.site / target.file).stat().st_size == target.length
        assert {"name": ref.name, "payload": target.sha256, "size": target.length} in made["files"]
    assert office.ok("verify", "--open")["problems"] == []


def test_private_keys_are_private_and_the_site_is_not(office: Office) -> None:
    office.ok("publish", str(BUNDLE))
    for path in office.folder.repository.rglob("*"):
        if path.is_file() and path.name != "lock":
            private = path.suffix == ".key"
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o644), path
    assert not [name for name in files(office.site) if name.endswith((".key", ".db"))]


def test_no_plaintext_lies_in_the_site_or_the_registry(office: Office) -> None:
    office.ok("publish", str(BUNDLE))
    plain = BUNDLE.read_bytes()
    weights = plain[plain.rindex(b"fp32.onnx") :][512:600].strip(b"\0")
    assert len(weights) > 20
    for path in office.folder.path.rglob("*"):
        if path.is_file():
            assert weights not in path.read_bytes(), path


@pytest.mark.skipif(shutil.which("age") is None, reason="no age here")
def test_the_operators_identity_opens_each_payload_with_age(office: Office, tmp_path: Path) -> None:
    office.ok("publish", str(BUNDLE))
    identity = tmp_path / "identity.txt"
    identity.write_text(office.ok("repository", "identity", "--secret")["identity"] + "\n")
    base = office.site / "targets" / "models" / NAME / VERSION
    (header,), (payload,) = base.glob("header/*.fp32.onnx"), base.glob("payload/*.fp32.onnx")
    sealed = header.read_bytes() + payload.read_bytes()
    opened = subprocess.run(["age", "-d", "-i", str(identity)], input=sealed, capture_output=True, check=True).stdout
    assert opened and opened in BUNDLE.read_bytes()


def test_publishing_again_changes_nothing_and_another_content_is_refused(office: Office, tmp_path: Path) -> None:
    office.ok("publish", str(BUNDLE))
    before = {name: (office.site / name).read_bytes() for name in files(office.site)}
    assert office.ok("publish", str(BUNDLE))["again"] is True
    assert {name: (office.site / name).read_bytes() for name in files(office.site)} == before
    other = tmp_path / "other"
    other.mkdir()
    unpacked = subprocess.run(["tar", "xf", str(BUNDLE), "-C", str(other)], check=True)
    assert unpacked.returncode == 0
    document = json.loads((other / "model.json").read_text()) | {"description": "another"}
    (other / "model.json").write_text(json.dumps(document))
    assert edge_fleet(office.folder.path, "pack", str(other), "-o", str(tmp_path / "other.edgemodel")).status == 0
    done = office.run("publish", str(tmp_path / "other.edgemodel"))
    assert done.status == 1 and "another content" in done.err and "give the new content a new one" in done.err


def test_a_damaged_bundle_leaves_nothing(office: Office, tmp_path: Path) -> None:
    before = files(office.site)
    data = bytearray(BUNDLE.read_bytes())
    data[-1500] ^= 1
    bad = tmp_path / "bad.edgemodel"
    bad.write_bytes(data)
    assert office.run("publish", str(bad)).status == 1
    assert {name for name in files(office.site) if "/metadata" in name or name.startswith("metadata")} <= before
    assert office.ok("verify")["releases"] == 0
    assert office.ok("publish", str(BUNDLE))["again"] is False
    assert office.ok("verify", "--open")["problems"] == []


def test_cut_off_at_any_step_the_site_is_whole_and_doing_it_again_finishes_it(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutError(Exception):
        pass

    steps, real = 0, os.replace

    def counted(*arguments: object, **options: object) -> None:
        nonlocal steps
        steps -= 1
        if steps == 0:
            raise CutError
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", counted)
    for cut in range(1, 50):
        steps = cut
        try:
            with Books(office.folder.database) as books, office.opened() as opened:
                done = publishing.publish(opened, books, BUNDLE)
        except CutError:
            steps = 0
            found = check_site(office.site, (office.site / "metadata" / "1.root.json").read_bytes(), Now())
            assert found.problems == () and found.releases == 0, cut
            continue
        break
    steps = 0
    assert cut > 6 and not done.again
    assert office.ok("verify", "--open")["problems"] == []
    names = [name for name in files(office.site) if name.startswith("targets/")]
    assert len(names) == 1 + 2 * len(done.payloads)  # what the attempts before left is gone


class Now:
    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return datetime.now(timezone.utc)


def test_cut_off_after_the_timestamp_it_is_published_and_stays_what_it_is(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutError(Exception):
        pass

    real = Releases.put

    def cut(self: Releases, *arguments: object) -> None:
        if arguments[4] == "published":
            raise CutError
        real(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, Books(office.folder.database) as books, office.opened() as opened:
        patched.setattr(Releases, "put", cut)
        with pytest.raises(CutError):
            publishing.publish(opened, books, BUNDLE)
    before = files(office.site)
    assert office.ok("publish", str(BUNDLE))["again"] is True
    assert files(office.site) == before
    assert [each["state"] for each in office.ok("repository", "show")["releases"]] == ["published"]


def test_a_folder_of_somebody_elses_is_not_written_over(office: Office, tmp_path: Path) -> None:
    www = tmp_path / "www"
    (www / "targets").mkdir(parents=True)
    (www / "targets" / "precious").write_text("mine")
    done = office.run("publish", str(BUNDLE), "--to", str(www))
    assert done.status == 1 and "not of this repository" in done.err
    assert files(www) == {"targets/precious"}
    other = Office(tmp_path / "other")
    assert office.run("refresh", "--to", str(other.site)).status == 1
    assert other.ok("verify")["problems"] == []


def test_two_publishers_do_not_work_at_once(office: Office) -> None:
    with exclusive_lock(office.folder.publisher_lock):
        done = office.run("publish", str(BUNDLE))
    assert done.status == 1 and "another command is doing so" in done.err
    office.ok("publish", str(BUNDLE))


def test_a_version_that_is_taken_back_is_listed_and_granted_no_more(office: Office, tmp_path: Path) -> None:
    www = tmp_path / "www"
    office.ok("publish", str(BUNDLE), "--to", str(www))
    assert files(www) == files(office.site)
    device = office.device(tmp_path / "device")
    device.find(manifest_target(NAME, VERSION))
    office.ok("unpublish", NAME, VERSION, "--yes", "--to", str(www))
    with pytest.raises(DeliveryError) as refused:
        office.device(tmp_path / "device").find(manifest_target(NAME, VERSION))
    assert refused.value.code == "not_listed"
    assert not [name for name in files(www) if name.startswith("targets/")]
    with Books(office.folder.database) as books, pytest.raises(RefusedError, match="withdrawn"):
        grant(office, books, bytes(range(32)))
    assert office.run("unpublish", "nothing", "1.0.0", "--yes").status == 1
    assert office.ok("publish", str(BUNDLE))["again"] is False


def test_the_timestamp_ends_and_refresh_mends_it(office: Office, tmp_path: Path) -> None:
    office.device(tmp_path / "device", days=29).refresh()
    with pytest.raises(DeliveryError) as refused:
        office.device(tmp_path / "device", days=31).refresh()
    assert refused.value.code == "expired"
    with office.opened(days=31) as opened:
        assert opened.refresh() == {}
    state = office.device(tmp_path / "device", days=60).refresh()
    assert state.marks["timestamp"].version == 2


def test_refresh_works_without_the_keys_that_lie_in_the_safe_and_says_what_will_need_them(
    office: Office, tmp_path: Path
) -> None:
    safe = tmp_path / "safe"
    safe.mkdir()
    for path in [*office.folder.role_keys.glob("root-*.key"), *office.folder.role_keys.glob("targets-*.key")]:
        path.rename(safe / path.name)
    assert office.ok("refresh")["missed"] == {}
    with office.opened(days=300) as opened:
        assert set(opened.refresh()) == {"targets"}
    office.ok("publish", str(BUNDLE))
    done = office.run("keys", "rotate", "timestamp", "--no-password")
    assert done.status == 1 and "--keys" in done.err
    office.ok("keys", "rotate", "timestamp", "--no-password", "--keys", str(safe))
    shown = office.ok("repository", "show")
    held = {key["name"]: key["held"] for role in shown["roles"] for key in role["keys"]}
    assert (held["root-1"] is False and held["timestamp-2"] is True) or held.get("timestamp-3") is True


@pytest.mark.parametrize("role", ["root", "targets", "models", "snapshot", "timestamp"])
def test_keys_of_each_role_are_replaced_and_devices_follow(office: Office, tmp_path: Path, role: str) -> None:
    office.ok("publish", str(BUNDLE))
    device = office.device(tmp_path / "device")
    device.refresh()
    changed = office.ok("keys", "rotate", role, "--no-password")
    assert len(changed["made"]) == len(changed["gone"])
    for name in changed["gone"]:
        (office.folder.role_keys / f"{name}.key").unlink()
    office.ok("refresh")
    device = office.device(tmp_path / "device")
    assert device.refresh().marks["root"].version == (1 if role == "models" else 2)
    device.find(manifest_target(NAME, VERSION))
    assert office.ok("verify")["problems"] == []
    newest = office.folder.shipped_root.read_bytes()
    assert newest == (office.site / "metadata" / f"{changed['root']}.root.json").read_bytes()


def test_a_chain_of_roots_is_followed_by_who_missed_all_of_it(office: Office, tmp_path: Path) -> None:
    for role in ("root", "root", "timestamp", "root", "snapshot"):
        office.ok("keys", "rotate", role, "--no-password")
    assert office.device(tmp_path / "old").refresh().marks["root"].version == 6
    assert office.device(tmp_path / "new", root=6).refresh().marks["root"].version == 6


def test_a_key_is_revoked_only_while_enough_are_left(office: Office) -> None:
    done = office.run("keys", "revoke", "models-1", "--yes")
    assert done.status == 1 and "too few would be left" in done.err
    office.ok("keys", "rotate", "models", "--key", "models-1", "--add", "1", "--no-password")
    office.ok("keys", "revoke", "models-2", "--yes")
    names = [key["name"] for role in office.ok("repository", "show")["roles"] for key in role["keys"]]
    assert "models-1" not in names and "models-2" not in names and "models-4" in names
    assert office.ok("verify")["problems"] == []
    assert office.run("keys", "revoke", "models-9", "--yes").status == 1


def test_one_stolen_key_of_models_publishes_nothing(office: Office) -> None:
    (office.folder.role_keys / "models-2.key").unlink()
    done = office.run("publish", str(BUNDLE))
    assert done.status == 1 and "2 of models-1, models-2 must sign" in done.err
    assert office.ok("verify")["releases"] == 0


def test_a_root_change_that_was_cut_off_is_finished_by_the_next_command(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutError(Exception):
        pass

    def cut(*_: object) -> None:
        raise CutError

    with office.opened() as opened, monkeypatch.context() as patched:
        opened.rotate("timestamp", ["timestamp-1"], 1, None)
        patched.setattr(repository.Repository, "_named", cut)
        with pytest.raises(CutError):
            opened.save()
    assert (office.site / "metadata" / "2.root.json").exists()
    with pytest.raises(DeliveryError):
        office.device(tmp_path / "device").refresh()
    office.ok("refresh")
    assert office.device(tmp_path / "device").refresh().marks["root"].version == 2


@pytest.mark.parametrize("kind", ["payload", "header", "model.json"])
def test_verify_tells_what_was_altered(office: Office, kind: str) -> None:
    office.ok("publish", str(BUNDLE))
    path = next(each for each in sorted(office.site.rglob("*")) if each.is_file() and kind in each.as_posix())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = office.run("verify")
    assert done.status == 1 and "not what" in done.err
    path.unlink()
    assert office.run("verify").status == 1


def test_verify_with_the_identity_finds_a_payload_that_opens_to_something_else(office: Office) -> None:
    """Signed by everybody who must, and yet not what the manifest promises: only decrypting shows it."""
    with Books(office.folder.database) as books, office.opened() as opened:
        publishing.publish(opened, books, BUNDLE)
    with office.opened() as opened:
        models = opened.edition.models.signed.targets
        headers = [path for path in models if "/header/" in path]
        swapped = models[headers[1]]
        folder = office.site / "targets"
        old = folder / publishing.target_file(headers[1], swapped.hashes["sha256"])
        models[headers[0]] = publishing._placed(folder, headers[0], old.read_bytes())
        opened.edition.changed.add("models")
        opened.save()
    assert office.ok("verify")["problems"] == []
    done = office.run("verify", "--open", "--json")
    assert done.status == 1 and len(done.json["problems"]) == 1


# -- grants -----------------------------------------------------------------------------------------------------------

SEED = PublicKey(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
DEVICE = Device("door-7", SEED, 3, "claim", "2026-01-01T00:00:00Z", {})


def grant(office: Office, books: Books, secret: bytes, *parts: str):
    identity = open_identity(office.folder, Passwords())
    return grants_for(books, identity, NAME, VERSION, DEVICE, hpke.public_of(secret), parts or None)


def test_a_grant_opens_the_download_and_the_store_takes_it_over_as_it_is(
    office: Office, tmp_path: Path, store: Store
) -> None:
    office.ok("publish", str(BUNDLE))
    with Books(office.folder.database) as books:
        grants = grant(office, books, store.secret.grant_identity.secret)
        with pytest.raises(NotFoundError):
            grant(office, books, bytes(range(32)), "other.onnx")
    device = office.device(tmp_path / "device")
    manifest = parse_manifest(device.read(manifest_target(NAME, VERSION), MAX_MANIFEST_BYTES))
    refs = []
    for ref in manifest.files():
        target = device.find(payload_target(NAME, VERSION, ref.name))
        download = store.root / "download"
        shutil.copy(office.site / target.file, download)
        purpose = Purpose(DEVICE.name, DEVICE.epoch, NAME, VERSION, target.sha256)
        key = open_grant(grants[ref.name], [store.secret.grant_identity.secret], purpose)
        refs.append(
            store.adopt_blob(
                NAME, VERSION, ref.name, download,
                payload=target.sha256, size=ref.size, sha256=ref.sha256, file_key=key,
            )
        )  # fmt: skip
        with pytest.raises(GrantError):
            open_grant(grants[ref.name], [bytes(range(32))], purpose)
    for ref in refs:
        with store.read(ref) as plain:
            assert os.pread(plain.fd, ref.size, 0) in BUNDLE.read_bytes()


def test_a_version_that_never_was_is_not_granted(office: Office) -> None:
    with Books(office.folder.database) as books, pytest.raises(NotFoundError, match="not published"):
        grant(office, books, bytes(range(32)))


# -- wrong use --------------------------------------------------------------------------------------------------------


def test_a_fleet_without_a_repository_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    edge_fleet(folder, "init", "--tenant", "acme", "--broker", "mqtt.example", "--no-password")
    for command in (
        ["publish", str(BUNDLE)],
        ["refresh"],
        ["verify"],
        ["repository", "show"],
        ["keys", "rotate", "root"],
    ):
        done = edge_fleet(folder, *command)
        assert done.status == 1 and "repository init" in done.err, command


def test_a_repository_is_made_once(office: Office) -> None:
    done = office.run("repository", "init", "--no-password")
    assert done.status == 1 and "there is one" in done.err


def test_keys_have_the_password_and_are_opened_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fleet"
    monkeypatch.setenv("EDGE_FLEET_PASSWORD", PASSWORD)
    assert edge_fleet(folder, "init", "--tenant", "acme", "--broker", "mqtt.example").status == 0
    assert edge_fleet(folder, "repository", "init", "--root", "1/1", "--models", "1/2").status == 0
    for path in (folder / "repository" / "keys").glob("*.key"):
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----"), path
    assert edge_fleet(folder, "publish", str(BUNDLE)).status == 0
    monkeypatch.setenv("EDGE_FLEET_PASSWORD", "another password")
    done = edge_fleet(folder, "refresh")
    assert done.status == 1 and "password is wrong" in done.err
    assert edge_fleet(folder, "repository", "identity").out.startswith("age1")
    assert edge_fleet(folder, "verify").status == 0


@pytest.mark.parametrize("share", ["3/2", "0/1", "2", "a/b", "1/99"])
def test_shares_of_keys_that_make_no_sense_are_wrong_usage(tmp_path: Path, share: str) -> None:
    assert edge_fleet(tmp_path / "fleet", "repository", "init", "--root", share).status == 2


def test_a_lock_held_by_others_is_a_conflict(office: Office) -> None:
    with exclusive_lock(office.folder.publisher_lock), pytest.raises(ConflictError), office.opened():
        pass
