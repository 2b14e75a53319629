"""The client as an app uses it: arrays in and out, kept connections, clear errors, nothing done twice."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from agent.base.errors import (
    AgentError,
    DeadlineError,
    NotFoundError,
    PeerError,
    RefusedError,
    TooLargeError,
    TryLaterError,
)
from agent.client import AsyncClient, Client
from agent.serve.access import ModelRule, ModelRules, Peer
from agent.serve.inference import Inference
from agent.serve.limits import Limits
from agent.serve.routes import RouteTable
from agent.serve.server import Server
from tests.serve.running import Running, serving
from tests.serve.toy import NAMES, ToyModels

X = np.arange(8, dtype="f4").reshape(2, 4)


@pytest.fixture
def served(short_dir: Path) -> Iterator[tuple[Running, ToyModels]]:
    """The toy models on a socket."""
    running, models = serving(short_dir / "s")
    with running:
        yield running, models[0]


@pytest.fixture
def client(served: tuple[Running, ToyModels]) -> Iterator[Client]:
    """A client of them."""
    with Client(served[0].path) as made:
        yield made


def test_arrays_in_and_out(client: Client) -> None:
    result = client.infer("double", {"x": X}, id="frame-7")
    assert list(result) == ["y"]
    assert result["y"].dtype == np.float32
    assert np.array_equal(result["y"], X * 2)
    assert (result.model_name, result.model_version, result.id) == ("double", "1.0.0", "frame-7")
    assert result.parameters["variant"] == "fp32"
    assert "y: float32[2, 4]" in repr(result)


ARRAYS = {
    "bool": np.array([True, False]),
    "u1": np.array([1, 2], "u1"),
    "u2": np.array([1, 2], "u2"),
    "u4": np.array([1, 2], "u4"),
    "u8": np.array([1, 2**63], "u8"),
    "i1": np.array([-1, 2], "i1"),
    "i2": np.array([-1, 2], "i2"),
    "i4": np.array([-1, 2], "i4"),
    "i8": np.array([-1, 2**62], "i8"),
    "f2": np.array([1.5, np.inf], "f2"),
    "f4": np.array([1.5, np.nan], "f4"),
    "f8": np.array([1.5, 1e300], "f8"),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), "f4"),
    "large": np.random.default_rng(1).random((1, 3, 224, 224), "f4"),
    "big-endian": np.arange(5, dtype=">i4"),
    "transposed": np.arange(12, dtype="f4").reshape(3, 4).T,
    "strided": np.arange(100_000, dtype="f4")[::3],
}


def test_every_kind_of_array_survives_the_way(client: Client) -> None:
    result = client.infer("echo", ARRAYS)
    for name, array in ARRAYS.items():
        assert result[name].shape == np.shape(array), name
        assert np.array_equal(result[name], array, equal_nan=name in ("f4",)), name


def test_large_outputs_are_views_of_what_was_received(client: Client) -> None:
    for length in range(8):  # whatever the length of the JSON before them
        array = client.infer("echo", {"x" * (length + 1): np.zeros((1, 3, 64, 64), "f8")})["x" * (length + 1)]
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview)


def test_lists_and_numbers_are_arrays_too(client: Client) -> None:
    result = client.infer("echo", {"a": [[1, 2], [3, 4]], "b": 1.5, "c": True})
    assert result["a"].tolist() == [[1, 2], [3, 4]]
    assert result["b"].tolist() == 1.5
    assert result["c"].tolist() is True


def test_texts_and_bytes(client: Client) -> None:
    result = client.infer("echo", {"t": np.array([["é", "b"]]), "b": np.array([b"\xff\0", b""], dtype=object)})
    assert result["t"].tolist() == [["é".encode(), b"b"]]
    assert result["b"].tolist() == [b"\xff\0", b""]


def test_bf16_by_its_bits_and_by_its_values(client: Client) -> None:
    values = np.array([1.0, -2.5, 1.00390625, np.inf, np.nan], "f4")
    result = client.infer("echo", {"v": values, "b": np.array([0x3F80], "<u2")}, datatypes={"v": "BF16", "b": "BF16"})
    assert np.array_equal(result["v"], np.array([1.0, -2.5, 1.0, np.inf, np.nan], "f4"), equal_nan=True)
    assert result["b"].tolist() == [1.0]
    with pytest.raises(PeerError, match="input 'z'"):
        client.infer("echo", {"z": np.array([1j])})


def test_chosen_outputs_and_classification(client: Client) -> None:
    assert list(client.infer("echo", {"a": X, "b": X}, outputs=["b"])) == ["b"]
    best = client.infer("soft", {"x": X}, outputs={"y": {"classification": 1}})["y"]
    assert best.tolist() == [[b"0.700000:1"]]


def test_questions(client: Client, served: tuple[Running, ToyModels]) -> None:
    assert client.metadata()["name"] == "toy"
    assert client.metadata("double")["inputs"][0]["datatype"] == "FP32"
    assert client.metadata("double", "1.0.0")["name"] == "double"
    assert {entry["name"] for entry in client.models()} == set(NAMES)
    client.infer("double", {"x": X}, version="1.0.0")
    assert client.statistics("double")[0]["inference_count"] == 1
    assert len(client.statistics()) == len(NAMES)
    assert client.ready()
    assert client.ready("double")
    assert not client.ready("loading")
    served[1].is_ready = False
    assert not client.ready()
    with pytest.raises(NotFoundError):
        client.ready("nope")


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("nope", NotFoundError, "nope"),
        ("full", TryLaterError, "queue full"),
        ("late", DeadlineError, "deadline"),
        ("damaged", TryLaterError, "blob damaged"),
        ("broken", AgentError, "unexpected"),
        ("a/b c?", NotFoundError, "a/b c?"),
    ],
)
def test_the_servers_words_reach_the_app(client: Client, model: str, error: type[AgentError], words: str) -> None:
    with pytest.raises(error, match=None) as failed:
        client.infer(model, {"x": X})
    assert words in str(failed.value)
    assert np.array_equal(client.infer("double", {"x": X})["y"], X * 2)


def test_a_body_over_the_limit_is_a_clear_error(short_dir: Path) -> None:
    running, _ = serving(short_dir / "s", body_bytes=1000)
    with running, Client(running.path) as client:
        for size in (2000, 30_000_000):  # refused while most of it is not yet sent
            with pytest.raises(TooLargeError, match="1000"):
                client.infer("echo", {"x": np.zeros(size, "u1")})
        assert client.ready()


def test_one_connection_serves_many_calls(client: Client, served: tuple[Running, ToyModels]) -> None:
    for _ in range(20):
        client.infer("double", {"x": X})
    assert served[0].look(lambda: served[0].server.ledger.connections) == 1


def test_many_threads_may_share_a_client(client: Client) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        mine = np.full((1, 4), number, "f4")
        answers = [client.infer("double", {"x": mine})["y"][0, 0] for _ in range(30)]
        wrong.extend(number for answer in answers if answer != 2 * number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


# Kept connections that are gone.


def test_a_restart_of_the_daemon_is_not_noticed(short_dir: Path) -> None:
    with Client(short_dir / "s") as client:
        for _ in range(3):
            running, models = serving(short_dir / "s")
            with running:
                assert np.array_equal(client.infer("double", {"x": X})["y"], X * 2)
                assert len(models[0].seen) == 1


def test_a_connection_closed_for_idling_is_not_noticed(short_dir: Path) -> None:
    running, models = serving(short_dir / "s", idle_s=0.05)
    with running, Client(running.path) as client:
        for _ in range(3):
            client.infer("double", {"x": X})
            running.until(lambda: running.server.ledger.connections == 0)
        assert len(models[0].seen) == 3


@contextmanager
def faithless(path: Path, behave: Callable[[socket.socket, int], None]) -> Iterator[list[int]]:
    """A server that treats its n-th connection as ``behave`` says, then closes it."""
    met: list[int] = []
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen(8)

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    met.append(len(met))
                    behave(sock, met[-1])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield met
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def read_request(sock: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def test_a_request_that_the_server_did_not_read_is_sent_again(short_dir: Path) -> None:
    asked = threading.Event()

    def behave(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(OK)
        if number == 0:
            # The second request arrives, is not read, and the connection is closed on it.
            asked.wait(30)
            while not sock.recv(1, socket.MSG_PEEK):
                pass

    with faithless(short_dir / "s", behave) as met, Client(short_dir / "s") as client:
        assert client.metadata() == {}
        asked.set()
        assert client.metadata() == {}
        assert met == [0, 1]


def test_a_request_that_the_server_took_is_never_sent_again(short_dir: Path) -> None:
    def behave(sock: socket.socket, _number: int) -> None:
        read_request(sock)
        sock.sendall(OK)
        read_request(sock)  # taken, and then the server dies

    with faithless(short_dir / "s", behave) as met, Client(short_dir / "s") as client:
        assert client.metadata() == {}
        with pytest.raises(TryLaterError, match="closed before its end"):
            client.feedback("double", correct=True)  # would count twice
        assert met == [0]


def test_a_question_that_changes_nothing_is_asked_once_more_when_its_answer_is_lost(short_dir: Path) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        read_request(sock)
        if number in (1, 4):
            sock.sendall(OK)

    with faithless(short_dir / "s", behave) as met, Client(short_dir / "s") as client:
        assert client.metadata() == {}
        assert met == [0, 1]
        with pytest.raises(TryLaterError, match="closed before its end"):
            client.metadata()  # what ends the agent twice is not tried on it for ever
        assert met == [0, 1, 2, 3]

    async def ask() -> None:
        async with AsyncClient(short_dir / "t") as asking:
            assert await asking.metadata() == {}

    with faithless(short_dir / "t", behave) as met:
        asyncio.run(ask())
        assert met == [0, 1]


@pytest.mark.parametrize("unread", [1, 4])
def test_a_connection_that_was_closed_unread_is_made_anew_a_few_times(short_dir: Path, unread: int) -> None:
    """An agent that restarts may have accepted one that it does not serve any more."""

    def behave(sock: socket.socket, number: int) -> None:
        sock.recv(1)
        if number == unread:
            read_request(sock)
            sock.sendall(OK)

    with faithless(short_dir / "s", behave) as met, Client(short_dir / "s") as client:
        if unread == 1:
            assert client.metadata() == {}
        else:
            with pytest.raises(TryLaterError, match="closed the connection"):
                client.metadata()
        assert met == list(range(min(unread + 1, 4)))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_a_server_that_makes_no_sense_is_an_error(short_dir: Path, answer: bytes) -> None:
    def behave(sock: socket.socket, _number: int) -> None:
        read_request(sock)
        sock.sendall(answer)

    with faithless(short_dir / "s", behave), Client(short_dir / "s") as client, pytest.raises(AgentError):
        client.metadata()


# Time and reach.


def test_a_call_ends_within_its_timeout(served: tuple[Running, ToyModels]) -> None:
    with Client(served[0].path, timeout=0.1) as client:
        with pytest.raises(DeadlineError, match="within the timeout"):
            client.infer("slow", {"x": X})
        assert client.ready()  # on a fresh connection: the late answer belongs to nobody


def test_a_server_that_trickles_does_not_stretch_the_timeout(short_dir: Path) -> None:
    stop = threading.Event()

    def behave(sock: socket.socket, _number: int) -> None:
        read_request(sock)
        with closing(sock):
            for byte in OK * 100:
                if stop.wait(0.02):
                    return
                try:
                    sock.send(bytes([byte]))
                except OSError:
                    return

    with faithless(short_dir / "s", behave), Client(short_dir / "s", timeout=0.2) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            client.metadata()
        assert time.monotonic() - started < 0.8  # all of the bytes would take that long
        stop.set()


def test_no_daemon_is_a_clear_error(short_dir: Path) -> None:
    with pytest.raises(TryLaterError, match="cannot reach the agent") as failed:
        Client(short_dir / "s").ready()
    assert "running" in failed.value.hint
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_dir / "s"))
    with pytest.raises(TryLaterError, match="cannot reach the agent"):
        Client(short_dir / "s").ready()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_no_permission_names_the_mend(short_dir: Path) -> None:
    code = """
