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
from agent.operations.entering import entrant_of, judged
from agent.operations.measured import Choice, DeviceView, Known, Progress, key_on, runtimes_for
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
            for candidate in (v.candidate for v in self._verdicts(manifest, inventory, headroom, {}))
        }
        dead = {
            name: reason
            for name, key in keys.items()
            if (reason := quarantine.reason(name, key, self._settings.quarantine_after))
        }
        verdicts = self._verdicts(manifest, inventory, headroom, dead)
        priors = rank_by_prior(accepted(verdicts), device.facts, device.profile)
        measurements = self._measure(manifest, blobs, priors, keys, known, shapes, headroom, progress)
        decision = choose(manifest.policy, measurements, priors)
        document = explain(manifest, verdicts, priors, decision, device.facts, device.profile)
        return Choice(
            chosen=decision.winner,
            document={
                "order": _order(decision),
                "explain": document,
                "runtimes": runtimes_for(manifest, inventory),
            },
            measurements={m.candidate_id: m.to_json() for m in measurements},
            quarantine=_counted(quarantine, measurements).to_json(),
            why=_why_not(decision, verdicts),
            hint=_hint(verdicts, inventory, device),
        )

    def _verdicts(
        self, manifest: Manifest, inventory: RuntimeInventory, headroom: int, dead: Mapping[str, str]
    ) -> tuple[Verdict, ...]:
        device = self._device
        return candidates(manifest, device.facts, device.profile.providers, inventory, headroom, dead)

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure(
        self,
        manifest: Manifest,
        blobs: Mapping[str, BlobRef],
        priors: Sequence[Prior],
        keys: Mapping[str, MeasurementKey],
        known: Known,
        shapes: Mapping[str, list[int]],
        headroom: int,
        progress: Progress,
    ) -> list[Measurement]:
        """Trials of the best candidates by prior, and while none of them can answer, of the next best.

        What was measured before counts when that holds for all that would be tried: figures of different sessions
        cannot be compared closely.
        """
        waiting, most = spread(priors), self._settings.candidates
        measured: list[Measurement] = []
        while waiting and not any(measurement.ok for measurement in measured):
            tried, waiting = waiting[:most], waiting[most:]
            kept = [_kept(known.measurements.get(candidate.id), keys[candidate.id]) for candidate in tried]
            valid = [measurement for measurement in kept if measurement is not None]
            if len(valid) == len(tried) and not shapes:
                measured += valid
                continue
            plan = self._plan(manifest, blobs, shapes, headroom)
            entrants = [entrant_of(candidate, keys[candidate.id], manifest, blobs, self._open) for candidate in tried]
            trial = Trial(entrants, plan, replace(self._around, progress=progress))
            seen = trial.run(lambda *state: _still_needed(manifest.policy, priors, *state))
            measured += [self._with_energy(measurement) for measurement in seen]
        return measured

    def _plan(
        self, manifest: Manifest, blobs: Mapping[str, BlobRef], shapes: Mapping[str, list[int]], headroom: int
    ) -> TrialPlan:
        settings = self._settings
        plan = TrialPlan(
            memory_mb=min(settings.memory_mb or headroom, headroom),
            headroom_mb=headroom,
            cpus=self._device.cpus,
            shapes=shapes,
            least_rounds=settings.least_rounds,
            most_rounds=settings.most_rounds,
            load_timeout_s=settings.timeout_s,
            check_timeout_s=settings.timeout_s * 2,
            run_timeout_s=settings.timeout_s,
            departs=lambda inputs, outputs: departure(manifest, inputs, outputs),
        )
        return judged(plan, manifest, blobs, self._open)

    def _with_energy(self, measurement: Measurement) -> Measurement:
        """Joules estimated from the profile's watts where no sensor told."""
        watts = self._device.profile.watts_load
        if measurement.joules is not None or watts is None or not measurement.p50_ms:
            return measurement
        joules = estimated_joules(watts, measurement.p50_ms)
        return replace(measurement, joules=joules, energy_source="estimated")


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
