"""Jobs that install: each device gets its own keys, of what it can run; one that is revoked or silent gets none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.fleet.books import Books
from agent.store.age import Identity
from agent.trust.allegiance import load
from agent.trust.envelope import open_envelope
from agent.trust.grants import Grant, GrantError, Purpose, open_grant
from agent.trust.jobkeys import parse_table
from agent.wire.messages import JobDocument, decode
from tests import onnx_models
from tests.core.test_daemon import bundle
from tests.fleet import device as simulated
from tests.fleet.conftest import Done, Fleet, edge_fleet


class Office:
    """A fleet with a repository, and devices that were enrolled by hand and have told of themselves; no broker."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder / "fleet", folder
        self.ok("init", "--tenant", "acme", "--broker", "mqtt.example", "--no-password")
        self.ok("repository", "init", "--no-password")
        self.identities: dict[str, Identity] = {}

    def run(self, *arguments: str) -> Done:
        return edge_fleet(self.folder, *arguments)

    def ok(self, *arguments: str) -> Done:
        done = self.run(*arguments)
        assert done.status == 0, done.err
        return done

    def publish(self, version: str, *precisions: str, **more: Any) -> None:
        variants = {name: (name, onnx_models.linear(number)) for number, name in enumerate(precisions)}
        self.ok("publish", str(bundle(self.scratch / "next.edgemodel", variants, version=version, **more)))

    def device(self, name: str, *, talks: bool = True, **info: Any) -> None:
        device_identity = simulated.Identity()
        self.ok(
            "approve", name, "--manual", "--identity", device_identity.public, "--yes", "-o", str(self.scratch / name)
        )
        self.identities[name] = Identity(bytes([len(self.identities) + 1]) * 32)
        if talks:
            said = {
                "boot_nonce": "0" * 32,
                "facts": simulated.FACTS,
                "inventory": simulated.INVENTORY,
                "grant": [self.identities[name].recipient().text()],
            }
            self.hear(name, {**said, **info})

    def hear(self, name: str, info: dict[str, Any]) -> None:
        with Books(self.folder / "fleet.db") as books, books.database.transaction():
            books.words.hear(name, "info", "2026-11-23T00:00:00Z", info)

    def job(self, name: str, version: str = "1.0.0", *more: str) -> dict[str, Any]:
        """The arguments in the job that one device gets."""
        path = self.scratch / "job.json"
        self.ok("job", "model.install", "model=m", f"version={version}", "-d", name, "--to-file", str(path), *more)
        allegiance = load(self.scratch / name / "trust.toml")
        assert allegiance is not None
        document = decode(
            open_envelope(path.read_bytes(), JobDocument.KIND, allegiance.public_keys).payload, JobDocument
        )
        assert document.device == name and document.job is not None
        return dict(document.job.args)

    def refusal(self, name: str, version: str = "1.0.0") -> str:
        done = self.run(
            "job",
            "model.install",
            "model=m",
            f"version={version}",
            "-d",
            name,
            "--to-file",
            str(self.scratch / "no.json"),
        )
        assert done.status == 1 and not (self.scratch / "no.json").exists()
        return done.err


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def payloads(office: Office, version: str = "1.0.0") -> dict[str, str]:
    with Books(office.folder / "fleet.db") as books:
        return {each.part: each.payload for each in books.releases.payloads("m", version)}


def test_each_device_gets_keys_of_its_own_and_nobody_elses_open(office: Office) -> None:
    office.publish("1.0.0", "fp32", "int8", golden_from=onnx_models.linear(0))
    for name in ("cam-1", "cam-2"):
        office.device(name)
    published = payloads(office)
    for name, other in (("cam-1", "cam-2"), ("cam-2", "cam-1")):
        grants = office.job(name)["grants"]
        assert set(grants) == {"fp32.onnx", "int8.onnx", "golden.npz"}
        for part, document in grants.items():
            grant = Grant.parse(document)
            purpose = Purpose(name, 1, "m", "1.0.0", published[part])
            assert len(open_grant(grant, [office.identities[name].secret], purpose)) == 16
            with pytest.raises(GrantError, match="does not have"):
                open_grant(grant, [office.identities[other].secret], purpose)


def test_a_device_gets_no_key_of_what_it_cannot_run(office: Office) -> None:
    """Nor does the memory that happens to be free decide it."""
    office.publish("1.0.0", "fp32", "int8", golden_from=onnx_models.linear(0))
    office.device("cam-1", inventory={"runtimes": {}, "absent": {"onnx": "", "tflite": ""}})
    assert "none of its variants can run there" in office.refusal("cam-1")
    office.device("cam-2", facts={**simulated.FACTS, "mem_available_mb": 1})
    assert len(office.job("cam-2")["grants"]) == 3
    office.device("cam-3", facts={"nonsense": True})  # nobody knows what it can run: it decides itself
    assert len(office.job("cam-3")["grants"]) == 3


def test_a_revoked_device_gets_no_further_version_until_that_is_taken_back(office: Office) -> None:
    office.publish("1.0.0", "fp32")
    office.device("cam-1")
    assert office.job("cam-1")["grants"]
    office.ok("devices", "revoke", "cam-1", "--yes")
    assert "revoked on 20" in office.refusal("cam-1")
    assert office.run("devices", "revoke", "nobody", "--yes").status == 1
    office.ok("devices", "revoke", "cam-1", "--undo")
    assert office.job("cam-1")["grants"]


