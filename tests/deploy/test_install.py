"""The installer with wrong input, on machines that lack something, and into a root folder that is none of a machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.deploy.conftest import INSTALL, Releases, install, listing, need_root
from tests.deploy.machine import layered

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="installing takes root")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ofline", "x"], "unknown option --ofline"),
        (["--offline"], "--offline needs a value"),
        (["--root", ""], "--root needs a value"),
        (["--runtime", "tensorflow"], "unknown runtime tensorflow"),
        (["--purge"], "--purge goes with --uninstall"),
        (["--files-only"], "--files-only goes with --root"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], complaint: str) -> None:
    done = install(*arguments)
    assert done.returncode == 2 and f"error: {complaint}" in done.stdout and "--help" in done.stdout


def test_help_says_what_it_does() -> None:
    done = install("--help")
    assert done.returncode == 0 and "--uninstall --purge" in done.stdout and "set -euo" not in done.stdout


@ROOT_ONLY
def test_a_user_without_rights_is_told_so(short_dir: Path) -> None:
    program = short_dir / "install.sh"
    shutil.copy(INSTALL, program)
    short_dir.chmod(0o755)
    done = subprocess.run(["bash", program], stderr=subprocess.PIPE, text=True, check=False, user=65534)
    assert done.returncode == 1 and "error: cannot install: that takes root" in done.stderr


@ROOT_ONLY
def test_wheelhouses_that_are_none(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    wheels = tmp_path / "wheels"
    assert "no such folder" in install("--root", root, "--offline", wheels).stdout
    wheels.mkdir()
    done = install("--root", root, "--offline", wheels)
    assert "the agent's wheel is not in it" in done.stdout and "pip wheel" in done.stdout
    wheel = wheels / "edge_agent-1.0.0-py3-none-any.whl"
    wheel.write_bytes(b"half a whe")
    assert "error: cannot read" in install("--root", root, "--offline", wheels).stdout
    with zipfile.ZipFile(wheel, "w") as stream:
        stream.writestr("something", "else")
    assert "it holds no units" in install("--root", root, "--offline", wheels).stdout
    wheel.rename(wheels / "edge_agent-..%2f-py3-none-any.whl")
    assert install("--root", root, "--offline", wheels).returncode == 1
    assert list(root.iterdir()) == []
    assert "no such folder" in install("--root", tmp_path / "nowhere", "--offline", wheels).stdout


@ROOT_ONLY
def test_a_dry_run_does_nothing(tmp_path: Path, small_wheelhouse: Path) -> None:
    need_root()
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    before = listing(root)
    done = install("--root", root, "--offline", small_wheelhouse, "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "  - make /opt/edge-agent/9.9.9" in done.stdout and "doing:" not in done.stdout
    assert listing(root) == before


@pytest.mark.slow
@ROOT_ONLY
def test_what_cannot_be_installed_leaves_no_part_of_it(tmp_path: Path, small_wheelhouse: Path) -> None:
    need_root()
    root = tmp_path / "root"
    (root / "opt/edge-agent/1.0.0").mkdir(parents=True)
    (root / "opt/edge-agent/current").symlink_to("1.0.0")
    done = install("--root", root, "--offline", small_wheelhouse, "--runtime", "none")
    assert done.returncode == 1 and "error: cannot install edge-agent[fast,delivery] from" in done.stdout
    assert sorted(path.name for path in (root / "opt/edge-agent").iterdir()) == ["1.0.0", "current"]
    assert os.readlink(root / "opt/edge-agent/current") == "1.0.0"


def in_layer(folder: Path, script: str, *arguments: object) -> str:
    """What ``script`` prints in a root folder of its own that is this machine's, with the installer at ``$1``."""
    need_root()
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    inside = ["chroot", ".", "sh", "-c", script, "story", str(INSTALL), *map(str, arguments)]
    done = subprocess.run(
        layered(folder / "layer", *inside), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if "mount: " in done.stdout:
        pytest.skip(f"no layers here: {done.stdout[:200]}")
    return done.stdout


@ROOT_ONLY
@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("rm -f /usr/bin/python3*; PATH=/usr/bin:/bin bash $1", "there is no Python 3.10 or newer"),
        ("rm -rf /usr/lib/python3*/ensurepip; PATH=/usr/bin:/bin bash $1", "has no venv module"),
        ("setarch i686 bash $1 --root /srv", "cannot install on i686 (64-bit)"),
    ],
    ids=["no python", "no venv", "i686"],
)
def test_machines_that_lack_something(tmp_path: Path, script: str, complaint: str) -> None:
    said = in_layer(tmp_path, script)
    assert "error: cannot install" in said and complaint in said


