"""Errors that say who must act.

Every error that crosses a package boundary is one of these. Its text reads ``cannot X: reason``; the optional hint
tells the mend. Only command lines turn them into exit statuses, only ``serve`` turns them into HTTP statuses.
"""

from __future__ import annotations

#: Characters of an error's text: it goes into an answer, a log line and a terminal.
MAX_TEXT = 2000


class AgentError(Exception):
    """Base of all expected errors. ``str()`` is the one-line reason, ``hint`` the mend (may be empty).

    Texts quote what the caller sent: what is not printable is escaped, so that input never writes on a terminal or
    makes log lines of its own, and what is longer than ``MAX_TEXT`` is cut.
    """

    def __init__(self, text: str, *, hint: str = "") -> None:
        super().__init__(one_line(text))
        self.hint = one_line(hint)


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


def one_line(text: str) -> str:
    """``text`` fit to be shown: one line, what is not printable escaped as in Python, at most ``MAX_TEXT`` long."""
    if not text.isprintable():
        characters = (
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:MAX_TEXT]
        )
        text = "".join(characters)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
