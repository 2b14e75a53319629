"""Telemetry on disk: in order, bounded, counted; through kills, damage and a full disk."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.link.outbox import MAX_MESSAGE_BYTES, Batch, Outbox
from tests.link.broker import ROOT

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: what SQLite flushes tens of thousands of times takes minutes on a slow disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ea-outbox-", dir=memory) as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    subject = Outbox(path, MIB)
    subject.open()
    yield subject
    subject.close()


def content(batch: Batch | None) -> dict[str, Any]:
    assert batch is not None
    found: dict[str, Any] = json.loads(batch.payload)
    assert (found["v"], found["seq"], found["stream"]) == (1, batch.seq, batch.stream)
    return found


def drain(outbox: Outbox, most: int = 10_000) -> list[dict[str, Any]]:
    """Everything, as a collector gets it."""
    messages = []
    while (batch := outbox.next_batch(())) is not None and len(messages) < most:
        messages.append(content(batch))
        outbox.delivered(batch)
    return messages


def numbers(messages: list[dict[str, Any]]) -> list[int]:
    return [record["n"] for message in messages for record in message["records"]]


def test_records_of_a_stream_travel_together_and_in_order(outbox: Outbox) -> None:
    outbox.add([("heat", {"n": 1}), ("memory", {"n": 2}), ("heat", {"n": 3})])
    first, second = drain(outbox)
    assert (first["stream"], first["seq"], [record["n"] for record in first["records"]]) == ("heat", 1, [1, 3])
    assert (second["stream"], second["seq"], [record["n"] for record in second["records"]]) == ("memory", 2, [2])
    assert first["outbox"] == second["outbox"] == outbox.id
    assert outbox.counts().records == outbox.counts().bytes == 0


def test_no_message_is_larger_than_64_kib(outbox: Outbox) -> None:
    outbox.add([("models", {"n": n, "text": "ä" * 300}) for n in range(400)])
    sizes = []
    while (batch := outbox.next_batch(())) is not None:
        sizes.append(len(batch.payload))
        outbox.delivered(batch)
    assert len(sizes) > 5
    assert max(sizes) <= MAX_MESSAGE_BYTES
    assert min(sizes[:-1]) > MAX_MESSAGE_BYTES - 4096, "full, but for the last"


def test_a_record_that_no_message_could_hold_is_counted_as_dropped(outbox: Outbox) -> None:
    outbox.add([("heat", {"n": 1}), ("heat", {"text": "x" * MAX_MESSAGE_BYTES})])
    (message,) = drain(outbox)
    assert (message["dropped"], numbers([message])) == (1, [1])


def test_a_message_is_the_same_until_it_is_confirmed(outbox: Outbox, path: Path) -> None:
    outbox.add([("heat", {"n": 1})])
    sent = outbox.next_batch(())
    outbox.add([("heat", {"n": 2})])
    outbox.close()
    again = Outbox(path, MIB)
    found = again.next_batch(())
    assert found == sent, "number and content, after a restart too"
    other = again.next_batch([sent])
    assert numbers([content(other)]) == [2]
    again.close()


def test_what_was_handed_over_twice_is_stored_once(outbox: Outbox, path: Path) -> None:
    records = [("heat", {"n": n, "up_s": n / 7}) for n in range(5)]
    outbox.add(records)
    outbox.close()
    again = Outbox(path, MIB)
    again.add([*records, ("heat", {"n": 5, "up_s": 1.0})])
    assert sorted(numbers(drain(again))) == [0, 1, 2, 3, 4, 5]
    again.close()


def test_after_an_outage_what_is_live_comes_first(outbox: Outbox) -> None:
    outbox.add([("heat", {"n": n}) for n in range(1000)])
    begun = outbox.next_batch(())
    outbox.mark_backlog()
    outbox.add([("heat", {"n": 5000}), ("status", {"n": 5001})])
    order = []
    flying: list[Batch] = []
    while (batch := outbox.next_batch(flying)) is not None:
        flying.append(batch)
        order.append(numbers([content(batch)]))
    assert order[:2] == [[5000], [5001]]
    assert content(flying[2])["seq"] == begun.seq, "then what had begun"
    assert [number for numbers_ in order[2:] for number in numbers_] == list(range(1000))


def test_a_week_offline_stays_within_the_cap_and_counts_what_it_drops(outbox: Outbox, path: Path) -> None:
    """Five streams a minute, one of them talkative; 1 MiB is a day and a half of it."""
    said: Counter[str] = Counter()
    largest = 0
    for minute in range(7 * 24 * 60):
        records = []
        for stream, size in (("status", 40), ("heat", 60), ("memory", 60), ("health", 30), ("models", 500)):
            if stream != "health" or minute % 30 == 0:
                said[stream] += 1
                records.append((stream, {"n": said[stream], "minute": minute, "pad": "x" * size}))
        outbox.add(records)
        if minute % 1000 == 0:
            largest = max(largest, sum(file.stat().st_size for file in path.parent.iterdir()))
    held = outbox.counts()
    assert held.bytes <= MIB
    assert held.bytes >= 0.9 * MIB, "no more is dropped than needed"
    assert largest <= 1.2 * MIB + 600_000, "the files, with all that SQLite adds, and its log"
    assert held.records + held.dropped == said.total()
    outbox.mark_backlog()
    outbox.add([("status", {"n": 0, "minute": "now"})])
    messages = drain(outbox)
    assert messages[0]["records"][0]["minute"] == "now"
    for stream in said:
        mine = [message for message in messages if message["stream"] == stream]
        got = [record["n"] for message in mine for record in message["records"] if record["minute"] != "now"]
        dropped = sum(message["dropped"] for message in mine)
        assert got == list(range(dropped + 1, said[stream] + 1)), "the oldest are gone, none in between"
    assert [message["seq"] for message in messages] == list(range(1, len(messages) + 1))
    by_stream = {stream: sum(m["dropped"] for m in messages if m["stream"] == stream) for stream in said}
    assert by_stream["models"] > 0
    assert by_stream["health"] == 0, "the talkative stream pays, not the quiet one"


def test_a_smaller_cap_holds_at_once(outbox: Outbox) -> None:
    outbox.add([("heat", {"n": n, "pad": "x" * 500}) for n in range(1500)])
    outbox.resize(100_000)
    assert outbox.counts().bytes <= 100_000
    messages = drain(outbox)
    assert messages[0]["dropped"] + len(numbers(messages)) == 1500


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"this was never a database\n" * 200,
        lambda data: data[: len(data) // 2],
        lambda data: data[:100] + bytes(len(data) - 100),
        lambda data: data[:4096] + os.urandom(len(data) - 4096),
        lambda data: b"",
    ],
    ids=["other", "cut", "zeroed", "noise", "empty"],
)
def test_a_damaged_outbox_is_put_aside_and_a_new_one_begun(outbox: Outbox, path: Path, damage, caplog) -> None:
    outbox.add([("heat", {"n": n, "pad": "x" * 200}) for n in range(500)])
    name = outbox.id
    outbox.close()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    again = Outbox(path, MIB)
    again.add([("heat", {"n": 7})])
    assert 7 in numbers(drain(again))
    assert again.id != name, "its numbers begin anew, so its name must too"
    if damaged:
        assert "the outbox is damaged" in caplog.text
        assert path.with_name("outbox.db.damaged").read_bytes() == damaged
    again.close()


def test_damage_that_shows_in_the_middle_of_the_work_is_borne(outbox: Outbox, path: Path, caplog) -> None:
    outbox.add([("heat", {"n": n, "pad": "x" * 200}) for n in range(2000)])
    first = outbox.next_batch(())
    outbox._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    outbox._database.execute("PRAGMA shrink_memory")
    for n in range(3000, 3100):
        outbox.add([("heat", {"n": n})])
        outbox.next_batch(())
    assert "the outbox is damaged" in caplog.text
    kept = numbers(drain(outbox))
    assert kept[-1] == 3099
    outbox.add([("heat", {"n": 9})])
    ours = outbox.next_batch(())
    outbox.delivered(first)
    assert outbox.next_batch(()) == ours, "a confirmation for the old outbox means nothing to the new one"


def test_a_folder_that_takes_no_file_leaves_the_outbox_in_memory(tmp_path: Path, caplog) -> None:
    nowhere = Outbox(tmp_path / "missing" / "outbox.db", MIB)
    nowhere.add([("heat", {"n": 1})])
    assert numbers(drain(nowhere)) == [1]
    nowhere.close()
    assert "kept in memory" in caplog.text


def test_a_full_disk_drops_and_counts_and_heals(outbox: Outbox) -> None:
    outbox.add([("heat", {"n": n, "pad": "x" * 200}) for n in range(100)])
    begun = outbox.next_batch(())
    (pages,) = outbox._database.execute("PRAGMA page_count").fetchone()
    outbox._database.execute(f"PRAGMA max_page_count={pages}")  # what SQLite says to a full disk
    for n in range(100, 400):
        outbox.add([("heat", {"n": n, "pad": "x" * 200})])
    lost = outbox.counts().dropped
    assert lost > 0
    outbox.delivered(begun)
    assert outbox.next_batch(()) != begun
    outbox._database.execute("PRAGMA max_page_count=1000000")
    outbox.add([("heat", {"n": 1000})])
    messages = [content(begun), *drain(outbox)]
    assert outbox.counts().dropped == lost == sum(message["dropped"] for message in messages)
    assert len(numbers(messages)) + lost == 401


# -- kills ------------------------------------------------------------------------------------------------------------

_WRITER = """
import json
import sys
from pathlib import Path
from agent.link.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]), 1 << 20)
number = int(sys.argv[2])
while True:
    outbox.add([("heat", {"n": number, "pad": "x" * 300}), ("memory", {"n": number})])
    print(number, flush=True)
    number += 1
    if number % 3 == 0:
        batch = outbox.next_batch(())
        heat = [record["n"] for record in json.loads(batch.payload)["records"]] if batch.stream == "heat" else []
        print("sent", batch.seq, *heat, flush=True)
        outbox.delivered(batch)
