"""Quarantine: a candidate that crashed, hung or was killed for its memory too often is not tried again.

One such end may be the device's fault (memory was short, the board was hot), so it takes ``LIMIT`` of them. They count
for one measurement key: another runtime, driver mode or file is another chance. A success does not wipe the count,
since a candidate that kills its process every other day is no better for the days between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from agent.base.errors import DamagedError
from agent.selection.measurements import MeasurementKey

LIMIT = 3
#: Deaths remembered of one candidate; the configuration's limit may be as high.
_REMEMBERED = 100

#: The failures that count; ``memory`` is the kernel's OOM killer or the child's own limit.
Death = Literal["crash", "hang", "memory"]
_WORDS = {"crash": "crashed", "hang": "hung", "memory": "ran out of memory"}
_TIMES = {1: "once", 2: "twice"}


@dataclass(frozen=True, slots=True)
class Record:
    """Deaths of one candidate under one key, oldest first."""

    key: MeasurementKey
    deaths: tuple[Death, ...]


@dataclass(frozen=True, slots=True)
class QuarantineState:
    """Deaths by candidate, where candidates are named as the caller likes (``model/version/candidate``)."""

    records: Mapping[str, Record] = field(default_factory=lambda: MappingProxyType({}))

    def after(self, name: str, key: MeasurementKey, death: Death) -> QuarantineState:
        """The state after one more death. Deaths under another key are forgotten."""
        record = self.records.get(name)
        before = record.deaths if record is not None and record.key == key else ()
        deaths = (*before, death)[-_REMEMBERED:]
        return QuarantineState({**self.records, name: Record(key, deaths)})

    def without(self, name: str) -> QuarantineState:
        """The state with that candidate forgiven: removed, or released by an operator."""
        return QuarantineState({other: record for other, record in self.records.items() if other != name})

    def reason(self, name: str, key: MeasurementKey, limit: int = LIMIT) -> str | None:
        """Why the candidate is quarantined under ``key``: ``crashed twice, hung once``; None when it is not."""
        record = self.records.get(name)
        if record is None or record.key != key or len(record.deaths) < limit:
            return None
        counts = {death: record.deaths.count(death) for death in dict.fromkeys(record.deaths)}
        said = [f"{_WORDS[death]} {_TIMES.get(count, f'{count} times')}" for death, count in counts.items()]
        return ", ".join(said)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object."""
        return {name: {"key": r.key.to_json(), "deaths": list(r.deaths)} for name, r in self.records.items()}

    @classmethod
    def from_json(cls, document: object) -> QuarantineState:
        """The state in a JSON object; DamagedError when it is none."""
        if not isinstance(document, dict):
            raise DamagedError("cannot read quarantine: not an object")
        return cls({str(name): _record(name, entry) for name, entry in document.items()})


def _record(name: str, entry: object) -> Record:
    if not isinstance(entry, dict) or set(entry) != {"key", "deaths"} or not isinstance(entry["deaths"], list):
        raise DamagedError(f"cannot read quarantine: entry {name} is not a key with its deaths")
    if any(death not in get_args(Death) for death in entry["deaths"]):
        raise DamagedError(f"cannot read quarantine: entry {name} has an unknown way to die")
    return Record(MeasurementKey.from_json(entry["key"]), tuple(entry["deaths"]))
