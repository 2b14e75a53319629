"""Gives devices the files of a repository through the broker, block by block, as they ask: docs/spec/link.md 7.

Whoever asks is a device by the word of the broker alone, which is enough: the files are what every mirror gives to
everybody. Invariants: nothing outside of the folder is read, whatever the path; devices take turns, block by block, and
none has more waiting than ``_MOST_WAITING``; no more than the rate goes out, to all of them together.
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from agent.base.errors import ConfigError, NotFoundError, PeerError
from agent.fleet.broker import Received
from agent.wire.blocks import BLOCK_BYTES, Block, Trouble, parse_question
from agent.wire.topics import BLOCKS_DOWN, BLOCKS_UP, ROOT, device_topic, parse_topic

_PARTS = ("metadata", "targets")
_MOST_WAITING = 64
_MOST_DEVICES = 4096
_IDLE_S = 0.5


class Wire(Protocol):
    """What this needs of the connection to the broker."""

    def receive(self, timeout_s: float) -> list[Received]: ...

    def send(self, topic: str, payload: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Given:
    """A block that went out: to whom, of what, and how far that is."""

    device: str
    path: str
    offset: int
    count: int
    total: int


@dataclass(frozen=True, slots=True)
class _Due:
    xfer: str
    path: str
    offset: int


class Giver:
    """``run`` until ``end`` says so. ``told`` is called for each block that went out."""

    def __init__(
        self,
        folder: Path,
        tenant: str,
        wire: Wire,
        *,
        bytes_per_s: float = 0.0,
        told: Callable[[Given], None] = lambda given: None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """ConfigError when the folder is no repository."""
        self._folder = folder.resolve()
        if not (self._folder / _PARTS[0]).is_dir():
            raise ConfigError(
                f"cannot serve {folder}: it has no folder 'metadata'", hint="name the folder that 'publish' writes to"
            )
        self._tenant = tenant
        self._wire = wire
        self._rate = bytes_per_s
        self._told = told
        self._monotonic = monotonic
        self._sleep = sleep
        self._due_at = 0.0
        self._waiting: OrderedDict[str, list[_Due]] = OrderedDict()

    @property
    def filter(self) -> str:
        """The topic filter under which devices ask."""
        return f"{ROOT}/{self._tenant}/+/{BLOCKS_UP}"

    def run(self, end: Callable[[], bool]) -> None:
        """Hear and give, one block after the other."""
        while not end():
            for message in self._wire.receive(0.0 if self._waiting else _IDLE_S):
                self.hear(message.topic, message.payload)
            self.give()

    def hear(self, topic: str, payload: bytes) -> None:
        """A question came. What is none is passed over: whoever asked rightly asks again."""
        found = parse_topic(topic)
        if found is None or found.tenant != self._tenant or found.rest != BLOCKS_UP or "/" in found.device:
            return
        try:
            question = parse_question(payload)
        except PeerError:
            return
        waiting = self._waiting.get(found.device, [])
        due = [_Due(question.xfer, question.path, question.offset + n * BLOCK_BYTES) for n in range(question.count)]
        fresh = [item for item in due if item not in waiting]
        if len(waiting) + len(fresh) > _MOST_WAITING or (not waiting and len(self._waiting) >= _MOST_DEVICES):
            self._say(found.device, question.xfer, "busy")
            return
        if fresh:
            self._waiting.setdefault(found.device, []).extend(fresh)

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a block."""
        return bool(self._waiting)

    def give(self) -> None:
        """One block, to the device whose turn it is."""
        if not self._waiting:
            return
        device, waiting = self._waiting.popitem(last=False)
        due = waiting.pop(0)
        if waiting:
            self._waiting[device] = waiting
        try:
            data, total = self._read(due.path, due.offset)
        except NotFoundError:
            self._waiting.pop(device, None)
            self._say(device, due.xfer, "not_found")
            return
        if not data and due.offset:
            return  # asked for in advance of knowing how long it is
        self._wait_for_turn(len(data))
        payload = Block(due.offset, total, data).encode()
        if self._wire.send(device_topic(self._tenant, device, BLOCKS_DOWN + due.xfer), payload):
            self._told(Given(device, due.path, due.offset, len(data), total))

    def _say(self, device: str, xfer: str, trouble: Trouble) -> None:
        payload = Block(0, 0, b"", trouble).encode()
        self._wire.send(device_topic(self._tenant, device, BLOCKS_DOWN + xfer), payload)

    def _wait_for_turn(self, count: int) -> None:
        if not self._rate:
            return
        now = self._monotonic()
        self._due_at = max(self._due_at, now)
        self._sleep(self._due_at - now)
        self._due_at += count / self._rate

    def _read(self, path: str, offset: int) -> tuple[bytes, int]:
        """A block of a file below the folder, and how long the file is. NotFoundError for anything else."""
        missing = NotFoundError("there is no such file")
        try:
            parts = unquote(path, errors="strict").split("/")
            if parts[0] not in _PARTS or len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
                raise missing
            file = self._folder.joinpath(*parts).resolve(strict=True)
            if not file.is_relative_to(self._folder):
                raise missing
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (OSError, ValueError, RuntimeError) as error:  # no UTF-8 or a NUL; before Python 3.13 a circle of links
            raise missing from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise missing
            return os.pread(descriptor, BLOCK_BYTES, offset), status.st_size
        except OSError as error:
            raise missing from error
        finally:
            os.close(descriptor)
