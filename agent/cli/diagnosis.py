"""What ``doctor`` says: core's own findings when it runs, else what can be seen without it."""

from __future__ import annotations

from typing import Any

from agent.base import config as configuration
from agent.base.config import Config
from agent.base.errors import AgentError, ConfigError
from agent.base.paths import Paths
from agent.client import AdminClient
from agent.core import health
from agent.core.device import look_at_device
from agent.infer.runtimes.probe import Runtimes


def diagnose(paths: Paths) -> list[dict[str, Any]]:
    """All findings as JSON objects."""
    own = _configuration(paths)
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


def _without_core(paths: Paths) -> list[health.Finding]:
    device = look_at_device(paths, Config())
    return [
        *health.check_device(device),
        *health.check_folder(paths.state_dir),
        *health.check_runtimes(Runtimes().states(), device.facts),
        *health.check_confinement(),
        *health.check_swap(device.facts, locked=False),
    ]
