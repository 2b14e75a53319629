"""The operator's repository as this device believes it: TUF metadata checked by python-tuf, fetched as wants.

Brings in tuf: import it only when something is to be checked. Invariants: what is relied on lies flushed on the disk
first; the root that was shipped is where every check begins, so that no damage to the local copies locks a device out;
versions alone decide what is older, also where the local copies are lost (``Marks``); dates only ever stop what is new,
and only dates that this device can be sure of. One thread uses one object.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from agent.base.clock import TrustedClock, iso
from agent.base.errors import DamagedError
from agent.base.files import fsync_directory
from agent.trust.wants import METADATA, TARGETS, DelayError, DeliveryError, Want, Wants, ids, target_file

_HISTORY = "root_history"
_REFRESH_HINT = "the operator refreshes it (edge-fleet refresh); what is installed goes on as it is"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is taken of each file, and how long is waited: ``patience_s``, and longer at ``least_rate`` bytes/s."""

    root_rotations: int = 64
    delegations: int = 8
    root_bytes: int = 128 << 10
    timestamp_bytes: int = 16 << 10
    snapshot_bytes: int = 512 << 10
    targets_bytes: int = 4 << 20
    patience_s: float = 60.0
    least_rate: float = 8192.0


@dataclass(frozen=True, slots=True)
class Mark:
    """The highest version of a role that was believed, and under which keys (a digest of them).

    New keys, which only a new root gives, begin anew: that is how a fleet recovers from a version counted up to the end
    with a stolen key (TUF 1.0.34, 5.3.11).
    """

    version: int
    keys: str


Marks = Mapping[str, Mark]


@dataclass(frozen=True, slots=True)
class State:
    """What was believed at a refresh: versions by role, and when each ends."""

    marks: Marks
    expires: Mapping[str, datetime]


@dataclass(frozen=True, slots=True)
class Target:
    """A file that the repository vouches for: length in bytes, digest in hex; ``custom`` is signed with it."""

    path: str
    length: int
    digest: str
    custom: Mapping[str, Any] | None = field(default=None, compare=False)
    #: SHA-512 where it lists no SHA-256, as other publishers may; a file of ours has the latter.
    algorithm: Literal["sha256", "sha512"] = "sha256"

    @property
    def sha256(self) -> str:
        """In hex. DeliveryError malformed where another digest is listed alone."""
        if self.algorithm != "sha256":
            raise DeliveryError("malformed", f"{self.path} is listed without a SHA-256")
        return self.digest

    @property
    def file(self) -> str:
        """Where it lies below the repository's base."""
        return f"{TARGETS}/{target_file(self.path, self.digest)}"


