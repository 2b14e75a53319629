"""What is installed on the machines, on a disk of its own: packages of the agent, models, and the tests' ear.

For this machine's own architecture it is the Debian package. For another one, whose package cannot be built here, it is
a wheelhouse with ``deploy/install.sh``, which makes the environment on the machine itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import tflite_models
from tests.deploy.conftest import INSTALL, Releases
from tests.deploy.test_package import build
from tests.vm import image as images
from tests.vm.image import SHARE
from tests.vm.machine import Kit, Machine

#: Versions of one model; each says something else to the same input.
MODELS = 6
#: Installing takes emulated Python minutes where it makes an environment.
INSTALL_S = 900


@dataclass(frozen=True, slots=True)
class Shares:
    """Makes disks with what is to be installed."""

    image: images.Image
    releases: Releases
    pip: Path
    folder: Path

    def make(self, *versions: str) -> Kit:
        """A kit with these versions of the agent, and the models."""
        share = self.folder / "-".join(versions)
        share.mkdir()
        for version in versions:
            wheels = self.wheels(version)
            if self.image.arch == images.native():
                build(wheels, self.folder).rename(share / f"{version}.deb")
            else:
                shutil.copytree(wheels, share / version)
        return self.pack(share)

    def pack(self, share: Path) -> Kit:
        """A kit with what is in that folder, and what every machine needs; the folder goes."""
        for seed in range(MODELS):
            (share / f"{seed}.tflite").write_bytes(tflite_models.linear(seed))
        shutil.copy(Path(__file__).with_name("inside.py"), share)
        shutil.copy(INSTALL, share)
        shutil.copytree(self.image.venv, share / "venv")
        disk = self.folder / f"{share.name}.img"
        images.pack(share, disk)
        shutil.rmtree(share)
        return Kit(self.image, disk)

    def wheels(self, version: str, *changes: tuple[str, str, str]) -> Path:
        """A wheelhouse for the machines, without ONNX Runtime, which is not installed there; ``changes`` as there."""
        wheels = self.releases.make(version, *changes)
        for unwanted in wheels.glob("onnxruntime-*"):
            unwanted.unlink()
        if self.image.arch == images.native():
            return wheels
        folder = self.folder / f"wheels-{version}"
        folder.mkdir()
        binary = []
        for wheel in wheels.glob("*.whl"):
            if wheel.name.endswith("-any.whl"):
                shutil.copy(wheel, folder)
            else:
                binary.append("==".join(wheel.name.split("-")[:2]))
        for path in self._foreign(sorted(binary)).iterdir():
            shutil.copy(path, folder)
        return folder

    def _foreign(self, wanted: list[str]) -> Path:
        machine = images.QEMU[self.image.arch]
        kept = images.CACHE / f"wheels-{machine}-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:12]}"
        if not kept.exists():
            part = kept.with_suffix(f".{os.getpid()}")
            platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(17, 37)]
            subprocess.run(
                [self.pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", part, *platforms,
                 f"--platform=manylinux2014_{machine}", *wanted],
                check=True,
            )  # fmt: skip
            part.rename(kept)
        return kept


def install(machine: Machine, version: str) -> dict[str, Any]:
    """Install that version over whatever is there; the run of it."""
    if machine.kit.image.arch == images.native():
        return _run(machine, "dpkg", "--force-confold", "-i", f"{SHARE}/{version}.deb")
    return install_by_script(machine, version)


def install_by_script(machine: Machine, version: str) -> dict[str, Any]:
    """The same, with an environment that the machine makes itself of the wheels in that folder."""
    _run(machine, "sh", "-c", f"set -- {SHARE}/venv/*.deb; [ ! -e $1 ] || dpkg -i $@")
    return _run(machine, "bash", f"{SHARE}/install.sh", "--runtime", "tflite", "--offline", f"{SHARE}/{version}")


def remove(machine: Machine, *, purge: bool = False) -> None:
    """Uninstall it, with its state or without."""
    if machine.kit.image.arch == images.native():
        _run(machine, "dpkg", "-P" if purge else "-r", "edge-agent")
    else:
        _run(machine, "bash", f"{SHARE}/install.sh", "--uninstall", *(["--purge"] if purge else []))


def _run(machine: Machine, *command: str) -> dict[str, Any]:
    done: dict[str, Any] = machine.do("run", command=list(command), within=INSTALL_S, timeout=INSTALL_S + 60)
    assert done["rc"] == 0, done
    return done
