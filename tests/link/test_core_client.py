"""What link asks of core over its socket, and what it makes of answers that make no sense."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.base.errors import DamagedError
from agent.link.core_client import CoreAbsentError, CoreClient, CoreRefusalError
from agent.link.settings import parse_outgoing, parse_settings
from tests.link.standin import StandIn


def ask(path: Path, work: Callable[[CoreClient], Awaitable[object]], timeout_s: float = 10.0) -> object:
    async def run() -> object:
        client = CoreClient(path, timeout_s)
        try:
            return await work(client)
        finally:
            client.close()

    return asyncio.run(run())


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "admin.sock"


def test_nobody_there_is_told_as_that(path: Path) -> None:
    with pytest.raises(CoreAbsentError, match="cannot reach core"):
        ask(path, lambda client: client.settings())


def test_one_connection_serves_many_questions_and_a_core_that_restarts(path: Path) -> None:
    async def work(client: CoreClient) -> None:
        loop = asyncio.get_running_loop()
        for n in range(5):
            assert (await client.received(f"dn/rpc/{n}", b"x\x00y")).verdict == "accepted"
        await loop.run_in_executor(None, core.restart)
        assert (await client.received("dn/rpc/9", b"z")).verdict == "accepted", "the closed connection shows nowhere"
        both = await asyncio.gather(client.settings(), client.outgoing("", 0.1))
        assert both[0].client_id == "acme/d1"

    with StandIn(path, 1, None) as core:
        ask(path, work)
        assert core.taken[0] == ("dn/rpc/0", b"x\x00y")


def test_a_topic_with_signs_of_http_arrives_as_it_was(path: Path) -> None:
    with StandIn(path, 1, None) as core:
        topic = "dn/rpc/a?b&c=d%20 e\r\nX: y"
        ask(path, lambda client: client.received(topic, b""))
        assert core.taken == [(topic, b"")]


def _serve(path: Path, answer: bytes, work: Callable[[CoreClient], Awaitable[object]]) -> object:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def run() -> object:
        async with await asyncio.start_unix_server(handle, str(path)):
            client = CoreClient(path, 2.0)
            try:
                return await work(client)
            finally:
                client.close()

    return asyncio.run(run())


def _http(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", CoreAbsentError),
        (b"HTTP/1.1 200 OK\r\nContent-Le", CoreAbsentError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", CoreAbsentError),
        (b"HTTP/1.1 200 OK\r\n\r\n", DamagedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", DamagedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n", DamagedError),
        (b"HTTP/1.1 abc\r\nContent-Length: 0\r\n\r\n", DamagedError),
        (b"220 smtp ready\r\n\r\n", DamagedError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, DamagedError),
        (_http(b"{"), DamagedError),
        (_http(b"\xff\xfe"), DamagedError),
        (_http(b"[" * 100_000), DamagedError),
        (_http(b"{}"), DamagedError),
        (_http(b'{"verdict": "maybe"}'), DamagedError),
        (_http(b"[1]"), DamagedError),
        (_http(b'{"error": "no"}', "403 Forbidden"), CoreRefusalError),
        (_http(b'"no"', "500 Internal Server Error"), CoreRefusalError),
        (_http(b"", "503 Service Unavailable"), CoreRefusalError),
    ],
)
def test_an_answer_that_is_no_verdict_is_an_error(path: Path, answer: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        _serve(path, answer, lambda client: client.received("dn/job", b"x"))


def test_a_core_that_never_answers_is_given_up(path: Path) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_unix_server(handle, str(path)):
            client = CoreClient(path, 0.2)
            with pytest.raises(CoreAbsentError, match="does not answer"):
                await client.settings()

    asyncio.run(run())


# -- what the answers say ---------------------------------------------------------------------------------------------

BROKER = {"host": "b", "port": 8883, "tls": True, "keepalive_s": 60}
SETTINGS = {
    "state": "enrolled", "tenant": "acme", "device": "d1", "epoch": 3, "keyid": "0" * 32, "boot_nonce": "0" * 32,
    "broker": BROKER, "outbox_mb": 16, "splay_s": 10, "version": 4,
}  # fmt: skip
OUTGOING = {
    "cursor": "n:1", "settings_version": 4,
    "messages": [
        {"id": "n:1", "topic": "up/job/1", "kind": "state", "retain": False, "confirm": True, "payload": "eA=="},
        {"id": "n:2", "topic": "up/tel/heat", "kind": "tel", "stream": "heat", "record": {"n": 1}},
    ],
}  # fmt: skip


def test_settings_and_messages_are_read() -> None:
    found = parse_settings({**SETTINGS, "of_a_later_release": 1})
    assert (found.client_id, found.topic("up/status")) == ("acme/d1", "eda/1/acme/d1/up/status")
    assert found.subscriptions == tuple(f"eda/1/acme/d1/dn/{rest}" for rest in ("job", "desired", "rpc/+", "blk/+"))
    claim = parse_settings({**SETTINGS, "state": "claim", "device": None})
    assert claim.client_id == f"acme/claim/{'0' * 32}"
    assert claim.subscriptions == (f"eda/1/acme/claim/{'0' * 32}/dn/enrolment",)
    state, record = parse_outgoing(OUTGOING).messages
    assert (state.payload, state.confirm, record.stream, record.record) == (b"x", True, "heat", {"n": 1})
    off = {"state": "off", "version": 1, "outbox_mb": 1, "splay_s": 0}
    assert parse_settings(off).broker is None


@pytest.mark.parametrize(
    "change",
    [
        {"state": "lost"}, {"state": None}, {"tenant": "a/b"}, {"tenant": None}, {"device": "+"}, {"device": ""},
        {"broker": None}, {"broker": {**BROKER, "port": 0}}, {"broker": {**BROKER, "port": "1"}},
        {"broker": {**BROKER, "keepalive_s": 0}}, {"broker": {**BROKER, "host": 1}},
        {"version": "4"}, {"version": True}, {"outbox_mb": None}, {"splay_s": "1"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_make_no_connection(change: dict) -> None:
    with pytest.raises(DamagedError):
        parse_settings({**SETTINGS, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"topic": "dn/job"}, {"topic": "up/#"}, {"topic": "up/a/../b"}, {"topic": "up/"}, {"topic": None}, {"id": None},
        {"kind": "other"}, {"payload": "e"}, {"payload": 1}, {"confirm": 1}, {"kind": "tel"},
        {"kind": "tel", "stream": "a/b", "record": {}}, {"kind": "tel", "stream": "a", "record": []},
    ],
)  # fmt: skip
def test_messages_that_make_no_sense_are_not_published(change: dict) -> None:
    message = {**OUTGOING["messages"][0], **change}
    with pytest.raises(DamagedError):
        parse_outgoing({**OUTGOING, "messages": [message]})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(_JSON, st.sampled_from(sorted(SETTINGS)), st.sampled_from(["cursor", "messages", "settings_version"]))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_whatever_core_says_it_is_read_or_refused(value: object, field: str, other: str) -> None:
    for parse, document in ((parse_settings, {**SETTINGS, field: value}), (parse_outgoing, {**OUTGOING, other: value})):
        for candidate in (value, document, json.loads(json.dumps(document))):
            with contextlib.suppress(DamagedError):
                parse(candidate)
