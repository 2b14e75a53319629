"""Takes the fields of a TOML table one by one, strictly: wrong types, bounds and unknown names become problems.

A problem names the field as a person would look for it (``match.compatible``). Everything wrong with a file is found in
one pass. Written by hand because importing a validation library costs more time than all of detection may take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LONGEST_TEXT = 2000
_LONGEST_LIST = 256


class Fields:
    """The fields of one table. Each method takes a field out; ``close`` then reports those that nobody took."""

    def __init__(self, table: Mapping[str, Any], problems: list[str], prefix: str = "") -> None:
        self._left = dict(table)
        self._problems = problems
        self._prefix = prefix

    def text(self, name: str, *, required: bool = False) -> str:
        """A non-empty text, '' when absent."""
        value = self._take(name, required=required)
        if value is None:
            return ""
        if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_TEXT:
            self._wrong(name, "must be a text that is not empty", value)
            return ""
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of non-empty texts."""
        value = self._take(name)
        if value is None:
            return ()
        if (
            not isinstance(value, list)
            or len(value) > _LONGEST_LIST
            or not all(isinstance(v, str) and 0 < len(v) <= _LONGEST_TEXT for v in value)
        ):
            self._wrong(name, "must be a list of texts", value)
            return ()
        return tuple(value)

    def words(self, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """A list of words out of those allowed, none twice."""
        values = self.texts(name)
        odd = [value for value in values if value not in allowed]
        if odd:
            self._wrong(name, f"must be of {', '.join(allowed)}", odd[0])
        elif len(set(values)) < len(values):
            self._wrong(name, "names one twice", list(values))
        return tuple(value for value in values if value in allowed)

    def integers(self, name: str, *, most: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to ``most``."""
        value = self._take(name)
        if value is None:
            return ()
        if (
            not isinstance(value, list)
            or len(value) > _LONGEST_LIST
            or not all(type(v) is int and 0 <= v <= most for v in value)
        ):
            self._wrong(name, f"must be a list of whole numbers from 0 to {most}", value)
            return ()
        return tuple(value)

    def integer(self, name: str, *, least: int, most: int) -> int | None:
        """A whole number in bounds; None when absent."""
        value = self._take(name)
        if value is not None and not (type(value) is int and least <= value <= most):
            self._wrong(name, f"must be a whole number from {least} to {most}", value)
            return None
        return value

    def number(self, name: str, *, least: float, most: float, default: float | None = None) -> float | None:
        """A number in bounds; ``default`` when absent or wrong."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            self._wrong(name, f"must be a number from {least:g} to {most:g}", value)
            return default
        return float(value)

    def flag(self, name: str) -> bool | None:
        """true or false; None when absent."""
        value = self._take(name)
        if value is not None and not isinstance(value, bool):
            self._wrong(name, "must be true or false", value)
            return None
        return value

    def table(self, name: str) -> Fields | None:
        """A sub-table; None when absent."""
        value = self._take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self._wrong(name, f"must be a table ([{self._prefix}{name}])", value)
            return None
        return Fields(value, self._problems, f"{self._prefix}{name}.")

    def tables(self, name: str) -> list[Fields]:
        """An array of tables."""
        value = self._take(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self._wrong(name, f"must be an array of tables ([[{self._prefix}{name}]])", value)
            return []
        return [Fields(entry, self._problems, f"{self._prefix}{name}[{i}].") for i, entry in enumerate(value)]

    def problem(self, name: str, what: str) -> None:
        """Report something that only the caller can judge."""
        self._problems.append(f"{self._prefix}{name}: {what}")

    def close(self) -> None:
        """Report the fields that nobody knows."""
        for name in self._left:
            self._problems.append(f"{self._prefix}{name}: no such field")

    def _take(self, name: str, *, required: bool = False) -> Any:
        if name not in self._left:
            if required:
                self._problems.append(f"{self._prefix}{name}: missing")
            return None
        return self._left.pop(name)

    def _wrong(self, name: str, what: str, value: object) -> None:
        try:
            shown = repr(value)
        except (ValueError, RecursionError):  # a number of thousands of digits, lists a thousand deep
            shown = "not to be shown"
        self._problems.append(f"{self._prefix}{name}: {what}, is {shown if len(shown) <= 60 else shown[:57] + '...'}")
