"""Blocks for devices, as they ask: nothing but the repository, in turns, no faster than allowed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import ConfigError
from agent.fleet.broker import Received
from agent.fleet.giving import Given, Giver
from agent.wire.blocks import BLOCK_BYTES, Question, parse_block

UP = "eda/1/acme/{}/up/blk"
FILE = os.urandom(BLOCK_BYTES * 3 + 17)


class Wire:
    """What went out."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.connected = True

    def receive(self, timeout_s: float) -> list[Received]:
        return []

    def send(self, topic: str, payload: bytes) -> bool:
        if self.connected:
            self.sent.append((topic, payload))
        return self.connected


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "metadata").mkdir(parents=True)
    (folder / "targets" / "models").mkdir(parents=True)
    (folder / "metadata" / "timestamp.json").write_bytes(b"{}")
    (folder / "targets" / "models" / "a b").write_bytes(FILE)
    (folder / "lock").write_bytes(b"private")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


def giver_of(folder: Path, wire: Wire, **options: object) -> Giver:
    return Giver(folder, "acme", wire, **options)  # type: ignore[arg-type]


def ask(giver: Giver, path: str, offset: int = 0, count: int = 1, device: str = "cam-1", xfer: str = "x1") -> None:
    giver.hear(UP.format(device), Question(xfer, path, offset, count).encode())


def all_of(giver: Giver) -> None:
    for _ in range(300):
        giver.give()


def test_a_file_goes_out_in_blocks_at_their_places(repository: Path) -> None:
    wire, told = Wire(), []
    giver = giver_of(repository, wire, told=told.append)
    ask(giver, "targets/models/a%20b", count=8)
    all_of(giver)
    blocks = [parse_block(payload) for _, payload in wire.sent]
    assert {topic for topic, _ in wire.sent} == {"eda/1/acme/cam-1/dn/blk/x1"}
    assert b"".join(block.data for block in blocks) == FILE and {block.total for block in blocks} == {len(FILE)}
    assert [block.offset for block in blocks] == [n * BLOCK_BYTES for n in range(4)]
    assert told[-1] == Given("cam-1", "targets/models/a%20b", 3 * BLOCK_BYTES, 17, len(FILE))
    assert all(len(payload) < 64 << 10 for _, payload in wire.sent)


def test_an_offset_in_the_middle_is_kept(repository: Path) -> None:
    wire = Wire()
    giver = giver_of(repository, wire)
    ask(giver, "targets/models/a%20b", offset=1234, count=2)
    all_of(giver)
    assert b"".join(parse_block(payload).data for _, payload in wire.sent) == FILE[1234 : 1234 + 2 * BLOCK_BYTES]


@pytest.mark.parametrize(
    "path",
    [
        "lock", "../secret", "targets/../../secret", "targets/%2e%2e/%2e%2e/secret", "targets/..%2f..%2fsecret",
        "/etc/passwd", "targets//etc/passwd", "targets/models", "metadata", "targets/./models/a b", "targets/\0",
        "targets/%00", "targets/%ff", "targets/out", "targets/outside/secret", "targets/circle", "targets/pipe",
        "targets/" + "x" * 1000, "metadata/2.root.json", "targets/models/a b/x",
    ],
)  # fmt: skip
def test_nothing_else_is_read(repository: Path, tmp_path: Path, path: str) -> None:
    (repository / "targets" / "out").symlink_to(tmp_path / "secret")
    (repository / "targets" / "outside").symlink_to(tmp_path)
    (repository / "targets" / "circle").symlink_to(repository / "targets" / "circle")
    os.mkfifo(repository / "targets" / "pipe")
    wire = Wire()
    giver = giver_of(repository, wire)
    ask(giver, path)
    all_of(giver)
    (answer,) = [parse_block(payload) for _, payload in wire.sent]
    assert answer.trouble == "not_found" and not answer.data


def test_devices_take_turns(repository: Path) -> None:
    wire = Wire()
    giver = giver_of(repository, wire)
    ask(giver, "targets/models/a%20b", count=4)
    ask(giver, "metadata/timestamp.json", device="cam-2", xfer="y")
    ask(giver, "targets/models/a%20b", count=2, device="cam-3")
    all_of(giver)
    order = [topic.split("/")[3] for topic, _ in wire.sent]
    assert order == ["cam-1", "cam-2", "cam-3", "cam-1", "cam-3", "cam-1", "cam-1"]


def test_what_is_asked_for_twice_goes_out_once(repository: Path) -> None:
    wire = Wire()
    giver = giver_of(repository, wire)
    for _ in range(3):
        ask(giver, "targets/models/a%20b", count=3)
    all_of(giver)
    assert len(wire.sent) == 3
    ask(giver, "targets/models/a%20b", count=1)
    all_of(giver)
    assert len(wire.sent) == 4, "what was lost on the way is given again"


def test_who_asks_for_too_much_is_told_and_nobody_else_waits(repository: Path) -> None:
    wire = Wire()
    giver = giver_of(repository, wire)
    for n in range(100):
        ask(giver, "targets/models/a%20b", count=16, xfer=f"x{n}")
    told = [parse_block(payload).trouble for _, payload in wire.sent]
    assert told == ["busy"] * 96
    ask(giver, "metadata/timestamp.json", device="cam-2")
    giver.give()
    giver.give()
    assert wire.sent[-1][0].split("/")[3] == "cam-2"


def test_the_rate_holds_for_all_together(repository: Path) -> None:
    wire, clock = Wire(), [100.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    giver = giver_of(repository, wire, bytes_per_s=BLOCK_BYTES / 2, monotonic=lambda: clock[0], sleep=sleep)
    ask(giver, "targets/models/a%20b", count=2)
    ask(giver, "targets/models/a%20b", count=2, device="cam-2")
    all_of(giver)
    assert len(wire.sent) == 4 and clock[0] == 106.0


@given(
    payload=st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=8), st.integers() | st.text()).map(lambda made: json.dumps(made).encode())
)
def test_nonsense_is_passed_over(tmp_path_factory: pytest.TempPathFactory, payload: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "nonsense"
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    wire = Wire()
    giver = giver_of(folder, wire)
    for topic in (UP.format("cam-1"), "eda/1/other/cam-1/up/blk", "eda/1/acme/claim/x/up/blk", "eda/1/acme/x/up/job/j"):
        giver.hear(topic, payload)
    giver.give()
    assert wire.sent == []


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metadata"):
        giver_of(tmp_path, Wire())


def test_without_a_broker_blocks_are_lost_and_asked_for_again(repository: Path) -> None:
    wire, told = Wire(), []
    giver = giver_of(repository, wire, told=told.append)
    wire.connected = False
    ask(giver, "metadata/timestamp.json")
    all_of(giver)
    assert told == []
    wire.connected = True
    ask(giver, "metadata/timestamp.json")
    all_of(giver)
    assert len(told) == 1
