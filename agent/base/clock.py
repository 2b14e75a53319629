"""Time as an argument: parts that wait or date take a ``Clock``; tests pass their own."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Literal, Protocol

#: More than struct timex has on any architecture.
_TIMEX_BYTES = 512
_STA_UNSYNC = 0x0040
#: Made by systemd-timesyncd at the first synchronisation of a boot.
_TIMESYNCD = "/run/systemd/timesync/synchronized"


class Clock(Protocol):
    """Monotonic seconds for intervals, wall time for dates."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def now(self) -> datetime:
        """Wall time, aware, in UTC."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(timezone.utc)


def iso(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds: ``2026-01-31T12:00:00Z``."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock_disciplined() -> bool | None:
    """Whether somebody keeps this machine's clock right: systemd's own time service says so, or the kernel does.

    A sandboxed service may read systemd-timesyncd(8)'s mark and not ask the kernel.
    """
    return True if os.path.exists(_TIMESYNCD) else kernel_clock_disciplined()


def kernel_clock_disciplined() -> bool | None:
    """Whether the kernel says that something (NTP, PTP) keeps its clock right; None where it does not say.

    adjtimex(2): STA_UNSYNC is cleared by whoever disciplines the clock, and set again when that stops.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: nothing is changed
    if libc.adjtimex(buffer) < 0:
        return None
    # struct timex: unsigned modes; long offset, freq, maxerror, esterror; int status
    word = ctypes.sizeof(ctypes.c_long)
    status = ctypes.c_int.from_buffer(buffer, word * 5).value
    return not status & _STA_UNSYNC


class TrustedClock:
    """When dates may be believed: ``trust`` says auto (the kernel's word), always or never, above a floor.

    The floor is the latest moment that is known to be past: a clock below it is wrong whatever anybody says.
    """

    def __init__(
        self,
        clock: Clock,
        trust: Literal["auto", "always", "never"],
        floor: datetime,
        disciplined: Callable[[], bool | None] = clock_disciplined,
    ) -> None:
        self.clock = clock
        self.trust = trust
        self.floor = floor
        self._disciplined = disciplined

    def trusted(self) -> bool:
        """Whether the present date may be believed."""
        if self.trust == "never" or self.clock.now() < self.floor:
            return False
        return self.trust == "always" or bool(self._disciplined())
