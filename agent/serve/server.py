"""Listening Unix sockets of one route table: accepting under caps, expiring, draining.

Invariants: a connection over a cap costs one accept, one send and one close; a socket's path is never open to more
users than it should be, not even for a moment; a live socket is never taken from its daemon. All methods belong to the
event loop's thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from agent.base.errors import ConflictError, TryLaterError
from agent.base.files import exclusive_lock
from agent.serve.access import Peer, infer_rights, peer_of
from agent.serve.exchange import error_answer, response_head
from agent.serve.heads import HeadReader
from agent.serve.http import Connection
from agent.serve.limits import Ledger, Limits
from agent.serve.routes import Match, RouteTable

log = logging.getLogger(__name__)

#: Connections accepted before the open ones get their turn.
_ACCEPT_TURN = 32
_BACKLOG = 1024
#: Pause of accepting when the process or the machine has no descriptor left.
_SHORTAGE_S = 0.2
_FULL = error_answer(TryLaterError("cannot serve: too many connections of this user, or of all"), close=True)
_FULL_BYTES = response_head(_FULL, keep_alive=False, minor=1) + b"".join(_FULL.parts)


class Server:
    """Serves ``table`` on any number of Unix sockets. ``rights`` says what a peer may do, ``peer`` who it is."""

    def __init__(
        self,
        table: RouteTable,
        limits: Limits | None = None,
        *,
        rights: Callable[[Peer], frozenset[str]] = infer_rights,
        peer: Callable[[socket.socket], Peer] = peer_of,
    ) -> None:
        self.table = table
        self.limits = limits or Limits()
        self.ledger = Ledger(self.limits)
        self.heads = HeadReader(self.limits)
        self.draining = False
        self.answers: Counter[tuple[str, int]] = Counter()  # by route pattern and status
        self.refused = 0  # connections turned away at a cap
        self._rights = rights
        self._peer = peer
        self._listeners: dict[int, socket.socket] = {}
        self._own_paths: list[tuple[Path, int]] = []  # with the inode, so that a successor's socket is left alone
        self._connections: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None
        shortest = min(self.limits.request_s, self.limits.idle_s, self.limits.write_s, self.limits.linger_s)
        self._sweep_s = min(1.0, max(0.02, shortest / 4))

    # Listening.

    def start_unix(self, path: Path, mode: int = 0o660, group: int | None = None) -> None:
        """Listen on ``path``. ConflictError when another daemon answers there, or something else lies there.

        The socket is made for its owner only and opened to ``group`` and ``mode`` afterwards. Needs a running loop.
        """
        with exclusive_lock(path.with_name(f".{path.name}.lock")):
            _remove_stale(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            try:
                listener.bind(str(path))
            except BaseException:
                listener.close()
                raise
            finally:
                os.umask(mask)
            self._own_paths.append((path, os.lstat(path).st_ino))
            if group is not None:
                os.chown(path, -1, group, follow_symlinks=False)
            path.chmod(mode)
            listener.listen(_BACKLOG)
        self.start_socket(listener)

    def start_socket(self, listener: socket.socket) -> None:
        """Serve a listening socket that is ours now (for one passed by systemd). Needs a running loop."""
        self.loop = asyncio.get_running_loop()
        listener.setblocking(False)
        self._listeners[listener.fileno()] = listener
        self.loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPT_TURN):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._no_more_for_now(listener, error)
                return
            self._welcome(sock)

    def _no_more_for_now(self, listener: socket.socket, error: OSError) -> None:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise error
        log.warning("cannot accept a connection: %s", error.strerror)
        self.loop.remove_reader(listener.fileno())
        self.loop.call_later(_SHORTAGE_S, self._accept_again, listener)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() in self._listeners:
            self.loop.add_reader(listener.fileno(), self._accept, listener)

    def _welcome(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            peer = self._peer(sock)
        except OSError:
            sock.close()
            return
        if not self.ledger.enter(peer.uid):
            self.refused += 1
            self._turn_away(sock)
            return
        connection = Connection(self, sock, peer)
        self._connections.add(connection)
        connection.open()
        if self._sweep is None:
            self._sweep = self.loop.call_later(self._sweep_s, self._expire)

    def _turn_away(self, sock: socket.socket) -> None:
        try:
            sock.send(_FULL_BYTES)
        except OSError:
            pass  # gone already, which is as well
        finally:
            sock.close()

    # What connections need (http.Owner).

    def rights(self, peer: Peer) -> frozenset[str]:
        """The peer's rights on this socket."""
        return self._rights(peer)

    def answered(self, match: Match | None, status: int) -> None:
        """Count an answer."""
        self.answers[match.route.pattern if match else "", status] += 1

    def ended(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._connections.discard(connection)
        self.ledger.leave(connection.peer.uid)
        if self._empty is not None and not self._connections:
            self._empty.set()

    def metrics(self) -> list[str]:
        """Prometheus lines of this socket: answers by route, connections, bytes in memory."""
        lines = ["# TYPE edge_agent_http_answers_total counter"]
        for (pattern, status), count in sorted(self.answers.items()):
            lines.append(f'edge_agent_http_answers_total{{route="{pattern}",status="{status}"}} {count}')
        for name, kind, value in (
            ("connections", "gauge", self.ledger.connections),
            ("buffered_bytes", "gauge", self.ledger.bytes),
            ("connections_refused_total", "counter", self.refused),
        ):
            lines += [f"# TYPE edge_agent_http_{name} {kind}", f"edge_agent_http_{name} {value}"]
        return lines

    # Time and end.

    def _expire(self) -> None:
        """Cut what is over its time; runs only while there are connections, so that an idle daemon sleeps."""
        self._sweep = None
        now = time.monotonic()
        for connection in list(self._connections):
            connection.expire(now)
        if self._connections:
            self._sweep = self.loop.call_later(self._sweep_s, self._expire)

    async def drain(self, timeout: float) -> bool:
        """Stop accepting, answer what is under way for up to ``timeout`` s, close; True when nothing was cut off.

        Connections that wait in the queue of a socket of our own are still served; those of a passed socket stay in
        its queue for the next process.
        """
        self._stop_listening()
        self.draining = True
        for connection in list(self._connections):
            connection.drain()
        clean = True
        if self._connections:
            self._empty = asyncio.Event()
            try:
                await asyncio.wait_for(self._empty.wait(), timeout)
            except asyncio.TimeoutError:
                clean = False
        for connection in list(self._connections):
            connection.abort()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        return clean

    def _stop_listening(self) -> None:
        own = bool(self._own_paths)
        for path, inode in self._own_paths:
            try:
                if os.lstat(path).st_ino == inode:
                    path.unlink()
            except FileNotFoundError:
                continue
        self._own_paths.clear()
        for fd, listener in list(self._listeners.items()):
            self.loop.remove_reader(fd)
            if own:
                self._accept(listener)
            del self._listeners[fd]
            listener.close()


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more; ConflictError for anything else."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConflictError(f"cannot listen on {path}: something that is not a socket lies there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # alive, with a full queue
    raise ConflictError(f"cannot listen on {path}: another daemon answers there", hint="stop it first")
