"""A published model and a device that installs it, for tests: the operator's own commands, a real store, a real desk.

A mirror of the repository's files answers what the device wants, from a thread of its own, as right or as wrong as the
test says. Trials and the serving side are stood in for.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from agent.base.clock import SystemClock, TrustedClock
from agent.base.config import Config
from agent.base.errors import NotFoundError
from agent.fleet.books import Books
from agent.fleet.folder import Folder
from agent.fleet.keys import Passwords
from agent.fleet.publishing import grants_for
from agent.fleet.registry import Device as Registered
from agent.fleet.repository import Repository
from agent.fleet.roles import open_identity
from agent.hardware.facts import Facts
from agent.hardware.profiles import FALLBACK
from agent.operations.configure import RemoteConfig
from agent.operations.install import Installer, Serving
from agent.operations.jobs import Around, Jobs
from agent.operations.maintain import Maintenance
from agent.operations.measured import Choice, DeviceView
from agent.operations.origin import Origin
from agent.selection.inventory import InstalledRuntime, RuntimeInventory
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.trust.desk import Desk
from agent.trust.envelope import PublicKey
from agent.trust.wants import DeliveryError
from agent.work.jobs import Order
from agent.work.steps import Step, Turn
from tests import onnx_models
from tests.core.test_daemon import bundle
from tests.fleet.conftest import Done, edge_fleet

NAME = "m"
DEVICE, EPOCH = "cam-1", 3
_PIECE = 1 << 12


class Operator:
    """A fleet's folder with a repository in it."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path / "fleet")
        self.scratch = path
        self.ok("init", "--tenant", "acme", "--broker", "mqtt.example", "--no-password")
        self.ok("repository", "init", "--no-password")

    def run(self, *arguments: str) -> Done:
        return edge_fleet(self.folder.path, *arguments)

    def ok(self, *arguments: str) -> Done:
        done = self.run(*arguments)
        assert done.status == 0, done.err
        return done

    @property
    def site(self) -> Path:
        return self.folder.site

    def publish(self, version: str, variants: Mapping[str, tuple[str, bytes]], **more: Any) -> None:
        path = bundle(self.scratch / f"{version}.edgemodel", dict(variants), version=version, **more)
        self.ok("publish", str(path))

    def grants(
        self,
        version: str,
        recipient: bytes,
        *,
        name: str = DEVICE,
        epoch: int = EPOCH,
        parts: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """As they stand in a job."""
        registered = Registered(name, PublicKey(bytes(32)), epoch, "manual", "2026-01-01T00:00:00Z", {})
        with Books(self.folder.database) as books:
            identity = open_identity(self.folder, Passwords())
            found = grants_for(books, identity, NAME, version, registered, recipient, parts)
        return {part: grant.document() for part, grant in found.items()}

    def opened(self, days: float = 0) -> Repository:
        """The repository, open for changes that no command would make."""
        return Repository(self.folder, Passwords(), datetime.now(timezone.utc) + timedelta(days=days))


def two_variants(seed: int = 0) -> dict[str, tuple[str, bytes]]:
    """Of which the first one promises more on a CPU of which nothing is known."""
    return {"fast": ("fp32", onnx_models.linear(seed)), "small": ("int8", onnx_models.linear(seed + 100))}


class Mirror:
    """Answers wants from a folder. ``tamper`` gives what is served in place of a file (None: nothing is).

    ``brought``: bytes of each file that were taken.
    """

    def __init__(self, site: Path) -> None:
        self.site = site
        self.desk = Desk()
        self.asked: list[tuple[str, int]] = []
        self.brought: dict[str, int] = {}
        self.tamper: Callable[[str, bytes | None], bytes | None] = lambda path, data: data
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.desk.stop()
        self._thread.join(10)

    def _run(self) -> None:
        done: set[tuple[str, int]] = set()
        while not self._stopped.is_set():
            for want in self.desk.open_wants(0.05):
                if (want.id, want.offset) in done:
                    continue
                done.add((want.id, want.offset))
                path = unquote(want.path)
                self.asked.append((path, want.offset))
                file = self.site / path
                data = self.tamper(path, file.read_bytes() if file.is_file() else None)
                try:
                    if data is None:
                        self.desk.fail(want.id, "not_found", f"{path} is not there")
                    else:
                        self.desk.put(want.id, want.offset, _pieces(data[want.offset :]))
                        self.brought[path] = self.brought.get(path, 0) + len(data) - want.offset
                except (DeliveryError, NotFoundError):
                    continue


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, max(1, len(data)), _PIECE):
        yield data[start : start + _PIECE]


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.moment = datetime.now(timezone.utc)

    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return self.moment


