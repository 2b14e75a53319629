"""The unit of the link: as walled in as agreed, and what the walls must leave possible."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.base.config import Config
from tests.link.broker import ROOT

UNIT = ROOT / "systemd" / "edge-agent-link.service"
BUDGET = 1.3


def values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_link_is_exposed_no_more_than_agreed(tmp_path: Path) -> None:
    def exposure(path: Path) -> float:
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if "unrecognized option" in done.stdout or "Failed to create directory" in done.stdout:
            pytest.skip(f"systemd-analyze judges no files here: {done.stdout[:200]}")
        found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
        assert found, done.stdout
        return float(found[1])

    assert exposure(UNIT) <= BUDGET
    opened = tmp_path / UNIT.name
    opened.write_text(UNIT.read_text().replace("CapabilityBoundingSet=\n", "").replace("ProtectSystem=strict\n", ""))
    assert exposure(opened) > BUDGET, "it would be noticed"


def test_user_folder_and_times_are_those_of_the_code() -> None:
    assert values("User") == values("Group") == [Config().sockets.link_user]
    assert values("StateDirectory") == ["edge-agent-link"]
    assert "/var/lib/edge-agent-link" in values("NoExecPaths")[0].split()
    (stop,), (interval,), (burst,), (pause,) = map(
        values, ("TimeoutStopSec", "StartLimitIntervalSec", "StartLimitBurst", "RestartSec")
    )
    assert int(stop) >= 10, "the goodbye takes six seconds at most"
    assert int(burst) * int(pause) > int(interval), "restarts at their own pace never end for good"
    assert int(values("CPUWeight")[0]) < 100, "core has the default"


def test_the_process_imports_nothing_heavy() -> None:
    """pydantic, numpy and cryptography alone would take the memory that link may have."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import agent.link.main\n"
        "heavy = {'pydantic', 'numpy', 'cryptography', 'psutil', 'agent.base.config', 'multiprocessing'}\n"
        "print(sorted(heavy & {*sys.modules, *(name.partition('.')[0] for name in sys.modules)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
