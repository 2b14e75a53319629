"""Through cuts, restarts and kills of every part: nothing is lost, and nothing acknowledged before core has it."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter

import pytest

from agent.base.errors import TryLaterError
from tests.link.broker import Broker, Operator, until
from tests.link.device import LinkProcess
from tests.link.proxy import Proxy
from tests.link.standin import StandIn, document


def core_at(broker: Broker, link: LinkProcess, port: int, **settings) -> StandIn:
    return StandIn(link.folder.with_name("admin.sock"), port, broker.device("d1"), **settings)


class Traffic:
    """Numbered messages down from an operator and up from core, and whether all of them arrived."""

    def __init__(self, operator: Operator, core: StandIn) -> None:
        self._operator, self._core = operator, core
        self.down = self.up = self.records = 0

    def send(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._operator.publish(f"d1/dn/rpc/{self.down}", f"down {self.down}") < 0x80
            self.down += 1
            self._core.say(f"up/job/{self.up}", f"up {self.up}".encode())
            self.up += 1
            self._core.record("heat", n=self.records)
            self.records += 1

    def all_arrived(self) -> None:
        wanted = {f"down {n}".encode() for n in range(self.down)}
        until(lambda: wanted == {payload for _, payload in self._core.taken}, "all that was sent down is with core")
        # The broker may have died with what it had confirmed; then core must have it as confirmed by right.
        wanted_up = {f"up {n}".encode() for n in range(self.up)}
        until(lambda: not self._core.unconfirmed, "core has a confirmation for each state")
        until(lambda: wanted_up <= set(self._operator.on("d1/up/job/")), "all that was said is with the operator")
        until(lambda: set(range(self.records)) <= {n for n, _ in self.telemetry()}, "all the telemetry")

    def telemetry(self) -> list[tuple[int, tuple[str, int]]]:
        """Records as a collector keeps them: each message counts once."""
        seen: dict[tuple[str, int], bytes] = {}
        for payload in self._operator.on("d1/up/tel/"):
            found = document(payload)
            key = (found["outbox"], found["seq"])
            assert seen.setdefault(key, payload) == payload, "a number with two contents"
        return [(record["n"], key) for key, payload in seen.items() for record in document(payload)["records"]]


def cut(proxy: Proxy, traffic: Traffic, count: int) -> None:
    """Reset the connection once it has carried ``count`` bytes, or a little later, with messages under way."""
    before = proxy.connections
    proxy.cut_after(count)
    for _ in range(5):
        traffic.send()
    if proxy.connections == before:
        proxy.reset()
    until(lambda: proxy.connections > before, "the link comes again")


def test_cuts_at_any_byte_lose_nothing(broker: Broker, link: LinkProcess) -> None:
    chance = random.Random(20)
    operator = broker.operator("d1/up/#")
    with Proxy(broker.port) as proxy, core_at(broker, link, proxy.port) as core:
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)
        for _ in range(40):
            # In the TLS handshake, in CONNECT, in the middle of a message, between two.
            cut(proxy, traffic, chance.choice([chance.randrange(1, 600), chance.randrange(1000, 6000)]))
        proxy.heal()
        traffic.all_arrived()
        counted = Counter(n for n, _ in traffic.telemetry())
        assert set(counted.values()) == {1}, "a collector that looks at the numbers gets each record once"
        assert link.stop() == 0


def test_restarts_of_the_broker_lose_nothing(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    with core_at(broker, link, broker.port) as core:
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)
        for _ in range(5):
            traffic.send(5)
            broker.restart()
        traffic.send(5)
        traffic.all_arrived()
        assert core.until_state(connected=True)["reconnects"] >= 5


def test_a_core_that_dies_again_and_again_gets_everything_in_the_end(broker: Broker, link: LinkProcess) -> None:
    chance = random.Random(4)
    operator = broker.operator("d1/up/#")
    with core_at(broker, link, broker.port) as core:
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)
        core.slow_s = 0.02
        for _ in range(12):
            traffic.send(3)
            time.sleep(chance.uniform(0, 0.15))
            core.restart()
        traffic.all_arrived()
        assert core.state["connected"]
        assert core.state["reconnects"] == 0, "the session is held meanwhile"


def test_without_core_nothing_is_acknowledged_whatever_happens_to_the_link(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/job/1")
    with core_at(broker, link, broker.port) as core:
        link.start()
        core.until_state(connected=True)
        tried: list[bytes] = []

        def not_now(_topic: str, payload: bytes) -> TryLaterError:
            tried.append(payload)
            return TryLaterError("not now")

        core.fail = not_now
        operator.publish("d1/dn/job", b"the job")
        until(lambda: tried, "core was asked, and took nothing")
        core.stop()
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            link.stop(number)
            link.start()
        core.fail = lambda topic, payload: None
        core.start()
        until(lambda: core.taken == [("dn/job", b"the job")], "the job comes when core is there")
        core.say("up/job/1", b"later than the acknowledgement, on the same connection")
        until(lambda: operator.on("d1/up/job/1"), "the acknowledgement has arrived")
        link.stop(signal.SIGKILL)
        link.start()
        core.until_state(connected=True)
        operator.publish("d1/dn/rpc/1", b"later")
        until(lambda: ("dn/rpc/1", b"later") in core.taken, "the next")
        assert [payload for _, payload, _ in core.hand_ins] == [b"the job", b"later"], "and then it was acknowledged"


def test_everything_at_once(broker: Broker, link: LinkProcess) -> None:
    """Link, broker, core and the path between are killed in turn, at moments of chance, while messages go both ways."""
    chance = random.Random(99)
    operator = broker.operator("d1/up/#")
    with Proxy(broker.port) as proxy, core_at(broker, link, proxy.port) as core:
        core.slow_s = 0.01
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)

        def kill_link() -> None:
            link.stop(signal.SIGKILL)
            link.start()

        for _ in range(30):
            traffic.send(2)
            time.sleep(chance.uniform(0, 0.1))
            chance.choice([kill_link, core.restart, proxy.reset, broker.restart])()
        traffic.send(2)
        traffic.all_arrived()


def test_a_state_is_not_confirmed_by_a_number_of_the_core_before(broker: Broker, link: LinkProcess) -> None:
    """Core dies while states are under way: late confirmations must not settle the states of the next start."""
    operator = broker.operator("d1/up/#")
    with Proxy(broker.port) as proxy, core_at(broker, link, proxy.port) as core:
        link.start()
        core.until_state(connected=True)
        for round_ in range(6):
            proxy.half_open()
            for n in range(5):
                core.say(f"up/job/{round_}-{n}", b"first")
            time.sleep(0.1)
            core.stop()
            proxy.heal()
            time.sleep(0.1)
            core.start()
            core.say(f"up/job/{round_}-new", b"second")
        until(lambda: not core.unconfirmed, "all confirmed")
        wanted = {f"d1/up/job/{r}-{n}" for r in range(6) for n in (*range(5), "new")}
        until(lambda: wanted <= {item.topic for item in list(operator.heard)}, "and each of them was published")


def test_a_slow_and_late_path_only_takes_longer(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    with Proxy(broker.port) as proxy, core_at(broker, link, proxy.port) as core:
        proxy.delay(0.05)
        proxy.bandwidth(100_000)
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)
        core.say("up/info", bytes(60_000), retain=True)
        traffic.send(20)
        traffic.all_arrived()
        until(lambda: operator.on("d1/up/info"), "the large one")
        assert core.state["reconnects"] == 0


def test_a_half_open_path_is_left_and_nothing_is_lost(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    with Proxy(broker.port) as proxy, core_at(broker, link, proxy.port) as core:
        core.settings["broker"]["keepalive_s"] = 1
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)
        proxy.drop("up", "down")
        sending = threading.Thread(target=traffic.send, args=(5,))
        sending.start()
        core.until_state(connected=False)
        proxy.heal()
        core.until_state(connected=True)
        sending.join(30)
        traffic.all_arrived()


@pytest.mark.slow
@pytest.mark.long
def test_cuts_go_on_for_long(broker: Broker, link: LinkProcess) -> None:
    chance = random.Random(7)
    operator = broker.operator("d1/up/#")
    with Proxy(broker.port) as proxy, core_at(broker, link, proxy.port) as core:
        link.start()
        core.until_state(connected=True)
        traffic = Traffic(operator, core)
        for _ in range(300):
            cut(proxy, traffic, chance.randrange(1, 12_000))
        proxy.heal()
        traffic.all_arrived()
        rss = link.rss_mb()
        assert rss < 45, rss
