"""Logging to stderr, as text or JSON lines, for journald or a terminal. No tensor and no key is ever logged."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import deque
from datetime import datetime, timezone

from agent.base.config import LogConfig

#: sd-daemon(3): a prefix that journald turns into the priority.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


class _Text(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        prefix = f"<{_priority(record)}>"
        return "\n".join(prefix + line for line in text.splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class Recent(logging.Handler):
    """The last lines in memory, for ``logs.tail``; no disk is read for it, and nothing outlives the process."""

    def __init__(self, lines: int = 500) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=lines)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line, cut where it is very long."""
        self._lines.append(redacted(self.format(record))[:1000])

    def tail(self, lines: int) -> list[str]:
        """The last ``lines``, oldest first."""
        kept = list(self._lines)
        return kept[max(0, len(kept) - lines) :]


#: What follows a word that announces a secret. No line of ours holds one; a library's might.
_SECRET = re.compile(r"(?i)\b(pass(?:word|wd)?|secret|token|credential|authorization)(\s*[=:]\s*)\S+")
RECENT = Recent()


def redacted(text: str) -> str:
    """``text`` without what looks like a secret."""
    return _SECRET.sub(r"\1\2***", text)


def set_up(config: LogConfig, *, journal: bool) -> None:
    """Send everything of the agent to stderr; ``journal``: stderr is journald's (``JOURNAL_STREAM`` is set)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if config.format == "json" else _Text(journal=journal))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.addHandler(RECENT)
    root.setLevel(config.level.upper())


def _priority(record: logging.LogRecord) -> int:
    return next((priority for level, priority in _PRIORITIES if record.levelno >= level), 7)
