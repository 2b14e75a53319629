"""What a request may ask for beside its answer: how long its model stays in memory, which option answers. Pure."""

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
    ``cache``: whether an answer that is kept will do.

    The others pick among the options of the version: a variant by its id, the longest p95, the least quality.
    """

    keep_s: float | None = None
    pin: bool | None = None
    variant: str | None = None
    max_latency_ms: float | None = None
    min_quality: float | None = None
    cache: bool = True

    @property
    def picks(self) -> bool:
        """Whether not just any option will do."""
        return self.variant is not None or self.max_latency_ms is not None or self.min_quality is not None


NO_WISHES = Wishes()
_NAMES = ("keep_alive", "pin", "variant", "max_latency_ms", "min_quality", "cache")


def wishes_of(parameters: Mapping[str, Any]) -> Wishes:
    """A request's ``keep_alive`` (seconds, negative: for ever), ``pin`` and ``cache`` (booleans), ``variant`` (text),
    ``max_latency_ms`` and ``min_quality`` (numbers). PeerError names the field."""
    keep, pin, variant, latency, quality, cache = found = tuple(map(parameters.get, _NAMES))
    if all(value is None for value in found):
        return NO_WISHES
    if keep is not None and not _is_number(keep):
        raise PeerError("parameters.keep_alive: must be a number of seconds, negative for ever")
    for name, value in (("pin", pin), ("cache", cache)):
        if value is not None and not isinstance(value, bool):
            raise PeerError(f"parameters.{name}: must be true or false")
    if variant is not None and not isinstance(variant, str):
        raise PeerError("parameters.variant: must be the id of a variant")
    if latency is not None and not (_is_number(latency) and latency > 0):
        raise PeerError("parameters.max_latency_ms: must be a number of milliseconds above 0")
    if quality is not None and not _is_number(quality):
        raise PeerError("parameters.min_quality: must be a number")
    keep_s = None if keep is None else FOREVER if keep < 0 else float(min(keep, 1e9))
    return Wishes(keep_s, pin, variant, latency, quality, cache is not False)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
