"""A child that measures yields to everything else on the device: it runs when nobody else wants to.

Three settings, for what they compare a task with differs: the scheduling class within its group, the nice value for
kernels and sandboxes that refuse the class, and the nice value of the session's own group (sched(7), autogroups), in
which the kernel puts a process that leads a session where nobody uses the cpu controller.
"""

from __future__ import annotations

import contextlib
import os

_LEAST = 19
_AUTOGROUP = "/proc/self/autogroup"


def yield_to_others() -> None:
    """Take the lowest priority there is, for this process and its threads to come."""
    with contextlib.suppress(OSError):
        os.nice(_LEAST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError), open(_AUTOGROUP, "w", encoding="ascii") as group:
        group.write(str(_LEAST))
