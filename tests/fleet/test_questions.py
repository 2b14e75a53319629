"""An operator asks a device that is online, or learns at once that it is not."""

from __future__ import annotations

from typing import Any

from agent.wire import messages as wire
from tests.fleet.conftest import Fleet
from tests.fleet.device import now
from tests.fleet.waiting import until


def test_a_question_is_answered(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.answers = lambda request: {"lines": ["one", "t\x1b[31mwo"], "op": request.op, "args": request.args}
    answer = fleet.ok("rpc", "logs.tail", "lines=2", "--device", "cam-1")
    assert answer["result"]["op"] == "logs.tail" and answer["result"]["args"] == {"lines": 2}
    plain = fleet.run("rpc", "logs.tail", "--device", "cam-1")
    assert plain.out == "one\nt\\x1b[31mwo\n"  # a log line never writes on the operator's terminal
    device.answers = lambda request: {"pong": True}
    assert "cam-1 answers after" in fleet.run("rpc", "ping", "--device", "cam-1").out


def test_states_that_were_lost_are_learnt_from_the_device_s_own_list(fleet: Fleet) -> None:
    """The broker lost them, or kept them for too short a time."""
    device = fleet.online("cam-1")
    device.plays = lambda job: ()
    jobs = [fleet.ok("job", "store.gc", "--device", "cam-1")["job"] for _ in range(2)]
    until(lambda: device.done, "the device has the first")
    rows = [
        {"job_id": jobs[0], "op": "store.gc", "state": "succeeded", "rev": 3, "attempt": 1, "at": now(), "phase": None},
        {"job_id": jobs[1], "op": "store.scrub", "state": "succeeded", "rev": 1, "at": now()},  # another's
        {"job_id": "made-up", "op": "store.gc", "state": "failed", "rev": 1, "attempt": 1, "at": now()},
        {"job_id": jobs[1], "op": "store.gc", "state": "done"}, 7, None, {},
    ]  # fmt: skip
    device.answers = lambda request: {"jobs": rows}
    listed = fleet.run("rpc", "jobs.list", "--device", "cam-1")
    assert listed.status == 0 and "JOB" in listed.out
    assert fleet.states(jobs[0]) == {"cam-1": "succeeded"} and fleet.states(jobs[1]) == {"cam-1": "sent"}
    device.say_state(device.done[0], "queued")  # an older one that comes late changes nothing
    assert fleet.states(jobs[0]) == {"cam-1": "succeeded"}


def test_an_archive_is_kept_where_it_was_asked_for(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.answers = lambda request: {"files": ["log.txt"], "archive": "aGVsbG8="}
    out = fleet.scratch / "d.tar.gz"
    assert fleet.run("rpc", "diagnostics.collect", "--device", "cam-1", "--out", str(out)).status == 0
    assert out.read_bytes() == b"hello" and out.stat().st_mode & 0o777 == 0o600
    device.answers = lambda request: {"archive": "%"}
    assert "the device sent none" in fleet.run("rpc", "diagnostics.collect", "--device", "cam-1", "-o", str(out)).err


def test_offline_is_told_at_once_for_each_way_of_being_offline(fleet: Fleet) -> None:
    never = fleet.enrolled("cam-0")
    assert "said nothing since its enrolment" in fleet.run("rpc", "ping", "--device", "cam-0").err
    fleet.connect(never)
    never.go_offline()
    clean = fleet.run("rpc", "ping", "--device", "cam-0", "--timeout", "10m")
    assert clean.status == 1 and "it is offline" in clean.err and "shut down" in clean.err
    torn = fleet.online("cam-1")
    torn.go_offline(clean=False)
    until(
        lambda: "lost" in fleet.run("rpc", "ping", "--device", "cam-1", "--timeout", "2s").err,
        "the broker has published the Will",
    )


def test_a_device_that_says_nothing_runs_into_the_timeout(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    device.answers = lambda request: None
    done = fleet.run("rpc", "ping", "--device", "cam-1", "--timeout", "1s")
    assert done.status == 1 and "no answer in time" in done.err


def test_a_question_is_asked_again_of_a_device_that_restarts_meanwhile(fleet: Fleet) -> None:
    device = fleet.online("cam-1")
    asked: list[str] = []

    def answer(request: wire.RpcRequest) -> dict[str, Any] | None:
        asked.append(request.boot_nonce)
        if len(asked) > 1:
            return {"pong": True}
        device.nonce = "ab" * 16
        device.connection.publish(device.topic("up/info"), device.seal(device.info()), retain=True, wait=False)
        return None

    device.answers = answer
    assert fleet.ok("rpc", "ping", "--device", "cam-1")["result"] == {"pong": True}
    assert len(asked) == 2 and asked[1] == "ab" * 16


def test_an_error_of_the_device_is_the_command_s(fleet: Fleet) -> None:
    device = fleet.online("cam-1")

    def refuse(request: wire.RpcRequest) -> None:
        message = wire.RpcAnswer(
            **device.address(), rpc_id=request.rpc_id, op=request.op, boot_nonce=device.nonce,
            error=wire.Failure(code="bad_args", text="lines must be 1 to 500", hint="fewer"),
        )  # fmt: skip
        device.connection.publish(device.topic("up/rpc"), device.seal(message), wait=False)

    device.answers = refuse  # type: ignore[assignment]
    done = fleet.run("rpc", "logs.tail", "lines=9999", "--device", "cam-1")
    assert done.status == 1 and "bad_args: lines must be 1 to 500" in done.err and "hint: fewer" in done.err
    assert fleet.run("rpc", "logs.tail", "--device", "cam-1", "--json").json["error"]["code"] == "bad_args"


def test_an_answer_that_another_device_signed_is_none(fleet: Fleet) -> None:
    device, liar = fleet.online("cam-1"), fleet.enrolled("cam-2")

    def lie(request: wire.RpcRequest) -> None:
        message = wire.RpcAnswer(
            **device.address(), rpc_id=request.rpc_id, op=request.op, boot_nonce=device.nonce, result={"pong": True}
        )
        device.connection.publish(device.topic("up/rpc"), liar.seal(message), wait=False)

    device.answers = lie  # type: ignore[assignment]
    assert "no answer in time" in fleet.run("rpc", "ping", "--device", "cam-1", "--timeout", "1s").err
    dropped = fleet.ok("devices", "show", "cam-1")["dropped"]
    assert [(row["what"], row["reason"], row["count"]) for row in dropped] == [("rpc", "unknown_key", 1)]
