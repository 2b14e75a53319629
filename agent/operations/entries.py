"""Changes of the catalog, as installing, activating and taking back make them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.bundles.manifest import Manifest
from agent.operations.forms import PREFIX, Forms
from agent.operations.measured import Choice
from agent.operations.probation import Case
from agent.store.document import BlobRef, CatalogDocument, ModelEntry, VersionEntry

#: What stands beside a choice and tells of the version, whatever is chosen of it later.
_STORY = ("beside", "probation")


def with_model(document: CatalogDocument, name: str, model: ModelEntry | None) -> CatalogDocument:
    """The document with that model in place of the one that it had; None: with none."""
    models = {key: entry for key, entry in document.models.items() if key != name}
    if model is not None:
        models[name] = model
    return document.model_copy(update={"models": models})


def version_entry(manifest: Manifest, refs: Mapping[str, BlobRef], choice: Choice, now: str) -> VersionEntry:
    """What is kept of a version that was chosen from. Nobody vouches for it."""
    return VersionEntry(
        manifest=manifest,
        origin="unsigned",
        added_at=now,
        blobs=dict(refs),
        chosen=choice.chosen,
        choice=choice.document,
        measurements=choice.measurements,
        quarantine=choice.quarantine,
    )


def with_version(document: CatalogDocument, name: str, version: str, entry: VersionEntry) -> CatalogDocument:
    """The document with that version beside those of its model."""
    model = document.models.get(name, ModelEntry())
    return with_model(document, name, model.model_copy(update={"versions": {**model.versions, version: entry}}))


def with_choice(document: CatalogDocument, name: str, version: str, choice: Choice) -> CatalogDocument:
    """The version with another choice; what was noted of it beside the choice stays."""
    before = document.models[name].versions[version]
    kept = {what: record for what, record in (before.choice or {}).items() if what in _STORY}
    entry = before.model_copy(
        update={
            "chosen": choice.chosen,
            "choice": {**kept, **choice.document},
            "measurements": choice.measurements,
            "quarantine": choice.quarantine,
        }
    )
    return with_version(document, name, version, entry)


def with_forms(document: CatalogDocument, name: str, version: str, forms: Forms) -> CatalogDocument:
    """The version with these forms in place of those that it had."""
    return with_version(document, name, version, entry_with_forms(document.models[name].versions[version], forms))


def entry_with_forms(entry: VersionEntry, forms: Forms) -> VersionEntry:
    """The entry with these forms in place of those that it had."""
    blobs = {part: ref for part, ref in entry.blobs.items() if not part.startswith(PREFIX)} | forms.blobs
    choice = {**(entry.choice or {}), "forms": forms.records}
    damaged = tuple(part for part in entry.damaged if not part.startswith(PREFIX))
    return entry.model_copy(update={"blobs": blobs, "choice": choice, "damaged": damaged})


def with_gains(document: CatalogDocument, name: str, version: str, gains: Mapping[str, Any]) -> CatalogDocument:
    """The version with what joining its requests gains."""
    return with_version(document, name, version, entry_with_gains(document.models[name].versions[version], gains))


def entry_with_gains(entry: VersionEntry, gains: Mapping[str, Any]) -> VersionEntry:
    """The entry with what joining gains; nothing is noted where nobody asked for it."""
    return entry.model_copy(update={"choice": {**(entry.choice or {}), "batching": dict(gains)}}) if gains else entry


def with_active(document: CatalogDocument, name: str, version: str) -> CatalogDocument:
    """That version answers; the one that did is the way back."""
    model = document.models[name]
    if model.active == version:
        return document
    return with_model(document, name, model.model_copy(update={"active": version, "previous": model.active}))


def is_active(document: CatalogDocument, name: str, version: str) -> bool:
    """Whether that version answers."""
    model = document.models.get(name)
    return model is not None and model.active == version


def with_story(
    document: CatalogDocument, name: str, version: str, what: str, record: Mapping[str, Any]
) -> CatalogDocument:
    """The version with another record beside its choice."""
    entry = document.models[name].versions[version]
    choice = {**(entry.choice or {}), what: dict(record)}
    return with_version(document, name, version, entry.model_copy(update={"choice": choice}))


def taken_back(document: CatalogDocument, case: Case, record: Mapping[str, Any]) -> CatalogDocument:
    """The version before answers again, and the way back is as it was before ``case``; ``record``: why."""
    document = with_story(document, case.model, case.version, "probation", record)
    model = document.models[case.model]
    previous = case.previous if case.previous in model.versions and case.previous != case.version else None
    return with_model(document, case.model, model.model_copy(update={"active": case.before, "previous": previous}))


def without(document: CatalogDocument, name: str, version: str | None, instead: str | None = None) -> CatalogDocument:
    """The document without a version (None: the model); ``instead``: where a way back leads that led to it."""
    model = document.models[name]
    versions = {key: entry for key, entry in model.versions.items() if version not in (None, key)}
    if not versions:
        return with_model(document, name, None)
    active, previous = (key if key in versions else None for key in (model.active, model.previous))
    if active is None:
        active, previous = previous, None
    elif previous is None and instead in versions and instead != active:
        previous = instead
    return with_model(
        document, name, model.model_copy(update={"versions": versions, "active": active, "previous": previous})
    )
