"""The Debian package: built, installed on a booted machine, used, removed, purged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import tflite_models
from tests.deploy.conftest import ROOT, Releases
from tests.deploy.machine import boot

pytestmark = [
    pytest.mark.long,
    pytest.mark.main_only,
    pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not installed"),
]
#: MB of the installed tree with TFLite alone.
BUDGET = 120
QUICK = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1", "SOURCE_DATE_EPOCH": "1700000000"}


def build(wheels: Path, out: Path, **options: Any) -> Path:
    done = subprocess.run(
        ["bash", ROOT / "deploy/build-deb.sh", "--runtime", "tflite", "--offline", wheels, "--out", out],
        capture_output=True, text=True, check=False, env=os.environ | QUICK, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def package(releases: Releases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(releases.make("0.1.0+deb"), tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def seen(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("machine")
    (folder / "deb").mkdir()
    shutil.copy(package, folder / "deb")
    shutil.copy(Path(__file__).with_name("booted.py"), folder)
    shutil.copy(ROOT / "deploy/install.sh", folder)
    (folder / "linear.tflite").write_bytes(tflite_models.linear())
    (folder / "x.json").write_text(json.dumps([[1.0] * 16]))
    return boot(folder, "package")


def field(package: Path, name: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "-f", package, name], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def test_its_fields_say_where_it_fits_and_it_is_within_its_budget(package: Path) -> None:
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert field(package, "Architecture") == architecture.strip()
    assert "python3 (>= 3." in field(package, "Depends") and "python3 (<< 3." in field(package, "Depends")
    assert int(field(package, "Installed-Size")) <= BUDGET * 1024


def test_it_serves_once_it_is_installed(seen: dict[str, Any]) -> None:
    assert seen["before"] == []
    assert seen["install"]["rc"] == 0, seen["install"]
    assert seen["states"] == ["active"] * 4, seen["journal"]
    assert seen["detect"]["rc"] == 0
    assert seen["added"]["rc"] == 0, (seen["added"], seen["journal"])
    assert seen["answer"]["rc"] == 0, seen["answer"]
    levels = {finding["level"] for finding in json.loads(seen["doctor"]["out"])["findings"]}
    assert levels <= {"ok", "note"}, seen["doctor"]["out"]


def test_over_itself_it_changes_nothing_and_the_script_stays_away(seen: dict[str, Any]) -> None:
    assert seen["again"]["rc"] == 0, seen["again"]
    assert seen["answer after upgrade"]["json"]["outputs"] == seen["answer"]["json"]["outputs"]
    assert seen["script beside package"]["rc"] == 1
    assert "cannot install beside the package edge-agent" in seen["script beside package"]["err"]


def test_removed_it_leaves_state_and_configuration_and_purged_nothing(seen: dict[str, Any]) -> None:
    assert seen["remove"]["rc"] == 0, seen["remove"]
    assert seen["left"] == ["/etc/edge-agent", "/var/lib/edge-agent", "/var/lib/edge-agent-link"]
    assert seen["state kept"]
    assert seen["installed again"]["rc"] == 0, seen["installed again"]
    assert seen["answer of what was kept"]["rc"] == 0, seen["answer of what was kept"]
    assert seen["answer of what was kept"]["json"]["outputs"] == seen["answer"]["json"]["outputs"]
    assert seen["purge"]["rc"] == 0, seen["purge"]
    assert seen["left after purge"] == [] and seen["users after purge"] == []


def test_the_same_wheels_make_the_same_package(package: Path, releases: Releases, tmp_path: Path) -> None:
    again = build(releases.made("0.1.0+deb"), tmp_path)
    assert again.read_bytes() == package.read_bytes()
