"""A look into a store that another process has open: reads only, takes no lock, changes nothing.

The owner goes on meanwhile, so that what is read may be swept: whoever looks tries again.
"""

from __future__ import annotations

from pathlib import Path

from agent.base.errors import DamagedError
from agent.store.age import AgeError
from agent.store.blobs import Blobs
from agent.store.catalog import Catalog
from agent.store.document import BlobRef, CatalogDocument
from agent.store.faults import storage
from agent.store.headers import file_key
from agent.store.keys import Keys
from agent.store.memory import Plaintext
from agent.store.pace import Pace


class Glimpse:
    """The newest generation of the store below ``root``, under the keys of the device."""

    def __init__(self, root: Path, keys: Keys) -> None:
        with storage("cannot look into store"):
            self._ring = {secret.key_id: secret for secret in reversed(keys.load(create=False))}
            catalog = Catalog(root, random=_no_bytes, step=lambda name: None)
            found = catalog.load(catalog.numbers()[0], self._ring) if catalog.numbers() else None
        self._blobs = Blobs(root / "blobs", Pace(lambda: 0.0), step=lambda name: None)
        self.document = found.document if found is not None else CatalogDocument()

    def read(self, ref: BlobRef) -> Plaintext:
        """A blob's plaintext, in memory. DamagedError, also where it was swept meanwhile."""
        with storage(f"cannot read {ref.part}"):
            try:
                return self._blobs.decrypt(ref, file_key(self._blobs, ref, self._ring))
            except AgeError as error:
                raise DamagedError(f"cannot read {ref.model} {ref.version} {ref.part}: {error}") from error


def _no_bytes(count: int) -> bytes:
    raise AssertionError("a look writes nothing")
