"""Whose jobs a device obeys once its repository has brought keys: later tables hold, of its own fleet and root."""

from __future__ import annotations

import base64
import hashlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.base.errors import PeerError
from agent.core.enrolling import Enroller
from agent.store.document import DeliveryEntry
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.trust.envelope import Signer
from agent.trust.jobkeys import MAX_TABLE_BYTES, encode_table, parse_table

ROOT = b'{"signed": "what it says does not matter here"}'


def public() -> str:
    return base64.b64encode(Signer(secrets.token_bytes(32)).public.raw).decode()


class Device:
    """A device whose ``trust.toml`` names one key, ``first``."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.trust = folder / "trust.toml"
        self.store = store
        self.root = folder / "root.json"
        self.root.write_bytes(ROOT)
        self.enroller = Enroller(self.trust, store)
        self.write()

    def write(self, **fields: object) -> None:
        known = {"tenant": '"acme"', "device": '"cam-1"', **fields}
        lines = [f"{name} = {value}" for name, value in known.items()]
        lines += ["[[keys]]", 'name = "first"', f'public = "{public()}"', 'classes = ["change"]']
        self.trust.write_text("\n".join(lines))
        self.enroller.read()

    def brings(self, version: int, *names: str, tenant: str = "acme", root: bytes = ROOT) -> None:
        """The repository has brought that table."""
        text = encode_table(version, tenant, [(name, public(), ["change"]) for name in names]).decode()
        delivery = DeliveryEntry(root=hashlib.sha256(root).hexdigest(), job_keys=text)
        self.store.commit(lambda document: document.model_copy(update={"delivery": delivery}))
        self.enroller.obey()

    @property
    def obeys(self) -> list[str]:
        assert self.enroller.allegiance is not None
        return [key.name for key in self.enroller.allegiance.keys.values()]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        Store(Path(folder) / "store", DeviceKeys(Path(folder) / "keys"), 1 << 20) as store,
    ):
        yield Device(tmp_path, store)


def test_a_table_takes_the_place_of_the_keys_that_came_before_also_after_a_start(device: Device) -> None:
    assert device.obeys == ["first"]
    device.brings(1, "ann", "bob")
    assert device.obeys == ["ann", "bob"]
    device.enroller.read()
    assert device.obeys == ["ann", "bob"]
    allegiance = device.enroller.allegiance
    assert allegiance is not None
    assert (allegiance.device, allegiance.keys_version, allegiance.epoch) == ("cam-1", 1, 1)


def test_whoever_is_enrolled_later_obeys_the_keys_of_the_enrolment(device: Device) -> None:
    device.brings(3, "ann")
    for version, names in ((2, ["ann"]), (3, ["first"]), (4, ["first"])):
        device.write(keys_version=version)
        assert device.obeys == names, version


def test_a_table_of_another_tenant_or_root_counts_nothing(device: Device) -> None:
    device.brings(9, "mallory", tenant="other")
    assert device.obeys == ["first"]
    device.brings(9, "mallory", root=b"another")
    assert device.obeys == ["first"]
    device.brings(9, "ann")
    assert device.obeys == ["ann"]
    device.root.unlink()
    device.enroller.read()
    assert device.obeys == ["first"]


def test_a_root_that_others_may_write_vouches_for_nobody(device: Device) -> None:
    device.brings(9, "ann")
    device.root.chmod(0o666)
    device.enroller.read()
    assert device.obeys == ["first"]


KEY = public()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'{"format": "edge-job-keys/1"}',
        encode_table(1, "acme", [("ann", KEY, ["change"])]).replace(b'"edge-job-keys/1"', b'"edge-job-keys/2"'),
        encode_table(1, "acme", [("ann", KEY, ["change"])]).replace(b'"change"', b'"everything"'),
        encode_table(1, "acme", [("ann", KEY, ["change"])]).replace(b'"tenant"', b'"extra": 1, "tenant"'),
        encode_table(1, "acme", [("ann", KEY, ["change"])]).replace(KEY.encode(), b"AAAA"),
        encode_table(1, "acme", [("ann", KEY, ["change"]), ("bob", KEY, ["destroy"])]),
        b'{"format": "edge-job-keys/1", "version": 1, "tenant": "acme", "keys": []}',
        b'{"format": "edge-job-keys/1", "version": 0, "tenant": "acme", "keys": []}',
        b"[" * 100_000,
        b"\xff\xfe",
        b" " * (MAX_TABLE_BYTES + 1),
    ],
)
def test_what_is_no_table_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError, match="cannot read keys for jobs"):
        parse_table(data)
