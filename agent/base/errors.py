"""Errors that say who must act.

Every error that crosses a package boundary is one of these. Its text reads ``cannot X: reason``; the optional hint
tells the mend. Only command lines turn them into exit statuses, only ``serve`` turns them into HTTP statuses.
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of all expected errors. ``str()`` is the one-line reason, ``hint`` the mend (may be empty)."""

    def __init__(self, text: str, *, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class PeerError(AgentError):
    """The caller's input is wrong; the same input will fail again."""


class NotFoundError(PeerError):
    """The thing that the caller names does not exist."""


class ConflictError(PeerError):
    """The input is well-formed but clashes with what is there (a name or version that is taken)."""


class TooLargeError(PeerError):
    """The input exceeds a configured limit."""


class RefusedError(AgentError):
    """Policy refuses: the caller lacks the right, or a rule forbids it."""


class TryLaterError(AgentError):
    """A resource is short for now: queue full, memory short, shutting down. The same call may succeed later."""


class DeadlineError(TryLaterError):
    """The time allowed ran out."""


class DamagedError(AgentError):
    """Local data is damaged or missing; the hint names what repairs it."""


class ConfigError(AgentError):
    """A configuration or profile file is wrong; the text names file and field, or line for syntax."""


class UnsupportedError(AgentError):
    """This device or installation cannot do it (missing runtime, kernel feature, architecture)."""
