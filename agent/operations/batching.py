"""What joining requests gains, in the catalog and on the shelf: measured when it is asked for, kept with the choice.

A record stands in the version's choice, under ``batching`` by candidate. It holds as long as the candidate's own
measurement, under the same key, and as far as the sizes go that were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from agent.bundles.manifest import BatchingPolicy, Manifest
from agent.infer.gains import Batching, Gain, decide, described
from agent.store.document import VersionEntry

if TYPE_CHECKING:
    from agent.base.config import ModelConfig

#: Raised when batches are tried otherwise than before.
_RECIPE = 1

#: (manifest) -> how its requests shall be joined: as the device's owner says, else the manifest; None: not at all
Wish = Callable[[Manifest], BatchingPolicy | None]


def as_wanted(wanted: Mapping[str, ModelConfig]) -> Wish:
    """The wish with what the device's owner wants of single models, by name."""

    def wish(manifest: Manifest) -> BatchingPolicy | None:
        own = wanted.get(manifest.name)
        if own is None or own.batching is None:
            return manifest.batching
        if own.batching is False:
            return None
        return BatchingPolicy(max_size=own.batching.max_size, max_delay_us=own.batching.max_delay_us)

    return wish


def gain_record(measurement: Mapping[str, Any], policy: BatchingPolicy, gain: Gain) -> dict[str, Any]:
    """The record of what was measured beside ``measurement``, and what follows from it, for people."""
    return {
        "recipe": _RECIPE,
        "key": measurement.get("key"),
        "max_size": policy.max_size,
        **gain.to_json(),
        "decided": described(decide(gain, policy.max_size, policy.max_delay_us / 1e6)),
    }


def gains_of(entry: VersionEntry) -> Mapping[str, Any]:
    """The records of a version by candidate."""
    records = (entry.choice or {}).get("batching")
    return records if isinstance(records, dict) else {}


def gains_hold(entry: VersionEntry, wish: Wish) -> bool:
    """Whether nothing is left to measure: joining is not asked for, or was tried as far as it is."""
    policy = wish(entry.manifest)
    if policy is None or policy.max_size < 2 or entry.chosen is None:
        return True
    return _valid(entry, entry.chosen, policy.max_size) is not None


def shelved_batching(entry: VersionEntry, candidate: str, wish: Wish) -> Batching | None:
    """How requests for a candidate are joined; None where nobody asks for it."""
    policy = wish(entry.manifest)
    if policy is None:
        return None
    delay_s = policy.max_delay_us / 1e6
    record = _valid(entry, candidate, policy.max_size)
    try:
        gain = Gain.from_json(record) if record is not None else Gain(note="was not measured for this variant yet")
    except (KeyError, TypeError, ValueError):
        gain = Gain(note="what was measured cannot be read")
    return decide(gain, policy.max_size, delay_s)


def _valid(entry: VersionEntry, candidate: str, max_size: int) -> Mapping[str, Any] | None:
    record = gains_of(entry).get(candidate)
    measurement = entry.measurements.get(candidate)
    if not isinstance(record, dict) or measurement is None or record.get("recipe") != _RECIPE:
        return None
    tried = record.get("max_size")
    enough = bool(record.get("note")) or (isinstance(tried, int) and tried >= max_size)
    return record if enough and record.get("key") == measurement.get("key") else None
