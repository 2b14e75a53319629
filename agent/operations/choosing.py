"""Choosing the variant of a version for this device: filter, rank, try, decide.

The decisions are ``agent.selection``'s; here they meet the device: what is installed, what memory is free, what the
trial measured. Measurements whose key still holds are not repeated unless they must be compared with new ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.bundles.manifest import Manifest, Policy, TensorSpec
from agent.infer.tensors import fits
from agent.infer.trial import Surroundings, Trial, TrialPlan
from agent.operations.comparing import Bounds, compared, recorded, same_inputs, same_signature
from agent.operations.entering import beside_entrant, chosen_entrant, entrant_of, judged
from agent.operations.measured import Active, Choice, DeviceView, Known, Progress, key_on, outdated, runtimes_for
from agent.operations.shelving import OpenBlob
from agent.selection.choice import Decision, choose, contenders, more_rounds_needed
from agent.selection.explanation import explain
from agent.selection.inventory import RuntimeInventory, install_hint
from agent.selection.measurements import Measurement, MeasurementKey, estimated_joules
from agent.selection.prior import Prior, rank_by_prior
from agent.selection.quarantine import Death, QuarantineState
from agent.selection.rules import Candidate, Verdict, accepted, candidates
from agent.store.document import BlobRef

#: Failures that count for quarantine.
_DEATHS: Mapping[str, Death] = {"crash": "crash", "hang": "hang", "memory": "memory"}


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """The configuration's part of a trial plan."""

    candidates: int
    least_rounds: int
    most_rounds: int
    timeout_s: float
    memory_mb: int | None
    quarantine_after: int = 3
    max_latency_ratio: float = 1.5


@dataclass(frozen=True, slots=True)
class _Trying:
    """What is tried, and how it may be."""

    manifest: Manifest
    blobs: Mapping[str, BlobRef]
    shapes: Mapping[str, list[int]]
    headroom_mb: int
    progress: Progress


