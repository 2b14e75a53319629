"""Updates with the real installer and real environments: in a root folder where nothing runs, and on a booted machine.

The releases are made from this checkout; some are spoilt on purpose.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from agent.base.clock import SystemClock, TrustedClock
from agent.fleet.checking import FolderWants
from agent.operations.updates import Updates
from agent.trust.releases import Course, Kind, Request, Verdict, release_target
from agent.trust.repository import Repository
from agent.updater.ground import Ground
from agent.updater.services import runtime_of
from tests import onnx_models
from tests.core.test_daemon import bundle
from tests.deploy.conftest import INSTALL, PYTHON, Releases, install
from tests.deploy.machine import boot
from tests.deploy.test_install import ROOT_ONLY, in_layer
from tests.operations.deliveries import Operator

#: A core that dies where it finds the sockets of a service: no trial sees that.
POISON = (
    "agent/core/daemon.py",
    "    async def main() -> bool:",
    "    if handover.descriptors:\n        raise SystemExit('error: cannot start')\n\n    async def main() -> bool:",
)
#: One that a trial sees.
BROKEN = ("agent/core/daemon.py", "def run_core(", "raise SystemExit('error: broken')\n\n\ndef run_core(")


def own_kind() -> Kind:
    """Of the system's own Python, for which the environments are."""
    script = "import platform, sys; print(platform.machine(), '%d.%d' % sys.version_info[:2])"
    arch, python = subprocess.run([PYTHON, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return Kind(arch, python)


class Image:
    """A root folder with a release installed, and what core would do there."""

    def __init__(self, root: Path, operator: Operator, wheels: Path) -> None:
        self.root, self.operator, self.ground = root, operator, Ground(root)
        (root / "etc/edge-agent").mkdir(parents=True)
        self.state = root / "var/lib/edge-agent"
        self.state.mkdir(parents=True)
        done = install("--root", root, "--offline", wheels, "--runtime", "none")
        assert done.returncode == 0, done.stdout
        shutil.copy(operator.folder.shipped_root, root / "etc/edge-agent/root.json")
        self.updates = Updates(self.state / "update", self.ground.home)

    def hand_over(self, version: str, as_id: str) -> None:
        always = TrustedClock(SystemClock(), "always", datetime.fromtimestamp(0, timezone.utc))
        root = (self.root / "etc/edge-agent/root.json").read_bytes()
        repository = Repository(self.state / "repository", root, FolderWants(self.operator.site), always)
        repository.refresh()
        target = repository.find(release_target(version, own_kind()))
        self.updates.vouch(self.state / "repository")
        shutil.copyfile(self.operator.site / target.file, self.updates.tar)
        self.updates.ask(Request(id=as_id, version=version))

    def start_updater(self) -> subprocess.Popen[str]:
        """As its unit does: by the release that was confirmed last."""
        program = (self.ground.home / "steady").resolve() / "bin/python"
        return subprocess.Popen(
            [program, "-I", "-m", "agent.updater", "--root", self.root], cwd="/", text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run_updater(self) -> Course:
        process = self.start_updater()
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        course = self.ground.course()
        assert course is not None, said
        return course

    def version(self) -> str:
        """What the environment in use says that it is: it works."""
        program = self.ground.home / "current/bin/python"
        done = subprocess.run(
            [program, "-I", "-m", "agent.cli.device", "--version"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd="/",
        )
        return done.stdout.split()[-1]

    def links(self) -> list[str | None]:
        return [self.ground.link(name) for name in ("current", "previous", "steady")]


@pytest.fixture(scope="module")
def shipped(releases: Releases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Releases, Operator]:
    """A fleet that ships 0.1.6 and 0.1.7 (broken); 0.1.5 is what is installed."""
    operator = Operator(tmp_path_factory.mktemp("fleet"))
    for version, changes in (("0.1.5", ()), ("0.1.6", ()), ("0.1.7", (BROKEN,))):
        wheels = releases.make(version, *changes)
        if version != "0.1.5":
            operator.ok("publish-release", str(wheels))
    return releases, operator


@pytest.mark.slow
@pytest.mark.main_only
@ROOT_ONLY
def test_an_update_of_an_image_from_the_request_to_its_confirmation(
    tmp_path: Path, shipped: tuple[Releases, Operator]
) -> None:
    releases, operator = shipped
    image = Image(tmp_path / "root", operator, releases.made("0.1.5"))
    assert image.links() == ["0.1.5", None, "0.1.5"]
    assert (image.ground.home / "current/share/edge-agent/install.sh").read_bytes() == INSTALL.read_bytes()
    image.hand_over("0.1.6", "one")
    course = image.run_updater()
    assert course.stage == "probation", course
    assert image.links() == ["0.1.6", "0.1.5", "0.1.5"] and image.version() == "0.1.6"
    image.updates.say(Verdict(id="one", say="keep"))
    assert image.run_updater().stage == "kept"
    assert image.links() == ["0.1.6", "0.1.5", "0.1.6"]
    assert "extras fast delivery\n" in (image.ground.home / "0.1.6/.installed").read_text(), "no runtime came with it"
    image.hand_over("0.1.7", "two")
    course = image.run_updater()
    assert course.stage == "refused" and "broken" in course.reason, course
    assert image.links() == ["0.1.6", "0.1.5", "0.1.6"] and image.version() == "0.1.6"
    assert image.ground.environments() == ["0.1.5", "0.1.6"]


@pytest.mark.long
@pytest.mark.main_only
@ROOT_ONLY
def test_thirty_updates_with_cuts(tmp_path: Path, shipped: tuple[Releases, Operator]) -> None:
    """Each is cut off, by SIGKILL of all that runs, at random moments; every third release is broken."""
    releases, operator = shipped
    moments = random.Random(7)
    figures: dict[str, int] = {"updates": 0, "cuts": 0, "kept": 0, "refused": 0}
    image = Image(tmp_path / "root", operator, releases.made("0.1.5"))
    took_s = 12.0
    for number in range(30):
        version = f"0.2.{number}"
        broken = number % 3 == 2
        operator.ok("publish-release", str(releases.make(version, *((BROKEN,) if broken else ()))))
        before = image.version()
        image.hand_over(version, f"job-{number}")
        for _ in range(moments.randint(1, 3)):
            process = image.start_updater()
            time.sleep(moments.uniform(0.2, took_s))
            if process.poll() is None:
                os.killpg(process.pid, 9)
                figures["cuts"] += 1
            process.communicate()
            assert image.version() in (before, version), "a working agent at every moment"
        begin = time.monotonic()
        course = image.run_updater()
        took_s = max(5.0, 0.5 * took_s + 0.5 * (time.monotonic() - begin))
        if course.stage == "probation":
            image.updates.say(Verdict(id=f"job-{number}", say="keep"))
            course = image.run_updater()
        assert course.id == f"job-{number}" and course.stage == ("refused" if broken else "kept"), course
        assert image.version() == (before if broken else version)
        assert len(image.ground.environments()) <= 2
        figures["updates"] += 1
        figures[course.stage] += 1
        operator.ok("withdraw-release", version, "--yes")
        shutil.rmtree(releases.made(version))
    assert figures["updates"] == 30 and figures["refused"] == 10, figures
    print(figures)


# -- runtimes that are not ours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stamp", "runtime"),
    [
        ("extras fast delivery onnx\nsystem-site-packages no \n", "onnx"),
        ("extras fast delivery litert\nsystem-site-packages no \n", "tflite"),
        ("extras delivery tflite\nsystem-site-packages yes \n", "tflite"),
        ("extras fast delivery onnx litert\nsystem-site-packages no \n", "onnx,tflite"),
        ("extras fast delivery\nsystem-site-packages no \n", "none"),
        ("extras fast delivery\nsystem-site-packages yes onnxruntime-gpu 1.18.0\n", "onnx"),
    ],
)
def test_an_update_brings_the_runtimes_that_there_were(tmp_path: Path, stamp: str, runtime: str) -> None:
    place = tmp_path / "opt/edge-agent/0.1.0"
    place.mkdir(parents=True)
    (place.parent / "steady").symlink_to("0.1.0")
    (place / ".installed").write_text(stamp)
    assert runtime_of(Ground(tmp_path)) == runtime


@ROOT_ONLY
def test_the_onnx_runtime_of_a_jetson_stays_over_an_update(tmp_path: Path, small_wheelhouse: Path) -> None:
    own = "/usr/lib/python3/dist-packages/onnxruntime_gpu-1.18.0.dist-info"
    metadata = r"Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.18.0\n"
    made = f"mkdir -p {own} && printf '{metadata}' >{own}/METADATA"
    said = in_layer(
        tmp_path, f"{made}; bash $1 --root /srv --offline $2 --runtime onnx --stage --dry-run", small_wheelhouse
    )
    assert "the system's own onnxruntime-gpu 1.18.0 is used" in said
    steps = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(steps) == 1 and steps[0].endswith("with fast delivery"), "the environment alone, and no other runtime"


# -- on a booted machine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(releases: Releases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """0.3.0 is installed, updated to 0.3.1 under a client, and then to 0.3.2, which dies where it is needed."""
    folder = tmp_path_factory.mktemp("machine")
    operator = Operator(tmp_path_factory.mktemp("fleet"))
    wheels = releases.make("0.3.0")
    (folder / "wheels-0.3.0").mkdir()
    for version, changes in (("0.3.1", ()), ("0.3.2", (POISON,))):
        operator.ok("publish-release", str(releases.make(version, *changes)))
    shutil.copytree(operator.site, folder / "site")
    shutil.copy(Path(__file__).with_name("booted.py"), folder)
    shutil.copy(INSTALL, folder)
    data = onnx_models.linear()
    bundle(folder / "m.edgemodel", {"fp32": ("fp32", data)}, golden_from=data)
    (folder / "x.json").write_text(json.dumps([[1.0] * 16]))
    shutil.copy(operator.folder.shipped_root, folder / "root.json")
    jobs_for(operator, folder)
    return boot(folder, "update", (wheels, "wheels-0.3.0"), timeout=560)


def jobs_for(operator: Operator, folder: Path) -> None:
    """``trust.toml`` of one device, and the jobs that it is given, as sticks bring them."""
    from tests.core.desk import Desk, Keys  # noqa: PLC0415 - brings in the link's tests

    keys = Keys()
    (folder / "trust.toml").write_text(keys.trust("cam-1"))
    desk = Desk(keys, "cam-1", 1, lambda: "0" * 32)
    for version in ("0.3.1", "0.3.2"):
        job = desk.job("agent.update", {"version": version})
        (folder / f"job-{version}.json").write_bytes(desk.sealed(desk.document(job)))


@pytest.mark.slow
@pytest.mark.main_only
def test_a_fleet_updates_a_device_under_its_clients(seen: dict[str, Any]) -> None:
    assert seen["install"]["rc"] == 0, seen["install"]
    assert seen["good"]["state"] == "succeeded", (seen["good"], seen["journal"])
    assert seen["good"]["result"] == {"version": "0.3.1", "before": "0.3.0"}
    assert seen["status after good"]["version"] == "0.3.1"
    assert seen["status after good"]["update"]["previous"] == "0.3.0"
    answers, failures, _ = seen["asked"]
    assert answers > 20 and failures == []
    assert seen["links after good"] == ["0.3.1", "0.3.0", "0.3.1"]
    assert seen["doctor after good"] <= 1, seen["doctor"]


@pytest.mark.slow
@pytest.mark.main_only
def test_a_release_that_cannot_start_comes_back_by_itself_and_the_job_says_why(seen: dict[str, Any]) -> None:
    assert seen["bad"]["state"] == "failed", (seen["bad"], seen["journal"])
    assert seen["bad"]["error"]["text"].endswith("core did not start, 3 times: cannot start"), seen["bad"]
    assert seen["status after bad"]["version"] == "0.3.1"
    assert seen["links after bad"] == ["0.3.1", "0.3.0", "0.3.1"]
    assert seen["environments"] == ["0.3.0", "0.3.1"]
    assert seen["answer after bad"]["outputs"] == seen["answer"]["outputs"]
    assert seen["states"] == ["active"] * 4
