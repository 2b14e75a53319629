"""The catalog for people and programs that ask. Pure."""

from __future__ import annotations

from typing import Any

from agent.operations.batching import gains_of
from agent.store.document import CatalogDocument, ModelEntry, VersionEntry


def list_models(document: CatalogDocument) -> list[dict[str, Any]]:
    """One row a version, the active one of each model first."""
    rows = []
    for name, model in sorted(document.models.items()):
        for version, entry in sorted(model.versions.items(), key=lambda item: (item[0] != model.active, item[0])):
            rows.append(_row(name, version, model, entry))
    return rows


def describe_model(name: str, model: ModelEntry) -> dict[str, Any]:
    """A model whole: versions with manifest, choice and measurements."""
    return {
        "name": name,
        "active": model.active,
        "previous": model.previous,
        "versions": {
            version: {
                **_row(name, version, model, entry),
                "manifest": entry.manifest.model_dump(mode="json"),
                "explain": (entry.choice or {}).get("explain"),
                "order": (entry.choice or {}).get("order", []),
                "forms": (entry.choice or {}).get("forms", {}),
                "quarantine": entry.quarantine,
                "batching": gains_of(entry).get(entry.chosen or ""),
                "beside": (entry.choice or {}).get("beside"),
                "probation": (entry.choice or {}).get("probation"),
            }
            for version, entry in model.versions.items()
        },
    }


def _row(name: str, version: str, model: ModelEntry, entry: VersionEntry) -> dict[str, Any]:
    measured = entry.measurements.get(entry.chosen or "", {})
    return {
        "name": name,
        "version": version,
        "active": model.active == version,
        "task": entry.manifest.task,
        "origin": entry.origin,
        "added_at": entry.added_at,
        "variants": len(entry.manifest.variants),
        "chosen": entry.chosen,
        "p50_ms": measured.get("p50_ms"),
        "p95_ms": measured.get("p95_ms"),
        "bytes": sum(ref.payload_size for ref in entry.blobs.values()),
        "damaged": list(entry.damaged),
    }
