"""A new version beside the one that answers now, by what was measured of both on this device. Pure.

The new one's chosen variant ran in the same rounds as the active one's where the inputs of one are inputs of the other;
else what was recorded of both is compared, as far as it still holds. What cannot be compared is no reason to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.bundles.manifest import Manifest
from agent.operations.measured import Active
from agent.operations.probation import LEAST_MS
from agent.selection.measurements import Measurement
from agent.selection.noise import Comparison, compare_rounds, compare_unpaired
from agent.store.document import VersionEntry

HOW_TO_TAKE_IT = "to take it all the same: edge-agent models add --accept-slower, or accept_slower in policy or job"


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much slower a version may be, and how much memory models may take."""

    max_latency_ratio: float = 1.5
    budget_mb: float | None = None


def same_inputs(one: Manifest, other: Manifest) -> bool:
    """Whether what one version takes, the other does, too."""
    return [spec.model_dump(exclude={"optional"}) for spec in one.inputs] == [
        spec.model_dump(exclude={"optional"}) for spec in other.inputs
    ]


def same_signature(one: Manifest, other: Manifest) -> bool:
    """Whether an answer of one version can be held against an answer of the other."""
    return same_inputs(one, other) and one.outputs == other.outputs


def compared(
    manifest: Manifest,
    new: Measurement,
    active: Active,
    old: Measurement | None,
    bounds: Bounds,
    agreement_before: float | None = None,
) -> dict[str, Any]:
    """The record for the choice's story. ``worse``: why the version is not taken, empty where it is.

    ``old``: the active version's chosen variant, measured with the new one or recorded; None: nothing holds.
    ``agreement_before``: of the new version with the golden set of the active one.
    """
    latency = _latency(new, old)
    slower = "" if active.slower else _slower(manifest, new, old, latency, active.version, bounds)
    reasons = [reason for reason in (slower, _larger(new, bounds)) if reason]
    return {
        "version": active.version,
        "chosen": active.entry.chosen,
        "how": _how(latency),
        "latency": None
        if latency is None or old is None
        else {
            "p50_ms": new.p50_ms,
            "active_p50_ms": old.p50_ms,
            "ratio": round(latency.ratio, 4),
            "most": None if active.slower else bounds.max_latency_ratio,
        },
        "memory": {"peak_mb": new.peak_mb, "active_peak_mb": old.peak_mb if old is not None else None},
        "agreement": {
            "metric": new.agreement_metric,
            "new": new.agreement,
            "active": old.agreement if old is not None and _together(new, old) else None,
            "new_on_active_golden": agreement_before,
        },
        "worse": "; ".join(reasons),
        "mend": HOW_TO_TAKE_IT if slower else "",
    }


def _together(new: Measurement, old: Measurement) -> bool:
    return new.session != "" and new.session == old.session


def _latency(new: Measurement, old: Measurement | None) -> Comparison | None:
    if old is None or not new.p50_ms or not old.p50_ms:
        return None
    if _together(new, old) and (paired := compare_rounds(new.round_ms, old.round_ms)) is not None:
        return paired
    return compare_unpaired(new.p50_ms, old.p50_ms)


def _how(latency: Comparison | None) -> str:
    if latency is None:
        return "not compared"
    return "measured together" if latency.rounds else "recorded"


def _slower(
    manifest: Manifest,
    new: Measurement,
    old: Measurement | None,
    latency: Comparison | None,
    version: str,
    bounds: Bounds,
) -> str:
    """Why it is too slow. Never where it keeps to the policy's own limit, nor for less than a request costs anyway."""
    if latency is None or old is None or new.p50_ms is None or old.p50_ms is None:
        return ""
    limit = manifest.policy.max_latency_ms
    if limit is not None and new.p95_ms is not None and new.p95_ms <= limit:
        return ""
    if latency.ratio <= bounds.max_latency_ratio or not latency.slower or new.p50_ms - old.p50_ms <= LEAST_MS:
        return ""
    return (
        f"it takes {latency.ratio:.1f} x as long as {version} here ({new.p50_ms:.3g} ms, {old.p50_ms:.3g} ms),"
        f" {bounds.max_latency_ratio:g} x is allowed"
    )


def _larger(new: Measurement, bounds: Bounds) -> str:
    if bounds.budget_mb is None or new.peak_mb is None or new.peak_mb <= bounds.budget_mb:
        return ""
    return f"it takes {new.peak_mb:.0f} MB, {bounds.budget_mb:.0f} MB are for models"


def compared_by_record(entry: VersionEntry, active: Active, bounds: Bounds, *, holds: bool) -> dict[str, Any]:
    """The record of an installed version, from what the catalog has of both. ``holds``: what it has of the active one.
    Empty where nothing is known of the version itself."""
    new = recorded(entry.measurements.get(entry.chosen or ""))
    if new is None:
        return {}
    old = recorded(active.entry.measurements.get(active.entry.chosen or "")) if holds else None
    return compared(entry.manifest, new, active, old, bounds)


def recorded(document: Mapping[str, Any] | None) -> Measurement | None:
    """A measurement out of the catalog, if it is of one that ran."""
    found = Measurement.from_json(dict(document)) if document is not None else None
    return found if found is not None and found.ok else None
