"""What a trial found out about one candidate, and until when that holds.

A measurement is valid while its key is equal to the key of the moment: other bytes, another runtime, other CPU
features, another power mode, thread count or provider, another golden set or another way of measuring make it history.
Values are milliseconds, megabytes (MiB) and joules an inference. Rounds are interleaved: round *i* of every candidate
of a session ran within the same short while, so candidates of one session are compared round by round and drift
cancels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

from agent.base.errors import DamagedError

Outcome = Literal["ok", "rejected"]
#: Why a trial rejected: ``crash``, ``hang`` and ``memory`` may pass another day and count for quarantine, the others
#: are properties of the file on this device.
Failure = Literal["crash", "hang", "memory", "load", "error", "disagreement"]
EnergySource = Literal["measured", "estimated"]

#: Raised whenever trials measure otherwise than before, so that old figures are never compared with new ones.
METHOD = 1


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """Everything that a measurement depends on. Equal keys: the measurement still holds."""

    variant_digest: str
    runtime: str
    runtime_version: str
    provider: str
    threads: int
    cpu_features: tuple[str, ...] = ()
    power_mode: str = ""
    golden_digest: str = ""
    method: int = METHOD

    def changes(self, now: MeasurementKey) -> tuple[str, ...]:
        """What differs in ``now``, for people: ``("runtime_version: 1.31.0 -> 1.32.0",)``; empty when equal."""
        return tuple(
            f"{name}: {_plain(old)} -> {_plain(new)}"
            for name, old, new in ((f.name, getattr(self, f.name), getattr(now, f.name)) for f in _KEY_FIELDS)
            if old != new
        )

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object."""
        return {**dataclasses.asdict(self), "cpu_features": list(self.cpu_features)}

    @classmethod
    def from_json(cls, document: object) -> MeasurementKey:
        """The key in a JSON object; DamagedError names the field. An unknown field is an error: it changes the key."""
        fields = _object(document, "measurement key", {f.name for f in _KEY_FIELDS})
        features = fields.get("cpu_features")
        if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
            raise DamagedError("cannot read measurement key: cpu_features is not a list of texts")
        texts = {name: _text(fields, name) for name in _KEY_TEXTS}
        return cls(
            **texts, threads=_int(fields, "threads"), method=_int(fields, "method"), cpu_features=tuple(features)
        )


_KEY_FIELDS = dataclasses.fields(MeasurementKey)
_KEY_TEXTS = ("variant_digest", "runtime", "runtime_version", "provider", "power_mode", "golden_digest")


