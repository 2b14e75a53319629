"""What goes into a child that measures: a candidate with file and devices, and the golden set that judges it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from agent.bundles.agreement import passes
from agent.bundles.manifest import Manifest
from agent.infer.trial import Entrant, TrialPlan
from agent.operations.measured import Active, DeviceView, key_on
from agent.operations.shelving import OpenBlob
from agent.selection.measurements import MeasurementKey
from agent.selection.rules import Candidate, candidate_of
from agent.store.document import BlobRef

#: Device nodes that a child on an accelerator may open.
DEVICES: Mapping[str, tuple[str, ...]] = {
    "CUDAExecutionProvider": ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvhost-gpu", "/dev/nvmap"),
    "TensorrtExecutionProvider": ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvhost-gpu", "/dev/nvmap"),
    "OpenVINOExecutionProvider": ("/dev/dri/renderD128",),
}


def entrant_of(
    candidate: Candidate, key: MeasurementKey, manifest: Manifest, blobs: Mapping[str, BlobRef], open_blob: OpenBlob
) -> Entrant:
    """A candidate of a version, to be measured under ``key``."""
    variant = manifest.variant(candidate.variant_id)
    ref = blobs[variant.file.name]
    devices = DEVICES.get(candidate.provider, ())
    return Entrant(candidate.id, key, lambda: open_blob(ref), devices, variant.parameters)


def chosen_entrant(
    device: DeviceView, chosen: str, manifest: Manifest, blobs: Mapping[str, BlobRef], open_blob: OpenBlob
) -> Entrant:
    """The candidate of that id, under what holds on the device now."""
    variant_id, _, provider = chosen.partition("@")
    candidate = candidate_of(manifest.variant(variant_id), provider)
    return entrant_of(candidate, key_on(device, candidate, device.inventory(), manifest), manifest, blobs, open_blob)


def beside_entrant(device: DeviceView, active: Active, open_blob: OpenBlob) -> Entrant | None:
    """What answers now, to run beside the candidates of another version; None where it cannot."""
    entry, chosen = active.entry, active.entry.chosen
    if chosen is None:
        return None
    variant_id, _, _ = chosen.partition("@")
    file = entry.manifest.variant(variant_id).file.name
    if file not in entry.blobs or file in entry.damaged:
        return None
    entrant = chosen_entrant(device, chosen, entry.manifest, entry.blobs, open_blob)
    return replace(entrant, id=f"{active.version} {chosen}", beside=True)


def plan_for_one(
    device: DeviceView, manifest: Manifest, blobs: Mapping[str, BlobRef], open_blob: OpenBlob, timeout_s: float
) -> TrialPlan:
    """For a child with the device's whole headroom."""
    headroom = device.headroom_mb()
    plan = TrialPlan(
        memory_mb=headroom,
        headroom_mb=headroom,
        cpus=device.cpus,
        load_timeout_s=timeout_s,
        check_timeout_s=timeout_s * 2,
        run_timeout_s=timeout_s,
    )
    return judged(plan, manifest, blobs, open_blob)


def judged(plan: TrialPlan, manifest: Manifest, blobs: Mapping[str, BlobRef], open_blob: OpenBlob) -> TrialPlan:
    """The plan with the version's golden set, if it has one."""
    golden = manifest.golden
    if golden is None:
        return plan
    ref = blobs[golden.file.name]
    return replace(
        plan,
        open_golden=lambda: open_blob(ref),
        metric=golden.metric,
        threshold=golden.threshold,
        passes=lambda value: passes(golden, value),
    )
