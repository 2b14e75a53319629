"""What core wants from the world: the only way in which anything from outside reaches verification.

Core has no network. Whatever it needs from the repository it names as a ``Want``: a path below the repository's base, a
most that is taken of it, and how long is waited. Somebody else (link, a test, the verifying operator) brings the bytes:
``agent.trust.desk``. Nothing here judges what the bytes mean. Light: this module must not bring in tuf.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from agent.base.errors import RefusedError, TryLaterError

#: Why a delivery was refused, as docs/spec/delivery.md 4 has them.
Reason = Literal[
    "bad_root", "bad_signature", "expired", "malformed", "mixed", "not_listed", "rollback", "too_long", "wrong_content"
]
#: Why one is late: trying again may help. A word is what whoever brings it may say.
Word = Literal["not_found", "too_slow", "unreachable"]
Delay = Literal[Word, "stopped", "too_many"]

WORDS: tuple[Word, ...] = ("not_found", "too_slow", "unreachable")

METADATA = "metadata"
TARGETS = "targets"


class DeliveryError(RefusedError):
    """What the repository brought is not believed. ``code`` is its reason."""

    def __init__(self, code: Reason, text: str, *, hint: str = "") -> None:
        super().__init__(f"cannot accept from the repository: {text}", hint=hint)
        self.code = code


class DelayError(TryLaterError):
    """The repository did not bring something. ``code`` is its reason."""

    def __init__(self, code: Delay, text: str, *, hint: str = "") -> None:
        super().__init__(f"cannot fetch from the repository: {text}", hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class Want:
    """Something to fetch. ``path`` is relative to the repository's base, in the letters of a URL's path.

    ``most`` bytes are taken, ``length`` is exact where it is known, ``sha256`` (hex) likewise. ``within_s`` is how long
    is waited in all. ``offset`` says how many bytes are here already: what is brought begins there.
    """

    id: str
    path: str
    most: int
    within_s: float
    length: int | None = None
    sha256: str | None = None
    offset: int = 0


class Wants(Protocol):
    """Where wants are answered."""

    def fetch(self, want: Want) -> bytes:
        """The bytes. Blocks until they are there. DeliveryError too_long; DelayError."""
        ...


def ids(prefix: str = "w") -> Callable[[], str]:
    """Names for wants, one after the other. No later start gives the same: what comes late fits nothing."""
    start, numbers = secrets.token_hex(6), itertools.count(1)
    return lambda: f"{prefix}{start}-{next(numbers)}"


# -- the repository's paths (docs/spec/delivery.md 2) -----------------------------------------------------------------


def manifest_target(model: str, version: str) -> str:
    """The target that is a version's manifest."""
    return f"models/{model}/{version}/model.json"


def payload_target(model: str, version: str, part: str) -> str:
    """The target that is the payload of a file of a version."""
    return f"models/{model}/{version}/payload/{part}"


def header_target(model: str, version: str, part: str) -> str:
    """The target that is the payload's age header for the operator: before the payload, it makes an age file."""
    return f"models/{model}/{version}/header/{part}"


def target_file(target: str, digest: str) -> str:
    """Where a target lies below ``targets``: with its digest before its name (TUF 1.0.34, 6.2)."""
    folder, _, name = target.rpartition("/")
    return f"{folder}/{digest}.{name}" if folder else f"{digest}.{name}"
