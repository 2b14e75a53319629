"""What core measures with on this device: it chooses variants, prepares forms, says what joining requests gains.

All that does the work is in ``agent.core.trying``, loaded when the first of it is needed: most starts need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from agent.base.config import Config
from agent.bundles.manifest import BatchingPolicy, Manifest
from agent.core.device import Device, inventory_of
from agent.hardware.sensors import read_sensors
from agent.infer.runtimes.probe import Runtimes, source_version
from agent.operations.batching import as_wanted, gains_hold
from agent.operations.forms import FormKey, Forms, form_keys, forms_hold, no_forms
from agent.operations.install import Preparing
from agent.operations.measured import Active, Choice, ChooseVariant, DeviceView, known_of, outdated
from agent.store.document import VersionEntry
from agent.store.store import Store


@dataclass(frozen=True, slots=True)
class Requests:
    """When live requests ran: see ``Surroundings``. Both block, and may be called from any thread but the loop's."""

    spans: Callable[[float, float], Sequence[tuple[float, float]]] = lambda begin, end: ()
    watch: Callable[[bool], None] = lambda on: None


#: Where nothing is served.
NO_REQUESTS = Requests()


class Measuring:
    """For the operations' thread. ``config`` gives what holds now; ``go_on`` raises when a trial is to be given up."""

    def __init__(
        self,
        device: Device,
        runtimes: Runtimes,
        store: Store,
        config: Callable[[], Config],
        go_on: Callable[[], None],
        requests: Requests = NO_REQUESTS,
    ) -> None:
        self._requests = requests
        self._store = store
        self._config = config
        self._go_on = go_on
        self.view = DeviceView(
            facts=device.facts,
            profile=device.profile,
            threads=device.threads,
            cpus=device.cpus,
            inventory=lambda: inventory_of(runtimes),
            headroom_mb=lambda: _headroom_mb(device, read_sensors().mem_available_mb),
            power_mode=lambda: device.facts.power_mode,
            budget_mb=device.budget_mb,
        )
        self.form_key: FormKey = no_forms
        if config().selection.prepare:
            self.form_key = form_keys(device.facts, device.threads, lru_cache(source_version))

    @property
    def preparing(self) -> Preparing:
        """What is found out of a version beside its choice, and whether it still holds."""
        return Preparing(
            self._make_forms,
            lambda entry: forms_hold(entry, self.form_key),
            self._gauge,
            lambda entry: gains_hold(entry, self._batching_of),
            self._compare,
        )

    def _compare(self, entry: VersionEntry, active: Active) -> Mapping[str, Any]:
        from agent.operations.comparing import Bounds, compared_by_record  # noqa: PLC0415 - as below

        bounds = Bounds(self._config().probation.max_latency_ratio, self.view.budget_mb)
        holds = not outdated(self.view, active.entry.manifest, known_of(active.entry), active.entry.chosen)
        return compared_by_record(entry, active, bounds, holds=holds)

    def choose(self, *arguments: Any) -> Choice:
        """See ``ChooseVariant``."""
        return self._chooser(*arguments)

    @cached_property
    def _chooser(self) -> ChooseVariant:
        from agent.core.trying import make_chooser  # noqa: PLC0415 - most starts try nothing

        config = self._config()
        ratio = config.probation.max_latency_ratio
        return make_chooser(self.view, self._store.read, config.selection, self._go_on, self._requests, ratio)

    def _make_forms(self, *arguments: Any) -> Forms:
        from agent.core.trying import make_form_maker  # noqa: PLC0415 - most starts prepare nothing

        selection = self._config().selection
        return make_form_maker(self.view, self._store, self.form_key, selection, self._go_on)(*arguments)

    def _gauge(self, manifest: Manifest, *arguments: Any) -> Mapping[str, Any]:
        if self._batching_of(manifest) is None:
            return {}
        from agent.core.trying import make_batch_gauge  # noqa: PLC0415 - most devices join nothing

        selection = self._config().selection
        make = make_batch_gauge(self.view, self._store.read, self._batching_of, selection, self._go_on)
        return make(manifest, *arguments)

    def _batching_of(self, manifest: Manifest) -> BatchingPolicy | None:
        """How requests for a model are to be joined."""
        return as_wanted(self._config().models)(manifest)


def _headroom_mb(device: Device, available_mb: int | None) -> int:
    """What trials may take: what is available now, within the limits that apply to us."""
    bounds = [value for value in (available_mb, device.facts.mem_limit_mb) if value is not None]
    return max(64, int(min(bounds) * device.profile.memory_share)) if bounds else 256
