"""Inputs out of inputs: edits that a seed is changed by, and the loop that makes and tries them where atheris is not.

The loop is blind to coverage, but not to behaviour: an input that makes a target answer in a way not seen before
(another error text, digits aside, or another kind of value) is kept and changed further.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fuzz.target import Target, check, check_memory, no_hang, words_in

#: (kind, place as a share of the length, argument, bytes)
Edit = tuple[str, float, int, bytes]
KINDS = ("flip", "set", "insert", "delete", "repeat", "swap", "cut", "digits", "splice")
ODD_NUMBERS = (
    b"0", b"-1", b"255", b"256", b"65536", b"2147483647", b"2147483648", b"4294967295", b"9223372036854775807",
    b"18446744073709551616", b"00000000000000000000007", b"1e308", b"1e309", b"0x10", b"+1", b"1_0", b"\xd9\xa3",
)  # fmt: skip
MOST_KEPT = 2000


def apply(data: bytes, edits: Sequence[Edit], most: int) -> bytes:
    """``data`` after the edits, one after the other, at most ``most`` bytes."""
    for kind, share, argument, piece in edits:
        place = min(int(share * (len(data) + 1)), len(data))
        data = _EDITS[kind](data, place, argument, piece)[:most]
    return data


def _flip(data: bytes, place: int, argument: int, _piece: bytes) -> bytes:
    if place == len(data):
        return data
    return data[:place] + bytes([data[place] ^ 1 << argument % 8]) + data[place + 1 :]


def _set(data: bytes, place: int, argument: int, piece: bytes) -> bytes:
    piece = piece or bytes([argument % 256])
    return data[:place] + piece + data[place + len(piece) :]


def _insert(data: bytes, place: int, argument: int, piece: bytes) -> bytes:
    return data[:place] + (piece or bytes([argument % 256])) + data[place:]


def _delete(data: bytes, place: int, argument: int, _piece: bytes) -> bytes:
    return data[:place] + data[place + 1 + argument % 64 :]


def _repeat(data: bytes, place: int, argument: int, _piece: bytes) -> bytes:
    size = 1 + argument % 61
    return data[:place] + data[place : place + size] * (2 + argument % 13) + data[place + size :]


def _swap(data: bytes, place: int, argument: int, _piece: bytes) -> bytes:
    size = 1 + argument % 31
    return data[:place] + data[place + size : place + 2 * size] + data[place : place + size] + data[place + 2 * size :]


def _cut(data: bytes, place: int, _argument: int, _piece: bytes) -> bytes:
    return data[:place]


def _digits(data: bytes, place: int, argument: int, _piece: bytes) -> bytes:
    """Another number in place of the next one."""
    found = re.compile(rb"[0-9]+").search(data, place)
    if found is None:
        return data
    return data[: found.start()] + ODD_NUMBERS[argument % len(ODD_NUMBERS)] + data[found.end() :]


def _splice(data: bytes, place: int, argument: int, piece: bytes) -> bytes:
    """The end of another input after the start of this one."""
    return data[:place] + piece[argument % (len(piece) + 1) :]


_EDITS: dict[str, Callable[[bytes, int, int, bytes], bytes]] = {
    "flip": _flip, "set": _set, "insert": _insert, "delete": _delete, "repeat": _repeat, "swap": _swap, "cut": _cut,
    "digits": _digits, "splice": _splice,
}  # fmt: skip


@dataclass(slots=True)
class Result:
    """What a run of the loop did."""

    executions: int = 0
    kept: int = 0
    seconds: float = 0.0
    slowest_ms: float = 0.0


class Loop:
    """Mutates, tries, keeps what is new. ``before`` is told each input ahead of its run, so that a crash leaves it."""

    def __init__(self, target: Target, corpus: Sequence[bytes], seed: int, before: Callable[[bytes], None]) -> None:
        self.target = target
        self.corpus = [data for data in corpus if len(data) <= target.most_bytes] or [b""]
        self.result = Result()
        self._seeds = list(self.corpus)
        self._chance = random.Random(seed)
        self._seen: set[str] = set()
        self._before = before
        self._words = words_in(target.words_file)

    def run(self, seconds: float) -> Result:
        """Until the time is over. Raises FindingError; ``before`` was told the input."""
        start = time.monotonic()
        for data in list(self.corpus):
            self._try(data)
        while (elapsed := time.monotonic() - start) < seconds:
            self._try(self._next())
        self.result.seconds, self.result.kept = elapsed, len(self.corpus)
        return self.result

    def _next(self) -> bytes:
        chance = self._chance
        # Half of the time a seed: what was kept is soon a crowd.
        data = chance.choice(self.corpus if chance.random() < 0.5 else self._seeds)
        edits = [self._edit() for _ in range(1 << chance.randrange(4))]
        return apply(data, edits, self.target.most_bytes)

    def _edit(self) -> Edit:
        chance = self._chance
        kind = chance.choice(KINDS)
        piece = b""
        if kind == "splice":
            piece = chance.choice(self.corpus)
        elif chance.random() < 0.5:
            piece = chance.choice(self._words)
        return kind, chance.random(), chance.randrange(1 << 16), piece

    def _try(self, data: bytes) -> None:
        self._before(data)
        began = time.thread_time()
        with no_hang():
            # Every sixteenth with its memory measured, which takes several times as long.
            if self.result.executions % 16 == 0:
                check_memory(self.target, data)
            behaviour = signature(check(self.target, data))
        self.result.slowest_ms = max(self.result.slowest_ms, (time.thread_time() - began) * 1e3)
        self.result.executions += 1
        if behaviour not in self._seen and len(self._seen) < MOST_KEPT:
            self._seen.add(behaviour)
            self.corpus.append(data)


def signature(outcome: object) -> str:
    """How a target behaved: an error's text without what it quotes, or the kind of the value and how large it is."""
    text = repr(outcome)
    if isinstance(outcome, tuple) and len(outcome) == 2 and all(isinstance(part, str) for part in outcome):
        return re.sub(r"[0-9]+", "0", re.sub(r"(['\"]).*?\1", "", outcome[0] + outcome[1]))[:200]
    return f"{type(outcome).__name__} {len(text).bit_length()}"