class Repository:
    """``folder`` keeps the metadata; ``shipped_root`` is the root that came with the device; ``marks`` what it knew."""

    def __init__(
        self,
        folder: Path,
        shipped_root: bytes,
        wants: Wants,
        clock: TrustedClock,
        *,
        limits: Limits | None = None,
        marks: Marks | None = None,
        name: Callable[[], str] | None = None,
    ) -> None:
        self._folder = folder
        self._root = shipped_root
        self._clock = clock
        self._limits = limits or Limits()
        self._marks = dict(marks or {})
        self._fetcher = _Fetcher(wants, self._limits, name or ids())
        self._updater: Updater | None = None
        self._flushed: set[tuple[int, int]] = set()

    def refresh(self) -> State:
        """Bring root, timestamp, snapshot and targets up to date; what was found. DeliveryError, DelayError.

        DamagedError when the folder cannot be written even after it was begun anew.
        """
        self._updater = None
        try:
            updater = self._refreshed()
        except OSError:
            # Something lies where it must not, or cannot be read: nothing in the folder is needed.
            with self._disk():
                shutil.rmtree(self._folder, ignore_errors=True)
                updater = self._refreshed()
        state = self._state(updater)
        self._require_no_rollback(state.marks)
        self._flush()
        self._marks.update(state.marks)
        self._updater = updater
        return state

    def find(self, path: str) -> Target:
        """A target by its path. DeliveryError not_listed where nobody whom the repository trusts lists it; others."""
        updater = self._current()
        with self._refusals(), self._disk():
            info = updater.get_targetinfo(path)
        self._flush()
        if info is None or info.path != path:
            raise DeliveryError("not_listed", f"{path} is not in the repository, or listed by none who may")
        return _target(info)

    def read(self, path: str, most: int) -> bytes:
        """The content of a small target, such as a manifest. DeliveryError too_long beyond ``most`` bytes; others."""
        target = self.find(path)
        if target.length > most:
            raise DeliveryError("too_long", f"{path} has {target.length} bytes, {most} are allowed")
        known = target.digest if target.algorithm == "sha256" else None
        data = self._fetcher.bring(
            self._fetcher.want(quote(target.file), target.length, length=target.length, sha256=known)
        )
        if len(data) != target.length or hashlib.new(target.algorithm, data).hexdigest() != target.digest:
            raise DeliveryError("wrong_content", f"{path} is not what the repository lists")
        return data

    def want(self, target: Target) -> Want:
        """The want for a target: with its exact length and digest, for whoever fetches it into a file of its own."""
        return self._fetcher.want(quote(target.file), target.length, length=target.length, sha256=target.sha256)

    # Within

    def _current(self) -> Updater:
        if self._updater is None:
            self.refresh()
        assert self._updater is not None
        return self._updater

    def _refreshed(self) -> Updater:
        self._prepare()
        limits = self._limits
        settings = UpdaterConfig(
            max_root_rotations=limits.root_rotations,
            max_delegations=limits.delegations,
            root_max_length=limits.root_bytes,
            timestamp_max_length=limits.timestamp_bytes,
            snapshot_max_length=limits.snapshot_bytes,
            targets_max_length=limits.targets_bytes,
        )
        try:
            updater = Updater(
                str(self._folder),
                f"{METADATA}/",
                target_base_url=f"{TARGETS}/",
                fetcher=self._fetcher,
                config=settings,
                bootstrap=self._root,
            )
        except RepositoryError as error:
            raise DeliveryError(
                "bad_root",
                f"the root that came with this device does not hold: {error}",
                hint="give it a new root.json",
            ) from error
        # ngclient has no other way to be told the time; tests/trust/test_repository.py holds it to this one.
        updater._trusted_set.reference_time = self._reference()
        with self._refusals():
            updater.refresh()
        return updater

    def _reference(self) -> datetime:
        """The latest moment that is surely past: nothing is called expired for a clock that may be wrong."""
        return self._clock.clock.now() if self._clock.trusted() else self._clock.floor

    def _prepare(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._folder.iterdir():  # ngclient's own temporary files, after a kill
            if path.name.startswith("tmp") and path.is_file():
                path.unlink()

    def _state(self, updater: Updater) -> State:
        trusted = updater._trusted_set
        signed = {Root.type: trusted.root, Timestamp.type: trusted.timestamp, Snapshot.type: trusted.snapshot}
        marks = {role: Mark(each.version, _keys_of(trusted.root, role)) for role, each in signed.items()}
        expires = {role: each.expires for role, each in signed.items()} | {Targets.type: trusted.targets.expires}
        return State(marks, expires)

    def _require_no_rollback(self, marks: Marks) -> None:
        for role, mark in marks.items():
            known = self._marks.get(role)
            if known is None or mark.version >= known.version:
                continue
            if role == Root.type or mark.keys == known.keys:
                raise DeliveryError(
                    "rollback", f"its {role} has version {mark.version}, this device has seen {known.version}"
                )

    def _flush(self) -> None:
        """fsync what is new: ngclient renames files into place and leaves the rest to luck."""
        with self._disk():
            for folder in (self._folder, self._folder / _HISTORY):
                fresh = False
                for entry in os.scandir(folder):
                    status = entry.stat(follow_symlinks=False)
                    key = (status.st_ino, status.st_mtime_ns)
                    if key not in self._flushed and not entry.is_dir(follow_symlinks=False):
                        fresh = True
                        if entry.is_file(follow_symlinks=False):
                            _fsync(entry.path)
                        self._flushed.add(key)
                if fresh:
                    fsync_directory(folder)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """python-tuf's errors in our words."""
        try:
            yield
        except ExpiredMetadataError as error:
            moment = iso(self._reference())
            raise DeliveryError(
                "expired", f"{error}, and it is {moment} or later: nothing new is installed", hint=_REFRESH_HINT
            ) from error
        except BadVersionNumberError as error:
            raise DeliveryError("rollback", f"a version is not the one that belongs there: {error}") from error
        except UnsignedMetadataError as error:
            raise DeliveryError("bad_signature", f"too few of the keys that count have signed: {error}") from error
        except LengthOrHashMismatchError as error:
            raise DeliveryError("mixed", f"its files do not belong together: {error}") from error
        except RepositoryError as error:
            raise DeliveryError("malformed", str(error)) from error
        except DownloadError as error:
            raise DelayError("not_found", str(error)) from error

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DamagedError(
                f"cannot keep the repository's metadata in {self._folder}: {error.strerror or error}",
                hint="check the disk and the owner and mode of the state folder",
            ) from error


class _Fetcher(FetcherInterface):
    """Requests of ngclient as wants. What it fetches is small and stays in memory."""

    def __init__(self, wants: Wants, limits: Limits, name: Callable[[], str]) -> None:
        self._wants = wants
        self._limits = limits
        self._name = name

    def want(self, path: str, most: int, *, length: int | None = None, sha256: str | None = None) -> Want:
        """A want with the time that so many bytes may take."""
        within = self._limits.patience_s + most / self._limits.least_rate
        return Want(self._name(), path, most, within, length, sha256)

    def bring(self, want: Want) -> bytes:
        """Its bytes, whoever answers. DeliveryError too_long, DelayError."""
        try:
            data = self._wants.fetch(want)
        except OSError as error:  # of whoever fetches: it must not pass for trouble with our own folder
            raise DelayError("unreachable", f"{want.path}: {error.strerror or error}") from error
        if len(data) > want.most:
            raise DeliveryError("too_long", f"{want.path} has more than {want.most} bytes")
        return data

    def download_bytes(self, url: str, max_length: int) -> bytes:
        try:
            return self.bring(self.want(url, max_length))
        except DelayError as error:
            if error.code != "not_found":
                raise
            # The one absence that has a meaning: there is no newer root.
            raise DownloadHTTPError(f"{url} is not there", 404) from error

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise NotImplementedError("each request says how much it takes")


def _target(info: TargetFile) -> Target:
    if any(part in ("", ".", "..") for part in info.path.split("/")) or not info.path.isprintable():
        raise DeliveryError("malformed", f"{info.path} is no path below the repository")
    algorithm: Literal["sha256", "sha512"] = "sha256" if "sha256" in info.hashes else "sha512"
    digest = info.hashes.get(algorithm, "")
    if len(digest) != hashlib.new(algorithm).digest_size * 2 or set(digest) - set("0123456789abcdef"):
        raise DeliveryError("malformed", f"{info.path} is listed without a SHA-256 or SHA-512")
    custom = info.custom
    return Target(info.path, info.length, digest, custom if isinstance(custom, dict) else None, algorithm)


def _keys_of(root: Root, role: str) -> str:
    """A digest of who may sign a role, and how many must."""
    found = root.roles[role]
    return hashlib.sha256(f"{found.threshold} {' '.join(sorted(found.keyids))}".encode()).hexdigest()[:16]


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
