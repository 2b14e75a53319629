"""From core to the broker: what waits to be published, and what the broker has said to it.

``Pending`` is pure: which message goes next, bounded, in order for each topic. ``Publisher`` moves messages and
telemetry through one connection, answers and states before telemetry.

Invariants: a message leaves ``Pending`` when the broker has taken it or a later one stands for it; what was left out
for room and has to be confirmed is fetched from core again (``left_out``); a refused publish is told, and tried again
later and later, and never holds up other topics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent.link.connection import LOST, Connection
from agent.link.outbox import Batch, Outbox
from agent.link.settings import Message

_LOG = logging.getLogger("edge_agent.link")

MOST_MESSAGES = 512
MOST_BYTES = 4 << 20
#: Nobody waits for an answer for longer.
ANSWER_S = 60.0
#: Telemetry under way at a time: on a slow link an answer waits behind it.
_TELEMETRY_WINDOW = 2
_RETRY_S = (5.0, 600.0)
_RANK = {"rpc": 0, "state": 1, "alert": 2}


@dataclass(slots=True, eq=False)
class Item:
    """A message that waits or is under way."""

    message: Message
    serial: int
    since: float
    flying: bool = False


class Pending:
    """Messages that the broker does not have yet. ``now`` is in seconds of any one clock."""

    def __init__(self) -> None:
        self._items: dict[int, Item] = {}
        self._ids: set[int | str] = set()
        self._serial = 0
        self._bytes = 0
        #: By topic: when it may be tried again after a refusal, and how long it was paused.
        self._paused: dict[str, tuple[float, float]] = {}
        #: Something that has to be confirmed was left out for room.
        self.left_out = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Enough to fetch what was left out. Not emptiness: what the broker refuses may stay for ever."""
        return len(self._items) < MOST_MESSAGES // 2 and self._bytes < MOST_BYTES // 2

    def put(self, messages: Iterable[Message], now: float) -> None:
        """Take messages over, in order; not what is here already. Of a retained topic only the latest stays."""
        for message in messages:
            if message.id in self._ids:
                continue
            if message.retain:
                self._drop(item for item in self._items.values() if item.message.topic == message.topic)
            if self._full(message) and not self._make_room(message):
                self.left_out = self.left_out or message.confirm
                continue
            self._serial += 1
            self._items[self._serial] = Item(message, self._serial, now)
            self._ids.add(message.id)
            self._bytes += len(message.payload)

    def _full(self, message: Message) -> bool:
        return len(self._items) >= MOST_MESSAGES or self._bytes + len(message.payload) > MOST_BYTES

    def _make_room(self, message: Message) -> bool:
        """For what core would not give again, something goes that it would."""
        if message.confirm or message.kind == "rpc":
            return False
        found = [item for item in self._items.values() if item.message.confirm and not item.flying]
        self.left_out = self.left_out or bool(found)
        self._drop(found[-8:])
        return bool(found) and not self._full(message)

    def _drop(self, items: Iterable[Item]) -> None:
        for item in list(items):
            if not item.flying:
                self.remove(item)

    def remove(self, item: Item) -> None:
        """It is done with."""
        if self._items.pop(item.serial, None) is not None:
            self._bytes -= len(item.message.payload)
            self._ids.discard(item.message.id)

    def take(self, now: float) -> Item | None:
        """The next message to publish: answers, states, alerts, each in order; None while there is none."""
        self._drop(item for item in self._items.values() if item.message.kind == "rpc" and now - item.since > ANSWER_S)
        ready = (item for item in self._items.values() if not item.flying and self._may(item.message.topic, now))
        best = min(ready, key=lambda item: (_RANK.get(item.message.kind, 1), item.serial), default=None)
        if best is not None:
            best.flying = True
        return best

    def _may(self, topic: str, now: float) -> bool:
        return topic not in self._paused or self._paused[topic][0] <= now

    def taken(self, item: Item) -> None:
        """The broker has it."""
        self.remove(item)
        self._paused.pop(item.message.topic, None)

    def lost(self, item: Item) -> None:
        """The connection ended before the broker answered: again on the next, unless a later one stands for it."""
        item.flying = False
        if item.message.retain and self._superseded(item):
            self.remove(item)

    def refused(self, item: Item, now: float) -> float:
        """The broker does not take it; the seconds until it is tried again."""
        item.flying = False
        if item.message.kind == "rpc" or self._superseded(item):
            self.remove(item)
        if len(self._paused) > MOST_MESSAGES:
            self._paused.clear()  # topics of jobs long gone
        _, pause_s = self._paused.get(item.message.topic, (0.0, 0.0))
        pause_s = min(max(_RETRY_S[0], 2 * pause_s), _RETRY_S[1])
        self._paused[item.message.topic] = now + pause_s, pause_s
        return pause_s

    def _superseded(self, item: Item) -> bool:
        """A later state of the same thing is here: the earlier one must not come after it."""
        return any(
            other.serial > item.serial and other.message.topic == item.message.topic for other in self._items.values()
        )

    def clear(self) -> None:
        """Forget everything: the messages were for another device, or for nobody."""
        self._items.clear()
        self._ids.clear()
        self._paused.clear()
        self._bytes = 0
        self.left_out = False


