"""The catalog as the engine's shelf. Pure but for the callables that open blobs.

Options stand in the order of the choice; a variant whose blob is damaged is left out, so that the
next one answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from agent.base.config import CascadeConfig, ModelConfig
from agent.bundles.manifest import Cascade, Manifest, cascade_problem
from agent.infer import cascade as stages
from agent.infer.cascade import splits
from agent.infer.shelf import CacheLimits, Option, Served, Shelf
from agent.operations.batching import Wish, as_wanted, shelved_batching
from agent.operations.forms import FormKey, no_forms, shelved_forms, shelved_threads
from agent.store.document import BlobRef, CatalogDocument, ModelEntry, VersionEntry

if TYPE_CHECKING:
    from agent.base.config import ModelConfig
    from agent.bundles.manifest import Manifest
    from agent.infer.trial import OpenModel

OpenBlob = Callable[[BlobRef], "OpenModel"]
#: Memory of a loaded model whose peak was never measured, as a multiple of its file: weights, packed weights, arena.
UNMEASURED_FACTOR = 3.0
UNMEASURED_MB = 8.0
NOTHING_WANTED: Mapping[str, ModelConfig] = MappingProxyType({})
#: Of a model by its name here, and by that in its manifest.
_Wanted = tuple[ModelConfig | None, ModelConfig | None]


class Shelves:
    """Makes the shelf of one catalog after the other, and of each only what has changed since the last.

    ``threads``: of one run, where nothing was measured.
    """

    def __init__(self, open_blob: OpenBlob, threads: int, form_key: FormKey = no_forms) -> None:
        self._open_blob = open_blob
        self._threads = threads
        self._form_key = form_key
        #: By model and version: the entry, what the owner wants of it, and what was made of both.
        self._made: dict[tuple[str, str], tuple[VersionEntry, _Wanted, Served]] = {}

    def shelf(self, document: CatalogDocument, wanted: Mapping[str, ModelConfig] = NOTHING_WANTED) -> Shelf:
        """Everything that is installed. ``wanted``: by the device's owner, for single models."""
        before, self._made = self._made, {}
        wish = as_wanted(wanted)
        for name, model in document.models.items():
            for version, entry in model.versions.items():
                made, settings = before.get((name, version)), (wanted.get(name), wanted.get(entry.manifest.name))
                if made is None or made[0] is not entry or made[1] != settings:
                    served = _served(name, version, entry, self._open_blob, self._threads, self._form_key, wish)
                    made = entry, settings, _as_set(served, entry.manifest, settings[0])
                self._made[name, version] = made
        active = {name: model.active for name, model in document.models.items() if model.active is not None}
        return Shelf({key: served for key, (_, _, served) in self._made.items()}, active)


def _as_set(served: Served, manifest: Manifest, settings: ModelConfig | None) -> Served:
    """What the manifest, and over it the device's configuration, say of how the options answer."""
    said: Cascade | CascadeConfig | Literal[False] | None = manifest.policy.cascade
    served = replace(served, cache=_cache_limits(manifest, settings))
    if settings is not None:
        served = replace(served, governed=settings.governed)
        said = settings.cascade if settings.cascade is not None else said
    if not said:
        return served
    problem = cascade_problem(manifest, said)
    have = {option.variant for option in served.options}
    lacking = [name for name in (said.first, said.then) if name not in have]
    if not problem and lacking:
        problem = f"variant {lacking[0]} does not answer on this device"
    if problem:
        return replace(served, no_cascade=problem)
    output = said.output or manifest.outputs[0].name
    by_row = splits(served.inputs, served.outputs)
    cascade = stages.Cascade(said.first, said.then, said.threshold, output, said.measure, by_row)
    return replace(served, cascade=cascade, cache=None)  # which of the two answers depends on the moment, too


def order_of(entry: VersionEntry) -> list[str]:
    """Candidate ids of a version, best first."""
    order = (entry.choice or {}).get("order", [])
    return [str(candidate) for candidate in order] if isinstance(order, list) else []


def active_entry(model: ModelEntry) -> VersionEntry | None:
    """The entry of the active version."""
    return model.versions.get(model.active) if model.active is not None else None


def _served(
    name: str, version: str, entry: VersionEntry, open_blob: OpenBlob, threads: int, form_key: FormKey, wish: Wish
) -> Served:
    manifest = entry.manifest
    options, missing, qualities = [], [], _qualities(entry)
    for candidate in order_of(entry):
        variant_id, _, provider = candidate.partition("@")
        variant = manifest.variant(variant_id)
        ref = entry.blobs.get(variant.file.name)
        if ref is None or variant.file.name in entry.damaged:
            missing.append(f"{variant_id} is damaged or missing")
            continue
        measured: dict[str, Any] = entry.measurements.get(candidate, {})
        most_threads = int((measured.get("key") or {}).get("threads", threads))
        batching = shelved_batching(entry, candidate, wish)
        joins = batching is not None and batching.size > 1  # a batch gains from threads where a lone request does not
        option = Option(
            candidate=candidate,
            variant=variant_id,
            runtime=variant.runtime,
            provider=provider,
            threads=most_threads if joins else shelved_threads(entry, candidate, form_key, most_threads),
            need_mb=_need_mb(measured, ref),
            open_model=partial(open_blob, ref),
            p95_ms=measured.get("p95_ms"),
            parameters=variant.parameters,
            digest=ref.payload,
            size=ref.size,
            load_s=_load_s(measured),
            shares=variant.runtime == "tflite",  # it maps the file and leaves the weights there
            batching=batching,
            p50_ms=measured.get("p50_ms"),
            joules=measured.get("joules"),
            quality=qualities.get(candidate),
        )
        forms = shelved_forms(entry, candidate, option.plain(), form_key, open_blob)
        options.append(replace(option, forms=forms))
    reason = "" if options else "; ".join(missing) or "no variant was accepted on this device"
    return Served(
        name, version, manifest.inputs, manifest.outputs, tuple(options), reason, manifest.labels, manifest.task
    )


def _cache_limits(manifest: Manifest, wanted: ModelConfig | None) -> CacheLimits | None:
    """The device's owner decides, else whoever packed the model."""
    policy = manifest.cache if wanted is None or wanted.cache is None else wanted.cache or None
    return CacheLimits(policy.ttl_s, int(policy.max_mb * (1 << 20)), policy.prewarm) if policy is not None else None


def _qualities(entry: VersionEntry) -> dict[str, float]:
    """The qualities by which candidates were compared, as ``models explain`` shows them. Others cannot be compared."""
    document: Any = (entry.choice or {}).get("explain")
    rows = document.get("candidates", ()) if isinstance(document, dict) else ()
    found = {}
    for row in rows:
        quality = (row.get("measured") or {}).get("quality")
        if isinstance(quality, dict) and isinstance(quality.get("value"), (int, float)):
            found[str(row.get("id"))] = float(quality["value"])
    return found


def _load_s(measured: dict[str, Any]) -> float:
    took = measured.get("load_ms")
    return float(took) / 1000 if isinstance(took, (int, float)) and took > 0 else 0.0


def _need_mb(measured: dict[str, Any], ref: BlobRef) -> float:
    peak = measured.get("peak_mb")
    size_mb = ref.size / (1 << 20)
    return float(peak) if isinstance(peak, (int, float)) and peak > 0 else UNMEASURED_MB + UNMEASURED_FACTOR * size_mb
