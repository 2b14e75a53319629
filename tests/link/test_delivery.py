"""What core wants is brought: from mirrors, through cuts and changes of mind, and no byte more often than needed."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.base.errors import TryLaterError
from agent.trust.wants import DelayError, DeliveryError, Want
from tests.link.broker import until
from tests.link.errands import Site
from tests.link.mirror_server import Exchange, Mirror
from tests.link.proxy import Proxy
from tests.trust.waiter import Waiter, opened, want_for

DATA = os.urandom(700_001)
FILES = {"fleet/targets/x": DATA, "fleet/metadata/timestamp.json": b"{}", "fleet/metadata/2.root.json": b"[]"}


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    with Mirror(FILES, tmp_path / "mirror") as running:
        yield running


def at(mirror: Mirror, *more: str, **options: object) -> dict[str, object]:
    return {"mirrors": [f"{mirror.base}/fleet", *more], "ca_file": mirror.ca, "blocks": False, **options}


def want(data: bytes = DATA, **changed: object) -> Want:
    return want_for(data, **{"path": "targets/x", **changed})


def test_a_payload_comes_whole_and_once(short_dir: Path, mirror: Mirror) -> None:
    with Site(short_dir, **at(mirror)) as site:
        waiter = Waiter(site.desk, want(), short_dir / "payload")
        assert waiter.end() is None
    assert (short_dir / "payload").read_bytes() == DATA
    assert waiter.told[-1] == len(DATA) and mirror.sent == len(DATA)
    assert mirror.asked[0][1]["accept-encoding"] == "identity"


def test_metadata_comes_into_memory_though_nobody_knows_its_length(short_dir: Path, mirror: Mirror) -> None:
    with Site(short_dir, **at(mirror)) as site:
        waiter = Waiter(site.desk, Want("w1", "metadata/timestamp.json", 100, 20.0))
        assert waiter.end() is None and waiter.data == b"{}"
        mirror.scripts.append(chunked(b"one", b"and two"))
        waiter = Waiter(site.desk, Want("w2", "metadata/timestamp.json", 100, 20.0))
        assert waiter.end() is None and waiter.data == b"oneand two"
        mirror.scripts.append(until_closed(b"to the end"))
        waiter = Waiter(site.desk, Want("w3", "metadata/timestamp.json", 100, 20.0))
        assert waiter.end() is None and waiter.data == b"to the end"


def chunked(*chunks: bytes):
    def answer(exchange: Exchange) -> None:
        exchange.head(200, Transfer_Encoding="chunked")
        for chunk in (*chunks, b""):
            exchange.wfile.write(b"%x;a=b\r\n%s\r\n" % (len(chunk), chunk))

    return answer


def until_closed(data: bytes):
    def answer(exchange: Exchange) -> None:
        exchange.head(200)
        exchange.wfile.write(data)

    return answer


def test_bytes_that_are_here_already_are_not_asked_for(short_dir: Path, mirror: Mirror) -> None:
    (short_dir / "payload").write_bytes(DATA[:300_000])
    with Site(short_dir, **at(mirror)) as site:
        assert Waiter(site.desk, want(), short_dir / "payload").end() is None
    assert (short_dir / "payload").read_bytes() == DATA
    assert mirror.ranges == ["bytes=300000-"] and mirror.sent == len(DATA) - 300_000


def test_cuts_cost_what_was_under_way_and_no_more(short_dir: Path, mirror: Mirror) -> None:
    draw = random.Random(7)
    with Proxy(mirror.port) as proxy:
        proxy.cut_after(*(draw.randrange(5_000, 80_000) for _ in range(20)))
        with Site(short_dir, **at(mirror) | {"mirrors": [f"https://localhost:{proxy.port}/fleet"]}) as site:
            assert Waiter(site.desk, want(), short_dir / "payload").end() is None
        assert (short_dir / "payload").read_bytes() == DATA
        assert proxy.connections == 21
        # Heads and handshakes take a few KiB of each connection, a TLS record that was cut is lost.
        assert proxy.forwarded < len(DATA) + 21 * 24_000
    tags = {fields["if-range"] for _, fields in mirror.asked if "if-range" in fields}
    assert len(tags) == 1, "what is resumed is asked for by its entity tag"


def test_a_file_that_changed_is_passed_over_up_to_the_offset(short_dir: Path, mirror: Mirror) -> None:
    """Its digest tells in the end; a mirror that changed nothing but the tag costs time only."""

    def short(exchange: Exchange) -> None:
        exchange.head(200, Content_Length=len(DATA), ETag='"of-yesterday"')
        exchange.body(DATA[:200_000])

    mirror.scripts.append(short)
    with Site(short_dir, **at(mirror)) as site:
        assert Waiter(site.desk, want(), short_dir / "payload").end() is None
    assert (short_dir / "payload").read_bytes() == DATA
    assert mirror.ranges == ["", "bytes=200000-"] and mirror.sent == 200_000 + len(DATA)


def test_a_mirror_without_ranges_still_brings_it(short_dir: Path, mirror: Mirror) -> None:
    def whole(exchange: Exchange) -> None:
        exchange.head(200, Content_Length=len(DATA))
        exchange.body(DATA)

    mirror.always = whole
    (short_dir / "payload").write_bytes(DATA[:300_000])
    with Site(short_dir, **at(mirror)) as site:
        assert Waiter(site.desk, want(), short_dir / "payload").end() is None
    assert (short_dir / "payload").read_bytes() == DATA


def test_the_next_mirror_goes_on_where_the_first_ended(short_dir: Path, mirror: Mirror, tmp_path: Path) -> None:
    def breaks(exchange: Exchange) -> None:
        exchange.head(200, Content_Length=len(DATA))
        exchange.body(DATA[:100_000])

    with Mirror(FILES) as second:
        mirror.always = lambda exchange: exchange.head(503, Content_Length=0)
        mirror.scripts.append(breaks)
        with Site(short_dir, **at(mirror, f"{second.base}/fleet")) as site:
            assert Waiter(site.desk, want(), short_dir / "payload").end() is None
        assert second.ranges == ["bytes=100000-"]
    assert (short_dir / "payload").read_bytes() == DATA


def test_no_newer_root_is_said_at_once_by_the_first_that_answers(short_dir: Path, mirror: Mirror) -> None:
    with Mirror({**FILES, "fleet/metadata/9.root.json": b"newer"}) as second:
        with Site(short_dir, **at(mirror, f"{second.base}/fleet")) as site:
            error = Waiter(site.desk, Want("w1", "metadata/9.root.json", 100, 20.0)).end()
        assert isinstance(error, DelayError) and error.code == "not_found"
        assert second.asked == []


def test_of_anything_else_each_mirror_is_asked(short_dir: Path, mirror: Mirror) -> None:
    with Mirror({"fleet/targets/y": b"abc"}) as second:
        with Site(short_dir, **at(mirror, f"{second.base}/fleet")) as site:
            assert Waiter(site.desk, want(b"abc", path="targets/y"), short_dir / "payload").end() is None
            error = Waiter(site.desk, want(b"abc", path="targets/z"), short_dir / "other").end()
        assert isinstance(error, DelayError) and error.code == "not_found"
        assert [path for path, _ in second.asked] == ["/fleet/targets/y", "/fleet/targets/z"]


def test_without_any_place_to_ask_core_is_told_so(short_dir: Path) -> None:
    with Site(short_dir, longest_s=0.3, blocks=False) as site:
        error = Waiter(site.desk, want(), short_dir / "payload").end()
    assert isinstance(error, DelayError) and error.code == "unreachable" and "no mirror is configured" in str(error)


def test_who_brings_it_by_hand_is_left_to_it(short_dir: Path, mirror: Mirror) -> None:
    mirror.always = lambda exchange: exchange.head(503, Content_Length=0)
    with Site(short_dir, longest_s=0.2, **at(mirror)) as site:
        waiter = Waiter(site.desk, want(), short_dir / "payload")
        opened(site.desk)
        for offset in range(0, len(DATA), 70_000):
            site.desk.put("w1", offset, [DATA[offset : offset + 70_000]])
            assert offset + 70_000 >= len(DATA) or not waiter.end_within(0.1)
        assert waiter.end() is None
    assert (short_dir / "payload").read_bytes() == DATA


def test_a_mirror_that_comes_back_is_used_again(short_dir: Path, mirror: Mirror) -> None:
    with Proxy(mirror.port) as proxy:
        proxy.refuse()
        with Site(short_dir, **at(mirror) | {"mirrors": [f"https://localhost:{proxy.port}/fleet"]}) as site:
            waiter = Waiter(site.desk, want(), short_dir / "payload")
            until(lambda: proxy.connections >= 3, "it is tried again and again")
            proxy.heal()
            assert waiter.end() is None
    assert (short_dir / "payload").read_bytes() == DATA


def test_a_mirror_that_is_configured_meanwhile_is_used(short_dir: Path, mirror: Mirror) -> None:
    with Mirror({}) as other, Proxy(other.port) as proxy:
        proxy.refuse()
        with Site(short_dir, mirrors=[f"http://localhost:{proxy.port}"], blocks=False) as site:
            waiter = Waiter(site.desk, want(), short_dir / "payload")
            until(lambda: proxy.connections >= 1, "it is tried")
            site.change(**at(mirror))
            assert waiter.end() is None


def test_what_is_withdrawn_is_brought_no_further(short_dir: Path, mirror: Mirror) -> None:
    cancelled = threading.Event()

    def go_on() -> None:
        if cancelled.is_set():
            raise TryLaterError("cancelled")

    with Site(short_dir, **at(mirror, rate_kib_s=64)) as site:
        waiter = Waiter(site.desk, want(), short_dir / "payload", go_on)
        until(lambda: waiter.told and waiter.told[-1] > 0, "it begins")
        cancelled.set()
        assert isinstance(waiter.end(), TryLaterError)
        until(lambda: not any(not task.done() for task in site.delivery._errands.values()), "the errand ends")
    assert 0 < (short_dir / "payload").stat().st_size < len(DATA)


def test_the_rate_is_kept(short_dir: Path, mirror: Mirror) -> None:
    """By the bytes that core has had when a given time was up, of the same clock that the limit is of."""
    with Site(short_dir, **at(mirror, rate_kib_s=200)) as site:
        began = site.loop.time()
        waiter = Waiter(site.desk, want(), short_dir / "payload")
        seen = []
        until(lambda: seen.append((opened(site.desk).offset, site.loop.time())) or seen[-1][0] > 300_000, "half of it")
        for offset, when in seen:
            assert offset <= 200 * 1024 * (when - began)
        site.change(**at(mirror))
        assert waiter.end() is None


def test_bytes_that_are_refused_send_the_next_want_elsewhere(short_dir: Path, mirror: Mirror) -> None:
    mirror.files["fleet/targets/x"] = b"X" + DATA[1:]
    with Mirror(FILES) as second, Site(short_dir, **at(mirror, f"{second.base}/fleet")) as site:
        error = Waiter(site.desk, want(), short_dir / "payload").end()
        assert isinstance(error, DeliveryError) and error.code == "wrong_content"
        assert not (short_dir / "payload").exists()
        assert Waiter(site.desk, want(id="w2"), short_dir / "payload").end() is None
        assert len(mirror.asked) == 1


def test_bytes_damaged_on_the_device_are_fetched_once_more(short_dir: Path, mirror: Mirror) -> None:
    (short_dir / "payload").write_bytes(bytes(250_000))
    with Site(short_dir, **at(mirror)) as site:
        assert Waiter(site.desk, want(), short_dir / "payload").end() is None
    assert (short_dir / "payload").read_bytes() == DATA
    assert mirror.ranges == ["bytes=250000-", ""]


def test_four_at_once(short_dir: Path, mirror: Mirror) -> None:
    parts = {f"fleet/targets/{n}": os.urandom(200_000) for n in range(4)}
    mirror.files.update(parts)
    with Site(short_dir, **at(mirror)) as site:
        waiters = [
            Waiter(site.desk, want(parts[f"fleet/targets/{n}"], id=f"w{n}", path=f"targets/{n}"), short_dir / f"{n}")
            for n in range(4)
        ]
        assert [waiter.end() for waiter in waiters] == [None] * 4
    for n in range(4):
        assert (short_dir / f"{n}").read_bytes() == parts[f"fleet/targets/{n}"]