class Device:
    """A device with its handlers of jobs. ``rejects``: variants that do not pass their trial."""

    def __init__(self, store: Store, folder: Path, mirror: Mirror, root: bytes | None) -> None:
        self.store, self.folder, self.mirror, self.root = store, folder, mirror, root
        self.hand = Hand()
        self.clock = TrustedClock(self.hand, "always", datetime.fromtimestamp(0, timezone.utc))
        self.rejects: set[str] = set()
        self.tried: list[list[str]] = []
        self.load_error: Exception | None = None
        self.at: Callable[[], None] = lambda: None
        self.keys_changed = 0
        self.pinned = False
        self.headroom_mb = 4000
        self.install_jobs()

    def install_jobs(self) -> None:
        """As at a start of the agent: nothing is remembered but what lies on the disk."""
        serving = Serving(lambda document: None, self._load)
        installer = Installer(self.store, self._choose, serving, SystemClock(), unsigned="allow")
        self.installer = installer

        def changed() -> None:
            self.keys_changed += 1

        self.origin = Origin(
            desk=self.mirror.desk,
            metadata=self.folder / "repository",
            root=lambda: self.root,
            clock=self.clock,
            device=lambda: DEVICE,
            view=self.view,
            keys_changed=changed,
        )
        self.handlers = Jobs(
            Around(
                store=self.store,
                installer=installer,
                maintenance=Maintenance(self.store, lambda document: None),
                configuring=RemoteConfig(self.store, Config, lambda config: None, lambda: True),
                unload_all=lambda: 0,
                tail=lambda lines: [],
                collect=dict,
                run_tasks=lambda names, go_on: [],
                task_names=(),
                restart=lambda: None,
                reboot=lambda: None,
                stay=lambda: None,
                origin=self.origin,
            )
        ).handlers()

    @property
    def view(self) -> DeviceView:
        return DeviceView(
            facts=Facts(arch="x86_64", supported=True),
            profile=FALLBACK,
            threads=1,
            cpus=(0,),
            inventory=lambda: RuntimeInventory({"onnx": InstalledRuntime("1.23.0", ("CPUExecutionProvider",))}),
            headroom_mb=lambda: self.headroom_mb,
            power_mode=lambda: None,
        )

    def _choose(self, manifest: Any, blobs: Mapping[str, Any], known: Any, shapes: Any, progress: Any) -> Choice:
        here = [variant.id for variant in manifest.variants if variant.file.name in blobs]
        for ref in blobs.values():  # as a trial does: what does not open is found out
            with self.store.read(ref):
                pass
        self.tried.append(here)
        progress({"stage": "try"})
        good = [name for name in here if name not in self.rejects]
        order = [f"{name}@CPUExecutionProvider" for name in good]
        return Choice(order[0] if order else None, {"order": order}, why="it answers wrongly")

    def _load(self, name: str, version: str) -> None:
        if self.load_error is not None:
            raise self.load_error

    @property
    def recipient(self) -> bytes:
        return self.store.secret.grant_identity.recipient().public

    def models(self) -> dict[str, tuple[str | None, list[str]]]:
        return {name: (model.active, sorted(model.versions)) for name, model in self.store.document.models.items()}

    def blobs(self) -> set[str]:
        """Payloads on the disk, by name."""
        return {path.name for path in (self.store.root / "blobs").iterdir() if len(path.name) == 64}

    def left_behind(self) -> list[str]:
        """Whatever an installation may have left that nothing needs."""
        stats = self.store.stats()
        incoming = self.store.root / "incoming"
        found = [str(path) for path in incoming.rglob("*")] if incoming.exists() else []
        found += [f"{stats.reserved_bytes} bytes reserved"] if stats.reserved_bytes else []
        found += [f"{stats.unreached_bytes} bytes unreached"] if stats.unreached_bytes else []
        found += [f"staged {mark}" for mark in self.store.document.delivery.staged]
        return found + [str(path) for path in self.store.root.rglob(".tmp-*")]


