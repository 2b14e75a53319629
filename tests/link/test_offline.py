"""Long without a broker: what is kept, what is given up, and what comes first when it is back."""

from __future__ import annotations

import signal
import time

from agent.link.outbox import MAX_MESSAGE_BYTES
from tests.link.broker import Broker, until
from tests.link.device import LinkProcess
from tests.link.proxy import Proxy
from tests.link.standin import StandIn, document


def test_a_long_outage(broker: Broker, link: LinkProcess) -> None:
    """Twice as much as the outbox holds, a job's end and an alert; a kill in the middle; then the broker is back."""
    operator = broker.operator("d1/up/#")
    count = 24_000
    with (
        Proxy(broker.port) as proxy,
        StandIn(link.folder.with_name("admin.sock"), proxy.port, broker.device("d1")) as core,
    ):
        proxy.refuse()
        link.start()
        core.until_state(connected=False)
        for n in range(count):
            core.record("heat" if n % 4 else "status", n=n, pad="x" * 20)
            if n in (count // 3, 2 * count // 3):
                until(lambda: core.waiting == 0, "taken over")
                link.stop(signal.SIGKILL)
                link.start()
        core.say("up/job/j1", b"ended meanwhile")
        core.say("up/alert/heat", b"hot", kind="alert", retain=True)
        until(lambda: core.waiting == core.unconfirmed == 1, "all but the state, which is not confirmed, is taken over")
        outbox = until(
            lambda: core.state["outbox"]["records"] + core.state["outbox"]["dropped"] == count and core.state["outbox"],
            "each record is held or counted",
        )
        assert outbox["dropped"] > count // 3
        assert outbox["bytes"] <= 1 << 20
        assert sum(file.stat().st_size for file in link.folder.glob("outbox.db*")) < 1.8 * (1 << 20)
        assert link.rss_mb() < 45
        core.record("heat", n=count, pad="the first after the outage")
        until(lambda: core.waiting == 1, "taken over")
        proxy.heal()
        proxy.bandwidth(300_000)
        core.until_state(connected=True)
        core.record("heat", n=count + 1, pad="live")
        until(lambda: not core.unconfirmed, "the state is confirmed")
        until(lambda: operator.on("d1/up/alert/heat"), "the alert")

        def heard() -> list[dict]:
            return [document(payload) for payload in operator.on("d1/up/tel/")]

        def accounted() -> int:
            return sum(len(message["records"]) + message["dropped"] for message in heard())

        until(lambda: accounted() >= count + 2, "all is sent")
        messages = heard()
        assert len({(message["outbox"], message["seq"]) for message in messages}) == len(messages)
        records = [record["n"] for message in messages for record in message["records"]]
        assert len(records) == len(set(records)), "each record once"
        assert accounted() == count + 2
        place = records.index(count + 1)
        assert place < len(records) / 2, "what was live did not wait for the backlog"
        for stream in ("heat", "status"):
            kept = [r["n"] for m in messages if m["stream"] == stream for r in m["records"] if r["n"] <= count]
            kept = [n for n in kept if n < count]
            assert kept == sorted(kept), "the backlog comes in its order"
            dropped = sum(message["dropped"] for message in messages if message["stream"] == stream)
            every = [n for n in range(count) if (n % 4 == 0) == (stream == "status")]
            assert kept == every[dropped:], "the oldest are gone, and their number is right"


def test_what_an_outage_has_kept_is_handed_over_no_faster_than_allowed(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    rate, count = 100 << 10, 2_000
    with (
        Proxy(broker.port) as proxy,
        StandIn(link.folder.with_name("admin.sock"), proxy.port, broker.device("d1"), outbox_kib_s=rate >> 10) as core,
    ):
        proxy.refuse()
        link.start()
        core.until_state(connected=False)
        for n in range(count):
            core.record("heat", n=n, pad="x" * 100)
        until(lambda: core.state["outbox"]["records"] == count, "taken over")
        proxy.heal()
        began = time.monotonic()

        def heard() -> list[bytes]:
            return list(operator.on("d1/up/tel/"))

        def all_is_sent() -> bool:
            size = sum(map(len, heard()))
            assert size <= rate * (time.monotonic() - began) + 2 * MAX_MESSAGE_BYTES
            return sum(len(document(payload)["records"]) for payload in heard()) == count

        until(all_is_sent, "all is sent")
        assert sum(map(len, heard())) > 2 * rate, "it was enough to tell"


def test_answers_of_before_an_outage_are_for_nobody(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    link.amend("from agent.link import outbound\noutbound.ANSWER_S = 0.3")
    with (
        Proxy(broker.port) as proxy,
        StandIn(link.folder.with_name("admin.sock"), proxy.port, broker.device("d1")) as core,
    ):
        link.start()
        core.until_state(connected=True)
        proxy.refuse()
        core.until_state(connected=False)
        core.say("up/rpc", b"old", kind="rpc")
        core.say("up/job/1", b"state")
        until(lambda: core.waiting == 1, "taken over")
        core.until_state(connected=False)
        reports = len(core.states)
        until(lambda: len(core.states) > reports + 1, "time goes by")
        proxy.heal()
        until(lambda: operator.on("d1/up/job/1"), "the state comes")
        core.say("up/rpc", b"new", kind="rpc")
        until(lambda: operator.on("d1/up/rpc"), "an answer of now comes")
        assert operator.on("d1/up/rpc") == [b"new"]


def test_more_states_and_more_questions_than_fit_at_a_time_all_arrive(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    with StandIn(link.folder.with_name("admin.sock"), broker.port, broker.device("d1")) as core:
        link.start()
        core.until_state(connected=True)
        link.stop()
        for n in range(1500):
            core.say(f"up/job/{n}", b"x")
        for n in range(500):
            operator.publish(f"d1/dn/rpc/{n}", str(n))
        link.start()
        until(lambda: not core.unconfirmed, "every state is confirmed")
        until(lambda: len(core.taken) == 500, "every question is with core")
        until(lambda: len(operator.on("d1/up/job/")) >= 1500, "every state is with the operator")
        assert core.state["reconnects"] == 0, "on one connection"
        assert link.rss_mb() < 45
