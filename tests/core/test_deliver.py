"""``edge-agent deliver``: what core wants is brought from a folder, and the job that lies beside it is handed in."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.base.config import DeliveryConfig
from agent.cli import deliver_command
from agent.cli.device import main
from agent.core.incoming_api import IncomingApi
from agent.serve.access import CARRY, OPERATE
from agent.serve.admin import admin_server
from agent.serve.exchange import Request, Response, json_response
from agent.serve.routes import Route
from agent.serve.server import Server
from agent.trust.desk import Desk
from agent.trust.wants import DelayError, DeliveryError, Want
from tests.serve.running import Running
from tests.trust.waiter import Waiter, opened, want_for

DATA = os.urandom((2 << 20) + 5)


class Device:
    """Core's desk behind its rows, with jobs that end when ``work`` has come to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.desk = Desk()
        self.verdict: dict[str, str] = {"verdict": "accepted", "reason": ""}
        self.taken: list[bytes] = []
        self.job = {"job_id": "j1", "op": "model.install", "state": "running", "phase": "downloading", "error": None}
        self.work: Callable[[], None] = lambda: None

    def make(self) -> Server:
        self.api = IncomingApi(self.desk, DeliveryConfig)
        self.api.start()
        jobs = [
            Route(
                "GET", "/v1/jobs", OPERATE, lambda request: json_response({"jobs": [self.job] if self.taken else []})
            ),
            Route("GET", "/v1/jobs/{id}", OPERATE, lambda request: json_response(self.job)),
            Route("POST", "/v1/link/received", CARRY, self._received),
        ]
        return admin_server([*self.api.routes(), *jobs], link_uid=None)

    def _received(self, request: Request) -> Response:
        assert request.options() == {"topic": "dn/job"}
        self.taken.append(bytes(request.body))
        if self.verdict["verdict"] == "accepted":
            threading.Thread(target=self._run, daemon=True).start()
        return json_response(self.verdict)

    def _run(self) -> None:
        try:
            self.work()
            self.job["state"] = "succeeded"
        except (DelayError, DeliveryError) as error:
            self.job.update(state="failed", error={"code": error.code, "text": str(error)})

    def deliver(self, folder: Path, *more: str) -> int:
        return main(["--run-dir", str(self.folder), "deliver", str(folder), *more])