import os, sys
from agent.base.errors import RefusedError
from agent.client import Client
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Client(sys.argv[1]).ready()
except RefusedError as error:
    print(error.hint)
"""
    short_dir.chmod(0o755)
    running, _ = serving(short_dir / "s")
    with running:
        running.path.chmod(0o660)
        command = [sys.executable, "-c", code, str(running.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "group" in done.stdout, done.stderr


def test_a_full_queue_is_waited_for_within_the_timeout(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(short_dir / "s"))
        busy.listen(0)
        waiting.connect(str(short_dir / "s"))
        with pytest.raises(DeadlineError):
            Client(short_dir / "s", timeout=0.1).ready()

        async def ask() -> None:
            with pytest.raises(DeadlineError):
                await AsyncClient(short_dir / "s", timeout=0.1).ready()

        asyncio.run(ask())


# The asynchronous client.


def run(loop: str, work: Callable[[], object]) -> None:
    """Run a coroutine function on one of the loops."""
    if loop == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        uvloop.run(work())
    else:
        asyncio.run(work())  # type: ignore[arg-type]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_asynchronous_client_does_the_same(served: tuple[Running, ToyModels], loop: str) -> None:
    running, _models = served

    async def work() -> None:
        async with AsyncClient(running.path) as client:
            results = await asyncio.gather(*(client.infer("double", {"x": X + n}) for n in range(20)))
            for number, result in enumerate(results):
                assert np.array_equal(result["y"], (X + number) * 2)
            big = np.random.default_rng(2).random((1, 3, 640, 640), "f4")
            assert np.array_equal((await client.infer("echo", {"x": big}))["x"], big)
            assert (await client.metadata())["name"] == "toy"
            assert (await client.metadata("double"))["name"] == "double"
            assert await client.ready()
            assert not await client.ready("loading")
            assert len(await client.models()) == len(NAMES)
            assert (await client.statistics("double"))[0]["inference_count"] == 20
            with pytest.raises(NotFoundError):
                await client.infer("nope", {"x": X})

    run(loop, work)
    running.until(lambda: running.server.ledger.connections == 0)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_asynchronous_client_has_its_timeout_and_can_be_cancelled(
    served: tuple[Running, ToyModels], loop: str
) -> None:
    running, models = served

    async def work() -> None:
        async with AsyncClient(running.path, timeout=0.1) as client:
            with pytest.raises(DeadlineError):
                await client.infer("slow", {"x": X})
        async with AsyncClient(running.path) as client:
            call = asyncio.ensure_future(client.infer("slow", {"x": X}))
            while len(models.seen) < 2:
                await asyncio.sleep(0.002)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await client.ready()

    run(loop, work)
    running.until(lambda: models.cancelled == 2)


def test_the_asynchronous_client_does_not_notice_a_restart(short_dir: Path) -> None:
    async def work() -> None:
        client = AsyncClient(short_dir / "s")
        for _ in range(2):
            running, _models = serving(short_dir / "s")
            await asyncio.to_thread(running.__enter__)
            assert np.array_equal((await client.infer("double", {"x": X}))["y"], X * 2)
            await asyncio.to_thread(running.__exit__, None, None, None)
        with pytest.raises(TryLaterError, match="cannot reach"):
            await client.ready()
        await client.close()

    asyncio.run(work())


def test_a_refusal_by_rule_is_told(short_dir: Path) -> None:
    table = RouteTable(Inference(ToyModels(), limits=Limits(), rules=ModelRules({"double": ModelRule()})).routes())
    somebody = Peer(1234, 1234, frozenset(), 1)
    running = Running(lambda: Server(table, peer=lambda _sock: somebody), short_dir / "s")
    with running, Client(running.path) as client, pytest.raises(RefusedError, match="not open to this user"):
        client.infer("double", {"x": X})
