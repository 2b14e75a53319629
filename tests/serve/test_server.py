"""Listening: sockets made safely, caps for each user, floods, draining."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.base.errors import ConflictError
from agent.client import Client
from agent.serve.access import Peer, peer_of
from agent.serve.inference import Inference
from agent.serve.limits import Ledger, Limits
from agent.serve.routes import RouteTable
from agent.serve.server import Server
from tests.serve.running import Running, answer, ask, at_end, connect, get, post, serving
from tests.serve.toy import ToyModels

INFER = post("/v2/models/double/infer", b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}')
SLOW = INFER.replace(b"/double/", b"/slow/")
LIVE = get("/v2/health/live")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def a_server(limits: Limits | None = None) -> Server:
    """The toy models."""
    limits = limits or Limits()
    return Server(RouteTable(Inference(ToyModels(), limits=limits).routes()), limits)


# The socket.


def test_the_socket_has_its_mode_and_group(short_dir: Path) -> None:
    async def start() -> None:
        server = a_server()
        server.start_unix(short_dir / "s", 0o660, os.getgid())
        status = (short_dir / "s").stat()
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert status.st_gid == os.getgid()
        await server.drain(1)

    mask = os.umask(0)
    try:
        asyncio.run(start())
    finally:
        os.umask(mask)


def test_the_socket_is_never_open_wider_than_asked(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between bind and chmod, where a race would be, the path is the owner's alone."""
    modes: list[int] = []
    chmod = Path.chmod

    def watching(path: Path, mode: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        chmod(path, mode)

    async def start() -> None:
        server = a_server()
        server.start_unix(short_dir / "s", 0o666)
        await server.drain(1)

    monkeypatch.setattr(Path, "chmod", watching)
    mask = os.umask(0)
    try:
        asyncio.run(start())
    finally:
        os.umask(mask)
    assert modes == [0o600]


def test_a_stale_socket_is_replaced(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_dir / "s"))
    running, _ = serving(short_dir / "s")
    with running:
        assert ask(running.path, LIVE)[0] == 200


def test_a_live_socket_is_left_to_its_daemon(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s")

    async def second() -> None:
        with pytest.raises(ConflictError, match="another daemon"):
            a_server().start_unix(short_dir / "s")

    with running:
        asyncio.run(second())
        assert ask(running.path, LIVE)[0] == 200


def test_a_live_socket_with_a_full_queue_is_left_too(short_dir: Path) -> None:
    async def start() -> None:
        with pytest.raises(ConflictError):
            a_server().start_unix(short_dir / "s")

    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(short_dir / "s"))
        busy.listen(0)
        waiting.connect(str(short_dir / "s"))
        asyncio.run(start())


def test_a_file_in_the_way_is_not_removed(short_dir: Path) -> None:
    (short_dir / "s").write_text("precious")

    async def start() -> None:
        with pytest.raises(ConflictError, match="not a socket"):
            a_server().start_unix(short_dir / "s")

    asyncio.run(start())
    assert (short_dir / "s").read_text() == "precious"


def test_a_successors_socket_survives_our_end(short_dir: Path) -> None:
    async def both() -> None:
        first, second = a_server(), a_server()
        first.start_unix(short_dir / "s")
        (short_dir / "s").unlink()
        second.start_unix(short_dir / "s")
        await first.drain(1)
        assert (short_dir / "s").exists()
        await second.drain(1)
        assert not (short_dir / "s").exists()

    asyncio.run(both())


def test_a_passed_socket_is_served_and_keeps_its_queue_for_the_next_process(short_dir: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short_dir / "s"))
    listener.listen(8)

    async def serve_once() -> None:
        server = a_server()
        server.start_socket(listener.dup())
        loop = asyncio.get_running_loop()
        assert (await loop.run_in_executor(None, ask, short_dir / "s", LIVE))[0] == 200
        await server.drain(1)

    asyncio.run(serve_once())
    with connect(short_dir / "s") as early:  # nobody accepts at the moment
        early.sendall(LIVE)
        asyncio.run(serve_once())
        assert answer(early)[0] == 200
    listener.close()


def test_the_peer_is_who_the_kernel_says(short_dir: Path) -> None:
    seen: list[Peer] = []

    def remember(sock: socket.socket) -> Peer:
        seen.append(peer_of(sock))
        return seen[-1]

    server = a_server()
    running = Running(lambda: Server(server.table, server.limits, peer=remember), short_dir / "s")
    with running:
        ask(running.path, LIVE)
    assert seen[0].uid == os.getuid()
    assert seen[0].pid == os.getpid()
    assert seen[0].groups == {os.getgid(), *os.getgroups()}


