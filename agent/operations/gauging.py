"""Measuring what joining requests gains, for the chosen variant of a version. Where that fails, there is no gain."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from agent.base.errors import AgentError
from agent.bundles.manifest import Manifest
from agent.infer.gains import Gain, not_free
from agent.infer.gauging import SECONDS, gauged
from agent.infer.trial import Surroundings
from agent.operations.batching import Wish, gain_record
from agent.operations.entering import chosen_entrant, plan_for_one
from agent.operations.measured import Choice, DeviceView, Progress
from agent.operations.shelving import OpenBlob
from agent.store.document import BlobRef

_LOG = logging.getLogger("edge_agent.operations")


class BatchGauge:
    """Blocking; one at a time."""

    def __init__(
        self,
        device: DeviceView,
        open_blob: OpenBlob,
        wish: Wish,
        around: Surroundings,
        *,
        timeout_s: float = 120.0,
        seconds: float = SECONDS,
    ) -> None:
        self._device = device
        self._open = open_blob
        self._wish = wish
        self._around = around
        self._timeout_s = timeout_s
        self._seconds = seconds

    def __call__(
        self, manifest: Manifest, blobs: Mapping[str, BlobRef], choice: Choice, progress: Progress
    ) -> dict[str, Any]:
        """Records by candidate for the choice. Raises only what ends the whole operation (``around.go_on``)."""
        policy, candidate = self._wish(manifest), choice.chosen
        measurement = choice.measurements.get(candidate or "")
        if policy is None or policy.max_size < 2 or candidate is None or measurement is None:
            return {}
        if reason := not_free(manifest.inputs, manifest.outputs):
            return {candidate: gain_record(measurement, policy, Gain(note=reason))}
        progress({"stage": "gauge", "candidate": candidate})
        try:
            entrant = chosen_entrant(self._device, candidate, manifest, blobs, self._open)
            plan = plan_for_one(self._device, manifest, blobs, self._open, self._timeout_s)
            gain = gauged(entrant, plan, self._around, policy.max_size, self._seconds)
        except AgentError as error:
            self._around.go_on()  # ends the operation, if that is what the error was
            _LOG.warning("model %s %s: batches were not tried: %s", manifest.name, manifest.version, error)
            return {}
        return {candidate: gain_record(measurement, policy, gain)}