def test_a_device_that_has_not_told_its_key_is_said_to_be_so(office: Office) -> None:
    office.publish("1.0.0", "fp32")
    office.device("silent", talks=False)
    assert "said nothing since its enrolment" in office.refusal("silent")
    office.device("old", grant=None)
    assert "has not said to whom a grant may be sealed" in office.refusal("old")
    office.device("odd", grant=["age1nonsense"])
    assert "cannot give 'odd'" in office.refusal("odd")


def test_a_device_that_was_never_online_gets_what_its_owner_read_on_it(office: Office) -> None:
    office.publish("1.0.0", "fp32")
    office.device("silent", talks=False)
    key = office.identities["silent"]
    grants = office.job("silent", "1.0.0", "--grant-key", key.recipient().text())["grants"]
    purpose = Purpose("silent", 1, "m", "1.0.0", payloads(office)["fp32.onnx"])
    assert open_grant(Grant.parse(grants["fp32.onnx"]), [key.secret], purpose)
    words = ("job", "model.install", "model=m", "version=1.0.0", "--grant-key", key.recipient().text())
    assert office.run(*words, "--all").status == 2


def test_what_was_withdrawn_is_not_given_and_what_was_never_published_goes_without(office: Office) -> None:
    office.publish("1.0.0", "fp32")
    office.device("cam-1")
    office.ok("unpublish", "m", "1.0.0", "--yes")
    assert "withdrawn" in office.refusal("cam-1")
    assert office.job("cam-1", "9.0.0") == {"model": "m", "version": "9.0.0"}


def test_the_largest_version_that_a_manifest_allows_fits_into_an_envelope(office: Office) -> None:
    model = onnx_models.linear(0)
    variants = {f"v{number:02}-{'x' * 50}": ("fp32", model + bytes([number])) for number in range(64)}
    path = bundle(office.scratch / "many.edgemodel", variants, golden_from=onnx_models.linear(0))
    office.ok("publish", str(path))
    office.device("cam-1")
    assert len(office.job("cam-1")["grants"]) == 65
    assert (office.scratch / "job.json").stat().st_size <= 64 << 10


@pytest.mark.parametrize(
    "more", [["--wait"], ["--export", "x"], ["-d", "cam-2"], ["--where", "board=*"]], ids=lambda words: words[0]
)
def test_a_file_is_for_one_device_and_nothing_else(office: Office, more: list[str]) -> None:
    office.device("cam-1")
    done = office.run("job", "ping", "-d", "cam-1", "--to-file", str(office.scratch / "x"), *more)
    assert done.status == 2 and "--to-file takes one --device" in done.err


def test_published_keys_become_those_that_a_device_is_taken_to_obey(office: Office) -> None:
    office.device("cam-1")
    office.ok("keys", "add", "bob", "--classes", "observe", "--no-password")
    published = json.loads(office.ok("keys", "publish", "--json").out)
    assert (published["version"], published["keys"], published["again"]) == (1, ["operator", "bob"], False)
    with Books(office.folder / "fleet.db") as books, books.database.transaction():
        assert len(books.registry.device("cam-1").obeys) == 1
        books.registry.obeys_table("cam-1", 1)
        assert len(books.registry.device("cam-1").obeys) == 2
        books.registry.obeys_table("cam-1", 99)  # which nobody published
        assert len(books.registry.device("cam-1").obeys) == 2
    (path,) = (office.folder / "repository" / "public" / "targets" / "keys").iterdir()
    assert parse_table(path.read_bytes()).version == 1
    # Whoever is enrolled now obeys the keys of the enrolment until the next table.
    office.device("cam-2")
    allegiance = load(office.scratch / "cam-2" / "trust.toml")
    assert allegiance is not None and allegiance.keys_version == 1
    office.ok("keys", "revoke", "bob", "--yes")
    assert json.loads(office.ok("keys", "publish", "--json").out)["keys"] == ["operator"]
    assert len(list(path.parent.iterdir())) == 1
    assert json.loads(office.ok("keys", "publish", "--json").out)["again"] is True
    office.ok("keys", "revoke", "operator", "--yes")
    assert "every one is revoked" in office.run("keys", "publish").err


def test_over_the_broker_each_device_finds_its_own(fleet: Fleet) -> None:
    """The whole way: what a device says of its key is heard, and its job brings grants that it can open."""
    fleet.ok("repository", "init", "--no-password")
    variants = {"fp32": ("fp32", onnx_models.linear(0))}
    fleet.ok("publish", str(bundle(fleet.scratch / "m.edgemodel", variants)))
    devices = [fleet.online(name) for name in ("cam-1", "cam-2")]
    given = fleet.ok("job", "model.install", "model=m", "version=1.0.0", "--all", "--wait", "--timeout", "30s", "--yes")
    assert {each["state"] for each in given["devices"]} == {"succeeded"}
    with fleet.books() as books:
        (payload,) = books.releases.payloads("m", "1.0.0")
    for device in devices:
        (job,) = device.done
        grant = Grant.parse(job.args["grants"]["fp32.onnx"])  # type: ignore[index, call-overload]
        assert device.grant is not None
        assert open_grant(grant, [device.grant.secret], Purpose(device.name, 1, "m", "1.0.0", payload.payload))
    fleet.ok("devices", "revoke", "cam-2", "--yes")
    done = fleet.run("job", "model.install", "model=m", "version=1.0.0", "--all", "--yes")
    assert done.status == 1 and "cannot give 'cam-2'" in done.err
    assert len(devices[0].done) == 1  # to none where one is refused