class VariantChooser:
    """Chooses by measuring. Blocking; one at a time."""

    def __init__(self, device: DeviceView, open_blob: OpenBlob, settings: TrialSettings, around: Surroundings) -> None:
        self._device = device
        self._open = open_blob
        self._settings = settings
        self._around = around

    def __call__(
        self,
        manifest: Manifest,
        blobs: Mapping[str, BlobRef],
        known: Known,
        shapes: Mapping[str, list[int]],
        progress: Progress,
    ) -> Choice:
        """See ``ChooseVariant``. Never raises for a candidate's fault: it becomes a row with its reason."""
        device = self._device
        inventory = device.inventory()
        headroom = device.headroom_mb()
        quarantine = QuarantineState.from_json(dict(known.quarantine))
        keys = {
            candidate.id: key_on(device, candidate, inventory, manifest)
            for candidate in (v.candidate for v in self._verdicts(manifest, blobs, inventory, headroom, {}))
        }
        dead = {
            name: reason
            for name, key in keys.items()
            if (reason := quarantine.reason(name, key, self._settings.quarantine_after))
        }
        verdicts = self._verdicts(manifest, blobs, inventory, headroom, dead)
        priors = rank_by_prior(accepted(verdicts), device.facts, device.profile)
        trying = _Trying(manifest, blobs, shapes, headroom, progress)
        measurements, beside = self._measure(trying, priors, keys, known)
        decision = choose(manifest.policy, measurements, priors)
        document = {
            "order": _order(decision),
            "explain": explain(manifest, verdicts, priors, decision, device.facts, device.profile),
            "runtimes": runtimes_for(manifest, inventory),
        }
        chosen, why, hint = decision.winner, _why_not(decision, verdicts), _hint(verdicts, inventory, device)
        if chosen is not None and known.active is not None:
            winner = next(m for m in measurements if m.candidate_id == chosen)
            record = document["beside"] = self._compared(trying, winner, known.active, beside)
            if record["worse"]:
                chosen, why, hint = None, record["worse"], record["mend"]
        return Choice(
            chosen=chosen,
            document=document,
            measurements={m.candidate_id: m.to_json() for m in measurements},
            quarantine=_counted(quarantine, measurements).to_json(),
            why=why,
            hint=hint,
        )

    def _compared(
        self, trying: _Trying, winner: Measurement, active: Active, beside: Measurement | None
    ) -> dict[str, Any]:
        """The winner held against the active version, with what was measured together or else what is recorded."""
        bounds = Bounds(self._settings.max_latency_ratio, self._device.budget_mb)
        if beside is None or not beside.ok or beside.p50_ms is None:
            entry, device = active.entry, self._device
            known = Known(entry.measurements)
            holds = not outdated(device, entry.manifest, known, entry.chosen)
            beside = recorded(entry.measurements.get(entry.chosen or "")) if holds else None
        agreement = self._agreement_before(trying, winner, active) if beside is not None else None
        return compared(trying.manifest, winner, active, beside, bounds, agreement)

    def _agreement_before(self, trying: _Trying, winner: Measurement, active: Active) -> float | None:
        """How the winner agrees with the golden set of the active version, where it can be asked."""
        old = active.entry.manifest
        if old.golden is None or not winner.agreement_metric or not same_signature(old, trying.manifest):
            return None
        if trying.manifest.golden is not None and old.golden.file.sha256 == trying.manifest.golden.file.sha256:
            return winner.agreement
        entrant = chosen_entrant(self._device, winner.candidate_id, trying.manifest, trying.blobs, self._open)
        plan = judged(self._plan(trying), old, active.entry.blobs, self._open)
        (seen,) = Trial([replace(entrant, beside=True)], plan, replace(self._around, progress=trying.progress)).check()
        return seen.agreement

    def _verdicts(
        self,
        manifest: Manifest,
        blobs: Mapping[str, BlobRef],
        inventory: RuntimeInventory,
        headroom: int,
        dead: Mapping[str, str],
    ) -> tuple[Verdict, ...]:
        device = self._device
        found = candidates(manifest, device.facts, device.profile.providers, inventory, headroom, dead)
        return tuple(_if_here(verdict, manifest, blobs) for verdict in found)

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure(
        self, trying: _Trying, priors: Sequence[Prior], keys: Mapping[str, MeasurementKey], known: Known
    ) -> tuple[list[Measurement], Measurement | None]:
        """Trials of the best candidates by prior, and while none of them can answer, of the next best; and what the
        active version did beside them.

        What was measured before counts when that holds for all that would be tried: figures of different sessions
        cannot be compared closely.
        """
        waiting, most = spread(priors), self._settings.candidates
        measured: list[Measurement] = []
        beside: Measurement | None = None
        while waiting and not any(measurement.ok for measurement in measured):
            tried, waiting = waiting[:most], waiting[most:]
            kept = [_kept(known.measurements.get(candidate.id), keys[candidate.id]) for candidate in tried]
            valid = [measurement for measurement in kept if measurement is not None]
            if len(valid) == len(tried) and not trying.shapes:
                measured += valid
                continue
            seen, beside = self._try(trying, tried, priors, keys, known.active)
            measured += [self._with_energy(measurement) for measurement in seen]
        return measured, beside

    def _try(
        self,
        trying: _Trying,
        tried: Sequence[Candidate],
        priors: Sequence[Prior],
        keys: Mapping[str, MeasurementKey],
        active: Active | None,
    ) -> tuple[list[Measurement], Measurement | None]:
        """One trial: of the candidates, and of what answers now where it takes the same inputs."""
        manifest = trying.manifest
        entrants = [
            entrant_of(candidate, keys[candidate.id], manifest, trying.blobs, self._open) for candidate in tried
        ]
        other = None
        if active is not None and same_inputs(active.entry.manifest, manifest):
            other = beside_entrant(self._device, active, self._open)
        trial = Trial(
            [*entrants, *([other] if other else [])],
            self._plan(trying),
            replace(self._around, progress=trying.progress),
        )
        count = len(entrants)
        beside_id = {other.id} if other else set()

        def still_needed(seen: Sequence[Measurement], done: int, most: int) -> Collection[str]:
            needed = _still_needed(manifest.policy, priors, seen[:count], done, most)
            return {*needed, *beside_id} if needed else ()

        seen = trial.run(still_needed)
        return seen[:count], seen[count] if other else None

    def _plan(self, trying: _Trying) -> TrialPlan:
        settings, manifest, headroom = self._settings, trying.manifest, trying.headroom_mb
        plan = TrialPlan(
            memory_mb=min(settings.memory_mb or headroom, headroom),
            headroom_mb=headroom,
            cpus=self._device.cpus,
            shapes=trying.shapes,
            least_rounds=settings.least_rounds,
            most_rounds=settings.most_rounds,
            load_timeout_s=settings.timeout_s,
            check_timeout_s=settings.timeout_s * 2,
            run_timeout_s=settings.timeout_s,
            departs=lambda inputs, outputs: departure(manifest, inputs, outputs),
        )
        return judged(plan, manifest, trying.blobs, self._open)

    def _with_energy(self, measurement: Measurement) -> Measurement:
        """Joules estimated from the profile's watts where no sensor told."""
        watts = self._device.profile.watts_load
        if measurement.joules is not None or watts is None or not measurement.p50_ms:
            return measurement
        joules = estimated_joules(watts, measurement.p50_ms)
        return replace(measurement, joules=joules, energy_source="estimated")


