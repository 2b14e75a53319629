"""One connection to a real broker, and to some that are not: what ends it, and what an end means."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from agent.base.errors import ConfigError, TryLaterError
from agent.link import connection as module
from agent.link.connection import LOST, TAKEN_OVER, TOO_LARGE, Connection, End, Plan, Received
from agent.link.dialling import dial
from agent.link.identity import chain_of, tls_context
from agent.link.settings import Broker as Where
from tests.link.broker import TENANT, Broker, Credentials, until
from tests.link.proxy import Proxy

NOT_AUTHORIZED = 0x87


def plan(
    broker: Broker, name: str = "d1", *, port: int = 0, keepalive_s: int = 5, credentials: Credentials | None = None
) -> Plan:
    files = credentials or broker.device(name)
    where = Where("localhost", port or broker.port, True, str(files.ca), str(files.certificate), str(files.key))
    root = f"eda/1/{TENANT}/{name}"
    return Plan(
        "localhost", where.port, tls_context(where, chain_of(where, None)), f"{TENANT}/{name}", keepalive_s, None, None,
        (f"{root}/up/status", b"gone"), (f"{root}/dn/job", f"{root}/dn/rpc/+"),
    )  # fmt: skip


class Side:
    """A connection with what it heard."""

    def __init__(self, where: Plan, on_message: Callable[[Received], None] | None = None) -> None:
        self.heard: list[Received] = []
        self.ticks = 0
        self.connection = Connection(where, on_message or self.heard.append, self._tick)

    def _tick(self) -> None:
        self.ticks += 1


@contextlib.asynccontextmanager
async def connected(where: Plan, **options) -> AsyncIterator[Side]:
    side = Side(where, **options)
    await side.connection.open()
    try:
        yield side
    finally:
        side.connection.abort("the test is over")


async def soon(condition: Callable[[], object], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within 20 s: {what}"
        await asyncio.sleep(0.005)


async def end_of(side: Side) -> End:
    return await asyncio.wait_for(asyncio.shield(side.connection.ended), 20)


def run(work: Awaitable[None]) -> None:
    asyncio.run(work)  # type: ignore[arg-type]


# -- what the broker's answers mean -----------------------------------------------------------------------------------


def test_only_the_reason_code_tells_whether_a_publish_was_taken(broker: Broker) -> None:
    async def work() -> None:
        async with connected(plan(broker)) as side:
            root = f"eda/1/{TENANT}"
            assert await side.connection.publish(f"{root}/d1/up/job/1", b"mine", retain=False) in (0x00, 0x10)
            for topic in (f"{root}/d2/up/job/1", f"{root}/d1/dn/job", "elsewhere"):
                assert await side.connection.publish(topic, b"not mine", retain=False) == NOT_AUTHORIZED

    run(work())


def test_what_the_broker_would_not_take_is_not_sent(broker: Broker) -> None:
    """It would end the connection for it, and for the next that sends it again."""

    async def work() -> None:
        async with connected(plan(broker)) as side:
            topic = f"eda/1/{TENANT}/d1/up/tel/heat"
            assert await side.connection.publish(topic, bytes(128 << 10), retain=False) == TOO_LARGE
            assert await side.connection.publish(topic, bytes(64 << 10), retain=False) in (0x00, 0x10)

    run(work())


def test_a_message_that_was_not_acknowledged_comes_again_and_one_that_was_does_not(broker: Broker) -> None:
    operator = broker.operator()

    async def work() -> None:
        async with connected(plan(broker)) as side:
            for n in range(4):
                operator.publish(f"d1/dn/rpc/{n}", str(n))
            await soon(lambda: len(side.heard) == 4, "all heard")
            side.heard[0].ack()
            side.heard[2].ack()
            # A round trip behind the two PUBACKs: they have arrived.
            await side.connection.publish(f"eda/1/{TENANT}/d1/up/job/1", b"", retain=False)
        side.heard[1].ack()  # too late: its connection is over, and the number means another message on the next
        async with connected(plan(broker)) as again:
            assert again.connection.session_present
            await soon(lambda: len(again.heard) == 2, "the two others")
            assert [message.payload for message in again.heard] == [b"1", b"3"]
            side.heard[3].ack()
            await again.connection.publish(f"eda/1/{TENANT}/d1/up/job/1", b"", retain=False)
        async with connected(plan(broker)) as third:
            await soon(lambda: len(third.heard) == 2, "still the two: nobody has acknowledged them")

    run(work())


def test_the_broker_holds_back_what_would_be_too_much_at_a_time(broker: Broker) -> None:
    operator = broker.operator()

    async def work() -> None:
        async with connected(plan(broker)) as side:
            for n in range(3 * module.RECEIVE_MAXIMUM):
                operator.publish(f"d1/dn/rpc/{n}", b"x" * 100)
            await soon(lambda: len(side.heard) >= module.RECEIVE_MAXIMUM, "a window full")
            await side.connection.publish(f"eda/1/{TENANT}/d1/up/job/1", b"", retain=False)
            assert len(side.heard) == module.RECEIVE_MAXIMUM
            for message in list(side.heard):
                message.ack()
            await soon(lambda: len(side.heard) >= 2 * module.RECEIVE_MAXIMUM, "the next window")

    run(work())


def test_many_small_messages_in_one_piece_of_tls_are_all_read(broker: Broker) -> None:
    """Bytes that TLS has decrypted already do not make a socket readable."""
    operator = broker.operator()

    async def work() -> None:
        async with connected(plan(broker)):
            pass  # a session, so that messages wait
        for n in range(module.RECEIVE_MAXIMUM):
            operator.publish(f"d1/dn/rpc/{n}", b"x")
        async with connected(plan(broker)) as side:
            await soon(lambda: len(side.heard) == module.RECEIVE_MAXIMUM, "all of them, with nothing else to wake us")

    run(work())


# -- ends -------------------------------------------------------------------------------------------------------------


def test_an_exception_in_a_callback_ends_the_connection(broker: Broker, caplog) -> None:
    operator = broker.operator()

    def fail(message: Received) -> None:
        raise RuntimeError(f"cannot read {message.topic}")

    async def work() -> None:
        async with connected(plan(broker), on_message=fail) as side:
            waiting = asyncio.get_running_loop().run_in_executor(None, operator.publish, "d1/dn/job", b"x")
            end = await end_of(side)
            await waiting
            assert "RuntimeError" in end.reason
            assert await side.connection.publish(f"eda/1/{TENANT}/d1/up/job/1", b"", retain=False) == LOST
        assert "the connection failed" in caplog.text

    run(work())


def test_a_second_client_of_the_same_name_takes_over(broker: Broker) -> None:
    async def work() -> None:
        async with connected(plan(broker)) as first, connected(plan(broker)) as second:
            end = await end_of(first)
            # mosquitto says why since 2.1, and closes without a word before.
            assert end.takeover or (end.closed and end.reason == "the broker closed the connection")
            assert not second.connection.ended.done()

    run(work())


def test_a_takeover_is_told_apart_where_the_broker_says_so() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _packet(reader)
        writer.write(b"\x20\x03\x00\x00\x00")
        subscribe = await _packet(reader)
        writer.write(b"\x90\x04" + subscribe[2:4] + b"\x00\x01" + b"\xe0\x02\x8e\x00")
        await reader.read()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            side = Side(_plain(server))
            with contextlib.suppress(TryLaterError):  # both packets in one piece
                await side.connection.open()
            end = await end_of(side)
            assert (end.code, end.takeover, end.closed) == (TAKEN_OVER, True, False)

    run(work())


def test_what_was_under_way_when_it_ended_is_told_as_lost(broker: Broker) -> None:
    async def work() -> None:
        with Proxy(broker.port) as proxy:
            async with connected(plan(broker, port=proxy.port)) as side:
                proxy.half_open()
                answer = side.connection.publish(f"eda/1/{TENANT}/d1/up/job/1", b"", retain=False)
                proxy.reset()
                assert await asyncio.wait_for(answer, 10) == LOST
                assert side.connection.ended.done()

    run(work())


@pytest.mark.parametrize("swallow", [("down",), ("up", "down")])
def test_a_path_that_is_dead_but_open_is_noticed(broker: Broker, swallow: tuple[str, ...]) -> None:
    async def work() -> None:
        with Proxy(broker.port) as proxy:
            async with connected(plan(broker, port=proxy.port, keepalive_s=1)) as side:
                await soon(lambda: side.ticks > 2, "progress")
                proxy.drop(*swallow)
                end = await end_of(side)
                assert end.reason

    run(work())


def test_a_broker_that_answers_pings_but_confirms_nothing_is_left(tmp_path: Path) -> None:
    """Our own broker for once: no real one does it, until it does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _packet(reader)
        writer.write(b"\x20\x03\x00\x00\x00")  # CONNACK
        subscribe = await _packet(reader)
        writer.write(b"\x90\x04" + subscribe[2:4] + b"\x00\x01")  # SUBACK, QoS 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                if (await _packet(reader))[0] == 0xC0:
                    writer.write(b"\xd0\x00")  # PINGRESP
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, connected(_plain(server, keepalive_s=1)) as side:
            answer = side.connection.publish("t", b"", retain=False)
            assert (await end_of(side)).reason == "the broker confirms nothing"
            assert await answer == LOST

    run(work())


