"""A machine to install on: this one's own root folder below a layer in memory, booted by systemd-nspawn.

Nothing that happens in it reaches the real disk, and it has no network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

STORY = """[Unit]
After=basic.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 {inside}/booted.py {story}
ExecStopPost=systemctl --no-block poweroff
"""
#: nspawn's own filter is older than Landlock, and keeps containers from locking memory.
FILTER = "landlock_create_ruleset landlock_add_rule landlock_restrict_self @memlock"
INSIDE = "/srv/story"
#: nspawn ends with 133 where the machine in it is to be started again (systemd-nspawn(1), exit status).
AGAIN = 'while :; do "$@"; status=$?; [ $status = 133 ] || exit $status; done'
#: A layer in memory over the whole root folder, seen by nobody else; then what is to be run in it.
LAYER = """set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"; shift
exec "$@"
"""


def layered(folder: Path, *command: str) -> list[str]:
    """``command`` with a root folder at ``FOLDER/root`` that is this machine's own and may be written to."""
    folder.mkdir()
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", LAYER, "layer", str(folder), *command]


def boot(folder: Path, story: str, *binds: tuple[Path, str], timeout: int = 400) -> dict[str, Any]:
    """Boot, let the story of that name happen with ``folder`` as ``/srv/story``, power off; what it saw."""
    if os.geteuid() != 0 or not shutil.which("systemd-nspawn"):
        pytest.skip("booting a machine takes root and systemd-nspawn (package systemd-container)")
    out = folder / "out"
    out.mkdir(exist_ok=True)
    unit = folder / "story.service"
    unit.write_text(STORY.format(story=story, inside=INSIDE))
    command = layered(folder.with_name(f"{folder.name}-layer"),
        "sh", "-c", AGAIN, "again", "systemd-nspawn", "--quiet", "--directory=.", f"--machine=ea-install-{os.getpid()}",
        "--register=no", "--keep-unit", "--private-network", f"--system-call-filter={FILTER}", "--link-journal=no",
        f"--bind-ro={folder}:{INSIDE}", f"--bind={out}:{INSIDE}/out",
        *(f"--bind-ro={path}:{INSIDE}/{name}" for path, name in binds),
        f"--bind-ro={unit}:/etc/systemd/system/story.service",
        "--bind-ro=/dev/null:/etc/systemd/system/systemd-firstboot.service",
        "--boot", "--", "--unit=story.service",
    )  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            console, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            console, _ = process.communicate()
    text = console.decode(errors="replace")
    result = out / "result.json"
    if not result.exists():
        if "Welcome to" not in text:
            pytest.skip(f"systemd-nspawn cannot boot here: {text[-300:]}")
        pytest.fail(f"the story did not come to its end:\n{text}")
    seen: dict[str, Any] = json.loads(result.read_text())
    return seen
