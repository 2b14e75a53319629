"""A machine below a folder, a fleet that ships releases for it, and an installer that makes small environments.

The repository, its signatures, the hand-over and the updater are real. An environment here is a folder with a program
that says its version; a release with a wheel ``broken`` does not pass its trial, one with ``poison`` does not start.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from agent.base.clock import SystemClock, TrustedClock
from agent.fleet.checking import FolderWants
from agent.operations.updates import Updates
from agent.trust.releases import STATE_FORMAT, Course, Request, Verdict, release_target, this_kind
from agent.trust.repository import Repository, Target
from agent.updater.ground import Ground
from agent.updater.services import Installer
from agent.updater.updating import Present, Updater
from tests.operations.deliveries import Operator

INSTALLER = r"""#!/usr/bin/env bash
# Makes environments as deploy/install.sh does: begun anew where one is half there, the stamp last.
set -euo pipefail
root="" wheels="" units="" keep=no
while [ $# -gt 0 ]; do
    case "$1" in
    --root) root="$2" && shift ;;
    --offline) wheels="$2" && shift ;;
    --runtime) shift ;;
    --units) units="$2" && shift ;;
    --keep-updater) keep=yes ;;
    esac
    shift
done
home="$root/opt/edge-agent"
if [ -n "$units" ]; then
    for unit in core update; do
        [ "$unit:$keep" = update:yes ] || echo "$units" >"$root/etc/$unit.new"
        [ "$unit:$keep" = update:yes ] || mv "$root/etc/$unit.new" "$root/etc/$unit.unit"
    done
    exit 0
