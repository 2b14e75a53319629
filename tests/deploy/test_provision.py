"""Preparing an image: the fleet's files with their owners and modes, nothing of one device, wrong folders refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.base import config
from agent.cli import fleet
from agent.trust import allegiance
from tests.deploy.conftest import ROOT, Releases, listing, need_root

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="an image's files belong to root")]


def provision(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "deploy/provision"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet as its operator makes one."""
    folder = tmp_path_factory.mktemp("operator") / "fleet"
    command = ["init", "--tenant", "acme", "--broker", "mqtt.example.org", "--no-password", "--fleet", str(folder)]
    assert fleet.main(command) == 0
    return folder


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments, complaint in (
        ([], "--root DIR is missing"),
        (["--root"], "--root needs a value"),
        (["--root", tmp_path / "nowhere"], "no such folder"),
        (["--root", "/"], "cannot provision /: that is this machine"),
        (["--root", tmp_path, "--nonsense"], "unknown option --nonsense"),
    ):
        done = provision(*arguments)
        assert done.returncode == 1 and complaint in done.stdout


def test_folders_that_are_not_for_devices_are_refused(tmp_path: Path, founded: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    image = tmp_path / "image"
    assert "no such folder" in provision("--root", root, "--fleet", image).stdout
    assert "there is no" in provision("--root", root, "--fleet", founded).stdout, "the operator's own folder"
    shutil.copytree(founded / "image", image)
    secret = image / "signing.key"
    secret.write_text("the key that commands the fleet")
    assert f"{secret} does not belong on a device" in provision("--root", root, "--fleet", image).stdout
    secret.unlink()
    (image / "trust.toml").write_text('tenant = "acme"\ndevice = "cam-1"\n')
    assert "it names one device" in provision("--root", root, "--fleet", image).stdout
    assert list(root.iterdir()) == []


@pytest.mark.long
@pytest.mark.main_only
def test_an_image_has_the_agent_the_fleet_and_no_secret(tmp_path: Path, founded: Path, releases: Releases) -> None:
    need_root()
    wheels = releases.make("0.1.0+image")
    root = tmp_path / "root"
    device = (
        "var/lib/edge-agent/keys/device-secret",
        "etc/credstore.encrypted/device-secret",
        "var/lib/systemd/credential.secret",
        "var/lib/systemd/random-seed",
    )
    for name in device:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("of the device that the image was taken from")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    options = ("--root", root, "--fleet", founded / "image", "--offline", wheels, "--runtime", "none")
    done = provision(*options)
    assert done.returncode == 0, done.stdout
    etc = root / "etc/edge-agent"
    assert [name for name in device if (root / name).exists()] == []
    assert (root / "etc/machine-id").read_text() == ""
    # What the device will read, read as it does.
    assert allegiance.load(etc / "trust.toml").tenant == "acme"
    loaded = config.load(etc / "config.toml", explicit=True)
    assert loaded.link.host == "mqtt.example.org"
    for path in (loaded.link.ca_file, loaded.link.claim_cert_file, loaded.link.claim_key_file):
        assert (root / path.lstrip("/")).is_file(), path
    # The claim's key is for link and nobody else.
    groups = dict(line.split(":")[::2] for line in (root / "etc/group").read_text().splitlines())
    key = (etc / "link/claim.key").stat()
    assert (key.st_mode & 0o777, key.st_uid, key.st_gid) == (0o640, 0, int(groups["edge-agent-link"]))
    assert not (root / "etc/systemd/system/edge-agent-core.service.d/50-device.conf").exists()
    before = listing(root)
    again = provision(*options)
    assert again.returncode == 0 and "nothing to do" in again.stdout and "writing" not in again.stdout
    assert listing(root) == before
