"""The admin API: one row for each thing that root (or the link) may ask of core. Versioned by its path, ``/v1``.

Files arrive as descriptors, never as paths: core cannot see the caller's folders. Long work streams its progress to a
caller that accepts ``application/x-ndjson``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from agent.base.errors import NotFoundError, PeerError
from agent.core.operating import Operations, Progress
from agent.core.upkeep import Upkeep
from agent.operations.install import AddRequest, Installer
from agent.operations.maintain import Maintenance
from agent.operations.present import describe_model, list_models
from agent.serve.access import OPERATE
from agent.serve.exchange import Request, Response, json_response
from agent.serve.routes import Route
from agent.store.store import Store

if TYPE_CHECKING:
    from agent.core.fleet import Fleet

#: Longer than any trial of four candidates on the slowest board.
_LONG_S = 3600.0
_MAX_AXES = 32


@dataclass(frozen=True, slots=True)
class Documents:
    """``status`` and ``diagnose``: those of the commands; ``story`` adds to a model what is not in the catalog.

    ``look`` comes before ``status``.
    """

    look: Callable[[], Awaitable[None]]
    status: Callable[[], dict[str, Any]]
    diagnose: Callable[[], list[dict[str, Any]]]
    story: Callable[[str, dict[str, Any]], dict[str, Any]]


class AdminApi:
    """Handlers of ``admin.sock``."""

    def __init__(
        self,
        store: Store,
        installer: Installer,
        maintenance: Maintenance,
        operations: Operations,
        documents: Documents,
        upkeep: Upkeep,
        fleet: Callable[[], Fleet | None],
    ) -> None:
        self._store = store
        self._installer = installer
        self._maintenance = maintenance
        self._operations = operations
        self._look = documents.look
        self._status = documents.status
        self._diagnose = documents.diagnose
        self._story = documents.story
        self._upkeep = upkeep
        self._fleet = fleet

    def routes(self) -> list[Route]:
        """The table."""
        rows: list[tuple[str, str, Callable[[Request], Response | Awaitable[Response]]]] = [
            ("GET", "/v1/status", self._how_it_is),
            ("GET", "/v1/doctor", self._doctor),
            ("GET", "/v1/models", lambda request: json_response({"models": list_models(self._store.document)})),
            ("POST", "/v1/models", self._add),
            ("GET", "/v1/models/{name}", self._show),
            ("DELETE", "/v1/models/{name}", self._remove),
            ("POST", "/v1/models/{name}/activate", self._activate),
            ("POST", "/v1/models/{name}/rollback", self._rollback),
            ("POST", "/v1/models/{name}/try", self._try),
            ("POST", "/v1/models/{name}/verify", self._verify_model),
            ("GET", "/v1/store", self._stats),
            ("POST", "/v1/store/verify", self._verify),
            ("POST", "/v1/store/gc", self._gc),
            ("POST", "/v1/store/rotate-key", self._rotate),
            ("GET", "/v1/jobs", self._jobs),
            ("GET", "/v1/jobs/{id}", self._job),
            ("POST", "/v1/jobs/reset", lambda request: json_response(self._require_fleet().reset_journal())),
            ("GET", "/v1/maintenance", lambda request: json_response({"tasks": self._upkeep.table()})),
            ("POST", "/v1/maintenance", self._maintain),
        ]
        return [Route(method, path, OPERATE, handler, deadline_s=_LONG_S) for method, path, handler in rows]

    # -- models ---------------------------------------------------------------------------------------------------

    async def _add(self, request: Request) -> Response:
        options = request.json()
        _known(options, {"name", "file_name", "shapes", "accept_slower"})
        wanted = AddRequest(
            file_name=_text(options, "file_name") or "",
            name=_text(options, "name"),
            shapes=_shapes(options),
            accept_slower=_flag(options, "accept_slower"),
        )
        (descriptor,) = request.take_descriptors(1)
        # Closed when the work is over and not before: its number would be given to something else, which then would
        # be read in its place.
        return json_response(
            await self._operations.run(
                "models add",
                lambda tell: self._installer.add(descriptor, wanted, tell),
                request.progress,
                at_end=lambda: os.close(descriptor),
            )
        )

    def _show(self, request: Request) -> Response:
        name = request.params["name"]
        model = self._store.document.models.get(name)
        if model is None:
            raise NotFoundError(f"model '{name}': no such model")
        return json_response(self._story(name, describe_model(name, model)))

    async def _remove(self, request: Request) -> Response:
        name, version = request.params["name"], request.options().get("version")
        return await self._do(request, "models remove", lambda tell: self._installer.remove(name, version))

    async def _activate(self, request: Request) -> Response:
        options = request.json()
        _known(options, {"version"})
        name, version = request.params["name"], _text(options, "version")
        if version is None:
            raise PeerError("cannot activate: 'version' is missing")
        return await self._do(request, "models activate", lambda tell: self._installer.activate(name, version, tell))

    async def _rollback(self, request: Request) -> Response:
        name = request.params["name"]
        return await self._do(request, "models rollback", lambda tell: self._installer.rollback(name))

    async def _try(self, request: Request) -> Response:
        options = request.json()
        _known(options, {"shapes"})
        name, shapes = request.params["name"], _shapes(options)
        return await self._do(request, "bench", lambda tell: self._installer.choose_again(name, tell, shapes or {}))

    async def _verify_model(self, request: Request) -> Response:
        name = request.params["name"]
        if name not in self._store.document.models:
            raise NotFoundError(f"model '{name}': no such model")
        return await self._do(request, "models verify", lambda tell: self._maintenance.verify(tell, model=name))

    # -- store ----------------------------------------------------------------------------------------------------

    async def _verify(self, request: Request) -> Response:
        return await self._do(request, "store verify", self._maintenance.verify)

    async def _gc(self, request: Request) -> Response:
        return await self._do(request, "store gc", lambda tell: self._maintenance.gc())

    async def _rotate(self, request: Request) -> Response:
        options = request.json()
        _known(options, {"to_file"})
        to_file = _flag(options, "to_file")
        work = partial(self._maintenance.rotate_key, to_file=to_file)
        return await self._do(request, "store rotate-key", work)

    # -- fleet ----------------------------------------------------------------------------------------------------

    def _require_fleet(self) -> Fleet:
        fleet = self._fleet()
        if fleet is None:
            raise NotFoundError("this device has no fleet", hint="docs/how-to/fleet.md tells how to give it one")
        return fleet

    def _jobs(self, request: Request) -> Response:
        fleet = self._fleet()
        return json_response({"jobs": fleet.jobs() if fleet else []})

    def _job(self, request: Request) -> Response:
        job_id = request.params["id"]
        found = self._require_fleet().job(job_id)
        if found is None:
            raise NotFoundError(f"job '{job_id}': no such job")
        return json_response(found)

    async def _maintain(self, request: Request) -> Response:
        options = request.json()
        _known(options, {"run"})
        names = options.get("run", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PeerError("cannot read request: 'run' must be a list of tasks")
        return await self._do(request, "maintenance", lambda tell: {"tasks": self._upkeep.run(names, tell)})

    # -- the whole ------------------------------------------------------------------------------------------------

    async def _how_it_is(self, request: Request) -> Response:
        await self._look()
        return json_response(self._status())

    async def _stats(self, request: Request) -> Response:
        """In a thread: it looks at every file."""
        return json_response(await asyncio.get_running_loop().run_in_executor(None, self._maintenance.stats))

    async def _doctor(self, request: Request) -> Response:
        """Beside the operations: whoever asks may do so because the one under way does not end."""
        findings = await asyncio.get_running_loop().run_in_executor(None, self._diagnose)
        return json_response({"findings": findings})

    async def _do(self, request: Request, name: str, work: Callable[[Progress], dict[str, Any]]) -> Response:
        return json_response(await self._operations.run(name, work, request.progress))


def _known(options: Mapping[str, Any], names: set[str]) -> None:
    if unknown := sorted(set(options) - names):
        raise PeerError(f"cannot read request: unknown field '{unknown[0]}'")


def _text(options: Mapping[str, Any], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not isinstance(value, str):
        raise PeerError(f"cannot read request: '{name}' must be a text")
    return value


def _flag(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise PeerError(f"cannot read request: '{name}' must be true or false")
    return value


def _shapes(options: Mapping[str, Any]) -> dict[str, list[int]]:
    """``{"input": [1, 3, 224, 224]}``."""
    shapes = options.get("shapes") or {}
    if not isinstance(shapes, dict):
        raise PeerError("cannot read request: 'shapes' must be an object")
    for name, shape in shapes.items():
        right = isinstance(shape, list) and len(shape) <= _MAX_AXES
        if not right or not all(type(axis) is int and 0 <= axis < 1 << 31 for axis in shape):
            raise PeerError(f"cannot read request: shapes: '{name}' must be a list of axis lengths")
    return shapes