@dataclass(slots=True)
class Outcome:
    """What publishing has told so far, for the state that core gets."""

    changed: Callable[[], None]
    refused: dict[str, int] = field(default_factory=dict)

    def note(self, topic: str, code: int) -> None:
        """The broker has refused a publish."""
        if self.refused.get(topic) != code:
            _LOG.error("the broker refuses what is published on %s: reason code 0x%02x", topic, code)
        self.refused[topic] = code
        self.changed()

    def told(self) -> str:
        """The refusals in words, empty without any."""
        return "; ".join(
            f"the broker refuses {topic} (0x{code:02x})" for topic, code in sorted(self.refused.items())[:3]
        )


class Publisher:
    """Publishes over one connection until it ends. ``taken`` gets each message that the broker has taken.

    ``telemetry_rate``: bytes of telemetry a second, 0 = as fast as it goes. What an outage has kept is handed over
    without haste, so that apps on the device, and a fleet that comes back together, do not feel it.
    """

    def __init__(
        self,
        connection: Connection,
        topic: Callable[[str], str],
        pending: Pending,
        outbox: Outbox,
        outcome: Outcome,
        taken: Callable[[Message], None],
        telemetry_rate: float = 0.0,
    ) -> None:
        self._connection = connection
        self._topic = topic
        self._pending = pending
        self._outbox = outbox
        self._outcome = outcome
        self._taken = taken
        self._telemetry_rate = telemetry_rate
        self._loop = asyncio.get_running_loop()
        self._flying: list[Batch] = []
        self._telemetry_after = 0.0
        self._telemetry_pause_s = 0.0
        self._scheduled = False

    def wake(self) -> None:
        """There may be something to publish."""
        if not self._scheduled and not self._connection.ended.done():
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        while not self._connection.ended.done() and self._connection.under_way < self._connection.window:
            if not self._publish_message() and not self._publish_telemetry():
                return

    def _publish_message(self) -> bool:
        item = self._pending.take(self._loop.time())
        if item is None:
            return False
        message = item.message
        answer = self._connection.publish(self._topic(message.topic), message.payload, retain=message.retain)
        answer.add_done_callback(lambda done: self._message_answered(item, done.result()))
        return True

    def _message_answered(self, item: Item, code: int) -> None:
        topic = item.message.topic
        if code == LOST:
            self._pending.lost(item)
        elif code < 0x80:
            self._pending.taken(item)
            self._outcome.refused.pop(topic, None)
            self._taken(item.message)
            self.wake()
        else:
            self._outcome.note(topic, code)
            self._loop.call_later(self._pending.refused(item, self._loop.time()), self.wake)
            self.wake()

    def _publish_telemetry(self) -> bool:
        if len(self._flying) >= _TELEMETRY_WINDOW or self._loop.time() < self._telemetry_after:
            return False
        batch = self._outbox.next_batch(self._flying)
        if batch is None:
            return False
        self._flying.append(batch)
        if self._telemetry_rate:
            pause_s = len(batch.payload) / self._telemetry_rate
            self._telemetry_after = self._loop.time() + pause_s
            self._loop.call_later(pause_s, self.wake)
        answer = self._connection.publish(self._topic(f"up/tel/{batch.stream}"), batch.payload, retain=False)
        answer.add_done_callback(lambda done: self._telemetry_answered(batch, done.result()))
        return True

    def _telemetry_answered(self, batch: Batch, code: int) -> None:
        self._flying.remove(batch)
        topic = f"up/tel/{batch.stream}"
        if code == LOST:
            return
        if code < 0x80:
            self._outbox.delivered(batch)
            self._outcome.refused.pop(topic, None)
            self._telemetry_pause_s = 0.0
            self.wake()
            return
        self._outcome.note(topic, code)
        pause_s = self._telemetry_pause_s = min(max(_RETRY_S[0], 2 * self._telemetry_pause_s), _RETRY_S[1])
        self._telemetry_after = self._loop.time() + pause_s
        self._loop.call_later(pause_s, self.wake)
