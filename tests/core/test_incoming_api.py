"""What is wanted, told on the administration socket, and the bytes that come by it: every answer that link may get."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.base.config import DeliveryConfig
from agent.core.incoming_api import IncomingApi
from agent.serve.admin import admin_server
from agent.serve.server import Server
from agent.trust.desk import Desk
from agent.trust.wants import DelayError, DeliveryError, Want
from tests.serve.running import Running
from tests.trust.waiter import Waiter, opened, want_for

DATA = os.urandom(3 << 20)


class Side:
    """A desk behind its rows."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "admin.sock"
        self.desk = Desk()
        self.config = DeliveryConfig(mirrors=("https://m.example/fleet",), rate_kib_s=5)

    def make(self) -> Server:
        self.api = IncomingApi(self.desk, lambda: self.config)
        self.api.start()
        return admin_server(self.api.routes(), link_uid=None)

    def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
        connection = http.client.HTTPConnection("core", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(str(self.path))
        try:
            connection.request(method, target, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def wants(self, known: object = "", wait_s: float = 0) -> dict[str, Any]:
        status, document = self.ask("GET", f"/v1/link/wants?known={known}&wait_s={wait_s}")
        assert status == 200
        return document

    def put(self, offset: object, data: bytes, want: str = "w1", more: str = "") -> tuple[int, Any]:
        return self.ask("PUT", f"/v1/incoming/{want}?offset={offset}{more}", data)


@pytest.fixture
def side(short_dir: Path) -> Iterator[Side]:
    made = Side(short_dir)
    with Running(made.make, made.path) as running:
        made.running = running  # type: ignore[attr-defined]
        yield made
        running.look(made.api.stop)


def test_a_want_is_told_with_where_to_fetch_it(side: Side, tmp_path: Path) -> None:
    before = side.wants()
    assert before["wants"] == [] and before["mirrors"] == ["https://m.example/fleet"]
    assert (before["rate_kib_s"], before["blocks"], before["ca_file"]) == (5, True, "")
    (tmp_path / "payload").write_bytes(DATA[:1000])
    waiter = Waiter(side.desk, want_for(DATA), tmp_path / "payload")
    listing = side.wants(before["version"], 20)
    (row,) = listing["wants"]
    assert listing["version"] != before["version"]
    assert row == {
        "id": "w1", "path": "targets/x", "most": len(DATA), "within_s": 30.0, "length": len(DATA),
        "sha256": want_for(DATA).sha256, "offset": 1000,
    }  # fmt: skip
    assert side.put(1000, DATA[1000 : 1000 + (1 << 20)]) == (200, {"offset": 1000 + (1 << 20), "done": False})
    again = side.wants()
    assert again["version"] == listing["version"] and again["wants"][0]["offset"] == 1000 + (1 << 20)
    offset = 1000 + (1 << 20)
    while offset < len(DATA):
        status, answer = side.put(offset, DATA[offset : offset + (1 << 20)])
        assert status == 200
        offset = answer["offset"]
    assert answer == {"offset": len(DATA), "done": True} and waiter.end() is None
    assert (tmp_path / "payload").read_bytes() == DATA
    assert side.wants(listing["version"], 20)["wants"] == []
    assert side.put(0, b"x")[0] == 404


def test_what_is_small_has_its_end_told(side: Side) -> None:
    waiter = Waiter(side.desk, Want("w1", "metadata/timestamp.json", 100, 30.0))
    opened(side.desk)
    assert side.put(0, b"one") == (200, {"offset": 3, "done": False})
    assert side.put(0, b"two") == (200, {"offset": 3, "done": False}), "each try is one from the beginning"
    assert side.put(3, b"", more="&end=1") == (200, {"offset": 3, "done": True})
    assert waiter.end() is None and waiter.data == b"two"


def test_bytes_for_another_place_are_told_where_they_belong(side: Side, tmp_path: Path) -> None:
    waiter = Waiter(side.desk, want_for(DATA), tmp_path / "payload")
    opened(side.desk)
    side.put(0, DATA[:100])
    for offset in (0, 99, 101, 10**14):
        status, answer = side.put(offset, b"x" * 10)
        assert (status, answer["offset"]) == (409, 100)
    side.desk.stop()
    assert isinstance(waiter.end(), DelayError)


@pytest.mark.parametrize("offset", ["", "-1", "x", "1.5", "1" * 16, "%D9%A3"])
def test_an_offset_that_is_none_is_refused(side: Side, offset: str) -> None:
    assert side.put(offset, b"x")[0] == 400
    assert side.ask("PUT", "/v1/incoming/w1", b"x")[0] == 400


def test_more_than_a_piece_is_not_taken_at_once(side: Side, tmp_path: Path) -> None:
    waiter = Waiter(side.desk, want_for(DATA), tmp_path / "payload")
    opened(side.desk)
    assert side.put(0, DATA[: (1 << 20) + 1])[0] == 413
    assert opened(side.desk).offset == 0
    side.desk.stop()
    waiter.end()


@pytest.mark.parametrize(("data", "code"), [(b"abcd", "too_long"), (b"abX", "wrong_content")])
def test_a_refusal_says_its_reason_to_both(side: Side, tmp_path: Path, data: bytes, code: str) -> None:
    waiter = Waiter(side.desk, want_for(b"abc"), tmp_path / "payload")
    opened(side.desk)
    status, answer = side.put(0, data)
    error = waiter.end()
    assert (status, answer["code"]) == (403, code) and isinstance(error, DeliveryError) and error.code == code


@pytest.mark.parametrize("code", ["not_found", "unreachable", "too_slow"])
def test_a_word_ends_a_want(side: Side, code: str) -> None:
    waiter = Waiter(side.desk, Want("w1", "x", 100, 30.0))
    opened(side.desk)
    assert side.ask("POST", "/v1/incoming/w1/failed", json.dumps({"code": code, "text": "x" * 2000}).encode())[0] == 200
    error = waiter.end()
    assert isinstance(error, DelayError) and error.code == code and len(str(error)) < 600
    assert side.ask("POST", "/v1/incoming/w1/failed", json.dumps({"code": code, "text": ""}).encode())[0] == 404


@pytest.mark.parametrize(
    "document",
    [{}, {"code": "stopped", "text": ""}, {"code": "not_found"}, {"code": ["not_found"], "text": ""}, {"code": 1}],
)
def test_a_word_that_is_none_ends_nothing(side: Side, document: dict[str, Any]) -> None:
    waiter = Waiter(side.desk, Want("w1", "x", 100, 30.0))
    opened(side.desk)
    assert side.ask("POST", "/v1/incoming/w1/failed", json.dumps(document).encode())[0] == 400
    assert opened(side.desk).id == "w1"
    side.desk.stop()
    waiter.end()


def test_another_configuration_wakes_who_waits(side: Side) -> None:
    known, found = side.wants()["version"], []
    asking = threading.Thread(target=lambda: found.append(side.wants(known, 30)))
    asking.start()
    side.config = DeliveryConfig(mirrors=("https://other.example",), blocks=False)
    side.running.look(side.api.wake)  # type: ignore[attr-defined]
    asking.join(30)
    assert found[0]["mirrors"] == ["https://other.example"] and found[0]["version"] != known


def test_the_number_of_an_earlier_start_keeps_nobody_waiting(side: Side, short_dir: Path) -> None:
    other = Side(short_dir / "other")
    other.path.parent.mkdir()
    with Running(other.make, other.path) as running:
        assert other.wants(side.wants()["version"], 30)["version"] != side.wants()["version"]
        running.look(other.api.stop)


def test_a_stop_ends_all_waiting(side: Side, tmp_path: Path) -> None:
    waiter = Waiter(side.desk, want_for(DATA), tmp_path / "payload")
    opened(side.desk)
    known, found = side.wants()["version"], []
    asking = threading.Thread(target=lambda: found.append(side.wants(known, 60)))
    asking.start()
    side.running.look(side.api.stop)  # type: ignore[attr-defined]
    asking.join(30)
    error = waiter.end()
    assert found and isinstance(error, DelayError) and error.code == "stopped"
