"""Connections over real sockets: order, keep-alive, deadlines, refusals, slow and vanishing peers."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import select
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from agent.serve.http import Connection
from tests.serve.running import Running, answer, ask, at_end, connect, get, post, serving
from tests.serve.toy import ToyModels

Served = tuple[Running, ToyModels]

DOUBLE = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
INFER = post("/v2/models/double/infer", DOUBLE)
SLOW = post("/v2/models/slow/infer", DOUBLE)


def y_of(body: bytes) -> list[float]:
    """The output of ``double``."""
    values: list[float] = json.loads(body)["outputs"][0]["data"]
    return values


def test_a_connection_is_kept_and_serves_request_after_request(served: Served) -> None:
    with connect(served[0].path) as sock:
        for _ in range(50):
            sock.sendall(INFER)
            status, _, body = answer(sock)
            assert (status, y_of(body)) == (200, [2, 4, 6, 8])


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with connect(served[0].path) as sock:
        bodies = [DOUBLE.replace(b"[1,2,3,4]", b"[%d,0,0,0]" % number) for number in range(100)]
        sock.sendall(b"".join(post("/v2/models/double/infer", body) for body in bodies))
        assert [y_of(read_one(sock))[0] for _ in bodies] == [2.0 * number for number in range(100)]


def read_one(sock: socket.socket) -> bytes:
    """The body of exactly one answer; the standard library's reader may take more than one."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1)
    length = int(data.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return body


def test_a_request_pipelined_behind_a_slow_one_waits_for_it(served: Served) -> None:
    running, models = served
    with connect(running.path) as sock:
        sock.sendall(SLOW + INFER)
        running.until(lambda: len(models.seen) == 1)
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(30)
        running.look(models.release.set)
        assert y_of(read_one(sock)) == [1, 2, 3, 4]
        assert y_of(read_one(sock)) == [2, 4, 6, 8]


def send_until_stopped(sock: socket.socket, data: bytes) -> int:
    """Send until the kernel takes no more for a while: the other side has stopped reading. Bytes that were taken."""
    sock.setblocking(False)
    sent = 0
    while select.select([], [sock], [], 0.3)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(data)
        assert sent < 50_000_000, "it is read without end"
    sock.settimeout(30)
    return sent


def test_what_a_peer_sends_while_it_waits_is_not_read_without_end(served: Served) -> None:
    running, models = served
    with connect(running.path) as sock:
        sock.sendall(SLOW)
        running.until(lambda: len(models.seen) == 1)
        assert send_until_stopped(sock, INFER * 100) < 4 << 20  # the kernel's buffer and one read
        running.look(models.release.set)
        assert y_of(read_one(sock)) == [1, 2, 3, 4]
        assert y_of(read_one(sock)) == [2, 4, 6, 8]


def test_a_peer_that_reads_no_answers_is_not_served_without_end(served: Served) -> None:
    with connect(served[0].path) as greedy, connect(served[0].path) as modest:
        assert send_until_stopped(greedy, get("/v2/health/live") * 500) < 4 << 20
        modest.sendall(INFER)
        assert answer(modest)[0] == 200


def test_a_fast_pipeliner_leaves_others_their_turn(served: Served) -> None:
    running, models = served

    async def send_both() -> None:
        """On the loop itself, so that both requests are there before it looks."""
        greedy.sendall(INFER * 100)  # few enough that the answers fit into the kernel
        modest.sendall(INFER.replace(b"[1,2,3,4]", b"[9,9,9,9]"))

    with connect(running.path) as greedy, connect(running.path) as modest:
        for sock in (greedy, modest):  # both are accepted
            sock.sendall(get("/v2"))
            assert answer(sock)[0] == 200
        running.run(send_both())
        assert answer(modest)[0] == 200
        running.until(lambda: len(models.seen) == 101)
        position = [request.inputs[0].array[0, 0] for request in models.seen].index(9)
        assert position < 50  # not behind all of them


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 1_000_000])
def test_bodies_of_all_sizes_arrive_whole_in_any_pieces(served: Served, size: int) -> None:
    values = np.arange(size, dtype="u1")
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "UINT8", "shape": [size], "parameters": {"binary_data_size": size}},
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    request = post("/v2/models/echo/infer", head + values.tobytes(), f"Inference-Header-Content-Length: {len(head)}")
    with connect(served[0].path) as sock:
        for step in (len(request), 30_000):
            for start in range(0, len(request), step):
                sock.sendall(request[start : start + step])
            status, fields, body = answer(sock)
            assert status == 200
            assert body[int(fields["inference-header-content-length"]) :] == values.tobytes()


