"""The operator's repository: TUF metadata over a folder of static files, made, changed, signed and written.

Invariants: one command at a time changes it; files appear whole, those that are named by others before those that name
them, the timestamp last, so that whoever reads the folder at any instant finds the state before or after; what is
signed is checked against the root that devices have before it is written; nothing is deleted that metadata names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.metadata import (
    Role as TufRole,
)
from tuf.api.serialization.json import JSONSerializer

from agent.base.errors import ConflictError, DamagedError, NotFoundError, PeerError, RefusedError
from agent.base.files import exclusive_lock, fsync_directory, read_bounded, write_atomically
from agent.fleet.folder import Folder
from agent.fleet.keys import Passwords
from agent.fleet.roles import ROLES, RULES, Role, RoleKeys, Rule, make_identity
from agent.trust.repository import Limits
from agent.trust.wants import METADATA, TARGETS

#: What the role ``models`` may list, and nothing else: the delegation that devices hold it to.
MODEL_PATHS = ["models/*/*/model.json", "models/*/*/payload/*", "models/*/*/header/*"]
_MOST_METADATA_BYTES = 64 << 20
_TYPES: Mapping[Role, Any] = {
    "root": Root, "targets": Targets, "models": Targets, "snapshot": Snapshot, "timestamp": Timestamp,
}  # fmt: skip


@dataclass(slots=True)
class Edition:
    """The metadata of one state of the repository, and which roles are to be signed anew."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    models: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]
    changed: set[Role] = field(default_factory=set)

    def of(self, role: Role) -> Metadata[Any]:
        """The metadata of a role."""
        found: Metadata[Any] = getattr(self, role)
        return found

    def rule(self, role: Role) -> TufRole:
        """Who may sign a role, and how many must."""
        if role != "models":
            return self.root.signed.roles[role]
        delegations = self.targets.signed.delegations
        assert delegations is not None
        assert delegations.roles is not None
        return delegations.roles["models"]

    def signed_by_its_keys(self, role: Role) -> bool:
        """Whether enough of the keys that count now have signed it."""
        delegator: Root | Targets = self.targets.signed if role == "models" else self.root.signed
        metadata = self.of(role)
        return bool(delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures))


