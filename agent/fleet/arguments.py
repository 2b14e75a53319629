"""What operations are for and which arguments they take, as an operator types them. Pure.

The device has the last word on arguments; this table is there so that a slip is told before anything is signed, and so
that ``lines=50`` is a number and ``version=1.0`` is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.base.errors import PeerError

Kind = Literal["text", "whole", "flag", "list", "table"]
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Usage:
    """An operation in a line, its arguments by name, and which of them must be given."""

    text: str
    takes: Mapping[str, Kind] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


USAGE: Mapping[str, Usage] = {
    "ping": Usage("does it answer?"),
    "status": Usage("what 'edge-agent status' says there"),
    "jobs.list": Usage("the jobs that the device remembers"),
    "logs.tail": Usage("the last lines of the agent's log", {"lines": "whole"}),
    "diagnostics.collect": Usage("state, configuration and log in a small archive without secrets"),
    "model.install": Usage(
        "install a published version, or let one that was added on the device answer",
        {"model": "text", "version": "text"},
        ("model", "version"),
    ),
    "model.activate": Usage(
        "let an installed version answer", {"model": "text", "version": "text"}, ("model", "version")
    ),
    "model.rollback": Usage("back to the version before the active one", {"model": "text"}, ("model",)),
    "model.pin": Usage(
        "leave the active version alone: no other is installed or activated",
        {"model": "text", "pinned": "flag"},
        ("model",),
    ),
    "model.remove": Usage("delete a model or one of its versions", {"model": "text", "version": "text"}, ("model",)),
    "config.apply": Usage(
        "set what a fleet may set; taken back when the link does not return", {"config": "table"}, ("config",)
    ),
    "store.scrub": Usage("verify every encrypted file"),
    "store.gc": Usage("delete what no installed version needs"),
    "store.rotate-key": Usage("move the store to the next device secret"),
    "cache.flush": Usage("unload all models and forget kept answers; models are loaded again when asked for"),
    "bench.run": Usage("try a model's variants again and choose anew", {"model": "text"}, ("model",)),
    "maintenance.plan": Usage("run tasks of the maintenance plan now", {"run": "list"}, ("run",)),
    "agent.update": Usage("install a published release of the agent itself", {"version": "text"}, ("version",)),
    "agent.restart": Usage("restart the agent"),
    "device.reboot": Usage("reboot the device"),
}


def parse_arguments(op: str, words: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``key=value`` words as the operation takes them, beside ``given`` (JSON, taken as it is). PeerError."""
    usage = USAGE.get(op, Usage(""))
    found: dict[str, Any] = dict(given or {})
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise PeerError(f"cannot read argument '{word}': it is not like name=value", hint=_hint(op, usage))
        if name in found:
            raise PeerError(f"cannot read arguments: '{name}' is given twice")
        kind = usage.takes.get(name)
        if kind is None:
            raise PeerError(f"cannot give '{op}' the argument '{name}': it takes no such", hint=_hint(op, usage))
        found[name] = _value(name, kind, value)
    missing = [name for name in usage.needs if name not in found]
    if missing:
        raise PeerError(f"cannot give '{op}': it needs {' and '.join(missing)}", hint=_hint(op, usage))
    return found


def _value(name: str, kind: Kind, value: str) -> Any:
    if kind == "whole":
        if not value.isascii() or not value.isdigit() or len(value) > 15:
            raise PeerError(f"cannot read argument '{name}': '{value}' is no whole number")
        return int(value)
    if kind == "flag":
        if value.lower() not in _FLAGS:
            raise PeerError(f"cannot read argument '{name}': '{value}' is neither true nor false")
        return _FLAGS[value.lower()]
    if kind == "list":
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind == "table":
        raise PeerError(f"cannot read argument '{name}': a table comes by --args, or as {name}=@FILE")
    return value


def _hint(op: str, usage: Usage) -> str:
    if not usage.takes:
        return f"{op} takes no arguments"
    named = [
        f"{name}={kind.upper()}" if name in usage.needs else f"[{name}={kind.upper()}]"
        for name, kind in usage.takes.items()
    ]
    return f"{op} takes {' '.join(named)}"


def describe_arguments(op: str) -> str:
    """The arguments in a line, for help."""
    return _hint(op, USAGE.get(op, Usage("")))
