"""The words of residency: what can be loaded, what happens, and what shall be done about it. Values only.

A **session** answers (hot). A **plaintext** is a decrypted file in memory (warm when no session is open on it); several
sessions may be made of one. What has neither is cold. Sizes are bytes, times are seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

#: A session's name: whatever the shell can look up again.
Name = Hashable
#: A plaintext's name: the digest of its file.
Blob = str
FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Item:
    """One session that can be had, as it was measured.

    ``session`` counts what it holds beside the plaintext. ``shares``: its weights are the plaintext's own pages, which
    therefore stays as long as the session. A plaintext of size 0 (unknown) is never kept and not counted.
    """

    blob: Blob
    session: int
    plaintext: int = 0
    shares: bool = False
    load_s: float = 0.0
    read_s: float = 0.0


# -- events: what happened --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody wants to run on a session. The ticket is answered by exactly one ``Grant`` or ``Refuse``."""

    ticket: int
    name: Name


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Whoever held that ticket no longer waits. A granted one is ``Finished`` instead."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A granted run has ended. ``keep_s``: how long the model may stay unused from now on; None: as for all."""

    name: Name
    keep_s: float | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A ``Load`` is done; its plaintext is held if it was to be kept. The seconds that it took, if known."""

    name: Name
    load_s: float | None = None
    read_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A ``Load`` came to nothing; ``kept``: its plaintext is held all the same; ``shortage``: for want of memory."""

    name: Name
    kept: bool = False
    shortage: bool = False


@dataclass(frozen=True, slots=True)
class Warmed:
    """A ``Warm`` is done; ``kept``: it did not come to nothing."""

    blob: Blob
    kept: bool


@dataclass(frozen=True, slots=True)
class Closed:
    """A ``Demote`` is done: the session's memory is back."""

    name: Name


@dataclass(frozen=True, slots=True)
class Dropped:
    """An ``Evict`` is done: the plaintext's memory is back."""

    blob: Blob


@dataclass(frozen=True, slots=True)
class Retire:
    """This session shall go as soon as it is idle, and its plaintext with it when ``cold``."""

    name: Name
    cold: bool = False


@dataclass(frozen=True, slots=True)
class Preload:
    """Load it when there is room to spare, or at least decrypt it; never at the cost of another."""

    name: Name


@dataclass(frozen=True, slots=True)
class Pin:
    """Never evict that session, or no longer."""

    name: Name
    pinned: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """All that may be held from now on."""

    size: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """The device is short: give so much back, if so much is idle."""

    size: int


@dataclass(frozen=True, slots=True)
class Shelf:
    """Everything that can be loaded from now on; nothing else can."""

    items: Mapping[Name, Item]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: ``Residency.wake_at`` has come."""


Event = (
    Request
    | Withdrawn
    | Finished
    | Loaded
    | LoadFailed
    | Warmed
    | Closed
    | Dropped
    | Retire
    | Preload
    | Pin
    | Budget
    | Pressure
    | Shelf
    | Tick
)


# -- actions: what shall be done --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """That ticket may run on that session, until it is ``Finished``."""

    ticket: int
    name: Name


@dataclass(frozen=True, slots=True)
class Refuse:
    """That ticket gets an error: its load failed, pinned models leave it no room, or it is no longer installed."""

    ticket: int
    name: Name
    reason: Literal["load", "room", "gone"]


@dataclass(frozen=True, slots=True)
class Load:
    """Open the session, off the serving path. ``held``: its plaintext is there; ``keep``: it shall be afterwards."""

    name: Name
    held: bool
    keep: bool


@dataclass(frozen=True, slots=True)
class Warm:
    """Decrypt the plaintext of that session."""

    name: Name
    blob: Blob


@dataclass(frozen=True, slots=True)
class Demote:
    """Close the session."""

    name: Name


@dataclass(frozen=True, slots=True)
class Evict:
    """Let go of the plaintext."""

    blob: Blob


Action = Grant | Refuse | Load | Warm | Demote | Evict
