"""The rows of the admin API on kept answers: look at them, forget them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent.base.errors import NotFoundError, PeerError
from agent.serve.access import OPERATE
from agent.serve.exchange import Request, Response, json_response
from agent.serve.routes import Route


class CacheApi:
    """``rows``: statistics of each model that keeps answers; ``hottest``: its requests that come most often; ``clear``
    forgets those of a model, or of all; ``installed``: whether there is such a model."""

    def __init__(
        self,
        rows: Callable[[], list[dict[str, Any]]],
        hottest: Callable[[str], list[dict[str, Any]]],
        clear: Callable[[str | None], int],
        installed: Callable[[str], bool],
    ) -> None:
        self._rows = rows
        self._hottest = hottest
        self._clear = clear
        self._installed = installed

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("GET", "/v1/cache", OPERATE, self._show),
            Route("POST", "/v1/cache/clear", OPERATE, self._forget),
        ]

    def _show(self, _request: Request) -> Response:
        return json_response({"caches": [{**row, "hottest": self._hottest(row["model"])} for row in self._rows()]})

    def _forget(self, request: Request) -> Response:
        options = request.json()
        if unknown := sorted(set(options) - {"model"}):
            raise PeerError(f"cannot read request: unknown field '{unknown[0]}'")
        model = options.get("model")
        if model is not None and not isinstance(model, str):
            raise PeerError("cannot read request: 'model' must be a text")
        if model is not None and not self._installed(model):
            raise NotFoundError(f"model '{model}': no such model")
        return json_response({"cleared": self._clear(model)})
