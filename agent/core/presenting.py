"""The device and its models as the fleet sees them: bounded, plain JSON values. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agent.hardware.facts import Facts
from agent.hardware.profiles import Profile
from agent.store.document import CatalogDocument

#: Long, and the same for every device with that profile.
_LEFT_OUT = ("profile_notes", "notes", "compatible")


def fleet_facts(facts: Facts, profile: Profile, problems: Sequence[str]) -> dict[str, Any]:
    """The document of ``edge-agent detect`` without its long texts."""
    from agent.hardware.document import document  # noqa: PLC0415 - a device without a fleet is asked by nobody

    found = document(facts, profile, problems)
    return {key: value for key, value in found.items() if key not in _LEFT_OUT}


def reported_models(
    catalog: CatalogDocument, quality: Callable[[str, str], dict[str, Any]] = lambda model, version: {}
) -> list[dict[str, Any]]:
    """One row a model: which version answers, by which variant, how well, and what else is installed."""
    rows = []
    for name, model in sorted(catalog.models.items()):
        entry = model.versions.get(model.active or "")
        rows.append(
            {
                "name": name,
                "active": model.active,
                "previous": model.previous,
                "pinned": model.pinned,
                "chosen": entry.chosen if entry else None,
                "damaged": list(entry.damaged) if entry else [],
                "versions": sorted(model.versions)[:16],
                **{what: value for what, value in quality(name, model.active or "").items() if value is not None},
            }
        )
    return rows
