"""The store as the daemon uses it: blobs, keys and catalog tied together.

Thread-safety: every method may be called from any thread. Changes (``commit``, ``gc``, ``rotate_key``, the end of
``add_blob``) take one lock in turn; ``read`` and ``stats`` wait for none, and streams of ``add_blob`` run beside each
other. Only one process has a store open: ``open`` takes a lock on the folder.

Invariants: a commit names only blobs that are durable; when a method returns, what it reports survives power loss; a
kill at any instruction leaves the state before or after it. A blob added but not committed is kept until ``discard``
or the end of the process, then swept by ``gc``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent.base.clock import Clock, SystemClock, iso
from agent.base.errors import ConflictError, DamagedError, NotFoundError, PeerError, TryLaterError
from agent.base.files import exclusive_lock, fsync_directory
from agent.store import stream
from agent.store.age import FILE_KEY_BYTES, AgeError, Identity
from agent.store.blobs import Blobs, Draft, pieces_of
from agent.store.catalog import Catalog, Generation
from agent.store.doctor import Finding, Snapshot, diagnose
from agent.store.document import BlobRef, CatalogDocument, blank_ref, encode, marked, with_identity, with_refs
from agent.store.faults import storage
from agent.store.headers import file_key, put_header, reseal
from agent.store.keys import FILE_NEXT, DeviceSecret, Keys
from agent.store.memory import Plaintext
from agent.store.pace import Pace
from agent.store.reports import DamagedBlob, GcReport, KnownKey, Progress, RotateReport, StoreStats, VerifyReport
from agent.store.space import Hold, Space
from agent.store.stream import NONCE_BYTES, Bytes
from agent.store.sweep import foreign, reached, unreached

_log = logging.getLogger("agent.store")

Change = Callable[[CatalogDocument], CatalogDocument]


class Store:
    """The encrypted store below ``root``; ``quota_bytes`` bounds its blobs. ``step`` is told of each durable step."""

    def __init__(
        self,
        root: Path,
        keys: Keys,
        quota_bytes: int,
        clock: Clock | None = None,
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.root = root
        self.quota_bytes = quota_bytes
        self.notes: tuple[str, ...] = ()
        self._keys = keys
        self._clock = clock or SystemClock()
        self._random = random
        self._step = step
        self._pace = Pace(self._clock.monotonic)
        self._blobs = Blobs(root / "blobs", self._pace, step=step)
        self._catalog = Catalog(root, random=random, step=step)
        self._space = Space(root / "blobs", quota_bytes, self._used)
        self._lock = threading.RLock()
        self._held = contextlib.ExitStack()
        self._ring: dict[str, DeviceSecret] = {}
        self._current: Generation | None = None
        self._previous: Generation | None = None
        self._pending: dict[str, BlobRef] = {}
        self._damage: dict[BlobRef, str] = {}  # found by readers, not yet in the catalog
        self._changing = False

    # Opening and closing

    def open(self) -> Store:
        """Lock, recover, load; returns itself.

        ConflictError when another process has it, DamagedError when neither generation can be read or the disk
        refuses, RefusedError when others could use the device secret.
        """
        with storage("cannot open store"), self._held_on_success() as held:
            if not self.root.is_dir():
                self.root.mkdir(mode=0o700, parents=True)
                fsync_directory(self.root.parent)
            held.enter_context(exclusive_lock(self.root / "lock"))
            self._catalog.prepare()
            self._blobs.prepare()
            secrets_found = self._keys.load(create=self._catalog.is_new())
            self._ring = {secret.key_id: secret for secret in reversed(secrets_found)}
            self._recover(secrets_found[0])
        return self

    def close(self) -> None:
        """Give the lock back. Open plaintexts stay valid."""
        with self._lock:
            self._current = self._previous = None
            self._held.close()

    def __enter__(self) -> Store:
        return self if self._current else self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def document(self) -> CatalogDocument:
        """What is committed. Never changed in place; a commit puts another in its stead."""
        return self._now().document

    @property
    def secret(self) -> DeviceSecret:
        """The device secret in use."""
        return self._ring[self._now().key_id]

    @property
    def grant_identities(self) -> tuple[Identity, ...]:
        """To whom a fleet may have sealed a grant: the identity in use, then former ones that are still kept."""
        kept = (Identity(bytes.fromhex(secret)) for secret in self.document.delivery.identities)
        return (self.secret.grant_identity, *kept)

    @property
    def rotation_pending(self) -> bool:
        """Whether a rotation was cut off: ``rotate_key`` finishes it."""
        return any(secret.name == FILE_NEXT for secret in self._ring.values())

    # Blobs

    def hold_space(self, size: int, written: int = 0) -> Hold:
        """Promise ``size`` bytes to a download, of which ``written`` are there. TooLargeError, TryLaterError."""
        self._now()
        with storage("cannot reserve space"):
            return self._space.hold(size, written)

    def add_blob(
        self,
        model: str,
        version: str,
        part: str,
        source: int | Iterable[Bytes],
        size_hint: int | None = None,
        *,
        expected_sha256: str | None = None,
    ) -> BlobRef:
        """Encrypt ``source`` (a descriptor, read from its position on, or pieces) into the store; not yet committed.

        ``size_hint`` in bytes (for a regular file its size) is reserved before the first byte; more is reserved as it
        comes. PeerError when the source fails or its SHA-256 (hex) is not the expected one, TooLargeError or
        TryLaterError when quota or disk are short; then nothing is left.
        """
        self._now()
        identity = blank_ref(model, version, part)
        hint = _size_of(source) if size_hint is None else size_hint
        key, nonce = self._random(FILE_KEY_BYTES), self._random(NONCE_BYTES)
        with (
            storage(f"cannot add {part}"),
            self._space.reserve(stream.payload_size(hint)) as grow,
            self._blobs.draft(pieces_of(source), key, nonce, grow) as draft,
        ):
            if expected_sha256 not in (None, draft.sha256):
                raise PeerError(f"cannot add {part}: its SHA-256 is {draft.sha256}, {expected_sha256} expected")
            found = {name: getattr(draft, name) for name in ("payload", "payload_size", "size", "sha256")}
            return self._keep(draft, identity.model_copy(update=found), key)

    def adopt_blob(
        self, model: str, version: str, part: str, path: Path, *, payload: str, size: int, sha256: str, file_key: bytes
    ) -> BlobRef:
        """Take over the payload at ``path``, which somebody else encrypted, as it is; not yet committed.

        The file is moved, so it must lie on the store's file system. ``payload`` is the SHA-256 (hex) of its bytes,
        ``size`` and ``sha256`` those of the plaintext, ``file_key`` what it opens with: all is checked, in memory,
        before anything is moved. PeerError when something does not agree, ConflictError while the same payload is
        being added for something else, TooLargeError or TryLaterError when the quota is short; the file stays then.
        """
        self._now()
        identity = blank_ref(model, version, part)
        sealed_size = stream.payload_size(size)
        with storage(f"cannot take over {part}"), self._space.reserve(sealed_size, on_disk=True):
            try:
                draft = self._blobs.examine(path, sealed_size, file_key)
            except AgeError as error:
                raise PeerError(f"cannot take over {part}: {error}") from error
            if (draft.payload, draft.sha256) != (payload, sha256):
                what = "payload" if draft.payload != payload else "content"
                raise PeerError(f"cannot take over {part}: its {what} is another than was promised")
            found = {name: getattr(draft, name) for name in ("payload", "payload_size", "size", "sha256")}
            return self._keep(draft, identity.model_copy(update=found), file_key)

    def _keep(self, draft: Draft, ref: BlobRef, key: bytes) -> BlobRef:
        """Give a draft its name and header. Under the lock: no sweep comes between, and no rotation."""
        with self._lock:
            pending = self._pending.get(ref.payload)
            if pending and (pending.model, pending.version, pending.part) != (ref.model, ref.version, ref.part):
                raise ConflictError(f"cannot add {ref.part}: its payload is being added as {pending.part}")
            self._blobs.keep(draft)
            try:
                sealed = put_header(self._blobs, ref, key, self.secret, self._random)
            except BaseException:
                self._drop(ref)
                raise
            self._pending[ref.payload] = sealed
        return sealed

    def discard(self, refs: Iterable[BlobRef]) -> None:
        """Give up blobs that were added and not committed; harmless for others."""
        with self._lock, storage("cannot discard blobs"):
            self._now()
            for ref in refs:
                if self._pending.pop(ref.payload, None):
                    self._drop(ref)
            self._blobs.flush()

    def _drop(self, ref: BlobRef) -> None:
        """Delete the files of a blob but those that something else needs: a payload taken over twice is one file."""
        needed = frozenset[str]().union(*self._needed())
        for name in (ref.header, ref.payload):
            if name not in needed:
                self._blobs.delete(name)

    def read(self, ref: BlobRef) -> Plaintext:
        """Decrypt into sealed memory; the caller closes it. May run in many threads.

        DamagedError when it is not authentic, cut or missing (then it is marked in the catalog), NotFoundError when the
        catalog no longer has it, TryLaterError when memory is short, UnsupportedError without sealed memory files.
        """
        current = self._renewed(ref)
        try:
            return self._blobs.decrypt(current, file_key(self._blobs, current, self._ring))
        except AgeError as error:
            renewed = self._renewed(ref)
            if renewed != current:  # the key was rotated in between
                return self.read(renewed)
            self._mark({current: str(error)}, (), wait=False)
            raise DamagedError(
                f"cannot read {ref.model} {ref.version} {ref.part}: {error}", hint="add or fetch this version again"
            ) from error

    # Catalog

    def commit(self, change: Change) -> CatalogDocument:
        """Replace the document by ``change(document)``, durably. PeerError when the result does not agree with itself.

        ``change`` gets a copy of its own and must not call back into the store. Whatever it raises passes through and
        nothing is changed.
        """
        with self._lock:
            if self._changing:
                raise ConflictError("cannot commit: a change is already under way in this thread")
            self._changing = True
            try:
                return self._commit(change, self.secret)
            finally:
                self._changing = False

    def gc(self) -> GcReport:
        """Delete what neither kept generation nor a blob under way needs.

        When the generation before still reaches what the newest no longer does, the newest is written once more
        first, so that removed versions give their space back now.
        """
        with self._lock, storage("cannot collect garbage"):
            if self._previous and reached(self._previous.document.refs()) - reached(self.document.refs()):
                self._commit(lambda document: document, self.secret)
            files = self._blobs.files()
            gone = unreached(files, *self._needed())
            for name in gone:
                self._blobs.delete(name)
            self._blobs.flush()
            return GcReport(len(gone), sum(files[name] for name in gone))

    def verify(self, progress: Progress = lambda done, total: None) -> VerifyReport:
        """Check every blob of the catalog: header opens for its identity, payload is what its name says.

        Marks what is damaged and takes the mark from what is whole again. ``progress`` is told bytes done and in all.
        """
        refs = list(self.document.refs())
        total, done = sum(ref.payload_size for ref in refs), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        damaged: dict[BlobRef, str] = {}
        for ref in refs:
            try:
                file_key(self._blobs, ref, self._ring)
                self._blobs.check(ref, advance)
            except AgeError as error:
                if self._reaches(ref):  # else it was removed or its header moved on meanwhile
                    damaged[ref] = str(error)
        whole = [ref for ref in refs if ref not in damaged]
        for ref in whole:
            self._damage.pop(ref, None)
        self._mark(damaged, whole)
        return VerifyReport(len(refs), total, tuple(DamagedBlob(ref, reason) for ref, reason in damaged.items()))

    def rotate_key(self, progress: Progress = lambda done, total: None, *, to_file: bool = False) -> RotateReport:
        """Move to the next device secret; rewrites headers only. After a kill, a call again finishes it.

        With ``to_file`` from a credential to a file of core's own, which is weaker.

        The old secret goes only when both kept generations are durable under the new one. ``progress`` is told headers.
        TryLaterError while blobs are added and not committed; UnsupportedError when the provider has no next secret.
        """
        with self._lock, storage("cannot rotate key"):
            if self._pending:
                raise TryLaterError(f"cannot rotate key: {len(self._pending)} blobs are being added", hint="try again")
            old = self._now().key_id
            former = self.secret.grant_identity.secret.hex()
            target = self._keys.next_secret(old, to_file=to_file)
            self._ring = {**self._ring, target.key_id: target}
            renewed, damaged = reseal(self._blobs, self.document.refs(), self._ring, target, self._random, progress)
            if renewed or old != target.key_id:
                change = partial(with_identity, secret=former) if old != target.key_id else _same
                self._commit(lambda document: with_refs(change(document), renewed), target)
            if self._previous and self._previous.key_id != target.key_id:
                self._commit(lambda document: document, target)
            action = self._keys.promote(target.key_id)
            self._ring = {secret.key_id: secret for secret in reversed(self._keys.load(create=False))}
            self._mark({blob.ref: blob.reason for blob in damaged}, ())
            self.gc()
        return RotateReport(old, target.key_id, len(renewed), tuple(damaged), action)

    def stats(self) -> StoreStats:
        """Counts and sizes, as they are now."""
        return self._stats(self._blobs.files())

    def _stats(self, files: dict[str, int]) -> StoreStats:
        document = self.document
        spare = unreached(files, *self._needed())
        refs = list(document.refs())
        versions = [version for model in document.models.values() for version in model.versions.values()]
        return StoreStats(
            quota_bytes=self.quota_bytes,
            used_bytes=sum(files.values()),
            reserved_bytes=self._space.reserved(),
            unreached_bytes=sum(files[name] for name in spare),
            disk_free_bytes=self._space.free(),
            models=len(document.models),
            versions=len(versions),
            blobs=len(refs),
            plaintext_bytes=sum(ref.size for ref in refs),
            damaged=sum(len(version.damaged) for version in versions),
            generation=document.generation,
            key_id=self.secret.key_id,
            key_source=self.secret.source,
            keys=tuple(KnownKey(key.key_id, key.source, key.name) for key in self._ring.values()),
        )

    def doctor(self) -> tuple[Finding, ...]:
        """What is not as it should be, and what mends it."""
        return self.examine()[1]

    def examine(self) -> tuple[StoreStats, tuple[Finding, ...]]:
        """``stats`` and ``doctor`` with one look at the files: with 1,000 models it takes 20 ms."""
        folders = [self.root, self.root / "blobs", self.root / "catalog"]
        with storage("cannot examine store"):
            files = self._blobs.files()
            stats = self._stats(files)
            return stats, diagnose(
                Snapshot(
                    document=self.document,
                    secret=self.secret,
                    secrets=self._ring.values(),
                    notes=self.notes,
                    modes={str(folder): folder.stat().st_mode for folder in folders},
                    foreign=foreign(files),
                    unreached_bytes=stats.unreached_bytes,
                    slow=self._pace.slow(),
                )
            )

    # Within

    def _now(self) -> Generation:
        if self._current is None:
            raise ConflictError("cannot use store: it is not open")
        return self._current

    @contextlib.contextmanager
    def _held_on_success(self) -> Iterator[contextlib.ExitStack]:
        with contextlib.ExitStack() as held:
            yield held
            self._held = held.pop_all()

    def _recover(self, preferred: DeviceSecret) -> None:
        opened = self._catalog.open(self._ring)
        self.notes = opened.notes
        for note in opened.notes:
            _log.warning("store: %s", note)
        self._current, self._previous = opened.current, opened.previous
        if self._current is None:
            first = CatalogDocument(generation=1, saved_at=iso(self._clock.now()))
            self._current = self._catalog.save(first, preferred)
        elif not opened.notes:
            # What was written but never committed. Where something was amiss, it stays for whoever looks into it.
            self._catalog.sweep(kept.number for kept in (self._current, self._previous) if kept)

    def _commit(self, change: Change, secret: DeviceSecret) -> CatalogDocument:
        now = self._now()
        noted = frozenset(self._damage)
        copied = encode(now.document)
        wanted = marked(change(copied.document), noted, frozenset())
        numbers = [now.number, *self._catalog.numbers()]
        document = wanted.model_copy(update={"generation": max(numbers) + 1, "saved_at": iso(self._clock.now())})
        self._require_durable(now.document, document)
        with storage("cannot save catalog"):
            with self._pace.timed("saving the catalog"):
                saved = self._catalog.save(document, secret, replace(copied, document=now.document))
            self._current, self._previous = saved, now
            for ref in saved.document.refs():
                self._pending.pop(ref.payload, None)
            for ref in noted:
                self._damage.pop(ref, None)
        try:
            self._catalog.sweep([saved.number, now.number])
        except OSError as error:  # it is committed all the same; the next commit or opening sweeps
            _log.warning("store: old generations stay: %s", error)
        return saved.document

    def _require_durable(self, old: CatalogDocument, new: CatalogDocument) -> None:
        known = reached(old.refs())
        for ref in new.refs():
            for name in (ref.payload, ref.header):
                if name not in known and not self._blobs.holds(name):
                    raise NotFoundError(
                        f"cannot save catalog: blob of {ref.model} {ref.version} {ref.part} is not here"
                    )

    def _renewed(self, ref: BlobRef) -> BlobRef:
        """The reference as the catalog has it now: a rotation changes its header. NotFoundError when it has none."""
        if self._pending.get(ref.payload) == ref:
            return ref
        found = self.document.find(ref.model, ref.version, ref.part)
        if found is None or found.payload != ref.payload:
            raise NotFoundError(f"cannot read {ref.model} {ref.version} {ref.part}: the catalog no longer has it")
        return found

    def _reaches(self, ref: BlobRef) -> bool:
        return self.document.find(ref.model, ref.version, ref.part) == ref

    def _mark(self, damaged: dict[BlobRef, str], whole: Iterable[BlobRef], *, wait: bool = True) -> None:
        """Write into the catalog which blobs are damaged and which are not. Never hides the error that led here.

        Without ``wait`` a change under way is not waited for: the mark is written with it or with the next.
        """
        self._damage.update(damaged)
        if not self._lock.acquire(blocking=wait):
            return
        try:
            bad, good = frozenset(damaged), frozenset(whole)
            if self._changing or marked(self.document, bad, good) == self.document:
                return
            for ref, reason in damaged.items():
                _log.error("store: %s %s %s is damaged: %s", ref.model, ref.version, ref.part, reason)
            self.commit(lambda document: marked(document, bad, good))
        except (TryLaterError, DamagedError) as error:
            _log.warning("store: damage is not recorded yet: %s", error)
        finally:
            self._lock.release()

    def _needed(self) -> list[frozenset[str]]:
        # A closed store needs nothing, so that a sweep would take all: ``_now`` refuses.
        kept = [generation.document.refs() for generation in (self._now(), self._previous) if generation]
        return [reached(refs) for refs in [*kept, list(self._pending.values())]]

    def _used(self) -> int:
        return sum(self._blobs.files().values())


def _same(document: CatalogDocument) -> CatalogDocument:
    return document


def _size_of(source: int | Iterable[Bytes]) -> int:
    """How much of a regular file is to come; nothing is known of other sources."""
    if not isinstance(source, int):
        return 0
    try:
        status = os.fstat(source)
        return status.st_size - os.lseek(source, 0, os.SEEK_CUR) if stat.S_ISREG(status.st_mode) else 0
    except OSError as error:
        raise PeerError(f"cannot read source: {error.strerror}") from error
