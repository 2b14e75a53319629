"""A device in this process, for benchmarks: store, trials, prepared forms and engine as the daemon puts them together.

Its folders are the daemon's: a daemon that is started on them afterwards has the same models.

Nothing is left out but the sockets: models are added by the agent's own installer (encrypted, tried in children,
prepared, chosen), and answered by its own engine from the catalog that the installer wrote.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from agent.base.clock import SystemClock
from agent.base.config import Config
from agent.base.paths import Paths
from agent.core.device import inventory_of, look_at_device
from agent.core.trying import make_chooser, make_form_maker
from agent.infer.engine import Engine, EngineLimits
from agent.infer.runtimes.probe import Runtimes, source_version
from agent.infer.shelf import Shelf
from agent.infer.tensors import InferRequest, InferResponse, Tensor
from agent.operations.forms import form_keys, forms_hold, records_of
from agent.operations.install import AddRequest, Installer, Preparing, Serving
from agent.operations.measured import DeviceView, outdated
from agent.operations.shelving import Shelves
from agent.store.document import VersionEntry
from agent.store.keys import DeviceKeys
from agent.store.store import Store

MIB = 1 << 20
VERSION = "1.0.0"
_QUOTA = 1 << 40
#: Trials as short as the configuration allows: what they find is not what is measured here.
_SELECTION: Mapping[str, Any] = {"min_rounds": 4, "max_rounds": 4}


class Device:
    """The agent's parts below ``folder``. A context: closes the store. ``threads``: of one run, else the profile's."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        paths = Paths(folder / "config.toml", folder / "state", folder / "run")
        paths.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        selection = {**_SELECTION, **({} if threads is None else {"threads": threads})}
        self._config = Config.model_validate({"selection": selection})
        self._found = look_at_device(paths, self._config)
        self._runtimes = Runtimes()
        self.store = Store(paths.state_dir / "store", DeviceKeys(paths.device_secret.parent), _QUOTA)
        self.form_key = form_keys(self._found.facts, self._found.threads, lru_cache(source_version))

    def __enter__(self) -> Device:
        self.store.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    @property
    def threads(self) -> int:
        """Of one run."""
        return self._found.threads

    @property
    def places(self) -> int:
        """Threads of runs at once."""
        return self._found.places

    def add(self, path: Path, name: str, shapes: Mapping[str, list[int]] | None = None) -> VersionEntry:
        """``models add``: returns what the catalog has of it. ``shapes``: of made-up inputs, where an axis is free."""
        with path.open("rb") as file:
            request = AddRequest(path.name, name, shapes)
            result = self._installer().add(file.fileno(), request, lambda event: None)
        return self.store.document.models[name].versions[result["version"]]

    def record(self, name: str) -> dict[str, Any]:
        """What is known of the forms of a model's chosen candidate."""
        (entry,) = self.store.document.models[name].versions.values()
        return dict(records_of(entry).get(str(entry.chosen), {}))

    def engine(self, budget_mb: float, **limits: Any) -> Engine:
        """The engine with everything that was added. For the event loop's thread."""
        engine = Engine(EngineLimits(budget_mb, places=self.places, **limits), self._runtimes.load)
        engine.put(self.shelf())
        return engine

    def shelf(self) -> Shelf:
        """What the catalog holds now, for the engine."""
        return Shelves(self.store.read, self.threads, self.form_key).shelf(self.store.document)

    def _installer(self) -> Installer:
        view = self._view()
        selection = self._config.selection
        forms = make_form_maker(view, self.store, self.form_key, selection, lambda: None)
        return Installer(
            self.store,
            make_chooser(view, self.store.read, selection, lambda: None),
            Serving(show=lambda document: None, load=lambda model, version: None),
            SystemClock(),
            outdated=partial(outdated, view),
            preparing=Preparing(forms, lambda entry: forms_hold(entry, self.form_key)),
        )

    def _view(self) -> DeviceView:
        found = self._found
        return DeviceView(
            facts=found.facts,
            profile=found.profile,
            threads=found.threads,
            cpus=found.cpus,
            inventory=lambda: inventory_of(self._runtimes),
            headroom_mb=lambda: 4096,
            power_mode=lambda: found.facts.power_mode,
        )


def request(inputs: Mapping[str, np.ndarray]) -> InferRequest:
    """A request of these inputs."""
    datatypes = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8", "int8": "INT8"}
    return InferRequest(inputs=tuple(Tensor(n, datatypes[a.dtype.name], a) for n, a in inputs.items()))  # type: ignore[arg-type]


async def ask(engine: Engine, name: str, asked: InferRequest, within_s: float = 60.0) -> InferResponse:
    """One answer, as the serving side asks for it."""
    answer = engine.infer(name, None, asked, time.monotonic() + within_s)
    return await answer if asyncio.isfuture(answer) or asyncio.iscoroutine(answer) else answer  # type: ignore[misc,return-value]


async def make_warm(engine: Engine, name: str) -> None:
    """Close the session that answers for a model and leave its plaintext in memory, as an eviction does."""
    standing = engine._standing
    for resident in standing.all():
        if resident.name.model == name:
            standing.retire(resident)
    while any(resident.name.model == name for resident in standing.all()) or engine._loader._tasks:
        await asyncio.sleep(0.001)


async def settle(engine: Engine) -> None:
    """Wait until no load and no change of forms is under way."""
    standing = engine._standing
    while standing._changing or engine._loader._tasks:
        await asyncio.sleep(0.002)
