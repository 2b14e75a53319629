"""The machine before the agent: a small Debian with systemd and Python, its kernel, and a ramdisk of a few modules.

Made from Debian's packages, once for each state of this file (that is the key of the cache), without loop devices or
mounts of our own. The kernel is booted directly: a boot loader is none of the agent's business, and costs emulated
seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.conftest import ROOT

CACHE = ROOT / ".cache" / "vm"
#: The name of the serial port on which the tests speak with the machine.
PORT = "edge-agent-test"
#: Where the machine finds what is to be installed, read-only.
SHARE = "/srv/artefacts"
#: Debian's words for an architecture, and QEMU's.
QEMU = {"amd64": "x86_64", "arm64": "aarch64"}
SIZE = "3G"

#: A device has these, or the agent needs them.
PACKAGES = ("systemd", "systemd-sysv", "udev", "dbus", "kmod", "python3", "adduser", "e2fsprogs")
#: What systemd opens a TPM with; it loads them only then.
TPM = {
    "bookworm": ("libtss2-esys-3.0.2-0", "libtss2-mu0", "libtss2-rc0", "libtss2-tcti-device0"),
    "trixie": ("libtss2-esys-3.0.2-0t64", "libtss2-mu-4.0.1-0t64", "libtss2-rc0t64", "libtss2-tcti-device0t64"),
}
#: What is needed until the root file system is there, and the port; udev loads the rest.
MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "crc32c_generic", "ext4")
#: Quiet, so that an idle machine is idle: nothing of this is the agent's.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer",
    "getty@tty1.service", "serial-getty@ttyS0.service", "serial-getty@ttyAMA0.service",
)  # fmt: skip

#: Kernel and busybox are fetched and not installed: installing would make a ramdisk, for a minute. Nor is what makes
#: virtual environments, without which the agent's package has to do: only scenarios with deploy/install.sh put it.
FETCH = """set -e
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
mkdir -p "$1/fetched" "$1/venv/partial"
cd "$1/fetched"
kernel="$(apt-cache depends {kernel} | sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)$/\\1/p' | head -n 1)"
apt-get -qq download "$kernel" busybox-static
apt-get -qq -y --download-only -o Dir::Cache::archives="$1/venv" install python3-venv
"""
FILES = {
    "etc/hostname": "edge\n",
    # A machine without an id would take every boot for its first one.
    "etc/machine-id": "5f0e8c2b7d1a4e6f9b3c0d2e4f6a8b1c\n",
    "etc/fstab": f"/dev/vda / ext4 defaults 0 0\n/dev/vdb {SHARE} ext4 ro,nofail 0 0\n",
    "etc/systemd/system/edge-agent-test.service": f"""[Unit]
Description=The tests' ear in this machine
RequiresMountsFor={SHARE}
[Service]
ExecStart=/usr/bin/python3 {SHARE}/inside.py /dev/virtio-ports/{PORT}
OOMScoreAdjust=-1000
[Install]
WantedBy=multi-user.target
""",
}
INIT = """#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
for module in {modules}; do busybox insmod /modules/$module; done
while ! [ -b /dev/vda ]; do busybox sleep 1; done
busybox mount -t ext4 -o rw /dev/vda /root
busybox mount -o move /dev /root/dev
exec busybox switch_root /root /sbin/init
"""


@dataclass(frozen=True, slots=True)
class Image:
    """Files of one machine: the root file system is to be used as a base and never written to.

    ``venv`` is a folder of packages that are not installed: what the system's Python makes environments with.
    """

    arch: str
    suite: str
    root: Path
    kernel: Path
    ramdisk: Path
    venv: Path


def native() -> str:
    """Debian's word for this machine's architecture."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def suite() -> str:
    """The Debian that this machine is, since the package fits its Python; empty for another system."""
    found = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return found.get("VERSION_CODENAME", "") if found.get("ID") == "debian" else ""


def why_not(arch: str) -> str:
    """What is missing here for machines of that architecture; empty when nothing is."""
    if arch not in QEMU:
        return f"machines are made for {' and '.join(QEMU)}, not for {arch}"
    for tool, package in (
        (f"qemu-system-{QEMU[arch]}", "qemu-system-x86" if arch == "amd64" else "qemu-system-arm"),
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
    ):
        if not shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
            return f"{tool} is not installed (package {package})"
    if os.geteuid() != 0:
        return "making an image takes root"
    if not suite():
        return "this is no Debian, of which the machine's Python has to be"
    return ""


