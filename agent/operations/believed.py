"""What the operator's repository says, as a job needs it: verified, and what was believed kept in the catalog.

Brings in tuf where it is used. Invariants: what was believed is durable before anything is done on its strength; marks
and keys belong to the root that the device was shipped with, and are begun anew with another one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from agent.base.errors import ConflictError, PeerError, UnsupportedError
from agent.bundles.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from agent.operations.install import require_agent
from agent.operations.origin import Bringer, Origin
from agent.store import stream
from agent.store.document import CatalogDocument, DeliveryEntry, MarkEntry
from agent.store.store import Store
from agent.trust.jobkeys import MAX_TABLE_BYTES, TARGET, parse_table
from agent.trust.wants import DeliveryError, Want, manifest_target, payload_target

if TYPE_CHECKING:
    from agent.trust.repository import Marks, Repository, State, Target

_LOG = logging.getLogger("edge_agent.delivery")
_T = TypeVar("_T")
#: Metadata that is not believed is fetched so often in all: the first mirrors may be stale, or somebody else's by now.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Release:
    """A published version: its manifest, and the payload (SHA-256) of each of its files."""

    manifest: Manifest
    payloads: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Wants that are given up when whoever waits is to."""

    desk: Bringer
    go_on: Callable[[], None]

    def fetch(self, want: Want) -> bytes:
        return self.desk.fetch(want, self.go_on)


class Believed:
    """The repository for one job. ``go_on`` raises when the job is to end. Blocking."""

    def __init__(self, store: Store, origin: Origin, go_on: Callable[[], None]) -> None:
        self._store = store
        self._origin = origin
        self._go_on = go_on
        self._open: Repository | None = None

    def refresh(self) -> Mapping[str, datetime]:
        """Bring the metadata up to date and keep what was believed; when each role ends.

        DeliveryError, DelayError, UnsupportedError.
        """
        root = self._origin.root()
        if root is None:
            raise UnsupportedError(
                "cannot install: this device was given no root of a repository",
                hint="put the fleet's image/root.json beside trust.toml",
            )
        tuf = _library()
        known = {role: tuf.Mark(each.version, each.keys) for role, each in _delivery(self._store, root).marks.items()}
        asked = _Asked(self._origin.desk, self._go_on)

        def refreshed() -> tuple[Repository, State]:
            repository = tuf.Repository(self._origin.metadata, root, asked, self._origin.clock, marks=known)
            return repository, repository.refresh()

        repository, state = self._believed(refreshed)
        self._keep(root, state.marks)
        self._open = repository
        self._take_keys(repository)
        return dict(state.expires)

    def release(self, name: str, version: str) -> Release:
        """A version as it was published, once the repository is up to date. DeliveryError, DelayError, PeerError."""
        assert self._open is not None
        repository = self._open
        data = self._believed(lambda: repository.read(manifest_target(name, version), MAX_MANIFEST_BYTES))
        require_agent(name, _wanted_agent(data))
        manifest = parse_manifest(data)
        if (manifest.name, manifest.version) != (name, version):
            raise DeliveryError("mixed", f"the manifest of {name} {version} is of {manifest.name} {manifest.version}")
        payloads = {}
        for ref in manifest.files():
            target = repository.find(payload_target(name, version, ref.name))
            if target.length != stream.payload_size(ref.size):
                raise DeliveryError("mixed", f"{target.path} has another length than its manifest says")
            payloads[ref.name] = target.sha256
        return Release(manifest, payloads)

    def target(self, path: str) -> Target:
        """What the repository lists under a path, once it is up to date. DeliveryError, DelayError."""
        repository = self._open
        assert repository is not None
        return self._believed(lambda: repository.find(path))

    def _believed(self, read: Callable[[], _T]) -> _T:
        """What was read; once more, from elsewhere if there is somebody else, where it was not to be believed."""
        for _ in range(_TRIES - 1):
            try:
                return read()
            except DeliveryError as error:
                if error.code == "not_listed":
                    raise
                _LOG.warning("%s; it is asked for once more", error)
                self._origin.desk.doubt()
        return read()

    def _keep(self, root: bytes, marks: Marks) -> None:
        kept = {role: MarkEntry(version=mark.version, keys=mark.keys) for role, mark in marks.items()}
        before = self._store.document.delivery
        if (before.root, before.marks) != (_digest(root), kept):
            found = _delivery(self._store, root).model_copy(update={"root": _digest(root), "marks": kept})
            self._store.commit(lambda document: with_delivery(document, found))
            if before.job_keys != found.job_keys:
                self._origin.keys_changed()

    def _take_keys(self, repository: Repository) -> None:
        """The keys that may give jobs, where the repository says. A table that cannot be read changes nothing."""
        try:
            data = self._believed(lambda: repository.read(TARGET, MAX_TABLE_BYTES))
        except DeliveryError as error:
            if error.code != "not_listed":
                raise
            return
        kept = self._store.document.delivery.job_keys
        try:
            table = parse_table(data)
            if kept and table.version <= parse_table(kept.encode()).version:
                return
        except PeerError as error:
            _LOG.error("the repository's keys for jobs are passed over: %s", error)
            return
        text = data.decode()
        self._store.commit(
            lambda document: with_delivery(document, document.delivery.model_copy(update={"job_keys": text}))
        )
        _LOG.info("the repository brought keys for jobs, version %d", table.version)
        self._origin.keys_changed()


def with_delivery(document: CatalogDocument, delivery: DeliveryEntry) -> CatalogDocument:
    """The document with what is known of deliveries replaced."""
    return document.model_copy(update={"delivery": delivery})


def require_same(store: Store, manifest: Manifest) -> None:
    """ConflictError when another content stands under that version already."""
    model = store.document.models.get(manifest.name)
    entry = model.versions.get(manifest.version) if model else None
    if entry is not None and entry.manifest != manifest:
        raise ConflictError(
            f"cannot install '{manifest.name}' {manifest.version}: another content has that version here already",
            hint="remove it first: model.remove",
        )


def _delivery(store: Store, root: bytes) -> DeliveryEntry:
    """What is known under that root: of another one nothing is but what is being fetched and whom we were."""
    found = store.document.delivery
    if found.root in (None, _digest(root)):
        return found
    return found.model_copy(update={"root": None, "marks": {}, "job_keys": ""})


def _digest(root: bytes) -> str:
    return hashlib.sha256(root).hexdigest()


def _wanted_agent(data: bytes) -> str | None:
    """What a manifest asks of the agent, also where this agent is too old to read the rest of it."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    wanted = found.get("requires_agent") if isinstance(found, dict) else None
    return wanted if isinstance(wanted, str) else None


def _library() -> ModuleType:
    """``agent.trust.repository``, which brings in tuf. UnsupportedError where that is not installed."""
    try:
        from agent.trust import repository  # noqa: PLC0415 - see above
    except ImportError as error:
        raise UnsupportedError(
            "cannot install: python-tuf is not installed", hint="pip install 'edge-agent[delivery]'"
        ) from error
    return repository
