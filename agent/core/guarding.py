"""What core learns of versions from live use, wired: probation, its watch and its shadow runs, quality over time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.clock import SystemClock
from agent.base.config import ProbationConfig
from agent.core.health import Finding
from agent.core.measuring import Requests
from agent.core.operating import Operations
from agent.core.probation import Probations, Surroundings
from agent.core.quality import QualityKept
from agent.core.watching import Watching
from agent.infer.engine import Engine
from agent.infer.right_of_way import RIGHT_OF_WAY
from agent.operations.install import Installer
from agent.store.document import CatalogDocument
from agent.store.store import Store

if TYPE_CHECKING:
    from agent.core.shadowing import Shadowing
    from agent.core.watching import Shadow
    from agent.operations.probation import Case, Course
    from agent.serve.inference import Inference, Watch


class Guarding:
    """For the event loop's thread, but for ``requests`` and what ``probations`` and ``quality`` say of themselves."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        operations: Operations,
        engine: Engine,
        config: Callable[[], ProbationConfig],
        installer: Callable[[], Installer],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._engine = engine
        self._config = config
        self._inference: Inference | None = None
        self._watch: Watch | None = None
        self._watching = watching = Watching(
            self._connect,
            RIGHT_OF_WAY.hold,
            RIGHT_OF_WAY.let_go,
            soon=lambda act: asyncio.get_running_loop().call_soon(act),
        )
        self._shadowing: Shadowing | None = None
        self.quality = QualityKept(
            folder / "quality.json",
            lambda: store.document,
            lambda model, version: engine.served(model, version).version,
            SystemClock(),
        )
        around = Surroundings(
            store=store,
            installer=installer,
            operations=operations,
            watching=watching,
            config=config,
            computed=self._computed,
            shadow=self._shadow,
            clock=SystemClock(),
            changed=changed,
        )
        self.probations = Probations(folder / "probation.json", around)
        #: What trials are told of requests; from the operations' thread.
        self.requests = Requests(
            spans=lambda begin, end: operations.on_loop(lambda: watching.spans(begin, end)),
            watch=lambda on: operations.on_loop(lambda: watching.measure(on=on)),
        )
        RIGHT_OF_WAY.watch = lambda on: operations.tell_loop(lambda: watching.give_way(on=on))

    def attach(self, inference: Inference) -> None:
        """Requests come by there from now on."""
        self._inference = inference
        inference.watch = self._watch

    def _connect(self, watch: Watch | None) -> None:
        self._watch = watch
        if self._inference is not None:
            self._inference.watch = watch

    def _computed(self, model: str, version: str) -> tuple[int, float]:
        return self._inference.computed(model, version) if self._inference is not None else (0, 0.0)

    def _shadow(self, case: Case, course: Course) -> Shadow | None:
        """What has the version before answer, too, where the configuration wants that."""
        share = self._config().shadow
        if share <= 0:
            return None
        from agent.core.shadowing import Shadowing  # noqa: PLC0415 - most devices compare nothing

        if self._shadowing is None:
            self._shadowing = Shadowing(self._engine)
        golden = self._store.document.models[case.model].versions[case.version].manifest.golden
        return self._shadowing.of(case, course, golden.metric if golden is not None else "cosine", share)

    def shown(self, document: CatalogDocument) -> None:
        """Another catalog is served."""
        self.probations.shown(document)

    def stop(self) -> None:
        """Before operations end: what is on probation goes on at the next start."""
        self.probations.stop()
        if self._shadowing is not None:
            self._shadowing.stop()

    def close(self) -> None:
        """After operations have ended."""
        self.quality.close()

    # -- telling ------------------------------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """What is wrong with versions."""
        return [*self.probations.findings(), *self.quality.findings()]

    def story(self, name: str, description: dict[str, Any]) -> dict[str, Any]:
        """A model's description with what is not in the catalog: what is on probation, how well versions answer."""
        for version, row in description["versions"].items():
            row["quality"] = self.quality.told(name, version)
        return {**description, "probation": self.probations.status().get(name)}
