"""Where published versions come from: what a job that installs one uses of the rest of the agent.

Apart from ``delivered``, which does the work: most starts install nothing, and need only what says where it would be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.base.clock import TrustedClock
from agent.operations.measured import DeviceView
from agent.store.space import Hold
from agent.trust.wants import Want


class Bringer(Protocol):
    """Whoever brings what is wanted: ``agent.trust.desk.Desk``."""

    def fetch(self, want: Want, go_on: Callable[[], None] = ...) -> bytes:
        """What is small, into memory. DeliveryError, DelayError."""
        ...

    def fetch_file(
        self, want: Want, path: Path, progress: Callable[[int], None] = ..., go_on: Callable[[], None] = ...
    ) -> None:
        """A payload, into a file. DeliveryError, DelayError."""
        ...

    def doubt(self) -> None:
        """What was brought last is not believed: have it brought from elsewhere, if it is wanted again."""
        ...


@dataclass(frozen=True, slots=True)
class Origin:
    """``metadata`` is the folder for the repository's metadata, ``root`` gives the root that came with the device.

    ``device`` names the device as its fleet does, ``view`` is for the choice of variants. ``keys_changed`` is called
    when the repository brought other keys for jobs. ``holds`` is space that is promised to jobs under way. ``reading``
    is held by whoever reads the metadata: a job and the daily look may want to at once.
    """

    desk: Bringer
    metadata: Path
    root: Callable[[], bytes | None]
    clock: TrustedClock
    device: Callable[[], str]
    view: DeviceView
    keys_changed: Callable[[], None] = lambda: None
    holds: dict[str, Hold] = field(default_factory=dict)
    reading: threading.Lock = field(default_factory=threading.Lock)
