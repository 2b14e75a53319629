"""What trials have found out, as operations hand it around, and whether it still holds on this device.

Apart from ``choosing``, which brings in everything that tries and decides: core asks after each start whether its
measurements hold, and most starts need no more than that answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.bundles.manifest import Manifest
from agent.hardware.facts import Facts
from agent.hardware.profiles import Profile
from agent.selection.inventory import RuntimeInventory
from agent.selection.measurements import Measurement, MeasurementKey, measurement_key
from agent.selection.rules import Candidate, candidate_of
from agent.store.document import BlobRef, CatalogDocument, VersionEntry

#: Told of each step. Whatever it raises ends the operation there: that is how a stop reaches it.
Progress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided. ``document`` holds ``order`` (candidate ids, best first), ``explain`` and ``runtimes``."""

    chosen: str | None
    document: dict[str, Any]
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    quarantine: dict[str, dict[str, Any]] = field(default_factory=dict)
    why: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Active:
    """The version that answers now, for a new one to be held against. ``slower``: one that is slower is taken, too."""

    version: str
    entry: VersionEntry
    slower: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What earlier trials of the version left: measurements and quarantine by candidate id.

    ``runtimes``: version and providers of those that there were, as ``runtimes_for`` had it; empty when nobody noted.
    ``active``: the version that it is to take the place of.
    """

    measurements: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quarantine: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runtimes: Mapping[str, Any] = field(default_factory=dict)
    active: Active | None = None


def active_beside(document: CatalogDocument, name: str, version: str, *, slower: bool = False) -> Active | None:
    """What ``version`` is to take the place of, if another version answers now."""
    model = document.models.get(name)
    if model is None or model.active in (None, version):
        return None
    assert model.active is not None
    return Active(model.active, model.versions[model.active], slower)


def known_of(entry: VersionEntry) -> Known:
    """What the catalog keeps of a version's trials."""
    noted = (entry.choice or {}).get("runtimes")
    return Known(entry.measurements, entry.quarantine, noted if isinstance(noted, dict) else {})


def runtimes_for(manifest: Manifest, inventory: RuntimeInventory) -> dict[str, Any]:
    """The installed runtimes that the manifest has variants for, as plain JSON values."""
    found = {name: inventory.get(name) for name in sorted({variant.runtime for variant in manifest.variants})}
    return {
        name: {"version": installed.version, "providers": sorted(installed.providers)}
        for name, installed in found.items()
        if installed is not None
    }


@dataclass(frozen=True, slots=True)
class DeviceView:
    """The device as the choice needs it; the callables answer for the moment of the call."""

    facts: Facts
    profile: Profile
    threads: int
    cpus: tuple[int, ...]
    inventory: Callable[[], RuntimeInventory]
    headroom_mb: Callable[[], int]
    power_mode: Callable[[], str | None]
    #: What there is for models in all; None: not known.
    budget_mb: float | None = None


#: (manifest, blobs, what is known, shapes for made-up inputs, progress) -> choice
ChooseVariant = Callable[[Manifest, Mapping[str, BlobRef], Known, Mapping[str, list[int]], Progress], Choice]


def key_on(device: DeviceView, candidate: Candidate, inventory: RuntimeInventory, manifest: Manifest) -> MeasurementKey:
    """What a measurement of that candidate on this device depends on."""
    installed = inventory.get(candidate.runtime)
    return measurement_key(
        variant_digest=candidate.digest,
        runtime=candidate.runtime,
        runtime_version=installed.version if installed else "",
        provider=candidate.provider,
        threads=device.threads,
        features=device.facts.features,
        power_mode=device.power_mode(),
        golden_digest=manifest.golden.file.sha256 if manifest.golden else None,
    )


def outdated(device: DeviceView, manifest: Manifest, known: Known, chosen: str | None) -> tuple[str, ...]:
    """What has changed since the version was tried: ``("runtime_version: 1.31.0 -> 1.32.0",)``.

    A provider or a runtime that has come or gone counts too: who was tried then is not who could be tried now.
    """
    document = known.measurements.get(chosen or "")
    if document is None:
        return ("no variant was measured",)
    measurement = Measurement.from_json(dict(document))
    variant = manifest.variant(measurement.candidate_id.partition("@")[0])
    candidate = candidate_of(variant, measurement.key.provider)
    inventory = device.inventory()
    changes = measurement.key.changes(key_on(device, candidate, inventory, manifest))
    return changes or _come_and_gone(known.runtimes, runtimes_for(manifest, inventory))


def _come_and_gone(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    if not before or before == now:
        return ()
    return tuple(
        f"{name}: {_named(before.get(name))} -> {_named(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


def _named(runtime: Mapping[str, Any] | None) -> str:
    return f"{runtime['version']} with {', '.join(runtime['providers'])}" if runtime else "none"