def _plain(server: asyncio.AbstractServer, keepalive_s: int = 5) -> Plan:
    port = server.sockets[0].getsockname()[1]
    return Plan("127.0.0.1", port, None, "t/d", keepalive_s, None, None, None, ("a",))


async def _packet(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(2)
    length, shift, rest = head[1] & 127, 7, b""
    while (head + rest)[-1] & 128:
        rest += await reader.readexactly(1)
        length |= (rest[-1] & 127) << shift
        shift += 7
    return head[:1] + bytes([0]) + await reader.readexactly(length)


# -- brokers that mean harm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x03\x00\x87\x00",  # not authorized
        b"\x20\x03\x00\x01\x00",  # a code of MQTT 3
        b"\x20\x03\x00\xff\x00",  # a code that there is not
        b"\x20\x02\x00\x00",  # a CONNACK of MQTT 3
        b"\x20\xff\xff\xff\xff\xff",  # a length that never ends
        b"\xe0\x02\x8e\x00",  # DISCONNECT at once
        b"\x90\x04\x00\x01\x00\x87",  # SUBACK to no SUBSCRIBE
        b"\x20\x03\x00\x00\x00\x90\x04\x00\x01\x00\x87",  # CONNACK, and the subscription refused
        b"\x20\x03\x00\x00\x00\x30\xff\xff\xff\x7f" + bytes(70_000),  # CONNACK, and 256 MiB announced
        b"\x20\x03\x00\x00\x00\x32\x07\x00\x02\xff\xfe\x00\x01\x00",  # a topic that is not UTF-8
        b"",
    ],
)
def test_an_answer_that_makes_no_sense_fails_the_attempt_and_hangs_nothing(answer: bytes, caplog) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _packet(reader)
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            if not answer:
                writer.close()
            await reader.read()
        writer.close()

    async def work() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            side = Side(_plain(server))
            with pytest.raises(TryLaterError, match="cannot connect"):
                await asyncio.wait_for(side.connection.open(), 15)
            assert side.connection.ended.done()

    run(work())


