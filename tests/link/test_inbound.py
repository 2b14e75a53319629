"""From the broker to core: the order, what is acknowledged when, and what core's moods do to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agent.base.errors import AgentError, DamagedError
from agent.link import inbound as module
from agent.link.connection import Received
from agent.link.core_client import CoreAbsentError, CoreRefusalError, Verdict
from agent.link.inbound import MOST_BYTES, MOST_MESSAGES, Inbound

ROOT = "eda/1/acme/d1/dn/"
ACCEPTED = Verdict("accepted")


class Core:
    """Hands out what ``moods`` hold for a payload, then accepts; ``gates`` hold an answer back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.moods: dict[bytes, list[AgentError | Verdict]] = {}
        self.gates: dict[bytes, asyncio.Event] = {}

    async def hand_in(self, topic: str, payload: bytes) -> Verdict:
        self.asked.append((topic, payload))
        if payload in self.gates:
            await self.gates[payload].wait()
        moods = self.moods.get(payload)
        mood = moods.pop(0) if moods else ACCEPTED
        if isinstance(mood, AgentError):
            raise mood
        return mood


class Wire:
    """Feeds an ``Inbound`` and keeps what it acknowledged."""

    def __init__(self, core: Core) -> None:
        self.acked: list[bytes] = []
        self.holds: list[bool] = []
        self.inbound = Inbound(core.hand_in, self.holds.append)

    def bring(self, *items: tuple[str, bytes], qos: int = 1, root: str = ROOT) -> None:
        for rest, payload in items:
            self.inbound.take(Received(root + rest, payload, qos, lambda payload=payload: self.acked.append(payload)))


async def settle(condition: Callable[[], bool] | None = None) -> None:
    """Let things happen until ``condition`` holds; without one, until all that can happen at once has happened."""
    for _ in range(50):
        await asyncio.sleep(0)
    deadline = asyncio.get_running_loop().time() + 20
    while condition is not None and not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)


def story(tell: Callable[[Core, Wire], Awaitable[None]]) -> None:
    async def work() -> None:
        core = Core()
        await tell(core, Wire(core))

    asyncio.run(work())


def test_nothing_is_acknowledged_before_core_has_answered() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.gates[b"a"] = asyncio.Event()
        wire.bring(("job", b"a"))
        await settle()
        assert core.asked == [("dn/job", b"a")]
        assert wire.acked == []
        core.gates[b"a"].set()
        await settle()
        assert wire.acked == [b"a"]

    story(tell)


@pytest.mark.parametrize("verdict", ["accepted", "duplicate", "refused"])
def test_every_verdict_leads_to_an_acknowledgement(verdict: str) -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.moods[b"a"] = [Verdict(verdict, "old_sequence")]
        wire.bring(("job", b"a"))
        await settle()
        assert wire.acked == [b"a"]

    story(tell)


def test_core_gets_jobs_in_order_and_a_question_does_not_wait_for_them() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.gates[b"1"] = asyncio.Event()
        wire.bring(("job", b"1"), ("job", b"2"), ("rpc/ping", b"p"), ("rpc/status", b"q"))
        await settle()
        assert core.asked == [("dn/job", b"1"), ("dn/rpc/ping", b"p"), ("dn/rpc/status", b"q")]
        core.gates[b"1"].set()
        await settle()
        assert core.asked[-1] == ("dn/job", b"2")

    story(tell)


def test_acknowledgements_keep_the_order_of_the_messages() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.gates[b"1"] = asyncio.Event()
        wire.bring(("job", b"1"), ("rpc/ping", b"p"), ("rpc/ping", b"q"))
        await settle()
        assert wire.acked == [], "the job before them has no verdict yet"
        core.gates[b"1"].set()
        await settle()
        assert wire.acked == [b"1", b"p", b"q"]

    story(tell)


