"""What ``doctor`` says: core's own findings when it runs, else what can be seen without it."""

from __future__ import annotations

from typing import Any

from agent.base import config as configuration
from agent.base.config import Config
from agent.base.errors import AgentError, ConfigError
from agent.base.paths import DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, Paths
from agent.cli.service import ask_systemd, check_service
from agent.cli.units_command import look
from agent.client import AdminClient
from agent.core import health
from agent.core.device import look_at_device
from agent.infer.runtimes.probe import Runtimes


def diagnose(paths: Paths) -> list[dict[str, Any]]:
    """All findings as JSON objects."""
    own = [*_configuration(paths), *_service(paths)]
    try:
        answer = AdminClient(str(paths.admin_socket)).call("GET", "/v1/doctor")
    except AgentError as error:
        return health.as_documents([*own, health.from_error("core", error), *_without_core(paths)])
    running = health.Finding("core", "ok", f"answers on {paths.admin_socket}")
    return [*health.as_documents([*own, running]), *answer["findings"]]


def _configuration(paths: Paths) -> list[health.Finding]:
    try:
        configuration.load(paths.config, explicit=paths.config_explicit)
    except ConfigError as error:
        return [health.from_error("config", error)]
    return [health.Finding("config", "ok", str(paths.config) if paths.config.exists() else "defaults")]


def _service(paths: Paths) -> list[health.Finding]:
    """Of the service, where it is what is asked about and not an agent with folders of somebody's own."""
    if (paths.state_dir, paths.run_dir) != (DEFAULT_STATE_DIR, DEFAULT_RUN_DIR):
        return []
    return check_service(look(paths), ask_systemd)


def _without_core(paths: Paths) -> list[health.Finding]:
    device = look_at_device(paths, Config())
    return [
        *health.check_device(device),
        *health.check_folder(paths.state_dir),
        *health.check_runtimes(Runtimes().states(), device.facts),
        *health.check_confinement(),
        *health.check_swap(device.facts, locked=False),
    ]
