"""Payloads on their way into the store: space for them, the folder in which they gather, and how they are taken over.

Invariants: what is fetched stays ciphertext; it lies in a folder of the job's own on the store's file system, under its
digest, until the version is committed, so that a kill costs no byte twice; space is promised before the first byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from agent.base.files import fsync_directory
from agent.bundles.manifest import FileRef
from agent.operations.origin import Bringer
from agent.store import stream
from agent.store.document import BlobRef, StagedVersion
from agent.store.faults import storage
from agent.store.space import Hold
from agent.store.store import Store
from agent.trust.wants import TARGETS, DeliveryError, Want, ids, payload_target, target_file
from agent.work.steps import Turn

#: As for metadata: so long is waited at all, and longer at so many bytes a second.
_PATIENCE_S, _LEAST_RATE = 60.0, 8192.0
_FOLDER = "incoming"
_SECOND_NAME = ".adopted"


class Fetching:
    """Of one version, for one job at a time. Blocking."""

    def __init__(self, model: str, version: str, store: Store, desk: Bringer, holds: dict[str, Hold]) -> None:
        self._model = model
        self._version = version
        self._store = store
        self._desk = desk
        self._holds = holds
        self._ids = ids("p")

    # -- space --------------------------------------------------------------------------------------------------------

    def hold(self, turn: Turn, staged: StagedVersion, lots: Sequence[Sequence[FileRef]]) -> None:
        """Promise what the largest of these lots takes. TooLargeError, TryLaterError when there is no room."""
        worst = max((_size(files) for files in lots), default=0)
        written = self._written(turn, staged)
        held = self._holds.get(_name(turn))
        if held is None:
            self._holds[_name(turn)] = self._store.hold_space(worst, min(written, worst))
        else:
            held.resize(worst)
            held.wrote(min(written, worst))

    def release(self, turn: Turn) -> None:
        """Give back what was promised; again is harmless."""
        self._release(_name(turn))

    def _release(self, name: str) -> None:
        held = self._holds.pop(name, None)
        if held is not None:
            held.close()

    def _written(self, turn: Turn, staged: StagedVersion) -> int:
        folder = self._folder(turn)
        paths = [folder / payload for payload in staged.payloads.values()]
        return sum(path.stat().st_size for path in paths if path.is_file())

    # -- the folder ---------------------------------------------------------------------------------------------------

    def bring(self, turn: Turn, staged: StagedVersion, files: Sequence[FileRef]) -> None:
        """Have the payloads of these files in the folder. What is there is hashed and not asked for again.

        DeliveryError, DelayError; TryLaterError, DamagedError for the disk.
        """
        folder = self._folder(turn)
        with storage("cannot keep what is fetched"):
            for each in (folder.parent, folder):
                if not each.is_dir():
                    each.mkdir(mode=0o700)
                    fsync_directory(each.parent)
        total, before = _size(files), 0
        for ref in files:
            self._bring_one(turn, ref, folder / staged.payloads[ref.name], (before, total))
            before += stream.payload_size(ref.size)

    def _bring_one(self, turn: Turn, ref: FileRef, path: Path, place: tuple[int, int]) -> None:
        before, total = place

        def progress(done: int) -> None:
            if (held := self._holds.get(_name(turn))) is not None:
                held.wrote(before + done)
            turn.tell({"stage": "fetch", "phase": "downloading", "bytes": before + done, "total": total})

        length = stream.payload_size(ref.size)
        target = target_file(payload_target(self._model, self._version, ref.name), path.name)
        within = _PATIENCE_S + length / _LEAST_RATE

        def fetch() -> None:
            want = Want(self._ids(), quote(f"{TARGETS}/{target}"), length, within, length, path.name)
            self._desk.fetch_file(want, path, progress, turn.go_on)

        try:
            fetch()
        except DeliveryError as error:
            # Whoever brings them asks the place that had wrong bytes last from now on: another one may have the right.
            turn.tell({"stage": "waiting", "reason": str(error)})
            fetch()

    def keep(self, turn: Turn, staged: StagedVersion, files: Sequence[FileRef]) -> None:
        """Delete what lies in the folder but these."""
        kept = {staged.payloads[ref.name] for ref in files}
        folder = self._folder(turn)
        with storage("cannot delete what was fetched"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def drop(self, turn: Turn) -> None:
        """Delete the folder; again is harmless."""
        self._delete(self._folder(turn))

    def drop_others(self, turn: Turn) -> None:
        """Delete what other jobs left."""
        for name in [name for name in self._holds if name != _name(turn)]:
            self._release(name)
        folder = self._folder(turn)
        for path in list(folder.parent.iterdir()) if folder.parent.is_dir() else ():
            if path != folder:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        with storage("cannot delete what was fetched"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif os.path.lexists(path):
                path.unlink()

    def _folder(self, turn: Turn) -> Path:
        return self._store.root / _FOLDER / _name(turn)

    # -- taking over --------------------------------------------------------------------------------------------------

    def adopt(self, turn: Turn, staged: StagedVersion, ref: FileRef, key: bytes) -> BlobRef:
        """A payload of the folder as a blob that is not committed yet. PeerError when it is not what was promised.

        It goes by a second name (link(2)): the first one stays until the version is committed.
        """
        payload = staged.payloads[ref.name]
        path = self._folder(turn) / payload
        second = path.with_name(payload + _SECOND_NAME)
        if (held := self._holds.get(_name(turn))) is not None:
            held.resize(0)  # from here on the store counts what is there
        with storage("cannot take over what was fetched"):
            second.unlink(missing_ok=True)
            os.link(path, second)
        turn.go_on()
        return self._store.adopt_blob(
            self._model,
            self._version,
            ref.name,
            second,
            payload=payload,
            size=ref.size,
            sha256=ref.sha256,
            file_key=key,
        )


def _name(turn: Turn) -> str:
    """Job ids are unique within an enrolment only."""
    return f"{turn.job.epoch}-{turn.job.job_id}"


def _size(files: Sequence[FileRef]) -> int:
    return sum(stream.payload_size(ref.size) for ref in files)
