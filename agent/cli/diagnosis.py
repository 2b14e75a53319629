"""What ``doctor`` says: core's own findings when it runs, else what can be seen without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from agent.base import config as configuration
from agent.base.clock import clock_disciplined
from agent.base.config import Config
from agent.base.errors import AgentError, ConfigError, TryLaterError, UnsupportedError
from agent.base.paths import DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, Paths
from agent.cli.credstore import CredentialStore
from agent.cli.sealing import Sealed
from agent.cli.service import CORE, Machine, ask_systemd, check_service
from agent.cli.units_command import look
from agent.client import AdminClient
from agent.core import health
from agent.core.device import look_at_device
from agent.infer.runtimes.probe import Runtimes

#: Probing runtimes takes seconds on a slow board; a core that hangs must not keep doctor for ever.
_CORE_S = 60.0


def diagnose(paths: Paths) -> list[dict[str, Any]]:
    """All findings as JSON objects."""
    installed = (paths.state_dir, paths.run_dir) == (DEFAULT_STATE_DIR, DEFAULT_RUN_DIR)
    own, core, version = _configuration(paths), _Core(paths, installed=installed), ""
    try:
        answer = core.ask("/v1/doctor")
        version = str(core.ask("/v1/status")["version"])
        found = [{"check": "core", "level": "ok", "text": f"answers on {paths.admin_socket}", "mend": ""}]
        found += answer["findings"]
    except AgentError as error:
        refused = isinstance(error.__cause__, PermissionError)
        said = health.from_error("core", error)
        if refused:  # an ordinary user: that is no fault of the agent's
            said = health.Finding("core", "note", "could not ask core: only root may", "run doctor as root")
        found = health.as_documents([said, *_without_core(paths, runs=refused)])
    service = _service(paths, version) if installed else []
    return [*health.as_documents([*own, *service]), *found]


class _Core:
    """The running core. Under systemd its sockets take connections also when nobody is there to answer."""

    def __init__(self, paths: Paths, *, installed: bool) -> None:
        self._paths = paths
        self._installed = installed

    def ask(self, path: str) -> Any:
        state = ask_systemd(CORE) if self._installed else {}
        if state.get("LoadState") == "loaded" and state.get("ActiveState") not in ("active", "reloading"):
            raise TryLaterError(
                f"cannot ask core: its unit is {state.get('ActiveState')}", hint=f"journalctl -u {CORE}"
            )
        with AdminClient(str(self._paths.admin_socket), timeout=_CORE_S) as admin:
            return admin.call("GET", path)


def _configuration(paths: Paths) -> list[health.Finding]:
    try:
        configuration.load(paths.config, explicit=paths.config_explicit)
    except ConfigError as error:
        return [health.from_error("config", error)]
    return [health.Finding("config", "ok", str(paths.config) if paths.config.exists() else "defaults")]


def _service(paths: Paths, version: str) -> list[health.Finding]:
    """Of the service, where it is what is asked about and not an agent with folders of somebody's own."""
    return check_service(
        Machine(look(paths), ask_systemd, secrets=_secrets, running=version, synchronized=clock_disciplined())
    )


def _secrets() -> Mapping[str, Sealed]:
    """The credentials, opened: for root alone, and where there is what opens them."""
    if os.geteuid() != 0 or not shutil.which("systemd-creds"):
        return {}
    try:
        return CredentialStore().look()
    except UnsupportedError:
        return {}


def _without_core(paths: Paths, *, runs: bool) -> list[health.Finding]:
    """``runs``: it only may not be asked, so that what it has locked is not known."""
    device = look_at_device(paths, Config())
    swap = [] if runs else health.check_swap(device.facts, locked=False)
    return [
        *health.check_device(device),
        *health.check_folder(paths.state_dir),
        *health.check_runtimes(Runtimes().states(), device.facts),
        *health.check_confinement(),
        *swap,
    ]
