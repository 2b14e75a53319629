"""What core has to say to the fleet, until link has taken it: docs/spec/link.md 6.3. No disk, no network.

States are kept by topic, the latest only; answers and telemetry in order of arrival and bounded. A message with
``confirm`` stays until the broker has it, retained ones stay for a link that comes anew. One link asks at a time: a
cursor names this start of core and the last message given, so that a cursor of before begins again.

Not thread-safe but for ``wake``: everything runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["state", "rpc", "alert", "tel"]

#: Given at once, so that one answer stays far below a megabyte.
_BATCH_BYTES = 256 << 10
_MOST_ANSWERS = 256
_MOST_RECORDS = 2048


@dataclass(frozen=True, slots=True)
class Message:
    """One thing to say. ``record`` with its ``stream`` stands in place of ``payload`` for telemetry."""

    id: int
    #: ``id`` under which link knows it: never used again, not even by a later start.
    name: str
    topic: str
    kind: Kind
    retain: bool = False
    confirm: bool = False
    payload: bytes = b""
    stream: str = ""
    record: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """As link gets it."""
        found: dict[str, Any] = {
            "id": self.name,
            "topic": self.topic,
            "kind": self.kind,
            "retain": self.retain,
            "confirm": self.confirm,
        }
        if self.record is not None:
            return found | {"stream": self.stream, "record": dict(self.record)}
        return found | {"payload": base64.b64encode(self.payload).decode()}


class Outgoing:
    """The queue. ``confirmed`` is told of each message with ``confirm`` that the broker has."""

    def __init__(self, boot_nonce: str, confirmed: Callable[[Message], None] = lambda message: None) -> None:
        self._nonce = boot_nonce
        self._confirmed = confirmed
        self._last = 0
        self._states: dict[str, Message] = {}
        self._answers: deque[Message] = deque(maxlen=_MOST_ANSWERS)
        self._records: deque[Message] = deque(maxlen=_MOST_RECORDS)
        self._news = asyncio.Event()
        self._closed = False

    def say(self, topic: str, payload: bytes, *, retain: bool = False, confirm: bool = False) -> None:
        """Let this be the latest on ``topic``. An empty payload ends what was retained there."""
        kind: Kind = "alert" if topic.startswith("up/alert/") else "state"
        self._states[topic] = Message(*self._next(), topic, kind, retain, confirm, payload)

    def drop(self, topic: str) -> None:
        """Say no more on ``topic``."""
        self._states.pop(topic, None)

    def answer(self, payload: bytes) -> None:
        """One answer to a question; the oldest is lost when nobody takes them."""
        self._answers.append(Message(*self._next(), "up/rpc", "rpc", payload=payload))

    def record(self, stream: str, record: Mapping[str, Any]) -> None:
        """One record of telemetry; the oldest is lost when nobody takes them."""
        self._records.append(Message(*self._next(), f"up/tel/{stream}", "tel", stream=stream, record=record))

    def close(self) -> None:
        """Let nobody wait any more: core is stopping."""
        self._closed = True
        self._news.set()

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._news.set()

    def _next(self) -> tuple[int, str]:
        self._last += 1
        self._news.set()
        return self._last, f"{self._nonce[:12]}-{self._last}"

    async def after(self, cursor: str, wait_s: float) -> tuple[str, list[Message]]:
        """What came after ``cursor``, and the new cursor; waits up to ``wait_s`` seconds for the first message."""
        seen = self._seen(cursor)
        self._forget(seen)
        messages = self._later(seen)
        if not messages and wait_s > 0 and not self._closed:
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):  # on Python 3.10 a class of its own
                await asyncio.wait_for(self._news.wait(), wait_s)
            messages = self._later(seen)
        last = messages[-1].id if messages else seen
        return f"{self._nonce}:{last}", messages

    def confirm(self, ids: set[str]) -> None:
        """The broker has these."""
        for topic, message in list(self._states.items()):
            if message.confirm and message.name in ids:
                if message.retain:
                    self._states[topic] = Message(
                        message.id, message.name, topic, message.kind, retain=True, payload=message.payload
                    )
                else:
                    del self._states[topic]
                self._confirmed(message)

    @property
    def unconfirmed(self) -> int:
        """Messages that the broker must have and does not yet."""
        return sum(message.confirm for message in self._states.values())

    def _seen(self, cursor: str) -> int:
        nonce, _, number = cursor.partition(":")
        known = nonce == self._nonce and number.isdecimal() and len(number) < 16
        return min(int(number), self._last) if known else 0

    def _forget(self, seen: int) -> None:
        """Drop what link has taken over."""
        for queue in (self._answers, self._records):
            while queue and queue[0].id <= seen:
                queue.popleft()
        for topic, message in list(self._states.items()):
            taken = message.id <= seen and not message.confirm
            if taken and (not message.retain or not message.payload):
                del self._states[topic]

    def _later(self, seen: int) -> list[Message]:
        every = [*self._states.values(), *self._answers, *self._records]
        found: list[Message] = []
        size = 0
        for message in sorted((message for message in every if message.id > seen), key=lambda message: message.id):
            size += len(message.payload) * 4 // 3 + 512
            if found and size > _BATCH_BYTES:
                break
            found.append(message)
        return found
