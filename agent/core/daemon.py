"""Core's life: build, open, serve, reload, drain, stop in reverse.

The order at start: harden the process, look at the device, open the store, put the catalog on the engine's shelf,
listen, say ready. Models are loaded when they are first asked for. SIGTERM drains and ends with status 0; SIGHUP reads
the configuration anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from agent import __version__
from agent.base import config as configuration
from agent.base.clock import SystemClock
from agent.base.config import Config, Paths
from agent.base.errors import AgentError, ConfigError
from agent.base.files import require_own
from agent.base.hardening import forbid_inspection, lock_memory
from agent.base.memory import Fence
from agent.base.systemd import Handover, Notifier, adopt_sockets
from agent.core import health, logs
from agent.core.admin_api import AdminApi
from agent.core.device import Device, inventory_of, look_at_device
from agent.core.memory import settle
from agent.core.operating import Operations
from agent.hardware.sensors import read_sensors
from agent.infer.engine import Engine, EngineLimits, Key
from agent.infer.runtimes.probe import Runtimes
from agent.infer.shelf import Option
from agent.operations.install import Installer, Serving
from agent.operations.maintain import Maintenance
from agent.operations.measured import Choice, ChooseVariant, DeviceView, outdated
from agent.operations.shelving import shelf_from
from agent.serve.access import ModelRule, ModelRules
from agent.serve.admin import ADMIN_LIMITS, admin_server
from agent.serve.inference import Inference
from agent.serve.limits import MIB, Limits
from agent.serve.routes import RouteTable
from agent.serve.server import Server
from agent.store.document import CatalogDocument
from agent.store.keys import DeviceKeys
from agent.store.store import Store

_LOG = logging.getLogger("edge_agent.core")
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
        self._locked = False
        #: After ``run``: whether every thread has come to its end.
        self.all_ended = True
        self._stop = asyncio.Event()
        self._operations = Operations()
        self._runtimes = Runtimes()
        self._rules = _model_rules(config)

    async def run(self) -> None:
        """Start, serve until told to stop, drain, stop. Raises AgentError when it cannot start."""
        self._harden()
        self._device = look_at_device(self._paths, self._config)
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
        forbid_inspection()
        settle()
        self._locked = lock_memory()

    def _open_store(self) -> Store:
        keys = DeviceKeys(self._paths.device_secret.parent, self._handover.credentials)
        return Store(self._paths.state_dir / "store", keys, self._config.store.quota_mb * MIB)

    def _build(self) -> None:
        device, config = self._device, self._config
        self._operations.start(asyncio.get_running_loop())
        limits = EngineLimits(device.budget_mb, config.server.queue_per_model, device.workers)
        fence = Fence(device.facts.mem_limit_mb)
        self._engine = Engine(limits, self._runtimes.load, self._damaged, fence.move)
        self._show(self._store.document)
        serving = Serving(
            show=lambda document: self._operations.on_loop(lambda: self._show(document)),
            load=self._load_now,
        )
        view = self._device_view()
        self._installer = Installer(
            self._store,
            self._choose_on(view),
            serving,
            SystemClock(),
            unsigned=config.trust.unsigned,
            outdated=partial(outdated, view),
            go_on=self._operations.go_on,
        )
        self._maintenance = Maintenance(self._store, serving.show)

    def _device_view(self) -> DeviceView:
        device = self._device
        return DeviceView(
            facts=device.facts,
            profile=device.profile,
            threads=device.threads,
            cpus=device.cpus,
            inventory=lambda: inventory_of(self._runtimes),
            headroom_mb=lambda: _headroom_mb(device, read_sensors().mem_available_mb),
            power_mode=lambda: device.facts.power_mode,
        )

    def _choose_on(self, view: DeviceView) -> ChooseVariant:
        """The chooser, made when it is first needed: see ``agent.core.trying``."""
        selection = self._config.selection

        @lru_cache(maxsize=1)
        def chooser() -> ChooseVariant:
            from agent.core.trying import make_chooser  # noqa: PLC0415 - most starts try nothing

            return make_chooser(view, self._store.read, selection, self._operations.go_on)

        def choose(*arguments: Any) -> Choice:
            return chooser()(*arguments)

        return choose

    # -- serving ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        config, limits = self._config, _infer_limits(self._config)
        inference = Inference(
            self._engine,
            limits=limits,
            rules=self._rules,
            labels=self._engine.labels,
            metrics=[self._socket_metrics],
        )
        self._infer = Server(RouteTable(inference.routes()), limits)
        api = AdminApi(self._store, self._installer, self._maintenance, self._operations, self._status, self._diagnose)
        self._admin = admin_server(api.routes(), link_uid=_uid_of(config.sockets.link_user), limits=_ADMIN_LIMITS)
        passed = adopt_sockets(self._handover.descriptors, {"infer", "admin"})
        for name, server, path, group in (
            ("infer", self._infer, self._paths.infer_socket, _gid_of(config.sockets.infer_group)),
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
        took = time.monotonic() - self._started
        models = len(self._store.document.models)
        _LOG.info("ready after %.2f s: %d models, board %s", took, models, self._device.facts.board)
        self._notifier.ready(f"{models} models")
        tasks = [asyncio.ensure_future(self._feed_watchdog()), asyncio.ensure_future(self._review())]
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()

    async def _wind_down(self) -> None:
        self._notifier.stopping("draining")
        self._operations.stop()  # first, or the admin socket would drain for as long as a trial lasts
        servers = [server for server in (getattr(self, "_infer", None), getattr(self, "_admin", None)) if server]
        await asyncio.gather(*(server.drain(self._config.server.drain_s) for server in servers))
        await self._operations.close()
        self.all_ended = await self._engine.close()
        _LOG.info("stopped")

    async def _feed_watchdog(self) -> None:
        """The loop turns, and the operations' thread is not stuck for longer than any operation may take."""
        interval = (self._handover.watchdog_s or 60.0) / 3
        while True:
            self._notifier.alive()
            await asyncio.sleep(interval)

    async def _review(self) -> None:
        """After a start runtime, power mode or configuration may be others than when the models were tried."""
        if not self._store.document.models:
            return
        try:
            await self._operations.run("review", self._installer.review, lambda event: None)
        except AgentError as error:
            _LOG.warning("models were not reviewed: %s", error)

    # -- what the parts call ------------------------------------------------------------------------------------------

    def _socket_metrics(self) -> list[str]:
        return self._infer.metrics()

    def _show(self, document: CatalogDocument) -> None:
        self._engine.put(shelf_from(document, self._store.read, self._device.threads))

    def _load_now(self, model: str, version: str) -> None:
        self._operations.await_on_loop(self._engine.preload(model, version))

    def _damaged(self, key: Key, option: Option, reason: str) -> None:
        _LOG.error("model %s %s: %s cannot be used: %s", *key, option.candidate, reason)

    def _reload(self) -> None:
        try:
            config = configuration.load(self._paths.config, explicit=self._paths.config_explicit)
        except ConfigError as error:
            _LOG.error("configuration not reloaded: %s", error)
            return
        self._config = config
        logs.set_up(config.log, journal="JOURNAL_STREAM" in os.environ)
        self._rules.replace(_model_rules(config))
        _LOG.info("configuration reloaded; limits of sockets, store and memory hold from the next start on")

    # -- telling ------------------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        device = self._device
        return {
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "board": device.facts.board,
            "profile": device.profile.id,
            "threads": device.threads,
            "memory_budget_mb": round(device.budget_mb),
            "key_source": self._store.secret.source,
            "generation": self._store.document.generation,
            "models": self._engine.index(),
            "loaded": self._engine.loaded(),
            "process": _process(),
            "under_way": self._operations.under_way,
            "health": health.verdict([*health.check_device(self._device), *health.check_store(self._store)]),
            "throttled": read_sensors().throttled_now,
        }

    def _diagnose(self) -> list[dict[str, Any]]:
        """The checks, on the operations' thread: probing a runtime takes up to a second."""
        checks: list[Callable[[], list[health.Finding]]] = [
            lambda: health.check_device(self._device),
            lambda: health.check_store(self._store),
            lambda: health.check_runtimes(self._runtimes.states(), self._device.facts),
            health.check_confinement,
            lambda: health.check_swap(self._device.facts, locked=self._locked),
            lambda: health.check_clock(time.gmtime().tm_year),
        ]
        findings: list[health.Finding] = []
        for check in checks:
            try:
                findings.extend(check())
            except AgentError as error:
                findings.append(health.from_error("core", error))
        return health.as_documents(findings)


