"""How core tries variants: the chooser with the configuration's settings and the machine's sensors.

A module of its own because it brings in all that tries and decides, which a device that has its models never needs:
core imports it when the first thing is to be tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.base.clock import SystemClock
from agent.base.config import SelectionConfig
from agent.hardware.energy import EnergyMeter
from agent.hardware.sensors import read_sensors
from agent.infer.trial import Surroundings
from agent.operations.batching import Wish
from agent.operations.choosing import TrialSettings, VariantChooser
from agent.operations.forms import FormKey
from agent.operations.gauging import BatchGauge
from agent.operations.measured import DeviceView
from agent.operations.preparing import FormMaker
from agent.operations.shelving import OpenBlob
from agent.store.store import Store


def make_form_maker(
    device: DeviceView, store: Store, key: FormKey, selection: SelectionConfig, go_on: Callable[[], None]
) -> FormMaker:
    """Prepares what was chosen, on this machine."""
    return FormMaker(device, store, key, _surroundings(go_on), timeout_s=selection.trial_timeout_s)


def make_batch_gauge(
    device: DeviceView, open_blob: OpenBlob, wish: Wish, selection: SelectionConfig, go_on: Callable[[], None]
) -> BatchGauge:
    """Says what joining requests gains, on this machine."""
    return BatchGauge(device, open_blob, wish, _surroundings(go_on), timeout_s=selection.trial_timeout_s)


def make_chooser(
    device: DeviceView, open_blob: OpenBlob, selection: SelectionConfig, go_on: Callable[[], None]
) -> VariantChooser:
    """Chooses by measuring on this machine. ``go_on`` raises when a trial is to be given up."""
    settings = TrialSettings(
        candidates=selection.candidates,
        least_rounds=selection.min_rounds,
        most_rounds=selection.max_rounds,
        timeout_s=selection.trial_timeout_s,
        memory_mb=None if selection.trial_memory_mb == "auto" else selection.trial_memory_mb,
        quarantine_after=selection.quarantine_after,
    )
    return VariantChooser(device, open_blob, settings, _surroundings(go_on))


def _surroundings(go_on: Callable[[], None]) -> Surroundings:
    return Surroundings(
        clock=SystemClock(),
        throttled=lambda: read_sensors().throttled_now,
        energy_j=EnergyMeter(),
        wait=time.sleep,
        go_on=go_on,
    )
