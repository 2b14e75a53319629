"""One HTTP/1.1 connection over a Unix socket: reads requests, calls their handlers, writes the answers.

Invariants: requests of a connection are served in order, one at a time; while one is handled, no more than one read of
the next is kept; every phase has an absolute time at which ``expire`` ends it; a handler that answers at once runs
wholly inside the read event, without a task.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from agent.base.errors import AgentError, DeadlineError, RefusedError, TryLaterError
from agent.serve.access import Peer
from agent.serve.exchange import NDJSON, Request, Response, error_answer, event_line, last_line, response_head
from agent.serve.framing import RequestParser
from agent.serve.heads import Head, HeadReader, ProtocolError, too_large
from agent.serve.limits import Ledger, Limits
from agent.serve.routes import Match, RouteTable, require
from agent.serve.stream import READ_BYTES, Stream

log = logging.getLogger(__name__)

#: Pipelined requests served before the other connections get their turn.
TURN = 16
#: Reads into one large body before the other connections get their turn.
BODY_READS = 16
#: What is thrown away of a refused body before the connection is closed, so that the peer gets to read why.
LINGER_BYTES = 4 << 20
#: So young, a connection without a request is waited for when the daemon stops.
FRESH_S = 0.1
#: Progress events are dropped while more than this waits for a slow reader.
EVENT_BACKLOG_BYTES = 65536

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"

Phase = Literal["idle", "head", "body", "handling", "writing", "linger", "closed"]


class Owner(Protocol):
    """What a connection needs of its server."""

    loop: asyncio.AbstractEventLoop
    limits: Limits
    table: RouteTable
    ledger: Ledger
    heads: HeadReader
    draining: bool

    def rights(self, peer: Peer) -> frozenset[str]:
        """The peer's rights on this socket."""
        ...

    def answered(self, match: Match | None, status: int) -> None:
        """An answer was given; ``match`` is None when the request matched no route."""
        ...

    def ended(self, connection: Connection) -> None:
        """The connection is closed."""
        ...


