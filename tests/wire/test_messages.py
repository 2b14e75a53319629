"""Messages are strict, closed and bounded: a device must not do half of what a newer fleet meant."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.base.errors import PeerError
from agent.wire import messages as wire
from agent.wire.messages import MAX_DEPTH, decode
from agent.wire.ops import CLASSES, OPS, SIGNATURES

ADDRESS = {"tenant": "acme", "device": "cam-1", "epoch": 1}
KEY, NONCE, AT = "A" * 43 + "=", "0" * 32, "2026-11-22T12:00:00Z"
JOB = {"job_id": "j1", "seq": 1, "op": "ping", "class": "observe"}
#: The least that each message needs.
LEAST: dict[type, dict[str, Any]] = {
    wire.JobDocument: {**ADDRESS, "generation": 1},
    wire.Desired: {**ADDRESS, "version": 1},
    wire.RpcRequest: {**ADDRESS, "rpc_id": "r1", "n": 1, "boot_nonce": NONCE, "op": "ping"},
    wire.JobState: {**ADDRESS, "job_id": "j1", "seq": 1, "op": "ping", "rev": 1, "state": "queued", "at": AT,
                    "clock_trusted": True},
    wire.RpcAnswer: {**ADDRESS, "rpc_id": "r1", "op": "ping", "boot_nonce": NONCE},
    wire.Info: {**ADDRESS, "boot_nonce": NONCE, "at": AT, "agent_version": "1", "identity": KEY, "ops": [],
                "last_seq": 0, "last_generation": 0, "desired_version": 0, "facts": {}, "profile": "x",
                "inventory": {}},
    wire.Reported: {**ADDRESS, "version": 0, "at": AT, "desired_version": 0, "config_state": "default", "config": {},
                    "drift": [], "health": "healthy", "models": [], "jobs": {}, "maintenance": [], "refused": {}},
    wire.Announcement: {"tenant": "acme", "identity": KEY, "boot_nonce": NONCE, "at": AT, "csr": "",
                        "agent_version": "1", "facts": {}},
    wire.Enrolment: {**ADDRESS, "identity": KEY, "keys": [{"name": "a", "public": KEY, "classes": ["observe"]}]},
}  # fmt: skip


def read(kind: type, document: dict[str, Any]) -> Any:
    return decode(json.dumps(document).encode(), kind)


def refused(kind: type, document: dict[str, Any] | str | bytes) -> str:
    data = document if isinstance(document, bytes) else document.encode() if isinstance(document, str) else None
    with pytest.raises(PeerError) as wrong:
        decode(json.dumps(document).encode() if data is None else data, kind)
    assert str(wrong.value).startswith("cannot read message: ")
    return str(wrong.value)


def job(**fields: Any) -> dict[str, Any]:
    return {**LEAST[wire.JobDocument], "job": {**JOB, **fields}}


@pytest.mark.parametrize("kind", LEAST)
def test_the_least_is_read_and_written_again(kind: Any) -> None:
    message = read(kind, LEAST[kind])
    assert decode(message.encode(), kind) == message
    assert kind.KIND.startswith("application/vnd.edge-agent.")


def test_every_type_has_a_name_of_its_own() -> None:
    assert len({kind.KIND for kind in LEAST}) == len(LEAST) == 9


@pytest.mark.parametrize("kind", LEAST)
def test_each_field_is_needed_and_no_other_is_taken(kind: Any) -> None:
    for name in LEAST[kind]:
        less = {key: value for key, value in LEAST[kind].items() if key != name}
        assert name in refused(kind, less)
    assert "more" in refused(kind, {**LEAST[kind], "more": 1})


@pytest.mark.parametrize("kind", LEAST)
def test_nothing_is_made_of_another_kind(kind: Any) -> None:
    """ "1" is no number, 1 is no text, 1.0 is no whole number, true is no 1."""
    for name, value in LEAST[kind].items():
        others: list[Any] = [None, [1], [[]]]
        if isinstance(value, bool):
            others += [0, 1, "true"]
        elif isinstance(value, int):
            others += ["1", 1.0, True, 1 << 53, -1]
        elif isinstance(value, str):
            others += [1, True, {}]
        elif isinstance(value, dict):
            others += ["", 1, []]
        for other in others:
            if other != value:
                assert name in refused(kind, {**LEAST[kind], name: other}), (name, other)


def test_a_job_with_everything() -> None:
    window = {"cron": "0 3 * * *", "duration_s": 3600, "tz": "Europe/Berlin"}
    document = job(
        op="model.install", kind="change", **{"class": "change"}, args={"a": [1, 2.5, "x", None, {"b": True}]},
        lane="rescue", priority=9, boot_nonce=NONCE, not_after=AT, step_timeout_s=1.5, total_timeout_s=9, window=window,
    )  # fmt: skip
    document["job"].pop("kind")
    found = read(wire.JobDocument, {**document, "cancel": ["j0", "j00"]})
    assert found.job.kind == "change"
    assert found.job.window.tz == "Europe/Berlin"
    assert json.loads(found.encode())["job"]["class"] == "change"


@pytest.mark.parametrize(
    "fields",
    [
        {"job_id": "../x"}, {"job_id": ""}, {"job_id": "x" * 65}, {"job_id": "a\n"}, {"seq": 0}, {"op": "Ping"},
        {"op": ""}, {"op": "x" * 49}, {"op": "a b"}, {"class": "any"}, {"class": ["observe"]}, {"args": []},
        {"args": None}, {"lane": "fast"}, {"priority": -1}, {"priority": 10}, {"priority": 5.0}, {"priority": "5"},
        {"boot_nonce": "0" * 31}, {"boot_nonce": "F" * 32}, {"not_after": "2026-11-22"}, {"not_after": AT + "\n"},
        {"not_after": "2026-11-22T12:00:00+00:00"}, {"not_after": 5}, {"step_timeout_s": 0}, {"step_timeout_s": -1},
        {"step_timeout_s": 1e9}, {"step_timeout_s": "5"}, {"total_timeout_s": 2_592_001}, {"window": {}},
        {"window": {"cron": "* * * * *", "duration_s": 59}}, {"window": {"cron": "* * * * *", "duration_s": 604_801}},
        {"window": {"cron": "* * * *", "duration_s": 60}}, {"window": {"cron": "x" * 121, "duration_s": 60}},
        {"window": {"cron": "* * * * *", "duration_s": 60, "tz": ""}},
        {"window": {"cron": "* * * * *", "duration_s": 60, "day": 1}}, {"kind": "observe"}, {"sudo": True},
    ],
)  # fmt: skip
def test_a_job_that_is_none(fields: dict[str, Any]) -> None:
    refused(wire.JobDocument, job(**fields))


def test_lists_and_texts_are_bounded() -> None:
    base = LEAST[wire.JobDocument]
    assert len(read(wire.JobDocument, {**base, "cancel": [f"j{n}" for n in range(64)]}).cancel) == 64
    refused(wire.JobDocument, {**base, "cancel": [f"j{n}" for n in range(65)]})
    refused(wire.JobDocument, {**base, "cancel": ["a/b"]})
    error = {"code": "failed", "text": "x" * 2000}
    assert read(wire.JobState, {**LEAST[wire.JobState], "error": error}).error.text == "x" * 2000
    refused(wire.JobState, {**LEAST[wire.JobState], "error": {**error, "text": "x" * 2001}})
    keys = [{"name": f"k{n}", "public": KEY, "classes": ["observe"]} for n in range(33)]
    refused(wire.Enrolment, {**LEAST[wire.Enrolment], "keys": keys})
    refused(wire.Enrolment, {**LEAST[wire.Enrolment], "keys": []})
    refused(wire.Enrolment, {**LEAST[wire.Enrolment], "certificate": "x" * 16_385})
    refused(wire.Announcement, {**LEAST[wire.Announcement], "csr": "x" * 4097})
    for classes in ([], ["all"], ["observe"] * 4, "observe"):
        row = {"name": "k", "public": KEY, "classes": classes}
        refused(wire.Enrolment, {**LEAST[wire.Enrolment], "keys": [row]})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_nesting_is_bounded() -> None:
    """``args`` lies at depth 3 of a document."""
    read(wire.JobDocument, job(args={"x": nested(MAX_DEPTH - 3)}))
    refused(wire.JobDocument, job(args={"x": nested(MAX_DEPTH - 2)}))
    refused(wire.JobDocument, "[" * 100_000)
    refused(wire.JobDocument, '{"a":' * 50_000)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_is_no_number_is_not_taken_for_one(value: str) -> None:
    """Python's JSON and pydantic's would both take it, and nothing could write it down again."""
    text = json.dumps(job(args={"x": "HERE"})).replace('"HERE"', value)
    assert "numbers" in refused(wire.JobDocument, text)
    text = json.dumps(LEAST[wire.Desired] | {"config": {"telemetry": {"heat_s": "HERE"}}}).replace('"HERE"', value)
    assert "numbers" in refused(wire.Desired, text)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"1", b"[]", b"{", b"\xff{}", b"{}{}", b'{"a":"\\ud800"}', b'{"a":' + b"9" * 5000 + b"}",
     "{}".encode("utf-16"), b"\xef\xbb\xbf{}"],
)  # fmt: skip
def test_other_bytes(data: bytes) -> None:
    for kind in LEAST:
        refused(kind, data)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for kind in LEAST:
        refused(kind, data)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBER = st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_arguments_arrive_as_they_were_sent(args: dict[str, Any]) -> None:
    job_ = wire.Job(job_id="j1", seq=1, op="ping", kind="observe", args=args)
    message = wire.JobDocument(**ADDRESS, generation=1, job=job_)
    assert decode(message.encode(), wire.JobDocument).job.args == args


def test_messages_do_not_change() -> None:
    message = read(wire.Desired, LEAST[wire.Desired])
    with pytest.raises(ValidationError):
        message.version = 2


# The table of operations.


def test_what_destroys_needs_two_and_everything_else_one() -> None:
    assert SIGNATURES == {"observe": 1, "change": 1, "destroy": 2}
    assert [row.name for row in OPS.values() if row.kind == "destroy"] == ["model.remove"]
    assert {row.kind for row in OPS.values()} == set(CLASSES)


def test_questions_only_look_and_the_rescue_lane_is_for_what_helps() -> None:
    assert {row.name for row in OPS.values() if row.rpc and row.kind != "observe"} == set()
    rescue = {row.name for row in OPS.values() if row.lane == "rescue" and row.kind != "observe"}
    assert rescue == {"agent.restart", "device.reboot"}
    for row in OPS.values():
        assert row.job or row.rpc
        assert decode(json.dumps(job(op=row.name, **{"class": row.kind})).encode(), wire.JobDocument).job.op == row.name
