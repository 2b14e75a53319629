"""One file through the broker, in blocks that are asked for: docs/spec/link.md 7.

Blocks come with QoS 0 and may be lost; what has not come in time is asked for again. Not more than ``_AHEAD`` blocks
are asked for and not taken, so that the broker never has more for us than that. Nothing is believed of a block but its
bytes at their place: core judges.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from agent.base.errors import PeerError
from agent.link.connection import LOST
from agent.link.sources import Pace, SourceError
from agent.wire.blocks import BLOCK_BYTES, Block, Question, parse_block
from agent.wire.topics import BLOCKS_UP

_AHEAD = 8
_AT_ONCE = 4
_LONGEST_S = 60.0
#: mosquitto and others tell that nobody listens: MQTT 5 3.4.2.1.
_NOBODY = 0x10
_REFUSED = 0x80

#: Publishes on a topic of the device; the future holds the reason code, where the broker is asked for one.
Say = Callable[[str, bytes], asyncio.Future[int]]


@dataclass(frozen=True, slots=True)
class BlockPatience:
    """When a block is asked for again, and after how many times without any answer nobody is there."""

    again_s: float = 5.0
    times: int = 4


@dataclass(slots=True, eq=False)
class _Transfer:
    came: dict[int, Block] = field(default_factory=dict)
    trouble: str = ""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    first: int = 0


class Blocks:
    """All transfers through the connection that there is now. ``say`` publishes, LOST without a connection."""

    def __init__(self, say: Say, patience: BlockPatience) -> None:
        self._say = say
        self._patience = patience
        self._transfers: dict[str, _Transfer] = {}
        self._turn = asyncio.Lock()

    def take(self, xfer: str, payload: bytes) -> None:
        """A block came. What nobody waits for, or no more, is dropped."""
        transfer = self._transfers.get(xfer)
        if transfer is None:
            return
        try:
            block = parse_block(payload)
        except PeerError:
            return
        window = range(transfer.first, transfer.first + _AHEAD * BLOCK_BYTES)
        if block.trouble is not None:
            transfer.trouble = block.trouble
        elif block.offset in window and len(transfer.came) < _AHEAD:
            transfer.came.setdefault(block.offset, block)
        transfer.news.set()

    async def fetch(
        self, path: str, offset: int, end: int, length: int | None, pace: Pace
    ) -> AsyncGenerator[memoryview, None]:
        """The bytes from ``offset`` on, none beyond ``end``. SourceError as ``mirror.fetch`` has it."""
        async with self._turn:  # one after the other: what is under way is bounded
            xfer = secrets.token_hex(8)
            transfer = self._transfers[xfer] = _Transfer(first=offset)
            pull = _Pull(self._say, self._patience, xfer, path, transfer, end, length)
            try:
                while (data := await pull.next()) is not None:
                    await pace.spend(len(data))
                    yield memoryview(data)
            finally:
                del self._transfers[xfer]


class _Pull:
    """The asking side of one transfer: what has been asked for, and what is to be asked for again."""

    def __init__(
        self,
        say: Say,
        patience: BlockPatience,
        xfer: str,
        path: str,
        transfer: _Transfer,
        end: int,
        length: int | None,
    ) -> None:
        self._say = say
        self._times = patience.times
        self._least_s = self._again_s = patience.again_s
        self._took_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._xfer = xfer
        self._path = path
        self._transfer = transfer
        self._end = end
        self._length = length
        self._asked = transfer.first  # all before it has been asked for
        self._ahead = _AT_ONCE
        self._answers: set[asyncio.Future[int]] = set()

    async def next(self) -> bytes | None:
        """The next bytes in order; None at the end."""
        transfer = self._transfer
        if self._length is not None and transfer.first >= min(self._length, self._end):
            return None
        self._ask_ahead()
        await self._wait_for_first()
        block = transfer.came.pop(transfer.first)
        if self._length not in (None, block.total):
            raise SourceError("unreachable", f"the file has {block.total} bytes, {self._length} belong there")
        self._length = block.total
        if len(block.data) != min(BLOCK_BYTES, block.total - block.offset):
            raise SourceError("unreachable", "a block came that is too short")
        data = block.data[: self._end - block.offset]
        transfer.first += len(data)
        self._ahead = min(_AHEAD, self._ahead + 1)
        return data or None

    async def _wait_for_first(self) -> None:
        transfer, silent = self._transfer, 0
        began, here = self._loop.time(), len(transfer.came)
        end = began + self._again_s
        while transfer.first not in transfer.came:
            transfer.news.clear()
            try:
                await asyncio.wait_for(transfer.news.wait(), max(0.0, end - self._loop.time()))
            except asyncio.TimeoutError:
                silent += 1
                if silent >= self._times:
                    raise SourceError("unreachable", "nobody gives blocks through the broker") from None
                # The way may be slow and not lossy: later and later, and less at a time.
                self._again_s, self._ahead = min(_LONGEST_S, 2 * self._again_s), 1
                self._ask_again()
                began = self._loop.time()
                end = began + self._again_s
            self._look()
            if len(transfer.came) > here:
                end, here = self._loop.time() + self._again_s, len(transfer.came)
        self._took_s = max(self._loop.time() - began, 0.75 * self._took_s)
        self._again_s = min(_LONGEST_S, max(self._least_s, 4 * self._took_s))

    def _look(self) -> None:
        if self._transfer.trouble == "not_found":
            raise SourceError("not_found", "whoever gives blocks does not have it")
        if self._transfer.trouble:
            raise SourceError("unreachable", "whoever gives blocks has too much to do")
        for answer in [answer for answer in self._answers if answer.done()]:
            self._answers.discard(answer)
            code = answer.result()
            if code == LOST:
                raise SourceError("unreachable", "there is no connection to the broker")
            if code == _NOBODY:
                raise SourceError("unreachable", "nobody gives blocks through the broker")
            if code >= _REFUSED:
                raise SourceError("unreachable", f"the broker refuses questions for blocks (0x{code:02x})")

    def _ask_ahead(self) -> None:
        """Ask for what has not been asked for yet, in strides, up to the end of the window."""
        known = max(1, self._end if self._length is None else min(self._end, self._length))
        last = min(known, self._transfer.first + self._ahead * BLOCK_BYTES)
        while self._asked < last:
            count = min(_AT_ONCE, -(-(last - self._asked) // BLOCK_BYTES))
            whole = count == _AT_ONCE or self._asked + count * BLOCK_BYTES >= known
            if not whole and self._asked > self._transfer.first:
                return  # a whole stride with one question, while there is something to wait for
            self._question(self._asked, count)

    def _ask_again(self) -> None:
        """What is missing of what was asked for, from the first on: as few questions as there are gaps."""
        first, came = self._transfer.first, self._transfer.came
        missing = [offset for offset in range(first, self._asked, BLOCK_BYTES) if offset not in came]
        while missing:
            count = 1
            while count < min(len(missing), _AT_ONCE) and missing[count] == missing[0] + count * BLOCK_BYTES:
                count += 1
            self._question(missing[0], count)
            missing = missing[count:]

    def _question(self, offset: int, count: int) -> None:
        answer = self._say(BLOCKS_UP, Question(self._xfer, self._path, offset, count).encode())
        self._answers.add(answer)
        answer.add_done_callback(lambda _: self._transfer.news.set())
        self._asked = max(self._asked, offset + count * BLOCK_BYTES)
