"""The link as a process that delivers: beside its broker, through kills of itself and of core, and in blocks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.base.config import DeliveryConfig
from agent.fleet.broker import Broker as OperatorsBroker
from agent.fleet.folder import BrokerSettings, Folder
from agent.trust.wants import DelayError
from tests.link.broker import ROOT, TENANT, Broker, until
from tests.link.device import LinkProcess
from tests.link.mirror_server import Mirror
from tests.link.standin import StandIn
from tests.trust.waiter import Waiter, opened, want_for

DATA = os.urandom(1_500_000)

#: ``edge-fleet serve-blocks`` without a fleet's folder of its own.
_SERVE = """
import signal, sys, threading
from pathlib import Path
from agent.fleet.broker import Broker
from agent.fleet.folder import BrokerSettings, Folder
from agent.fleet.giving import Giver
folder, port, repository = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
settings = BrokerSettings(host="localhost", port=port, ca_file="server-ca.pem", cert_file="ops.pem", key_file="ops.key")
with Broker(Folder(folder), settings, "acme/@ops/blocks") as broker:
    giver = Giver(repository, "acme", broker)
    broker.subscribe({giver.filter: 0})
    print("serving", flush=True)
    giver.run(lambda: False)
"""


def core_for(broker: Broker, link: LinkProcess, **delivery: object) -> StandIn:
    core = StandIn(link.folder.with_name("admin.sock"), broker.port, broker.device("d1"))
    core.delivery = DeliveryConfig(**delivery)  # type: ignore[arg-type]
    return core


@contextlib.contextmanager
def serving(broker: Broker, repository: Path) -> Iterator[None]:
    """Somebody gives blocks of a repository with the payload."""
    (repository / "metadata").mkdir(parents=True)
    (repository / "targets").mkdir()
    (repository / "targets" / "x").write_bytes(DATA)
    arguments = [sys.executable, "-c", _SERVE, str(broker.folder), str(broker.operator_port), str(repository)]
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=known) as server:
        assert server.stdout is not None and server.stdout.readline() == b"serving\n"
        yield
        server.terminate()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    with Mirror({"targets/x": DATA}, tmp_path / "mirror") as running:
        yield running


def test_a_payload_comes_through_kills_of_link_and_core(
    broker: Broker, link: LinkProcess, mirror: Mirror, short_dir: Path
) -> None:
    options = {"mirrors": [mirror.base], "ca_file": mirror.ca, "blocks": False, "rate_kib_s": 400}
    payload = short_dir / "payload"
    with core_for(broker, link, **options) as core:
        link.start()
        for number, share in enumerate((0.2, 0.4, 0.6, 0.8)):
            waiter = Waiter(core.desk, want_for(DATA, id=f"w{number}"), payload)
            until(lambda share=share: payload.exists() and payload.stat().st_size > share * len(DATA), "some of it")
            if number % 2:
                core.desk.stop()
                core.restart()
            else:
                link.stop(signal.SIGKILL)
                link.start()
                core.desk.stop()
                core.restart()
            assert isinstance(waiter.end(), DelayError)
        core.delivery = DeliveryConfig(**{**options, "rate_kib_s": 0})  # type: ignore[arg-type]
        assert Waiter(core.desk, want_for(DATA, id="last"), payload).end() is None
        core.until_state(connected=True)
    assert payload.read_bytes() == DATA
    begun = sorted(int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in mirror.ranges)
    assert begun[1] >= 0.2 * len(DATA), "nothing begins anew"


def test_a_device_with_nothing_but_its_broker(
    broker: Broker, link: LinkProcess, short_dir: Path, tmp_path: Path
) -> None:
    operator = broker.operator("d1/up/job/#")
    with core_for(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        waiter = Waiter(core.desk, want_for(DATA), short_dir / "payload")
        opened(core.desk)
        with serving(broker, tmp_path / "repository"):
            core.say("up/job/j1", b"meanwhile")
            assert waiter.end() is None
        until(lambda: operator.on("d1/up/job/j1") == [b"meanwhile"], "states go out meanwhile")
        assert core.hand_ins == [], "core has no part in blocks"
    assert (short_dir / "payload").read_bytes() == DATA


@pytest.mark.slow
def test_a_broker_that_is_killed_costs_what_was_under_way(
    broker: Broker, link: LinkProcess, short_dir: Path, tmp_path: Path
) -> None:
    payload = short_dir / "payload"
    with core_for(broker, link, rate_kib_s=300) as core, serving(broker, tmp_path / "repository"):
        link.start()
        core.until_state(connected=True)
        waiter = Waiter(core.desk, want_for(DATA, within_s=120.0), payload)
        for share in (0.3, 0.6):
            until(lambda share=share: payload.exists() and payload.stat().st_size > share * len(DATA), "some of it")
            broker.restart(signal.SIGKILL)
        waiter.join(90)
        assert waiter.error is None and not waiter.is_alive()
    assert payload.read_bytes() == DATA
    assert waiter.told == sorted(waiter.told), "nothing begins anew"


def test_a_device_reads_no_blocks_of_another(broker: Broker) -> None:
    """The shipped access list: a device gets below its own dn/ and nothing else."""
    credentials = broker.device("d2")
    settings = BrokerSettings(
        host="localhost", port=broker.port, ca_file=str(credentials.ca), cert_file=str(credentials.certificate),
        key_file=str(credentials.key),
    )  # fmt: skip
    operator = broker.operator()
    with OperatorsBroker(Folder(broker.folder), settings, f"{TENANT}/d2") as other:
        other.subscribe({f"eda/1/{TENANT}/+/dn/blk/+": 0})
        operator.publish("d1/dn/blk/x", b"theirs")
        operator.publish("d2/dn/blk/x", b"ours")
        (heard,) = until(lambda: other.receive(0.1), "its own block")
        assert heard.payload == b"ours" and other.receive(0.2) == []
