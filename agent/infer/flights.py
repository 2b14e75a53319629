"""Equal requests under way: one leads and computes, the others wait for what it brings. Pure bookkeeping.

Invariants: a key has at most one leader; who boarded ends exactly once, as the leader (``landed`` or ``failed``), with
the leader's answer, or by leaving; when a leader fails, whoever has waited longest leads.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class Flights(Generic[_T]):
    """Tickets by key, in the order of boarding; those of leaders are not among them."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, dict[_T, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def board(self, key: bytes, ticket: _T) -> bool:
        """Whether that ticket leads; else it waits."""
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = {}
            return True
        waiting[ticket] = None
        return False

    def leave(self, key: bytes, ticket: _T) -> None:
        """Who waited waits no longer."""
        self._waiting.get(key, {}).pop(ticket, None)

    def landed(self, key: bytes) -> list[_T]:
        """The leader has the answer: who gets it too."""
        return list(self._waiting.pop(key))

    def failed(self, key: bytes) -> _T | None:
        """The leader has none: who leads from now on, None where nobody waits."""
        waiting = self._waiting[key]
        if not waiting:
            del self._waiting[key]
            return None
        ticket = next(iter(waiting))
        del waiting[ticket]
        return ticket
