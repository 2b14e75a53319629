"""Catalog generations: immutable numbered age files, and ``CURRENT``, which points to one.

Invariants: a generation under its name is whole and flushed; ``CURRENT`` swings only after that, so that whatever
instant a kill falls on, the old or the new state is there. The number is authenticated (an old file under a newer name
does not open). Two generations are kept; when the newest is damaged, the one before answers, and that is said.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import DamagedError, PeerError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, read_bounded, write_atomically
from agent.store import stream
from agent.store.age import FILE_KEY_BYTES, AgeError, parse_header
from agent.store.document import MAX_DOCUMENT_BYTES, CatalogDocument, Encoded, decode, encode
from agent.store.faults import reading
from agent.store.headers import Ring
from agent.store.keys import DeviceSecret
from agent.store.sealing import MAX_OWN_HEADER_BYTES, SALT_BYTES, catalog_purpose, key_id_of, seal, unseal
from agent.store.sweep import obsolete

_NAME = re.compile(r"([0-9]{12})\.age")
_POINTER = re.compile(r"([0-9]{1,12}) ([0-9a-f]{64})\n")
_MAX_FILE_BYTES = stream.payload_size(MAX_DOCUMENT_BYTES) + MAX_OWN_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation as read or written: its number, the key it is sealed under, its document, its file's SHA-256."""

    number: int
    key_id: str
    document: CatalogDocument
    digest: str


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening found. ``current`` is None in a new store; ``notes`` say what was not as it should be."""

    current: Generation | None
    previous: Generation | None
    notes: tuple[str, ...]


class Catalog:
    """The folder ``catalog`` and the file ``CURRENT`` below ``root``."""

    def __init__(self, root: Path, *, random: Callable[[int], bytes], step: Callable[[str], None]) -> None:
        self._folder = root / "catalog"
        self._pointer = root / "CURRENT"
        self._random = random
        self._step = step

    def prepare(self) -> None:
        """Make the folder, drop what a kill left half written."""
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700)
            fsync_directory(self._folder.parent)
        for folder in (self._folder, self._pointer.parent):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                path.unlink(missing_ok=True)

    def is_new(self) -> bool:
        """Whether nothing was ever committed here."""
        return not self.numbers() and not self._pointer.exists()

    def numbers(self) -> list[int]:
        """Generations on disk, newest first, readable or not."""
        found = (_NAME.fullmatch(name) for name in os.listdir(self._folder))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def open(self, ring: Ring) -> Opened:
        """The newest generation that holds. DamagedError when there are some and none can be read."""
        numbers = self.numbers()
        pointed, notes = self._pointed(numbers)
        good: list[Generation] = []
        # Above the pointer lies what was never committed: the last resort.
        committed = [number for number in numbers if pointed is None or number <= pointed]
        for number in [*committed, *(number for number in numbers if number not in committed)]:
            if good and number not in committed:
                break
            try:
                good.append(self.load(number, ring))
            except DamagedError as error:
                notes.append(str(error))
            if len(good) == 2:
                break
        if not good and not self.is_new():
            raise DamagedError(
                f"cannot open catalog: {'; '.join(notes) or 'every generation is gone'}",
                hint="restore the device secret if it was replaced; else move the store away, add the models again",
            )
        if numbers == [1] and good and not self._pointer.exists():
            # Cut off in the very first save: nothing is lost and nothing is odd.
            self._point(good[0])
            notes.clear()
        if good and pointed is not None and good[0].number != pointed:
            notes.append(f"catalog generation {pointed} is damaged, generation {good[0].number} is used instead")
        return Opened(good[0] if good else None, good[1] if len(good) > 1 else None, tuple(notes))

    def load(self, number: int, ring: Ring) -> Generation:
        """One generation. DamagedError says which and why."""
        try:
            with reading("file"):
                data = read_bounded(self._path(number), _MAX_FILE_BYTES + 1)
            key_id, plain = _decrypt(data, number, ring)
            document = decode(plain)
        except (AgeError, PeerError) as error:
            raise DamagedError(f"cannot read catalog generation {number}: {error}") from error
        if document.generation != number:
            raise DamagedError(f"cannot read catalog generation {number}: it says that it is {document.generation}")
        return Generation(number, key_id, document, hashlib.sha256(data).hexdigest())

    def save(self, document: CatalogDocument, secret: DeviceSecret, before: Encoded | None = None) -> Generation:
        """Write ``document`` under its own number, then point to it. ``before`` as in ``encode``.

        Raises PeerError when it does not agree with itself, OSError; then the state before is the state.
        """
        encoded = encode(document, before)
        number = document.generation
        file_key = self._random(FILE_KEY_BYTES)
        salt = self._random(SALT_BYTES)
        header = seal(file_key, secret.key_id, secret.kek, catalog_purpose(number), salt)
        sealed = header + b"".join(stream.encrypt(file_key, self._random(stream.NONCE_BYTES), [encoded.data]))
        generation = Generation(number, secret.key_id, encoded.document, hashlib.sha256(sealed).hexdigest())
        with self._restored_on_failure(number):
            self._step("generation sealed")
            write_atomically(self._path(number), sealed)
            self._step("generation written")
            self._point(generation)
        return generation

    def _point(self, generation: Generation) -> None:
        write_atomically(self._pointer, f"{generation.number} {generation.digest}\n".encode())
        self._step("CURRENT swung")

    @contextlib.contextmanager
    def _restored_on_failure(self, number: int) -> Iterator[None]:
        """A save that raises is not committed, also not for whoever opens the folder next."""
        before = self._pointer.read_bytes() if self._pointer.exists() else b""
        try:
            yield
        except BaseException:
            # Best effort on a failing disk: the rename may have happened though its flush did not.
            with contextlib.suppress(OSError):
                if not before:
                    self._pointer.unlink(missing_ok=True)
                elif self._pointer.read_bytes() != before:
                    write_atomically(self._pointer, before)
            with contextlib.suppress(OSError):
                os.unlink(self._path(number))
            raise

    def sweep(self, kept: Iterable[int]) -> None:
        """Delete every generation but ``kept``. Durable on return."""
        gone = obsolete(self.numbers(), kept)
        for number in gone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(number))
            self._step("generation deleted")
        if gone:
            fsync_directory(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.age"

    def _pointed(self, numbers: list[int]) -> tuple[int | None, list[str]]:
        """Where ``CURRENT`` points, or None where it cannot be believed: then the newest that holds is taken."""
        try:
            text = read_bounded(self._pointer, 256).decode("ascii", "replace")
        except OSError as error:
            return None, [f"CURRENT cannot be read: {error.strerror}"] if numbers else []
        match = _POINTER.fullmatch(text)
        if not match:
            return None, ["CURRENT is damaged"]
        number, digest = int(match[1]), match[2]
        # A pointer damaged into another generation's number must not undo a commit: number and digest belong together.
        for other in numbers:
            if other != number and self._digest(other) == digest:
                return other, [f"CURRENT is damaged: its digest is that of generation {other}"]
        return number, []

    def _digest(self, number: int) -> str:
        with contextlib.suppress(OSError):
            return hashlib.sha256(read_bounded(self._path(number), _MAX_FILE_BYTES + 1)).hexdigest()
        return ""


def _decrypt(data: bytes, number: int, ring: Ring) -> tuple[str, bytes]:
    if len(data) > _MAX_FILE_BYTES:
        raise AgeError("too large")
    header = parse_header(data[:MAX_OWN_HEADER_BYTES])
    key_id = key_id_of(header)
    if key_id not in ring:
        raise AgeError(f"sealed under key {key_id}, which this device does not have")
    file_key = unseal(header, key_id, ring[key_id].kek, catalog_purpose(number))
    view = memoryview(data)[header.length :]
    offset = 0

    def read(count: int) -> bytes:
        nonlocal offset
        part = bytes(view[offset : offset + count])
        offset += len(part)
        return part

    return key_id, b"".join(stream.decrypt(file_key, read))