def test_noise_after_the_handshake_never_kills_or_hangs_the_link(caplog) -> None:
    chance = random.Random(11)
    noises = [chance.randbytes(chance.randrange(1, 300)) for _ in range(150)]
    starts = [0x20, 0x32, 0x3A, 0x40, 0x50, 0x62, 0x70, 0x90, 0xB0, 0xD0, 0xE0, 0xF0]
    noises += [bytes([chance.choice(starts), 8]) + chance.randbytes(8) for _ in range(300)]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _packet(reader)
        writer.write(b"\x20\x03\x00\x00\x00")
        subscribe = await _packet(reader)
        writer.write(b"\x90\x04" + subscribe[2:4] + b"\x00\x01" + noises.pop())
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async def work() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            while noises:
                side = Side(_plain(server))
                with contextlib.suppress(TryLaterError):
                    await asyncio.wait_for(side.connection.open(), 15)
                await end_of(side)

    run(work())


# -- TLS --------------------------------------------------------------------------------------------------------------


def test_another_broker_behind_the_name_is_not_spoken_to(broker: Broker, tmp_path: Path) -> None:
    stranger = tmp_path / "other"
    stranger.mkdir()
    other = Broker(stranger)
    files = broker.device("d1")

    async def attempt(credentials: Credentials, match: str, **options) -> None:
        with pytest.raises(TryLaterError, match=match):
            await Side(plan(broker, credentials=credentials, **options)).connection.open()

    async def work() -> None:
        await attempt(Credentials(other.server_ca, files.certificate, files.key), "cannot trust")
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            await attempt(files, "cannot reach", port=silent.getsockname()[1])
        stale = broker.device("d9", days=-1)
        await attempt(stale, "cannot connect")
        await attempt(other.device("d1")._replace(ca=broker.server_ca), "cannot connect")
        await attempt(broker.claimant(), "cannot connect")

    run(work())


