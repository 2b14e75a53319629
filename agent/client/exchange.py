"""One HTTP exchange with the agent as steps: what to send, where to receive, what came of it. No sockets.

The synchronous and the asynchronous client perform the same steps, so that both treat early refusals, lost connections
and repeats alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from agent.base.errors import (
    AgentError,
    ConflictError,
    DeadlineError,
    NotFoundError,
    PeerError,
    RefusedError,
    TooLargeError,
    TryLaterError,
    UnsupportedError,
)

#: The agent's answers have short heads; what else comes with them is copied once.
HEAD_BYTES = 16384
#: Parts up to this size are cheaper to join than to send apart.
SMALL_BYTES = 65536
#: Memory for an answer is taken when its length is announced; no model's outputs come near this.
MAX_ANSWER_BYTES = 1 << 30
#: Connections kept for later calls.
KEPT = 8
#: A full queue of the listening socket refuses at once (unix(7)); tried again after this pause.
FULL_QUEUE_PAUSE_S = 0.005
#: Pauses before a request that was surely not taken is sent again on another new connection: an agent that restarts may
#: have accepted one just before it closed its doors, and the next one waits for its successor.
AGAIN_S = (0.005, 0.01, 0.02)
LENGTH_FIELD = "inference-header-content-length"

_ERRORS: dict[int, type[AgentError]] = {
    400: PeerError,
    403: RefusedError,
    404: NotFoundError,
    405: PeerError,
    408: DeadlineError,
    409: ConflictError,
    411: PeerError,
    413: TooLargeError,
    414: TooLargeError,
    415: PeerError,
    417: PeerError,
    429: TryLaterError,
    431: TooLargeError,
    501: UnsupportedError,
    503: TryLaterError,
    504: DeadlineError,
}

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; ``body`` lies so that what follows its JSON part is aligned."""

    status: int
    fields: Mapping[str, str]
    body: memoryview
    keep: bool

    def document(self) -> Any:
        """The JSON body. Raises the error that the status stands for."""
        data = self.body[: _count(self.fields, LENGTH_FIELD, len(self.body))]
        try:
            document = json.loads(str(data, "utf-8")) if data else {}
        except (ValueError, RecursionError) as error:
            raise AgentError(f"cannot read the agent's answer: {error}") from error
        raise_for(self.status, document)
        return document


def raise_for(status: int, document: Any) -> None:
    """Raise the error that an HTTP status stands for, with the agent's text and hint."""
    if status < 400:
        return
    known = document if isinstance(document, dict) else {}
    text = str(known.get("error") or f"the agent answered {status}")
    raise _ERRORS.get(status, AgentError)(text, hint=str(known.get("hint", "")))


