"""One file from one mirror: GET over HTTPS, from an offset on, in pieces.

Nothing is believed of a mirror but bytes at their place, and even those are judged by core. What it says of the file
(length, place, entity tag) only serves to leave it early where it has another one. Redirects are few and never lead to
plain http, but on this machine from where it was plain already.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from agent import __version__
from agent.base.errors import TryLaterError, one_line
from agent.link.dialling import dial
from agent.link.sources import MOST_PIECE, Pace, SourceError
from agent.link.web import Body, Head, Patience, Stream, length_of, read_head

#: What the kernel may hold unread (twice that, with its own books): lost when link is killed. It bounds the rate, too:
#: to 5 MB/s at 50 ms.
_SOCKET_BYTES = 256 << 10
_MOST_REDIRECTS = 3
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MISSING = frozenset((404, 410))
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)")
#: What may stand in a request line. Whatever else a mirror puts into a redirect would make a request of its own.
_TARGET = re.compile(r"[!-~]{1,4096}")
#: RFC 9110 8.8.3; a weak one (W/) does not say that the bytes are the same.
_TAG = re.compile(r'"[!#-~]{0,256}"')


@dataclass(slots=True)
class Asked:
    """The bytes of ``path`` below ``base`` from ``offset`` on, none beyond ``end``.

    ``length`` is that of the whole file where it is known. ``tag`` is the entity tag of what came before, "" without;
    the mirror's answer sets it.
    """

    base: str
    path: str
    offset: int
    end: int
    length: int | None
    tag: str = ""


async def fetch(asked: Asked, tls: ssl.SSLContext, patience: Patience, pace: Pace) -> AsyncGenerator[memoryview, None]:
    """The bytes, in pieces that hold until the next is asked for.

    SourceError: ``not_found``, ``too_slow``, or ``unreachable`` with what went wrong; what was read before it is given
    first.
    """
    with contextlib.ExitStack() as held:
        with _failures():
            stream, head = await _answered(asked, tls, patience, held)
            body = Body(stream, head)
            skip, left = _place(asked, head)
        buffer = memoryview(bytearray(MOST_PIECE))
        failure: SourceError | None = None
        while left and failure is None:
            filled, room = 0, min(pace.piece, left + skip)
            try:
                with _failures():
                    while filled < room and (count := await body.read(buffer[filled:room])):
                        filled += count
            except SourceError as error:
                failure = error
            await pace.spend(filled)
            skipped = min(skip, filled)
            skip, left = skip - skipped, left - (filled - skipped)
            if filled > skipped:
                yield buffer[skipped:filled]
            if filled < room:
                break
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # or it would keep this frame, and so the buffer, until the collector comes
        if asked.length is not None and left:
            raise SourceError("unreachable", "it has less of the file than belongs there")


async def _answered(
    asked: Asked, tls: ssl.SSLContext, patience: Patience, held: contextlib.ExitStack
) -> tuple[Stream, Head]:
    """The first answer that is no redirect."""
    url = f"{asked.base.rstrip('/')}/{asked.path}"
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        sock = await dial(host, port, tls if secure else None, patience.window_s)
        held.callback(sock.close)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        stream = Stream(sock, patience)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        await stream.send(_request(asked, parts.netloc, target))
        head = await read_head(stream)
        if head.status not in _REDIRECTS:
            return stream, head
        held.pop_all().close()
        url = _redirected(url, head.fields.get("location", ""))
    raise SourceError("unreachable", f"it redirects more than {_MOST_REDIRECTS} times")


def _request(asked: Asked, host: str, target: str) -> bytes:
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        f"User-Agent: edge-agent/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    ]
    if asked.offset:
        lines.append(f"Range: bytes={asked.offset}-")
        if asked.tag:
            lines.append(f"If-Range: {asked.tag}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads. SourceError where it must not lead."""
    try:
        to = urljoin(url, location) if _TARGET.fullmatch(location) else ""
        parts = urlsplit(to)
        named = bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise SourceError("unreachable", f"it redirects to nowhere: {one_line(location[:100])}")
    inside = parts.scheme == "http" and {parts.hostname, urlsplit(url).hostname} <= _LOOPBACK
    if parts.scheme != "https" and not (inside and urlsplit(url).scheme == "http"):
        raise SourceError("unreachable", f"it redirects away from https: {one_line(location[:100])}")
    return to


def _place(asked: Asked, head: Head) -> tuple[int, int]:
    """How many bytes of the body to pass over, and how many to take after them. SourceError when it is not the file."""
    if head.status in _MISSING:
        raise SourceError("not_found", f"it answers {head.status}")
    if head.status == 206:
        first, count, total = _range(head)
        if first != asked.offset:
            raise SourceError("unreachable", f"it gives bytes from {first} on, {asked.offset} was asked for")
    elif head.status == 200:
        first, count, total = 0, None, length_of(head)
    else:
        raise SourceError("unreachable", f"it answers {head.status}")
    if None not in (total, asked.length) and total != asked.length:
        raise SourceError("unreachable", f"its file has {total} bytes, {asked.length} belong there")
    tag = head.fields.get("etag", "")
    asked.tag = tag if _TAG.fullmatch(tag) else ""
    left = asked.end - asked.offset
    return asked.offset - first, left if count is None else min(left, count)


def _range(head: Head) -> tuple[int, int, int | None]:
    """First byte, count and length of the whole, as Content-Range has them (RFC 9110 14.4)."""
    match = _RANGE.fullmatch(head.fields.get("content-range", ""))
    if match is None:
        raise SourceError("unreachable", "it does not say which part of the file it gives")
    first, last, total = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
    length = length_of(head)
    if last < first or (total is not None and last >= total) or length not in (None, last - first + 1):
        raise SourceError("unreachable", "it contradicts itself on which part of the file it gives")
    return first, last - first + 1, total


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever goes wrong on the way is the same to us: nothing more comes from there for now."""
    try:
        yield
    except SourceError:
        raise
    except TryLaterError as error:
        raise SourceError("unreachable", str(error)) from error
    except OSError as error:
        raise SourceError("unreachable", f"the connection broke: {error.strerror or error}") from error
