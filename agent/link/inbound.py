"""From the broker to core: each message is acknowledged when core has answered for it, and not before.

Invariants: messages of one lane (jobs, the desired state, questions) reach core in the order in which they came;
PUBACKs go out in the order in which the messages came, as MQTT 5 4.6 demands, unless one has been waiting for so long
that the others would stop the connection (``OVERTAKE_S``); what has no verdict is never acknowledged: the broker keeps
it. What is here at a time is bounded: when it is too much, no more is read until some of it is done. By what was agreed
with the broker it would be ``RECEIVE_MAXIMUM`` messages, but mosquitto 2.0 sends as many again with each PUBACK, and
all that it ever sent again with each connect.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from agent.base.errors import AgentError, one_line
from agent.link.connection import RECEIVE_MAXIMUM, Received
from agent.link.core_client import CoreAbsentError, CoreRefusalError, Verdict
from agent.wire.topics import BLOCKS_DOWN, parse_topic

_LOG = logging.getLogger("edge_agent.link")

OVERTAKE_S = 5.0
MOST_MESSAGES = 4 * RECEIVE_MAXIMUM
MOST_BYTES = 64 * RECEIVE_MAXIMUM << 10
_RETRY_S = (0.1, 10.0)
#: Core answers this to what is larger than any message may be; nothing was lost by it.
_TOO_LARGE = 413

#: Hands a message (topic below the device, payload) to core.
HandIn = Callable[[str, bytes], Awaitable[Verdict]]


class Inbound:
    """What came by one connection. ``stop`` drops what has no verdict yet: it will come again.

    ``hold(True)`` is called when nothing more should be read from the connection, ``hold(False)`` when it should again.
    ``block`` gets blocks of a delivery (transfer, payload): core has no part in them.
    """

    def __init__(
        self,
        hand_in: HandIn,
        hold: Callable[[bool], None],
        block: Callable[[str, bytes], None] = lambda xfer, payload: None,
    ) -> None:
        self._hand_in = hand_in
        self._hold = hold
        self._block = block
        self._holding = False
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[str, asyncio.Lock] = {}
        self._unacked: deque[tuple[Received, float]] = deque()
        self._done: set[Received] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._bytes = 0

    def take(self, message: Received) -> None:
        """A message has come."""
        if message.qos:
            self._unacked.append((message, self._loop.time()))
        topic = parse_topic(message.topic)
        if topic is None or not topic.rest.startswith("dn/"):
            _LOG.warning("a message on a topic that is not ours is passed over: %s", one_line(message.topic[:200]))
            self._settle(message)
            return
        if topic.rest.startswith(BLOCKS_DOWN):  # asked for by this process, and asked for again if it is lost
            self._settle(message)
            self._block(topic.rest.removeprefix(BLOCKS_DOWN), message.payload)
            return
        self._bytes += len(message.payload)
        task = self._loop.create_task(self._deliver(message, topic.rest))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, len(message.payload)))
        self._regulate()

    def _regulate(self) -> None:
        """Read on, or do not: between the two bounds as before."""
        load = max(len(self._tasks) / MOST_MESSAGES, self._bytes / MOST_BYTES)
        wanted = load >= 1 or (self._holding and load > 0.5)
        if wanted != self._holding:
            self._holding = wanted
            self._hold(wanted)

    def stop(self) -> None:
        """The connection is over."""
        self._done.clear()
        self._stop_timer()
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[None], size: int) -> None:
        self._tasks.discard(task)
        self._bytes -= size
        self._regulate()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _deliver(self, message: Received, rest: str) -> None:
        lane = self._lanes.setdefault("/".join(rest.split("/")[:2]), asyncio.Lock())  # asyncio's locks are fair
        pause_s = _RETRY_S[0]
        while True:
            async with lane:
                verdict = await self._answer(message, rest)
            if verdict is not None:
                break
            # Core lives and does not take this one. The others of its lane must not wait for it.
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_S[1])
        if verdict.verdict == "refused":
            _LOG.info("%s was refused: %s", rest, verdict.reason)
        self._settle(message)

    async def _answer(self, message: Received, rest: str) -> Verdict | None:
        """Core's verdict, waited for while core is absent; None when core answers with an error."""
        pause_s = _RETRY_S[0]
        while True:
            try:
                return await self._hand_in(rest, message.payload)
            except CoreAbsentError:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_S[1])
            except AgentError as error:
                if isinstance(error, CoreRefusalError) and error.status == _TOO_LARGE:
                    return Verdict("refused", "too_large")
                _LOG.warning("%s has no verdict, and is not acknowledged: %s", rest, error)
                return None

    def _settle(self, message: Received) -> None:
        """Core has answered."""
        if message.qos:
            self._done.add(message)
            self._acknowledge()

    def _acknowledge(self) -> None:
        """Acknowledge what is done, in order; what has been waiting for too long is passed by."""
        self._stop_timer()
        patience = self._loop.time() - OVERTAKE_S
        held: deque[tuple[Received, float]] = deque()
        in_order = True
        for message, since in self._unacked:
            if message in self._done and in_order:
                self._done.discard(message)
                message.ack()
                continue
            held.append((message, since))
            in_order = in_order and (message in self._done or since <= patience)
        self._unacked = held
        if self._done:
            self._timer = self._loop.call_later(OVERTAKE_S, self._acknowledge)
