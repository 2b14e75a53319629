"""The unit files as data, and as a root folder that ``systemd-analyze`` takes for a machine."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
SYSTEM_UNITS = Path("/usr/lib/systemd/system")

Unit = dict[str, list[str]]


@pytest.fixture(scope="session")
def unit() -> Callable[[str], Unit]:
    """Read one unit: its keys (they are unique across sections here) with all their values, in order."""

    def read(name: str) -> Unit:
        settings: Unit = defaultdict(list)
        text = (UNITS / name).read_text().replace("\\\n", " ")
        for line in text.splitlines():
            key, separator, value = line.partition("=")
            if separator and not line.startswith("#"):
                settings[key].append(value)
        return settings

    return read


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root folder with the distribution's units, ours, and stand-ins for the programs that ours name."""
    if not SYSTEM_UNITS.is_dir():
        pytest.skip(f"no units of a distribution in {SYSTEM_UNITS}")
    installed = tmp_path / "etc/systemd/system"
    installed.mkdir(parents=True)
    for path in UNITS.iterdir():
        shutil.copy(path, installed)
    shutil.copytree(SYSTEM_UNITS, tmp_path / "usr/lib/systemd/system", symlinks=True)
    for program in (
        "bin/sh",
        "bin/rm",
        "bin/systemctl",
        "opt/edge-agent/current/bin/edge-agent",
        "opt/edge-agent/update/candidate/bin/python",
    ):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    return tmp_path
