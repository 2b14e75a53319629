"""Looking after the store: verify, collect garbage, rotate the key, count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from agent.operations.measured import Progress
from agent.store.document import CatalogDocument
from agent.store.store import Store


class Maintenance:
    """Blocking; one operation at a time. ``show`` tells the serving side that the catalog has changed."""

    def __init__(self, store: Store, show: Callable[[CatalogDocument], None]) -> None:
        self._store = store
        self._show = show

    def verify(self, progress: Progress, *, model: str | None = None) -> dict[str, Any]:
        """Check every blob and mark what is damaged; with ``model``, report on that one alone."""
        report = self._store.verify(_counting("verifying", progress))
        self._show(self._store.document)
        damaged = [
            {"model": blob.ref.model, "version": blob.ref.version, "part": blob.ref.part, "reason": blob.reason}
            for blob in report.damaged
            if model in (None, blob.ref.model)
        ]
        return {"ok": not damaged, "blobs": report.blobs, "bytes": report.payload_bytes, "damaged": damaged}

    def gc(self) -> dict[str, Any]:
        """Delete what nothing reaches."""
        return dataclasses.asdict(self._store.gc())

    def rotate_key(self, progress: Progress, *, to_file: bool = False) -> dict[str, Any]:
        """Move every header to the next device secret."""
        report = self._store.rotate_key(_counting("rotating", progress), to_file=to_file)
        self._show(self._store.document)
        return {
            "old_key": report.old_key,
            "new_key": report.new_key,
            "headers": report.headers,
            "damaged": len(report.damaged),
            "action": report.action,
        }

    def stats(self) -> dict[str, Any]:
        """Sizes and counts."""
        return dataclasses.asdict(self._store.stats())


def _counting(stage: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress({"stage": stage, "done": done, "total": total})
