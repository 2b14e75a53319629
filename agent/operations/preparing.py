"""Making a version's prepared forms: in a child, judged, encrypted. A form that cannot be had fails nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from agent.base.errors import AgentError
from agent.bundles.manifest import Manifest
from agent.infer.forms import needs_file
from agent.infer.preparing import SECONDS, Prepared, prepared
from agent.infer.trial import Surroundings
from agent.operations.entering import chosen_entrant, plan_for_one
from agent.operations.forms import PREFIX, FormKey, Forms
from agent.operations.measured import Choice, DeviceView, Progress
from agent.store.document import BlobRef
from agent.store.store import Store

_PIECE_BYTES = 1 << 20
_LOG = logging.getLogger("edge_agent.operations")


class FormMaker:
    """Blocking; one at a time."""

    def __init__(
        self,
        device: DeviceView,
        store: Store,
        key: FormKey,
        around: Surroundings,
        *,
        timeout_s: float = 120.0,
        seconds: float = SECONDS,
    ) -> None:
        self._device = device
        self._store = store
        self._key = key
        self._timeout_s = timeout_s
        self._seconds = seconds
        self._around = around

    def __call__(self, manifest: Manifest, blobs: Mapping[str, BlobRef], choice: Choice, progress: Progress) -> Forms:
        """The forms of the chosen candidate. Raises only what ends the whole operation (``around.go_on``)."""
        variant_id, _, provider = (choice.chosen or "").partition("@")
        if not variant_id or not (key := self._key(manifest.variant(variant_id), provider)):
            return Forms()
        candidate = str(choice.chosen)
        progress({"stage": "prepare", "candidate": candidate})
        try:
            entrant = chosen_entrant(self._device, candidate, manifest, blobs, self._store.read)
            plan = plan_for_one(self._device, manifest, blobs, self._store.read, self._timeout_s)
            with prepared(entrant, plan, self._around, self._seconds) as found:
                return self._kept(manifest, candidate, key, found)
        except AgentError as error:
            self._around.go_on()  # ends the operation, if that is what the error was
            _LOG.warning("model %s %s is not prepared: %s", manifest.name, manifest.version, error)
            return Forms()

    def _kept(self, manifest: Manifest, candidate: str, key: str, found: Prepared) -> Forms:
        """Encrypt the file, if there is one to keep, and write down what was found."""
        record: dict[str, Any] = {
            "key": key,
            "forms": [figures.to_json() for figures in found.forms],
            "plain": found.plain.to_json() if found.plain else None,
            "threads": found.threads,
            "part": None,
            "note": found.note,
        }
        if found.descriptor is None or not needs_file(found.forms):
            return Forms({candidate: record})
        part = record["part"] = f"{PREFIX}{candidate}/{key[:12]}"
        ref = self._store.add_blob(manifest.name, manifest.version, part, _pieces(found.descriptor))
        return Forms({candidate: record}, {part: ref})


def _pieces(descriptor: int) -> Iterator[bytes]:
    """A file from its beginning, by position: the child may have moved the one that we share."""
    offset = 0
    while piece := os.pread(descriptor, _PIECE_BYTES, offset):
        yield piece
        offset += len(piece)
