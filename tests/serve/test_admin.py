"""The admin socket: rights row by row, descriptors that belong to their request, events of long operations."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.base.errors import ConflictError, NotFoundError, PeerError, RefusedError
from agent.client import AdminClient
from agent.serve.access import CARRY, OPERATE, Peer
from agent.serve.admin import ADMIN_LIMITS, admin_server
from agent.serve.exchange import Request, Response, json_response
from agent.serve.routes import Route
from tests.serve.running import Running, answer, at_end, connect, get, serving

LINK_UID = 4242
LINK = Peer(LINK_UID, LINK_UID, frozenset((LINK_UID,)), 1)
STRANGER = Peer(4343, 4343, frozenset((4343,)), 1)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def count(request: Request) -> Response:
    """The sizes of the files that came, read through their descriptors."""
    sizes = []
    for descriptor in request.take_descriptors(int(request.options().get("files", "0"))):
        with os.fdopen(descriptor, "rb") as stream:
            sizes.append(len(stream.read()))
    return json_response({"sizes": sizes, "body": request.json()})


def ignore(_request: Request) -> Response:
    return json_response({})


async def grow(request: Request) -> Response:
    """Report three steps, then answer as the caller wished."""
    for step in range(3):
        request.progress({"step": step})
        await asyncio.sleep(0)
    if "fail" in request.options():
        raise ConflictError("cannot grow: too large already", hint="shrink")
    return json_response({"grown": True})


async def stay(_request: Request) -> Response:
    await asyncio.sleep(0.3)
    return json_response({"stayed": True})


ROUTES = [
    Route("POST", "/v1/count", OPERATE, count),
    Route("POST", "/v1/ignore", OPERATE, ignore),
    Route("POST", "/v1/grow", OPERATE, grow, deadline_s=60),
    Route("DELETE", "/v1/models/{name}", OPERATE, ignore),
    Route("POST", "/v1/stay", OPERATE, stay, deadline_s=20),
    Route("PUT", "/v1/incoming/{want}", CARRY, ignore),
    Route("GET", "/v1/wants", CARRY, ignore),
]


@contextmanager
def admin(path: Path, peer: Peer | None = None) -> Iterator[Running]:
    """The table above on a socket; everybody is ``peer`` where one is given."""
    who: dict[str, Any] = {} if peer is None else {"peer": lambda _sock: peer}
    with Running(lambda: admin_server(ROUTES, link_uid=LINK_UID, **who), path) as running:
        yield running


def statuses(path: Path) -> dict[str, int]:
    """What each row of the table answers."""
    found = {}
    for route in ROUTES:
        with connect(path) as sock:
            target = route.pattern.replace("{name}", "m").replace("{want}", "w")
            sock.sendall(f"{route.method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
            found[f"{route.method} {route.pattern}"] = answer(sock)[0]
    return found


def test_the_link_carries_and_gets_403_on_every_other_row(short_dir: Path) -> None:
    with admin(short_dir / "a", LINK) as running:
        carried = {f"{route.method} {route.pattern}" for route in ROUTES if route.right == CARRY}
        assert statuses(running.path) == {name: 200 if name in carried else 403 for name in statuses(running.path)}


def test_a_stranger_learns_nothing(short_dir: Path) -> None:
    with admin(short_dir / "a", STRANGER) as running:
        assert set(statuses(running.path).values()) == {403}
        with connect(running.path) as sock:
            sock.sendall(get("/v1/no/such/path"))
            assert answer(sock)[0] == 403


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_root_and_the_daemons_own_user_may_do_everything(short_dir: Path, uid: int) -> None:
    with admin(short_dir / "a", Peer(uid, uid, frozenset((uid,)), 1)) as running:
        assert set(statuses(running.path).values()) == {200}


@needs_root
@pytest.mark.parametrize(("uid", "carries", "operates"), [(LINK_UID, "200", "403"), (4343, "403", "403")])
def test_rights_go_by_the_kernels_word(short_dir: Path, uid: int, carries: str, operates: str) -> None:
    code = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
for method, target in (("GET", "/v1/wants"), ("DELETE", "/v1/models/m")):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(f"{method} {target} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
        print(sock.recv(100).split()[1].decode())
"""
    short_dir.chmod(0o755)
    with admin(short_dir / "a") as running:
        done = subprocess.run(
            [sys.executable, "-c", code, str(running.path), str(uid)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    assert done.stdout.split() == [carries, operates]


def test_a_row_without_an_admin_right_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no right of admin"):
        admin_server([Route("GET", "/v2", "infer", ignore)], link_uid=None)


# Descriptors.


def files(folder: Path, *sizes: int) -> list[int]:
    """Open descriptors of files of these sizes."""
    opened = []
    for number, size in enumerate(sizes):
        path = folder / f"file-{number}"
        path.write_bytes(b"a" * size)
        opened.append(os.open(path, os.O_RDONLY))
    return opened


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_come_as_descriptors(short_dir: Path) -> None:
    sent = files(short_dir, 10, 20, 30)
    with admin(short_dir / "a") as running, AdminClient(running.path) as client:
        answered = client.call("POST", "/v1/count?files=3", {"name": "m"}, descriptors=sent)
        assert answered == {"sizes": [10, 20, 30], "body": {"name": "m"}}
        assert client.call("POST", "/v1/count", {}) == {"sizes": [], "body": {}}  # none is left over
        for descriptor in sent:
            os.close(descriptor)


def test_what_no_handler_takes_is_closed(short_dir: Path) -> None:
    sent = files(short_dir, 1, 2)
    with admin(short_dir / "a") as running, AdminClient(running.path) as client:
        client.call("GET", "/v1/wants")  # the connection stands
        before = open_descriptors()
        for _ in range(20):
            client.call("POST", "/v1/ignore", {}, descriptors=sent)
            for target, error in (("/v1/count?files=1", PeerError), ("/v1/nope", NotFoundError)):
                with pytest.raises(error):
                    client.call("POST", target, {}, descriptors=sent)
        running.until(lambda: open_descriptors() <= before)
    for descriptor in sent:
        os.close(descriptor)


def test_more_descriptors_than_allowed_end_the_connection(short_dir: Path) -> None:
    sent = files(short_dir, *range(20))
    with admin(short_dir / "a") as running:
        before = open_descriptors()
        for number in (5, 20):
            with connect(running.path) as sock:
                socket.send_fds(sock, [get("/v1/wants")], sent[:number])
                status, _, body = answer(sock)
                assert status == 400
                assert b"descriptors" in body
                assert at_end(sock)
        running.until(lambda: open_descriptors() <= before)
    for descriptor in sent:
        os.close(descriptor)


def test_descriptors_of_an_unfinished_request_are_closed_with_it(short_dir: Path) -> None:
    sent = files(short_dir, 1)
    with admin(short_dir / "a") as running:
        before = open_descriptors()
        with connect(running.path) as sock:
            socket.send_fds(sock, [b"POST /v1/count?files=1 HT"], sent)
            running.until(lambda: open_descriptors() > before + 1)
        running.until(lambda: open_descriptors() <= before)
    os.close(sent[0])


def test_descriptors_may_come_with_any_byte_of_their_request(short_dir: Path) -> None:
    sent = files(short_dir, 7, 8)
    request = b'POST /v1/count?files=2 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"a": 12}'
    with admin(short_dir / "a") as running, connect(running.path) as sock:
        for cut in (1, 30, len(request) - 1):
            socket.send_fds(sock, [request[:cut]], sent[:1])
            socket.send_fds(sock, [request[cut:]], sent[1:])
            assert json.loads(answer(sock)[2]) == {"sizes": [7, 8], "body": {"a": 12}}
            for descriptor in sent:
                os.lseek(descriptor, 0, os.SEEK_SET)
    for descriptor in sent:
        os.close(descriptor)


def test_the_app_socket_takes_no_descriptors(short_dir: Path) -> None:
    sent = files(short_dir, 1)
    running, _ = serving(short_dir / "i")
    with running, connect(running.path) as sock:
        sock.sendall(get("/v2/health/live"))
        assert answer(sock)[0] == 200
        before = open_descriptors()
        sock.sendmsg([get("/v2/health/live")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent))])
        assert answer(sock)[0] == 200
        assert open_descriptors() == before
    os.close(sent[0])


