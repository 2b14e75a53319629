"""What the service manager hands over and wants to hear: passed sockets, credentials, readiness, the watchdog.

Invariants: parsing (``parse_environment``) is pure; what was handed over is taken once, after which no child inherits
it (close-on-exec descriptors, variables removed); a notification never raises and never carries a line that the caller
did not mean. By hand and not with python-systemd, because that needs a compiler and libsystemd on the device.

Sources: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), systemd.exec(5) "Credentials".
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import ConfigError

#: SD_LISTEN_FDS_START of sd_listen_fds(3).
FIRST_DESCRIPTOR = 3
#: More than we could ever be passed; a nonsensical count must not make us walk the descriptor table.
_MAX_DESCRIPTORS = 64
#: The manager answers at once or is in trouble; a notification must not hold the event loop for long.
_SEND_TIMEOUT_S = 1.0
_MAX_STATUS = 512
#: Removed once taken. CREDENTIALS_DIRECTORY stays: it names a folder, and the key provider reads it later.
_TAKEN = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass(frozen=True, slots=True)
class PassedDescriptor:
    """An open descriptor from the manager with its ``FileDescriptorName=``."""

    fileno: int
    name: str


@dataclass(frozen=True, slots=True)
class Handover:
    """All that the manager handed over; everything is empty where there is no manager.

    ``watchdog_s`` is the time after which the manager acts; report twice as often.
    """

    notify_address: str | None = None
    watchdog_s: float | None = None
    descriptors: tuple[PassedDescriptor, ...] = ()
    credentials: Path | None = None


def parse_environment(environ: Mapping[str, str], pid: int) -> Handover:
    """Read the manager's variables as process ``pid``; what is addressed to another pid is not ours. ConfigError."""
    credentials = environ.get("CREDENTIALS_DIRECTORY", "")
    return Handover(
        notify_address=_notify_address(environ.get("NOTIFY_SOCKET", "")),
        watchdog_s=_watchdog(environ, pid),
        descriptors=_descriptors(environ, pid),
        credentials=Path(credentials) if os.path.isabs(credentials) else None,
    )


def take_environment(environ: MutableMapping[str, str] = os.environ, *, pid: int | None = None) -> Handover:
    """Parse the handover and keep it from children: descriptors close on exec, variables go. ConfigError."""
    handover = parse_environment(environ, os.getpid() if pid is None else pid)
    for descriptor in handover.descriptors:
        _close_on_exec(descriptor)
    for name in _TAKEN:
        environ.pop(name, None)
    return handover


def adopt_sockets(descriptors: Sequence[PassedDescriptor], names: Collection[str]) -> dict[str, socket.socket]:
    """The passed listening Unix stream sockets by name, non-blocking. ConfigError for any that is not one of ``names``.

    A socket that nobody serves would swallow connections for ever, so an unexpected one is an error, not a leftover.
    """
    adopted: dict[str, socket.socket] = {}
    try:
        for descriptor in descriptors:
            _check_name(descriptor.name, names, adopted)
            adopted[descriptor.name] = _listening(descriptor)
    except ConfigError:
        for listener in adopted.values():
            listener.close()
        raise
    return adopted


def credential_path(environ: Mapping[str, str], name: str) -> Path | None:
    """Where the credential ``name`` lies, or None when the manager passed none by that name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not a credential's name")
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(directory, name)
    return path if os.path.isabs(directory) and path.is_file() else None


class Notifier:
    """Tells the manager how the service is. Each call returns whether it was delivered: without a manager, False.

    One datagram, one short-lived socket a message: there is no state to lose when the manager re-executes itself.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address

    def ready(self, status: str = "") -> bool:
        """Start-up, or a reload, is complete."""
        return self._send("READY=1", *_status(status))

    def stopping(self, status: str = "") -> bool:
        """The stop has begun."""
        return self._send("STOPPING=1", *_status(status))

    def reloading(self) -> bool:
        """A reload has begun; ``ready`` ends it. The time stamp is what Type=notify-reload wants; others ignore it."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``."""
        return self._send(*_status(text or "-"))

    def alive(self) -> bool:
        """Feed the watchdog. To be called from real progress only."""
        return self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> bool:
        if self._address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(_SEND_TIMEOUT_S)
                channel.connect(self._address)
                channel.sendall("\n".join(lines).encode())
        except OSError:
            return False
        return True


def _status(text: str) -> tuple[str, ...]:
    """A status of several lines could smuggle in assignments of its own (``MAINPID=``): one line, bounded."""
    return (f"STATUS={' '.join(text.split())[:_MAX_STATUS]}",) if text else ()


def _notify_address(text: str) -> str | None:
    """A path, or ``@name`` of the abstract space as the kernel wants it. Other kinds (vsock) are not for a service."""
    if text.startswith("@") and len(text) > 1:
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _watchdog(environ: Mapping[str, str], pid: int) -> float | None:
    text = environ.get("WATCHDOG_USEC", "")
    if not text or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    timeout_us = _number("WATCHDOG_USEC", text)
    return timeout_us / 1e6 if timeout_us else None


def _descriptors(environ: Mapping[str, str], pid: int) -> tuple[PassedDescriptor, ...]:
    if environ.get("LISTEN_PID") != str(pid):
        return ()
    count = _number("LISTEN_FDS", environ.get("LISTEN_FDS", ""))
    if count > _MAX_DESCRIPTORS:
        raise ConfigError(f"cannot take passed sockets: LISTEN_FDS={count} is more than {_MAX_DESCRIPTORS}")
    names = environ["LISTEN_FDNAMES"].split(":") if environ.get("LISTEN_FDNAMES") else ["unknown"] * count
    if len(names) != count:
        raise ConfigError(f"cannot take passed sockets: LISTEN_FDS={count}, but LISTEN_FDNAMES has {len(names)} names")
    return tuple(PassedDescriptor(FIRST_DESCRIPTOR + index, name) for index, name in enumerate(names))


def _close_on_exec(descriptor: PassedDescriptor) -> None:
    try:
        os.set_inheritable(descriptor.fileno, False)
    except OSError as error:
        raise ConfigError(
            f"cannot take the passed socket {descriptor.name!r}: descriptor {descriptor.fileno}: {error.strerror}"
        ) from error


def _check_name(name: str, served: Collection[str], adopted: Collection[str]) -> None:
    if name in served and name not in adopted:
        return
    reason = "was passed twice" if name in adopted else "is not a name that is served here"
    raise ConfigError(
        f"cannot use the passed socket {name!r}: it {reason}",
        hint=f"FileDescriptorName= in the socket units must be each of {', '.join(sorted(served))} once",
    )


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigError(f"cannot read the service manager's variables: {name}={text[:40]!r} is not a number")
    return int(text)


def _listening(descriptor: PassedDescriptor) -> socket.socket:
    """The descriptor as a socket, once it is proven to be a listening Unix stream socket."""
    try:
        listener = socket.socket(fileno=descriptor.fileno)
        accepts = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        reason = "it is no socket" if error.errno == errno.ENOTSOCK else error.strerror
        raise ConfigError(f"cannot use the passed socket {descriptor.name!r}: {reason}") from error
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not accepts:
        listener.close()
        raise ConfigError(
            f"cannot use the passed socket {descriptor.name!r}: it is not a listening Unix stream socket",
            hint="the socket unit needs ListenStream= with a path and Accept=no",
        )
    listener.setblocking(False)
    return listener
