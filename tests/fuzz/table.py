"""The table of all targets, by name."""

from __future__ import annotations

from tests.fuzz import answering, bundling, detecting, models, protocol, serving, storing
from tests.fuzz.target import Target

_ROOMS = (serving, protocol, bundling, models, storing, detecting, answering)
TARGETS: dict[str, Target] = {target.name: target for room in _ROOMS for target in room.TARGETS}
