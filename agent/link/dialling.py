"""A socket to the broker, made without ever blocking the event loop: look-up, TCP, TLS handshake.

paho would do the three in one blocking call, for as long as a name server or a half-open path takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from agent.base.errors import TryLaterError

#: For the whole of it, and for one address of several.
DIAL_S = 30.0
_ADDRESS_S = 10.0
#: tcp(7): how long sent bytes may stay unacknowledged; some builds of Python lack the name.
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)

Address = tuple[int, Any]  # family, and what connect() wants


async def dial(host: str, port: int, tls: ssl.SSLContext | None, silence_s: float) -> socket.socket:
    """A connected socket, with TLS when ``tls`` is given. ``silence_s``: unacknowledged bytes end it after so long.

    TryLaterError tells which of the steps failed.
    """
    try:
        return await asyncio.wait_for(_dial(host, port, tls, silence_s), DIAL_S)
    except asyncio.TimeoutError as error:
        raise TryLaterError(f"cannot reach {host} port {port}: no answer within {DIAL_S:.0f} s") from error
    except ssl.SSLCertVerificationError as error:
        raise TryLaterError(
            f"cannot trust {host} port {port}: {error.verify_message}",
            hint="is this the right broker, its CA the configured one, and the clock right?",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a name that no certificate could have
        reason = error.strerror if isinstance(error, OSError) else None
        raise TryLaterError(f"cannot reach {host} port {port}: {reason or error}") from error


async def _dial(host: str, port: int, tls: ssl.SSLContext | None, silence_s: float) -> socket.socket:
    failure: OSError = OSError("no address")
    for address in await _look_up(host, port):
        try:
            sock = await asyncio.wait_for(_connected(address), _ADDRESS_S)
        except asyncio.TimeoutError:
            failure = TimeoutError(f"no answer within {_ADDRESS_S:.0f} s")
        except OSError as error:
            failure = error
        else:
            _tune(sock, silence_s)
            return await _encrypted(sock, tls, host) if tls else sock
    raise failure


async def _look_up(host: str, port: int) -> list[Address]:
    """The addresses of a name. An address is its own; a name is asked for in a thread that nobody waits for at exit."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return [(family, (host, port))]
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Address]] = loop.create_future()

    def ask() -> None:
        found: list[Address] | OSError
        try:
            known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = [(family, address) for family, _, _, _, address in known]
        except (OSError, UnicodeError) as error:  # a name that cannot be one
            found = error if isinstance(error, OSError) else OSError(f"not a host name: {error}")
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(_settle, answer, found)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    return await answer


def _settle(answer: asyncio.Future[list[Address]], found: list[Address] | OSError) -> None:
    if answer.done():
        return
    if isinstance(found, OSError):
        answer.set_exception(found)
    else:
        answer.set_result(found)


async def _connected(address: Address) -> socket.socket:
    family, where = address
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


def _tune(sock: socket.socket, silence_s: float) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # not TCP, or an old kernel: then only the watch on progress notices
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(silence_s * 1000))


async def _encrypted(sock: socket.socket, tls: ssl.SSLContext, host: str) -> socket.socket:
    try:
        sock.getpeername()  # of one that was reset meanwhile, wrap_socket would leave a half-made one behind
        wrapped = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    loop = asyncio.get_running_loop()
    try:
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                await until_ready(loop.add_reader, loop.remove_reader, wrapped.fileno())
            except ssl.SSLWantWriteError:
                await until_ready(loop.add_writer, loop.remove_writer, wrapped.fileno())
            else:
                return wrapped
    except BaseException:
        wrapped.close()
        raise


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def until_ready(watch: Callable[..., object], unwatch: Callable[[int], object], descriptor: int) -> None:
    """Wait until the descriptor is ready for what ``watch`` watches."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watch(descriptor, _wake, ready)
    try:
        await ready
    finally:
        unwatch(descriptor)
