"""One request and its answer, as handlers see them; and which status each error gets.

``error_answer`` is the only place where errors become HTTP statuses.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from agent.base.errors import (
    AgentError,
    ConflictError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    PeerError,
    RefusedError,
    TooLargeError,
    TryLaterError,
    UnsupportedError,
)
from agent.serve.access import Peer
from agent.serve.heads import ProtocolError

Part = bytes | bytearray | memoryview

JSON = "application/json"
NDJSON = "application/x-ndjson"
BINARY = "application/octet-stream"

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

REASONS = {
    200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 400: "Bad Request", 403: "Forbidden",
    404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type", 417: "Expectation Failed",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip

#: Most special first: the first class that matches decides.
_STATUSES: tuple[tuple[type[AgentError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (TooLargeError, 413),
    (PeerError, 400),
    (RefusedError, 403),
    (DeadlineError, 504),
    (TryLaterError, 503),
    (DamagedError, 503),
    (UnsupportedError, 501),
)


def _no_progress(_event: Mapping[str, Any]) -> None:
    """Nobody asked to see progress."""


@dataclass(slots=True, eq=False)
class Request:
    """A whole request. ``deadline`` is in ``time.monotonic()`` seconds; ``params`` come from the route's pattern.

    ``inference_length`` is the number of bytes of JSON at the start of an Open Inference Protocol body.
    ``body`` may be a view of memory that lives as long as somebody refers to it. ``descriptors`` came with the request
    (admin socket only) and are closed after the answer; ``take_descriptors`` makes them the caller's.
    ``progress`` sends an event to a caller that asked for events (``Accept: application/x-ndjson``) and drops it
    otherwise, or when the caller reads too slowly; it may be called on the event loop's thread only.
    ``hurried``: the caller itself has made the deadline shorter.
    """

    method: str
    path: str
    query: str
    fields: Mapping[str, str]
    body: bytes | memoryview
    peer: Peer
    params: Mapping[str, str]
    deadline: float
    inference_length: int | None = None
    descriptors: list[int] = field(default_factory=list)
    progress: Callable[[Mapping[str, Any]], None] = _no_progress
    hurried: bool = False

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty object. Raises PeerError."""
        if not self.body:
            return {}
        document = read_json(self.body)
        if not isinstance(document, dict):
            raise PeerError("cannot read request: the body must be a JSON object")
        return document

    def options(self) -> dict[str, str]:
        """The query string as a mapping; the last of repeated names counts. Raises PeerError."""
        try:
            return dict(parse_qsl(self.query, keep_blank_values=True, strict_parsing=bool(self.query), errors="strict"))
        except ValueError as error:
            raise PeerError("cannot read request: malformed query string") from error

    def take_descriptors(self, count: int) -> list[int]:
        """Exactly ``count`` descriptors, now the caller's to close. Raises PeerError when there are more or fewer."""
        if len(self.descriptors) != count:
            raise PeerError(f"cannot read request: {count} descriptors wanted, {len(self.descriptors)} came")
        taken, self.descriptors = self.descriptors, []
        return taken

    def close_descriptors(self) -> None:
        """Close what no handler took."""
        while self.descriptors:
            os.close(self.descriptors.pop())


class Response(NamedTuple):
    """An answer: ``parts`` are written one after the other, large ones without being copied or joined."""

    status: int = 200
    parts: Sequence[Part] = ()
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.parts))


def encode_json(document: Any) -> bytes:
    """``document`` as JSON. NaN and Infinity in it raise ValueError: JSON has no word for them."""
    return _encode(document).encode("ascii")


def encode_parameters(parameters: Mapping[str, Any]) -> str:
    """A flat mapping as a JSON object. Every answer has one, and the general encoder takes three times as long."""
    parts = [
        _remembered_pair(name, value)
        if type(value) in _REMEMBERED
        else f"{encode_text(name)}:{value if type(value) is int else _encode(value)}"
        for name, value in parameters.items()
    ]
    return "{" + ",".join(parts) + "}"


#: A text as JSON; the same few come again and again.
encode_text: Callable[[str], str] = functools.lru_cache(maxsize=256)(_encode)
_REMEMBERED = frozenset((str, bool))


@functools.lru_cache(maxsize=256, typed=True)
def _remembered_pair(name: str, value: object) -> str:
    return f"{encode_text(name)}:{_encode(value)}"


def json_response(document: Any, status: int = 200) -> Response:
    """``document`` as a JSON answer."""
    return Response(status, (encode_json(document),))


def read_json(data: bytes | memoryview) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity. Raises PeerError, whatever the bytes are."""
    try:
        return json.loads(str(data, "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise PeerError(f"cannot read JSON: not UTF-8 at byte {error.start}") from error
    except RecursionError:
        # The scanner counts its depth and raises before the stack is in danger; its long traceback is of no use.
        raise PeerError("cannot read JSON: nested too deep") from None
    except json.JSONDecodeError as error:
        raise PeerError(f"cannot read JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # NaN and Infinity (below), integers of thousands of digits (int() itself)
        raise PeerError(f"cannot read JSON: {str(error)[:200]}") from error


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def status_of(error: AgentError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ProtocolError):
        return error.status
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def error_answer(error: AgentError, *, close: bool = False, busy_status: int = 503) -> Response:
    """``{"error": text}`` with the hint beside it. ``busy_status`` is for TryLaterError (429 where a queue is full)."""
    status = status_of(error)
    if status == 503 and isinstance(error, TryLaterError):
        status = busy_status
    document = {"error": str(error)}
    if error.hint:
        document["hint"] = error.hint
    headers: tuple[tuple[str, str], ...] = error.headers if isinstance(error, ProtocolError) else ()
    if status in (429, 503):
        headers = (*headers, ("Retry-After", "1"))
    return Response(status, (encode_json(document),), JSON, headers, close)


def response_head(response: Response, *, keep_alive: bool, minor: int) -> bytes:
    """Status line and fields, up to the empty line."""
    text = f"{_first_lines(response.status, response.content_type)}{response.length}\r\n"
    for name, value in response.headers:
        text += f"{name}: {value}\r\n"
    if not keep_alive:
        text += "Connection: close\r\n"
    elif minor == 0:
        text += "Connection: keep-alive\r\n"
    return (text + "\r\n").encode("latin-1")


@functools.lru_cache(maxsize=64)
def _first_lines(status: int, content_type: str) -> str:
    return f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\nContent-Type: {content_type}\r\nContent-Length: "


def event_line(event: Mapping[str, Any]) -> bytes:
    """A progress event as one chunk that holds one line ``{"event": ...}``."""
    return _chunk(f'{{"event":{_encode(event)}}}\n'.encode("ascii"))


def last_line(response: Response) -> bytes:
    """The answer that ends a stream of events: ``{"status": ..., "answer": ...}``, and the end of the chunks."""
    answer = b"".join(response.parts) or b"null"
    return _chunk(b'{"status":%d,"answer":%s}\n' % (response.status, answer)) + b"0\r\n\r\n"


def _chunk(line: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(line), line)
