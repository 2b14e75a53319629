"""A child that measures yields to its daemon: it runs when no request wants to.

It stays in the daemon's session, for where nobody uses the cpu controller the kernel schedules sessions as groups
(sched(7), autogroups), and within its own group alone an idle task gives way at once. The nice value is for kernels and
sandboxes that refuse the class.
"""

from __future__ import annotations

import contextlib
import os

_LEAST = 19


def stand_apart() -> None:
    """Hear no signal of a terminal."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)


def yield_to_others() -> None:
    """Take the lowest priority there is, for this process and its threads to come, and hear no signal of a terminal."""
    stand_apart()
    with contextlib.suppress(OSError):
        os.nice(_LEAST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