"""


def test_nothing_is_lost_or_half_stored_by_sigkill(path: Path) -> None:
    chance = random.Random(5)
    next_number = 0
    told: set[int] = set()
    sent: set[int] = set()
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(next_number)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(chance.randrange(2, 40))]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        for words in (line.split() for line in lines if line.strip()):
            if words[0] == "sent":
                sent |= {int(number) for number in words[2:]}
            else:
                told.add(int(words[0]))
        next_number = max(told) + 2  # the one after the last told may have been stored too
    outbox = Outbox(path, MIB)
    messages = drain(outbox)
    outbox.close()
    seqs = [message["seq"] for message in messages]
    assert len(seqs) == len(set(seqs)), "no number twice"
    heat = [record["n"] for m in messages if m["stream"] == "heat" for record in m["records"]]
    assert len(heat) == len(set(heat)), "no record twice"
    assert told <= {*heat, *sent}, "what was told as stored is there, or was sent"
    assert sum(message["dropped"] for message in messages) == 0


class Rules(RuleBasedStateMachine):
    """Against a list in memory: nothing lost but what is counted, nothing twice, each number one content for good."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(os.environ["PYTEST_OUTBOX"]) / f"{secrets.token_hex(8)}.db"
        self.cap = 20_000
        self.outbox = Outbox(self.path, self.cap)
        self.added: Counter[str] = Counter()
        self.got: dict[str, list[int]] = {}
        self.dropped: Counter[str] = Counter()
        self.contents: dict[int, bytes] = {}
        self.flying: list[Batch] = []

    @initialize()
    def begin(self) -> None:
        self.outbox.open()

    @rule(records=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3000)), min_size=1, max_size=8))
    def add(self, records: list[tuple[str, int]]) -> None:
        batch = []
        for stream, size in records:
            self.added[stream] += 1
            batch.append((stream, {"n": self.added[stream], "pad": "x" * size}))
        self.outbox.add(batch)
        self.last = batch

    @precondition(lambda self: hasattr(self, "last"))
    @rule()
    def add_again(self) -> None:
        self.outbox.add(self.last)

    @rule()
    def send(self) -> None:
        batch = self.outbox.next_batch(self.flying)
        if batch is not None and len(self.flying) < 3:
            assert self.contents.setdefault(batch.seq, batch.payload) == batch.payload
            self.flying.append(batch)

    @precondition(lambda self: self.flying)
    @rule(index=st.integers(0, 2))
    def confirm(self, index: int) -> None:
        batch = self.flying.pop(index % len(self.flying))
        self.outbox.delivered(batch)
        found = content(batch)
        self.dropped[batch.stream] += found["dropped"]
        self.got.setdefault(batch.stream, []).extend(record["n"] for record in found["records"])

    @rule()
    def lose_the_connection(self) -> None:
        self.flying.clear()
        self.outbox.mark_backlog()

    @rule()
    def restart(self) -> None:
        self.outbox.close()
        self.flying.clear()
        self.outbox = Outbox(self.path, self.cap)

    @invariant()
    def bounded(self) -> None:
        numbered = sum(len(batch.payload) for batch in self.flying) + 3 * MAX_MESSAGE_BYTES
        assert self.outbox.counts().bytes <= self.cap + numbered

    def teardown(self) -> None:
        self.flying.clear()
        for message in drain(self.outbox):
            stream = message["stream"]
            self.dropped[stream] += message["dropped"]
            self.got.setdefault(stream, []).extend(record["n"] for record in message["records"])
        self.outbox.close()
        for stream, count in self.added.items():
            got = self.got.get(stream, [])
            assert len(got) == len(set(got))
            # What was dropped after the last message of a stream has no message to be said in.
            assert len(got) + self.dropped[stream] <= count
        everything = sum(len(got) for got in self.got.values()) + self.outbox.counts().dropped
        assert everything == self.added.total()
        self.outbox.close()


@pytest.fixture(autouse=True)
def _folder_of_the_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_OUTBOX", str(folder))


TestAgainstAModel = Rules.TestCase
TestAgainstAModel.settings = settings(max_examples=40, stateful_step_count=30)
