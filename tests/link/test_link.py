"""The link as a process between a real broker and a stand-in for core: down, up, and the goodbye."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.link.backoff import CLOSINGS
from tests.link.broker import PATIENCE_S, Broker, until
from tests.link.device import LinkProcess
from tests.link.proxy import Proxy
from tests.link.standin import StandIn, document


def core_for(broker: Broker, link: LinkProcess, name: str = "d1", port: int = 0, **settings) -> StandIn:
    return StandIn(link.folder.with_name("admin.sock"), port or broker.port, broker.device(name), name, **settings)


def test_messages_go_both_ways_and_the_end_is_told(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/#")
    with core_for(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        assert operator.publish("d1/dn/job", b"a job", retain=True) < 0x80
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


def test_a_device_that_dies_is_told_by_its_will_and_its_next_session_has_a_higher_number(
    broker: Broker, link: LinkProcess
) -> None:
    operator = broker.operator("d1/up/status")
    with core_for(broker, link) as core:
        link.start()
        first = core.until_state(connected=True)["session"]
        link.stop(signal.SIGKILL)
        heard = until(lambda: operator.on("d1/up/status")[1:], "the Will")
        assert document(heard[0]) == {"online": False, "session": first, "at": None, "reason": "lost"}
        link.start()
        until(lambda: core.state["session"] > first and core.state["connected"], "a session with a higher number")


def test_retained_messages_come_with_every_connection(broker: Broker, link: LinkProcess) -> None:
    """What a broker lost between two saves, or core before it was killed, is heard again without anybody's asking."""
    operator = broker.operator()
    operator.publish("d1/dn/job", b"a job", retain=True)
    operator.publish("d1/dn/desired", b"a wish", retain=True)
    with core_for(broker, link) as core:
        for count in (1, 2):
            link.start()
            until(lambda count=count: len(core.hand_ins) == 2 * count, "both")
            link.stop()
        assert [verdict for *_, verdict in core.hand_ins] == ["accepted"] * 2 + ["duplicate"] * 2


def test_an_alert_that_is_over_leaves_nothing_behind(broker: Broker, link: LinkProcess) -> None:
    with core_for(broker, link) as core:
        link.start()
        core.say("up/alert/heat", b"hot", kind="alert", retain=True)
        operator = broker.operator("d1/up/alert/#")
        until(lambda: operator.on("d1/up/alert/heat"), "the alert")
        core.say("up/alert/heat", b"", kind="alert", retain=True)
        until(lambda: operator.on("d1/up/alert/heat")[-1] == b"", "its end")
        later = broker.operator("d1/up/#")
        until(lambda: later.on("d1/up/status"), "what is retained")
        assert later.on("d1/up/alert/heat") == []


