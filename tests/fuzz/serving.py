"""Targets of the serving side: HTTP framing, against h11, and request targets."""

from __future__ import annotations

import functools
import random
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import unquote_to_bytes

import h11

from agent.base.errors import AgentError, NotFoundError, PeerError
from agent.serve.access import Peer
from agent.serve.exchange import Request, Response
from agent.serve.framing import Head, HeadReader, ProtocolError, RequestParser
from agent.serve.limits import Limits
from agent.serve.routes import Match, Route, RouteTable
from tests.fuzz.target import Memory, Target, many

# HTTP framing.

LIMITS = Limits(request_line_bytes=512, head_bytes=2048, head_fields=16)
BODY_LIMIT = 2048


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that the parser took: its head, its body, and the bytes of the stream that it stands in."""

    head: Head
    body: bytes
    start: int
    end: int


def parse(pieces: list[bytes], reader: HeadReader) -> tuple[list[Taken], str]:
    """All requests in bytes that come in ``pieces``, as a connection takes them, and the refusal that ends them."""
    parser = RequestParser(reader)
    taken: list[Taken] = []
    head: Head | None = None
    fed = start = 0
    try:
        for piece in pieces:
            _feed(parser, piece)
            fed += len(piece)
            while True:
                if head is None:
                    head = parser.next_head()
                    if head is None:
                        break
                    parser.start_body(BODY_LIMIT)
                body = parser.next_body()
                if body is None:
                    break
                end = fed - parser.pending
                taken.append(Taken(head, bytes(body), start, end))
                head, start = None, end
    except ProtocolError as error:
        return taken, f"{error.status} {error}"
    return taken, "waits for a body" if head else "waits for a head"


def _feed(parser: RequestParser, piece: bytes) -> None:
    """By the direct way where there is one, as large bodies come."""
    room = parser.room()
    if room is not None and len(room):
        part = piece[: len(room)]
        room[: len(part)] = part
        parser.wrote(len(part))
        piece = piece[len(part) :]
    if piece:
        parser.feed(piece)


def read_http(data: bytes) -> tuple[list[Taken], str]:
    return parse([data], HeadReader(LIMITS))


def holds_http(data: bytes, whole: tuple[list[Taken], str]) -> None:
    """However the bytes are split, and with the heads remembered, the same; and h11 reads each request alike."""
    chance = random.Random(zlib.crc32(data))
    reader = HeadReader(LIMITS)
    splits = [sorted(chance.randrange(len(data) + 1) for _ in range(count)) for count in (1, 3, 9)]
    splits.append(list(range(min(len(data), 400))))  # byte by byte
    for ends in splits:
        pieces = [data[start:end] for start, end in pairwise([0, *ends, len(data)]) if start < end]
        assert parse(pieces, reader) == whole, f"split at {ends[:20]}"
    for taken in whole[0]:
        _same_as_h11(data, taken)


def _same_as_h11(data: bytes, taken: Taken) -> None:
    start = taken.start + (2 if data[taken.start : taken.start + 2] == b"\r\n" else 0)
    if _stricter_h11(data[start : taken.end], taken.head):
        return
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 16)
    connection.receive_data(data[start:])
    request = connection.next_event()
    assert isinstance(request, h11.Request), f"h11 gives {request!r} for {taken.head}"
    fields: dict[str, str] = {}
    for name, value in request.headers:
        word, text = name.decode(), value.decode("latin-1")
        fields[word] = f"{fields[word]}, {text}" if word in fields else text
    ours = dict(taken.head.fields)
    if "transfer-encoding" in ours:  # h11 writes it small
        ours["transfer-encoding"] = ours["transfer-encoding"].lower()
    assert (request.method.decode(), request.target.decode(), fields) == (taken.head.method, taken.head.target, ours)
    assert request.http_version == f"1.{taken.head.minor}".encode()
    body = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data), f"h11 gives {event!r} in a body that we took"
        body += event.data
    assert body == taken.body
    assert len(data) - len(connection.trailing_data[0]) == taken.end, "h11 sees the end of the request elsewhere"


def _stricter_h11(raw: bytes, head: Head) -> bool:
    """What RFC 9112 allows and h11 refuses: more than 20 digits of a length or chunk size, blanks before a ``;``."""
    if head.length is not None:
        return len(head.fields["content-length"]) > 20
    return head.chunked and bool(re.search(rb"\r\n(?:[0-9A-Fa-f]{21,}|[0-9A-Fa-f]+[ \t]+;)", raw))


HTTP_SEEDS = (
    b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" * 2,
    b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\nWiki\r\n5;e=1\r\npedia\r\n0\r\nT: v\r\n\r\n",
    b"\r\nHEAD http://x/a?b HTTP/1.0\r\nX-A: 1\r\nx-a:\t2 \r\nConnection: keep-alive\r\n\r\n"
    b"GET / HTTP/1.1\r\nhost:y\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nInference-Header-Content-Length: 2\r\n"
    b"Content-Length: 00012\r\nContent-Type: application/octet-stream\r\n\r\n{}0123456789",
    b"POST /big HTTP/1.1\r\nHost: x\r\nContent-Length: 1500\r\n\r\n"
    + b"z" * 1500
    + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
)
_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"40\r\n%s\r\n" % (b"a" * 64) * 8 + b"0\r\n\r\n"
HTTP_SHAPES = {
    "requests": many(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "posts": many(_HEAD + b"Content-Length: 1\r\n\r\n "),
    "chunks": many(_CHUNKED),
    "endless line": many(b"a", b"GET /"),
    "endless fields": many(b"a: b\r\n", b"GET / HTTP/1.1\r\n"),
    "endless body": many(b"a", _HEAD + b"Content-Length: 2000\r\n\r\n"),
    "trailers": many(b"a: b\r\n", _HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"),
}


def _http_in_reads(data: bytes) -> object:
    """For the growth of time: as a connection gets it, in reads of the usual size."""
    return parse([data[start : start + 4096] for start in range(0, len(data), 4096)], HeadReader(LIMITS))


# Request targets and query strings.


def _handler(_request: Request) -> Response:
    return Response()


@functools.lru_cache(maxsize=1)
def table() -> RouteTable:
    patterns = (
        "/v2",
        "/v2/models/stats",
        "/v2/models/{model}",
        "/v2/models/{model}/versions/{version}/infer",
        "/metrics",
    )
    return RouteTable(Route("GET", pattern, "infer", _handler) for pattern in patterns)


def read_target(data: bytes) -> tuple[Match, dict[str, str]]:
    # What framing lets through: visible ASCII.
    text = "".join(chr(0x21 + byte % 0x5E) if not 0x21 <= byte <= 0x7E else chr(byte) for byte in data)
    match = table().match("GET", text)
    request = Request("GET", match.path, match.query, {}, b"", Peer(0, 0, frozenset(), 0), match.params, 0.0)
    return match, request.options()


def holds_target(_data: bytes, found: tuple[Match, dict[str, str]]) -> None:
    match, _ = found
    given, pattern = match.path.split("/"), match.route.pattern.split("/")
    assert len(given) == len(pattern)
    for segment, wanted in zip(given, pattern, strict=True):
        decoded = unquote_to_bytes(segment).decode()
        if wanted.startswith("{"):
            assert match.params[wanted[1:-1]] == decoded != ""
        else:
            assert decoded == wanted


TARGET_SEEDS = (
    b"/v2", b"/v2/models/m%20%C3%A9?a=b&c=%41", b"http://h/v2/models/a/versions/1/infer", b"/metrics?x", b"/v2//",
)  # fmt: skip
TARGETS = (
    Target(
        "http-framing", read_http, holds_http, (AgentError,), lambda: HTTP_SEEDS, "http", HTTP_SHAPES,
        work=_http_in_reads, memory=Memory(1 << 20, 128),
    ),
    Target(
        "http-target", read_target, holds_target, (ProtocolError, NotFoundError, PeerError), lambda: TARGET_SEEDS,
        "http-target",
        {"segments": many(b"a/", b"/v2/"), "percents": many(b"%41", b"/v2/models/"), "options": many(b"a=b&", b"/v2?")},
        memory=Memory(1 << 20, 256),
    ),
)  # fmt: skip