class Job:
    """A job that can be killed and cancelled. ``at`` is called at each save and each safe point."""

    def __init__(self, device: Device, args: Mapping[str, Any], *, job_id: str = "j1", epoch: int = EPOCH) -> None:
        self.device, self.args = device, dict(args)
        self._order = Order(
            job_id, epoch, 1, "model.install", "change", "normal", 5, self.args, None, 60, 60, None, b""
        )
        self.saved: dict[str, Any] = {}
        self._notes: dict[str, Any] = {}
        self.begun: list[str] = []
        self.result: dict[str, Any] = {}
        self.at: Callable[[], None] = lambda: None
        self.events: list[Mapping[str, Any]] = []
        #: Whether it has its turn among what changes the catalog; told when it fetches, and when it tries.
        self.has_turn = False

    def steps(self) -> list[Step]:
        return list(self.device.handlers["model.install"](self.args))

    def turn(self) -> Turn:
        def save() -> None:
            self.saved = dict(self._notes)
            self.at()

        def tell(event: Mapping[str, Any]) -> None:
            self.events.append(event)
            self.at()

        def in_turn(work: Callable[[], None]) -> None:
            assert not self.has_turn
            self.has_turn = True
            try:
                work()
            finally:
                self.has_turn = False

        return Turn(self._order, self._notes, 1, "0" * 32, tell=tell, go_on=self.at, save=save, in_turn=in_turn)

    def run(self) -> dict[str, Any]:
        """All steps from the one on that was under way, as after a start."""
        steps = self.steps()
        for step in steps[max(0, len(self.begun) - 1) :]:
            resumed = bool(self.begun) and self.begun[-1] == step.name
            if not resumed:
                self.begun.append(step.name)
                self.saved = dict(self._notes)
            self.at()
            if not (resumed and step.holds is not None and step.holds(self.turn())):
                self.has_turn = not step.apart
                self.result |= step.do(self.turn()) or {}
                self.has_turn = False
            self.saved = dict(self._notes)
        return self.result

    def kill(self) -> None:
        """A new start: only what was saved is known, and handlers are made anew."""
        self._notes = dict(self.saved)
        self.device.install_jobs()

    def take_back(self) -> None:
        for step in reversed([step for step in self.steps() if step.name in self.begun]):
            if step.undo is not None:
                step.undo(self.turn())


def install(device: Device, operator: Operator, version: str, **options: Any) -> dict[str, Any]:
    """The job as the operator gives it, to its end; where it fails it is taken back, as the runner does."""
    grants = operator.grants(version, device.recipient, **options)
    return run_or_take_back(Job(device, {"model": NAME, "version": version, "grants": grants}))


def run_or_take_back(job: Job) -> dict[str, Any]:
    try:
        return job.run()
    except Exception:
        job.at = lambda: None
        job.take_back()
        raise


@contextmanager
def device_at(folder: Path, mirror: Mirror, root: bytes | None, quota: int = 64 << 20) -> Iterator[Device]:
    """A device with a store of its own."""
    with Store(folder / "store", DeviceKeys(folder / "keys"), quota) as store:
        yield Device(store, folder, mirror, root)


def copied(site: Path, to: Path) -> Path:
    """What a mirror holds now, to be served as it is later."""
    shutil.copytree(site, to)
    return to