def _process() -> dict[str, float]:
    """What this process takes: MB of resident memory, seconds of CPU time."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])  # proc(5): resident
    times = os.times()
    return {
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1),
        "cpu_s": round(times.user + times.system, 2),
    }


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


def _infer_limits(config: Config) -> Limits:
    server = config.server
    return Limits(
        head_bytes=server.max_header_kb * 1024,
        request_line_bytes=min(8192, server.max_header_kb * 1024),
        body_bytes=server.max_body_mb * MIB,
        request_s=server.deadline_s,
        idle_s=server.idle_s,
        write_s=server.deadline_s,
        connections=server.max_connections,
        connections_per_uid=server.connections_per_uid,
        bytes_per_uid=server.buffered_mb_per_uid * MIB,
        bytes_total=server.max_buffered_mb * MIB,
    )


def _model_rules(config: Config) -> ModelRules:
    rules = {
        name: ModelRule(
            frozenset(rule.uids) | {uid for user in rule.users if (uid := _uid_of(user)) is not None},
            frozenset(rule.gids) | {gid for group in rule.groups if (gid := _gid_of(group)) is not None},
        )
        for name, rule in config.access.models.items()
    }
    return ModelRules(rules, default=ModelRule() if config.access.default == "deny" else None)


def _uid_of(user: str) -> int | None:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def _gid_of(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        return None


def _headroom_mb(device: Device, available_mb: int | None) -> int:
    """What trials may take: what is available now, within the limits that apply to us."""
    bounds = [value for value in (available_mb, device.facts.mem_limit_mb) if value is not None]
    return max(64, int(min(bounds) * device.profile.memory_share)) if bounds else 256


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