# Caps and floods.


def test_a_connection_over_the_users_cap_is_told_so_and_closed(short_dir: Path, uvloop: bool) -> None:
    running, _ = serving(short_dir / "s", uvloop=uvloop, connections_per_uid=3)
    with running:
        held = [connect(running.path) for _ in range(3)]
        for sock in held:
            sock.sendall(LIVE)
            assert answer(sock)[0] == 200
        status, body, closed = ask(running.path, INFER)
        assert (status, closed) == (503, True)
        assert b"too many connections" in body
        held[0].close()
        running.until(lambda: running.server.ledger.connections == 2)
        assert ask(running.path, INFER)[0] == 200
        assert running.look(lambda: running.server.refused) == 1
        for sock in held:
            sock.close()


@needs_root
def test_two_thousand_connections_of_one_user_do_not_hurt_another(short_dir: Path, uvloop: bool) -> None:
    short_dir.chmod(0o755)
    running, _ = serving(short_dir / "s", uvloop=uvloop)
    command = [sys.executable, str(Path(__file__).with_name("flood.py")), str(running.path), "65534", "2000"]
    with running, Client(running.path) as other:
        assert other.ready()
        hostile = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert hostile.stdin is not None
        assert hostile.stdout is not None
        assert hostile.stdout.readline() == "begun\n"
        answers = 0
        while not select.select([hostile.stdout], [], [], 0)[0]:
            assert other.ready()
            answers += 1
        served, refused = map(int, hostile.stdout.readline().split())
        assert served == running.look(lambda: running.server.limits.connections_per_uid)
        assert refused == 2000 - served
        assert answers > 10
        assert ask(running.path, INFER)[0] == 200  # a new connection of ours, while all of theirs stand
        assert running.look(lambda: running.server.ledger.connections) <= served + 2
        hostile.communicate()
        running.until(lambda: running.server.ledger.connections == 1)


def test_a_process_out_of_descriptors_serves_again_when_it_has_some(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s")
    with running:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.settimeout(30)
        top = max(int(name) for name in os.listdir("/proc/self/fd"))
        hoard = [os.dup(0) for _ in range(top)]  # every number below the limit is taken
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hoard) + 1, hard))
        try:
            waiting.connect(str(running.path))
            waiting.sendall(LIVE)
            waiting.settimeout(0.05)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in hoard:
                os.close(descriptor)
        waiting.settimeout(30)
        assert answer(waiting)[0] == 200
        waiting.close()


