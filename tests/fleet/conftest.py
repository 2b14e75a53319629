"""A fleet of the tests: a folder made by ``edge-fleet init``, a real mosquitto as it is shipped, devices."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent.cli.fleet import main
from agent.fleet.books import Books
from agent.trust.allegiance import load
from tests.fleet.device import Claimant, Identity, SimulatedDevice
from tests.fleet.waiting import until

ROOT = Path(__file__).resolve().parents[2]
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
TENANT = "acme"


class Done(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def edge_fleet(folder: Path, *arguments: str) -> Done:
    """Run a command in this process; nobody is at a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["--fleet", str(folder), *arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """One mosquitto on one configuration file."""

    def __init__(self, config: Path, ports: list[int]) -> None:
        self._config, self._ports = config, ports
        self._process: subprocess.Popen[bytes] | None = None
        self.log = config.with_suffix(".log")

    def start(self) -> None:
        assert MOSQUITTO is not None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=log, stdout=log)
        until(self._listening, "mosquitto listens")

    def _listening(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text()
        for port in self._ports:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None


class Fleet:
    """An operator with a folder and a running broker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fleet"
        self.scratch = folder
        self.device_port, self.operator_port, self.claim_port = free_port(), free_port(), free_port()
        made = self.run(
            "init", "--tenant", TENANT, "--broker", f"localhost:{self.device_port}",
            "--operators", f"localhost:{self.operator_port}", "--claims", f"localhost:{self.claim_port}",
            "--server-cert", "localhost", "--server-cert", "127.0.0.1", "--no-password",
        )  # fmt: skip
        assert made.status == 0, made.err
        self._render()
        self.broker = Mosquitto(self.folder / "broker" / "broker.conf", [self.device_port, self.operator_port])
        self.claims = Mosquitto(self.folder / "broker" / "claims.conf", [self.claim_port])
        self.devices: list[SimulatedDevice] = []

    def _render(self) -> None:
        settings = {
            "PORT": self.device_port, "OPERATOR_PORT": self.operator_port, "CLAIM_PORT": self.claim_port,
            "DATA": self.scratch / "data", "CLAIM_DATA": self.scratch / "claim-data", "AUTOSAVE": 1,
        }  # fmt: skip
        for name in ("data", "claim-data"):
            (self.scratch / name).mkdir()
        render = [str(ROOT / "deploy" / "mosquitto" / "render.sh"), TENANT, str(self.folder / "broker")]
        words = [f"{name}={value}" for name, value in settings.items()]
        subprocess.run([*render, *words], check=True, stdout=subprocess.DEVNULL)
        for name in ("broker.conf", "claims.conf"):
            path = self.folder / "broker" / name
            path.write_text("user root\n" + path.read_text())  # as root it would give up the right to its files

    def run(self, *arguments: str) -> Done:
        """An edge-fleet command."""
        return edge_fleet(self.folder, *arguments)

    def ok(self, *arguments: str) -> Any:
        """A command that must succeed, with --json; its document."""
        done = self.run(*arguments, "--json")
        assert done.status == 0, done.err
        return done.json

    def states(self, job: str) -> dict[str, str]:
        """The state of a job by device, as the operator is told."""
        return {each["device"]: each["state"] for each in self.ok("job", "show", job)["devices"]}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A command in a process of its own."""
        command = [sys.executable, "-m", "agent.cli.fleet", "--fleet", str(self.folder), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        return subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **options)

    def books(self) -> Books:
        return Books(self.folder / "fleet.db")

    @property
    def ca(self) -> Path:
        return self.folder / "operator" / "server-ca.pem"

    def claimant(self, identity: Identity | None = None) -> Claimant:
        """A device that asks to be enrolled, at the broker for that."""
        claimant = Claimant(TENANT, self.folder / "image" / "trust.toml", identity or Identity())
        link = self.folder / "image" / "link"
        claimant.connect(self.claim_port, link / "server-ca.pem", link / "claim.pem", link / "claim.key")
        return claimant

    def enrolled(self, name: str, identity: Identity | None = None, *arguments: str) -> SimulatedDevice:
        """A device that was enrolled by hand, not connected yet."""
        identity = identity or Identity()
        csr = self.scratch / f"{name}.csr"
        csr.write_text(identity.csr)
        out = self.scratch / f"by-hand-{len(list(self.scratch.glob('by-hand-*')))}"
        self.ok(
            "approve", name, "--manual", "--identity", identity.public, "--csr", str(csr), "--out", str(out), "--yes",
            *arguments,
        )  # fmt: skip
        identity.write_key(out / "device.key")
        allegiance = load(out / "trust.toml")
        assert allegiance is not None
        device = SimulatedDevice(TENANT, identity, allegiance)
        device.files = (self.ca, out / "device.pem", out / "device.key")  # type: ignore[attr-defined]
        return device

    def online(self, name: str, identity: Identity | None = None) -> SimulatedDevice:
        """A device that is enrolled and connected."""
        device = self.enrolled(name, identity)
        self.connect(device)
        return device

    def connect(self, device: SimulatedDevice) -> None:
        device.connect(self.device_port, *device.files)  # type: ignore[attr-defined]
        self.devices.append(device)

    def close(self) -> None:
        for device in self.devices:
            device.connection.stop()
            assert device.connection.errors == []
        self.claims.stop()
        self.broker.stop()


@pytest.fixture(autouse=True)
def _no_fleet_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a fleet of his own."""
    for name in ("EDGE_FLEET_DIR", "EDGE_FLEET_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fleet(short_dir: Path) -> Iterator[Fleet]:
    """A fleet whose broker runs; that for claims is started by the test that wants it."""
    if MOSQUITTO is None:
        pytest.skip("no mosquitto here")
    made = Fleet(short_dir)
    made.broker.start()
    yield made
    made.close()
