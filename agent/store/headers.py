"""Headers of blobs: made, opened and moved to another device key. What a header is for is taken from the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agent.store.age import AgeError
from agent.store.blobs import Blobs
from agent.store.document import BlobRef
from agent.store.keys import DeviceSecret
from agent.store.reports import DamagedBlob, Progress
from agent.store.sealing import SALT_BYTES, Purpose, blob_purpose, key_id_of, seal, unseal

Ring = Mapping[str, DeviceSecret]
Random = Callable[[int], bytes]


def put_header(blobs: Blobs, ref: BlobRef, file_key: bytes, secret: DeviceSecret, random: Random) -> BlobRef:
    """Write a header under ``secret``; returns the reference that names it. Durable on return. Raises OSError."""
    header = seal(file_key, secret.key_id, secret.kek, _purpose(ref), random(SALT_BYTES))
    return ref.model_copy(update={"header": blobs.put_header(ref.payload, header)})


def file_key(blobs: Blobs, ref: BlobRef, ring: Ring) -> bytes:
    """The key of a blob's payload. AgeError when the header is missing, altered, for something else or another key."""
    header = blobs.header(ref.header)
    key_id = key_id_of(header)
    secret = ring.get(key_id)
    if secret is None:
        raise AgeError(f"sealed under key {key_id}, which this device does not have")
    return unseal(header, key_id, secret.kek, _purpose(ref))


def reseal(
    blobs: Blobs, refs: Iterable[BlobRef], ring: Ring, target: DeviceSecret, random: Random, progress: Progress
) -> tuple[dict[BlobRef, BlobRef], list[DamagedBlob]]:
    """New headers for every blob not yet under ``target``. What does not open keeps its old one and is reported."""
    renewed: dict[BlobRef, BlobRef] = {}
    damaged: list[DamagedBlob] = []
    todo = list(refs)
    for done, ref in enumerate(todo, 1):
        try:
            if key_id_of(blobs.header(ref.header)) != target.key_id:
                renewed[ref] = put_header(blobs, ref, file_key(blobs, ref, ring), target, random)
        except AgeError as error:
            damaged.append(DamagedBlob(ref, str(error)))
        progress(done, len(todo))
    return renewed, damaged


def _purpose(ref: BlobRef) -> Purpose:
    return blob_purpose(ref.model, ref.version, ref.part, ref.size, ref.payload)