@pytest.fixture
def device(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(deliver_command, "_QUIET_S", 0.3)
    monkeypatch.setattr(deliver_command, "_POLL_S", 0.1)
    monkeypatch.setattr(deliver_command, "_OTHERS_S", 0.5)
    made = Device(short_dir)
    with Running(made.make, short_dir / "admin.sock") as running:
        yield made
        running.look(made.api.stop)


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    folder = tmp_path / "stick"
    (folder / "metadata").mkdir(parents=True)
    (folder / "targets" / "a b").mkdir(parents=True)
    (folder / "targets" / "a b" / "x").write_bytes(DATA)
    (folder / "metadata" / "timestamp.json").write_bytes(b"{}")
    return folder


def job_file(stick: Path) -> bytes:
    payload = base64.b64encode(json.dumps({"job": {"job_id": "j1"}}).encode()).decode()
    signature = {"keyid": "0" * 32, "sig": base64.b64encode(bytes(64)).decode()}
    envelope = {"payloadType": "application/x", "payload": payload, "signatures": [signature]}
    (stick / "job.json").write_text(json.dumps(envelope))
    return (stick / "job.json").read_bytes()


def test_a_job_and_all_that_it_wants(device: Device, stick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sealed, found = job_file(stick), []

    def work() -> None:
        found.append(device.desk.fetch(Want("w1", "metadata/timestamp.json", 100, 30.0)))
        with pytest.raises(DelayError) as none:
            device.desk.fetch(Want("w2", "metadata/2.root.json", 100, 30.0))
        found.append(none.value.code)
        device.desk.fetch_file(want_for(DATA, id="w3", path="targets/a%20b/x"), device.folder / "payload")

    device.work = work
    assert device.deliver(stick) == 0
    assert device.taken == [sealed] and found == [b"{}", "not_found"]
    assert (device.folder / "payload").read_bytes() == DATA
    out = capsys.readouterr().out
    assert "job j1 is accepted" in out and "2 files brought, 2.1 MB" in out and "job j1: succeeded" in out


def test_without_a_job_it_ends_when_nothing_is_wanted_any_more(device: Device, stick: Path) -> None:
    waiter = Waiter(device.desk, want_for(DATA, path="targets/a%20b/x"), device.folder / "payload")
    assert device.deliver(stick) == 0
    assert waiter.end() is None and (device.folder / "payload").read_bytes() == DATA


def test_it_goes_on_where_the_last_stick_ended(device: Device, stick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (device.folder / "payload").write_bytes(DATA[: 1 << 20])
    waiter = Waiter(device.desk, want_for(DATA, path="targets/a%20b/x"), device.folder / "payload")
    assert device.deliver(stick, "--json") == 0
    assert waiter.end() is None
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["bytes"] == len(DATA) - (1 << 20) and report["files"] == ["targets/a%20b/x"] and report["job"] is None


def test_a_file_that_is_damaged_is_refused_and_told(
    device: Device, stick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stick / "targets" / "a b" / "x").write_bytes(b"X" + DATA[1:])
    waiter = Waiter(device.desk, want_for(DATA, path="targets/a%20b/x"), device.folder / "payload")
    assert device.deliver(stick) == 1
    error = waiter.end()
    assert isinstance(error, DeliveryError) and error.code == "wrong_content"
    assert "targets/a%20b/x is refused" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 5, 1 << 20, 2 << 20])
def test_a_file_that_was_cut_off_is_told(
    device: Device, stick: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    (stick / "targets" / "a b" / "x").write_bytes(DATA[:size])
    waiter = Waiter(device.desk, want_for(DATA, path="targets/a%20b/x"), device.folder / "payload")
    assert device.deliver(stick) == 1
    error = waiter.end()
    assert isinstance(error, DelayError) and error.code == "not_found"
    assert f"has {size} of {len(DATA)} bytes" in capsys.readouterr().out
    assert (device.folder / "payload").read_bytes() == DATA[:size], "what came stays for the next stick"


def test_what_is_not_on_the_stick_is_left_to_the_link(device: Device, stick: Path) -> None:
    waiter = Waiter(device.desk, want_for(DATA, path="targets/elsewhere"), device.folder / "payload")
    ended: list[int] = []
    delivering = threading.Thread(target=lambda: ended.append(device.deliver(stick)))
    delivering.start()
    opened(device.desk)
    for offset in range(0, len(DATA), 1 << 18):
        device.desk.put("w1", offset, [DATA[offset : offset + (1 << 18)]])
        assert offset + (1 << 18) >= len(DATA) or not waiter.end_within(0.1), waiter.error
    assert waiter.end() is None
    delivering.join(30)
    assert ended == [0]


def test_a_job_that_is_refused_ends_it(device: Device, stick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_file(stick)
    device.verdict = {"verdict": "refused", "reason": "wrong_device"}
    assert device.deliver(stick) == 1
    assert "wrong_device" in capsys.readouterr().err


def test_a_job_that_fails_is_a_failure(device: Device, stick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_file(stick)
    device.work = lambda: device.desk.fetch_file(want_for(DATA, path="targets/missing"), device.folder / "payload")
    assert device.deliver(stick) == 1
    assert "job j1: failed" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"x" * 70_000, b"\xff"])
def test_what_is_no_job_is_not_handed_in(
    device: Device, stick: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (stick / "job.json").write_bytes(content)
    assert device.deliver(stick) == 1
    assert device.taken == [] and "job.json" in capsys.readouterr().err


def test_a_folder_that_is_none_is_told(device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device.deliver(tmp_path / "nothing") == 1
    assert "metadata" in capsys.readouterr().err


def test_without_a_core_it_says_so(short_dir: Path, stick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run-dir", str(short_dir), "deliver", str(stick)]) == 1
    assert capsys.readouterr().err.startswith("error: cannot")
