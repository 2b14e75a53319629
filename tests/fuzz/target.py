"""What a fuzz target is, and the check of one input against it.

A target is a reader of bytes that nobody vouches for. For any input it either raises one of its allowed errors, with a
text fit to be shown, or gives a value for which ``holds`` finds nothing wrong; and it takes memory in proportion to the
input. Everything else is a ``FindingError``.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import signal
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.base.errors import AgentError

#: Longest error text: it goes into an answer, a log line, a terminal.
MOST_ERROR_TEXT = 4096
#: CPU seconds after which an input counts as a hang; thousands of times what one takes.
HANG_CPU_S = 20.0


class FindingError(AssertionError):
    """An input on which a target does what it must not do. The text says what."""


class HangError(BaseException):
    """The time for one input is used up. Not an Exception: nothing under test may catch it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that an input may take at its peak: ``fixed`` and ``per_byte`` for each byte of it."""

    fixed: int = 1 << 20
    per_byte: int = 64

    def allowed(self, length: int) -> int:
        """Bytes that an input of such a length may take."""
        return self.fixed + self.per_byte * length

    def check(self, used: int, length: int, what: str) -> None:
        """FindingError when an input of such a length took more."""
        allowed = self.allowed(length)
        if used > allowed:
            raise FindingError(f"{what}: {used} bytes of memory for an input of {length}, {allowed} allowed")


#: An input of about so many bytes, made of ever more of one thing.
Shape = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """One reader. ``read`` may raise ``allowed`` only; ``holds`` raises AssertionError where an invariant is broken.

    ``seeds`` are real inputs, ``dictionary`` names the file of words that mutation should know. ``shapes`` are for the
    tests of time and memory; ``grown`` is their largest size in bytes. ``work`` is run by the tests of time in place of
    ``read`` where that is nearer to how the bytes come in.
    """

    name: str
    read: Callable[[bytes], Any]
    holds: Callable[[bytes, Any], None]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], Sequence[bytes]]
    dictionary: str
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    work: Callable[[bytes], Any] | None = None
    most_bytes: int = 4096
    grown: int = 1 << 18
    memory: Memory = Memory()

    @property
    def words_file(self) -> Path:
        """Its dictionary, as libFuzzer has them: a quoted word a line."""
        return Path(__file__).parent / "words" / f"{self.dictionary}.dict"


@functools.lru_cache(maxsize=64)
def words_in(path: Path) -> tuple[bytes, ...]:
    """The words of a dictionary."""
    return tuple(ast.literal_eval("b" + line) for line in path.read_text("ascii").splitlines())


def many(unit: bytes, head: bytes = b"", tail: bytes = b"") -> Shape:
    """``unit`` over and over; with ``%d`` in it, each with its own number."""
    if b"%d" in unit:
        return lambda size: head + b"".join(unit % number for number in range(size // (len(unit) + 3))) + tail
    return lambda size: head + unit * (size // len(unit)) + tail


def nested(opening: bytes, closing: bytes, head: bytes = b"", core: bytes = b"", tail: bytes = b"") -> Shape:
    """Ever deeper."""

    def make(size: int) -> bytes:
        depth = size // (len(opening) + len(closing))
        return head + opening * depth + core + closing * depth + tail

    return make


def check(target: Target, data: bytes) -> object:
    """Run one input. Returns what was read, or the error's class and text; raises FindingError."""
    try:
        value = target.read(data)
    except target.allowed as error:
        _fit_to_be_shown(error)
        return type(error).__name__, str(error)
    except Exception as error:
        raise FindingError(f"{target.name}: {type(error).__name__}: {error}"[:500]) from error
    try:
        target.holds(data, value)
    except FindingError:
        raise
    except Exception as error:
        raise FindingError(f"{target.name}: {type(error).__name__}: {error}"[:2000]) from error
    return value


def _fit_to_be_shown(error: Exception) -> None:
    """One line, bounded, without control characters: input must not write on the operator's terminal or log."""
    texts = [str(error), error.hint] if isinstance(error, AgentError) else [str(error)]
    for text in texts:
        if len(text) > MOST_ERROR_TEXT:
            raise FindingError(f"an error's text of {len(text)} characters: {text[:200]!r}...")
        if not text.isprintable():
            raise FindingError(f"an error's text that is not printable: {text[:500]!r}")
    if not texts[0]:
        raise FindingError(f"an error without a text: {type(error).__name__}")


def traced_peak(do: Callable[[], object]) -> int:
    """The most that Python's allocators gave at once while ``do`` ran, in bytes."""
    outside = tracemalloc.is_tracing()
    if not outside:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        do()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if not outside:
            tracemalloc.stop()
    return peak - before


def check_memory(target: Target, data: bytes) -> int:
    """``check``, and what memory it took, in bytes. Raises FindingError when it is too much."""
    used = traced_peak(lambda: check(target, data))
    if used > target.memory.allowed(len(data)):  # an import, or a thread that another test left; an input does it again
        used = min(used, traced_peak(lambda: check(target, data)))
    target.memory.check(used, len(data), target.name)
    return used


@contextlib.contextmanager
def no_hang(seconds: float = HANG_CPU_S) -> Iterator[None]:
    """Raise FindingError when the block takes more CPU time than that. For the main thread; elsewhere no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_signal: int, _frame: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except HangError:
        raise FindingError(f"no end after {seconds:g} s of CPU time") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """No garbage collection in the block, whose cost would fall on whoever happens to allocate."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
