"""What core wants from the world, and how it is told: the only way in which anything from outside reaches verification.

Core has no network. Whatever it needs from the repository it names as a ``Want``: a path below the repository's base, a
most that is taken of it, and how long is waited. Somebody else (link, a test, the verifying operator) brings the bytes.
Invariants: not one byte more than ``most`` is kept, whoever brings it; a want ends, by its bytes, by a word why not, or
by its time; nothing here judges what the bytes mean. Light: this module must not bring in tuf.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from agent.base.errors import NotFoundError, RefusedError, TryLaterError

#: Why a delivery was refused, as docs/spec/delivery.md 4 has them.
Reason = Literal[
    "bad_root", "bad_signature", "expired", "malformed", "mixed", "not_listed", "rollback", "too_long", "wrong_content"
]
#: Why one is late: trying again may help.
Delay = Literal["not_found", "stopped", "too_many", "too_slow", "unreachable"]

METADATA = "metadata"
TARGETS = "targets"


class DeliveryError(RefusedError):
    """What the repository brought is not believed. ``code`` is its reason."""

    def __init__(self, code: Reason, text: str, *, hint: str = "") -> None:
        super().__init__(f"cannot accept from the repository: {text}", hint=hint)
        self.code = code


class DelayError(TryLaterError):
    """The repository did not bring something. ``code`` is its reason."""

    def __init__(self, code: Delay, text: str, *, hint: str = "") -> None:
        super().__init__(f"cannot fetch from the repository: {text}", hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class Want:
    """Something to fetch. ``path`` is relative to the repository's base, in the letters of a URL's path.

    ``most`` bytes are taken, ``length`` is exact where it is known, ``sha256`` (hex) likewise. ``within_s`` is how long
    is waited in all.
    """

    id: str
    path: str
    most: int
    within_s: float
    length: int | None = None
    sha256: str | None = None


class Wants(Protocol):
    """Where wants are answered."""

    def fetch(self, want: Want) -> bytes:
        """The bytes. Blocks until they are there. DeliveryError too_long; DelayError."""
        ...


@dataclass(slots=True, eq=False)
class _Waiting:
    want: Want
    data: bytes | None = None
    error: DeliveryError | DelayError | None = None
    ended: bool = field(default=False)


class Desk:
    """Wants that wait for somebody to bring their bytes. Thread-safe; ``fetch`` blocks the thread that verifies.

    For what fits into memory (metadata, manifests); payloads go to a file of their own by the same ``Want``.
    """

    def __init__(self, most_at_once: int = 4) -> None:
        self._most_at_once = most_at_once
        self._changed = threading.Condition()
        self._waiting: dict[str, _Waiting] = {}
        self._stopped = False

    def fetch(self, want: Want) -> bytes:
        """See ``Wants``."""
        entry = _Waiting(want)
        with self._changed:
            if self._stopped:
                raise DelayError("stopped", "the agent is stopping")
            if len(self._waiting) >= self._most_at_once or want.id in self._waiting:
                raise DelayError("too_many", f"{len(self._waiting)} things are being fetched already")
            self._waiting[want.id] = entry
            self._changed.notify_all()
            try:
                if not self._changed.wait_for(lambda: entry.ended, want.within_s):
                    raise DelayError("too_slow", f"{want.path} did not come within {want.within_s:g} s")
            finally:
                del self._waiting[want.id]
        if entry.error is not None:
            raise entry.error
        assert entry.data is not None
        return entry.data

    def open_wants(self, timeout_s: float = 0.0) -> tuple[Want, ...]:
        """What is waited for now; with a timeout, waits so long for there to be something."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._open(), timeout_s)
            return tuple(self._open())

    def put(self, want_id: str, pieces: Iterable[bytes]) -> None:
        """Bring the bytes of a want, piece by piece; outside of the lock, since the source may be slow.

        NotFoundError when nobody waits for it (any more). DeliveryError when they are too many, or not those wanted:
        whoever waits is told the same. What ``pieces`` raises passes through, and the want stays open for another try.
        """
        entry = self._entry(want_id)
        try:
            data = take(entry.want, pieces)
        except DeliveryError as error:
            self._end(entry, None, error)
            raise
        self._end(entry, data, None)

    def fail(self, want_id: str, code: Delay, text: str) -> None:
        """Say that the bytes will not come. NotFoundError when nobody waits for them."""
        self._end(self._entry(want_id), None, DelayError(code, text))

    def stop(self) -> None:
        """Whoever waits is told, and nobody begins to wait again."""
        with self._changed:
            self._stopped = True
            for entry in self._open_entries():
                entry.error, entry.ended = DelayError("stopped", "the agent is stopping"), True
            self._changed.notify_all()

    def _entry(self, want_id: str) -> _Waiting:
        with self._changed:
            entry = self._waiting.get(want_id)
            if entry is None or entry.ended:
                raise NotFoundError(f"cannot take '{want_id}': nobody waits for it")
            return entry

    def _end(self, entry: _Waiting, data: bytes | None, error: DeliveryError | DelayError | None) -> None:
        with self._changed:
            if not entry.ended:
                entry.data, entry.error, entry.ended = data, error, True
            self._changed.notify_all()

    def _open(self) -> list[Want]:
        return [entry.want for entry in self._open_entries()]

    def _open_entries(self) -> list[_Waiting]:
        return [entry for entry in self._waiting.values() if not entry.ended]


def take(want: Want, pieces: Iterable[bytes]) -> bytes:
    """The bytes of a want, no more of them than it says. DeliveryError too_long, wrong_content."""
    found = bytearray()
    for piece in pieces:
        if len(found) + len(piece) > want.most:
            raise DeliveryError("too_long", f"{want.path} has more than {want.most} bytes")
        found += piece
    if want.length is not None and len(found) != want.length:
        raise DeliveryError("wrong_content", f"{want.path} has {len(found)} bytes, {want.length} belong there")
    if want.sha256 is not None and hashlib.sha256(found).hexdigest() != want.sha256:
        raise DeliveryError("wrong_content", f"{want.path} has another digest than was promised")
    return bytes(found)


def ids(prefix: str = "w") -> Callable[[], str]:
    """Names for wants, one after the other."""
    numbers = itertools.count(1)
    return lambda: f"{prefix}{next(numbers)}"


# -- the repository's paths (docs/spec/delivery.md 2) -----------------------------------------------------------------


def manifest_target(model: str, version: str) -> str:
    """The target that is a version's manifest."""
    return f"models/{model}/{version}/model.json"


def payload_target(model: str, version: str, part: str) -> str:
    """The target that is the payload of a file of a version."""
    return f"models/{model}/{version}/payload/{part}"


def header_target(model: str, version: str, part: str) -> str:
    """The target that is the payload's age header for the operator: before the payload, it makes an age file."""
    return f"models/{model}/{version}/header/{part}"


def target_file(target: str, sha256: str) -> str:
    """Where a target lies below ``targets``: with its digest before its name (TUF 1.0.34, 6.2)."""
    folder, _, name = target.rpartition("/")
    return f"{folder}/{sha256}.{name}" if folder else f"{sha256}.{name}"
