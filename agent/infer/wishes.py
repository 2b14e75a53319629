"""What a request may ask for beside its answer: how long its model stays in memory, and a fresh one. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.base.errors import PeerError
from agent.infer.tiers import FOREVER


@dataclass(frozen=True, slots=True)
class Wishes:
    """``keep_s``: seconds that the model may stay unused, None: as set for all. ``pin``: keep it whatever comes.
    ``cache``: whether an answer that is kept will do."""

    keep_s: float | None = None
    pin: bool | None = None
    cache: bool = True


NO_WISHES = Wishes()


def wishes_of(parameters: Mapping[str, Any]) -> Wishes:
    """A request's ``keep_alive`` (seconds, negative: for ever), ``pin`` and ``cache`` (booleans). PeerError names the
    field."""
    keep, pin, cache = parameters.get("keep_alive"), parameters.get("pin"), parameters.get("cache")
    if keep is None and pin is None and cache is None:
        return NO_WISHES
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float)) or math.isnan(keep)):
        raise PeerError("parameters.keep_alive: must be a number of seconds, negative for ever")
    for name, value in (("pin", pin), ("cache", cache)):
        if value is not None and not isinstance(value, bool):
            raise PeerError(f"parameters.{name}: must be true or false")
    keep_s = None if keep is None else FOREVER if keep < 0 else float(min(keep, 1e9))
    return Wishes(keep_s, pin, cache is not False)
