"""The link's errand: asks core what it wants, and brings it, from mirrors or through the broker.

Link chooses nothing: core names path, length and offset, writes what is brought, and judges it. Bytes that were read
are handed over at once, so a cut, wherever it is, costs what was under way and no more; the next try begins where core
says.

``not_found`` has a meaning: of a root, that there is no newer one. For those the first mirror that answers counts, and
not the others: they may lag, or lead, and files of two states of a repository do not fit together. Of anything else it
is said when all mirrors say so. Blocks through the broker are for when no mirror answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from agent.base.errors import ConfigError, DamagedError
from agent.link.backoff import Draw
from agent.link.blocks import BlockPatience, Blocks, Say
from agent.link.core_client import CoreAbsentError, CoreMovedError, CoreRefusalError
from agent.link.identity import checking_context
from agent.link.mirror import Asked, fetch
from agent.link.progress import Progress
from agent.link.sources import BLOCKS, Pace, SourceError, Sources, Word
from agent.link.tasks import end
from agent.link.wanted import Listing, Put, Wanted
from agent.link.web import Patience

_LOG = logging.getLogger("edge_agent.link")

POLL_S = 55.0
_SLACK_S = 120.0
_RETRY_S = (0.1, 10.0)
_GONE, _REFUSED = 404, 403
_METADATA = "metadata/"
_ROOT = re.compile(r"metadata/\d+\.root\.json")
#: Nobody brings a byte for so much of a want's time, or so long: core is told, who may want it again.
_SHARE, _LONGEST_S = 0.75, 900.0
#: A connection that brought so much was no failure, however it ended.
_SOME_BYTES = 16 << 10
#: Whoever needs something new is not made to wait for what went wrong with something else.
_FIRST_PAUSE_S = 1.0
#: Without any place to ask; and how long somebody else is left to it.
_NOBODY_S, _POLL_SOURCES_S, _OTHERS_S = 10.0, 1.0, 5.0


class Wanting(Protocol):
    """What this needs of core. Each call raises CoreAbsentError, CoreRefusalError or DamagedError."""

    async def wants(self, known: int | None, wait_s: float) -> Listing: ...

    async def put(self, want: str, offset: int, data: memoryview | bytes, *, last: bool) -> Put:
        """Raises CoreMovedError too."""
        ...

    async def failed(self, want: str, code: Word, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Patiences:
    """How long slow mirrors, absent givers of blocks and nobody at all are borne with."""

    mirror: Patience = field(default_factory=Patience)
    blocks: BlockPatience = field(default_factory=BlockPatience)
    longest_s: float = _LONGEST_S


@dataclass(slots=True)
class _Errand:
    """A want that is being served: how far it is, and when so many bytes were taken that they count."""

    want: Wanted
    offset: int
    since: float
    gained: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a place failed: the words alone, an error would keep what was under way in memory."""

    code: Word
    text: str


class _EndedError(Exception):
    """The want is done with: it has its bytes, or core has refused or withdrawn it."""