def test_a_chunked_body_is_taken(served: Served) -> None:
    head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (1, DOUBLE[index : index + 1]) for index in range(len(DOUBLE)))
    with connect(served[0].path) as sock:
        sock.sendall(head + chunks + b"0\r\n\r\n" + INFER)
        assert y_of(read_one(sock)) == [2, 4, 6, 8]
        assert y_of(read_one(sock)) == [2, 4, 6, 8]


def test_the_peer_is_told_to_continue_before_it_sends_its_body(served: Served) -> None:
    with connect(served[0].path) as sock:
        head, body = post("/v2/models/double/infer", DOUBLE, "Expect: 100-continue").split(b"\r\n\r\n")
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert y_of(read_one(sock)) == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("target", "length", "status"),
    [("/v2/models/double/infer", 1_000_000_000, 413), ("/v2/models/nope/infer", 5, 404), ("/v2/nowhere", 5, 404)],
)
def test_the_peer_is_not_told_to_continue_what_will_be_refused(
    served: Served, target: str, length: int, status: int
) -> None:
    with connect(served[0].path) as sock:
        sock.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n".encode())
        sock.sendall(b"Expect: 100-continue\r\n\r\n")
        assert answer(sock)[0] == status
        assert at_end(sock)


def test_head_answers_without_a_body_and_the_connection_goes_on(served: Served) -> None:
    with connect(served[0].path) as sock:
        sock.sendall(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        status, fields, body = answer(sock, "HEAD")
        assert (status, body) == (200, b"")
        assert int(fields["content-length"]) > 0
        sock.sendall(b"HEAD /v2/models/nope HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(sock, "HEAD")[0] == 404
        sock.sendall(get("/v2"))
        assert json.loads(answer(sock)[2])["name"] == "toy"


def test_head_sends_not_one_byte_of_a_body(served: Served) -> None:
    for target in ("/v2", "/v2/models/nope"):
        with connect(served[0].path) as sock:
            sock.sendall(f"HEAD {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while part := sock.recv(65536):
                data += part
        assert data.endswith(b"\r\n\r\n")


def test_http_1_0_is_closed_unless_it_asks_otherwise(served: Served) -> None:
    status, _, closed = ask(served[0].path, b"GET /v2 HTTP/1.0\r\n\r\n")
    assert (status, closed) == (200, True)
    with connect(served[0].path) as sock:
        for _ in range(2):
            sock.sendall(b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            status, fields, _ = answer(sock)
            assert (status, fields["connection"]) == (200, "keep-alive")


def test_the_connection_is_closed_when_the_peer_asks_for_it(served: Served) -> None:
    assert ask(served[0].path, get("/v2", "Connection: Close"))[2]


def test_the_absolute_form_of_a_target_is_understood(served: Served) -> None:
    assert ask(served[0].path, get("http://x/v2/models/double/ready"))[0] == 200


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/v2", 405),
        ("DELETE", "/v2/models/double", 405),
        ("OPTIONS", "/v2", 405),
        ("BREW", "/v2", 501),
        ("get", "/v2", 501),
        ("GET", "/v3", 404),
        ("GET", "/v2/", 404),
        ("GET", "//v2", 404),
        ("GET", "/v2/../v2", 404),
        ("GET", "/v2/models/%2e%2e", 404),
        ("GET", "/v2/models/a%2fb", 404),
        ("GET", "/v2/models/%zz", 400),
        ("GET", "/v2/models/%ff", 400),
        ("GET", "*", 400),
        ("GET", "/" + "a/" * 2000, 404),
        ("POST", "/v2/models/double/infer", 411),
    ],
)
def test_wrong_method_or_path(served: Served, method: str, target: str, status: int) -> None:
    with connect(served[0].path) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        got, fields, body = answer(sock, method)
        assert got == status
        assert json.loads(body)["error"]
        if status == 405:
            assert "GET" in fields["allow"] or "POST" in fields["allow"]
        sock.sendall(INFER)  # the connection goes on
        assert answer(sock)[0] == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", 413),
        (b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (b"GET /" + b"a" * 10_000_000, 414),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 10_000_000, 431),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 1_000_000, 431),
        (b"GET /v2 HTTP/3.0\r\nHost: x\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_a_refused_request_ends_its_connection_and_the_next_is_served(served: Served, data: bytes, status: int) -> None:
    got, body, closed = ask(served[0].path, data)
    assert (got, closed) == (status, True)
    assert json.loads(body)["error"].startswith("cannot ")
    assert ask(served[0].path, INFER)[0] == 200


def test_a_body_over_the_limit_is_refused_alike_however_it_comes(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s", body_bytes=100)
    request = post("/v2/models/double/infer", b"a" * 200)
    with running:
        first = ask(running.path, request)
        assert (first[0], first[2]) == (413, True)
        assert ask(running.path, request) == first  # now its head is remembered
        with connect(running.path) as sock:
            sock.sendall(request[:40])
            sock.sendall(request[40:])
            assert answer(sock)[0] == 413


def test_a_large_body_for_an_unknown_model_is_refused_before_it_is_sent(served: Served) -> None:
    head = b"POST /v2/models/nope/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n"
    with connect(served[0].path) as sock:
        sock.sendall(head)
        assert answer(sock)[0] == 404
        assert at_end(sock)


# Time.


def test_one_byte_a_second_is_cut_at_the_absolute_deadline(short_dir: Path, uvloop: bool) -> None:
    running, _ = serving(short_dir / "s", uvloop=uvloop, request_s=0.4)
    with running, connect(running.path) as sock:
        sock.settimeout(0.02)
        cut = b""
        for byte in INFER:  # each byte comes well within any timeout between bytes
            sock.send(bytes([byte]))
            try:
                cut = sock.recv(65536)
            except TimeoutError:
                continue
            break
        assert cut.startswith(b"HTTP/1.1 408 ")
        assert ask(running.path, INFER)[0] == 200


@pytest.mark.parametrize("body", [b"a" * 10, b"a" * 100_000])
def test_a_body_that_never_ends_is_cut(short_dir: Path, body: bytes) -> None:
    running, _ = serving(short_dir / "s", request_s=0.2)
    with running, connect(running.path) as sock:
        sock.sendall(post("/v2/models/double/infer", body)[:-1])
        status, _, said = answer(sock)
        assert status == 408
        assert b"0.2 s" in said
        assert running.look(lambda: running.server.ledger.bytes) == 0


def test_a_silent_connection_is_closed(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s", idle_s=0.1)
    with running, connect(running.path) as never, connect(running.path) as kept:
        kept.sendall(INFER)
        assert answer(kept)[0] == 200
        assert at_end(never)
        assert at_end(kept)
        assert running.look(lambda: running.server.ledger.connections) == 0


def test_a_handler_over_its_time_is_answered_for_and_stopped(short_dir: Path, uvloop: bool) -> None:
    running, models = serving(short_dir / "s", uvloop=uvloop, request_s=0.1)
    with running, connect(running.path) as sock:
        sock.sendall(SLOW)
        status, _, body = answer(sock)
        assert status == 504
        assert b"deadline" in body
        running.until(lambda: models[0].cancelled == 1)
        sock.sendall(INFER)  # the connection is still good
        assert answer(sock)[0] == 200


def test_the_callers_timeout_shortens_the_deadline_and_never_lengthens_it(short_dir: Path) -> None:
    running, models = serving(short_dir / "s", request_s=5)
    with running:
        asked = DOUBLE[:-1] + b',"parameters":{"timeout":%d}}'
        before = time.monotonic()
        assert ask(running.path, post("/v2/models/slow/infer", asked % 20_000))[0] == 504
        assert ask(running.path, post("/v2/models/double/infer", asked % 10**15))[0] == 200
        short, long = models[0].deadlines
        assert short < before + 4
        assert before < long <= time.monotonic() + 5


def test_a_deadline_is_kept_to_the_moment(served: Served) -> None:
    """By a timer of its own, not by the next of the sweeps that cut slow senders."""
    running, _ = served
    running.look(lambda: setattr(running.server, "_sweep_s", 1e6))
    asked = DOUBLE[:-1] + b',"parameters":{"timeout":20000}}'
    assert ask(running.path, post("/v2/models/slow/infer", asked))[0] == 504


def test_a_peer_that_goes_away_stops_its_work(served: Served) -> None:
    running, models = served
    with connect(running.path) as sock:
        sock.sendall(SLOW)
        running.until(lambda: len(models.seen) == 1)
    running.until(lambda: models.cancelled == 1)
    assert running.look(lambda: running.server.ledger.connections) == 0


def test_a_peer_that_only_ends_its_side_gets_its_answers(served: Served) -> None:
    running, models = served
    with connect(running.path) as sock:
        sock.sendall(SLOW + INFER)
        sock.shutdown(socket.SHUT_WR)
        running.until(lambda: len(models.seen) == 1)
        running.look(models.release.set)
        assert y_of(read_one(sock)) == [1, 2, 3, 4]
        assert y_of(read_one(sock)) == [2, 4, 6, 8]
        assert at_end(sock)


def test_a_request_that_ends_half_way_is_refused(served: Served) -> None:
    for cut in (20, len(INFER) - 1):
        with connect(served[0].path) as sock:
            sock.sendall(INFER[:cut])
            sock.shutdown(socket.SHUT_WR)
            assert answer(sock)[0] == 400


def test_a_slow_reader_is_cut_and_costs_others_nothing(short_dir: Path, uvloop: bool) -> None:
    running, _ = serving(short_dir / "s", uvloop=uvloop, write_s=0.3)
    million = DOUBLE.replace(b"[1,2,3,4]", b"[3000000,0,0,0]")[:-1] + b',"parameters":{"binary_data_output":true}}'
    with running, connect(running.path) as lazy:
        lazy.sendall(post("/v2/models/big/infer", million))
        running.until(lambda: running.server.ledger.bytes > 10_000_000)
        assert ask(running.path, INFER)[0] == 200
        running.until(lambda: running.server.ledger.connections == 0)
        assert running.look(lambda: running.server.ledger.bytes) == 0
        taken = 0
        while part := lazy.recv(1 << 20):
            taken += len(part)
        assert taken < 12_000_000


def test_a_reader_that_takes_its_time_gets_all_of_it(served: Served) -> None:
    million = DOUBLE.replace(b"[1,2,3,4]", b"[1000000,0,0,0]")[:-1] + b',"parameters":{"binary_data_output":true}}'
    with connect(served[0].path) as sock:
        sock.sendall(post("/v2/models/big/infer", million))
        status, fields, body = answer(sock)
        values = np.frombuffer(body[int(fields["inference-header-content-length"]) :], "<f4")
        assert status == 200
        assert np.array_equal(values, np.arange(1_000_000, dtype="f4"))
        sock.sendall(INFER)
        assert answer(sock)[0] == 200


# Bugs and memory.


def test_a_bug_in_a_handler_is_a_500_and_the_connection_survives(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(served[0].path) as sock:
        sock.sendall(post("/v2/models/broken/infer", DOUBLE))
        status, _, body = answer(sock)
        assert status == 500
        assert b"ZeroDivision" not in body  # the log has it, the caller needs not
        sock.sendall(INFER)
        assert answer(sock)[0] == 200
    assert "ZeroDivisionError: a bug" in caplog.text


def test_bytes_in_memory_are_capped_for_each_user(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s", body_bytes=1_000_000, bytes_per_uid=2_500_000)
    head = post("/v2/models/double/infer", b"a" * 1_000_000)[:-1]
    with running:
        holding = [connect(running.path) for _ in range(2)]
        for sock in holding:
            sock.sendall(head)
        running.until(lambda: running.server.ledger.bytes == 2_000_000)
        status, body, closed = ask(running.path, head)
        assert (status, closed) == (503, True)
        assert b"memory" in body
        assert ask(running.path, INFER)[0] == 200  # small ones need no reservation
        for sock in holding:
            sock.close()
        running.until(lambda: running.server.ledger.bytes == 0)


def test_an_ended_connection_is_freed_at_once(served: Served) -> None:
    """Not at some later run of the collector: it may hold a large body."""
    running, models = served
    chunked = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    def connections() -> int:
        return sum(isinstance(thing, Connection) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        for data in (INFER, get("/v2/nope"), b"BAD\n", INFER[:-1], post("/v2", b"a" * 200_000), chunked + b"5\r\nab"):
            with connect(running.path) as sock:
                sock.sendall(data)
        with connect(running.path) as sock:
            sock.sendall(post("/v2/models/double/infer", b"a" * 1_000_000)[:-1])
        with connect(running.path) as sock:
            sock.sendall(SLOW)
            running.until(lambda: any(request.inputs for request in models.seen[-1:]))
        running.until(lambda: running.server.ledger.connections == 0)
        running.until(lambda: connections() == 0)
    finally:
        gc.enable()


def test_hostile_requests_leave_memory_flat(served: Served) -> None:
    running, _ = served

    def storm() -> None:
        for _ in range(20):
            ask(running.path, b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 1_000_000)
            ask(running.path, post("/v2/models/double/infer", b"[" * 100_000))
            with connect(running.path) as sock:
                sock.sendall(post("/v2/models/double/infer", b"a" * 2_000_000)[:-1])
            ask(running.path, b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")

    storm()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        storm()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 4096  # less than two of the 240 bodies
    running.until(lambda: running.server.ledger.connections == 0)
    assert running.look(lambda: running.server.ledger.bytes) == 0
