"""The link as a process between a real broker and a stand-in for core: down, up, and the goodbye."""

from __future__ import annotations

from tests.link.broker import Broker, until
from tests.link.device import LinkProcess
from tests.link.standin import StandIn, document


def core_for(broker: Broker, link: LinkProcess, name: str = "d1", **settings) -> StandIn:
    return StandIn(link.folder.with_name("admin.sock"), broker.port, broker.device(name), name, **settings)


def test_messages_go_both_ways_and_the_end_is_told(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    with core_for(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        assert operator.publish("d1/dn/job", b"a job", retain=True) == 0
        until(lambda: ("dn/job", b"a job") in core.taken, "the job is taken")
        core.say("up/job/j1", b"done")
        until(lambda: operator.on("d1/up/job/j1") == [b"done"], "the state is published")
        until(lambda: not core.unconfirmed, "the state is confirmed")
        core.record("heat", boot="b", celsius=48.5)
        (message,) = until(lambda: operator.on("d1/up/tel/heat"), "telemetry is published")
        assert document(message)["records"] == [{"boot": "b", "celsius": 48.5}]
        online = document(operator.on("d1/up/status")[-1])
        assert online["online"] is True
        assert link.stop() == 0
        until(lambda: len(operator.on("d1/up/status")) == 2, "the end is told")
        offline = document(operator.on("d1/up/status")[-1])
        assert (offline["online"], offline["reason"], offline["session"]) == (False, "stopped", online["session"])
        assert core.until_state(connected=False)["reason"] == "stopped"
