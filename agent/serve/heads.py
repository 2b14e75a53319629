"""Heads of HTTP/1.1 requests: request line and fields, checked strictly (RFC 9112), and the refusals they lead to.

Pure. Fields that steer framing or routing may stand once only: a second one would be a second reading, and two readings
of one request are how requests are smuggled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agent.base.errors import PeerError
from agent.serve.limits import Limits

_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\Z")
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00-\x08\x0a-\x1f\x7f]*)\Z")
_DIGITS = re.compile(r"[0-9]+\Z")
_SINGLE = frozenset(
    (
        "host",
        "content-length",
        "transfer-encoding",
        "content-type",
        "content-encoding",
        "expect",
        "inference-header-content-length",
    )
)
#: Heads of up to this size are remembered, so that an app's kept-alive requests are parsed once.
REMEMBERED_HEAD_BYTES = 1024
REMEMBERED_HEADS = 128


class ProtocolError(PeerError):
    """A request that HTTP or a limit refuses, with its status; ``headers`` are added to the answer."""

    def __init__(self, status: int, text: str, *, hint: str = "", headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text, hint=hint)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Head:
    """Request line and fields. ``fields`` has lower-case names, repeated ones joined by a comma; values as latin-1.

    ``length`` is the announced body length, None when the body is chunked or there is none. ``inference_length`` is the
    Open Inference Protocol's: that many bytes of the body are JSON, and what follows should lie aligned in memory.
    """

    method: str
    target: str
    minor: int
    fields: dict[str, str]
    length: int | None
    inference_length: int | None
    chunked: bool
    keep_alive: bool
    expects_continue: bool


def read_count(fields: dict[str, str], name: str) -> int | None:
    """A field of digits only, as a number; None when it is missing. Raises ProtocolError 400."""
    value = fields.get(name)
    if value is None:
        return None
    if not _DIGITS.match(value):
        raise ProtocolError(400, f"cannot read request: {name} must be digits only")
    # A number of 19 digits is beyond every limit, and int() of a long one would cost time.
    return int(value.lstrip("0")[:19] or "0")


class HeadReader:
    """Whole heads to ``Head``, and the most frequent ones remembered. Shared by the connections of a socket."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.remembered: dict[bytes, Head] = {}

    def remember(self, raw: bytes, head: Head) -> None:
        """Keep ``head`` for the same bytes; ``raw`` includes the empty line."""
        if len(raw) <= REMEMBERED_HEAD_BYTES:
            if len(self.remembered) >= REMEMBERED_HEADS:
                self.remembered.clear()
            self.remembered[raw] = head


def read_request_line(line: bytes) -> tuple[str, str, int]:
    """Method, target and minor version. Raises ProtocolError 400 or 505."""
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise ProtocolError(400, "cannot read request: malformed request line")
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in b"01":
        raise ProtocolError(505, "cannot read request: only HTTP/1.1 and HTTP/1.0 are served")
    return method.decode("ascii"), target.decode("ascii"), int(minor)


def read_field_line(line: bytes) -> tuple[str, str]:
    """Lower-case name and value of a field line, RFC 9112 section 5. Raises ProtocolError 400."""
    if line[:1] in (b" ", b"\t"):
        raise ProtocolError(400, "cannot read request: folded header lines are not accepted")
    match = _FIELD_LINE.match(line)
    if match is None:
        raise ProtocolError(400, "cannot read request: malformed header line")
    return match[1].decode("ascii").lower(), match[2].strip(b" \t").decode("latin-1")


def join_fields(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Fields by name; ProtocolError 400 when one that must be single is repeated."""
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name not in fields:
            fields[name] = value
        elif name in _SINGLE:
            raise ProtocolError(400, f"cannot read request: more than one {name} header")
        else:
            fields[name] += ", " + value
    return fields


def read_head(line: tuple[str, str, int], fields: dict[str, str]) -> Head:
    """The head with its framing decided, RFC 9112 section 6.3. Raises ProtocolError."""
    method, target, minor = line
    if minor == 1 and "host" not in fields:
        raise ProtocolError(400, "cannot read request: host header missing")
    coding = fields.get("transfer-encoding")
    if coding is not None:
        if "content-length" in fields:
            raise ProtocolError(400, "cannot read request: both content-length and transfer-encoding")
        if minor == 0:
            raise ProtocolError(400, "cannot read request: transfer-encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            raise ProtocolError(501, "cannot read request: the only transfer-encoding served is chunked")
    if fields.get("content-encoding", "identity").lower() != "identity":
        raise ProtocolError(415, "cannot read request: content-encoding is not served", hint="send the body plain")
    options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
    return Head(
        method=method,
        target=target,
        minor=minor,
        fields=fields,
        length=read_count(fields, "content-length"),
        inference_length=read_count(fields, "inference-header-content-length"),
        chunked=coding is not None,
        keep_alive="close" not in options if minor else "keep-alive" in options,
        expects_continue=_expects_continue(fields, minor),
    )


def _expects_continue(fields: dict[str, str], minor: int) -> bool:
    expectation = fields.get("expect")
    if expectation is None or minor == 0:  # RFC 9110 10.1.1: ignored in HTTP/1.0
        return False
    if expectation.lower() != "100-continue":
        raise ProtocolError(417, "cannot read request: the only expectation served is 100-continue")
    return True


def too_large(length: int, limit: int) -> ProtocolError:
    """The refusal of a body by its announced length."""
    return ProtocolError(413, f"cannot take body: {length} bytes announced, at most {limit} are taken")