def test_requests_are_not_pipelined_here(short_dir: Path) -> None:
    with admin(short_dir / "a") as running, connect(running.path) as sock:
        sock.sendall(get("/v1/wants") + get("/v1/wants"))
        status, fields, _ = answer(sock)
        assert (status, fields["connection"]) == (200, "close")
        assert at_end(sock)


# Events.


def test_progress_is_told_as_it_comes(short_dir: Path) -> None:
    told: list[dict[str, Any]] = []
    with admin(short_dir / "a") as running, AdminClient(running.path) as client:
        assert client.call("POST", "/v1/grow", {}, on_event=told.append) == {"grown": True}
        assert told == [{"step": 0}, {"step": 1}, {"step": 2}]
        assert client.call("POST", "/v1/grow", {}) == {"grown": True}  # nobody asked: a plain answer
        assert len(told) == 3
        assert client.call("GET", "/v1/wants", on_event=told.append) == {}  # nothing to tell: a plain answer
        with pytest.raises(ConflictError, match="too large already") as failed:
            client.call("POST", "/v1/grow?fail=1", {}, on_event=told.append)
        assert failed.value.hint == "shrink"
        assert len(told) == 6


def test_events_are_lines_of_json_in_chunks(short_dir: Path) -> None:
    with admin(short_dir / "a") as running, connect(running.path) as sock:
        sock.sendall(b"POST /v1/grow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nAccept: application/x-ndjson\r\n\r\n")
        status, fields, body = answer(sock)
        assert (status, fields["content-type"], fields["transfer-encoding"]) == (200, "application/x-ndjson", "chunked")
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines == [{"event": {"step": step}} for step in range(3)] + [{"status": 200, "answer": {"grown": True}}]
        sock.sendall(get("/v1/wants"))  # the connection goes on
        assert answer(sock)[0] == 200


def test_a_listener_that_goes_away_stops_the_operation(short_dir: Path) -> None:
    with admin(short_dir / "a") as running:
        with connect(running.path) as sock:
            sock.sendall(b"POST /v1/stay HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            running.until(lambda: running.server.ledger.connections == 1)
        running.until(lambda: running.server.ledger.connections == 0)


def test_a_row_may_take_longer_than_the_socket_allows_elsewhere(short_dir: Path) -> None:
    limits = replace(ADMIN_LIMITS, request_s=0.1)
    running = Running(lambda: admin_server(ROUTES, link_uid=None, limits=limits), short_dir / "a")
    with running, AdminClient(running.path) as client:
        assert client.call("POST", "/v1/stay", {}) == {"stayed": True}


def test_refusals_reach_the_caller_as_errors(short_dir: Path) -> None:
    with admin(short_dir / "a", LINK) as running, AdminClient(running.path) as client:
        with pytest.raises(RefusedError, match="operate"):
            client.call("DELETE", "/v1/models/m")
        with pytest.raises(PeerError):
            client.call("PATCH", "/v1/wants")
        assert client.call("PUT", "/v1/incoming/w", b"bytes as they are") == {}
