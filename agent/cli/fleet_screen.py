"""A part of the terminal that is redrawn in place. Draws nothing where the stream is no terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from agent.base.errors import one_line

_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_ALTERNATE, _NORMAL = "\x1b[?1049h\x1b[H", "\x1b[?1049l"
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"


class Screen:
    """Lines that replace each other. ``whole``: the whole screen, which is given back at the end; else the lines
    below the cursor, of which the last ones stay. A context manager."""

    def __init__(self, stream: TextIO, *, whole: bool = False) -> None:
        self._stream = stream
        self._whole = whole
        self._drawn = 0
        self.live = stream.isatty()

    def __enter__(self) -> Screen:
        if self.live:
            self._write(_HIDE + (_ALTERNATE if self._whole else ""))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._write((_NORMAL if self._whole else "") + _SHOW)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        columns, lines = shutil.get_terminal_size()
        return max(20, columns), max(5, lines)

    def draw(self, lines: Sequence[str]) -> None:
        """Replace what was drawn by ``lines``, cut to what fits."""
        if not self.live:
            return
        columns, height = self.size
        shown = [one_line(line)[:columns] for line in lines[: height - 1]]
        up = "\x1b[H" if self._whole else (f"\x1b[{self._drawn}F" if self._drawn else "\r")
        self._write(up + "".join(f"{line}{_CLEAR_LINE}\n" for line in shown) + _CLEAR_BELOW)
        self._drawn = len(shown)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns as wide as their content."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