def test_a_socket_tells_what_it_answered(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s", connections_per_uid=1)
    with running:
        with connect(running.path) as sock:
            for target in ("/v2/models/double", "/v2/models/nope", "/nowhere"):
                sock.sendall(get(target))
                answer(sock)
            assert ask(running.path, LIVE)[0] == 503
            lines = running.look(running.server.metrics)
        assert 'edge_agent_http_answers_total{route="/v2/models/{model}",status="200"} 1' in lines
        assert 'edge_agent_http_answers_total{route="/v2/models/{model}",status="404"} 1' in lines
        assert 'edge_agent_http_answers_total{route="",status="404"} 1' in lines
        assert "edge_agent_http_connections 1" in lines
        assert "edge_agent_http_connections_refused_total 1" in lines


# Draining.


def test_what_is_under_way_is_answered_before_the_end(short_dir: Path, uvloop: bool) -> None:
    running, models = serving(short_dir / "s", uvloop=uvloop)
    with running, connect(running.path) as busy, connect(running.path) as idle, connect(running.path) as partial:
        idle.sendall(LIVE)
        assert answer(idle)[0] == 200
        busy.sendall(SLOW)
        partial.sendall(INFER[:-5])
        running.until(lambda: len(models[0].seen) == 1)
        running.until(lambda: running.server.ledger.connections == 3)
        draining = asyncio.run_coroutine_threadsafe(running.server.drain(30), running.loop)
        assert at_end(idle)
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            connect(running.path)
        partial.sendall(INFER[-5:])
        status, fields, _ = answer(partial)
        assert (status, fields["connection"]) == (200, "close")
        assert not draining.done()
        running.look(models[0].release.set)
        status, fields, _ = answer(busy)
        assert (status, fields["connection"]) == (200, "close")
        assert at_end(busy)
        assert draining.result(30) is True


def test_what_has_arrived_is_under_way(short_dir: Path, uvloop: bool) -> None:
    """A request on a kept connection, and a connection in the queue, that nobody has looked at yet."""
    running, _ = serving(short_dir / "s", uvloop=uvloop)

    async def arrive_and_drain() -> bool:
        kept.sendall(INFER)
        fresh.connect(str(running.path))
        fresh.sendall(INFER)
        return await running.server.drain(30)

    with running, connect(running.path) as kept, socket.socket(socket.AF_UNIX) as fresh:
        kept.sendall(LIVE)
        assert answer(kept)[0] == 200
        assert running.run(arrive_and_drain()) is True
        for sock in (kept, fresh):
            status, fields, _ = answer(sock)
            assert (status, fields["connection"]) == (200, "close")


def test_who_has_just_connected_is_still_answered(short_dir: Path, uvloop: bool) -> None:
    """Accepted a moment before the stop: its request is on its way."""
    running, _ = serving(short_dir / "s", uvloop=uvloop)
    with running, connect(running.path) as new, connect(running.path) as silent:
        running.until(lambda: running.server.ledger.connections == 2)

        async def send_and_drain() -> bool:
            running.loop.call_later(0.01, new.sendall, INFER)
            return await running.server.drain(30)

        assert running.run(send_and_drain()) is True
        status, fields, _ = answer(new)
        assert (status, fields["connection"]) == (200, "close")
        assert at_end(silent)


def test_draining_ends_at_its_timeout(short_dir: Path) -> None:
    running, models = serving(short_dir / "s")
    with running, connect(running.path) as busy:
        busy.sendall(SLOW)
        running.until(lambda: len(models[0].seen) == 1)
        assert running.run(running.server.drain(0.05)) is False
        assert at_end(busy)
        running.until(lambda: models[0].cancelled == 1)


def test_no_answer_is_lost_when_the_daemon_stops_under_load(short_dir: Path, uvloop: bool) -> None:
    """Each caller either gets its answer whole or is told that nothing was done."""
    running, models = serving(short_dir / "s", uvloop=uvloop)
    outcomes: list[str] = []

    def caller() -> None:
        while True:
            try:
                with connect(running.path) as sock:
                    while True:
                        sock.sendall(INFER)
                        status, fields, _ = answer(sock)
                        outcomes.append(f"answer {status}")
                        if fields.get("connection") == "close":
                            break
            except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError, FileNotFoundError) as error:
                outcomes.append(type(error).__name__)
                return

    with running:
        callers = [threading.Thread(target=caller) for _ in range(6)]
        for thread in callers:
            thread.start()
        running.until(lambda: len(models[0].seen) > 300)
        assert running.run(running.server.drain(10)) is True
        for thread in callers:
            thread.join(30)
    assert outcomes.count("answer 200") == len(models[0].seen)
    ends = [outcome for outcome in outcomes if outcome != "answer 200"]
    assert len(ends) == len(callers)


# The ledger.


def test_the_ledger_counts_each_user_apart() -> None:
    ledger = Ledger(Limits(connections=3, connections_per_uid=2, bytes_per_uid=100, bytes_total=150))
    assert [ledger.enter(1), ledger.enter(1), ledger.enter(1), ledger.enter(2), ledger.enter(3)] == [
        True,
        True,
        False,
        True,
        False,
    ]
    ledger.leave(1)
    assert ledger.enter(3)
    assert ledger.reserve(1, 100)
    assert not ledger.reserve(1, 1)
    assert not ledger.reserve(2, 51)
    assert ledger.reserve(2, 50)
    ledger.release(1, 100)
    ledger.release(2, 50)
    assert ledger.bytes == 0


def test_limits_that_make_no_sense_are_refused() -> None:
    wrong: list[Callable[[], Limits]] = [
        lambda: Limits(request_line_bytes=20000),
        lambda: Limits(connections=0),
        lambda: Limits(request_s=0),
        lambda: Limits(descriptors=1),
    ]
    for make in wrong:
        with pytest.raises(ValueError, match=r"must be|need"):
            make()


def test_an_idle_server_wakes_for_nobody(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s")
    with running:
        ask(running.path, LIVE)
        running.until(lambda: running.server.ledger.connections == 0)
        before = time.monotonic()
        running.until(lambda: running.server._sweep is None or time.monotonic() - before > 5)
        assert running.look(lambda: running.server._sweep) is None
