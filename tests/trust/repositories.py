"""A repository in memory that does what the test says, right or wrong: metadata made with TUF's own classes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote, unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from agent.base.clock import TrustedClock
from agent.trust.wants import DelayError, DeliveryError, Want

NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)
TOP = ("root", "timestamp", "snapshot", "targets")


@dataclass
class Hand:
    """A clock that is set by hand."""

    moment: datetime = NOW

    def monotonic(self) -> float:
        return self.moment.timestamp()

    def now(self) -> datetime:
        return self.moment


def clock(
    moment: datetime = NOW, *, trust: str = "always", floor: datetime = NOW - timedelta(days=300)
) -> TrustedClock:
    return TrustedClock(Hand(moment), trust, floor, lambda: True)  # type: ignore[arg-type]


@dataclass
class Simulator:
    """What a mirror serves, by path, and the keys that sign it. ``publish`` makes what was changed visible.

    ``asked`` records each path. ``tamper`` may change or withhold what is served.
    """

    thresholds: dict[str, tuple[int, int]] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tamper: Callable[[str, bytes | None], bytes | None] = lambda _, data: data
    with_hashes: bool = True

    def __post_init__(self) -> None:
        self.signers: dict[str, list[CryptoSigner]] = {}
        ends = NOW + timedelta(days=30)
        self.md: dict[str, Metadata[Any]] = {
            "root": Metadata(Root(expires=ends, consistent_snapshot=True)),
            "timestamp": Metadata(Timestamp(expires=ends)),
            "snapshot": Metadata(Snapshot(expires=ends)),
            "targets": Metadata(Targets(expires=ends)),
        }
        for role in TOP:
            count, least = self.thresholds.get(role, (1, 1))
            for _ in range(count):
                self.add_key(role)
            self.root.roles[role].threshold = least
        self.publish_root(first=True)
        self.publish()

    @property
    def root(self) -> Root:
        return self.md["root"].signed

    @property
    def targets(self) -> Targets:
        return self.md["targets"].signed

    def add_key(self, role: str, signer: CryptoSigner | None = None) -> CryptoSigner:
        signer = signer or CryptoSigner.generate_ed25519()
        self.signers.setdefault(role, []).append(signer)
        self.root.add_key(signer.public_key, role)
        return signer

    def replace_keys(self, role: str) -> list[CryptoSigner]:
        """New keys in place of all of a role's; the old ones."""
        old = self.signers.pop(role)
        for signer in old:
            self.root.revoke_key(signer.public_key.keyid, role)
        for _ in old:
            self.add_key(role)
        return old

    def sign(self, role: str, signers: list[CryptoSigner] | None = None) -> bytes:
        metadata = self.md[role]
        metadata.signatures.clear()
        for signer in self.signers[role] if signers is None else signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes(JSONSerializer())

    def publish_root(self, *, first: bool = False, old: list[CryptoSigner] | None = None) -> bytes:
        """The next root, signed by its own keys and by ``old`` ones."""
        if not first:
            self.root.version += 1
        data = self.sign("root", [*self.signers["root"], *(old or [])])
        self.served[f"metadata/{self.root.version}.root.json"] = data
        return data

    def put(self, path: str, content: bytes, role: str = "targets", algorithm: str = "sha256") -> None:
        """A target, listed by a role."""
        digest = hashlib.new(algorithm, content).hexdigest()
        self.md[role].signed.targets[path] = TargetFile(len(content), {algorithm: digest}, path)
        folder, _, name = path.rpartition("/")
        self.served[f"targets/{folder}/{digest}.{name}" if folder else f"targets/{digest}.{name}"] = content

    def delegate(self, role: str, paths: list[str], parent: str = "targets", *, terminating: bool = False) -> None:
        """A role below another one, with a key of its own."""
        signer = CryptoSigner.generate_ed25519()
        self.signers[role] = [signer]
        self.md.setdefault(role, Metadata(Targets(expires=NOW + timedelta(days=30))))
        target = self.md[parent].signed
        if target.delegations is None:
            target.delegations = Delegations({}, {})
        target.delegations.roles[role] = DelegatedRole(role, [], 1, terminating, paths=paths)
        target.add_key(signer.public_key, role)

    def publish(self, *, bump: tuple[str, ...] = ()) -> None:
        """Targets, snapshot and timestamp as they are now, each with its next version."""
        below = [role for role in self.md if role not in ("root", "timestamp", "snapshot")]
        snapshot, timestamp = self.md["snapshot"].signed, self.md["timestamp"].signed
        first = "metadata/timestamp.json" not in self.served
        for role in below:
            known = snapshot.meta.get(f"{role}.json")
            if not first and (role in bump or known is None or self._is_new(role)):
                self.md[role].signed.version += known is not None
            data = self.sign(role)
            version = self.md[role].signed.version
            self.served[self._place(role, version)] = data
            snapshot.meta[f"{role}.json"] = self._named(version, data)
        if not first:
            snapshot.version += 1
            timestamp.version += 1
        self.publish_snapshot()
        self.publish_timestamp()

    def publish_snapshot(self) -> None:
        data, version = self.sign("snapshot"), self.md["snapshot"].signed.version
        self.served[self._place("snapshot", version)] = data
        self.md["timestamp"].signed.snapshot_meta = self._named(version, data)

    def publish_timestamp(self) -> None:
        self.served["metadata/timestamp.json"] = self.sign("timestamp")

    def frozen(self) -> dict[str, bytes]:
        """What is served now, to be served again later."""
        return copy.copy(self.served)

    def _place(self, role: str, version: int) -> str:
        name = quote(role, safe="")
        return f"metadata/{version}.{name}.json" if self.root.consistent_snapshot else f"metadata/{name}.json"

    def _named(self, version: int, data: bytes) -> MetaFile:
        return MetaFile.from_data(version, data, ["sha256"]) if self.with_hashes else MetaFile(version)

    def _is_new(self, role: str) -> bool:
        before = self.served.get(self._place(role, self.md[role].signed.version))
        return before is None or Metadata.from_bytes(before).signed != self.md[role].signed

    def answer(self, path: str) -> bytes | None:
        """What is served under a path, if anything."""
        return self.tamper(path, self.served.get(path) or self.served.get(unquote(path)))

    def fetch(self, want: Want) -> bytes:
        """The mirror, as ``Wants``."""
        self.asked.append(want.path)
        data = self.answer(want.path)
        if data is None:
            raise DelayError("not_found", f"{want.path} is not there")
        if len(data) > want.most:
            raise DeliveryError("too_long", f"{want.path} has more than {want.most} bytes")
        return data
