"""What a mirror, or whoever stands in for one, achieves: a delay with its reason; what came before is not lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.trust.wants import DelayError, DeliveryError, Want
from tests.link.certificates import Authority
from tests.link.errands import Site
from tests.link.mirror_server import Exchange, Mirror
from tests.trust.waiter import Waiter, want_for

DATA = os.urandom(300_000)
HERE = 120_000


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    with Mirror({"x": DATA}, tmp_path / "mirror") as running:
        yield running


def brought(folder: Path, mirror: Mirror, **options: object) -> BaseException | None:
    """Ask for the rest of a file from this mirror alone; how it ended."""
    path = folder / "payload"
    path.write_bytes(DATA[:HERE])
    configured = {"mirrors": [mirror.base], "ca_file": mirror.ca, "blocks": False, **options}
    with Site(folder, longest_s=0.3, **configured) as site:
        return Waiter(site.desk, want_for(DATA, path="x"), path).end()


def sends(status: int, body: bytes = b"", **fields: object) -> Callable[[Exchange], None]:
    def answer(exchange: Exchange) -> None:
        exchange.head(status, **fields)
        exchange.body(body)

    return answer


def trickle(exchange: Exchange) -> None:
    exchange.head(206, Content_Range=f"bytes {HERE}-{len(DATA) - 1}/{len(DATA)}")
    for at in range(HERE, len(DATA)):
        exchange.body(DATA[at : at + 1])
        time.sleep(0.05)


def trickled_head(exchange: Exchange) -> None:
    for char in b"HTTP/1.1 200 OK\r\n" + b"x" * 10_000:
        exchange.wfile.write(bytes([char]))
        time.sleep(0.05)


def silence(exchange: Exchange) -> None:
    exchange.rfile.read(1)


def endless_head(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        exchange.wfile.write(b"X-Filler: " + b"x" * 1000 + b"\r\n")


def endless_chunk_line(exchange: Exchange) -> None:
    exchange.head(200, Transfer_Encoding="chunked")
    while True:
        exchange.wfile.write(b"0" * 1000)


def garbage(exchange: Exchange) -> None:
    exchange.wfile.write(os.urandom(30_000))


def many_continues(exchange: Exchange) -> None:
    for _ in range(1000):
        exchange.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


REST = DATA[HERE:]
WHOLE = f"bytes {HERE}-{len(DATA) - 1}/{len(DATA)}"
ATTACKS = {
    "slow-retrieval": (trickle, "too_slow"),
    "a-slow-head": (trickled_head, "too_slow"),
    "silence": (silence, "too_slow"),
    "an-endless-head": (endless_head, "unreachable"),
    "an-endless-length-of-a-chunk": (endless_chunk_line, "unreachable"),
    "garbage": (garbage, "unreachable"),
    "nothing-but-continue": (many_continues, "unreachable"),
    "another-place": (sends(206, REST, Content_Range=f"bytes 0-{len(REST) - 1}/{len(DATA)}"), "unreachable"),
    "another-length": (sends(206, REST, Content_Range=f"bytes {HERE}-{len(DATA)}/{len(DATA) + 1}"), "unreachable"),
    "a-range-that-ends-before-it-begins": (
        sends(206, REST, Content_Range=f"bytes {HERE}-5/{len(DATA)}"),
        "unreachable",
    ),
    "a-range-beyond-the-whole": (sends(206, REST, Content_Range=f"bytes {HERE}-999999/{len(DATA)}"), "unreachable"),
    "two-lengths": (sends(206, REST, Content_Range=WHOLE, Content_Length=5), "unreachable"),
    "no-range": (sends(206, REST), "unreachable"),
    "nonsense-for-a-range": (sends(206, REST, Content_Range="bytes all of it"), "unreachable"),
    "a-longer-file": (sends(200, DATA + b"x", Content_Length=len(DATA) + 1), "unreachable"),
    "a-shorter-file": (sends(200, DATA[:-1], Content_Length=len(DATA) - 1), "unreachable"),
    "nonsense-for-a-length": (sends(200, DATA, Content_Length="-5"), "unreachable"),
    "not-satisfiable": (sends(416, Content_Length=0), "unreachable"),
    "an-error": (sends(500, Content_Length=0), "unreachable"),
    "packed": (sends(200, DATA, Content_Encoding="gzip"), "unreachable"),
    "another-coding": (sends(200, DATA, Transfer_Encoding="gzip, chunked"), "unreachable"),
    "to-plain-http": (sends(302, Location="http://localhost:1/x", Content_Length=0), "unreachable"),
    "to-a-file": (sends(302, Location="file:///etc/passwd", Content_Length=0), "unreachable"),
    "to-nowhere": (sends(302, Content_Length=0), "unreachable"),
    "to-a-name-with-a-password": (sends(302, Location="https://a:b@localhost/", Content_Length=0), "unreachable"),
    "to-a-second-request": (
        sends(302, Location="https://localhost/x HTTP/1.1\n\nGET /y", Content_Length=0),
        "unreachable",
    ),
    "round-and-round": (sends(302, Location="/x", Content_Length=0), "unreachable"),
    "gone": (sends(410, Content_Length=0), "not_found"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_mirror_delays_and_no_more(short_dir: Path, mirror: Mirror, name: str) -> None:
    mirror.always, code = ATTACKS[name]
    error = brought(short_dir, mirror)
    assert isinstance(error, DelayError), error
    assert error.code == code, error
    kept = (short_dir / "payload").read_bytes()
    assert kept == DATA[: len(kept)] and len(kept) >= HERE, "what came before is not lost, nothing is mixed"


@pytest.mark.parametrize("name", [name for name, (_, code) in ATTACKS.items() if code == "unreachable"])
def test_one_good_mirror_among_bad_ones_suffices(short_dir: Path, mirror: Mirror, name: str) -> None:
    mirror.always, _ = ATTACKS[name]
    with Mirror({"x": DATA}) as good:
        assert brought(short_dir, mirror, mirrors=[mirror.base, good.base]) is None
    assert (short_dir / "payload").read_bytes() == DATA


def test_metadata_that_core_does_not_believe_comes_from_another_mirror_next(short_dir: Path, mirror: Mirror) -> None:
    """No length and no digest is known of the first file of all: only its signature tells."""
    path = "metadata/timestamp.json"
    mirror.files[path] = b"of last year"
    with (
        Mirror({path: b"of today"}) as good,
        Site(short_dir, mirrors=[mirror.base, good.base], ca_file=mirror.ca, blocks=False) as site,
    ):
        seen = []
        for number in range(4):
            waiter = Waiter(site.desk, Want(f"w{number}", path, 1 << 20, 20.0))
            assert waiter.end() is None
            seen.append(waiter.data)
            if number == 1:
                site.desk.doubt()
    assert seen == [b"of last year"] * 2 + [b"of today"] * 2


def test_endless_data_ends_where_the_file_does(short_dir: Path, mirror: Mirror) -> None:
    def endless(exchange: Exchange) -> None:
        exchange.head(200)
        while True:
            exchange.body(b"x" * 65536)

    mirror.always = endless
    (short_dir / "payload").touch()
    with Site(short_dir, mirrors=[mirror.base], ca_file=mirror.ca, blocks=False) as site:
        error = Waiter(site.desk, want_for(DATA, path="x"), short_dir / "payload").end()
        assert isinstance(error, DeliveryError) and error.code == "wrong_content"
        # What was sent meanwhile lies in the buffers of both ends: the kernel lets each grow to several MiB.
        assert mirror.sent < len(DATA) + (16 << 20), "link does not read on"
        error = Waiter(site.desk, Want("w2", "timestamp.json", 16 << 10, 20.0)).end()
        assert isinstance(error, DeliveryError) and error.code == "too_long"


def test_a_few_redirects_are_followed(short_dir: Path, mirror: Mirror, tmp_path: Path) -> None:
    mirror.scripts += [sends(307, Location="/y?z=1", Content_Length=0), sends(302, Location="x", Content_Length=0)]
    assert brought(short_dir, mirror) is None
    assert [path for path, _ in mirror.asked] == ["/x", "/y?z=1", "/x"]
    assert set(mirror.ranges) == {f"bytes={HERE}-"}


def test_a_redirect_leads_to_another_host_only_with_its_certificate(
    short_dir: Path, mirror: Mirror, tmp_path: Path
) -> None:
    with Mirror({"x": DATA}, tmp_path / "other") as other:
        mirror.always = sends(302, Location=f"{other.base}/x", Content_Length=0)
        error = brought(short_dir, mirror)
        assert isinstance(error, DelayError) and error.code == "unreachable" and "cannot trust" in str(error)
        assert other.asked == []


@pytest.mark.parametrize("wrong", ["authority", "name", "plain", "system"])
def test_a_mirror_without_the_right_certificate_is_not_asked(short_dir: Path, tmp_path: Path, wrong: str) -> None:
    host = "elsewhere.example" if wrong == "name" else "localhost"
    with Mirror({"x": DATA}, None if wrong == "plain" else tmp_path / "mirror", host) as mirror:
        options: dict[str, object] = {"mirrors": [mirror.base.replace("http:", "https:")]}
        if wrong == "authority":
            (tmp_path / "other.pem").write_bytes(Authority("another CA").pem)
            options["ca_file"] = str(tmp_path / "other.pem")
        elif wrong == "system":
            options["ca_file"] = ""
        error = brought(short_dir, mirror, **options)
        assert isinstance(error, DelayError) and error.code == "unreachable"
        assert mirror.asked == []


def test_a_ca_file_that_is_none_is_told(short_dir: Path, mirror: Mirror) -> None:
    error = brought(short_dir, mirror, ca_file=str(short_dir / "missing.pem"))
    assert isinstance(error, DelayError) and error.code == "unreachable" and "missing.pem" in str(error)


def test_bytes_that_broke_off_in_a_lie_are_kept_and_judged_at_the_end(short_dir: Path, mirror: Mirror) -> None:
    """Wrong bytes in the middle, from a mirror that looked right: the whole is refused, and nobody runs it."""
    mirror.scripts.append(sends(206, b"x" * 1000 + REST[1000:], Content_Range=WHOLE))
    path = short_dir / "payload"
    assert brought(short_dir, mirror) is None, "what lay here may have been damaged: once more, from the beginning"
    assert path.read_bytes() == DATA and mirror.ranges == [f"bytes={HERE}-", ""]
