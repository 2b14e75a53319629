"""Python environments other than the one that runs the tests: with another runtime, with a broken one, with none.

They lie below ``.cache/venvs`` and are made by the first test that asks for one, from what ``pyproject.toml`` says; the
checkout itself comes by PYTHONPATH. Where one cannot be made the test is skipped with the reason.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "venvs"
#: The newest Python that tflite-runtime has wheels for.
VERSION = "3.11"


def project() -> dict[str, Any]:
    """The ``[project]`` table of pyproject.toml."""
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    table: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements(extra: str = "") -> list[str]:
    """What pip is asked for: the agent's own needs, and those of one extra."""
    table = project()
    return [*table["dependencies"], *(table["optional-dependencies"][extra] if extra else ())]


def environment(name: str, wanted: Sequence[str]) -> Path:
    """The Python of an environment that has ``wanted`` and nothing else. Skips the test where there can be none.

    Only one of the Pythons that run the tests does this: the environment is the same for all.
    """
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("environments of their own are tested once, by the Python of .venv")
    folder = FOLDER / f"{name}-py{VERSION}"
    stamp, told = folder / ".made-for", hashlib.sha256(json.dumps(sorted(wanted)).encode()).hexdigest()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "environments.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != told:
            _make(folder, wanted)
            stamp.write_text(told)
    return folder / "bin" / "python"


def _make(folder: Path, wanted: Sequence[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [_base_python(), "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted],
    ):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"cannot make an environment with {', '.join(wanted)}: {reason}")


def _base_python() -> str:
    """A Python of the version, outside any environment."""
    own = Path(sys.base_prefix) / "bin" / f"python{VERSION}"
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    places = [str(own), *glob.glob(f"{pyenv}/versions/{VERSION}.*/bin/python{VERSION}"), f"/usr/bin/python{VERSION}"]
    for place in [*places, shutil.which(f"python{VERSION}") or ""]:
        if place and Path(place).exists():
            return place
    pytest.skip(f"there is no Python {VERSION} here")
