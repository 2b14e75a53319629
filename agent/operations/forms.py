"""Prepared forms in the catalog: what they depend on, and what they become on the engine's shelf. Pure.

A record stands in the version's choice, under ``forms`` by candidate: a key of everything that it depends on, the
figures of the forms and of the plain model, how many threads a session is to have, and the part that holds the prepared
file. Where the key no longer holds, a model is opened as it came, until new forms have been made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from agent.bundles.manifest import Variant
from agent.hardware.facts import Facts
from agent.infer.forms import Figures
from agent.infer.runtimes.base import PLAIN
from agent.infer.shelf import Form
from agent.store.document import BlobRef, VersionEntry

if TYPE_CHECKING:
    from agent.operations.shelving import OpenBlob

#: Where prepared files stand among a version's parts. No file of a bundle has a slash in its name.
PREFIX = "prepared/"
#: Raised when what is prepared, or how it is chosen, changes.
_RECIPE = 5
_RUNTIME, _PROVIDER = "onnx", "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Forms:
    """What was made: records by candidate for the choice, and blobs by part that are not committed yet."""

    records: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, BlobRef] = field(default_factory=dict)


#: (variant, provider) -> a digest of all that forms of it depend on now; empty where none can be had
FormKey = Callable[[Variant, str], str]


def no_forms(_variant: Variant, _provider: str) -> str:
    """The key where nothing is prepared."""
    return ""


def form_keys(facts: Facts, threads: int, version_of: Callable[[str], str]) -> FormKey:
    """The keys on this device. ``version_of`` tells a runtime's version, empty where it is not installed."""
    features = [f"{name}{'' if value else '?'}" for name, value in sorted(facts.features.items()) if value is not False]

    def key(variant: Variant, provider: str) -> str:
        version = version_of(_RUNTIME) if (variant.runtime, provider) == (_RUNTIME, _PROVIDER) else ""
        if not version:
            return ""
        depends = [_RECIPE, variant.file.sha256, version, provider, threads, features, variant.parameters]
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]

    return key


def records_of(entry: VersionEntry) -> Mapping[str, Any]:
    """The records of a version by candidate."""
    records = (entry.choice or {}).get("forms")
    return records if isinstance(records, dict) else {}


def forms_hold(entry: VersionEntry, key: FormKey) -> bool:
    """Whether the chosen candidate's forms are as they should be: nothing has changed, and the file is whole."""
    if entry.chosen is None:
        return True
    variant_id, _, provider = entry.chosen.partition("@")
    now = key(entry.manifest.variant(variant_id), provider)
    record = records_of(entry).get(entry.chosen)
    if not now:
        return True
    return isinstance(record, dict) and record.get("key") == now and _file_of(entry, record) is not _MISSING


def _record_now(entry: VersionEntry, candidate: str, key: FormKey) -> Mapping[str, Any] | None:
    """The record of a candidate, where its key holds."""
    record = records_of(entry).get(candidate)
    variant_id, _, provider = candidate.partition("@")
    if not isinstance(record, dict) or record.get("key") != (key(entry.manifest.variant(variant_id), provider) or None):
        return None
    return record


def shelved_threads(entry: VersionEntry, candidate: str, key: FormKey, most: int) -> int:
    """How many threads a session of a candidate is to have: ``most`` where fewer were not found to do."""
    threads = (_record_now(entry, candidate, key) or {}).get("threads")
    return min(threads, most) if isinstance(threads, int) and threads > 0 else most


def shelved_forms(
    entry: VersionEntry, candidate: str, plain: Form, key: FormKey, open_blob: OpenBlob
) -> tuple[Form, ...]:
    """The forms to open a candidate in; empty where it is opened as it came, and nothing more is known."""
    record = _record_now(entry, candidate, key)
    if record is None:
        return ()
    ref = _file_of(entry, record)
    if ref is _MISSING:
        return ()
    try:
        figures = [Figures.from_json(one) for one in record.get("forms", ())]
        return tuple(_form(one, plain, ref if isinstance(ref, BlobRef) else None, open_blob) for one in figures)
    except (KeyError, TypeError, ValueError, StopIteration):
        return ()


class _Missing:
    """The file is named and not there."""


_MISSING = _Missing()


def _file_of(entry: VersionEntry, record: Mapping[str, Any]) -> BlobRef | _Missing | None:
    """The prepared file; None where the record needs none."""
    part = record.get("part")
    if part is None:
        return None
    ref = entry.blobs.get(str(part))
    return _MISSING if ref is None or part in entry.damaged else ref


def _form(figures: Figures, plain: Form, ref: BlobRef | None, open_blob: OpenBlob) -> Form:
    """ValueError for a form that needs a file when there is none."""
    if figures.route == PLAIN:
        open_model, digest, size = plain.open_model, plain.digest, plain.size
    elif ref is not None:
        open_model, digest, size = partial(open_blob, ref), ref.payload, ref.size
    else:
        raise ValueError(figures.name)
    return Form(
        figures.name,
        open_model,
        digest,
        figures.own,
        size,
        figures.shares,
        figures.load_s,
        figures.run_s,
        figures.route,
    )
