"""The client of ``admin.sock``: requests with descriptors, and progress of long operations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from agent.client.blocking import Lines
from agent.client.exchange import Part, raise_for, request

ADMIN_SOCKET = "/run/edge-agent/admin.sock"


class AdminClient:
    """Synchronous client of ``admin.sock``. ``timeout`` bounds a call in seconds; None leaves it to the daemon."""

    def __init__(self, path: str | os.PathLike[str] = ADMIN_SOCKET, timeout: float | None = None) -> None:
        self._lines = Lines(path, timeout)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | Sequence[Any] | bytes | None = None,
        *,
        descriptors: Sequence[int] = (),
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> Any:
        """The JSON answer. ``descriptors`` go along with the request (the caller still closes its own).

        With ``on_event`` the daemon is asked for progress, and each event is handed over as it comes. Raises the error
        that the daemon answers.
        """
        fields: dict[str, str] = {}
        parts: list[Part] = []
        if isinstance(body, bytes):
            parts, fields["Content-Type"] = [body], "application/octet-stream"
        elif body is not None:
            parts, fields["Content-Type"] = [json.dumps(body).encode("ascii")], "application/json"
        if on_event is not None:
            fields["Accept"] = "application/x-ndjson, application/json"
        last: list[dict[str, Any]] = []

        def line(data: bytes) -> None:
            document = json.loads(data)
            if "event" in document and on_event is not None:
                on_event(document["event"])
            else:
                last.append(document)

        answer = self._lines.call(request(method, path, parts, fields), descriptors=descriptors, on_line=line)
        if not last:
            return answer.document()
        raise_for(last[0]["status"], last[0]["answer"])
        return last[0]["answer"]

    def close(self) -> None:
        """Close the kept connections."""
        self._lines.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