def _if_here(verdict: Verdict, manifest: Manifest, blobs: Mapping[str, BlobRef]) -> Verdict:
    """Of a version from the repository only some variants are fetched."""
    if manifest.variant(verdict.candidate.variant_id).file.name in blobs:
        return verdict
    return replace(verdict, accepted=False, reasons=(*verdict.reasons, "its file was not fetched"))


def spread(priors: Sequence[Prior]) -> list[Candidate]:
    """The order of trying: each variant on the provider that promises most for it, then the rest by promise.

    A prior is no measurement: on a device with several providers the most promising variant must not take all places.
    """
    ranked = [prior.candidate for prior in priors]
    first: dict[str, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.variant_id, candidate)
    leading = list(first.values())
    return leading + [candidate for candidate in ranked if candidate not in leading]


def _still_needed(
    policy: Policy, priors: Sequence[Prior], measured: Sequence[Measurement], done: int, most: int
) -> Collection[str]:
    if not more_rounds_needed(measured, done, most, policy, priors):
        return ()
    return contenders(policy, measured, priors)


def departure(manifest: Manifest, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> str:
    """How a loaded model's signature departs from the manifest's; empty when it does not. Pure."""
    for what, said, seen in (("input", manifest.inputs, inputs), ("output", manifest.outputs, outputs)):
        have = {spec.name: spec for spec in map(TensorSpec.model_validate, seen)}
        for spec in said:
            other = have.pop(spec.name, None)
            if other is None:
                if spec.optional:
                    continue
                return f"{what} '{spec.name}' of the manifest is not in the file"
            if other.datatype != spec.datatype:
                return f"{what} '{spec.name}' is {other.datatype} in the file, {spec.datatype} in the manifest"
            if what == "input" and not spec.any_rank and not other.any_rank and not _compatible(spec, other):
                return f"{what} '{spec.name}' is {list(other.shape)} in the file, {list(spec.shape)} in the manifest"
        if what == "input" and (extra := [spec.name for spec in have.values() if not spec.optional]):
            return f"input '{extra[0]}' of the file is not in the manifest"
    return ""


def _compatible(said: TensorSpec, seen: TensorSpec) -> bool:
    """Whether whatever fits the manifest fits the file: free in the file, or the same fixed size."""
    return fits(seen, tuple(-1 if axis == -1 else axis for axis in said.shape))


def _kept(document: Mapping[str, Any] | None, key: MeasurementKey) -> Measurement | None:
    if document is None:
        return None
    measurement = Measurement.from_json(dict(document))
    return (
        measurement if measurement.holds_for(key) and measurement.failure not in ("crash", "hang", "memory") else None
    )


def _counted(before: QuarantineState, measurements: Sequence[Measurement]) -> QuarantineState:
    """The state after this trial's crashes, hangs and memory kills."""
    state = before
    for measurement in measurements:
        death = _DEATHS.get(measurement.failure or "")
        if death is not None:
            state = state.after(measurement.candidate_id, measurement.key, death)
    return state


def _order(decision: Decision) -> list[str]:
    """Who answers, and who answers when that fails: the winner, then whoever else was tried and right.

    Never who was not tried: what crashes, hangs or eats memory shall do so in a trial child, not in the daemon.
    """
    lost = [row for row in decision.rows if row.status == "lost"]
    lost.sort(key=lambda row: (row.measurement.p50_ms or float("inf")) if row.measurement else float("inf"))
    return [*([decision.winner] if decision.winner else []), *(row.candidate_id for row in lost)]


def _hint(verdicts: Sequence[Verdict], inventory: RuntimeInventory, device: DeviceView) -> str:
    """What to do where nothing was chosen: where all that is missing is the runtime, install it."""
    wanted = {verdict.candidate.runtime for verdict in verdicts}
    if wanted and not any(inventory.get(runtime) for runtime in wanted):
        return " or ".join(dict.fromkeys(install_hint(runtime, device.facts) for runtime in sorted(wanted)))
    return "edge-agent models check FILE shows what each variant needs"


def _why_not(decision: Decision, verdicts: Sequence[Verdict]) -> str:
    """Why nothing was chosen: each candidate's own reason."""
    if decision.winner is not None:
        return ""
    lines = [f"{v.candidate.id}: {', '.join(v.reasons)}" for v in verdicts if not v.accepted]
    lines += [f"{row.candidate_id}: {', '.join(row.reasons)}" for row in decision.rows if row.reasons]
    return "no variant can run here: " + "; ".join(lines) if lines else "it has no variant for this device"
