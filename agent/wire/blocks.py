"""Blocks of a delivery through the broker: what a device asks for, and what it is given. docs/spec/link.md 7. Pure.

Neither is signed: a block is judged by whoever wanted it, and a question reveals no more than a mirror's log would.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from agent.base.errors import PeerError
from agent.wire.topics import is_name

#: With what surrounds it, a block stays below the 64 KiB of a payload.
BLOCK_BYTES = 48 << 10
MOST_COUNT = 16
MOST_QUESTION_BYTES = 4096
_MOST_PATH = 1024
_MOST_HEAD_BYTES = 256
_MOST_OFFSET = 1 << 50

Trouble = Literal["not_found", "busy"]


@dataclass(frozen=True, slots=True)
class Question:
    """``count`` blocks of the file at ``path`` from ``offset`` on, to be answered on ``dn/blk/<xfer>``."""

    xfer: str
    path: str
    offset: int
    count: int

    def encode(self) -> bytes:
        """As it is published on ``up/blk``."""
        document = {"xfer": self.xfer, "path": self.path, "offset": self.offset, "count": self.count}
        return json.dumps(document, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of a file of ``total`` bytes from ``offset`` on; or why there are none."""

    offset: int
    total: int
    data: bytes
    trouble: Trouble | None = None

    def encode(self) -> bytes:
        """As it is published: a line of JSON, then the bytes."""
        head: dict[str, Any] = {"offset": self.offset, "total": self.total}
        if self.trouble is not None:
            head = {"error": self.trouble}
        return json.dumps(head, separators=(",", ":")).encode() + b"\n" + self.data


def parse_question(data: bytes) -> Question:
    """A question as it came. PeerError, whatever the bytes are."""
    if len(data) > MOST_QUESTION_BYTES:
        raise PeerError(f"cannot read a question for blocks: more than {MOST_QUESTION_BYTES} bytes")
    document = _object(data)
    xfer, path = document.get("xfer"), document.get("path")
    if not isinstance(xfer, str) or not is_name(xfer) or not isinstance(path, str) or not 0 < len(path) <= _MOST_PATH:
        raise PeerError("cannot read a question for blocks: no name of a transfer, or no path")
    offset, count = _number(document, "offset"), _number(document, "count")
    if not 1 <= count <= MOST_COUNT:
        raise PeerError(f"cannot read a question for blocks: 1 to {MOST_COUNT} at a time")
    return Question(xfer, path, offset, count)


def parse_block(data: bytes) -> Block:
    """A block as it came. PeerError, whatever the bytes are."""
    head, _, rest = data.partition(b"\n")
    if len(head) > _MOST_HEAD_BYTES or len(rest) > BLOCK_BYTES:
        raise PeerError("cannot read a block: too long")
    document = _object(head)
    trouble = document.get("error")
    if trouble in ("not_found", "busy"):
        return Block(0, 0, b"", trouble)
    block = Block(_number(document, "offset"), _number(document, "total"), rest)
    if block.offset + len(rest) > block.total:
        raise PeerError("cannot read a block: more bytes than its file has")
    return block


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PeerError("cannot read JSON") from error
    if not isinstance(document, dict):
        raise PeerError("cannot read JSON: an object is expected")
    return document


def _number(document: dict[str, Any], name: str) -> int:
    value = document.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_OFFSET:
        raise PeerError(f"cannot read JSON: '{name}' must be a number of bytes or blocks")
    return value
