"""How core tries variants: the chooser with the configuration's settings and the machine's sensors.

A module of its own because it brings in all that tries and decides, which a device that has its models never needs:
core imports it when the first thing is to be tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from agent.base.clock import SystemClock
from agent.base.config import SelectionConfig
from agent.core.measuring import NO_REQUESTS, Requests
from agent.hardware.energy import EnergyMeter
from agent.hardware.sensors import read_sensors
from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.infer.runtimes.failures import is_device_failure
from agent.infer.shelf import Option
from agent.infer.trial import Surroundings
from agent.operations.batching import Wish
from agent.operations.choosing import TrialSettings, VariantChooser
from agent.operations.entering import DEVICES
from agent.operations.forms import FormKey
from agent.operations.gauging import BatchGauge
from agent.operations.measured import DeviceView
from agent.operations.preparing import FormMaker
from agent.operations.shelving import OpenBlob
from agent.store.store import Store

#: One step of the child that tries a lost provider.
_PROBE_S = 120.0


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


def try_once(option: Option, memory_mb: int, cpus: Sequence[int], go_on: Callable[[], None]) -> str:
    """Load the option in a child and run it once: why that did not work, empty when it did. AgentError."""
    go_on()
    devices = DEVICES.get(option.provider, ())
    with option.open_model() as model:
        files = {"model": model.fd, "golden": None}
        try:
            with ChildProcess(files, ChildLimits(memory_mb), cpus=cpus, devices=devices, go_on=go_on) as child:
                child.greet()
                child.call("prepare", _PROBE_S, runtime=option.runtime)
                answer = child.call(
                    "load",
                    _PROBE_S,
                    runtime=option.runtime,
                    provider=option.provider,
                    threads=option.threads,
                    parameters=dict(option.parameters),
                    shapes={},
                )
                if (taken := answer.get("provider")) != option.provider:
                    return f"the runtime took {taken}"
                note = str(child.call("check", _PROBE_S, metric=None).get("note") or "")
                if is_device_failure(note):
                    return note
        except ChildError as error:
            return str(error)
    return ""


def make_chooser(
    device: DeviceView,
    open_blob: OpenBlob,
    selection: SelectionConfig,
    go_on: Callable[[], None],
    requests: Requests = NO_REQUESTS,
    max_latency_ratio: float = 1.5,
) -> VariantChooser:
    """Chooses by measuring on this machine. ``go_on`` raises when a trial is to be given up."""
    settings = TrialSettings(
        candidates=selection.candidates,
        least_rounds=selection.min_rounds,
        most_rounds=selection.max_rounds,
        timeout_s=selection.trial_timeout_s,
        memory_mb=None if selection.trial_memory_mb == "auto" else selection.trial_memory_mb,
        quarantine_after=selection.quarantine_after,
        max_latency_ratio=max_latency_ratio,
    )
    return VariantChooser(device, open_blob, settings, _surroundings(go_on, requests))


def _surroundings(go_on: Callable[[], None], requests: Requests = NO_REQUESTS) -> Surroundings:
    return Surroundings(
        clock=SystemClock(),
        throttled=lambda: read_sensors().throttled_now,
        energy_j=EnergyMeter(),
        wait=time.sleep,
        spans=requests.spans,
        watch=requests.watch,
        go_on=go_on,
    )
