"""The synchronous client, and the kept blocking connections below it."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agent.client.exchange import (
    AGAIN_S,
    FULL_QUEUE_PAUSE_S,
    KEPT,
    Answer,
    LostError,
    NotTaken,
    Part,
    Step,
    exchange,
    feedback_request,
    is_ready,
    model_path,
    not_taken,
    request,
    statistics_of,
    unreachable,
)
from agent.client.tensors import Result, Wanted, infer_request, infer_result

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

INFER_SOCKET = "/run/edge-agent/infer.sock"


class Line:
    """One blocking connection."""

    def __init__(self, path: str, deadline: float | None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            while not self._connect(path, deadline):
                time.sleep(FULL_QUEUE_PAUSE_S)
        except BaseException:
            self._sock.close()
            raise

    def _connect(self, path: str, deadline: float | None) -> bool:
        self._sock.settimeout(_left(deadline))
        try:
            self._sock.connect(path)
        except BlockingIOError:
            return False
        return True

    def perform(
        self, steps: Generator[Step, int, Answer], deadline: float | None, descriptors: Sequence[int] = ()
    ) -> Answer:
        """Drive an exchange to its answer."""
        try:
            kind, what = next(steps)
            while True:
                self._sock.settimeout(_left(deadline))
                try:
                    count = self._send(what, descriptors, deadline) if kind == "send" else self._sock.recv_into(what)
                except TimeoutError:
                    raise
                except OSError as error:
                    kind, what = steps.throw(error)
                else:
                    kind, what = steps.send(count)
        except StopIteration as stop:
            answer: Answer = stop.value
            return answer

    def _send(self, parts: list[Part], descriptors: Sequence[int], deadline: float | None) -> int:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        views: deque[memoryview] = deque(memoryview(part) for part in parts if len(part))
        while views:
            sent = self._sock.sendmsg([views[index] for index in range(min(64, len(views)))], rights)
            rights = []
            while views and sent >= len(views[0]):
                sent -= len(views.popleft())
            if views:
                views[0] = views[0][sent:]
                self._sock.settimeout(_left(deadline))
        return 0

    def close(self) -> None:
        self._sock.close()


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Lines:
    """Blocking connections to one socket, kept between calls. Safe to use from several threads."""

    def __init__(self, path: str | os.PathLike[str], timeout: float | None) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        self._kept: deque[Line] = deque()

    def call(
        self,
        parts: list[Part],
        *,
        descriptors: Sequence[int] = (),
        on_line: Callable[[bytes], None] | None = None,
        harmless: bool = False,
    ) -> Answer:
        """One exchange; on another connection where the agent did not take it, as when it restarts.

        A ``harmless`` one may be done twice: it is also repeated, once, when the agent took it and its answer is lost.
        """
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        try:
            if harmless:
                with contextlib.suppress(LostError):
                    return self._on_some(parts, deadline, descriptors, on_line)
            return self._on_some(parts, deadline, descriptors, on_line)
        except NotTaken:
            raise not_taken(self.path) from None
        except OSError as error:
            raise unreachable(self.path, error) from error

    def _on_some(
        self,
        parts: list[Part],
        deadline: float | None,
        descriptors: Sequence[int],
        on_line: Callable[[bytes], None] | None,
    ) -> Answer:
        while (line := self._kept_one()) is not None:
            with contextlib.suppress(NotTaken):
                return self._on(line, parts, deadline, descriptors, on_line)
        for pause in AGAIN_S:
            with contextlib.suppress(NotTaken):
                return self._on(Line(self.path, deadline), parts, deadline, descriptors, on_line)
            time.sleep(pause)
        return self._on(Line(self.path, deadline), parts, deadline, descriptors, on_line)

    def _on(
        self,
        line: Line,
        parts: list[Part],
        deadline: float | None,
        descriptors: Sequence[int],
        on_line: Callable[[bytes], None] | None,
    ) -> Answer:
        try:
            answer = line.perform(exchange(parts, on_line), deadline, descriptors)
        except BaseException:
            line.close()
            raise
        if answer.keep and len(self._kept) < KEPT:
            self._kept.append(line)
        else:
            line.close()
        return answer

    def _kept_one(self) -> Line | None:
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def close(self) -> None:
        """Close the kept connections; later calls open new ones."""
        while self._kept:
            self._kept.pop().close()


class Client:
    """Synchronous client, usable from several threads. ``timeout`` bounds a call, in seconds; None waits for ever."""

    def __init__(self, path: str | os.PathLike[str] = INFER_SOCKET, timeout: float | None = 30.0) -> None:
        self._lines = Lines(path, timeout)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        outputs: Wanted | None = None,
        version: str | None = None,
        id: str | None = None,  # noqa: A002 - the protocol's word
        parameters: Mapping[str, Any] | None = None,
        datatypes: Mapping[str, str] | None = None,
    ) -> Result:
        """Run ``model`` on arrays by input name.

        ``outputs``: names, or names with the parameters of each (``{"scores": {"classification": 3}}``); None: all.
        A restart of the agent is waited for; a request whose answer is lost in one is repeated once.
        ``datatypes`` overrides what an array's dtype says (``{"x": "BF16"}``). BYTES inputs are arrays of ``bytes`` or
        texts; BYTES outputs are arrays of ``bytes``; BF16 outputs are widened to float32.
        Raises NotFoundError, PeerError (naming the input), RefusedError, TryLaterError, DeadlineError.
        """
        target = model_path(model, version, "/infer")
        parts = infer_request(target, inputs, outputs, id, parameters, datatypes)
        return infer_result(self._lines.call(parts, harmless=True))

    def metadata(self, model: str | None = None, version: str | None = None) -> dict[str, Any]:
        """Metadata of a model, or of the server."""
        return self._get("/v2" if model is None else model_path(model, version))

    def ready(self, model: str | None = None, version: str | None = None) -> bool:
        """Whether a model, or the server, can answer. Raises NotFoundError for an unknown model."""
        target = "/v2/health/ready" if model is None else model_path(model, version, "/ready")
        return is_ready(self._lines.call(request("GET", target), harmless=True))

    def models(self) -> list[dict[str, Any]]:
        """Every model version that this user may see: name, version, state, reason."""
        answer: list[dict[str, Any]] = self._lines.call(
            request("POST", "/v2/repository/index"), harmless=True
        ).document()
        return answer

    def statistics(self, model: str | None = None, version: str | None = None) -> list[dict[str, Any]]:
        """Counts and times of one model, or of all."""
        return statistics_of(self._get("/v2/models/stats" if model is None else model_path(model, version, "/stats")))

    def feedback(
        self,
        model: str,
        correct: bool | None = None,
        *,
        label: str | float | bool | None = None,
        predicted: str | float | bool | None = None,
        version: str | None = None,
        id: str | None = None,  # noqa: A002 - the protocol's word
    ) -> bool:
        """Tell whether an answer was right: ``correct``, or the true ``label`` beside the one that was ``predicted``.

        ``version``: the one that answered (``Result.model_version``), else the active one. ``id``: of the request, so
        that it counts once; False where it had counted already.
        """
        parts = feedback_request(model, version, correct, label, predicted, id)
        return bool(self._lines.call(parts).document()["counted"])

    def _get(self, target: str) -> dict[str, Any]:
        document: dict[str, Any] = self._lines.call(request("GET", target), harmless=True).document()
        return document

    def close(self) -> None:
        """Close the kept connections."""
        self._lines.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
