"""Blocks through the broker: lost ones, wrong ones and none, with the giver of ``edge-fleet`` at the other end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.fleet.broker import Received
from agent.fleet.giving import Giver
from agent.link.connection import LOST
from agent.trust.wants import DelayError, Want
from agent.wire.blocks import BLOCK_BYTES, Block, parse_block, parse_question
from tests.link.broker import until
from tests.link.errands import Site
from tests.link.mirror_server import Mirror
from tests.trust.waiter import Waiter, want_for

DATA = os.urandom(BLOCK_BYTES * 21 + 5)
UP = "eda/1/acme/d1/up/blk"


class Air:
    """The way there and back, without a broker: what ``spoil`` gives in place of a block arrives."""

    def __init__(self, folder: Path) -> None:
        self.code = 0
        self.spoil: Callable[[bytes], list[bytes]] = lambda payload: [payload]
        self.asked: list[bytes] = []
        self.given = 0
        self.most_waiting = 0
        self._lock = threading.Lock()
        self._over = False
        self._giver = Giver(folder, "acme", self)
        self.site: Site

    def say(self, topic: str, payload: bytes) -> int:
        assert topic == "up/blk"
        if self.code == 0:
            threading.Thread(target=self._answer, args=(payload,), daemon=True).start()
        return self.code

    def _answer(self, payload: bytes) -> None:
        with self._lock:
            if self._over:
                return
            self.asked.append(payload)
            self._giver.hear(UP, payload)
            while self._giver.waiting:
                self._giver.give()

    def end(self) -> None:
        """Nothing arrives any more."""
        with self._lock:
            self._over = True

    def receive(self, timeout_s: float) -> list[Received]:
        return []

    def send(self, topic: str, payload: bytes) -> bool:
        self.given += 1
        for spoiled in self.spoil(payload):
            self.site.block(topic.rpartition("/")[2], spoiled)
        return True


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "metadata").mkdir(parents=True)
    (tmp_path / "repository" / "targets").mkdir()
    (tmp_path / "repository" / "targets" / "x").write_bytes(DATA)
    (tmp_path / "repository" / "metadata" / "timestamp.json").write_bytes(b"{}")
    (tmp_path / "repository" / "metadata" / "empty.json").write_bytes(b"")
    return tmp_path / "repository"


@pytest.fixture
def air(short_dir: Path, repository: Path) -> Iterator[Air]:
    made = Air(repository)
    with Site(short_dir, made.say, longest_s=0.5) as site:
        made.site = site
        yield made
        made.end()


def fetch(air: Air, folder: Path, **changed: object) -> BaseException | None:
    return Waiter(air.site.desk, want_for(DATA, **changed), folder / "payload").end()


def test_a_payload_comes_whole_and_once(air: Air, tmp_path: Path) -> None:
    assert fetch(air, tmp_path) is None
    assert (tmp_path / "payload").read_bytes() == DATA and air.given == 22
    questions = [parse_question(payload) for payload in air.asked]
    assert len({question.xfer for question in questions}) == 1
    assert len(questions) <= 8, "a question asks for several"


def test_it_goes_on_where_it_was(air: Air, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(DATA[:123_456])
    assert fetch(air, tmp_path) is None
    assert (tmp_path / "payload").read_bytes() == DATA
    assert min(parse_question(payload).offset for payload in air.asked) == 123_456


def test_metadata_comes_though_nobody_knows_its_length(air: Air) -> None:
    for number, (name, content) in enumerate((("timestamp", b"{}"), ("empty", b""))):
        waiter = Waiter(air.site.desk, Want(f"w{number}", f"metadata/{name}.json", 1 << 20, 20.0))
        assert waiter.end() is None and waiter.data == content


def test_what_is_lost_is_asked_for_again(air: Air, tmp_path: Path) -> None:
    lost = iter([True, False, False, False, False, True, True, False, False] * 20)
    air.spoil = lambda payload: [] if next(lost) else [payload]
    assert fetch(air, tmp_path) is None
    assert (tmp_path / "payload").read_bytes() == DATA


def test_order_and_repetition_do_no_harm(air: Air, tmp_path: Path) -> None:
    held: list[bytes] = []

    def shuffle(payload: bytes) -> list[bytes]:
        held.append(payload)
        if len(held) < 3:
            return []
        out, held[:] = [*reversed(held), held[0], b"garbage", b'{"offset": -1}\n'], []
        return out

    air.spoil = shuffle
    assert fetch(air, tmp_path) is None
    assert (tmp_path / "payload").read_bytes() == DATA


def test_a_file_that_is_not_there_is_told_at_once(air: Air, tmp_path: Path) -> None:
    error = fetch(air, tmp_path, path="targets/y")
    assert isinstance(error, DelayError) and error.code == "not_found"


@pytest.mark.parametrize("code", [LOST, 0x10, 0x87], ids=["no-connection", "nobody-listens", "refused"])
def test_where_nobody_answers_core_is_told(air: Air, tmp_path: Path, code: int) -> None:
    air.code = code
    error = fetch(air, tmp_path)
    assert isinstance(error, DelayError) and error.code == "unreachable"


def test_silence_is_told_too(air: Air, tmp_path: Path) -> None:
    air.spoil = lambda payload: []
    error = fetch(air, tmp_path)
    assert isinstance(error, DelayError) and error.code == "unreachable"


@pytest.mark.parametrize(
    "lie",
    [
        lambda block: Block(block.offset, block.total + 1, block.data),
        lambda block: Block(block.offset, block.total, block.data[:-1]),
        lambda block: Block(block.offset, block.total, b""),
        lambda block: Block(0, 0, b"", "busy"),
    ],
    ids=["another-length", "a-byte-less", "nothing", "busy"],
)
def test_whoever_gives_wrong_blocks_delays(air: Air, tmp_path: Path, lie: Callable[[Block], Block]) -> None:
    air.spoil = lambda payload: [lie(parse_block(payload)).encode()]
    error = fetch(air, tmp_path)
    assert isinstance(error, DelayError) and error.code == "unreachable"


def test_blocks_are_for_when_no_mirror_answers(air: Air, tmp_path: Path, repository: Path) -> None:
    with Mirror({"targets/y": b"abc"}) as mirror:
        air.site.change(mirrors=[mirror.base])
        assert Waiter(air.site.desk, want_for(b"abc", path="targets/y"), tmp_path / "y").end() is None
        error = fetch(air, tmp_path, id="w2")
        assert isinstance(error, DelayError) and error.code == "not_found", (
            "the mirror does not have it, and it answers"
        )
        assert air.asked == []
        mirror.always = lambda exchange: exchange.head(503, Content_Length=0)
        assert fetch(air, tmp_path, id="w3") is None
        assert (tmp_path / "payload").read_bytes() == DATA


def test_what_comes_for_nobody_is_dropped(air: Air) -> None:
    air.site.block("x" * 16, Block(0, 10, b"0123456789").encode())
    until(lambda: air.site.desk.open_wants() == (), "nothing happens")
