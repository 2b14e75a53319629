"""A reader of FlatBuffers over a descriptor, for looking into files that nobody vouches for.

Invariants: reads only with ``pread`` (a file cut short meanwhile is an error, never a SIGBUS as with a mapping); holds
a few blocks of the file and the strings it is asked for; visits at most ``MAX_VISITS`` tables, strings and vectors, so
that a hostile file costs bounded time and memory, however its offsets cross each other.
Source: FlatBuffers documentation, "FlatBuffer Internals"; its ``Verifier`` for what a sound buffer is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agent.base.errors import PeerError, TooLargeError

#: Several times what large published models have; a few seconds of reading at worst.
MAX_VISITS = 300_000
MAX_TEXT_BYTES = 1 << 16
_BLOCK = 1 << 14
_MOST_BLOCKS = 64
#: No format read here has more; a vtable could announce 32,000, for each of many tables.
_MOST_FIELDS = 32
_SCALARS = {1: struct.Struct("<b"), 2: struct.Struct("<h"), 4: struct.Struct("<i"), 8: struct.Struct("<q")}

#: What may stand in a field: a scalar or vector of so many bytes ("4", "[4"), a text ("s", "[s"), a table or tables
#: ("Tensor", "[Tensor"), a union ("|Options": the type in the field before says which table, by ``Layout.unions``),
#: or nothing that is looked at ("").
Fields = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A format: fields of each table by name in order, tables of each union by type. Unlisted tables are opaque."""

    tables: Mapping[str, Fields]
    unions: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Where a table lies, and the place of each of its fields; 0 where the field is absent."""

    position: int
    fields: tuple[int, ...]

    def at(self, slot: int) -> int:
        """The place of a field, 0 when it is not there."""
        return self.fields[slot] if slot < len(self.fields) else 0


@dataclass(frozen=True, slots=True)
class Vector:
    """``count`` elements from ``start``."""

    start: int
    count: int


_EMPTY = Vector(0, 0)


class FlatReader:
    """Tables in the first ``size`` bytes of ``descriptor``. Its position in the file is not moved."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._visits_left = MAX_VISITS
        self._blocks: dict[int, bytes] = {}

    def root(self) -> Table:
        """The root table. PeerError for what is no FlatBuffer."""
        return self.table(self._target(0))

    def scalar(self, table: Table, slot: int, width: int, default: int = 0) -> int:
        """A whole number of ``width`` bytes, signed."""
        place = table.at(slot)
        return default if not place else self._number(place, width)

    def child(self, table: Table, slot: int) -> Table | None:
        """The table that a field points at."""
        place = table.at(slot)
        return self.table(self._target(place)) if place else None

    def children(self, table: Table, slot: int) -> Iterator[Table]:
        """The tables of a vector."""
        vector = self.vector(table, slot, 4)
        for index in range(vector.count):
            yield self.element(vector, index)

    def element(self, vector: Vector, index: int) -> Table:
        """A table of a vector of tables. PeerError where the vector is not that long."""
        if not 0 <= index < vector.count:
            raise malformed()
        return self.table(self._target(vector.start + 4 * index))

    def text(self, table: Table, slot: int, limit: int = MAX_TEXT_BYTES) -> str:
        """A string; empty where the field is absent. PeerError unless it is UTF-8, TooLargeError beyond ``limit``."""
        vector = self.vector(table, slot, 1)
        if vector.count > limit:
            raise TooLargeError(f"cannot read model file: a text of {vector.count} bytes")
        try:
            return self._raw(vector.start, vector.count).decode()
        except UnicodeDecodeError as error:
            raise PeerError("cannot read model file: a name is not UTF-8") from error

    def numbers(self, table: Table, slot: int, code: str, most: int) -> tuple[int | float, ...]:
        """The numbers of a vector, ``code`` as in ``struct``; TooLargeError for more than ``most``."""
        width = struct.calcsize("<" + code)
        vector = self.vector(table, slot, width)
        if vector.count > most:
            raise TooLargeError(f"cannot read model file: a list of {vector.count} numbers where {most} fit")
        return struct.unpack(f"<{vector.count}{code}", self._raw(vector.start, vector.count * width))

    def vector(self, table: Table, slot: int, width: int) -> Vector:
        """Where the elements of a vector lie, each of ``width`` bytes; empty where the field is absent."""
        place = table.at(slot)
        return self._vector(self._target(place), width) if place else _EMPTY

    def table(self, position: int) -> Table:
        """The table at ``position``: its own and its fields' places lie in the file."""
        self._visit()
        if position % 4:
            raise malformed()
        vtable = position - self._number(position, 4)
        if vtable % 2:
            raise malformed()
        length = self._number(vtable, 2) & 0xFFFF
        if length < 4 or length % 2:
            raise malformed()
        if vtable + length > self._size:
            raise malformed()
        used = min(length // 2 - 2, _MOST_FIELDS)
        offsets = struct.unpack(f"<{used}H", self._raw(vtable + 4, 2 * used))
        return Table(position, tuple(position + offset if offset else 0 for offset in offsets))

    def check(self, layout: Layout, name: str, table: Table) -> None:
        """PeerError unless everything that ``layout`` says of ``table`` and what hangs on it lies soundly in the file.

        The layout must not be recursive. What a newer format may have besides is not looked at.
        """
        self._check(layout, name, table, {})

    def _check(self, layout: Layout, name: str, table: Table, seen: dict[str, set[int]]) -> None:
        places = seen.setdefault(name, set())
        if table.position in places:
            return
        places.add(table.position)
        for slot, kind in enumerate(layout.tables.get(name, ())):
            place = table.at(slot)
            if not place or not kind:
                continue
            if kind.isdigit():
                self._number(place, int(kind))
                continue
            target = self._target(place)
            if kind == "s":
                self._text(target)
            elif kind.startswith("["):
                self._check_vector(layout, kind[1:], target, seen)
            else:
                self._check(layout, self._named(layout, kind, table, slot), self.table(target), seen)

    def _named(self, layout: Layout, kind: str, table: Table, slot: int) -> str:
        """Which table a field points at: of a union, the one that the field before it says."""
        if not kind.startswith("|"):
            return kind
        return layout.unions[kind[1:]].get(self.scalar(table, slot - 1, 1) & 0xFF, "")

    def _check_vector(self, layout: Layout, kind: str, position: int, seen: dict[str, set[int]]) -> None:
        if kind.isdigit():
            self._vector(position, int(kind))
            return
        vector = self._vector(position, 4)
        for index in range(vector.count):
            target = self._target(vector.start + 4 * index)
            if kind == "s":
                self._text(target)
            else:
                self._check(layout, kind, self.table(target), seen)

    def _text(self, position: int) -> None:
        vector = self._vector(position, 1)
        if self._raw(vector.start + vector.count, 1) != b"\0":
            raise malformed()

    def _vector(self, position: int, width: int) -> Vector:
        self._visit()
        count = self._number(position, 4) & 0xFFFF_FFFF
        start = position + 4
        if start % width or count * width > self._size - start:
            raise malformed()
        return Vector(start, count)

    def _target(self, place: int) -> int:
        """Where an offset field points: always forwards."""
        return place + (self._number(place, 4) & 0xFFFF_FFFF)

    def _number(self, place: int, width: int) -> int:
        if place % width:
            raise malformed()
        number: int = _SCALARS[width].unpack(self._raw(place, width))[0]
        return number

    def _visit(self) -> None:
        self._visits_left -= 1
        if self._visits_left < 0:
            raise TooLargeError(f"cannot read model file: more than {MAX_VISITS} parts")

    def _raw(self, position: int, length: int) -> bytes:
        if not 0 <= position <= self._size - length:
            raise malformed()
        parts: list[bytes] = []
        while True:
            number, offset = divmod(position, _BLOCK)
            block = self._blocks.get(number)
            if block is None:
                block = self._fetch(number)
            part = block[offset : offset + length]
            if len(part) == length and not parts:
                return part
            if not part and length:
                raise malformed()  # cut short since its size was asked
            parts.append(part)
            position, length = position + len(part), length - len(part)
            if not length:
                return b"".join(parts)

    def _fetch(self, number: int) -> bytes:
        if len(self._blocks) >= _MOST_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        block = self._blocks[number] = os.pread(self._descriptor, _BLOCK, number * _BLOCK)
        return block


def malformed() -> PeerError:
    """What is wrong with a file that contradicts itself."""
    return PeerError("cannot read model file: it is no TFLite file, or it is damaged or cut short")
