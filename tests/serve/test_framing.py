"""The parser alone: one reading of each request, the same for every split of the bytes, sizes checked before memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.serve.framing import HeadReader, ProtocolError, RequestParser
from agent.serve.limits import Limits

LIMITS = Limits(request_line_bytes=256, head_bytes=1024, head_fields=8)
BODY_LIMIT = 4096

Outcome = tuple[str, object, object]


def parse(pieces: list[bytes], limits: Limits = LIMITS, reader: HeadReader | None = None) -> list[Outcome]:
    """All requests, and the error that ends them, of bytes that come in ``pieces``; as a connection would do it."""
    parser = RequestParser(reader or HeadReader(limits))
    outcomes: list[Outcome] = []
    waiting = False
    try:
        for piece in pieces:
            feed(parser, piece)
            while True:
                if not waiting:
                    head = parser.next_head()
                    if head is None:
                        break
                    parser.start_body(BODY_LIMIT)
                    waiting = True
                body = parser.next_body()
                if body is None:
                    break
                outcomes.append((head.method + " " + head.target, tuple(sorted(head.fields.items())), bytes(body)))
                waiting = False
    except ProtocolError as error:
        outcomes.append(("error", error.status, str(error)))
    return outcomes


def feed(parser: RequestParser, piece: bytes) -> None:
    """By the direct way where there is one, as for large bodies."""
    room = parser.room()
    if room is not None and len(room):
        part = piece[: len(room)]
        room[: len(part)] = part
        parser.wrote(len(part))
        piece = piece[len(part) :]
    if piece:
        parser.feed(piece)


def status_of(data: bytes) -> object:
    """The status that refuses ``data``."""
    outcomes = parse([data])
    assert outcomes, "nothing came out"
    assert outcomes[-1][0] == "error", outcomes
    return outcomes[-1][1]


GOOD = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED_HEAD = b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = CHUNKED_HEAD + b"4\r\nWiki\r\n5;ext=1\r\npedia\r\n0\r\nT: v\r\n\r\n"


def test_a_request_with_a_body_and_one_without() -> None:
    outcomes = parse([GOOD + b"GET /b?q=1 HTTP/1.1\r\nhost:x\r\nX-A: 1\r\nx-a:\t2 \r\n\r\n"])
    assert outcomes == [
        ("POST /a", (("content-length", "3"), ("host", "x")), b"abc"),
        ("GET /b?q=1", (("host", "x"), ("x-a", "1, 2")), b""),
    ]


def test_chunks_are_joined_and_trailers_dropped() -> None:
    outcomes = parse([CHUNKED + GOOD])
    assert [(what, body) for what, _, body in outcomes] == [("POST /c", b"Wikipedia"), ("POST /a", b"abc")]


def test_one_empty_line_before_a_request_is_skipped_and_a_second_refused() -> None:
    assert len(parse([b"\r\n" + GOOD + b"\r\n" + GOOD])) == 2
    assert status_of(b"\r\n\r\n" + GOOD) == 400


HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
REFUSED = {
    "no version": (b"GET /\r\n\r\n", 400),
    "two blanks": (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "tab in request line": (b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "blank at the end": (b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    "lower case http": (b"GET / http/1.1\r\nHost: x\r\n\r\n", 400),
    "NUL in target": (b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "raw UTF-8 in target": ("GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", 505),
    "HTTP/0.9": (b"GET / HTTP/0.9\r\n\r\n", 505),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "bare LF": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "bare LF at the end": (b"GET / HTTP/1.1\r\nHost: x\r\n\n", 400),
    "bare CR": (b"GET / HTTP/1.1\r\nHost: x\rX: y\r\n\r\n", 400),
    "CR CR LF": (b"GET / HTTP/1.1\r\nHost: x\r\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\nX: y\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "folded line": (HEAD + b"X: a\r\n b\r\n\r\n", 400),
    "folded first line": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "blank before colon": (HEAD + b"X : a\r\n\r\n", 400),
    "no colon": (HEAD + b"X\r\n\r\n", 400),
    "no name": (HEAD + b": a\r\n\r\n", 400),
    "NUL in value": (HEAD + b"X: a\0b\r\n\r\n", 400),
    "control in value": (HEAD + b"X: a\x07b\r\n\r\n", 400),
    "DEL in value": (HEAD + b"X: a\x7fb\r\n\r\n", 400),
    "length and chunked": (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "chunked and length": (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
    "the same length twice": (HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n", 400),
    "list of lengths": (HEAD + b"Content-Length: 3, 3\r\n\r\n", 400),
    "signed length": (HEAD + b"Content-Length: +3\r\n\r\n", 400),
    "negative length": (HEAD + b"Content-Length: -3\r\n\r\n", 400),
    "hexadecimal length": (HEAD + b"Content-Length: 0x3\r\n\r\n", 400),
    "blank in length": (HEAD + b"Content-Length: 3 3\r\n\r\n", 400),
    "underscore in length": (HEAD + b"Content-Length: 1_0\r\n\r\n", 400),
    "empty length": (HEAD + b"Content-Length:\r\n\r\n", 400),
    "superscript length": (HEAD + b"Content-Length: \xb2\r\n\r\n", 400),
    "length over the cap": (HEAD + b"Content-Length: 4097\r\n\r\n", 413),
    "length of 30 digits": (HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 413),
    "gzip coding": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "chunked twice": (HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 501),
    "two codings": (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 400),
    "chunked with a form feed": (HEAD + b"Transfer-Encoding: \x0cchunked\r\n\r\n", 400),
    "chunked in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "compressed body": (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n", 415),
    "unknown expectation": (HEAD + b"Expect: 200-ok\r\nContent-Length: 3\r\n\r\n", 417),
    "request line over the cap": (b"GET /" + b"a" * 300 + b" HTTP/1.1\r\n", 414),
    "endless request line": (b"G" * 257, 414),
    "headers over the cap": (HEAD + b"X: " + b"a" * 1024, 431),
    "too many headers": (HEAD + b"".join(b"X%d: y\r\n" % n for n in range(8)) + b"\r\n", 431),
}
CHUNK_HEAD = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED_CHUNKS = {
    "no size": (b"\r\n", 400),
    "not hexadecimal": (b"xyz\r\n", 400),
    "signed": (b"+4\r\nWiki\r\n", 400),
    "negative": (b"-4\r\nWiki\r\n", 400),
    "0x": (b"0x4\r\nWiki\r\n", 400),
    "blank before": (b" 4\r\nWiki\r\n", 400),
    "blank after": (b"4 \r\nWiki\r\n", 400),
    "underscore": (b"1_0\r\n", 400),
    "bare LF": (b"4\nWiki\r\n", 400),
    "longer than its size": (b"4\r\nWikis\r\n", 400),
    "shorter than its size": (b"4\r\nWi\r\n0\r\n\r\n", 400),
    "LF only after data": (b"4\r\nWiki\n", 400),
    "huge": (b"FFFFFFFFFFFFFFFFFF\r\n", 413),
    "over the cap": (b"1001\r\n", 413),
    "over the cap together": (b"1000\r\n" + b"a" * 4096 + b"\r\n1\r\na\r\n", 413),
    "endless line": (b"4;" + b"x" * 300, 400),
    "control in extension": (b"4;\x01\r\nWiki\r\n", 400),
    "bad trailer": (b"0\r\nX : y\r\n\r\n", 400),
    "folded trailer": (b"0\r\n x\r\n\r\n", 400),
    "too many trailers": (b"0\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(9)) + b"\r\n", 431),
    "trailers over the cap": (b"0\r\nX: " + b"a" * 1024, 431),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_request(name: str) -> None:
    data, status = REFUSED[name]
    assert status_of(data) == status


@pytest.mark.parametrize("name", REFUSED_CHUNKS)
def test_refused_chunks(name: str) -> None:
    data, status = REFUSED_CHUNKS[name]
    assert status_of(CHUNK_HEAD + data) == status


@pytest.mark.parametrize(
    "data", [data for data, _ in REFUSED.values()] + [CHUNK_HEAD + data for data, _ in REFUSED_CHUNKS.values()]
)
def test_a_refusal_is_the_same_one_byte_at_a_time(data: bytes) -> None:
    assert parse([data[index : index + 1] for index in range(len(data))]) == parse([data])


def test_chunks_of_one_byte_are_refused_before_they_cost_much() -> None:
    limits = Limits()
    parser = RequestParser(HeadReader(limits))
    parser.feed(CHUNK_HEAD)
    assert parser.next_head() is not None
    parser.start_body(limits.body_bytes)

    def flood() -> None:
        for _ in range(100):
            parser.feed(b"1\r\na\r\n" * 1000)
            parser.next_body()

    with pytest.raises(ProtocolError, match="chunks too small"):
        flood()


@pytest.mark.parametrize(
    "head", [b"Content-Length: 1000000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3B9ACA00\r\n"]
)
def test_a_gigabyte_is_refused_without_reserving_it(head: bytes) -> None:
    parser = RequestParser(HeadReader(Limits()))
    tracemalloc.start()
    try:
        parser.feed(HEAD + head)
        assert parser.next_head() is not None
        with pytest.raises(ProtocolError) as refused:  # noqa: PT012 - one or the other
            parser.start_body(64 << 20)
            parser.next_body()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.status == 413
    assert peak < 100_000


def test_a_body_that_may_not_be_reserved_is_not_allocated() -> None:
    parser = RequestParser(HeadReader(Limits()))
    parser.feed(HEAD + b"Content-Length: 50000000\r\n\r\n")
    assert parser.next_head() is not None

    def refuse(size: int) -> None:
        assert size == 50_000_000
        raise MemoryError

    tracemalloc.start()
    try:
        with pytest.raises(MemoryError):
            parser.start_body(64 << 20, refuse)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_what_follows_the_json_part_lies_aligned() -> None:
    for lead in (1, 7, 16, 129):
        parser = RequestParser(HeadReader(Limits()))
        parser.feed(HEAD + b"Content-Length: 4000\r\nInference-Header-Content-Length: %d\r\n\r\n" % lead)
        assert parser.next_head() is not None
        parser.start_body(5000)
        room = parser.room()
        assert room is not None
        parser.wrote(len(room))
        body = parser.next_body()
        assert isinstance(body, memoryview)
        assert np.frombuffer(body[lead : lead + 8 * 300], "<f8").flags.aligned


def test_a_remembered_head_gives_the_same_request() -> None:
    reader = HeadReader(LIMITS)
    data = GOOD + CHUNKED
    assert parse([data], reader=reader) == parse([data], reader=reader) == parse([data])
    assert len(reader.remembered) == 2


def test_remembered_heads_are_bounded() -> None:
    reader = HeadReader(LIMITS)
    for number in range(1000):
        parse([b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number], reader=reader)
    assert len(reader.remembered) <= 128


# Any split of any bytes gives what the whole gives.

pieces_of_requests = st.sampled_from(
    [GOOD, CHUNKED, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", b"\n", b"\r", b"GET / HTTP/1.1\r\n", b"Host: x\r\n"]
    + [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n", b"a", b"5\r\nabcde\r\n", b"\x00", b" "]
    + [data for data, _ in REFUSED.values() if len(data) < 200]
)
streams = st.one_of(
    st.lists(pieces_of_requests, max_size=8).map(b"".join),
    st.binary(max_size=200),
    st.tuples(st.sampled_from([GOOD, CHUNKED]), st.integers(0, 100), st.binary(min_size=1, max_size=2)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]
    ),
)


@given(streams, st.lists(st.integers(0, 600), max_size=12))
def test_any_split_gives_the_same_requests(data: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    pieces = [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]
    assert parse(pieces) == parse([data])


@given(streams)
def test_the_short_way_gives_what_the_long_way_gives(data: bytes) -> None:
    reader = HeadReader(LIMITS)
    expected = parse([data], reader=reader)  # remembers the heads
    short = RequestParser(reader).whole(data)
    if short is not None:
        head, body = short
        assert expected == [(f"{head.method} {head.target}", tuple(sorted(head.fields.items())), body)]


def test_the_short_way_is_taken_for_what_apps_send() -> None:
    reader = HeadReader(LIMITS)
    assert RequestParser(reader).whole(GOOD) is None  # never seen before
    parse([GOOD], reader=reader)
    head, body = RequestParser(reader).whole(GOOD) or (None, b"")
    assert head is not None
    assert (head.target, body) == ("/a", b"abc")
    for other in (GOOD + b"x", GOOD[:-1], b"\r\n" + GOOD, CHUNKED):
        assert RequestParser(reader).whole(other) is None


@given(st.binary(max_size=4096), st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_a_body_survives_any_chunking(body: bytes, sizes: list[int]) -> None:
    coded, rest = b"", body
    for size in sizes:
        if rest:
            part, rest = rest[:size], rest[size:]
            coded += b"%X\r\n%s\r\n" % (len(part), part)
    if rest:
        coded += b"%x\r\n%s\r\n" % (len(rest), rest)
    outcomes = parse([CHUNK_HEAD, coded, b"0\r\n\r\n"])
    assert outcomes[0][2] == body
