"""The desk: what is wanted waits there, and whoever brings it writes it, up to what is wanted and not a byte more."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import DamagedError, NotFoundError, TryLaterError
from agent.trust.desk import Desk
from agent.trust.landing import OffsetError
from agent.trust.wants import DelayError, DeliveryError, Want, ids
from tests.conftest import ROOT
from tests.trust.waiter import Waiter, opened, want_for

DATA = bytes(range(256)) * 20


# -- into memory ------------------------------------------------------------------------------------------------------


def test_a_want_is_open_until_its_bytes_are_whole() -> None:
    desk, results = Desk(), []
    want = Want("w1", "metadata/timestamp.json", 10, 5.0, length=4)
    waiter = threading.Thread(target=lambda: results.append(desk.fetch(want)))
    waiter.start()
    assert desk.open_wants(5) == (want,)

    def cut():
        yield b"ab"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        desk.put("w1", 0, cut())
    assert desk.open_wants() == (want,)
    desk.put("w1", 0, [b"ab", b"cd"])
    waiter.join()
    assert results == [b"abcd"] and desk.open_wants() == ()
    with pytest.raises(NotFoundError):
        desk.put("w1", 0, [b"late"])


def test_a_desk_that_stops_tells_whoever_waits_and_refuses_the_next() -> None:
    desk, errors = Desk(most_at_once=1), []
    want = Want("w1", "x", 10, 5.0)

    def wait() -> None:
        try:
            desk.fetch(want)
        except DelayError as error:
            errors.append(error.code)

    waiter = threading.Thread(target=wait)
    waiter.start()
    desk.open_wants(5)
    with pytest.raises(DelayError) as full:
        desk.fetch(Want("w2", "y", 10, 5.0))
    assert full.value.code == "too_many"
    desk.stop()
    waiter.join()
    with pytest.raises(DelayError):
        desk.fetch(want)
    assert errors == ["stopped"]


@pytest.mark.parametrize(("length", "sha256"), [(3, None), (None, "0" * 64)])
def test_what_is_brought_must_be_what_was_wanted(length: int | None, sha256: str | None) -> None:
    desk, errors = Desk(), []

    def wait() -> None:
        try:
            desk.fetch(Want("w1", "x", 10, 5.0, length=length, sha256=sha256))
        except DeliveryError as error:
            errors.append(error.code)

    waiter = threading.Thread(target=wait)
    waiter.start()
    desk.open_wants(5)
    with pytest.raises(DeliveryError):
        desk.put("w1", 0, [b"four"])
    waiter.join()
    assert errors == ["wrong_content"]


def test_what_is_brought_into_memory_in_two_goes_is_one() -> None:
    desk, results = Desk(), []
    waiter = threading.Thread(target=lambda: results.append(desk.fetch(Want("w1", "x", 10, 20.0))))
    waiter.start()
    desk.open_wants(20)
    assert not desk.put("w1", 0, [b"ab"], last=False).done
    with pytest.raises(OffsetError) as elsewhere:
        desk.put("w1", 3, [b"d"])
    assert elsewhere.value.offset == 2
    assert desk.put("w1", 2, [b"cd"]).done
    waiter.join()
    assert results == [b"abcd"]


def test_bytes_for_an_earlier_start_fit_nothing() -> None:
    first, second = ids(), ids()
    assert len({first(), first(), second(), second()}) == 4


# -- into a file ------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_private_and_told_of_when_the_call_returns(tmp_path: Path) -> None:
    desk, path = Desk(), tmp_path / "payload"
    waiter = Waiter(desk, want_for(DATA), path)
    assert opened(desk).offset == 0
    assert desk.put("w1", 0, [DATA[:1000]]).offset == 1000
    assert opened(desk).offset == 1000
    taken = desk.put("w1", 1000, [DATA[1000:2000], memoryview(DATA)[2000:]])
    assert taken.done and taken.offset == len(DATA)
    assert waiter.end() is None
    assert path.read_bytes() == DATA and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert waiter.told[0] == 0 and waiter.told[-1] == len(DATA) and waiter.told == sorted(waiter.told)
    assert desk.open_wants() == ()
    with pytest.raises(NotFoundError):
        desk.put("w1", len(DATA), [b"x"])


def test_bytes_that_lie_there_are_not_brought_again(tmp_path: Path) -> None:
    desk, path = Desk(), tmp_path / "payload"
    path.write_bytes(DATA[:3333])
    waiter = Waiter(desk, want_for(DATA), path)
    assert opened(desk).offset == 3333
    assert desk.put("w1", 3333, [DATA[3333:]]).done
    assert waiter.end() is None and path.read_bytes() == DATA and waiter.told[0] == 3333


def test_a_file_that_is_whole_already_is_not_wanted(tmp_path: Path) -> None:
    path, told = tmp_path / "payload", []
    path.write_bytes(DATA)
    Desk(most_at_once=0).fetch_file(want_for(DATA), path, told.append)
    assert told == [len(DATA)]


@pytest.mark.parametrize(
    "before", [b"X" * len(DATA), DATA + b"more", b"X" * (3 << 20)], ids=["wrong", "longer", "long"]
)
def test_what_cannot_be_the_file_is_begun_anew(tmp_path: Path, before: bytes) -> None:
    desk, path = Desk(), tmp_path / "payload"
    path.write_bytes(before)
    waiter = Waiter(desk, want_for(DATA), path)
    assert opened(desk).offset == 0
    desk.put("w1", 0, [DATA])
    assert waiter.end() is None and path.read_bytes() == DATA


def test_bytes_damaged_while_they_waited_cost_time_and_not_the_delivery(tmp_path: Path) -> None:
    """A power cut may leave zeros where bytes were: whoever brings the rest is asked for all of it, once."""
    desk, path = Desk(), tmp_path / "payload"
    path.write_bytes(bytes(1000))
    waiter = Waiter(desk, want_for(DATA), path)
    assert opened(desk).offset == 1000
    with pytest.raises(OffsetError) as again:
        desk.put("w1", 1000, [DATA[1000:]])
    assert again.value.offset == 0 and opened(desk).offset == 0
    assert desk.put("w1", 0, [DATA]).done
    assert waiter.end() is None and path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("pieces", "code"),
    [([b"X" + DATA[1:]], "wrong_content"), ([DATA, b"x"], "too_long"), ([DATA + b"x"], "too_long")],
    ids=["swapped", "one-more", "longer"],
)
def test_what_is_wrong_is_deleted(tmp_path: Path, pieces: list[bytes], code: str) -> None:
    desk, path = Desk(), tmp_path / "payload"
    waiter = Waiter(desk, want_for(DATA), path)
    opened(desk)
    with pytest.raises(DeliveryError) as refused:
        desk.put("w1", 0, pieces)
    error = waiter.end()
    assert isinstance(error, DeliveryError) and error.code == refused.value.code == code
    assert not path.exists() and desk.open_wants() == ()


def test_bytes_for_another_place_change_nothing(tmp_path: Path) -> None:
    desk, path = Desk(), tmp_path / "payload"
    waiter = Waiter(desk, want_for(DATA), path)
    opened(desk)
    desk.put("w1", 0, [DATA[:100]])
    for offset in (0, 99, 101, 1 << 60):
        for pieces in ([b"x" * 50], []):
            with pytest.raises(OffsetError) as elsewhere:
                desk.put("w1", offset, pieces)
            assert elsewhere.value.offset == 100
    assert desk.put("w1", 100, [DATA[100:]]).done
    assert waiter.end() is None and path.read_bytes() == DATA


def test_a_source_that_ends_too_soon_leaves_the_rest_to_another(tmp_path: Path) -> None:
    desk, path = Desk(), tmp_path / "payload"
    waiter = Waiter(desk, want_for(DATA), path)
    opened(desk)

    def cut():
        yield DATA[:700]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        desk.put("w1", 0, cut())
    assert desk.put("w1", 700, [DATA[700:800]], last=True).done is False
    assert opened(desk).offset == 800
    desk.put("w1", 800, [DATA[800:]])
    assert waiter.end() is None and path.read_bytes() == DATA


def test_whoever_needs_it_no_more_withdraws_it_and_the_bytes_stay(tmp_path: Path) -> None:
    desk, path, cancelled = Desk(), tmp_path / "payload", threading.Event()

    def go_on() -> None:
        if cancelled.is_set():
            raise TryLaterError("cancelled")

    waiter = Waiter(desk, want_for(DATA), path, go_on)
    opened(desk)
    desk.put("w1", 0, [DATA[:100]])
    cancelled.set()
    assert isinstance(waiter.end(), TryLaterError)
    assert path.read_bytes() == DATA[:100] and desk.open_wants() == ()
    with pytest.raises(NotFoundError):
        desk.put("w1", 100, [DATA[100:]])
    assert path.read_bytes() == DATA[:100]


@pytest.mark.parametrize("end", ["time", "word", "stop"])
def test_a_delay_leaves_what_came(tmp_path: Path, end: str) -> None:
    desk, path = Desk(), tmp_path / "payload"
    waiter = Waiter(desk, want_for(DATA, within_s=1.0 if end == "time" else 30.0), path)
    opened(desk)
    desk.put("w1", 0, [DATA[:100]])
    if end == "word":
        desk.fail("w1", "unreachable", "no mirror answers")
    elif end == "stop":
        desk.stop()
    error = waiter.end()
    assert isinstance(error, DelayError)
    assert error.code == {"time": "too_slow", "word": "unreachable", "stop": "stopped"}[end]
    assert path.read_bytes() == DATA[:100]


def test_whoever_watches_is_told_of_each_want_that_comes_and_goes(tmp_path: Path) -> None:
    desk, news = Desk(), []
    desk.watch(lambda: news.append(len(desk.open_wants())))
    waiter = Waiter(desk, want_for(DATA), tmp_path / "payload")
    opened(desk)
    desk.put("w1", 0, [DATA])
    assert waiter.end() is None and news == [1, 0]


def test_a_link_where_the_file_should_be_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"keep")
    (tmp_path / "payload").symlink_to(target)
    with pytest.raises(DamagedError):
        Desk().fetch_file(want_for(DATA), tmp_path / "payload")
    assert target.read_bytes() == b"keep"


def test_a_full_disk_ends_the_want_with_what_to_do(tmp_path: Path) -> None:
    """The limit of a file's size stands for the end of the disk: in a child, since a limit stays."""
    code = """
import errno, os, resource, signal, sys, threading
from pathlib import Path
from tests.trust.test_desk import DATA
from tests.trust.waiter import Waiter, opened, want_for
from agent.base.errors import DamagedError, TryLaterError
from agent.trust.desk import Desk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
desk = Desk()
waiter = Waiter(desk, want_for(DATA), Path(sys.argv[1]))
opened(desk)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
try:
    desk.put("w1", 0, [DATA[:1000], DATA[1000:]])
except DamagedError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error, "|", waiter.end() is error, "|", desk.open_wants())
"""
    path = tmp_path / "payload"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "cannot keep what was fetched: File too large | True | ()\n"
    assert path.read_bytes()[:1500] == DATA[:1500]


