"""The operator's folder: where a fleet's settings, keys, certificates and registry are kept.

Invariants: the folder is its owner's alone (0700, private files 0600); nothing that is there is ever overwritten by
making something new; relative paths in ``fleet.toml`` mean files of the folder, so that it can be moved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from agent.base.config import describe_problems, read_toml
from agent.base.errors import ConfigError, ConflictError, NotFoundError
from agent.base.files import require_own, write_atomically
from agent.wire.topics import is_name

VARIABLE = "EDGE_FLEET_DIR"
#: The ports of deploy/mosquitto: devices, operators, devices that ask to be enrolled.
DEVICE_PORT, OPERATOR_PORT, CLAIM_PORT = 8883, 8884, 8885

_Host = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:_-]+$")]
_Port = Annotated[int, Field(ge=1, le=65_535)]
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_Text = Annotated[str, StringConstraints(max_length=4096)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BrokerSettings(_Section):
    """How the operator's tools reach the broker. Relative files are the folder's."""

    host: _Host
    port: _Port = OPERATOR_PORT
    tls: bool = True
    ca_file: _Text = ""
    cert_file: _Text = ""
    key_file: _Text = ""
    username: _Text = ""
    password_file: _Text = ""


class Settings(_Section):
    """``fleet.toml``. ``groups`` names filters, as ``--where`` takes them, all of which must hold."""

    tenant: _Name
    broker: BrokerSettings
    groups: dict[_Name, list[_Text]] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths below the fleet's folder; nothing is read or made by naming them."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """Tenant, broker, groups."""
        return self.path / "fleet.toml"

    @property
    def database(self) -> Path:
        """The registry."""
        return self.path / "fleet.db"

    @property
    def trust_file(self) -> Path:
        """What goes to ``/etc/edge-agent/trust.toml`` of devices that will be enrolled."""
        return self.path / "trust.toml"

    def authority(self, kind: str) -> Path:
        """The certificate of one of the fleet's authorities."""
        return self.path / "authority" / f"{kind}.pem"

    def authority_key(self, kind: str) -> Path:
        """Its key."""
        return self.path / "authority" / f"{kind}.key"

    @property
    def enrolment_key(self) -> Path:
        """Signs enrolments: says which keys a device obeys."""
        return self.path / "authority" / "enrolment.key"

    @property
    def operator(self) -> Path:
        """The operator's own certificate and key, and who vouches for the broker."""
        return self.path / "operator"

    @property
    def image(self) -> Path:
        """What an image or an installer puts into ``/etc/edge-agent``."""
        return self.path / "image"

    @property
    def broker(self) -> Path:
        """What a broker needs: whom it lets in, and where it is one of our own, its certificate."""
        return self.path / "broker"

    @property
    def session_lock(self) -> Path:
        """Held by whichever command has the persistent session at the broker."""
        return self.path / "session.lock"

    @property
    def repository(self) -> Path:
        """What is published, and the keys that vouch for it."""
        return self.path / "repository"

    @property
    def site(self) -> Path:
        """The repository's static files: all that a web server needs."""
        return self.repository / "public"

    @property
    def role_keys(self) -> Path:
        """The private keys of the repository's roles."""
        return self.repository / "keys"

    @property
    def identity_key(self) -> Path:
        """Opens every payload that was published."""
        return self.role_keys / "identity.key"

    @property
    def publisher_lock(self) -> Path:
        """Held by whichever command changes what is published."""
        return self.repository / "lock"

    @property
    def shipped_root(self) -> Path:
        """The repository's root that goes to every device."""
        return self.image / "root.json"

    def signing_key(self, name: str) -> Path:
        """A private key that signs jobs. ``name`` was checked."""
        return self.path / "keys" / f"{name}.key"

    def file(self, named: str) -> Path:
        """A file that the settings name."""
        return self.path / named


def resolve_folder(environ: Mapping[str, str], flag: str | None) -> Folder:
    """Flag before environment before ``~/.config/edge-fleet``."""
    chosen = flag or environ.get(VARIABLE)
    return Folder(Path(os.path.abspath(chosen)) if chosen else Path.home() / ".config" / "edge-fleet")


def make_folder(folder: Folder) -> None:
    """The folder and its parts, for their owner alone. RefusedError when others could write there, OSError."""
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_own(folder.path)
    for part in ("authority", "broker", "image", "keys", "operator"):
        (folder.path / part).mkdir(mode=0o700, exist_ok=True)


def load_settings(folder: Folder) -> Settings:
    """``fleet.toml``. NotFoundError where there is no fleet yet, ConfigError naming the field, RefusedError."""
    path = folder.settings_file
    if not os.path.lexists(path):
        raise NotFoundError(
            f"cannot use {folder.path}: there is no fleet in it",
            hint="edge-fleet init makes one; --fleet names another",
        )
    require_own(folder.path)
    try:
        settings = Settings.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError(
            f"cannot read {path}: {describe_problems(error, Settings)}",
            hint="docs/reference/edge-fleet.md has every key",
        ) from error
    if not is_name(settings.tenant):
        raise ConfigError(f"cannot read {path}: tenant: must be a name")
    return settings


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """A file that was not there. ConflictError when it is: keys are never overwritten."""
    if os.path.lexists(path):
        raise ConflictError(f"cannot write {path}: it is there already", hint="move it away first")
    write_atomically(path, data, mode=mode)
