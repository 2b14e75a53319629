"""Answers of a web server, right and wrong, in any pieces: what is read of them, and that nothing else comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.link.sources import SourceError
from agent.link.web import Body, Head, Patience, Stream, read_head

PATIENCE = Patience(20.0, 1)


def read(*pieces: bytes, room: int = 1 << 16) -> tuple[Head, bytes]:
    """Head and body of an answer that comes in these pieces, and then the end."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(OSError), theirs:
            for piece in pieces:
                theirs.sendall(piece)

    async def work() -> tuple[Head, bytes]:
        stream = Stream(ours, PATIENCE)
        head = await read_head(stream)
        body, found, buffer = Body(stream, head), bytearray(), bytearray(room)
        while count := await body.read(memoryview(buffer)):
            found += buffer[:count]
        return head, bytes(found)

    ours.setblocking(False)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        return asyncio.run(work())
    finally:
        ours.close()
        sender.join(10)


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
)
PLAIN = b'HTTP/1.1 206 Partial\r\nContent-Length: 5\r\nETag: "a"\r\n\r\nhello'
CLOSED = b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\nto the end"
EARLY = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "status", "content"),
    [
        (CHUNKED, 200, b"abc0123456789"),
        (PLAIN, 206, b"hello"),
        (CLOSED, 200, b"to the end"),
        (EARLY + PLAIN, 206, b"hello"),
    ],
    ids=["chunked", "plain", "until-closed", "after-others"],
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_is_the_same_in_any_pieces(answer: bytes, status: int, content: bytes, size: int) -> None:
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    for room in (1, 3, 1 << 16):
        head, found = read(*pieces, room=room)
        assert (head.status, found) == (status, content)


def test_what_comes_after_the_end_is_not_of_the_body() -> None:
    assert read(PLAIN + b"HTTP/1.1 200 OK\r\n\r\nmore")[1] == b"hello"
    assert read(CHUNKED + b"more")[1] == b"abc0123456789"


@pytest.mark.parametrize("answer", [CHUNKED, PLAIN], ids=["chunked", "plain"])
def test_an_answer_that_is_cut_off_is_never_taken_for_whole(answer: bytes) -> None:
    end = answer.index(b"0\r\nTrailer") if answer is CHUNKED else len(answer)
    for at in range(end):
        with pytest.raises(SourceError):
            read(answer[:at])


@given(
    data=st.binary(max_size=300)
    | st.tuples(
        st.sampled_from([CHUNKED, PLAIN, CLOSED, EARLY + PLAIN]), st.integers(0, 120), st.binary(max_size=8)
    ).map(lambda made: made[0][: made[1]] + made[2] + made[0][made[1] + len(made[2]) :])
)
def test_whatever_comes_is_an_answer_or_a_source_that_fails(data: bytes) -> None:
    with contextlib.suppress(SourceError):
        head, found = read(data)
        assert 200 <= head.status < 600 and len(found) <= len(data)