def test_a_killed_core_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.trust.test_desk import DATA
from tests.trust.waiter import Waiter, opened, want_for
from agent.trust.desk import Desk
desk = Desk()
Waiter(desk, want_for(DATA), Path(sys.argv[1]))
opened(desk)
desk.put("w1", 0, [DATA[:1234]])
print("put", flush=True)
sys.stdin.read()
"""
    path = tmp_path / "payload"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"put\n"
        child.send_signal(signal.SIGKILL)
    desk = Desk()
    waiter = Waiter(desk, want_for(DATA), path)
    assert opened(desk).offset == 1234
    desk.put("w1", 1234, [DATA[1234:]])
    assert waiter.end() is None and path.read_bytes() == DATA


def test_two_who_bring_at_once_never_mix_their_bytes(tmp_path: Path) -> None:
    desk, path, data = Desk(), tmp_path / "payload", os.urandom(400_000)
    waiter = Waiter(desk, want_for(data), path)
    opened(desk)

    def carry() -> None:
        offset, piece = 0, 1024
        while offset < len(data):
            try:
                offset = desk.put("w1", offset, [data[offset : offset + piece]]).offset
            except OffsetError as error:
                offset = error.offset
            except NotFoundError:
                return

    carriers = [threading.Thread(target=carry) for _ in range(4)]
    for carrier in carriers:
        carrier.start()
    assert waiter.end() is None
    for carrier in carriers:
        carrier.join()
    assert path.read_bytes() == data


@given(
    before=st.binary(max_size=40),
    goes=st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=20), st.booleans()), max_size=8),
)
def test_no_order_of_bytes_makes_a_file_that_was_not_wanted(before: bytes, goes: list[tuple[int, bytes, bool]]) -> None:
    data = b"0123456789abcdef"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload"
        path.write_bytes(before)
        desk = Desk()
        waiter = Waiter(desk, want_for(data), path)
        while waiter.is_alive() and not desk.open_wants():
            time.sleep(0)
        for offset, piece, right in goes:
            with contextlib.suppress(OffsetError, NotFoundError, DeliveryError):
                desk.put("w1", offset, [data[offset:][: len(piece)] if right else piece])
            with contextlib.suppress(FileNotFoundError):  # deleted by whoever waited
                assert path.stat().st_size <= len(data)
        desk.stop()
        error = waiter.end()
        if error is None:
            assert path.read_bytes() == data
        elif isinstance(error, DeliveryError):
            assert not path.exists()
        else:
            assert isinstance(error, DelayError)
