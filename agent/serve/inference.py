"""The rows of ``infer.sock``: the Open Inference Protocol over whatever serves models.

A name that a peer may not use gets 403. To a peer that some rule restricts, a name that does not exist gets the very
same answer, so that it cannot find out which names exist; to everybody else it gets 404.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from agent.base.errors import AgentError, NotFoundError, PeerError, RefusedError, UnsupportedError
from agent.infer.tensors import InferRequest, InferResponse
from agent.serve import oip
from agent.serve.access import INFER, ModelRules, Peer
from agent.serve.exchange import Request, Response, error_answer, json_response
from agent.serve.limits import Limits
from agent.serve.routes import Route
from agent.serve.statistics import Statistics, cache_metrics, with_caches, with_feedback

_FEEDBACK_BYTES = 4096


class ModelServer(Protocol):
    """What serving needs of the engine. ``version`` None means the active one. Deadlines: ``time.monotonic()``."""

    def server_metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        ...

    def ready(self) -> bool:
        """Whether requests can be answered."""
        ...

    def index(self) -> Sequence[Mapping[str, str]]:
        """Every model version: name, version, state, reason."""
        ...

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        """Name, versions, platform, inputs, outputs. Raises NotFoundError."""
        ...

    def model_ready(self, name: str, version: str | None) -> bool:
        """Whether the model can answer. Raises NotFoundError."""
        ...

    def load(self, name: str, parameters: Mapping[str, Any], deadline: float) -> Awaitable[None]:
        """Done when the model can answer at once. Raises errors of ``agent.base.errors``."""
        ...

    def unload(self, name: str) -> int:
        """Let go of its memory; how many sessions there were. It comes back with the next request."""
        ...

    def infer(
        self, name: str, version: str | None, request: InferRequest, deadline: float
    ) -> InferResponse | Awaitable[InferResponse]:
        """The answer, or something to await for it. Raises errors of ``agent.base.errors``; may be cancelled."""
        ...


class Watch(Protocol):
    """Who wants to know of every request, while somebody does. ``at``: ``perf_counter_ns`` when it came."""

    def began(self, at: int) -> None:
        """A request came."""
        ...

    def ended(self, at: int) -> None:
        """It is over, also where its caller went away."""
        ...

    def answered(self, asked: InferRequest, response: InferResponse) -> None:
        """It was answered."""
        ...

    def failed(self, model: str, version: str | None, error: AgentError, *, hurried: bool) -> None:
        """It was not. ``version``: as it was asked for; ``hurried``: its caller has made its deadline shorter."""
        ...


class Feedback(Protocol):
    """Who keeps what apps say of answers."""

    def judge(self, model: str, version: str | None, document: Mapping[str, Any]) -> bool:
        """Count it; False where that answer was judged before. Raises PeerError, NotFoundError."""
        ...

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """``correct`` and ``wrong`` of every ``model`` and ``version`` that was judged."""
        ...


class Inference:
    """Handlers of ``infer.sock``. ``labels`` gives the class names of a model for ``classification``; ``caches`` the
    figures of models whose answers are kept, which only who may use them sees. ``feedback``: None takes none."""

    def __init__(
        self,
        models: ModelServer,
        *,
        limits: Limits,
        rules: ModelRules | None = None,
        statistics: Statistics | None = None,
        labels: Callable[[str, str], Sequence[str]] = lambda _model, _version: (),
        metrics: Sequence[Callable[[], Sequence[str]]] = (),
        caches: Callable[[], Sequence[Mapping[str, Any]]] = lambda: (),
        feedback: Feedback | None = None,
    ) -> None:
        self._feedback_kept = feedback
        self._models = models
        self._limits = limits
        self._rules = rules or ModelRules()
        self._statistics = statistics or Statistics()
        self._labels = labels
        self._metrics = tuple(metrics)
        self._caches = caches
        #: Set and taken away by its owner.
        self.watch: Watch | None = None
        # Two threads: one long tensor is no queue before the next.
        self._codec = ThreadPoolExecutor(2, thread_name_prefix="codec")

    def routes(self) -> list[Route]:
        """The table of ``infer.sock``."""
        rows = [
            Route("GET", "/v2", INFER, self._server),
            Route("GET", "/v2/health/live", INFER, lambda _request: Response()),
            Route("GET", "/v2/health/ready", INFER, self._ready),
            Route("POST", "/v2/repository/index", INFER, self._index),
            Route("POST", "/v2/repository/models/{model}/load", INFER, self._load, self._admit),
            Route("POST", "/v2/repository/models/{model}/unload", INFER, self._unload, self._admit),
            Route("GET", "/v2/models/stats", INFER, self._all_stats),
            Route("GET", "/metrics", INFER, self._prometheus),
        ]
        for pattern in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            rows += [
                Route("GET", pattern, INFER, self._metadata, self._admit),
                Route("GET", f"{pattern}/ready", INFER, self._model_ready, self._admit),
                Route("GET", f"{pattern}/stats", INFER, self._stats, self._admit),
                Route("POST", f"{pattern}/infer", INFER, self._infer, self._admit, needs_body=True),
            ]
            path, most = f"{pattern}/feedback", _FEEDBACK_BYTES
            rows.append(Route("POST", path, INFER, self._feedback, self._admit, needs_body=True, body_bytes=most))
        return rows

    # Who may see what.

    def _admit(self, peer: Peer, params: Mapping[str, str]) -> None:
        name = params["model"]
        if not self._rules.allowed(peer, name):
            raise _closed(name)
        try:
            self._models.model_ready(name, params.get("version"))
        except NotFoundError:
            if self._rules.restricted(peer):
                raise _closed(name) from None
            raise

    def _visible(self, peer: Peer) -> list[Mapping[str, str]]:
        return [entry for entry in self._models.index() if self._rules.allowed(peer, entry["name"])]

    # Server.

    def _server(self, _request: Request) -> Response:
        return json_response(self._models.server_metadata())

    def _ready(self, _request: Request) -> Response:
        if self._models.ready():
            return Response()
        return json_response({"error": "not ready"}, 400)

    def _index(self, request: Request) -> Response:
        only_ready = request.json().get("ready", False)
        if not isinstance(only_ready, bool):
            raise PeerError("ready: must be true or false")
        entries = self._visible(request.peer)
        return json_response([entry for entry in entries if not only_ready or entry.get("state") == "READY"])

    async def _load(self, request: Request) -> Response:
        parameters = request.json().get("parameters", {})
        if not isinstance(parameters, dict):
            raise PeerError("parameters: must be an object")
        if any(name == "config" or name.startswith("file:") for name in parameters):
            raise RefusedError(
                "cannot load model: its files do not come with a request",
                hint="install it: edge-agent models add FILE",
            )
        await self._models.load(request.params["model"], parameters, request.deadline)
        return Response()

    def _unload(self, request: Request) -> Response:
        self._models.unload(request.params["model"])
        return Response()

    def _prometheus(self, request: Request) -> Response:
        lines = self._statistics.prometheus(lambda model: self._rules.allowed(request.peer, model))
        lines += cache_metrics([row for row in self._caches() if self._rules.allowed(request.peer, row["model"])])
        for source in self._metrics:
            lines.extend(source())
        return Response(200, ("\n".join([*lines, ""]).encode(),), "text/plain; version=0.0.4; charset=utf-8")

    def _all_stats(self, request: Request) -> Response:
        entries = self._visible(request.peer)
        return json_response(self._document((entry["name"], entry["version"]) for entry in entries))

    def _document(self, known: Iterable[tuple[str, str]]) -> dict[str, Any]:
        document = with_caches(self._statistics.document(known), self._caches())
        return document if self._feedback_kept is None else with_feedback(document, self._feedback_kept.rows())

    def statistics_document(self) -> dict[str, Any]:
        """The statistics of every model, for those who need not ask over the socket."""
        return self._document((entry["name"], entry["version"]) for entry in self._models.index())

    def computed(self, model: str, version: str) -> tuple[int, float]:
        """How often a version has computed an answer since the start, and the mean of the time in ms."""
        return self._statistics.computed(model, version)

    # One model.

    def _metadata(self, request: Request) -> Response:
        return json_response(self._models.model_metadata(request.params["model"], request.params.get("version")))

    def _model_ready(self, request: Request) -> Response:
        name = request.params["model"]
        ready = self._models.model_ready(name, request.params.get("version"))
        return json_response({"name": name, "ready": ready}, 200 if ready else 400)

    def _stats(self, request: Request) -> Response:
        name, version = request.params["model"], request.params.get("version")
        known = [
            (name, entry["version"])
            for entry in self._models.index()
            if entry["name"] == name and version in (None, entry["version"])
        ]
        return json_response(self._document(known))

    def _feedback(self, request: Request) -> Response:
        if self._feedback_kept is None:
            raise UnsupportedError("cannot take feedback: nobody keeps it here")
        name, version = request.params["model"], request.params.get("version")
        return json_response({"counted": self._feedback_kept.judge(name, version, request.json())})

    def _infer(self, request: Request) -> Response | Awaitable[Response]:
        started = time.perf_counter_ns()
        if self.watch is not None:
            self.watch.began(started)
        if oip.takes_long_to_decode(request.body, request.inference_length):
            return self._infer_apart(request, started)
        try:
            return self._ask(request, self._decode(request), started)
        except AgentError as error:
            return self._failed(error, request, started)

    async def _infer_apart(self, request: Request, started: int) -> Response:
        """As ``_infer``, with the request decoded in a thread: the loop belongs to all."""
        try:
            decoded = await asyncio.get_running_loop().run_in_executor(self._codec, self._decode, request)
            answer = self._ask(request, decoded, started)
        except AgentError as error:
            return self._failed(error, request, started)
        return answer if isinstance(answer, Response) else await answer

    def _decode(self, request: Request) -> oip.Decoded:
        return oip.decode_request(request.body, request.inference_length, self._limits.json_bytes)

    def _ask(self, request: Request, decoded: oip.Decoded, started: int) -> Response | Awaitable[Response]:
        if decoded.request.parameters:
            self._shorten(request, decoded.request)
        name, version = request.params["model"], request.params.get("version")
        answer = self._models.infer(name, version, decoded.request, request.deadline)
        if isinstance(answer, InferResponse) and not oip.takes_long_to_encode(answer, decoded):
            return self._answer(answer, self._encode(answer, decoded), decoded, started)
        return self._later(answer, decoded, request, started)

    def _shorten(self, request: Request, asked: InferRequest) -> None:
        """The caller's ``timeout`` (microseconds, 0: none) may shorten the deadline, never lengthen it."""
        timeout = asked.parameters.get("timeout")
        for field in ("timeout", "priority"):
            value = asked.parameters.get(field, 0)
            if type(value) is not int or value < 0:
                raise PeerError(f"parameters.{field}: must be a whole number, not negative")
        if timeout:
            request.hurried = True
            request.deadline = min(request.deadline, time.monotonic() + min(timeout, 1 << 40) / 1e6)

    async def _later(
        self, answer: InferResponse | Awaitable[InferResponse], decoded: oip.Decoded, request: Request, started: int
    ) -> Response:
        try:
            response = answer if isinstance(answer, InferResponse) else await answer
            if oip.takes_long_to_encode(response, decoded):
                encoding = asyncio.get_running_loop().run_in_executor(self._codec, self._encode, response, decoded)
                return self._answer(response, await encoding, decoded, started)
            return self._answer(response, self._encode(response, decoded), decoded, started)
        except AgentError as error:
            return self._failed(error, request, started)
        finally:
            if self.watch is not None:
                self.watch.ended(started)

    def _encode(self, response: InferResponse, decoded: oip.Decoded) -> Response:
        labels: Sequence[str] = ()
        outputs = decoded.request.outputs
        if outputs and any(output.classification for output in outputs):
            labels = self._labels(response.model_name, response.model_version)
        return oip.encode_response(response, decoded, self._limits.json_bytes, labels)

    def _answer(self, response: InferResponse, answer: Response, decoded: oip.Decoded, started: int) -> Response:
        """Count it."""
        said = response.parameters
        if self.watch is not None:
            self.watch.answered(decoded.request, response)
            self.watch.ended(started)
        self._statistics.succeeded(
            response.model_name,
            response.model_version,
            time.perf_counter_ns() - started,
            _nanoseconds(said.get("queue_us")),
            _nanoseconds(said.get("compute_us")),
            cached=said.get("cache") in ("hit", "joined"),
            batch=(said.get("batch", 0), said.get("batch_requests", 0)),
        )
        if "cascade" in said:
            rows, escalated = said["cascade_rows"], said["cascade_escalated"]
            self._statistics.cascaded(
                response.model_name, response.model_version, rows, escalated, said["cascade_saved_us"] * 1000
            )
        return answer

    def _failed(self, error: AgentError, request: Request, started: int) -> Response:
        name, version = request.params["model"], request.params.get("version")
        if self.watch is not None:
            self.watch.failed(name, version, error, hurried=request.hurried)
            self.watch.ended(started)
        # What infer() asks to try later is its queue: 429, as clients of model servers expect.
        response = error_answer(error, busy_status=429)
        if not isinstance(error, NotFoundError):
            self._statistics.failed(name, version or "", time.perf_counter_ns() - started, response.status)
        return response


def _closed(name: str) -> RefusedError:
    return RefusedError(f"cannot use model '{name[:64]}': it is not open to this user")


def _nanoseconds(microseconds: Any) -> int:
    return int(microseconds * 1000) if isinstance(microseconds, (int, float)) else 0
