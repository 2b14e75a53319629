"""What all commands print alike: errors, tables, progress, JSON.

Results go to stdout, everything else to stderr. Progress is drawn only on a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from agent.base.errors import AgentError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_WARNED = 3
EXIT_INTERRUPTED = 130


def print_error(error: AgentError | OSError | str) -> None:
    """``error: cannot X: reason`` and, where there is one, the hint on a line of its own."""
    print(f"error: {error}", file=sys.stderr)
    hint = getattr(error, "hint", "")
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def print_warning(error: AgentError) -> None:
    """Of something that did not work and need not: on stderr, as an error is."""
    print(f"warning: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Columns as wide as their content; those in ``right`` are aligned to the right."""
    texts = [[("" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *texts]) for column in range(len(header))]
    for line in [list(header), *texts]:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def megabytes(count: float) -> str:
    """Bytes for people: ``4.2 MB`` (10^6)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


class Progress:
    """A line that is rewritten in place. Use as a context manager; silent where stderr is no terminal."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._length = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._shown:
            text = text[:110]
            self._stream.write("\r" + text.ljust(self._length))
            self._stream.flush()
            self._length = len(text)

    def clear(self) -> None:
        """Wipe the line."""
        if self._shown and self._length:
            self._stream.write("\r" + " " * self._length + "\r")
            self._stream.flush()
            self._length = 0

    def event(self, event: Mapping[str, Any]) -> None:
        """Show an event of the agent's progress stream."""
        self.show(describe_event(event))


def describe_event(event: Mapping[str, Any]) -> str:
    """An event in words."""
    stage = event.get("stage")
    if stage == "encrypt":
        return bar("encrypting", int(event["bytes"]), int(event["total"]))
    if stage == "try":
        return f"loading and checking {event['candidate']}"
    if stage == "measure":
        return bar("measuring", int(event["round"]), int(event["rounds"]))
    if stage == "load":
        return f"loading {event['model']} {event['version']}"
    if "done" in event and "total" in event:
        return bar(str(stage), int(event["done"]), int(event["total"]))
    return str(stage or "")


def bar(what: str, done: int, total: int, width: int = 30) -> str:
    """``measuring  [#####.....]  50 %``."""
    share = min(1.0, done / total) if total else 1.0
    filled = int(share * width)
    return f"{what:<12}[{'#' * filled}{'.' * (width - filled)}] {share:4.0%}"