@ROOT_ONLY
def test_a_full_disk_is_told_before_anything_is_done(tmp_path: Path, small_wheelhouse: Path) -> None:
    small = "mkdir -p /srv/x/opt && mount -t tmpfs -o size=50m tmpfs /srv/x/opt"
    script = f"{small} && bash $1 --root /srv/x --offline $2; find /srv/x"
    said = in_layer(tmp_path, script, small_wheelhouse)
    assert "MB free at /srv/x/opt/edge-agent, 400 are needed" in said
    assert "9.9.9/" not in said and "/srv/x/etc" not in said


@pytest.mark.slow
@pytest.mark.main_only
def test_an_image_without_a_python_a_cut_off_run_and_one_runtime_after_another(
    tmp_path: Path, releases: Releases
) -> None:
    wheels = releases.make("0.1.0+root")
    root = tmp_path / "root"
    target = root / "opt/edge-agent/0.1.0+root"
    # What a run that was cut off left behind.
    (target / "bin").mkdir(parents=True)
    (target / "bin/python").write_text("half")
    done = install("--root", root, "--offline", wheels, "--runtime", "none")
    assert done.returncode == 0, done.stdout
    # It knows nothing of where it was made.
    script = (target / "bin/edge-agent").read_text()
    assert script.startswith("#!/opt/edge-agent/0.1.0+root/bin/python")
    assert subprocess.run(["grep", "-rlaF", str(root), str(target)], stdout=subprocess.PIPE, check=False).stdout == b""
    agent = [root / "opt/edge-agent/current/bin/python", "-I", "-m", "agent.cli.device"]
    version = subprocess.run([*agent, "--version"], stdout=subprocess.PIPE, text=True, check=True, cwd="/")
    assert version.stdout == "edge-agent 0.1.0+root\n"
    assert (root / "etc/systemd/system/multi-user.target.wants/edge-agent.target").is_symlink()
    before = listing(root)
    again = install("--root", root, "--offline", wheels, "--runtime", "none")
    assert "nothing to do" in again.stdout and listing(root) == before
    # The same version with another runtime: beside the first, which stays as the way back.
    other = install("--root", root, "--offline", wheels, "--runtime", "tflite")
    assert other.returncode == 0, other.stdout
    current, previous = (os.readlink(root / f"opt/edge-agent/{name}") for name in ("current", "previous"))
    assert current.startswith("0.1.0+root.") and previous == "0.1.0+root"
    (root / "var/lib/edge-agent").mkdir(parents=True)
    gone = install("--uninstall", "--root", root)
    assert gone.returncode == 0, gone.stdout
    assert not (root / "opt/edge-agent").exists() and (root / "var/lib/edge-agent").exists()


@ROOT_ONLY
def test_the_onnx_runtime_of_a_jetson_is_left_as_it_is(tmp_path: Path, small_wheelhouse: Path) -> None:
    own = "/usr/lib/python3/dist-packages/onnxruntime_gpu-1.18.0.dist-info"
    metadata = r"Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.18.0\n"
    script = f"mkdir -p {own} && printf '{metadata}' >{own}/METADATA; bash $1 --root /srv --offline $2 --dry-run"
    said = in_layer(tmp_path, script, small_wheelhouse)
    assert "the system's own onnxruntime-gpu 1.18.0 is used" in said
    assert said.splitlines()[3].endswith("with fast delivery"), "and none is put over it"