def test_a_message_that_core_cannot_answer_for_does_not_stop_the_connection(monkeypatch) -> None:
    monkeypatch.setattr(module, "OVERTAKE_S", 0.2)

    async def tell(core: Core, wire: Wire) -> None:
        core.moods[b"bad"] = [CoreRefusalError(500, "a bug")] * 1000
        wire.bring(("job", b"bad"), ("job", b"good"), ("rpc/ping", b"p"))
        await settle(lambda: wire.acked == [b"good", b"p"])
        assert ("dn/job", b"good") in core.asked
        core.moods.clear()
        await settle(lambda: wire.acked == [b"good", b"p", b"bad"])

    story(tell)


def test_an_absent_core_is_waited_for_and_the_order_stays() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.moods[b"1"] = [CoreAbsentError("gone")] * 3
        wire.bring(("job", b"1"), ("job", b"2"))
        await settle(lambda: wire.acked == [b"1", b"2"])
        assert [payload for _, payload in core.asked] == [b"1"] * 4 + [b"2"]

    story(tell)


def test_nonsense_from_core_is_no_verdict() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.moods[b"1"] = [DamagedError("cannot read core's verdict")]
        wire.bring(("job", b"1"))
        await settle()
        assert wire.acked == []
        await settle(lambda: wire.acked == [b"1"])

    story(tell)


def test_what_is_too_large_for_core_is_refused_and_not_kept_for_ever() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.moods[b"big"] = [CoreRefusalError(413, "too large")]
        wire.bring(("job", b"big"))
        await settle()
        assert wire.acked == [b"big"]

    story(tell)


@pytest.mark.parametrize(
    "topic",
    ["eda/1/acme/d1/up/job/1", "eda/1/acme", "eda/2/acme/d1/dn/job", "x", "eda/1/acme/d1/dn", "eda/1//d1/dn/job"],
)
def test_a_topic_that_is_not_ours_is_acknowledged_and_passed_over(topic: str) -> None:
    async def tell(core: Core, wire: Wire) -> None:
        wire.bring((topic, b"x"), root="")
        await settle()
        assert (core.asked, wire.acked) == ([], [b"x"])

    story(tell)


def test_an_ended_connection_acknowledges_nothing_more() -> None:
    async def tell(core: Core, wire: Wire) -> None:
        core.gates[b"1"] = core.gates[b"2"] = asyncio.Event()
        wire.bring(("job", b"1"), ("rpc/ping", b"2"))
        await settle()
        wire.inbound.stop()
        core.gates[b"1"].set()
        await settle()
        assert wire.acked == []

    story(tell)


@pytest.mark.parametrize(("payload", "most"), [(b"x", MOST_MESSAGES), (bytes(128 << 10), MOST_BYTES // (128 << 10))])
def test_when_too_much_is_here_no_more_is_read_until_half_of_it_is_done(payload: bytes, most: int) -> None:
    """A broker that keeps to the window never gets there; mosquitto 2.0 does."""

    async def tell(core: Core, wire: Wire) -> None:
        core.gates[payload] = asyncio.Event()
        wire.bring(*[("rpc/ping", payload)] * (most - 1))
        assert wire.holds == []
        wire.bring(("rpc/ping", payload), ("rpc/ping", payload))
        assert wire.holds == [True]
        core.gates[payload].set()
        await settle(lambda: len(wire.acked) == most + 1)
        assert wire.holds == [True, False]

    story(tell)


def test_blocks_are_acknowledged_at_once_and_are_not_for_core() -> None:
    async def work() -> None:
        core, blocks = Core(), list[tuple[str, bytes]]()
        wire = Wire(core)
        wire.inbound = Inbound(core.hand_in, wire.holds.append, lambda xfer, payload: blocks.append((xfer, payload)))
        wire.bring(("blk/x1", b"one"), ("blk/x1", b"two"))
        wire.bring(("blk/x2", b"lost"), qos=0)
        await settle()
        assert blocks == [("x1", b"one"), ("x1", b"two"), ("x2", b"lost")]
        assert wire.acked == [b"one", b"two"] and core.asked == [] and wire.holds == []
        wire.inbound.stop()

    asyncio.run(work())