class Delivery:
    """``run`` until cancelled. ``say`` publishes for the device, ``take_block`` gets what comes of it."""

    def __init__(
        self,
        core: Wanting,
        say: Say,
        progress: Progress,
        patiences: Patiences | None = None,
        draw: Draw = random.uniform,
    ) -> None:
        self._core = core
        self._progress = progress
        self._patiences = patiences or Patiences()
        self._loop = asyncio.get_running_loop()
        self._sources = Sources(draw)
        self._pace = Pace(self._loop.time)
        self._blocks = Blocks(say, self._patiences.blocks)
        self._errands: dict[str, asyncio.Task[None]] = {}
        self._ca_file = ""
        self._tls: ssl.SSLContext | None = None
        self._trouble = ""
        self._doubts: int | None = None
        #: Who brought metadata last that core has taken.
        self._vouched = ""

    def state(self) -> dict[str, str | int]:
        """How it goes, for core: how much is being fetched, and what went wrong last."""
        under_way = sum(not errand.done() for errand in self._errands.values())
        return {"fetching": under_way, "trouble": self._trouble[:200]}

    def take_block(self, xfer: str, payload: bytes) -> None:
        """A block came from the broker."""
        self._blocks.take(xfer, payload)

    async def run(self) -> None:
        """Ask for wants and serve them."""
        known, pause_s = None, _RETRY_S[0]
        try:
            while True:
                self._progress.expect("delivery", POLL_S + pause_s + _SLACK_S)
                try:
                    listing = await self._core.wants(known, POLL_S)
                except (CoreAbsentError, CoreRefusalError, DamagedError):
                    known = None
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _RETRY_S[1])
                else:
                    known, pause_s = listing.version, _RETRY_S[0]
                    self._follow(listing)
        finally:
            await end(*self._errands.values())

    def _follow(self, listing: Listing) -> None:
        """Serve what is wanted, and nothing else."""
        self._pace.limit(listing.rate_kib_s * 1024.0)
        if self._doubts is not None and listing.doubts > self._doubts and self._vouched:
            _LOG.warning("what %s brought is not believed", self._vouched)
            self._sources.refused(self._vouched, self._loop.time())
        self._doubts = listing.doubts
        self._sources.configure([*listing.mirrors, *([BLOCKS] if listing.blocks else [])])
        if listing.ca_file != self._ca_file or not listing.wants:
            self._ca_file, self._tls = listing.ca_file, None  # it takes megabytes, and is needed seldom
        wanted = {want.id: want for want in listing.wants}
        for name in [name for name in self._errands if name not in wanted]:
            self._errands.pop(name).cancel()
        for name, want in wanted.items():
            if name not in self._errands or self._errands[name].done():
                self._errands[name] = self._loop.create_task(self._serve(want))

    async def _serve(self, want: Wanted) -> None:
        errand = _Errand(want, want.offset, self._loop.time())
        try:
            with contextlib.suppress(_EndedError):
                code, text = await self._bring(errand)
                while await self._brought_by_another(errand):
                    code, text = await self._bring(errand)
                _LOG.warning("%s cannot be brought: %s", want.path, text)
                self._trouble = text
                await self._core.failed(want.id, code, text)
        except (CoreAbsentError, CoreRefusalError, DamagedError) as error:
            _LOG.info("%s is given up: %s", want.path, error)
        except Exception as error:  # noqa: BLE001 - whatever a mirror sent, jobs and telemetry must not end with it
            _LOG.error("the delivery of %s failed", want.path, exc_info=error)

    async def _brought_by_another(self, errand: _Errand) -> bool:
        """Somebody with a stick may be at it: then it is not for us to give up."""
        listing = await self._core.wants(None, 0.0)
        offset = next((want.offset for want in listing.wants if want.id == errand.want.id), None)
        if offset is None:
            raise _EndedError
        if offset <= errand.offset:
            return False
        errand.offset, errand.since = offset, self._loop.time()
        errand.absent.clear()
        await asyncio.sleep(_OTHERS_S)
        return True

    async def _bring(self, errand: _Errand) -> tuple[Word, str]:
        """Ask one place after the other. Returns why nobody brings it."""
        want, failures = errand.want, dict[str, _Failure]()
        patience_s = min(want.within_s * _SHARE, self._patiences.longest_s)
        if not self._sources.names:
            patience_s = min(patience_s, _NOBODY_S)
        while True:
            chosen = self._sources.choose(errand.absent, self._loop.time())
            left_s = errand.since + patience_s - self._loop.time()
            if not self._sources.names and left_s > 0:
                await asyncio.sleep(min(left_s, _POLL_SOURCES_S))  # somebody may bring it by hand, or name a mirror
                continue
            if chosen is None or (failures and chosen[1] > max(0.0, left_s)):
                return _summary(failures, self._sources.names)
            name, pause_s = chosen
            await asyncio.sleep(pause_s if failures else min(pause_s, _FIRST_PAUSE_S))
            errand.gained = 0
            try:
                await self._from(name, errand)
            except SourceError as error:
                failures[name] = _Failure(error.code, str(error))
                if error.code == "not_found":
                    errand.absent |= {name, BLOCKS}
                    if _ROOT.fullmatch(want.path):
                        return error.code, f"{name}: {error}"
                elif errand.gained < _SOME_BYTES:
                    _LOG.info("%s does not bring %s: %s", name, want.path, error)
                    self._sources.failed(name, self._loop.time())
                    self._trouble = f"{name}: {error}"

    async def _from(self, name: str, errand: _Errand) -> None:
        """Bring what is missing from one place. Returns when core wants another offset than was under way."""
        want = errand.want
        source = self._open(name, errand)
        async with contextlib.aclosing(source):
            async for piece in source:
                before = errand.offset
                await self._put(name, errand, piece, last=False)
                if errand.offset != before + len(piece):
                    return
        if want.length is None:
            await self._put(name, errand, b"", last=True)

    def _open(self, name: str, errand: _Errand) -> AsyncGenerator[memoryview, None]:
        want = errand.want
        end = want.most + 1 if want.length is None else want.length
        if want.length is None:
            errand.offset = 0  # what is small is begun anew, whoever began it
        if name == BLOCKS:
            return self._blocks.fetch(want.path, errand.offset, end, want.length, self._pace)
        asked = Asked(name, want.path, errand.offset, end, want.length, errand.tags.get(name, ""))
        return self._mirror(asked, errand)

    async def _mirror(self, asked: Asked, errand: _Errand) -> AsyncGenerator[memoryview, None]:
        try:
            if self._tls is None:
                self._tls = checking_context(self._ca_file)
        except ConfigError as error:
            raise SourceError("unreachable", str(error)) from error
        try:
            async with contextlib.aclosing(fetch(asked, self._tls, self._patiences.mirror, self._pace)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            errand.tags[asked.base] = asked.tag

    async def _put(self, name: str, errand: _Errand, piece: memoryview | bytes, *, last: bool) -> None:
        """Hand bytes to core; waits for a core that is absent, until what it wants has changed."""
        pause_s = _RETRY_S[0]
        while True:
            try:
                put = await self._core.put(errand.want.id, errand.offset, piece, last=last)
            except CoreAbsentError:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_S[1])
            except CoreMovedError as moved:
                here = moved.offset - errand.offset
                errand.offset = moved.offset
                if not 0 < here < len(piece):
                    return
                piece = piece[here:]  # an answer was lost, the bytes were not
            except CoreRefusalError as error:
                if error.status == _REFUSED:
                    _LOG.error("%s from %s is refused: %s", errand.want.path, name, error)
                    self._sources.refused(name, self._loop.time())
                elif error.status != _GONE:
                    _LOG.warning("%s: %s", errand.want.path, error)
                raise _EndedError from error
            else:
                errand.offset = put.offset
                errand.gained += len(piece)
                if errand.gained >= _SOME_BYTES:
                    errand.since = self._loop.time()
                    self._sources.worked(name)
                if put.done:
                    self._trouble = ""
                    if errand.want.path.startswith(_METADATA):
                        self._vouched = name
                    raise _EndedError
                return


def _summary(failures: Mapping[str, _Failure], names: tuple[str, ...]) -> tuple[Word, str]:
    """Why nobody brings it: absent only where all that answered say so."""
    if not names:
        return "unreachable", "no mirror is configured, and blocks through the broker are off"
    codes = {failure.code for failure in failures.values()}
    code: Word = "unreachable"
    if codes == {"not_found"}:
        code = "not_found"
    elif "too_slow" in codes:
        code = "too_slow"
    return code, "; ".join(f"{name}: {failure.text}" for name, failure in failures.items())
