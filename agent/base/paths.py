"""Where the agent's files are: by flag, environment, default. Brings no pydantic in, as the configuration does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import ConfigError

DEFAULT_CONFIG = Path("/etc/edge-agent/config.toml")
DEFAULT_STATE_DIR = Path("/var/lib/edge-agent")
DEFAULT_RUN_DIR = Path("/run/edge-agent")
#: sun_path of unix(7) without its closing NUL.
MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the agent's files are. ``config_explicit`` tells that somebody named the file, so that it must exist."""

    config: Path = DEFAULT_CONFIG
    state_dir: Path = DEFAULT_STATE_DIR
    run_dir: Path = DEFAULT_RUN_DIR
    config_explicit: bool = False

    @property
    def infer_socket(self) -> Path:
        """The apps' socket. ConfigError when the kernel could not bind a path of this length."""
        return self._socket("infer.sock")

    @property
    def admin_socket(self) -> Path:
        """The socket of root and link. ConfigError when the kernel could not bind a path of this length."""
        return self._socket("admin.sock")

    @property
    def user_profiles(self) -> Path:
        """The integrator's own hardware profiles, beside the configuration file; they win over the shipped ones."""
        return self.config.parent / "hw_profiles"

    @property
    def link_dir(self) -> Path:
        """Where link keeps its key, its certificate and its outbox. As a service it is a user of its own."""
        beside = self.state_dir == DEFAULT_STATE_DIR
        return self.state_dir.with_name(f"{self.state_dir.name}-link") if beside else self.state_dir / "link"

    @property
    def trust_file(self) -> Path:
        """Whom this device obeys, beside the configuration file."""
        return self.config.parent / "trust.toml"

    @property
    def journal(self) -> Path:
        """Jobs of the fleet."""
        return self.state_dir / "journal.db"

    @property
    def repository(self) -> Path:
        """What is kept of the operator's repository: its metadata."""
        return self.state_dir / "repository"

    @property
    def update(self) -> Path:
        """What core hands over to root's updater."""
        return self.state_dir / "update"

    @property
    def device_secret(self) -> Path:
        """The file that holds the device secret where the service manager has no credential."""
        return self.state_dir / "keys" / "device-secret"

    def _socket(self, name: str) -> Path:
        path = self.run_dir / name
        length = len(os.fsencode(path))
        if length > MAX_SOCKET_PATH:
            raise ConfigError(
                f"cannot use {path} as a socket: {length} bytes, the kernel takes {MAX_SOCKET_PATH}",
                hint="choose a shorter --run-dir",
            )
        return path


def resolve_paths(
    environ: Mapping[str, str],
    *,
    config: str | os.PathLike[str] | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
) -> Paths:
    """Flag before environment before default, each made absolute. An empty variable counts as not set."""

    def pick(flag: str | os.PathLike[str] | None, variable: str, default: Path) -> Path:
        chosen = flag if flag is not None else environ.get(variable) or default
        return Path(os.path.abspath(chosen))

    return Paths(
        config=pick(config, "EDGE_AGENT_CONFIG", DEFAULT_CONFIG),
        state_dir=pick(state_dir, "EDGE_AGENT_STATE_DIR", DEFAULT_STATE_DIR),
        run_dir=pick(run_dir, "EDGE_AGENT_RUN_DIR", DEFAULT_RUN_DIR),
        config_explicit=config is not None or bool(environ.get("EDGE_AGENT_CONFIG")),
    )
