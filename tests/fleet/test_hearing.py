"""A broker that lies, and devices that do: nothing is believed but what its device signed for this place and time."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.fleet.words import MOST_ALERTS
from agent.trust.envelope import MAX_ENVELOPE_BYTES, Signer, seal
from agent.wire import messages as wire
from tests.fleet.device import Claimant, Identity, SimulatedDevice
from tests.fleet.offices import AT, TENANT, Desktop


@pytest.fixture
def desk(tmp_path: Path):
    made = Desktop(tmp_path)
    yield made
    made.close()


@pytest.fixture
def device(desk: Desktop) -> SimulatedDevice:
    return desk.enrol("cam-1")


def info_of(desk: Desktop, name: str = "cam-1") -> Any:
    word = desk.books.words.word(name, "info")
    return None if word is None else word.payload


def test_what_a_device_signs_is_believed(desk: Desktop, device: SimulatedDevice) -> None:
    event = desk.hear(device.topic("up/info"), device.seal(device.info()))
    assert event is not None and event.kind == "info" and info_of(desk)["boot_nonce"] == device.nonce
    assert desk.hear(device.topic("up/info"), device.seal(device.info())) is None  # nothing new
    assert desk.dropped() == {}


@pytest.mark.parametrize("kind", ["info", "reported", "job/x", "rpc"])
def test_garbage_is_dropped_under_its_reason(desk: Desktop, device: SimulatedDevice, kind: str) -> None:
    good = device.seal(device.info())
    for payload, reason in (
        (b"", "malformed"),
        (b"{}", "malformed"),
        (b"\xff" * 100, "malformed"),
        (b"x" * (MAX_ENVELOPE_BYTES + 1), "too_large"),
        (good[: len(good) // 2], "malformed"),
    ):
        event = desk.hear(device.topic(f"up/{kind}"), payload)
        assert event is not None and event.kind == "dropped" and event.data["reason"] == reason
    assert info_of(desk) is None


def test_another_s_word_in_a_device_s_name_is_none(desk: Desktop, device: SimulatedDevice) -> None:
    other = desk.enrol("cam-2")
    stranger = Signer(secrets.token_bytes(32))
    info = device.info()
    mine = device.seal(info)
    tampered = json.loads(mine)
    payload = base64.b64decode(tampered["payload"]).replace(b'"0.1.0"', b'"6.6.6"')
    tampered["payload"] = base64.b64encode(payload).decode()
    two = json.loads(mine)
    two["signatures"][0]["keyid"] = other.identity.signer.keyid
    for data, reason in (
        (seal(info.KIND, info.encode(), [stranger]), "unknown_key"),
        (other.seal(info), "unknown_key"),
        (json.dumps(tampered).encode(), "bad_signature"),
        (json.dumps(two).encode(), "unknown_key"),
        (seal(wire.Reported.KIND, info.encode(), [device.identity.signer]), "wrong_type"),
        (device.seal(info.model_copy(update={"tenant": "evil"})), "wrong_tenant"),
        (device.seal(info.model_copy(update={"device": "cam-2"})), "wrong_device"),
        (device.seal(info.model_copy(update={"epoch": 2})), "future_epoch"),
        (seal(info.KIND, b'{"tenant": "acme"}', [device.identity.signer]), "bad_message"),
        (seal(info.KIND, b"[" * 9000, [device.identity.signer]), "bad_message"),
    ):
        event = desk.hear(device.topic("up/info"), data)
        assert event is not None and event.data["reason"] == reason, reason
    # What was signed by cam-1 for itself is nothing in the place of cam-2.
    event = desk.hear(other.topic("up/info"), mine)
    assert event is not None and event.data["reason"] == "unknown_key"
    assert info_of(desk) is None and info_of(desk, "cam-2") is None


def test_an_old_message_that_comes_again_changes_nothing(desk: Desktop, device: SimulatedDevice) -> None:
    old = device.seal(device.info())
    report = old_report(device, version=3, at="2026-01-31T11:00:00Z")
    device.generation = device.seq = 4
    device.nonce = secrets.token_hex(16)
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    event = desk.hear(device.topic("up/info"), old)
    assert event is not None and event.data["reason"] == "old_message" and info_of(desk)["boot_nonce"] == device.nonce
    desk.hear(device.topic("up/reported"), old_report(device, version=5, at="2026-01-31T12:00:00Z"))
    event = desk.hear(device.topic("up/reported"), report)
    assert event is not None and event.data["reason"] == "old_message"
    # Versions restart with the agent, and a clock may have been wrong: either one suffices.
    for version, at in ((1, "2026-01-31T13:00:00Z"), (9, "2020-01-01T00:00:00Z")):
        event = desk.hear(device.topic("up/reported"), old_report(device, version=version, at=at))
        assert event is not None and event.kind == "reported"


def test_a_report_of_a_new_start_counts_though_its_clock_and_number_are_behind(
    desk: Desktop, device: SimulatedDevice
) -> None:
    """A device without a clock battery: after a restart it counts from one, in the past."""
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    desk.hear(device.topic("up/reported"), old_report(device, version=50, at="2026-01-31T12:00:00Z"))
    device.nonce = secrets.token_hex(16)
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    event = desk.hear(device.topic("up/reported"), old_report(device, version=1, at="2026-01-31T09:00:00Z"))
    assert event is not None and event.kind == "reported"
    word = desk.books.words.word("cam-1", "reported")
    assert word is not None and word.payload["version"] == 1


def old_report(device: SimulatedDevice, *, version: int, at: str) -> bytes:
    return device.seal(
        wire.Reported(
            **device.address(), version=version, at=at, desired_version=0, config_state="default", config={}, drift=[],
            health="healthy", models=[], jobs={}, maintenance=[], refused={},
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "topic",
    [
        "", "eda", "eda/1/acme/cam-1/up", "eda/1/evil/cam-1/up/info", "eda/2/acme/cam-1/up/info",
        "eda/1/acme/cam-1/dn/job",
        "eda/1/acme/cam-1/up/nonsense", "eda/1/acme/cam-1/up/job/a/b", "eda/1/acme/claim/abc/up/other",
        "eda/1/acme/claim/abc/dn/enrolment", "$SYS/x", "eda/1/acme/cam-1/up/job/\x00", "eda/1/acme/../up/info",
    ],
)  # fmt: skip
def test_topics_that_nobody_should_speak_on(desk: Desktop, device: SimulatedDevice, topic: str) -> None:
    event = desk.hear(topic, device.seal(device.info()))
    assert event is not None and event.kind == "dropped" and info_of(desk) is None


def test_who_is_not_enrolled_gets_no_row_of_his_own(desk: Desktop) -> None:
    for number in range(50):
        desk.hear(f"eda/1/acme/made-up-{number}/up/info", b"{}")
        desk.hear(f"eda/1/acme/made-up-{number}/up/strange-{number}", b"{}")
    assert desk.dropped() == {("", "info", "unknown_device"): 50, ("", "other", "unknown_device"): 50}


def test_a_forgotten_device_s_emptied_topics_are_no_news(desk: Desktop) -> None:
    assert desk.hear("eda/1/acme/cam-9/up/info", b"") is None and desk.dropped() == {}


# -- what is not signed -----------------------------------------------------------------------------------------------


def test_status_and_alerts_are_kept_as_plain_words(desk: Desktop, device: SimulatedDevice) -> None:
    status = {"online": True, "session": 1, "at": None, "reason": "x", "more": {"deep": 1}}
    event = desk.hear(device.topic("up/status"), json.dumps(status).encode())
    assert event is not None and event.data == {"online": True, "session": 1, "at": None, "reason": "x"}
    desk.hear(device.topic("up/alert/disk"), b'{"level": "warning", "text": "full\\u001b[2J"}')
    ((_, _, word),) = desk.books.words.alerts("cam-1")
    assert word.payload == {"level": "warning", "text": "full\\x1b[2J"}
    assert desk.hear(device.topic("up/alert/disk"), b"") is not None
    assert desk.books.words.alerts() == []


@pytest.mark.parametrize(
    "payload", [b"[]", b"x", b'{"online": "yes"}', b'{"online": NaN}', b"{" * 5000, b"9" * 70_000, b'{"online": 1e999}']
)
def test_a_status_that_is_none_is_dropped(desk: Desktop, device: SimulatedDevice, payload: bytes) -> None:
    event = desk.hear(device.topic("up/status"), payload)
    assert event is not None and event.kind == "dropped"
    assert desk.books.words.word("cam-1", "status") is None


def test_alerts_are_as_many_as_there_is_room_for(desk: Desktop, device: SimulatedDevice) -> None:
    for number in range(MOST_ALERTS + 3):
        desk.hear(device.topic(f"up/alert/a{number}"), b'{"text": "x"}')
    assert len(desk.books.words.alerts()) == MOST_ALERTS
    assert desk.dropped() == {("cam-1", "alert", "too_many"): 3}


# -- announcements ----------------------------------------------------------------------------------------------------


@pytest.fixture
def claimant(tmp_path: Path) -> Claimant:
    trust = tmp_path / "trust.toml"
    key = base64.b64encode(Signer(bytes(32)).public.raw).decode()
    trust.write_text(f'tenant = "{TENANT}"\n[enrolment]\npublic = "{key}"\n')
    trust.chmod(0o644)
    return Claimant(TENANT, trust, Identity())


def test_only_who_has_the_identity_announces_it(desk: Desktop, claimant: Claimant) -> None:
    other = Identity()
    for data, reason in (
        (claimant.announcement(identity=other.public), "unknown_key"),
        (claimant.announcement(tenant="evil"), "wrong_tenant"),
        (b"{}", "malformed"),
        (seal(wire.Info.KIND, b"{}", [claimant.identity.signer]), "bad_message"),
    ):
        event = desk.hear(claimant.topic("up/announce"), data)
        assert event is not None and event.data["reason"] == reason
    elsewhere = claimant.topic("up/announce").replace(claimant.keyid, other.signer.keyid)
    event = desk.hear(elsewhere, claimant.announcement())
    assert event is not None and event.data["reason"] == "unknown_key"
    assert desk.books.words.announced() == []
    assert (
        desk.hear(claimant.topic("up/announce"), claimant.announcement(board="Pi\x1b[2J", serial="s" * 900)) is not None
    )
    (known,) = desk.books.words.announced()
    assert known.keyid == claimant.keyid and known.board == "Pi\\x1b[2J" and known.received == AT
    assert known.serial is not None and len(known.serial) == 200
    assert desk.hear(claimant.topic("up/announce"), b"") is None and desk.books.words.announced() == []


# -- anything at all --------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["eda", "1", "acme", "cam-1", "claim", "up", "dn", "info", "job", "status", "alert", "x", "", "..", "\x00"]
)


@given(st.lists(WORDS, max_size=9).map("/".join) | st.text(max_size=40), st.binary(max_size=200) | st.just(b"{}"))
def test_no_topic_and_no_payload_breaks_the_hearing(
    tmp_path_factory: pytest.TempPathFactory, topic: str, payload: bytes
) -> None:
    desk = shared(tmp_path_factory)
    event = desk.hear(topic, payload)
    assert event is None or event.kind in ("dropped", "status", "alert", "telemetry")


_SHARED: list[Desktop] = []


def shared(factory: pytest.TempPathFactory) -> Desktop:
    """One set of books for all examples."""
    if not _SHARED:
        _SHARED.append(Desktop(factory.mktemp("shared")))
        _SHARED[0].enrol("cam-1")
    return _SHARED[0]
