"""What the scenarios share: the image, what is installed on it, a machine on which it is, and the table of results.

Settings come by environment, as ``deploy/vm-test.sh`` sets them: EDGE_AGENT_VM_ARCH, EDGE_AGENT_VM_CUTS,
EDGE_AGENT_VM_SEED, EDGE_AGENT_VM_ROWS (a file for the results), EDGE_AGENT_VM_ACCEL.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Releases, libraries, pip, releases  # noqa: F401 - fixtures
from tests.vm import image as images
from tests.vm.artefacts import Shares, install
from tests.vm.disk import Disk
from tests.vm.machine import Kit, Machine, MachineError

ARCH = os.environ.get("EDGE_AGENT_VM_ARCH") or images.native()
CUTS = int(os.environ.get("EDGE_AGENT_VM_CUTS") or 50)
#: The dearer ones, of updates of the agent; the store's are the rest.
UPDATE_CUTS = CUTS // 4
SEED = int(os.environ.get("EDGE_AGENT_VM_SEED") or 1)
#: An emulated processor now and then stands still for seconds: neither a verdict over a version nor an answer that
#: waits for a start may depend on it.
CONFIG = "[probation]\nlocal = false\n[server]\ndeadline_s = 200\n"

# -- results ----------------------------------------------------------------------------------------------------------

rows: list[dict[str, Any]] = []


def record(name: str, seconds: float, result: str = "ok", **counts: object) -> None:
    """A row of the table."""
    rows.append({"scenario": name, "result": result, "seconds": round(seconds, 1), **counts})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each scenario is a row, with what it has counted."""
    name = report.nodeid.rpartition("::")[2].removeprefix("test_")
    if "tests/vm/test_vm" not in report.nodeid or (report.passed and report.when != "call"):
        return
    result = "ok" if report.passed else "FAILED"
    if report.skipped:
        result = f"skipped: {report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr}"
    record(name, report.duration, result, **dict(report.user_properties))


def pytest_sessionfinish() -> None:
    """For those who print the table or keep it."""
    if path := os.environ.get("EDGE_AGENT_VM_ROWS"):
        Path(path).write_text(json.dumps(rows))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table for people."""
    if rows:
        terminalreporter.section("machines")
    for row in rows:
        counts = " ".join(
            f"{key}={value}" for key, value in row.items() if key not in ("scenario", "result", "seconds")
        )
        terminalreporter.write_line(f"{row['scenario']:<28} {row['seconds']:>7} s  {row['result']:<7} {counts}")


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Put figures into the scenario's row."""

    def put(**counts: object) -> None:
        for name, value in counts.items():
            record_property(name, value)

    return put


# -- machines ---------------------------------------------------------------------------------------------------------

_on: list[Machine] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What the journal of a machine says when a scenario fails on it."""
    report = yield
    if report.failed and "tests/vm" in report.nodeid:
        for machine in [one for one in _on if one.is_on]:
            try:
                said = machine.do("run", command=["journalctl", "--no-pager", "-n", "80", "-o", "cat"], timeout=60)
                report.sections.append(("journal", said["out"]))
            except (MachineError, OSError) as error:
                report.sections.append(("journal", f"none: {error}"))
    return report


@pytest.fixture(scope="session")
def switch_on() -> Iterator[Callable[..., Machine]]:
    """Boot a machine; it is switched off in the end whatever happens."""

    def on(kit: Kit, disk: Disk, **options: Any) -> Machine:
        machine = Machine(kit, disk, **options)
        _on.append(machine)
        machine.boot()
        return machine

    yield on
    for machine in _on:
        machine.off()
    _on.clear()


@pytest.fixture(scope="session")
def image() -> images.Image:
    begin = time.monotonic()
    if reason := images.prepare(ARCH):
        pytest.skip(reason)
    made = images.image(ARCH)
    record("(image)", time.monotonic() - begin, mb=made.root.stat().st_blocks * 512 >> 20)
    return made


@pytest.fixture(scope="session")
def shares(
    image: images.Image,
    releases: Releases,  # noqa: F811
    pip: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Shares:
    return Shares(image, releases, pip, tmp_path_factory.mktemp("share"))


@pytest.fixture(scope="session")
def kit(shares: Shares) -> Kit:
    begin = time.monotonic()
    made = shares.make("0.1.0")
    record("(artefacts)", time.monotonic() - begin, mb=made.artefacts.stat().st_blocks * 512 >> 20)
    return made


@pytest.fixture(scope="session")
def installed(kit: Kit, switch_on: Callable[..., Machine]) -> Disk:
    """The disk of a machine on which the package was installed without a network, with one model, powered off."""
    begin = time.monotonic()
    machine = switch_on(kit, Disk(kit.image.root))
    assert machine.said["devices"] == ["lo"]
    done = install(machine, "0.1.0")
    machine.do("write", path="/etc/edge-agent/config.toml", text=CONFIG)
    machine.do("run", command=["systemctl", "reload", "edge-agent-core.service"])
    added = machine.do("add", file="0.tflite")
    assert added["status"] == 200, added
    size = machine.do("run", command=["du", "-sm", "/opt/edge-agent"])["out"].split()[0]
    machine.power_off()
    record(
        "(install)", time.monotonic() - begin, install_s=done["s"], tree_mb=int(size), first_boot_s=machine.boot_s[0]
    )
    return machine.disk


@pytest.fixture(scope="session")
def running(kit: Kit, installed: Disk, switch_on: Callable[..., Machine]) -> Machine:
    """A machine that has booted with the agent on it; scenarios use it one after another and leave it in order."""
    return switch_on(kit, installed.copy())
