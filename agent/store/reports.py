"""What the store's longer operations answer with. Values only; sizes are bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.store.document import BlobRef

#: Told how much is done and how much there is in all: bytes for ``verify``, headers for ``rotate_key``.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DamagedBlob:
    """A blob that cannot be read, and why."""

    ref: BlobRef
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found."""

    blobs: int
    payload_bytes: int
    damaged: tuple[DamagedBlob, ...]


@dataclass(frozen=True, slots=True)
class GcReport:
    """What ``gc`` deleted."""

    files: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class RotateReport:
    """What ``rotate_key`` did. ``action`` is what the integrator must still do, or empty."""

    old_key: str
    new_key: str
    headers: int
    damaged: tuple[DamagedBlob, ...]
    action: str


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A device secret that there is: the id of its key, where it comes from, its name there."""

    key_id: str
    source: str
    name: str


@dataclass(frozen=True, slots=True)
class StoreStats:
    """``used_bytes`` counts against the quota; ``unreached_bytes`` is what ``gc`` would free.

    ``keys``: every device secret that was found, the one in use (``key_id``) among them.
    """

    quota_bytes: int
    used_bytes: int
    reserved_bytes: int
    unreached_bytes: int
    disk_free_bytes: int
    models: int
    versions: int
    blobs: int
    plaintext_bytes: int
    damaged: int
    generation: int
    key_id: str
    key_source: str
    keys: tuple[KnownKey, ...]