def measurement_key(
    *,
    variant_digest: str,
    runtime: str,
    runtime_version: str,
    provider: str,
    threads: int,
    features: Mapping[str, bool | None],
    power_mode: str | None = None,
    golden_digest: str | None = None,
) -> MeasurementKey:
    """The key of a run on this device now. ``features`` as detected: what is unknown is written down as ``name?``.

    Unknown is kept apart from absent, so that a file that becomes readable makes a new key rather than a wrong one.
    """
    present = [f"{name}{'' if value else '?'}" for name, value in features.items() if value is not False]
    return MeasurementKey(
        variant_digest=variant_digest,
        runtime=runtime,
        runtime_version=runtime_version,
        provider=provider,
        threads=threads,
        cpu_features=tuple(sorted(present)),
        power_mode=power_mode or "",
        golden_digest=golden_digest or "",
    )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate's trial.

    ``round_ms[i]`` is the median latency in round *i* of ``session``; None where this candidate did not run in that
    round (dropped as beaten, or the round was thrown away as throttled). ``p50_ms`` and ``p95_ms`` are medians over the
    rounds of each round's percentile: a foreign burst spoils one round, a tail of the candidate's own shows in all.
    ``agreement`` is the golden metric's value as measured here, None without a golden set. ``joules`` an inference.
    """

    candidate_id: str
    key: MeasurementKey
    outcome: Outcome = "ok"
    reason: str = ""
    failure: Failure | None = None
    session: str = ""
    round_ms: tuple[float | None, ...] = ()
    p50_ms: float | None = None
    p95_ms: float | None = None
    load_ms: float | None = None
    peak_mb: float | None = None
    agreement: float | None = None
    agreement_metric: str | None = None
    joules: float | None = None
    energy_source: EnergySource | None = None
    measured_at: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the candidate ran and answered rightly."""
        return self.outcome == "ok"

    @property
    def rounds(self) -> int:
        """How many rounds this candidate ran in."""
        return sum(value is not None for value in self.round_ms)

    def holds_for(self, key: MeasurementKey) -> bool:
        """Whether nothing has changed that the measurement depends on."""
        return self.key == key

    @classmethod
    def rejected(
        cls, candidate_id: str, key: MeasurementKey, failure: Failure, reason: str, **fields: Any
    ) -> Measurement:
        """A candidate that the trial turned down, with whatever was measured before it failed."""
        return cls(candidate_id, key, outcome="rejected", failure=failure, reason=reason, **fields)

    @classmethod
    def from_samples(
        cls,
        candidate_id: str,
        key: MeasurementKey,
        session: str,
        rounds: Sequence[Sequence[float] | None],
        **fields: Any,
    ) -> Measurement:
        """An accepted candidate from its samples: ``rounds[i]`` holds the single latencies (ms) of round *i*, or None.

        ValueError when a sample is not a positive finite number, or there is no sample at all.
        """
        ran = [samples for samples in rounds if samples]
        if not ran or not all(math.isfinite(value) and value > 0 for samples in ran for value in samples):
            raise ValueError(f"cannot use the samples of {candidate_id}: each must be a positive number of ms")
        return cls(
            candidate_id,
            key,
            session=session,
            round_ms=tuple(median(samples) if samples else None for samples in rounds),
            p50_ms=median(percentile(samples, 0.50) for samples in ran),
            p95_ms=median(percentile(samples, 0.95) for samples in ran),
            **fields,
        )

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object; ``from_json`` gives an equal measurement back."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "key": self.key.to_json(),
            "round_ms": list(self.round_ms),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, document: object) -> Measurement:
        """The measurement in a JSON object; DamagedError names the field. Unknown fields are errors."""
        fields = _object(document, "measurement", {f.name for f in dataclasses.fields(cls)})
        texts: dict[str, Any] = {name: _text(fields, name) for name in _TEXTS}
        numbers: dict[str, Any] = {name: _number(fields, name) for name in _NUMBERS}
        rounds, notes = fields.get("round_ms"), fields.get("notes")
        if not isinstance(rounds, list) or not isinstance(notes, list) or any(not isinstance(n, str) for n in notes):
            raise DamagedError("cannot read measurement: round_ms and notes must be lists")
        return cls(
            key=MeasurementKey.from_json(fields.get("key")),
            outcome=_one_of(fields, "outcome", Outcome),
            failure=_one_of(fields, "failure", Failure) if fields.get("failure") is not None else None,
            energy_source=_one_of(fields, "energy_source", EnergySource) if fields.get("energy_source") else None,
            agreement_metric=_text(fields, "agreement_metric") if fields.get("agreement_metric") is not None else None,
            round_ms=tuple(_number({"round_ms": value}, "round_ms") for value in rounds),
            notes=tuple(notes),
            **texts,
            **numbers,
        )


_TEXTS = ("candidate_id", "reason", "session", "measured_at")
_NUMBERS = ("p50_ms", "p95_ms", "load_ms", "peak_mb", "agreement", "joules")


def percentile(samples: Sequence[float], share: float) -> float:
    """The ``share`` quantile by linear interpolation between order statistics (Hyndman and Fan's type 7)."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def estimated_joules(watts: float, p50_ms: float) -> float:
    """Joules an inference where no sensor tells: the profile's watts under load for as long as the inference takes."""
    return watts * p50_ms / 1000.0


def _plain(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value) or "unknown"


def _object(document: object, what: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise DamagedError(f"cannot read {what}: not an object")
    if unknown := sorted(set(document) - known):
        raise DamagedError(f"cannot read {what}: unknown field {unknown[0]}")
    return document


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise DamagedError(f"cannot read measurement: {name} is not a text")
    return value


def _int(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DamagedError(f"cannot read measurement: {name} is not a whole number")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DamagedError(f"cannot read measurement: {name} is not a number")
    return float(value)


def _one_of(fields: Mapping[str, Any], name: str, choices: Any) -> Any:
    value = fields.get(name)
    if value not in get_args(choices):
        raise DamagedError(f"cannot read measurement: {name} is not one of {', '.join(get_args(choices))}")
    return value
