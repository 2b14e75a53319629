"""What may be deleted, decided from values alone.

Pure. The rule: a file goes only when no kept generation reaches it and no blob under way needs it. Names that are
neither a payload nor a header of ours are left alone and reported by ``doctor``: somebody else put them there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from agent.base.files import TEMPORARY_PREFIX
from agent.store.document import BlobRef

_OURS = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{16}\.header)?")


def reached(refs: Iterable[BlobRef]) -> frozenset[str]:
    """The file names, payloads and headers, that ``refs`` need."""
    return frozenset(name for ref in refs for name in (ref.payload, ref.header))


def unreached(files: Mapping[str, int], *kept: Iterable[str]) -> tuple[str, ...]:
    """Which of ``files`` (name to bytes) to delete, given what is ``kept``. Headers first.

    A payload without its header is unreadable; a header without its payload would be a secret about nothing.
    """
    needed = frozenset().union(*kept)
    gone = [name for name in files if _OURS.fullmatch(name) and name not in needed]
    return tuple(sorted(gone, key=lambda name: (not name.endswith(".header"), name)))


def foreign(files: Mapping[str, int]) -> tuple[str, ...]:
    """File names that the store never makes."""
    return tuple(sorted(name for name in files if not _OURS.fullmatch(name) and not name.startswith(TEMPORARY_PREFIX)))


def obsolete(numbers: Iterable[int], kept: Iterable[int]) -> tuple[int, ...]:
    """Which catalog generations to delete, oldest first."""
    return tuple(sorted(set(numbers) - set(kept)))
