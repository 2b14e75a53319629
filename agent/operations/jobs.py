"""What each kind of job does: its arguments checked, its steps, what undoes them and what tells that they hold.

One row an operation in ``Jobs.handlers``. Whether an effect holds is asked of the world (catalog, key, start), not of
what was noted: the note may have been lost, the effect not. Everything here blocks and runs on the thread of its
lane; the serving side is reached through what ``Jobs`` was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from agent.base.errors import ConflictError, DamagedError, NotFoundError, PeerError, UnsupportedError
from agent.base.files import read_bounded
from agent.operations.install import Installer
from agent.operations.maintain import Maintenance
from agent.operations.origin import Origin
from agent.operations.probation import UNWATCHED, Case, Watcher, mark
from agent.operations.probation import steps as probation_steps
from agent.operations.updates import Updates
from agent.store.document import CatalogDocument, ModelEntry
from agent.store.store import Store
from agent.work.steps import Handler, RestartPending, Step, Turn

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOST_LINES = 500
_MOST_TASKS = 32


class Configuring(Protocol):
    """The half of the configuration that the fleet may set."""

    def check(self, config: Mapping[str, Any]) -> None:
        """PeerError for what cannot be set from afar, or not to that."""
        ...

    def apply(self, config: Mapping[str, Any], mark: str) -> None:
        """Let it hold, until ``confirmed`` or ``revert``; ``mark`` who asked. The same mark again is nothing."""
        ...

    def holds(self, mark: str) -> bool:
        """Whether what is in force is what ``mark`` asked for."""
        ...

    def confirm(self, mark: str, go_on: Callable[[], None]) -> None:
        """Wait until the link has come back with it. DeadlineError when it has not: then it is taken back."""
        ...

    def revert(self, mark: str) -> None:
        """Back to what held before ``mark``, if that is in force."""
        ...


@dataclass(frozen=True, slots=True)
class Around:
    """What the handlers use of the rest of the agent."""

    store: Store
    installer: Installer
    maintenance: Maintenance
    configuring: Configuring
    unload_all: Callable[[], int]
    tail: Callable[[int], list[str]]
    collect: Callable[[], dict[str, Any]]
    run_tasks: Callable[[Sequence[str], Callable[[], None]], list[dict[str, Any]]]
    task_names: Sequence[str]
    restart: Callable[[], None]
    reboot: Callable[[], None]
    #: Withdraws a request to reboot that nobody has followed yet.
    stay: Callable[[], None]
    watcher: Watcher = UNWATCHED
    #: Where published versions come from; None where nobody brings any.
    origin: Origin | None = None
    #: How root is asked for another release of the agent; None where nobody updates it.
    updates: Updates | None = None
    link_is_up: Callable[[], bool] = lambda: False


#: Checked arguments, by name.
_Args = SimpleNamespace
_NEEDED = object()


class _Field(NamedTuple):
    """One argument: whether a value will do, what it must be in words, and what it is when it is not given."""

    right: Callable[[Any], bool]
    told: str
    default: Any = _NEEDED


def _is_lines(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_LINES


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_TASKS and all(isinstance(name, str) for name in value)


_TEXT = _Field(lambda value: isinstance(value, str), "a text")
_FLAG = _Field(lambda value: isinstance(value, bool), "true or false", False)
_MODEL = {"model": _TEXT}
_VERSION = {"model": _TEXT, "version": _TEXT}
_INSTALL = {
    **_VERSION,
    "accept_slower": _FLAG,
    "grants": _Field(lambda value: isinstance(value, dict), "an object", {}),
}
_REMOVE = {"model": _TEXT, "version": _Field(lambda value: value is None or isinstance(value, str), "a text", None)}
_PIN = {"model": _TEXT, "pinned": _Field(lambda value: isinstance(value, bool), "true or false", True)}
_CONFIG = {"config": _Field(lambda value: isinstance(value, dict), "an object")}
_LINES = {"lines": _Field(_is_lines, f"1 to {_MOST_LINES}", 100)}
_RELEASE = {"version": _TEXT}
_TASKS = {"run": _Field(_is_names, f"a list of 1 to {_MOST_TASKS} tasks")}


def _checked(fields: Mapping[str, _Field], args: Mapping[str, Any]) -> _Args:
    """The arguments, with those that were left out. PeerError names the first that is wrong."""
    if unknown := sorted(set(args) - set(fields)):
        raise PeerError(f"cannot take arguments: unknown '{unknown[0]}'")
    found = {}
    for name, field in fields.items():
        value = args.get(name, field.default)
        if value is _NEEDED:
            raise PeerError(f"cannot take arguments: '{name}' is missing")
        if name in args and not field.right(value):
            raise PeerError(f"cannot take arguments: '{name}' must be {field.told}")
        found[name] = value
    return _Args(**found)


class Jobs:
    """The table of handlers."""

    def __init__(self, around: Around) -> None:
        self._around = around

    def handlers(self) -> dict[str, Handler]:
        """By operation."""
        rows: dict[str, tuple[Mapping[str, _Field], Callable[[_Args], Sequence[Step]]]] = {
            "ping": ({}, lambda args: [Step("ping", "accepted", lambda turn: {"pong": True})]),
            "logs.tail": (_LINES, self._tail),
            "diagnostics.collect": ({}, self._collect),
            "model.install": (_INSTALL, self._install),
            "model.activate": (_VERSION, self._activate),
            "model.rollback": (_MODEL, self._rollback),
            "model.pin": (_PIN, self._pin),
            "model.remove": (_REMOVE, self._remove),
            "config.apply": (_CONFIG, self._configure),
            "store.scrub": ({}, self._scrub),
            "store.gc": ({}, self._gc),
            "store.rotate-key": ({}, self._rotate),
            "cache.flush": ({}, self._flush),
            "bench.run": (_MODEL, self._bench),
            "maintenance.plan": (_TASKS, self._plan),
            "agent.update": (_RELEASE, self._update),
            "agent.restart": ({}, self._restart),
            "device.reboot": ({}, self._reboot),
        }
        return {op: partial(_handle, fields, steps) for op, (fields, steps) in rows.items()}

    # -- models ---------------------------------------------------------------------------------------------------

    def _install(self, args: _Args) -> list[Step]:
        """With grants a published version is fetched; without, it is on the device already. Then it is to answer."""
        if not args.grants:
            return [*self._verified(args), *self._let_answer(args)]
        from agent.operations.delivered import Asked, Installation, parse_grants  # noqa: PLC0415 - most fetch nothing

        around = self._around
        asked = Asked(args.model, args.version, parse_grants(args.grants), args.accept_slower)
        if around.origin is None:
            raise UnsupportedError("cannot install: nobody brings anything to this device")
        installation = Installation(asked, around.store, around.installer, around.origin, around.watcher)
        return [*installation.head(), *self._let_answer(args), *installation.tail()]

    def _verified(self, args: _Args) -> list[Step]:
        """A version that is on the device already: verify it, try it where that is needed."""

        def verify(turn: Turn) -> None:
            _version(self._around.store.document, args.model, args.version)
            found = self._around.maintenance.verify(turn.tell, model=args.model)
            bad = [blob for blob in found["damaged"] if blob["version"] == args.version]
            if bad:
                raise DamagedError(f"cannot install '{args.model}' {args.version}: {bad[0]['part']} is damaged")

        return [
            Step("verify", "verifying", verify),
            Step("try", "trying", lambda turn: self._try(args, turn)),
        ]

    def _try(self, args: _Args, turn: Turn) -> None:
        watcher = self._around.watcher
        watcher.look(args.model)
        try:
            self._around.installer.retry(args.model, args.version, turn.tell, accept_slower=args.accept_slower)
        except BaseException:
            watcher.disarm(args.model, args.version)
            raise

    def _let_answer(self, args: _Args) -> list[Step]:
        """The end of every installation: the version answers, and stays if it does no worse than the one before."""
        watcher = self._around.watcher

        def case_of(turn: Turn) -> Case | None:
            before = turn.notes.get("before")
            if not isinstance(before, str) or before == args.version:
                return None
            entry = _model(self._around.store.document, args.model).versions.get(args.version)
            slower = args.accept_slower or (entry is not None and entry.manifest.policy.accept_slower)
            return Case(args.model, args.version, before, turn.notes.get("previous"), mark(turn), slower)

        def do(turn: Turn) -> Mapping[str, Any]:
            self._require_activatable(args, turn)
            if (case := case_of(turn)) is not None:
                watcher.arm(case)
            else:
                watcher.disarm(args.model, args.version)
            return _short(self._around.installer.activate(args.model, args.version, turn.tell))

        def undo(turn: Turn) -> None:
            watcher.disarm(args.model, args.version)
            self._activate_before(args)(turn)

        return [
            Step("activate", "activating", do, lambda turn: self._is_active(args), undo),
            *probation_steps(watcher, args.model, args.version, case_of),
        ]

    def _activate(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> Mapping[str, Any]:
            self._require_activatable(args, turn)
            return _short(self._around.installer.activate(args.model, args.version, turn.tell))

        return [Step("activate", "activating", do, lambda turn: self._is_active(args), self._activate_before(args))]

    def _require_activatable(self, args: _Args, turn: Turn) -> None:
        """That version may answer; what answered before is noted."""
        model = _model(self._around.store.document, args.model)
        _version(self._around.store.document, args.model, args.version)
        _require_unpinned(args.model, model, args.version)
        turn.notes.setdefault("before", model.active)
        turn.notes.setdefault("previous", model.previous)
        turn.save()

    def _is_active(self, args: _Args) -> bool:
        model = self._around.store.document.models.get(args.model)
        return model is not None and model.active == args.version

    def _activate_before(self, args: _Args) -> Callable[[Turn], None]:
        def undo(turn: Turn) -> None:
            before = turn.notes.get("before")
            model = self._around.store.document.models.get(args.model)
            if model is not None and isinstance(before, str) and before in model.versions and self._is_active(args):
                self._around.installer.activate(args.model, before)

        return undo

    def _rollback(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> Mapping[str, Any]:
            model = _model(self._around.store.document, args.model)
            if "target" not in turn.notes:
                if model.previous is None:
                    raise ConflictError(f"cannot roll back '{args.model}': there is no previous version")
                _require_unpinned(args.model, model, model.previous)
                turn.notes.update(target=model.previous, before=model.active)
                turn.save()
            return _short(self._around.installer.activate(args.model, turn.notes["target"], turn.tell))

        def holds(turn: Turn) -> bool:
            model = self._around.store.document.models.get(args.model)
            return model is not None and "target" in turn.notes and model.active == turn.notes["target"]

        def undo(turn: Turn) -> None:
            target = turn.notes.get("target")
            self._activate_before(_Args(model=args.model, version=target))(turn)

        return [Step("activate", "activating", do, holds, undo)]

    def _pin(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> Mapping[str, Any]:
            turn.notes.setdefault("before", _model(self._around.store.document, args.model).pinned)
            turn.save()
            self._around.installer.pin(args.model, pinned=args.pinned)
            return {"model": args.model, "pinned": args.pinned}

        def undo(turn: Turn) -> None:
            if "before" in turn.notes and args.model in self._around.store.document.models:
                self._around.installer.pin(args.model, pinned=bool(turn.notes["before"]))

        return [Step("pin", "installing", do, None, undo)]

    def _remove(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> Mapping[str, Any]:
            model = _model(self._around.store.document, args.model)
            if model.pinned and args.version in (None, model.active):
                raise _pinned(f"cannot remove '{args.model}'", model)
            return self._around.installer.remove(args.model, args.version)

        def holds(turn: Turn) -> bool:
            model = self._around.store.document.models.get(args.model)
            return model is None or (args.version is not None and args.version not in model.versions)

        return [Step("remove", "installing", do, holds)]

    def _bench(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> Mapping[str, Any]:
            _model(self._around.store.document, args.model)
            return _short(self._around.installer.choose_again(args.model, turn.tell, {}))

        return [Step("try", "trying", do)]

    # -- store ----------------------------------------------------------------------------------------------------

    def _scrub(self, args: _Args) -> list[Step]:
        return [Step("verify", "verifying", lambda turn: self._around.maintenance.verify(turn.tell))]

    def _gc(self, args: _Args) -> list[Step]:
        return [Step("collect", "installing", lambda turn: self._around.maintenance.gc())]

    def _rotate(self, args: _Args) -> list[Step]:
        """Interrupted half way, a rotation is finished by beginning it again; done twice it would be another one."""

        def do(turn: Turn) -> Mapping[str, Any]:
            turn.notes.setdefault("key", self._around.store.secret.key_id)
            turn.save()
            return self._around.maintenance.rotate_key(turn.tell)

        def holds(turn: Turn) -> bool:
            key = turn.notes.get("key")
            return (
                key is not None and self._around.store.secret.key_id != key and not self._around.store.rotation_pending
            )

        return [Step("rotate", "installing", do, holds)]

    # -- the agent and the device ---------------------------------------------------------------------------------

    def _configure(self, args: _Args) -> list[Step]:
        configuring = self._around.configuring
        configuring.check(args.config)
        return [
            Step(
                "apply",
                "installing",
                lambda turn: configuring.apply(args.config, mark(turn)),
                lambda turn: configuring.holds(mark(turn)),
                lambda turn: configuring.revert(mark(turn)),
            ),
            Step("confirm", "probation", lambda turn: configuring.confirm(mark(turn), turn.go_on), apart=True),
        ]

    def _flush(self, args: _Args) -> list[Step]:
        return [Step("flush", "installing", lambda turn: {"unloaded": self._around.unload_all()})]

    def _tail(self, args: _Args) -> list[Step]:
        return [Step("tail", "accepted", lambda turn: {"lines": self._around.tail(args.lines)})]

    def _collect(self, args: _Args) -> list[Step]:
        return [Step("collect", "accepted", lambda turn: self._around.collect())]

    def _plan(self, args: _Args) -> list[Step]:
        if unknown := sorted(set(args.run) - set(self._around.task_names)):
            raise PeerError(
                f"cannot run '{unknown[0]}': no such task", hint=f"there are {', '.join(self._around.task_names)}"
            )
        return [Step("run", "verifying", lambda turn: {"tasks": self._around.run_tasks(args.run, turn.go_on)})]

    def _update(self, args: _Args) -> list[Step]:
        from agent.operations.selfupdate import SelfUpdate  # noqa: PLC0415 - most starts update nothing

        around = self._around
        if around.origin is None or around.updates is None:
            return [Step("refresh", "verifying", _nobody_updates)]
        return SelfUpdate(args.version, around.store, around.origin, around.updates, around.link_is_up).steps()

    def _restart(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> None:
            turn.notes["start"] = turn.boot_nonce
            raise RestartPending(self._around.restart)

        return [Step("restart", "rebooting", do, lambda turn: turn.notes.get("start") not in (None, turn.boot_nonce))]

    def _reboot(self, args: _Args) -> list[Step]:
        def do(turn: Turn) -> None:
            turn.notes["boot"] = boot_id()
            raise RestartPending(self._around.reboot)

        def holds(turn: Turn) -> bool:
            return turn.notes.get("boot") not in (None, boot_id())

        return [Step("reboot", "rebooting", do, holds, lambda turn: self._around.stay())]


def _handle(
    fields: Mapping[str, _Field], steps: Callable[[_Args], Sequence[Step]], args: Mapping[str, Any]
) -> Sequence[Step]:
    return steps(_checked(fields, args))


def _nobody_updates(turn: Turn) -> None:
    raise UnsupportedError("cannot update the agent: nobody brings anything to this device")


def boot_id() -> str:
    """The kernel's name for this boot of the machine (random(4))."""
    return read_bounded(_BOOT_ID, 64).decode("ascii", "replace").strip()


def _model(document: CatalogDocument, name: str) -> ModelEntry:
    model = document.models.get(name)
    if model is None:
        raise NotFoundError(f"model '{name}': no such model")
    return model


def _version(document: CatalogDocument, name: str, version: str) -> None:
    if version not in _model(document, name).versions:
        raise NotFoundError(f"model '{name}': no version '{version}'", hint="add it on the device first")


def _require_unpinned(name: str, model: ModelEntry, version: str) -> None:
    if model.pinned and model.active not in (None, version):
        raise _pinned(f"cannot activate '{name}' {version}", model)


def _pinned(what: str, model: ModelEntry) -> ConflictError:
    return ConflictError(f"{what}: the model is pinned to {model.active}", hint="unpin it: model.pin")


def _short(result: Mapping[str, Any]) -> dict[str, Any]:
    """What fits into a state: the choice's whole story is asked for on the device."""
    return {name: result[name] for name in ("model", "version", "chosen") if name in result}
