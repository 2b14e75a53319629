"""Wheelhouses for the system's own Python, made once, and releases of the agent made from this checkout."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "deploy" / "install.sh"
PYTHON = Path("/usr/bin/python3")
CACHE = ROOT / ".cache" / "deploy"


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("installing takes root")
    if subprocess.run([PYTHON, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip(f"{PYTHON} cannot make virtual environments (package python3-venv)")


def install(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the installer; its output is text, on one stream."""
    return subprocess.run(
        ["bash", str(INSTALL), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False, **options,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


def copy_source(folder: Path) -> Path:
    """What a release is built from, without what else lies about in a checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("agent", "hw_profiles", "systemd"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "deploy").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "deploy/config.toml", "deploy/install.sh"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def pip() -> Path:
    """The system Python's pip, in an environment of its own."""
    need_root()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "pip/bin/pip").exists():
            subprocess.run([PYTHON, "-m", "venv", "--clear", CACHE / "pip"], check=True)
    return CACHE / "pip/bin/pip"


@pytest.fixture(scope="session")
def libraries(pip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of all that the agent needs, but not its own. Made once for each state of pyproject.toml."""
    version = subprocess.run([PYTHON, "-V"], stdout=subprocess.PIPE, text=True, check=True).stdout
    key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + version.encode()).hexdigest()[:16]
    folder = CACHE / f"wheels-{key}"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            source = copy_source(tmp_path_factory.mktemp("source"))
            made = subprocess.run(
                [pip, "wheel", "--quiet", "--wheel-dir", folder.with_suffix(".part"), f"{source}[device,litert]"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            if made.returncode:
                pytest.skip(f"no wheels to be had here: {made.stdout[-300:]}")
            for wheel in folder.with_suffix(".part").glob("edge_agent-*"):
                wheel.unlink()
            folder.with_suffix(".part").rename(folder)
    return folder


class Releases:
    """Wheelhouses with a version of the agent each."""

    def __init__(self, pip: Path, libraries: Path, folder: Path) -> None:
        self._pip, self._libraries, self._folder = pip, libraries, folder

    def made(self, version: str) -> Path:
        """A wheelhouse that ``make`` has made."""
        return self._folder / f"wheels-{version}"

    def make(self, version: str, *changes: tuple[str, str, str]) -> Path:
        """A wheelhouse with ``version``; ``changes`` are path, text and what stands in its place."""
        source = copy_source(self._folder / f"source-{version}")
        for name, before, after in (
            ("pyproject.toml", 'version = "0.1.0"', f'version = "{version}"'),
            ("agent/__init__.py", '"0.1.0"', f'"{version}"'),
            *changes,
        ):
            text = (source / name).read_text()
            assert before in text, f"{name} has no {before}"
            (source / name).write_text(text.replace(before, after))
        wheels = self.made(version)
        wheels.mkdir()
        for wheel in self._libraries.iterdir():
            os.link(wheel, wheels / wheel.name)
        subprocess.run([self._pip, "wheel", "--quiet", "--no-deps", "-w", wheels, source], check=True)
        return wheels


@pytest.fixture(scope="session")
def releases(pip: Path, libraries: Path) -> Iterator[Releases]:
    """Beside the cache, so that wheels are linked and not copied."""
    folder = CACHE / f"releases-{os.getpid()}"
    folder.mkdir()
    yield Releases(pip, libraries, folder)
    shutil.rmtree(folder)


@pytest.fixture
def small_wheelhouse(tmp_path: Path) -> Path:
    """The agent's wheel alone, as far as the installer reads it before it calls pip."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "edge_agent-9.9.9-py3-none-any.whl", "w") as wheel:
        for path in [*(ROOT / "systemd").iterdir(), ROOT / "deploy/config.toml", INSTALL]:
            inside = f"systemd/{path.name}" if path.parent.name == "systemd" else path.name
            wheel.writestr(f"edge_agent-9.9.9.data/data/share/edge-agent/{inside}", path.read_bytes())
    return folder


def listing(root: Path) -> dict[str, tuple[int, int, str]]:
    """Every path below ``root`` with mode, time and target."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, os.readlink(path) if path.is_symlink() else "")
    return found
