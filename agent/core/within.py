"""What the fleet's side uses of core: values and callables, and no more of it than these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.base.config import Config
from agent.core.device import Device
from agent.core.health import Finding
from agent.core.operating import Operations
from agent.operations.install import Installer
from agent.operations.maintain import Maintenance
from agent.operations.measured import DeviceView
from agent.operations.probation import Watcher
from agent.trust.desk import Desk

if TYPE_CHECKING:
    from agent.infer.runtimes.probe import Runtimes
    from agent.operations.updates import Updates


@dataclass(frozen=True, slots=True)
class Within:
    """``hold`` puts a configuration into force, on the event loop's thread; ``findings`` are those that core makes.

    ``view`` is the device as choices see it, ``desk`` where anything is wanted from outside. ``figures`` are of this
    process, ``governor`` its levels, ``statistics`` the document of inference, ``quality`` how well a version answers,
    ``key_place`` where the device secret is; ``diagnose`` all checks and slow.
    """

    operations: Operations
    installer: Installer
    maintenance: Maintenance
    watcher: Watcher
    device: Device
    runtimes: Runtimes
    view: DeviceView
    desk: Desk
    updates: Updates
    file_config: Callable[[], Config]
    hold: Callable[[Config], None]
    status: Callable[[], dict[str, Any]]
    findings: Callable[[], list[Finding]]
    diagnose: Callable[[], list[dict[str, Any]]]
    figures: Callable[[], dict[str, float]]
    governor: Callable[[], dict[str, Any]]
    statistics: Callable[[], dict[str, Any]]
    quality: Callable[[str, str], dict[str, Any]]
    key_place: Callable[[], str]
    unload_all: Callable[[], int]
    restart: Callable[[], None]
    reboot: Callable[[], None]
    stay: Callable[[], None]
