"""A hostile broker: whatever it makes of messages, nothing runs that was not signed for this device and moment.

At the inbox with the real journal, for the sake of numbers, and with a few hundred messages through a real broker.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import signal
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.base.clock import TrustedClock
from agent.core.inbox import Called, Inbox, Replays
from agent.trust.allegiance import Allegiance, trusted_keys
from agent.trust.envelope import EnvelopeError, add_signatures
from agent.wire.messages import RpcRequest
from agent.work.journal import Journal
from tests.core import hostile
from tests.core.desk import Desk, Keys
from tests.core.fleet_device import connected
from tests.link.broker import TENANT, Broker

NOW = datetime(2026, 12, 1, 12, 0, 0, tzinfo=timezone.utc)


class StillClock:
    """Noon, always."""

    def monotonic(self) -> float:
        return 1000.0

    def now(self) -> datetime:
        return NOW


class Door:
    """An inbox with a journal of its own, and what it let in. ``restart`` is a new start of core."""

    def __init__(self, folder: Path, *, trust: str = "always") -> None:
        logging.getLogger("edge_agent.inbox").setLevel(logging.ERROR)
        self.keys = Keys()
        self._folder = folder
        self._clock = TrustedClock(StillClock(), trust, datetime(2026, 11, 1, tzinfo=timezone.utc))
        self._starts = 0
        self.asked: list[RpcRequest] = []
        self.desired = 0
        self.desk = Desk(self.keys, "cam-1", 1, lambda: self.nonce)
        self._open()
        self.journal.begin_epoch(1)

    def _open(self) -> None:
        self._starts += 1
        self.nonce = f"{self._starts:032x}"
        self.journal = Journal(self._folder / "journal.db", StillClock(), clock_trusted=self._clock.trusted).open()
        allegiance = Allegiance(TENANT, "cam-1", 1, trusted_keys(self.keys.rows()))
        called = Called(jobs_changed=lambda: None, desired_changed=self._desired, asked=self.asked.append)
        self._inbox = Inbox(lambda: allegiance, self.journal, self._clock, self.nonce, called)

    def _desired(self) -> None:
        self.desired += 1

    def restart(self) -> None:
        self.journal.close()
        self._open()

    def knock(self, topic: str, data: bytes) -> str:
        """The verdict, or the code of the refusal."""
        verdict = self._inbox.receive(topic, data)
        return verdict.reason or verdict.verdict

    @property
    def let_in(self) -> tuple[int, int, int]:
        """Jobs, desired states and questions."""
        return len(self.journal.jobs(limit=10_000)), self.desired, len(self.asked)

    def require_good_ones_pass(self) -> None:
        """The next right message on each topic is served."""
        jobs, desired, asked = self.let_in
        for topic in hostile.KINDS:
            assert self.knock(topic, hostile.good(self.desk, topic)) == "accepted"
        assert self.let_in == (jobs + 1, desired + 1, asked + 1)


@pytest.fixture
def door(tmp_path: Path):
    found = Door(tmp_path)
    yield found
    found.journal.close()


# Bytes.


@pytest.mark.parametrize("topic", hostile.KINDS)
def test_one_wrong_bit_anywhere_is_refused_and_so_is_every_beginning(door: Door, topic: str) -> None:
    """Before the right one came and after it: nothing of it is a second spelling of what was signed."""
    data = hostile.good(door.desk, topic)
    attacks = [*hostile.mutated(data), *hostile.truncated(data)]
    for _ in range(2):
        before = door.let_in
        codes = Counter(door.knock(topic, attack) for attack in attacks)
        assert not codes.keys() & {"accepted", "duplicate"}
        assert codes.keys() <= {"malformed", "wrong_type", "unknown_key", "bad_signature"}
        assert door.let_in == before
        assert door.knock(topic, data) in ("accepted", "replayed", "duplicate")
    refusals = door.journal.refusals()
    assert sum(refusals.values()) >= 2 * len(attacks)
    assert refusals.keys() <= codes.keys() | {"replayed"}
    door.require_good_ones_pass()


@pytest.mark.parametrize("topic", hostile.KINDS)
def test_every_value_of_every_byte_of_a_small_envelope_is_refused(door: Door, topic: str) -> None:
    data = hostile.good(door.desk, topic)
    count = 0
    for attack in hostile.mutated(data, values=range(256)):
        count += 1
        assert door.knock(topic, attack) not in ("accepted", "duplicate"), attack
    assert count > 250 * len(data)
    assert door.let_in == (0, 0, 0)
    door.require_good_ones_pass()


def test_every_case_is_refused_with_its_code_and_counted(door: Door) -> None:
    cases = hostile.every_case(door.desk)
    assert len(cases) > 100
    for case in cases:
        assert door.knock(case.topic, case.data) == case.code, case.name
    assert door.let_in == (0, 0, 0)
    assert door.journal.refusals() == dict(sorted(Counter(case.code for case in cases).items()))
    door.require_good_ones_pass()


def test_bytes_that_mean_nothing_mean_nothing(door: Door) -> None:
    chance = random.Random(5)
    topics = ["dn/job", "dn/desired", "dn/rpc/ping", "dn/rpc/", "", "up/job/x", "dn/\0", "x" * 9000]
    alphabet = b'{}[]":,0123456789abcpayloadTypesignatures=\\ '
    for number in range(4000):
        source = alphabet if number % 2 else bytes(range(256))
        data = bytes(chance.choices(source, k=chance.randrange(400)))
        assert door.knock(chance.choice(topics), data) in ("malformed", "wrong_topic")
    assert door.let_in == (0, 0, 0)
    door.require_good_ones_pass()


# Moments.


def test_said_again_it_is_not_done_again(door: Door) -> None:
    job, desired, question = (hostile.good(door.desk, topic) for topic in hostile.KINDS)
    assert door.knock("dn/job", job) == door.knock("dn/desired", desired) == "accepted"
    assert door.knock("dn/rpc/ping", question) == "accepted"
    for _ in range(20):
        assert door.knock("dn/job", job) == door.knock("dn/desired", desired) == "duplicate"
        assert door.knock("dn/rpc/ping", question) == "replayed"
    assert door.let_in == (1, 1, 1)


def test_kept_for_later_it_is_too_late(door: Door) -> None:
    """A question and what destroys are for one start; a counter that was passed stays passed, over restarts too."""
    desk, keys = door.desk, door.keys
    question = hostile.good(desk, "dn/rpc/ping")
    early = hostile.good(desk, "dn/job"), hostile.good(desk, "dn/desired")
    destroy = desk.sealed(desk.document(desk.job("model.remove", {"model": "m"}, boot_nonce=door.nonce)),
                          keys.admin, keys.second)  # fmt: skip
    nonce_in_a_change = desk.sealed(desk.document(desk.job("store.gc", boot_nonce=door.nonce)))
    late = hostile.good(desk, "dn/job"), hostile.good(desk, "dn/desired")
    door.restart()
    assert door.knock("dn/rpc/ping", question) == "wrong_boot_nonce"
    assert door.knock("dn/job", destroy) == "accepted"  # into the journal, so that the fleet learns why not
    assert (door.journal.jobs()[0].state, door.journal.jobs()[0].error.code) == ("rejected", "wrong_boot_nonce")
    assert door.knock("dn/job", nonce_in_a_change) == "accepted"
    assert door.journal.jobs()[0].error.code == "wrong_boot_nonce"
    assert door.knock("dn/job", late[0]) == door.knock("dn/desired", late[1]) == "accepted"
    for _ in range(2):
        assert door.knock("dn/job", early[0]) == "old_generation"
        assert door.knock("dn/desired", early[1]) == "old_version"
        assert door.knock("dn/job", destroy) == "old_generation"
        door.restart()
    assert [status.state for status in door.journal.jobs()] == ["queued", "rejected", "rejected"]
    door.require_good_ones_pass()


def test_without_the_nonce_nothing_is_destroyed(door: Door) -> None:
    desk, keys = door.desk, door.keys
    for nonce in (None, "0" * 32):
        data = desk.sealed(desk.document(desk.job("model.remove", {"model": "m"}, boot_nonce=nonce)),
                           keys.admin, keys.second)  # fmt: skip
        assert door.knock("dn/job", data) == "accepted"
        assert door.journal.jobs()[0].error.code == "wrong_boot_nonce"


def test_two_may_sign_one_after_the_other_and_a_stranger_beside_them_changes_nothing(door: Door) -> None:
    desk, keys = door.desk, door.keys
    job = desk.job("model.remove", {"model": "m"}, boot_nonce=door.nonce)
    once = desk.sealed(desk.document(job), keys.admin)
    assert door.knock("dn/job", once) == "too_few_signatures"
    assert door.knock("dn/job", add_signatures(once, [keys.stranger])) == "too_few_signatures"
    assert door.knock("dn/job", add_signatures(once, [keys.stranger, keys.second])) == "accepted"
    assert door.journal.jobs()[0].state == "queued"


def test_a_dead_line_is_looked_at_by_a_clock_that_counts(door: Door, tmp_path_factory) -> None:
    for moment, code in (("2026-12-01T11:59:59Z", "expired"), ("2026-02-30T00:00:00Z", "bad_message")):
        assert door.knock("dn/rpc/ping", door.desk.sealed(door.desk.question("ping", not_after=moment))) == code
    good = door.desk.sealed(door.desk.question("ping", not_after="2026-12-01T12:00:01Z"))
    assert door.knock("dn/rpc/ping", good) == "accepted"
    blind = Door(tmp_path_factory.mktemp("blind"), trust="never")
    question = blind.desk.question("ping", not_after="2199-01-01T00:00:00Z")
    assert blind.knock("dn/rpc/ping", blind.desk.sealed(question)) == "clock_untrusted"
    blind.journal.close()


def test_the_same_name_or_number_with_another_content(door: Door) -> None:
    desk = door.desk
    first = desk.job("store.gc")
    assert door.knock("dn/job", desk.sealed(desk.document(first))) == "accepted"
    other = first.model_copy(update={"op": "store.scrub"})
    assert door.knock("dn/job", desk.sealed(desk.document(other))) == "job_id_taken"
    reused = first.model_copy(update={"job_id": "new"})
    assert door.knock("dn/job", desk.sealed(desk.document(reused))) == "old_sequence"
    assert door.knock("dn/job", desk.sealed(desk.document(first))) == "duplicate"  # in a later document: said again
    same_generation = desk.document(desk.job("store.gc")).model_copy(update={"generation": 1})
    assert door.knock("dn/job", desk.sealed(same_generation)) == "old_generation"
    assert door.let_in[0] == 1
    door.require_good_ones_pass()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_in_whatever_order_they_come_none_runs_after_a_later_one(door: Door, order: tuple[int, ...]) -> None:
    documents = [hostile.good(door.desk, "dn/job") for _ in range(4)]
    highest = -1
    for number in order:
        expected = "accepted" if number > highest else "old_generation"
        assert door.knock("dn/job", documents[number]) == expected
        highest = max(highest, number)
        assert door.knock("dn/job", documents[number]) == ("duplicate" if number == highest else "old_generation")


@given(st.lists(st.tuples(st.sampled_from(list(hostile.KINDS)), st.integers(0, 9), st.integers(0, 12)), max_size=60))
@settings(max_examples=60)
def test_any_story_of_a_broker_that_repeats_delays_and_reorders(tmp_path_factory, story) -> None:
    """Each message at most once, and none below what was passed; third number 0: a new start before it."""
    door = Door(tmp_path_factory.mktemp("door"))
    first = door.nonce
    made = {topic: [hostile.good(door.desk, topic) for _ in range(10)] for topic in hostile.KINDS}
    accepted: dict[str, list[int]] = {topic: [] for topic in hostile.KINDS}
    try:
        for topic, number, chance in story:
            if chance == 0:
                door.restart()
            verdict = door.knock(topic, made[topic][number])
            if verdict == "accepted":
                assert number not in accepted[topic]
                accepted[topic].append(number)
                if topic.startswith("dn/rpc"):
                    assert door.nonce == first
            elif verdict == "duplicate":
                assert number == accepted[topic][-1]
        for topic in ("dn/job", "dn/desired"):
            assert accepted[topic] == sorted(accepted[topic])
        assert door.let_in == tuple(len(accepted[topic]) for topic in hostile.KINDS)
    finally:
        door.journal.close()


def test_numbers_of_questions_are_remembered_by_key_and_never_forgotten_upwards() -> None:
    replays, chance = Replays(), random.Random(1)
    admin, watcher = frozenset(("a",)), frozenset(("w",))
    used: set[int] = set()
    for _ in range(5000):
        number = chance.randrange(20_000)
        with contextlib.suppress(EnvelopeError):
            replays.require_new(admin, number)
            assert number not in used
            used.add(number)
    for number in used:
        with pytest.raises(EnvelopeError):
            replays.require_new(admin, number)
    replays.require_new(watcher, 7)
    with pytest.raises(EnvelopeError):
        replays.require_new(frozenset(("w", "x")), 7)
    replays.require_new(frozenset(("x",)), 7)


# Through a broker.


def unlimited(folder: Path) -> Broker:
    """A broker that lets payloads of any size pass."""
    folder.mkdir()
    broker = Broker(folder)
    config = folder / "broker.conf"
    config.write_text(config.read_text().replace("message_size_limit 65536", ""))
    return broker


def test_a_few_hundred_attacks_through_a_real_broker(short_dir: Path) -> None:
    with connected(short_dir, broker=unlimited(short_dir / "broker"), config='[log]\nlevel = "error"') as device:
        fleet = device.fleet
        fleet.done("ping")
        cases = hostile.every_case(fleet)
        for topic in hostile.KINDS:
            data = hostile.good(fleet, topic)
            cases += [hostile.Case("a wrong byte", topic, attack) for attack in hostile.sampled(data, 60, seed=3)]
        for number, case in enumerate(cases):
            fleet.say(case.topic, case.data, retain=case.topic in ("dn/job", "dn/desired") and number % 3 == 0)
        cases = [case for case in cases if not case.topic.startswith("dn/blk/")]  # what nobody asked for ends in link
        said = fleet.reports("all are counted", lambda said: sum(said["refused"].values()) >= len(cases))
        known = Counter(case.code for case in cases if case.code)
        assert all(said["refused"].get(code, 0) >= count for code, count in known.items())
        assert sum(said["refused"].values()) == len(cases)
        assert [status["job_id"] for status in device.json("jobs", "list")["jobs"]] == ["j1"]
        assert fleet.heard("up/rpc") == []
        assert (said["config_state"], said["desired_version"]) == ("default", 0)
        assert fleet.done("ping") == {"pong": True}
        assert fleet.ask("ping")["result"] == {"pong": True}
        assert device.stop_link() == 0
        assert device.stop() == 0
        assert "Traceback" not in device.logs()


def test_what_a_broker_kept_is_not_done_later_or_twice(short_dir: Path) -> None:
    """It holds back, repeats and replays over restarts of link and core."""
    with connected(short_dir) as device:
        fleet, keys = device.fleet, device.keys
        rotate = fleet.sealed(fleet.document(fleet.job("store.rotate-key")))
        fleet.say("dn/job", rotate, retain=True)
        fleet.ended("j1")
        key = device.admin_get("/v1/store")["key_id"]
        question = fleet.sealed(fleet.question("ping"))
        held_back = fleet.sealed(fleet.document(fleet.job("store.rotate-key")))
        destroy = fleet.sealed(
            fleet.document(fleet.job("model.remove", {"model": "m"}, boot_nonce=fleet.nonce)), keys.admin, keys.second
        )
        device.stop_link(signal.SIGKILL)
        fleet.say("dn/rpc/ping", question)  # waits in the session of the absent link
        device.restart(signal.SIGKILL)
        device.start_link()  # gets the retained job anew, and the question
        device.wait_until_known()
        fleet.reports("the question was for another start", lambda said: said["refused"] == {"wrong_boot_nonce": 1})
        for _ in range(3):
            fleet.say("dn/job", rotate, retain=True)
        fleet.say("dn/job", destroy, retain=True)
        assert fleet.ended("j3")["error"]["code"] == "wrong_boot_nonce"
        for data in (held_back, rotate):
            fleet.say("dn/job", data, retain=True)
        said = fleet.reports("both came too late", lambda said: said["refused"].get("old_generation") == 2)
        assert said["refused"] == {"old_generation": 2, "wrong_boot_nonce": 1}
        assert device.admin_get("/v1/store")["key_id"] == key
        assert {row["job_id"] for row in device.json("jobs", "list")["jobs"]} == {"j1", "j3"}
        assert fleet.done("ping") == {"pong": True}


def test_another_devices_messages_are_not_ours(short_dir: Path) -> None:
    """The same fleet, the same keys, another name: the broker delivers its job and its question here."""
    with connected(short_dir) as device:
        fleet = device.fleet
        other = Desk(device.keys, "cam-2", 1, lambda: fleet.nonce)
        for topic in hostile.KINDS:
            fleet.say(topic, hostile.good(other, topic), retain=not topic.startswith("dn/rpc"))
        fleet.reports("they are refused", lambda said: said["refused"] == {"wrong_device": 3})
        assert fleet.done("ping") == {"pong": True}