def test_a_publish_that_the_broker_refuses_is_told_and_not_confirmed(broker: Broker, link: LinkProcess) -> None:
    """The access list allows no telemetry and no states for a while."""
    acl = broker.folder / "broker.acl"
    allowed = acl.read_text()
    acl.write_text(allowed.replace("%u/up/#", "%u/up/status"))
    broker.restart()
    operator = broker.operator("d1/up/#")
    with core_for(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        core.say("up/job/j1", b"done")
        core.record("heat", n=1)
        until(lambda: "up/job/j1 (0x87)" in core.state["reason"], "the refusal is told")
        until(lambda: "up/tel/heat (0x87)" in core.state["reason"], "that of telemetry too")
        assert core.unconfirmed == 1
        assert core.state["outbox"]["records"] == 1
        acl.write_text(allowed)
        broker.restart()
        until(lambda: operator.on("d1/up/job/j1") and operator.on("d1/up/tel/heat"), "once it is allowed, all comes")
        until(lambda: not core.unconfirmed and core.state["reason"] == "", "and nothing is wrong any more")


def test_two_devices_with_one_identity_are_an_alarm_and_stop_fighting(
    broker: Broker, link: LinkProcess, short_dir: Path
) -> None:
    folder = short_dir / "twin"
    folder.mkdir()
    twin = LinkProcess(folder / "admin.sock", folder / "link")
    with core_for(broker, link) as core, core_for(broker, twin) as other:
        link.start()
        core.until_state(connected=True)
        twin.start()
        try:
            until(lambda: core.state["takeover"] or other.state.get("takeover"), "the alarm")
            alarmed = core if core.state["takeover"] else other
            assert alarmed.state["reconnects"] >= CLOSINGS - 2
            assert "identity" in " ".join(state["reason"] for state in alarmed.states)
        finally:
            twin.stop(signal.SIGKILL)


def test_new_settings_make_a_new_connection(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/status", "d2/up/status")
    with core_for(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        core.change(outbox_mb=2)
        core.until_state(connected=True, reconnects=1)
        said = ["", "new settings", ""]
        until(lambda: [document(item)["reason"] for item in operator.on("d1/up/status")] == said, "each is told")
        credentials = broker.device("d2")
        files = {"cert_file": str(credentials.certificate), "key_file": str(credentials.key)}
        core.change(device="d2", broker={**core.settings["broker"], **files})
        until(lambda: operator.on("d2/up/status"), "it is another device now")
        core.change(state="off")
        core.until_state(connected=False, reason="off")
        core.record("heat", n=1)
        until(lambda: core.waiting == 0, "the record is taken, and passed over")
        core.change(state="enrolled")
        core.until_state(connected=True)
        assert core.state["outbox"]["records"] == 0, "what was said while there was no fleet is for nobody"


def test_a_core_that_is_silent_for_long_is_told_to_the_fleet(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/status")
    link.amend("link._SILENCE_S = 0.5")
    with core_for(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        core.stop()
        until(lambda: len(operator.on("d1/up/status")) == 2, "the silence is told")
        told = document(operator.on("d1/up/status")[1])
        assert (told["online"], told["reason"]) == (True, "core does not answer")
        core.start()
        until(lambda: document(operator.on("d1/up/status")[-1])["reason"] == "", "and its end")


def test_a_broker_with_names_and_passwords_serves_too(link: LinkProcess, short_dir: Path) -> None:
    folder = short_dir / "plain"
    folder.mkdir()
    running = Broker(folder)
    passwords = folder / "passwords"
    os.system(f"mosquitto_passwd -c -b {passwords} d1 secret")
    config = (folder / "broker.conf").read_text().replace("require_certificate true", "require_certificate false", 1)
    config = config.replace("use_identity_as_username true", "", 1)
    (folder / "broker.conf").write_text(f"password_file {passwords}\n" + config)
    secret = folder / "secret"
    with running, core_for(running, link) as core:
        settings = {**core.settings["broker"], "cert_file": None, "key_file": None, "username": "d1"}
        secret.write_text("wrong\n")
        core.settings["broker"] = {**settings, "password_file": str(secret)}
        link.start()
        until(lambda: "refuses" in core.state.get("reason", ""), "a wrong password is told")
        secret.write_text("secret\n")
        core.until_state(connected=True)
        operator = running.operator("d1/up/#")
        core.say("up/job/1", b"x")
        until(lambda: operator.on("d1/up/job/1"), "published")


# -- stops ------------------------------------------------------------------------------------------------------------


def test_it_stops_in_good_order_whatever_it_is_at(broker: Broker, link: LinkProcess, short_dir: Path) -> None:
    """No core at all; a core and no broker; a broker that hangs; connected with work under way."""
    link.start()
    until((link.folder / "outbox.db").exists, "it runs without core")
    assert link.stop() == 0
    with core_for(broker, link, port=1) as core:
        link.start()
        core.until_state(connected=False)
        assert link.stop() == 0
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with core_for(broker, link, port=silent.getsockname()[1]) as core:
            link.start()
            caller, _ = silent.accept()
            assert link.stop() == 0
            caller.close()
    with core_for(broker, link) as core:
        core.slow_s = 1.0
        link.start()
        core.until_state(connected=True)
        operator = broker.operator()
        operator.publish("d1/dn/job", b"x")
        for n in range(100):
            core.say(f"up/job/{n}", b"x" * 1000)
        assert link.stop() == 0
        assert core.hand_ins == [] or core.hand_ins[0][2] == "accepted"


def test_without_a_confirmed_goodbye_the_will_is_published(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("d1/up/status")
    with Proxy(broker.port) as proxy, core_for(broker, link, port=proxy.port) as core:
        link.start()
        core.until_state(connected=True)
        until(lambda: operator.on("d1/up/status"), "online")
        proxy.drop("down")
        assert link.stop() == 0
        statuses = until(lambda: operator.on("d1/up/status")[1:], "the goodbye, or the Will")
        assert document(statuses[-1])["online"] is False


def test_only_one_link_works_in_a_folder(link: LinkProcess) -> None:
    link.start()
    until((link.folder / "outbox.db").exists, "the first runs")
    second = LinkProcess(link.folder.with_name("admin.sock"), link.folder)
    second.log = link.folder.with_name("second.log")
    second.start()
    assert second.process.wait(PATIENCE_S) == 1
    assert "another process has it" in second.log.read_text()


def test_the_folder_of_another_user_is_refused(link: LinkProcess) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root")
    link.folder.mkdir()
    os.chown(link.folder, 12345, 12345)
    link.start()
    assert link.process.wait(PATIENCE_S) == 1
    assert "belongs to another user" in link.log.read_text()


# -- the service manager ----------------------------------------------------------------------------------------------


class Manager:
    """The socket that systemd would listen on."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)
        self._lines: list[str] = []

    def heard(self, line: str) -> int:
        """How often a line that begins so has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._lines += self._socket.recv(4096).decode().splitlines()
        return sum(item.startswith(line) for item in self._lines)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Manager]:
    subject = Manager(short_dir / "notify")
    yield subject
    subject.close()


def test_the_service_manager_hears_how_it_is(broker: Broker, link: LinkProcess, manager: Manager) -> None:
    with core_for(broker, link) as core:
        link.start(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="600000")
        until(lambda: manager.heard("READY=1"), "ready")
        core.until_state(connected=True)
        until(lambda: manager.heard("STATUS=connected"), "connected")
        until(lambda: manager.heard("WATCHDOG=1") > 5, "alive")
        broker.process.stop()
        until(lambda: manager.heard("STATUS=not connected"), "not connected")
        core.stop()
        before = manager.heard("WATCHDOG=1")
        until(
            lambda: manager.heard("WATCHDOG=1") > before + 5, "alive without broker and core: a restart would not help"
        )
        assert link.stop() == 0
        assert manager.heard("STOPPING=1")


def test_a_part_that_hangs_starves_the_watchdog(broker: Broker, link: LinkProcess, manager: Manager) -> None:
    """The conversation with core is made to hang in a place where nothing bounds it."""
    link.amend(
        """
link._SLACK_S = link._POLL_S = 0.3
ask, turns = link.Link._ask, []

async def hangs(self, cursor):
    turns.append(cursor)
    return await (link.asyncio.sleep(1000) if len(turns) == 10 else ask(self, cursor))

link.Link._ask = hangs
"""
    )
    with core_for(broker, link):
        link.start(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="300000")
        until(lambda: "no progress: core" in link.log.read_text(), "it is noticed")
        fed = manager.heard("WATCHDOG=1")
        until(lambda: link.log.read_text().count("no progress: core") > 5, "and goes on being noticed")
        assert manager.heard("WATCHDOG=1") <= fed + 1, "nobody says that all is well"