class Repository:
    """The repository of a fleet's folder, open for changes: ``edition`` is changed in place, ``save`` writes it."""

    def __init__(self, folder: Folder, passwords: Passwords, now: datetime, elsewhere: Iterable[Path] = ()) -> None:
        self.folder = folder
        self.now = now
        self.keys = RoleKeys(folder, tuple(elsewhere))
        self._passwords = passwords
        self._held = contextlib.ExitStack()
        self._edition: Edition | None = None
        self._previous: Metadata[Root] | None = None  # the root that devices have, once another is being made

    def __enter__(self) -> Repository:
        self._held.enter_context(locked(self.folder))
        try:
            self._edition = load(self.folder.site)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def edition(self) -> Edition:
        """What is being changed."""
        assert self._edition is not None
        return self._edition

    def save(self) -> Edition:
        """Sign and write all that changed, with snapshot and timestamp. RefusedError when keys are missing, OSError."""
        edition = self.edition
        # A root that was written and then cut off left roles behind that its new keys have not signed.
        changed = edition.changed | {role for role in ROLES[1:] if not edition.signed_by_its_keys(role)}
        changed |= {"snapshot", "timestamp"}
        if any(not self._enough(role) for role in changed):
            self._complain(changed)
        for role in ("models", "targets"):  # in the order in which they name each other
            if role in changed:
                self._renew(role)
                self._write(role)
        if "root" in changed:
            self._save_root()
        edition.snapshot.signed.meta = {f"{role}.json": self._named(role) for role in ("models", "targets")}
        self._renew("snapshot")
        self._write("snapshot")
        edition.timestamp.signed.snapshot_meta = self._named("snapshot")
        self._renew("timestamp")
        self._write("timestamp")
        edition.changed.clear()
        return edition

    def refresh(self) -> dict[Role, datetime]:
        """Sign anew what has half of its time behind it and whose keys are here; the roles that were not, with ends."""
        edition, missed = self.edition, dict[Role, datetime]()
        for role in ROLES[:3]:
            signed = edition.of(role).signed
            if signed.expires - self.now > timedelta(days=RULES[role].days / 2):
                continue
            if self._enough(role):
                edition.changed.add(role)
            else:
                missed[role] = signed.expires
        self.save()
        return missed

    def rotate(
        self, role: Role, gone: Iterable[str], made: int, password: bytes | None, threshold: int = 0
    ) -> list[str]:
        """Take the keys ``gone`` (names) out of a role and put ``made`` new ones in; the names of the new ones.

        The change is only in ``edition`` until ``save``; the files of new keys are there at once. NotFoundError,
        RefusedError when too few would be left.
        """
        rule = self.edition.rule(role)
        by_name = {name: keyid for keyid, name in self.keys.names().items() if keyid in rule.keyids}
        unknown = [name for name in gone if name not in by_name]
        if unknown:
            raise NotFoundError(
                f"cannot take {unknown[0]} out of {role}: it is none of its keys", hint="repository show"
            )
        threshold = threshold or rule.threshold
        leaving = [by_name[name] for name in gone]
        if len(rule.keyids) - len(leaving) + made < threshold:
            raise RefusedError(
                f"cannot change the keys of {role}: {threshold} of them must sign, too few would be left"
            )
        delegator: Root | Targets = self.edition.targets.signed if role == "models" else self.edition.root.signed
        above: Role = "root" if isinstance(delegator, Root) else "targets"
        if not self._enough(above):  # before there are keys that nobody counts
            self._complain([above])
        if isinstance(delegator, Root):
            self._before_root_changes()
        for keyid in leaving:
            delegator.revoke_key(keyid, role)
        fresh = [self.keys.make(role, password) for _ in range(made)]
        for key in fresh:
            delegator.add_key(key, role)
        self.edition.rule(role).threshold = threshold
        self.edition.changed |= {role, "targets" if role == "models" else "root"}
        names = self.keys.names()
        return [names[key.keyid] for key in fresh]

    # Within

    def _before_root_changes(self) -> None:
        """The root that devices have signs the next one, too: it is kept as it was."""
        if self._previous is None:
            self._previous = Metadata[Root].from_bytes(self.edition.root.to_bytes())

    def _save_root(self) -> None:
        edition = self.edition
        previous = self._previous or Metadata[Root].from_bytes(edition.root.to_bytes())
        signed = edition.root.signed
        signed.version, signed.expires = previous.signed.version + 1, self._until("root")
        edition.root.signatures.clear()
        able = dict.fromkeys([*previous.signed.roles["root"].keyids, *signed.roles["root"].keyids])
        for keyid in self.keys.held(able):
            edition.root.sign(self.keys.signer(keyid, self._passwords), append=True)
        result = signed.get_root_verification_result(
            previous.signed, edition.root.signed_bytes, edition.root.signatures
        )
        if not result:
            names = self.keys.names()
            missing = ", ".join(sorted(names.get(keyid, keyid) for keyid in result.unsigned))
            raise RefusedError(
                f"cannot sign the root: too few of its keys are here; of {missing} some are needed",
                hint="--keys names a folder that has them",
            )
        data = self._write("root")
        write_atomically(self.folder.shipped_root, data, mode=0o644)
        self._previous = None

    def _renew(self, role: Role) -> None:
        metadata = self.edition.of(role)
        metadata.signed.version += 1
        metadata.signed.expires = self._until(role)
        self._sign(role)

    def _sign(self, role: Role) -> None:
        rule, metadata = self.edition.rule(role), self.edition.of(role)
        metadata.signatures.clear()
        for keyid in self.keys.held(rule.keyids):
            metadata.sign(self.keys.signer(keyid, self._passwords), append=True)
        if not self.edition.signed_by_its_keys(role):
            raise RefusedError(f"cannot sign {role}: {rule.threshold} of its keys must, fewer are here")

    def _enough(self, role: Role) -> bool:
        if role == "root":
            previous = (self._previous or self.edition.root).signed.roles["root"]
            if len(self.keys.held(previous.keyids)) < previous.threshold:
                return False
        rule = self.edition.rule(role)
        return len(self.keys.held(rule.keyids)) >= rule.threshold

    def _complain(self, roles: Iterable[Role]) -> None:
        names = self.keys.names()
        for role in sorted(roles, key=ROLES.index):
            if not self._enough(role):
                rule = self.edition.rule(role)
                known = ", ".join(sorted(names.get(keyid, keyid) for keyid in rule.keyids))
                raise RefusedError(
                    f"cannot sign {role}: {rule.threshold} of {known} must sign, not so many are here",
                    hint="--keys names a folder that has them",
                )

    def _until(self, role: Role) -> datetime:
        return (self.now + timedelta(days=RULES[role].days)).replace(microsecond=0)

    def _named(self, role: Role) -> MetaFile:
        metadata = self.edition.of(role)
        return MetaFile.from_data(metadata.signed.version, data_of(metadata), ["sha256"])

    def _write(self, role: Role) -> bytes:
        return write_metadata(self.folder.site, role, self.edition.of(role))


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """One publisher at a time. NotFoundError where there is no repository, ConflictError."""
    if not (folder.site / METADATA / "timestamp.json").exists():
        raise NotFoundError(
            f"cannot use {folder.repository}: there is no repository in it", hint="edge-fleet repository init makes one"
        )
    with _alone(folder):
        yield


@contextlib.contextmanager
def _alone(folder: Folder) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(folder.publisher_lock))
        except ConflictError as error:
            raise ConflictError(
                f"cannot change {folder.repository}: another command is doing so", hint="wait until it has ended"
            ) from error
        yield


