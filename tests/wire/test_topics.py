"""Topics as text and back: one level a name, nothing that means something to MQTT."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.wire.messages import JobState
from agent.wire.topics import CLAIM, DOWN, Topic, claim_topic, device_topic, is_name, is_retained, parse_topic

NAMES = st.from_regex(re.compile(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z"))
KEYID = "0123456789abcdef0123456789abcdef"


@given(NAMES, NAMES.filter(lambda name: name != CLAIM), st.lists(NAMES, min_size=1, max_size=3))
def test_there_and_back(tenant: str, device: str, rest: list[str]) -> None:
    for direction in ("up", "dn"):
        text = device_topic(tenant, device, "/".join((direction, *rest)))
        found = parse_topic(text)
        assert found == Topic(tenant, device, "/".join((direction, *rest)))
        assert str(found) == text


@given(st.text())
def test_any_text_is_a_topic_of_ours_or_none(text: str) -> None:
    found = parse_topic(text)
    assert found is None or str(found) == text
    assert not is_name(text) or re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text)


def test_before_the_enrolment() -> None:
    text = claim_topic("acme", KEYID, "up/announce")
    assert text == f"eda/1/acme/claim/{KEYID}/up/announce"
    assert parse_topic(text) == Topic("acme", f"claim/{KEYID}", "up/announce")


@pytest.mark.parametrize(
    "text",
    ["", "/", "eda/1", "eda/1/acme/cam-1", "eda/1/acme/cam-1/up", "eda/2/acme/cam-1/up/info",
     "EDA/1/acme/cam-1/up/info", "/eda/1/acme/cam-1/up/info", "eda/1/acme/cam-1/up/info/", "eda/1/acme/cam-1//info",
     "eda/1//cam-1/up/info", "eda/1/acme/+/up/info", "eda/1/acme/#", "eda/1/acme/cam-1/up/in fo",
     "eda/1/acme/cam-1/up/info\n", "eda/1/acme/cam-1/sideways/info", "eda/1/acme/claim/up/announce",
     "eda/1/acme/claim/x/announce", "eda/1/acme/cam-1/up/inf\u0131", "eda/1/$SYS/cam-1/up/info",
     "eda/1/acme/.hidden/up/info", "$share/x/eda/1/a/b/up/c"],
)  # fmt: skip
def test_what_is_no_topic_of_ours(text: str) -> None:
    assert parse_topic(text) is None


@pytest.mark.parametrize("name", ["", ".x", "-x", "_x", "x" * 65, "a/b", "+", "#", "a\0", "ä", "a b", "x\n"])
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(ValueError, match="not names"):
        device_topic(name, "cam-1", "up/info")
    with pytest.raises(ValueError, match="not names"):
        device_topic("acme", name, "up/info")
    with pytest.raises(ValueError, match="not names"):
        claim_topic("acme", name, "up/announce")


def test_no_device_is_called_claim() -> None:
    with pytest.raises(ValueError, match="not names"):
        device_topic("acme", "claim", "up/info")


def test_names_are_those_of_the_messages() -> None:
    """One grammar: what may be a topic may be a job id, and the other way round."""
    pattern = next(each.pattern for each in JobState.model_fields["job_id"].metadata if hasattr(each, "pattern"))
    assert pattern == r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


def test_what_is_retained() -> None:
    for rest in ("up/status", "up/info", "up/reported", "dn/job", "dn/desired", "up/alert/disk"):
        assert is_retained(rest)
    for rest in ("up/job/j1", "up/rpc", "up/tel/heat", "dn/rpc/ping", "up/alert", "dn/blk/x"):
        assert not is_retained(rest)


def test_a_device_listens_to_its_own_alone() -> None:
    assert DOWN == ("job", "desired", "rpc/+", "blk/+")