fi
name="$(basename "$wheels"/edge_agent-*.whl | cut -d- -f2)"
if [ ! -e "$home/$name/.installed" ]; then
    rm -rf "$home/$name"
    mkdir -p "$home/$name"
    touch "$home/$name/pyvenv.cfg"
    for wheel in "$wheels"/*.whl; do basename "$wheel" | cut -d- -f1; done >"$home/$name/has"
    if grep -qx unbuildable "$home/$name/has"; then echo "error: cannot install: no room" >&2; exit 1; fi
    echo "extras fast delivery" >"$home/$name/.installed"
fi
echo "staged: $name"
"""
TERMS = "STATE_FORMAT = {state}\nOLDEST_STATE = {reads}\n"


def wheelhouse(folder: Path, version: str, *more: str, state: int = 1, reads: int = 1) -> Path:
    """Wheels of that version for this machine; ``more`` names others beside the agent's own."""
    folder.mkdir()
    with zipfile.ZipFile(folder / f"edge_agent-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("agent/trust/releases.py", TERMS.format(state=state, reads=reads))
    kind = this_kind()
    tag = f"cp{kind.python.replace('.', '')}"
    for name in ("compiled", *more):
        with zipfile.ZipFile(folder / f"{name}-1.0-{tag}-{tag}-manylinux_2_17_{kind.arch}.whl", "w") as wheel:
            wheel.writestr(name, os.urandom(3000))
    return folder


class Machine:
    """A root folder on which 0.1.0 is installed, with what plays core and systemd. See ``Services``."""

    def __init__(self, root: Path, operator: Operator) -> None:
        self.ground = Ground(root)
        self.operator = operator
        self.script = root / "install.sh"
        self.updates = Updates(self.ground.state_dir / "update", self.ground.home)
        #: What was done, in order.
        self.log: list[str] = []
        #: What core does when it is started with a version: by default it confirms it where it is on probation.
        self.core: Callable[[str], None] = lambda version: None
        self.confirms = True
        self.running = "0.1.0"
        self.failed = 0
        self.clock = 0.0
        self.attended = True
        (root / "etc/edge-agent").mkdir(parents=True)
        (root / "var/lib/edge-agent").mkdir(parents=True)
        self.ground.home.mkdir(parents=True)
        self.script.write_text(INSTALLER)
        self.environment("0.1.0")
        for name in ("current", "steady"):
            (self.ground.home / name).symlink_to("0.1.0")
        for unit in ("core", "update"):
            (root / f"etc/{unit}.unit").write_text("0.1.0\n")
        shutil.copy(operator.folder.shipped_root, root / "etc/edge-agent/root.json")

    def environment(self, name: str) -> None:
        place = self.ground.home / name
        place.mkdir()
        (place / "pyvenv.cfg").touch()
        (place / "has").write_text("edge_agent\n")
        (place / ".installed").write_text("extras fast delivery\n")

    # -- core's part --------------------------------------------------------------------------------------------------

    def believed(self, version: str) -> Target:
        """Refresh as core does; the release."""
        folder = self.ground.state_dir / "repository"
        root = (self.ground.root / "etc/edge-agent/root.json").read_bytes()
        clock = TrustedClock(SystemClock(), "always", datetime.fromtimestamp(0, timezone.utc))
        repository = Repository(folder, root, FolderWants(self.operator.site), clock)
        repository.refresh()
        return repository.find(release_target(version, this_kind()))

    def hand_over(self, version: str, *, as_id: str = "job-1-j1") -> None:
        """All that core hands over for a release, the request last."""
        target = self.believed(version)
        self.updates.vouch(self.ground.state_dir / "repository")
        shutil.copyfile(self.operator.site / target.file, self.updates.tar)
        self.updates.ask(Request(id=as_id, version=version))

    def hand_over_unchecked(self, version: str) -> None:
        """The same of a repository that core itself would refuse: what a core that was taken over might do."""
        folder, metadata = self.updates.folder, self.operator.site / "metadata"
        (folder / "metadata/root_history").mkdir(parents=True)
        for role in ("timestamp", "snapshot", "targets"):
            newest = max(metadata.glob(f"*{role}.json"), key=lambda path: path.stat().st_mtime_ns)
            shutil.copy(newest, folder / "metadata" / f"{role}.json")
        (tar,) = (self.operator.site / "targets/releases" / version).iterdir()
        shutil.copyfile(tar, self.updates.tar)
        self.updates.ask(Request(id="job-1-j1", version=version))

    # -- root's part --------------------------------------------------------------------------------------------------

    def updater(self, step: Callable[[str], None] = lambda name: None, present: str | None = None) -> Updater:
        """As it is started: by the version that is steady."""
        version = present or self.ground.link("steady") or ""
        installer = Installer(self.script, self.ground)
        return Updater(
            self.ground, installer, self, Present(version, this_kind(), STATE_FORMAT), within_s=30.0, step=step,
            monotonic=lambda: self.clock,
        )  # fmt: skip

    def run(self) -> Course:
        """Let it do what it will; how the update stands."""
        self.updater().run()
        course = self.ground.course()
        assert course is not None
        return course

    def update(self, version: str, **more: str) -> Course:
        self.hand_over(version, **more)
        return self.run()

    # -- Services -----------------------------------------------------------------------------------------------------

    def reload(self) -> None:
        self.log.append("reload")

    def try_out(self, name: str) -> str:
        self.log.append(f"try {name}")
        return "its import failed" if "broken" in self.has(name) else ""

    def restart(self) -> None:
        self.log.append("restart")
        self.start()

    def failures(self) -> int:
        return self.failed

    def last_words(self) -> str:
        return "poisoned"

    def wait(self, seconds: float) -> bool:
        self.clock += seconds
        return self.attended

    def has(self, name: str) -> list[str]:
        return (self.ground.home / name / "has").read_text().split()

    def start(self) -> None:
        """Systemd starts core: whatever ``current`` leads to."""
        name = self.ground.link("current")
        assert name is not None, "there is always a working agent"
        assert (self.ground.home / name / ".installed").exists(), f"{name} is not whole"
        self.running, self.failed = name, 0
        if "poison" in self.has(name):
            self.failed = 3
            return
        self.core(name)
        course = self.ground.course()
        if self.confirms and course is not None and course.name == name and not course.has_ended:
            self.updates.say(Verdict(id=course.id, say="keep"))

    # -- what must hold -----------------------------------------------------------------------------------------------

    def links(self) -> Sequence[str | None]:
        return [self.ground.link(name) for name in ("current", "previous", "steady")]

    def units(self) -> list[str]:
        return [(self.ground.root / f"etc/{name}.unit").read_text().strip() for name in ("core", "update")]

    def require_tidy(self, *environments: str) -> None:
        """No more environments than these, nothing half done, no mark."""
        assert self.ground.environments() == sorted(environments)
        assert not self.ground.work.exists() and not (self.ground.own / "pending").exists()
        assert not list(self.ground.home.rglob(".tmp-*"))


def operator_with(folder: Path, *versions: str, **wheels: Sequence[str]) -> Operator:
    """A fleet that has shipped these versions; ``wheels`` by "v" and the version with "_" adds names of wheels."""
    operator = Operator(folder)
    for version in versions:
        more = wheels.get("v" + version.replace(".", "_"), ())
        operator.ok("publish-release", str(wheelhouse(folder / f"wheels-{version}", version, *more)))
    return operator
