"""What core wants link to bring: ``GET /v1/link/wants``, and what it says to bytes that were brought. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.link.settings import field_of, of_kind, optional_of


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file: ``path`` below a mirror's base, in the letters of a URL. ``length`` is None where nobody knows it."""

    id: str
    path: str
    most: int
    within_s: float
    length: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All that is wanted now, and where it may be fetched from. ``rate_kib_s`` 0: as fast as it comes.

    ``doubts``: how often core has not believed metadata that it had taken.
    """

    version: int
    mirrors: tuple[str, ...]
    ca_file: str
    rate_kib_s: int
    blocks: bool
    wants: tuple[Wanted, ...]
    doubts: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    """Core has taken bytes: where the next belong, and whether there are any."""

    offset: int
    done: bool


def parse_listing(document: Any) -> Listing:
    """Core's list. DamagedError names the field that makes no sense."""
    known = of_kind(document, dict, "answer")
    mirrors = [of_kind(item, str, "mirror") for item in field_of(known, "mirrors", list)]
    wants = [_wanted(of_kind(item, dict, "want")) for item in field_of(known, "wants", list)]
    return Listing(
        version=field_of(known, "version", int),
        mirrors=tuple(mirrors),
        ca_file=optional_of(known, "ca_file", str) or "",
        rate_kib_s=max(0, field_of(known, "rate_kib_s", int)),
        blocks=field_of(known, "blocks", bool),
        wants=tuple(wants),
        doubts=optional_of(known, "doubts", int) or 0,
    )


def _wanted(known: dict[str, Any]) -> Wanted:
    return Wanted(
        id=field_of(known, "id", str),
        path=field_of(known, "path", str),
        most=field_of(known, "most", int),
        within_s=float(field_of(known, "within_s", (int, float))),
        length=optional_of(known, "length", int),
        offset=max(0, field_of(known, "offset", int)),
    )


def parse_put(document: Any) -> Put:
    """Core's answer to bytes. DamagedError."""
    known = of_kind(document, dict, "answer")
    return Put(field_of(known, "offset", int), field_of(known, "done", bool))
