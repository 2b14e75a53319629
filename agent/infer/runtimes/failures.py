"""What the runtimes share when they fail or end: shortage told from damage, reasons on one line, memory given back."""

from __future__ import annotations

import ctypes

#: What the runtimes say when an allocation fails: none has a class of error for it everywhere.
_SHORTAGE = (
    "bad_alloc", "bad allocation", "failed to allocate", "bfcarena::allocate", "failed to reshape runtime",
    "out of memory",
)  # fmt: skip


def is_shortage(error: Exception) -> bool:
    """Whether an allocation failed."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _SHORTAGE)


def one_line(error: Exception) -> str:
    """A runtime's message on one line of at most 300 characters; it may hold a model's own words, printable here.

    A long one keeps its beginning and its end: what was being done stands first, and the cause last.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"
    return "".join(char if char.isprintable() else "?" for char in text)


def return_memory() -> None:
    """Ask the allocator to give freed pages back: after a session is dropped RSS falls only then (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)
