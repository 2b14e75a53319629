"""Core's life: build, open, serve, reload, drain, stop in reverse.

The order at start: harden the process, look at the device, open the store, put the catalog on the engine's shelf,
listen, say ready. Models are loaded when they are first asked for. SIGTERM drains and ends with status 0; SIGHUP reads
the configuration anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base import config as configuration
from agent.base.clock import SystemClock, TrustedClock
from agent.base.config import Config
from agent.base.errors import AgentError, ConfigError
from agent.base.files import require_own, write_atomically
from agent.base.hardening import forbid_inspection
from agent.base.memory import Fence
from agent.base.paths import Paths
from agent.base.systemd import Handover, Notifier, adopt_sockets
from agent.core import logs
from agent.core.accelerators import Accelerators, probing
from agent.core.admin_api import AdminApi, Documents
from agent.core.cache_api import CacheApi
from agent.core.condition import Condition, Parts, figures
from agent.core.device import look_at_device
from agent.core.governing import Governing
from agent.core.guarding import Guarding
from agent.core.incoming_api import IncomingApi
from agent.core.limits import gid_of, infer_limits, model_rules, uid_of
from agent.core.link_api import LinkApi, NoFleet
from agent.core.measuring import Measuring
from agent.core.memory import Pages, settle, spare
from agent.core.operating import Operations
from agent.core.reviewing import Reviews
from agent.core.tasks import Means
from agent.core.upkeep import Upkeep
from agent.core.within import Within
from agent.infer.engine import Engine, EngineLimits, Key
from agent.infer.runtimes.probe import Runtimes
from agent.infer.shelf import Option
from agent.infer.tensors import InferRequest, InferResponse, Tensor
from agent.infer.wishes import Wishes
from agent.operations.install import Installer, Serving
from agent.operations.maintain import Maintenance
from agent.operations.measured import outdated
from agent.operations.shelving import Shelves
from agent.serve.admin import ADMIN_LIMITS, admin_server
from agent.serve.inference import Inference
from agent.serve.limits import MIB
from agent.serve.routes import RouteTable
from agent.serve.server import Server
from agent.store.document import CatalogDocument
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.trust.desk import Desk

if TYPE_CHECKING:
    from agent.core.fleet import Fleet

_LOG = logging.getLogger("edge_agent.core")
#: By then a start is over: models reviewed, runtimes probed, the fleet told.
_STARTED_S = 20.0
#: For how long another thread may keep the interpreter while a request wants it: operations compute, too. Python's own
#: 5 ms are several requests long, and a request wants it several times.
_SWITCH_S = 0.0005
#: One run of a golden example.
_RECHECK_S = 60.0
#: How often the process is weighed while models come and go, and how often freed memory is given back. Where it has to
#: be unlocked for that, which holds everybody up, not as often.
_WEIGH_S, _GIVE_BACK_S, _GIVE_BACK_LOCKED_S = 1.0, 0.5, 30.0
#: One file a request; an operator's connection may idle for long.
_ADMIN_LIMITS = replace(ADMIN_LIMITS, descriptors=1, idle_s=600.0)


class Core:
    """The daemon. ``run`` blocks its thread's event loop until a signal, or ``stop``."""

    def __init__(self, paths: Paths, config: Config, handover: Handover) -> None:
        self._paths = paths
        self._config = config
        self._handover = handover
        self._notifier = Notifier(handover.notify_address)
        self._started = time.monotonic()
        self._pages = Pages()
        #: After ``run``: whether every thread has come to its end.
        self.all_ended = True
        self._stop = asyncio.Event()
        self._operations = Operations()
        self._runtimes = Runtimes()
        self._rules = model_rules(config)
        self._fleet: Fleet | None = None
        self._no_fleet = NoFleet()
        self._desk = Desk()
        self._incoming = IncomingApi(self._desk, lambda: self.config.delivery)

    async def run(self) -> None:
        """Start, serve until told to stop, drain, stop. Raises AgentError when it cannot start."""
        self._harden()
        self._device = look_at_device(self._paths, self._config)
        self._lock()
        with contextlib.ExitStack() as held:
            _make_private(self._paths)
            self._store = held.enter_context(self._open_store())
            self._build()
            try:
                self._listen()
                await self._serve()
            finally:
                await self._wind_down()

    def stop(self) -> None:
        """Begin the stop; harmless when repeated."""
        self._stop.set()

    # -- building -----------------------------------------------------------------------------------------------------

    def _harden(self) -> None:
        sys.setswitchinterval(_SWITCH_S)
        forbid_inspection()
        settle()

    def _lock(self) -> None:
        """Only where there is a disk to be kept from: what is locked cannot be given back."""
        areas = self._device.facts.swap
        if areas is None or any(area.kind != "zram" for area in areas):
            self._pages.lock()

    def _open_store(self) -> Store:
        keys = DeviceKeys(self._paths.device_secret.parent, self._handover.credentials)
        return Store(self._paths.state_dir / "store", keys, self._config.store.quota_mb * MIB)

    def _build(self) -> None:
        device, config = self._device, self._config
        self._operations.start(asyncio.get_running_loop())
        keep = config.memory.keep_alive_s
        limits = EngineLimits(
            device.budget_mb,
            config.server.queue_per_model,
            device.places,
            keep_s=float("inf") if keep == "forever" else keep,
            weigh_s=_WEIGH_S,
            give_back_s=_GIVE_BACK_LOCKED_S if self._pages.locked else _GIVE_BACK_S,
        )
        fence = Fence(device.facts.mem_limit_mb)
        memory_mb, cpus = max(64, int(device.budget_mb)), device.cpus
        self._accelerators = Accelerators(lambda: self._engine, probing(self._operations.run, memory_mb, cpus))
        lose = self._accelerators.lose
        self._engine = Engine(limits, self._runtimes.load, self._damaged, fence.move, self._pages.give_back, lose)
        self._guarding = guarding = Guarding(
            self._paths.state_dir,
            self._store,
            self._operations,
            self._engine,
            lambda: self.config.probation,
            lambda: self._installer,
            self._fleet_changed,
        )
        self._measuring = Measuring(
            device, self._runtimes, self._store, lambda: self.config, self._operations.go_on, guarding.requests
        )
        self._shelves = Shelves(self._store.read, device.threads, self._measuring.form_key)
        serving = Serving(
            show=lambda document: self._operations.on_loop(lambda: self._show(document)),
            load=self._load_now,
            watcher=guarding.probations,
        )
        self._installer = Installer(
            self._store,
            self._measuring.choose,
            serving,
            SystemClock(),
            unsigned=config.trust.unsigned,
            outdated=partial(outdated, self._measuring.view),
            preparing=self._measuring.preparing,
            go_on=self._operations.go_on,
        )
        guarding.probations.start()
        self._show(self._store.document)
        self._reviews = Reviews(self._operations, self._installer.review, lambda: bool(self._store.document.models))
        self._maintenance = Maintenance(self._store, serving.show)
        self._upkeep = Upkeep(self._paths, lambda: self.config, self._operations, self._means, self._fleet_changed)
        self._governing = Governing(lambda: self.config.governor, self._engine, _sensor_root(os.environ))
        self._condition = Condition(
            Parts(
                paths=self._paths,
                device=device,
                store=self._store,
                runtimes=self._runtimes,
                operations=self._operations,
                engine=self._engine,
                accelerators=self._accelerators,
                governing=self._governing,
                guarding=guarding,
                upkeep=self._upkeep,
                fleet=lambda: self._fleet,
                locked=self._pages.locked,
            ),
            self._started,
        )
        if os.path.lexists(self._paths.trust_file):
            self._make_fleet()

    @property
    def config(self) -> Config:
        """What holds: the file, and what the fleet has set over it."""
        return self._fleet.config if self._fleet is not None else self._config

    def _means(self, clock: TrustedClock) -> Means:
        """What maintenance works with."""
        return Means(
            store=self._store,
            installer=self._installer,
            maintenance=self._maintenance,
            clock=clock,
            ask=self._ask,
            certificate_ends=lambda: self._fleet.certificate_ends if self._fleet is not None else None,
            look=lambda go_on: self._fleet.look(go_on) if self._fleet is not None else None,
            ran=self._guarding.quality.ran,
            kept=self._guarding.quality.flush,
        )

    def _make_fleet(self) -> Fleet:
        """The fleet's side, where somebody says whom the device obeys; its code is loaded only then."""
        from agent.core.fleet import Fleet  # noqa: PLC0415 - see above
        from agent.operations.updates import Updates, home_of  # noqa: PLC0415 - as above

        condition = self._condition
        within = Within(
            operations=self._operations,
            installer=self._installer,
            maintenance=self._maintenance,
            watcher=self._guarding.probations,
            device=self._device,
            runtimes=self._runtimes,
            view=self._measuring.view,
            desk=self._desk,
            updates=Updates(self._paths.update, home_of(Path(sys.prefix), os.environ.get("EDGE_AGENT_HOME"))),
            file_config=lambda: self._config,
            hold=self._hold,
            status=condition.status,
            findings=condition.findings,
            diagnose=condition.diagnose,
            figures=figures,
            governor=self._governing.record,
            statistics=self._statistics,
            quality=self._guarding.quality.short,
            key_place=condition.key_place,
            unload_all=self._unload_all,
            restart=self.stop,
            reboot=self._request_reboot,
            stay=self._withdraw_reboot,
        )
        self._fleet = Fleet(self._paths, self._store, self._upkeep, within)
        return self._fleet

    def _fleet_changed(self) -> None:
        if self._fleet is not None:
            self._fleet.changed()

    # -- serving ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        config, limits = self._config, infer_limits(self._config)
        inference = self._inference = Inference(
            self._engine,
            limits=limits,
            rules=self._rules,
            labels=self._engine.labels,
            metrics=[self._socket_metrics, self._governing.metrics],
            caches=self._engine.caches,
            feedback=self._guarding.quality,
        )
        self._guarding.attach(inference)
        self._infer = Server(RouteTable(inference.routes()), limits)
        api = AdminApi(
            self._store,
            self._installer,
            self._maintenance,
            self._operations,
            Documents(self._condition.look, self._condition.status, self._condition.diagnose, self._guarding.story),
            self._upkeep,
            lambda: self._fleet,
        )
        engine = self._engine
        kept = CacheApi(
            engine.caches, engine.hottest, engine.clear_cache, lambda name: name in self._store.document.models
        )
        link = LinkApi(lambda: self._fleet or self._no_fleet)
        rows = [*api.routes(), *kept.routes(), *link.routes(), *self._incoming.routes()]
        self._admin = admin_server(rows, link_uid=uid_of(config.sockets.link_user), limits=_ADMIN_LIMITS)
        passed = adopt_sockets(self._handover.descriptors, {"infer", "admin"})
        for name, server, path, group in (
            ("infer", self._infer, self._paths.infer_socket, gid_of(config.sockets.infer_group)),
            ("admin", self._admin, self._paths.admin_socket, None),
        ):
            if name in passed:
                server.start_socket(passed[name])
            else:
                server.start_unix(path, 0o660 if name == "infer" else 0o600, group)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number, action in (
            (signal.SIGTERM, self.stop),
            (signal.SIGINT, self.stop),
            (signal.SIGHUP, self._reload),
        ):
            loop.add_signal_handler(number, action)
        for problem in self._device.problems:
            _LOG.warning("profile ignored: %s", problem)
        self._upkeep.start()
        self._governing.start()
        self._incoming.start()
        if self._fleet is not None:
            self._fleet.start()
        took = time.monotonic() - self._started
        models = len(self._store.document.models)
        _LOG.info("ready after %.2f s: %d models, board %s", took, models, self._device.facts.board)
        self._notifier.ready(f"{models} models")
        asyncio.get_running_loop().call_later(_STARTED_S, self._pages.trim)
        self._reviews.start()
        work = (self._feed_watchdog(), self._load_ahead())
        tasks = [asyncio.ensure_future(task) for task in work]
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()

    async def _wind_down(self) -> None:
        self._notifier.stopping("draining")
        if hasattr(self, "_upkeep"):
            self._reviews.stop()
            self._upkeep.stop()
            self._guarding.stop()
        if hasattr(self, "_governing"):
            self._accelerators.stop()
            self._governing.stop()
        if self._fleet is not None:
            self._fleet.stop()
        self._no_fleet.stop()
        self._incoming.stop()
        self._operations.stop()  # first, or the admin socket would drain for as long as a trial lasts
        servers = [server for server in (getattr(self, "_infer", None), getattr(self, "_admin", None)) if server]
        await asyncio.gather(*(server.drain(self._config.server.drain_s) for server in servers))
        await self._operations.close()
        if hasattr(self, "_guarding"):
            self._guarding.close()
        if self._fleet is not None:
            await self._fleet.close()
        self.all_ended = await self._engine.close()
        _LOG.info("stopped")

    async def _feed_watchdog(self) -> None:
        """The loop turns, and the operations' thread is not stuck for longer than any operation may take."""
        interval = (self._handover.watchdog_s or 60.0) / 3
        while True:
            self._notifier.alive()
            await asyncio.sleep(interval)

    async def _load_ahead(self) -> None:
        """What the configuration wants in memory before somebody asks for it."""
        for name in self._config.memory.pin:
            try:
                await self._engine.preload(name, wishes=Wishes(pin=True))
            except AgentError as error:
                _LOG.warning("model %s is not pinned: %s", name, error)
        for name in self._config.memory.preload:
            try:
                self._engine.preload_soon(name)
            except AgentError as error:
                _LOG.warning("model %s is not loaded ahead: %s", name, error)

    # -- what the parts call ------------------------------------------------------------------------------------------

    def _socket_metrics(self) -> list[str]:
        return self._infer.metrics()

    def _show(self, document: CatalogDocument) -> None:
        self._put(document, self.config)

    def _put(self, document: CatalogDocument, config: Config) -> None:
        self._models_set = config.models
        self._engine.put(self._shelves.shelf(document, self._models_set))
        self._guarding.shown(document)
        spare()

    def _load_now(self, model: str, version: str) -> None:
        self._operations.await_on_loop(self._engine.preload(model, version))

    def _damaged(self, key: Key, option: Option, reason: str) -> None:
        _LOG.error("model %s %s: %s cannot be used: %s", *key, option.candidate, reason)
        self._reviews.damaged()

    def _reload(self) -> None:
        try:
            config = configuration.load(self._paths.config, explicit=self._paths.config_explicit)
        except ConfigError as error:
            _LOG.error("configuration not reloaded: %s", error)
            return
        self._config = config
        if self._fleet is not None:
            self._fleet.reload()
        elif os.path.lexists(self._paths.trust_file):
            self._make_fleet().start()
        self._hold(self.config)
        _LOG.info("configuration reloaded; limits of sockets, store and memory hold from the next start on")

    def _hold(self, config: Config) -> None:
        """What of a configuration holds at once: the log, the access rules, the wishes for single models. The fleet's
        side reads its own."""
        logs.set_up(config.log, journal="JOURNAL_STREAM" in os.environ)
        self._rules.replace(model_rules(config))
        self._upkeep.reload()
        self._governing.reload()
        self._incoming.wake()
        if config.models != self._models_set:
            self._put(self._store.document, config)
            self._reviews.start()  # joining requests is tried where it is wanted now

    def _ask(self, model: str, version: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """From the operations' thread: one run of what serves a model."""
        served = self._engine.served(model, version)
        datatypes = {spec.name: spec.datatype for spec in served.inputs}
        tensors = tuple(Tensor(name, datatypes[name], array) for name, array in arrays.items())

        async def ask() -> InferResponse:
            found = self._engine.infer(model, version, InferRequest(tensors), time.monotonic() + _RECHECK_S)
            return found if isinstance(found, InferResponse) else await found

        return {tensor.name: tensor.array for tensor in self._operations.await_on_loop(ask()).outputs}

    def _statistics(self) -> dict[str, Any]:
        return self._inference.statistics_document()

    def _unload_all(self) -> int:
        self._engine.clear_cache()
        return sum(self._engine.unload(name) for name in {row["model"] for row in self._engine.loaded()})

    def _request_reboot(self) -> None:
        """Core may not reboot anything: a unit of root's looks for this file (edge-agent-reboot.path)."""
        write_atomically(self._reboot_request, b"")

    def _withdraw_reboot(self) -> None:
        """Where nobody has followed it: or whoever comes to look for it later would reboot a device in use."""
        self._reboot_request.unlink(missing_ok=True)

    @property
    def _reboot_request(self) -> Path:
        return self._paths.state_dir / "reboot-requested"


def _sensor_root(environ: Mapping[str, str]) -> Path | None:
    """A recorded machine whose sensors stand in for the live one's, to replay what it went through."""
    root = environ.get("EDGE_AGENT_SENSOR_ROOT")
    return Path(root).absolute() if root else None


def _make_private(paths: Paths) -> None:
    """The state folder for the owner only, the run folder for whoever may reach the sockets in it."""
    try:
        paths.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        require_own(paths.state_dir)
        require_own(paths.run_dir)
    except OSError as error:
        raise ConfigError(
            f"cannot use {error.filename}: {error.strerror}", hint="choose folders with --state-dir and --run-dir"
        ) from error


def run_core(paths: Paths, config: Config, handover: Handover) -> None:
    """Run core on uvloop where it is installed, else on asyncio's own loop. Raises AgentError."""
    logs.set_up(config.log, journal="JOURNAL_STREAM" in os.environ)

    async def main() -> bool:
        core = Core(paths, config, handover)
        await core.run()
        return core.all_ended

    try:
        import uvloop  # noqa: PLC0415 - an optional extra
    except ImportError:
        all_ended = asyncio.run(main())
    else:
        all_ended = uvloop.run(main())
    if not all_ended:
        # A thread is in a load or a run that cannot be ended, and the interpreter would wait for it.
        logging.shutdown()
        os._exit(0)
