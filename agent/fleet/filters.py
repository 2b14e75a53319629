"""Which devices are meant: filters over what devices said of themselves, as ``--where`` takes them. Pure.

``board=Raspberry Pi 4*`` (patterns, ``|`` between alternatives, case does not matter), ``!=`` for its opposite,
``facts.mem_total_mb>=4000`` for numbers. What a device has not said matches neither a condition nor its opposite: a
filter never picks a device by what nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from agent.base.errors import NotFoundError, PeerError

_FILTER = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(!=|>=|<=|=|>|<)\s*(.*?)\s*", re.DOTALL)
#: Names for what is asked most; where each is found in the view of a device.
SHORT: Mapping[str, str] = {
    "device": "device",
    "board": "info.facts.board",
    "soc": "info.facts.soc",
    "arch": "info.facts.arch",
    "model": "info.facts.model",
    "profile": "info.profile",
    "agent": "info.agent_version",
    "memory": "info.facts.mem_total_mb",
    "jetpack": "info.facts.jetpack",
    "health": "reported.health",
    "online": "status.online",
    "epoch": "epoch",
}
#: What a longer path may begin with.
_ROOTS = {"facts": "info.facts", "inventory": "info.inventory", "config": "reported.config", "jobs": "reported.jobs"}
_GROUP = "group"
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": lambda left, right: left > right,
    "<": lambda left, right: left < right,
    ">=": lambda left, right: left >= right,
    "<=": lambda left, right: left <= right,
}


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition: where to look, how to compare, with what."""

    path: str
    operator: str
    value: str

    def matches(self, view: Mapping[str, Any]) -> bool:
        """Whether a device, as ``view`` describes it, is meant."""
        found = _look(view, self.path)
        if found is None:
            return False
        if self.operator in _COMPARE:
            return _number(found) and _COMPARE[self.operator](float(found), float(self.value))
        texts = [_text(item) for item in found] if isinstance(found, list) else [_text(found)]
        like = any(fnmatchcase(text, pattern.lower()) for text in texts for pattern in self.value.split("|"))
        return like == (self.operator == "=")


def parse_filters(texts: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None) -> list[Filter]:
    """Filters from texts; ``group=NAME`` stands for those of a group. PeerError, NotFoundError for an unknown group."""
    found: list[Filter] = []
    for text in texts:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise PeerError(f"cannot read filter '{text}': it is not like board=NAME", hint=_hint())
        name, operator, value = match.groups()
        if name == _GROUP:
            found += _group(value, operator, groups or {})
        else:
            found.append(_filter(text, name, operator, value))
    return found


def _group(name: str, operator: str, groups: Mapping[str, Sequence[str]]) -> list[Filter]:
    if operator != "=":
        raise PeerError(f"cannot read filter 'group{operator}{name}': a group is only asked for with =")
    if name not in groups:
        known = f"there are {', '.join(sorted(groups))}" if groups else "fleet.toml has no [groups]"
        raise NotFoundError(f"cannot find group '{name}': {known}")
    return parse_filters(groups[name])  # groups name filters, not other groups


def _filter(text: str, name: str, operator: str, value: str) -> Filter:
    head, _, rest = name.partition(".")
    if name in SHORT:
        path = SHORT[name]
    elif head in _ROOTS and rest:
        path = f"{_ROOTS[head]}.{rest}"
    else:
        raise PeerError(f"cannot read filter '{text}': there is no field '{name}'", hint=_hint())
    if operator in _COMPARE:
        try:
            float(value)
        except ValueError as error:
            raise PeerError(f"cannot read filter '{text}': '{value}' is no number") from error
    return Filter(path, operator, value)


def _hint() -> str:
    return f"fields: {', '.join(SHORT)}, group, and paths below {', '.join(_ROOTS)}"


def _look(view: Mapping[str, Any], path: str) -> Any:
    found: Any = view
    for part in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """As it would be typed: ``true``, ``4``, a name in small letters."""
    return str(value).lower()