def prepare(arch: str) -> str:
    """Make the image, unless it is there; why it cannot be had, empty when it can."""
    if reason := why_not(arch):
        return reason
    try:
        image(arch)
    except RuntimeError as error:
        return f"no image to be had here: {error}"
    return ""


def why_not_tpm() -> str:
    """What is missing here for a machine with a TPM; empty when nothing is."""
    return "" if shutil.which("swtpm") else "swtpm is not installed (package swtpm)"


def image(arch: str) -> Image:
    """The image, made where the cache has none. RuntimeError with what a tool said where it cannot be made."""
    codename = suite()
    recipe = repr((arch, codename)).encode() + Path(__file__).read_bytes()
    folder = CACHE / f"{codename}-{arch}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as work:
                _make(arch, codename, Path(work))
                for old in CACHE.glob(f"{codename}-{arch}-*"):
                    shutil.rmtree(old)
                (Path(work) / "made").rename(folder)
    return Image(arch, codename, folder / "root.img", folder / "kernel", folder / "ramdisk", folder / "venv")


def _make(arch: str, codename: str, work: Path) -> None:
    made, root = work / "made", work / "root"
    made.mkdir()
    hook = work / "fetch"
    hook.write_text(FETCH.format(kernel=f"linux-image-cloud-{arch}"))
    packages = (*PACKAGES, *TPM.get(codename, ()))
    run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--architectures={arch}",
        f"--include={','.join(packages)}", "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
        f"--customize-hook=sh {hook} \"$1\"", codename, root,
    )  # fmt: skip
    fetched = work / "fetched"
    for package in (root / "fetched").iterdir():
        run("dpkg-deb", "-x", package, fetched)
    shutil.rmtree(root / "fetched")
    (made / "venv").mkdir()
    for package in (root / "venv").glob("*.deb"):
        shutil.move(package, made / "venv")
    shutil.rmtree(root / "venv")
    release = next((fetched / "lib/modules").iterdir()).name
    shutil.copytree(fetched / "lib/modules", root / "usr/lib/modules", symlinks=True, dirs_exist_ok=True)
    run("chroot", root, "depmod", release)
    for name, text in FILES.items():
        (root / name).write_text(text)
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).symlink_to("/dev/null")
    (units / "multi-user.target.wants/edge-agent-test.service").symlink_to("../edge-agent-test.service")
    (root / SHARE.lstrip("/")).mkdir(parents=True)
    shutil.copy(fetched / f"boot/vmlinuz-{release}", made / "kernel")
    _ramdisk(fetched / "bin/busybox", root / "usr/lib/modules" / release, made / "ramdisk")
    # Lazily made tables would be written by the machine, at a time of its own.
    run(
        "mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-m", "0",
        "-d", root, made / "root.img", SIZE,
    )  # fmt: skip


def pack(folder: Path, path: Path) -> None:
    """A file system with the files of ``folder``, to be read only."""
    size = sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())
    room = f"{(size >> 20) * 11 // 10 + 16}M"
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", folder, path, room)


def run(*command: object) -> None:
    """Run a tool; what it said is in the error when it fails."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    done = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, env=os.environ | {"PATH": path},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stdout[-1500:]}")


# -- the ramdisk ------------------------------------------------------------------------------------------------------


def _ramdisk(busybox: Path, modules: Path, path: Path) -> None:
    needed: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needed[name] = others.split()
    names = {_module(path): path for path in needed}
    built_in = {_module(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    order: list[str] = []
    for wanted in MODULES:
        if wanted not in names:
            if wanted not in built_in:
                raise RuntimeError(f"the kernel has no module {wanted}")
            continue
        # modules.dep names all that a module needs, the last of them first to be loaded.
        order += [one for one in (*reversed(needed[names[wanted]]), names[wanted]) if one not in order]
    archive = Archive()
    for folder in ("bin", "dev", "modules", "root"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    for name in order:
        data = (modules / name).read_bytes()
        plain = lzma.decompress(data) if name.endswith(".xz") else data
        archive.add(f"modules/{_module(name)}", stat.S_IFREG | 0o644, plain)
    archive.add("init", stat.S_IFREG | 0o755, INIT.format(modules=" ".join(map(_module, order))).encode())
    path.write_bytes(archive.finish())


def _module(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


class Archive:
    """A cpio archive in the form that the kernel unpacks (newc: Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """One file, folder or device."""
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def finish(self) -> bytes:
        """All of it."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


if __name__ == "__main__":
    print(prepare(sys.argv[1]))
