"""Whether the fleet has signed a release: the repository's metadata, as core hands it over, checked again by root.

The chain begins at the root that lies beside ``trust.toml`` and is root's own; what was believed is kept in a folder of
root's own, so that an older state of the repository is refused here also by itself, whatever core says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from datetime import datetime, timezone

from agent.base.clock import SystemClock, TrustedClock, iso
from agent.base.errors import RefusedError, UnsupportedError
from agent.base.files import read_bounded, write_atomically
from agent.trust.allegiance import shipped_root
from agent.trust.releases import MAX_RELEASE_BYTES, Kind, Release, parse_release, release_target, require_fit
from agent.trust.repository import Mark, Repository, Target
from agent.trust.wants import DelayError, DeliveryError, Want
from agent.updater.ground import Ground

_METADATA = re.compile(r"metadata/(?:(?P<root>[0-9]{1,9}\.root\.json)|(?:[0-9]{1,9}\.)?(?P<role>[a-z]{1,32}\.json))")
_MAX_MARKS = 64 << 10


class HandedWants:
    """Wants answered from core's folder ``update/metadata``, laid out as python-tuf keeps it."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def fetch(self, want: Want) -> bytes:
        """See ``agent.trust.wants.Wants``."""
        match = _METADATA.fullmatch(want.path)
        if match is None:
            raise DelayError("not_found", f"{want.path} is nothing that is handed over")
        names = ("metadata", "root_history", match["root"]) if match["root"] else ("metadata", match["role"])
        data = self._ground.handed(*names, most=want.most)
        if data is None:
            raise DelayError("not_found", f"{want.path} was not handed over")
        return data


def believe(ground: Ground, version: str, kind: Kind, present: str, state: int) -> tuple[Target, Release]:
    """The release of that name for this machine, as the fleet signed it. RefusedError says why not; DelayError."""
    root = shipped_root(ground.trust_file)
    if root is None:
        raise UnsupportedError(
            "cannot update the agent: this device was given no root of a repository",
            hint="put the fleet's image/root.json beside trust.toml",
        )
    kept = _Kept(ground, hashlib.sha256(root).hexdigest())
    clock = TrustedClock(SystemClock(), "auto", kept.floor)
    repository = Repository(ground.own / "metadata", root, HandedWants(ground), clock, marks=kept.marks)
    try:
        believed = repository.refresh()
        kept.save(dict(believed.marks), clock)
        target = repository.find(release_target(version, kind))
    except (DeliveryError, DelayError) as error:
        raise RefusedError(f"cannot update the agent to {version}: {error.code}: {error}", hint=error.hint) from error
    release = parse_release(target.custom)
    require_fit(release, version, kind, present, state)
    if target.length > MAX_RELEASE_BYTES:
        raise RefusedError(f"cannot update the agent to {version}: it has {target.length} bytes, which is too much")
    return target, release


class _Kept:
    """The highest versions that were believed under one root, and the latest moment that is surely past."""

    def __init__(self, ground: Ground, root: str) -> None:
        self._path = ground.own / "marks.json"
        self._root = root
        self.marks: dict[str, Mark] = {}
        self.floor = datetime.fromtimestamp(0, timezone.utc)
        # Damaged or lost, the metadata's own folder still knows; and the next one that is believed is kept anew.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(read_bounded(self._path, _MAX_MARKS))
            self.floor = datetime.fromisoformat(found["floor"].replace("Z", "+00:00"))
            if found["root"] == root:
                self.marks = {role: Mark(int(row[0]), str(row[1])) for role, row in found["marks"].items()}

    def save(self, marks: dict[str, Mark], clock: TrustedClock) -> None:
        """Durable on return."""
        floor = max(self.floor, clock.clock.now()) if clock.trusted() else self.floor
        rows = {role: [mark.version, mark.keys] for role, mark in marks.items()}
        data = json.dumps({"root": self._root, "marks": rows, "floor": iso(floor)}).encode()
        write_atomically(self._path, data + b"\n", mode=0o644)
