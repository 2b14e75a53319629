"""A child that measures yields to its daemon and to everybody else: it runs when no request wants to.

Where nobody uses the cpu controller the kernel shares processors out among sessions, not processes (sched(7),
autogroups). An idle task of the daemon's own session weighs as much as the daemon against an app in another session
while the daemon itself sleeps; so the child has a session of its own, of a tenth of an app's weight: with the least
there is, a sixtieth, a trial on a device whose processors are never idle would not end. Its slice is the longest there
is: who wakes up with a shorter one takes its place at once (Linux 6.12 and later; nothing else made the kernel do that
across sessions).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from agent.infer.seccomp import number_of

#: Of the process, and of its session.
_LEAST, _TENTH = 19, 10
_SLICE_NS = 100_000_000


class _Attributes(ctypes.Structure):
    """``struct sched_attr`` of its first size."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def stand_apart() -> None:
    """Hear no signal of a terminal."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)


def yield_to_others() -> None:
    """Take the least of the processors, for this process and its threads to come, and hear no signal of a terminal.

    What a kernel or a sandbox refuses is left out.
    """
    with contextlib.suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text(str(_TENTH))
    with contextlib.suppress(OSError):
        os.nice(_LEAST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    number = number_of("sched_setattr")  # for which C libraries have no function
    if number is not None:
        wanted = _Attributes(ctypes.sizeof(_Attributes), os.SCHED_BATCH, 0, _LEAST, 0, _SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wanted), 0)