class Connection:
    """Owns its socket. The server calls ``open``, ``expire``, ``drain`` and ``abort``; the event loop all else."""

    __slots__ = (
        "_cut_at", "_discard", "_eof", "_head", "_held", "_keep_alive", "_limits", "_match", "_new_until", "_owner",
        "_parser", "_phase", "_refusal", "_request", "_stream", "_streaming", "_task", "_timer", "peer",
    )  # fmt: skip

    def __init__(self, owner: Owner, sock: socket.socket, peer: Peer) -> None:
        self._owner = owner
        self._limits = owner.limits
        self._stream = Stream(owner.loop, sock, self._readable, self._flushed)
        self.peer = peer
        self._parser = RequestParser(owner.heads)
        self._phase: Phase = "idle"
        self._cut_at = time.monotonic() + owner.limits.idle_s
        self._new_until = time.monotonic() + FRESH_S
        self._head: Head | None = None
        self._match: Match | None = None
        self._refusal: AgentError | None = None
        self._request: Request | None = None
        self._task: asyncio.Future[Response] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive = True
        self._eof = self._streaming = False
        self._held = 0  # bytes of this connection in the ledger
        self._discard = 0  # bytes still thrown away while lingering

    # Life, as the server sees it.

    def open(self) -> None:
        """Start reading."""
        self._stream.resume()

    def expire(self, now: float) -> None:
        """End the present phase when its time is over."""
        if now < self._cut_at:
            return
        if self._phase in ("head", "body"):
            seconds = self._limits.request_s
            self._refuse(ProtocolError(408, f"cannot read request: not complete within {seconds:g} s"))
        elif self._phase == "handling":
            self._out_of_time()
        else:
            self.abort()

    def drain(self) -> None:
        """Close when idle; else close after the answer that is under way.

        The first request of a new connection is on its way: whoever has just connected does not expect to be closed.
        """
        if self._phase == "idle":
            self._readable()  # a request that has already arrived is under way
        if self._phase == "idle" and time.monotonic() < self._new_until:
            self._owner.loop.call_later(FRESH_S, self._close_if_idle)
        else:
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._phase == "idle":
            self.abort()

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        if self._phase == "closed":
            return
        self._phase = "closed"
        self._forget_task(cancel=True)
        self._end_request()
        self._parser.discard()
        self._stream.close()
        self._owner.ended(self)

    # Reading.

    def _readable(self) -> None:
        try:
            if self._phase == "body" and self._fill_body():
                return
            data = self._stream.read(self._limits.descriptors)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        except AgentError as error:
            self._refuse(error)
            return
        if data:
            self._take(data)
        else:
            self._end_of_input()

    def _fill_body(self) -> bool:
        """Receive a large body in its place; True when the event is dealt with."""
        for _ in range(BODY_READS):
            room = self._parser.room()
            if room is None:
                return False
            count = self._stream.read_into(room, self._limits.descriptors)
            if not count:
                self._end_of_input()
                return True
            self._parser.wrote(count)
            if count == len(room):
                self._advance()
                return True
        return True

    def _take(self, data: bytes) -> None:
        if self._phase == "idle" and not self._parser.pending and (whole := self._parser.whole(data)) is not None:
            self._take_whole(*whole)
        elif self._phase in ("idle", "head", "body"):
            self._parser.feed(data)
            self._advance()
        elif self._phase == "linger":
            self._stream.close_descriptors()
            self._discard -= len(data)
            if self._discard <= 0:
                self.abort()
        else:
            self._stream.pause()
            if self._limits.pipelining:
                self._parser.feed(data)
            else:
                self._keep_alive = False

    def _take_whole(self, head: Head, body: bytes) -> None:
        """The short way of a request that came in one read. A refusal needs no more bytes, so the connection stays."""
        self._cut_at = time.monotonic() + self._limits.request_s
        self._head = head
        self._keep_alive = head.keep_alive
        try:
            limit = self._body_limit(self._admit(head))
        except AgentError as error:
            self._refusal = error
        else:
            if len(body) > limit:
                self._refuse(too_large(len(body), limit))
                return
        self._handle(body)

    def _body_limit(self, match: Match) -> int:
        return self._limits.body_bytes if match.route.body_bytes is None else match.route.body_bytes

    def _end_of_input(self) -> None:
        """The peer sends no more. It may still want its answers, unless it is gone altogether."""
        self._eof = True
        self._stream.pause()
        if self._phase in ("handling", "writing") and not self._stream.hung_up():
            return
        self._end_if_eof()

    def _end_if_eof(self) -> None:
        if self._phase in ("head", "body"):
            self._refuse(ProtocolError(400, "cannot read request: it ends before it is complete"))
        elif self._phase != "closed":
            self.abort()

    # From bytes to handlers.

    def _advance(self) -> None:
        """Serve what is complete, at most a turn's worth."""
        for _ in range(TURN):
            try:
                if not self._step():
                    break
            except AgentError as error:
                self._refuse(error)
                return
            except MemoryError:
                self._refuse(TryLaterError("cannot take request: memory is short"))
                return
        else:
            self._stream.pause()
            self._owner.loop.call_soon(self._next)
            return
        if self._eof and self._phase in ("idle", "head", "body"):
            self._end_if_eof()

    def _next(self) -> None:
        """Go on after an answer, or after the turn of others."""
        if self._phase == "idle":
            if not self._eof:
                self._stream.resume()
            if self._parser.pending:
                self._advance()
            elif self._eof:
                self.abort()

    def _step(self) -> bool:
        """One request further; False when more bytes, or the handler, must be waited for."""
        if self._phase == "idle":
            self._phase = "head"
            self._cut_at = time.monotonic() + self._limits.request_s
        if self._phase == "head":
            head = self._parser.next_head()
            if head is None:
                return False
            self._accept(head)
        if self._phase != "body":
            return False
        body = self._parser.next_body()
        if body is None:
            return False
        self._handle(body)
        return self._is_idle() and self._parser.pending > 0

    def _is_idle(self) -> bool:
        return self._phase == "idle"

    def _accept(self, head: Head) -> None:
        """Refuse what can be refused before a body is taken, and make room for the body."""
        self._head = head
        self._keep_alive = head.keep_alive
        limit = READ_BYTES
        try:
            limit = self._body_limit(self._admit(head))
        except AgentError as error:
            # A short body is read to its end, so that the connection survives; a long one is not worth it.
            if head.chunked or (head.length or 0) > READ_BYTES or head.expects_continue:
                raise
            self._refusal = error
        self._parser.start_body(limit, self._reserve)
        self._phase = "body"
        if head.expects_continue and (head.chunked or head.length) and not self._parser.pending:
            self._send(_CONTINUE)

    def _admit(self, head: Head) -> Match:
        rights = self._owner.rights(self.peer)
        if not rights:
            raise RefusedError("cannot serve this user: no right on this socket")
        match = self._match = self._owner.table.match(head.method, head.target)
        route = match.route
        require(route, rights)
        if route.admit is not None:
            route.admit(self.peer, match.params)
        if route.needs_body and head.length is None and not head.chunked:
            raise ProtocolError(411, f"cannot serve {match.path}: content-length missing")
        return match

    def _reserve(self, size: int) -> None:
        if not self._owner.ledger.reserve(self.peer.uid, size):
            raise TryLaterError("cannot take body: too many bytes of this user, or of all, are in memory")
        self._held += size

    def _handle(self, body: bytes | memoryview) -> None:
        self._phase = "handling"
        if self._refusal is not None:
            self._answer(error_answer(self._refusal))
            return
        head, match = self._head, self._match
        assert head is not None
        assert match is not None
        if self._parser.pending and not self._limits.pipelining:
            self._keep_alive = False
        if match.route.deadline_s is not None:
            self._cut_at = time.monotonic() + match.route.deadline_s
        request = self._request = Request(
            head.method,
            match.path,
            match.query,
            head.fields,
            body,
            self.peer,
            match.params,
            self._cut_at,
            head.inference_length,
        )
        if self._stream.descriptors:
            request.descriptors, self._stream.descriptors = self._stream.descriptors, []
        if NDJSON in head.fields.get("accept", "") and head.minor == 1:
            request.progress = self._progress
        try:
            answer = match.route.handler(request)
        except AgentError as error:
            answer = error_answer(error)
        except Exception as error:  # noqa: BLE001 - a bug in one handler must not end the service of the other apps
            answer = self._unexpected(error)
        if isinstance(answer, Response):
            self._answer(answer)
        else:
            self._await(asyncio.ensure_future(answer, loop=self._owner.loop), request)

    def _await(self, task: asyncio.Future[Response], request: Request) -> None:
        self._task = task
        task.add_done_callback(self._answered)
        if self._phase == "closed":
            self._forget_task(cancel=True)
            return
        self._cut_at = request.deadline
        self._timer = self._owner.loop.call_later(max(0.0, request.deadline - time.monotonic()), self._out_of_time)

    def _answered(self, task: asyncio.Future[Response]) -> None:
        error = None if task.cancelled() else task.exception()  # asking marks it as seen
        if task is not self._task:
            return  # the deadline or the peer's end came first
        self._forget_task()
        if task.cancelled():
            self._answer(error_answer(TryLaterError("cannot answer: the work was cancelled")))
        elif error is None:
            self._answer(task.result())
        else:
            self._answer(error_answer(error) if isinstance(error, AgentError) else self._unexpected(error))
        self._next()

    def _out_of_time(self) -> None:
        self._forget_task(cancel=True)
        self._answer(error_answer(DeadlineError("cannot answer: the request's deadline passed")))
        self._next()

    def _forget_task(self, *, cancel: bool = False) -> None:
        task, self._task = self._task, None
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if cancel and task is not None:
            task.cancel()

    def _unexpected(self, error: BaseException) -> Response:
        where = self._match.route.pattern if self._match else "a request"
        log.error("unexpected error in %s", where, exc_info=error)
        return error_answer(AgentError("cannot answer: unexpected error, the daemon's log has it"))

    # Answers.

    def _refuse(self, error: AgentError) -> None:
        """Answer an error that leaves the rest of the request unread, and close."""
        if self._phase not in ("idle", "head", "body"):
            self.abort()
            return
        self._keep_alive = False
        self._parser.discard()
        self._discard = LINGER_BYTES
        self._answer(error_answer(error, close=True))

    def _answer(self, response: Response) -> None:
        """Write an answer; afterwards the connection is idle again, or closing."""
        if self._phase == "closed":
            return
        self._phase = "writing"
        self._new_until = 0.0
        self._end_request()
        head, match = self._head, self._match
        self._head = self._match = self._refusal = None
        self._keep_alive = self._keep_alive and not response.close and not self._owner.draining
        if self._streaming:
            self._streaming = False
            self._send(last_line(response))
        else:
            first = response_head(response, keep_alive=self._keep_alive, minor=head.minor if head else 1)
            bodiless = head is not None and head.method == "HEAD"
            self._send(first, *(() if bodiless else response.parts))
        self._owner.answered(match, response.status)
        if self._stream.backlog:
            self._cut_at = time.monotonic() + self._limits.write_s
            self._held += self._stream.backlog
            self._owner.ledger.charge(self.peer.uid, self._stream.backlog)
        elif self._phase == "writing":
            self._written()

    def _send(self, *parts: bytes | bytearray | memoryview) -> None:
        try:
            self._stream.send(parts)
        except OSError:
            self.abort()

    def _flushed(self) -> None:
        if self._phase == "writing":
            self._written()
            self._next()

    def _written(self) -> None:
        """The whole answer is in the kernel's hands."""
        self._release()
        if self._keep_alive:
            self._phase = "idle"
            self._cut_at = time.monotonic() + self._limits.idle_s
        elif self._discard and not self._eof:
            self._linger()
        else:
            self.abort()

    def _linger(self) -> None:
        """Say that no more comes, and throw away what the peer still sends, for a moment (RFC 9112 section 9.6)."""
        self._phase = "linger"
        self._cut_at = time.monotonic() + self._limits.linger_s
        try:
            self._stream.finish()
        except OSError:
            self.abort()
            return
        self._stream.resume()

    def _end_request(self) -> None:
        if self._request is not None:
            self._request.close_descriptors()
            self._request = None
        self._stream.close_descriptors()
        self._release()

    def _release(self) -> None:
        if self._held:
            self._owner.ledger.release(self.peer.uid, self._held)
            self._held = 0

    def _progress(self, event: Mapping[str, Any]) -> None:
        """Send an event of a long operation; dropped for a reader that does not keep up."""
        if self._phase != "handling" or self._stream.backlog > EVENT_BACKLOG_BYTES:
            return
        line = event_line(event)
        if not self._streaming:
            self._streaming = True
            line = _STREAM_HEAD + line
        self._send(line)