def request(
    method: str, target: str, parts: Sequence[Part] = (), fields: Mapping[str, str] | None = None
) -> list[Part]:
    """The bytes of a request, the head first."""
    length = sum(len(part) for part in parts)
    lines = [f"{method} {target} HTTP/1.1", "Host: edge-agent", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
    return ["\r\n".join([*lines, "", ""]).encode("ascii"), *parts]


def model_path(model: str, version: str | None, rest: str = "") -> str:
    """The path of a model, or of something below it."""
    return f"/v2/models/{_quoted(model)}" + (f"/versions/{_quoted(version)}" if version else "") + rest


def _quoted(segment: str) -> str:
    return segment if segment.replace("-", "").replace(".", "").replace("_", "").isalnum() else quote(segment, safe="")


class NotTaken(Exception):  # noqa: N818 - an outcome that may be mended, not an error of the caller
    """The server surely did not act on the request."""


class LostError(TryLaterError):
    """The server may have acted on the request, and its answer did not come. To be repeated only where that is safe."""


#: ("send", parts) or ("receive", memory); a receive is answered with the number of bytes.
Step = tuple[str, Any]


def exchange(parts: list[Part], on_line: Callable[[bytes], None] | None = None) -> Generator[Step, int, Answer]:
    """Send a request and read its answer. A driver performs the steps and throws OSError into it."""
    sent = True
    try:
        yield "send", parts
    except OSError:
        sent = False  # an early refusal (body too large) may still be there to be read
    buffer = bytearray(HEAD_BYTES)
    view = memoryview(buffer)
    filled = 0
    while (end := buffer.find(b"\r\n\r\n", 0, filled)) < 0:
        count = yield from _receive(view[filled:], sent=sent, first=not filled)
        filled += count
    status, minor, fields = _head(bytes(view[:end]))
    rest = view[end + 4 : filled]
    keep = sent and minor == 1 and fields.get("connection", "").lower() != "close"
    if fields.get("transfer-encoding", "").lower() == "chunked":
        body = yield from _chunks(bytes(rest), on_line)
        return Answer(status, fields, memoryview(body), keep)
    length, lead = _count(fields, "content-length"), _count(fields, LENGTH_FIELD, 0)
    if length > MAX_ANSWER_BYTES:
        raise AgentError(f"cannot read the agent's answer: {length} bytes announced")
    if len(rest) > length:
        raise AgentError("cannot read the agent's answer: longer than its length")
    pad = -lead % 16  # malloc aligns to 16: what follows the JSON part is then aligned too
    body_view = memoryview(bytearray(pad + length))[pad:]
    body_view[: len(rest)] = rest
    filled = len(rest)
    while filled < length:
        filled += yield from _receive(body_view[filled:], sent=sent, first=False)
    return Answer(status, fields, body_view, keep)


def _receive(room: memoryview, *, sent: bool, first: bool) -> Generator[Step, int, int]:
    if not len(room):
        raise AgentError("cannot read the agent's answer: headers too long")
    try:
        count = yield "receive", room
    except OSError as error:
        if first:
            # Linux reports ECONNRESET when a Unix socket is closed with bytes unread, so the request was not taken; a
            # server that took it and died shows a plain end.
            raise NotTaken from error
        raise LostError(f"cannot read the agent's answer: {error.strerror}") from error
    if not count:
        if first and not sent:
            raise NotTaken
        raise LostError("cannot read the agent's answer: the connection was closed before its end")
    return count


def _head(data: bytes) -> tuple[int, int, dict[str, str]]:
    lines = data.decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    if len(words) < 2 or words[0] not in ("HTTP/1.1", "HTTP/1.0") or not re.fullmatch("[1-9][0-9][0-9]", words[1]):
        raise AgentError("cannot read the agent's answer: not HTTP")
    fields = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return int(words[1]), int(words[0][-1]), fields


def _count(fields: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A field of digits; ``default`` where it is missing. AgentError."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if value is None or not re.fullmatch("[0-9]{1,18}", value):
        raise AgentError(f"cannot read the agent's answer: {name} missing or no number")
    return int(value)


def _chunks(data: bytes, on_line: Callable[[bytes], None] | None) -> Generator[Step, int, bytes]:
    """A chunked body; each whole line is also given to ``on_line`` as soon as it is there."""
    raw, body, told = bytearray(data), bytearray(), 0
    room = memoryview(bytearray(HEAD_BYTES))
    while True:
        end = raw.find(b"\r\n")
        size = -1 if end < 0 else _chunk_size(bytes(raw[:end]))
        if size >= 0 and len(raw) >= end + 4 + size:
            body += raw[end + 2 : end + 2 + size]
            del raw[: end + 4 + size]
            if not size:
                return bytes(body)
            while on_line is not None and (newline := body.find(b"\n", told)) >= 0:
                on_line(bytes(body[told:newline]))
                told = newline + 1
            continue
        count = yield from _receive(room, sent=True, first=False)
        raw += room[:count]


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as error:
        raise AgentError("cannot read the agent's answer: malformed chunk") from error


def unreachable(path: str, error: OSError) -> AgentError:
    """What a failed connection means to the caller."""
    if isinstance(error, TimeoutError):
        return DeadlineError("cannot ask the agent: no answer within the timeout")
    if isinstance(error, PermissionError):
        return RefusedError(
            f"cannot reach the agent at {path}: permission denied", hint="is this user in the socket's group?"
        )
    hint = "is edge-agent running, and is this its socket?"
    return TryLaterError(f"cannot reach the agent at {path}: {error.strerror or error}", hint=hint)


def not_taken(path: str) -> AgentError:
    """The error for a request that the agent did not take, on a fresh connection too."""
    return TryLaterError(f"cannot ask the agent at {path}: it closed the connection", hint="try again")


def is_ready(answer: Answer) -> bool:
    """The answer of a health request."""
    if answer.status == 400:  # the protocol's "false"
        return False
    answer.document()
    return True


def feedback_request(
    model: str, version: str | None, correct: bool | None, label: Any, predicted: Any, request_id: str | None
) -> list[Part]:
    """What an app says of an answer."""
    said = {"label": label, "predicted": predicted} if correct is None else {"correct": correct}
    document = said if request_id is None else {**said, "id": request_id}
    return request("POST", model_path(model, version, "/feedback"), [json.dumps(document).encode("ascii")])


def statistics_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The list in a statistics answer."""
    statistics: list[dict[str, Any]] = document["model_stats"]
    return statistics