def found_repository(
    folder: Folder, rules: Mapping[Role, Rule], password: bytes | None, passwords: Passwords, now: datetime
) -> Edition:
    """A repository with keys and without models. ConflictError when there is one, PeerError for rules, OSError."""
    for role, rule in rules.items():
        if not 1 <= rule.threshold <= rule.keys <= 16:
            raise PeerError(f"cannot use {rule.threshold} of {rule.keys} keys for {role}")
    for path in (folder.repository, folder.role_keys):
        path.mkdir(mode=0o700, exist_ok=True)
    for path in (folder.site, folder.site / METADATA, folder.site / TARGETS):
        path.mkdir(mode=0o755, exist_ok=True)
    fsync_directory(folder.repository)
    with _alone(folder):
        if (folder.site / METADATA / "timestamp.json").exists() or any(folder.role_keys.iterdir()):
            raise ConflictError(f"cannot make a repository in {folder.repository}: there is one, or the start of one")
        make_identity(folder, password)
        keys = RoleKeys(folder)
        repository = Repository(folder, passwords, now)
        repository._edition = _empty(
            {role: [keys.make(role, password) for _ in range(rules[role].keys)] for role in ROLES}
        )
        for role in ROLES:
            repository.edition.rule(role).threshold = rules[role].threshold
            repository.edition.of(role).signed.expires = repository._until(role)
        repository._sign("root")
        repository._sign("targets")
        repository._sign("models")
        for role in ("models", "targets"):
            repository._write(role)
        root = repository._write("root")
        edition = repository.edition
        edition.snapshot.signed.meta = {f"{role}.json": repository._named(role) for role in ("models", "targets")}
        repository._sign("snapshot")
        repository._write("snapshot")
        edition.timestamp.signed.snapshot_meta = repository._named("snapshot")
        repository._sign("timestamp")
        write_atomically(folder.shipped_root, root, mode=0o644)
        repository._write("timestamp")
        return edition


def _empty(keys: Mapping[Role, list[Key]]) -> Edition:
    everyone: dict[str, Key] = {key.keyid: key for role in ROLES if role != "models" for key in keys[role]}
    roles: dict[str, TufRole] = {
        role: TufRole([key.keyid for key in keys[role]], 1) for role in ROLES if role != "models"
    }
    delegated = DelegatedRole("models", [key.keyid for key in keys["models"]], 1, terminating=True, paths=MODEL_PATHS)
    delegations = Delegations({key.keyid: key for key in keys["models"]}, {"models": delegated})
    return Edition(
        root=Metadata(Root(keys=everyone, roles=roles, consistent_snapshot=True)),
        targets=Metadata(Targets(delegations=delegations)),
        models=Metadata(Targets()),
        snapshot=Metadata(Snapshot()),
        timestamp=Metadata(Timestamp()),
    )


def load(site: Path) -> Edition:
    """The state that the timestamp names. DamagedError when something of it is missing or does not hold, OSError."""
    folder = site / METADATA
    newest = max((int(path.name.split(".", 1)[0]) for path in folder.glob("[0-9]*.root.json")), default=0)
    try:
        root = Metadata[Root].from_bytes(_read(folder / f"{newest}.root.json"))
        timestamp = Metadata[Timestamp].from_bytes(_read(folder / "timestamp.json"))
        snapshot = Metadata[Snapshot].from_bytes(_checked(folder, "snapshot", timestamp.signed.snapshot_meta))
        targets, models = (
            Metadata[Targets].from_bytes(_checked(folder, role, snapshot.signed.meta[f"{role}.json"]))
            for role in ("targets", "models")
        )
    except (RepositoryError, KeyError) as error:
        raise DamagedError(f"cannot read the repository in {site}: {error}", hint="restore it from a copy") from error
    return Edition(root, targets, models, snapshot, timestamp)


def _checked(folder: Path, role: str, named: MetaFile) -> bytes:
    data = _read(folder / f"{named.version}.{role}.json")
    named.verify_length_and_hashes(data)
    return data


def _read(path: Path) -> bytes:
    return read_bounded(path, _MOST_METADATA_BYTES)


def data_of(metadata: Metadata[Any]) -> bytes:
    """Metadata as it is written."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def write_metadata(site: Path, role: Role, metadata: Metadata[Any]) -> bytes:
    """Write a role's file; durable on return. PeerError when it is larger than devices take, OSError."""
    data = data_of(metadata)
    limits = Limits()
    most = {"root": limits.root_bytes, "snapshot": limits.snapshot_bytes, "timestamp": limits.timestamp_bytes}
    if len(data) > most.get(role, limits.targets_bytes):
        raise PeerError(
            f"cannot write {role}: {len(data)} bytes are more than devices take", hint="unpublish old versions"
        )
    name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
    write_atomically(site / METADATA / name, data, mode=0o644)
    return data