def test_files_that_cannot_be_used_are_named(broker: Broker, tmp_path: Path) -> None:
    files, other = broker.device("d1"), broker.device("d2")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    for ca, certificate, key, named in (
        (tmp_path / "none.pem", files.certificate, files.key, "none.pem"),
        (broken, files.certificate, files.key, "broken.pem"),
        (files.ca, tmp_path / "none.crt", files.key, "none.crt"),
        (files.ca, files.certificate, other.key, str(files.certificate)),
    ):
        where = Where("localhost", 1, True, str(ca), str(certificate), str(key))
        with pytest.raises(ConfigError, match="cannot use") as caught:
            tls_context(where, chain_of(where, None))
        assert named in str(caught.value)


def test_the_certificate_must_be_for_the_name_that_was_called(broker: Broker) -> None:
    async def work() -> None:
        where = plan(broker)
        with pytest.raises(TryLaterError, match="cannot trust"):
            await dial("127.0.0.2", where.port, where.tls, 5.0)
        sock = await dial("127.0.0.1", where.port, where.tls, 5.0)
        assert isinstance(sock, ssl.SSLSocket)
        sock.close()

    run(work())


def test_a_peer_that_never_answers_the_handshake_blocks_nothing(monkeypatch) -> None:
    monkeypatch.setattr("agent.link.dialling.DIAL_S", 0.5)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.01)

    async def work() -> None:
        counting = asyncio.ensure_future(count())
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            with pytest.raises(TryLaterError, match="no answer within"):
                await dial("127.0.0.1", silent.getsockname()[1], context, 5.0)
        counting.cancel()
        assert turns > 10, "the loop went on turning"

    run(work())


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 70 + ".invalid", "..", "a\0b"])
def test_a_name_that_does_not_exist_is_told(name: str) -> None:
    async def work() -> None:
        with pytest.raises(TryLaterError, match="cannot reach"):
            await dial(name, 1883, None, 5.0)

    run(work())


def test_the_will_is_published_when_the_device_is_gone_and_not_when_it_is_soon_back(broker: Broker) -> None:
    operator = broker.operator("d1/up/status")

    async def work() -> None:
        async with connected(plan(broker)):
            pass
        async with connected(plan(broker)):
            assert operator.on("d1/up/status") == []

    run(work())
    until(lambda: operator.on("d1/up/status") == [b"gone"], "the Will")
