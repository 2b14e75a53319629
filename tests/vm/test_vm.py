"""The service on a real Debian, booted without any network: what happens to it in the years on the wall.

Each test is a scenario and a row of the table that ``deploy/vm-test.sh`` prints. No time is judged here: the processor
is emulated. Power cuts are in ``test_vm_cuts.py``.
"""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tflite_models
from tests.vm.artefacts import Shares, install, remove
from tests.vm.disk import Disk
from tests.vm.image import why_not_tpm
from tests.vm.machine import Kit, Machine

pytestmark = [pytest.mark.long, pytest.mark.main_only]

CORE, LINK = "edge-agent-core.service", "edge-agent-link.service"
SwitchOn = Callable[..., Machine]
Count = Callable[..., None]


def right(answer: dict[str, Any], seed: int = 0) -> bool:
    """Whether this is what the model with that seed says to a row of ones."""
    expected = tflite_models.weights_of(seed).sum(axis=0).tolist()
    return answer["status"] == 200 and all(
        math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3) for one, other in zip(answer["y"], expected, strict=True)
    )


def show(machine: Machine, unit: str, *names: str) -> dict[str, str]:
    shown: dict[str, str] = machine.do("show", unit=unit, names=list(names))
    return shown


def restarts(machine: Machine, unit: str = CORE) -> int:
    return int(show(machine, unit, "NRestarts")["NRestarts"])


def command(machine: Machine, *words: str) -> dict[str, Any]:
    """Run it; it has to work."""
    done: dict[str, Any] = machine.do("run", command=list(words))
    assert done["rc"] == 0, done
    return done


def test_boot_offline(running: Machine, count: Count) -> None:
    """No network device at all: the units come up, and the first request is answered."""
    first = running.do("first_answer")
    assert right(first), first
    assert running.said["devices"] == ["lo"]
    assert running.do("states") == ["active"] * 4
    count(
        boot_s=running.boot_s[0], kernel_to_answer_s=first["at_s"], kernel_to_multi_user_s=first["multi_user_s"],
        answer_after_multi_user_s=round(first["at_s"] - first["multi_user_s"], 1),
    )  # fmt: skip


def test_socket_activation(running: Machine, count: Count) -> None:
    """Nobody is there but the socket: a request starts core and is answered."""
    # Link first: it asks core for work, and would be the one to activate it.
    command(running, "systemctl", "stop", LINK)
    command(running, "systemctl", "stop", CORE)
    assert running.do("states") == ["inactive", "inactive", "active", "active"]
    answer = running.do("infer")
    assert right(answer), answer
    assert running.do("states")[0] == "active"
    command(running, "systemctl", "start", LINK)
    count(requests=1, answer_s=round(answer["s"], 1))


def test_core_killed(running: Machine, count: Count) -> None:
    before = running.do("send", unit=CORE, number=signal.SIGKILL)
    answer = running.do("infer")
    assert right(answer), answer
    assert running.do("pid_of", unit=CORE) not in (0, before)
    count(kills=1, refused=0, answer_s=round(answer["s"], 1))


@pytest.fixture
def short_watchdog(running: Machine) -> Iterator[None]:
    """Fifteen seconds, so that the test need not wait for the unit's sixty."""
    path = f"/run/systemd/system/{CORE}.d/90-test.conf"
    running.do("write", path=path, text="[Service]\nWatchdogSec=15\n")
    command(running, "systemctl", "daemon-reload")
    command(running, "systemctl", "restart", CORE)
    yield
    command(running, "rm", path)
    command(running, "systemctl", "daemon-reload")
    command(running, "systemctl", "restart", CORE)


@pytest.mark.usefixtures("short_watchdog")
def test_core_hung(running: Machine, count: Count) -> None:
    """A core that stands still is restarted by the watchdog, and the request that waited is answered."""
    assert right(running.do("infer"))
    known = restarts(running)
    # As long as it works, the watchdog has no reason.
    time.sleep(20)
    assert restarts(running) == known
    before = running.do("send", unit=CORE, number=signal.SIGSTOP)
    answer = running.do("infer")
    assert right(answer), answer
    assert running.do("pid_of", unit=CORE) not in (0, before)
    assert restarts(running) == known + 1
    count(hangs=1, watchdog_s=15, answer_s=round(answer["s"], 1))


@pytest.fixture
def little_memory(running: Machine) -> Iterator[int]:
    """A limit that a few seconds of writing reach."""
    usual = show(running, CORE, "MemoryMax")["MemoryMax"]
    command(running, "systemctl", "set-property", "--runtime", CORE, "MemoryMax=300M")
    yield 300
    command(running, "systemctl", "set-property", "--runtime", CORE, f"MemoryMax={usual}")


def test_memory_hog_beside_core(running: Machine, little_memory: int, count: Count) -> None:
    """A child that takes all the memory, as a model under trial may, is killed; core does not even restart."""
    known, pid = restarts(running), running.do("pid_of", unit=CORE)
    ended = running.do("hog", unit=CORE, megabytes=2 * little_memory, score=1000)
    assert ended["rc"] == -signal.SIGKILL, ended
    assert right(running.do("infer"))
    assert (restarts(running), running.do("pid_of", unit=CORE)) == (known, pid)
    events = dict(zip(ended["events"][::2], map(int, ended["events"][1::2]), strict=True))
    assert events["oom_kill"] >= 1
    count(oom_kills=events["oom_kill"], restarts=0)


def test_core_killed_for_memory(running: Machine, little_memory: int, count: Count) -> None:
    """The kernel takes core itself: it is started again, without what took the memory."""
    before = running.do("pid_of", unit=CORE)
    known = restarts(running)
    running.do("hog", unit=CORE, megabytes=2 * little_memory, score=-900)
    answer = running.do("infer")
    assert right(answer), answer
    assert running.do("pid_of", unit=CORE) not in (0, before)
    assert restarts(running) > known
    count(restarts=restarts(running) - known)


def test_link_killed(running: Machine, count: Count) -> None:
    """It comes back by itself; core and the apps do not notice."""
    core = running.do("pid_of", unit=CORE)
    before = running.do("send", unit=LINK, number=signal.SIGKILL)
    assert right(running.do("infer"))
    seconds = running.wait_until(
        "link is back",
        lambda: running.do("pid_of", unit=LINK) not in (0, before) and running.do("states")[1] == "active",
    )
    assert running.do("pid_of", unit=CORE) == core
    count(kills=1, back_s=seconds)


def test_restart_under_load(running: Machine, count: Count) -> None:
    """Eight apps ask all the time, each time on a new connection: none is refused, none fails, they wait."""
    running.do("load", apps=8)
    time.sleep(10)
    command(running, "systemctl", "restart", CORE)
    time.sleep(10)
    seen = running.do("unload")
    assert seen["refused"] == seen["failed"] == 0, seen
    assert seen["answers"] > 16
    count(clients=8, answers=seen["answers"], refused=0, failed=0, gap_s=seen["gap_s"])


# -- the sandbox ------------------------------------------------------------------------------------------------------

SECRETS = (
    "/var/lib/edge-agent", "/var/lib/edge-agent/keys/device-secret", "/etc/credstore.encrypted", "/etc/credstore",
    "/root", "/etc/shadow", "/var/lib/systemd/credential.secret", "/run/credentials/edge-agent-core.service",
)  # fmt: skip
#: Folders in memory of the unit's own, gone with it, and with nothing in them that can be run.
OWN = {"/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"}


def locked_in(seen: dict[str, Any]) -> None:
    status = seen["status"]
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[name][0], 16) == 0, (name, status)
    assert status["NoNewPrivs"] == ["1"] and status["Seccomp"] == ["2"]
    assert seen["uid"] == int(status["Uid"][0]) != 0
    assert seen["strangers"] == [], "processes of others"


def test_sandbox_of_core(running: Machine, count: Count) -> None:
    """From where core stands: no network, no file to write but its own folder's, no secret of the system's."""
    seen = running.do("probe", unit=CORE, paths=list(SECRETS))
    locked_in(seen)
    assert seen["interfaces"] == ["lo"] and seen["reached"] == []
    # No credential is there; a folder of its own for them is.
    own = {"/var/lib/edge-agent", "/var/lib/edge-agent/keys/device-secret", "/run/credentials/edge-agent-core.service"}
    assert set(seen["read"]) <= own
    written = {path for path in seen["written"] if not path.startswith("/var/lib/edge-agent")}
    assert "/var/lib/edge-agent" in seen["written"] and written <= OWN, seen
    count(secrets_tried=len(SECRETS), reached=0, written_elsewhere=len(written - OWN))


def test_sandbox_of_link(running: Machine, count: Count) -> None:
    """From where link stands: no key of core's, no file to write but its own folder's."""
    seen = running.do("probe", unit=LINK, paths=list(SECRETS))
    locked_in(seen)
    assert seen["read"] == []
    written = {path for path in seen["written"] if not path.startswith("/var/lib/edge-agent-link")}
    assert "/var/lib/edge-agent-link" in seen["written"] and written <= OWN, seen
    count(secrets_tried=len(SECRETS), read=0, written_elsewhere=len(written - OWN))


def test_idle(running: Machine, count: Count) -> None:
    """Two minutes in which nobody asks: memory and processor of both units."""
    assert right(running.do("infer"))
    seen = running.do("idle", seconds=120)
    core, link = seen[CORE], seen[LINK]
    assert core["rss_mb"] > 0 and link["rss_mb"] > 0
    count(
        core_rss_mb=core["rss_mb"], core_cpu_percent=core["cpu_percent"],
        link_rss_mb=link["rss_mb"], link_cpu_percent=link["cpu_percent"],
    )  # fmt: skip


# -- the life of an installation --------------------------------------------------------------------------------------


def test_upgrade(shares: Shares, installed: Disk, switch_on: SwitchOn, count: Count) -> None:
    """The next release over the one that runs, under load: no request is lost, and all is there afterwards."""
    kit = shares.make("0.1.1")
    machine = switch_on(kit, installed.copy())
    assert right(machine.do("first_answer"))
    before = machine.do("state")
    assert machine.do("ask", method="GET", target="/v1/status")["json"]["version"] == "0.1.0"
    machine.do("load", apps=4)
    done = install(machine, "0.1.1")
    time.sleep(5)
    seen = machine.do("unload")
    assert seen["refused"] == seen["failed"] == 0, seen
    assert machine.do("ask", method="GET", target="/v1/status")["json"]["version"] == "0.1.1"
    assert right(machine.do("infer"))
    assert machine.do("state") == before != {}
    assert machine.do("states") == ["active"] * 4
    machine.power_off()
    assert right(machine.boot() and machine.do("first_answer")), "also after a boot"
    machine.off()
    count(install_s=done["s"], answers=seen["answers"], refused=0, failed=0, gap_s=seen["gap_s"])


def test_uninstall(kit: Kit, installed: Disk, switch_on: SwitchOn, count: Count) -> None:
    """Removed, it leaves nothing but state, which serves again after the next installation; purged, nothing."""
    machine = switch_on(kit, installed.copy())
    assert right(machine.do("first_answer"))
    before = machine.do("state")
    remove(machine)
    assert machine.do("files") == ["/etc/edge-agent", "/var/lib/edge-agent", "/var/lib/edge-agent-link"]
    assert machine.do("state") == before != {}
    install(machine, "0.1.0")
    assert right(machine.do("infer")), "what was kept"
    remove(machine, purge=True)
    assert machine.do("files") == []
    users = command(machine, "cat", "/etc/passwd", "/etc/group")["out"]
    assert "edge-agent" not in users
    machine.off()
    count(left_by_remove=3, left_by_purge=0)


# -- a TPM ------------------------------------------------------------------------------------------------------------


class Tpm:
    """A TPM in software, which keeps its seeds in a folder; it goes when the machine goes."""

    def __init__(self, folder: Path) -> None:
        self.seeds, self.socket = folder / "seeds", folder / "tpm"
        self.seeds.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            ["swtpm", "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={self.seeds}",
             "--ctrl", f"type=unixio,path={self.socket}"],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            assert time.monotonic() < deadline and self._process.poll() is None, "swtpm does not start"
            time.sleep(0.05)

    def gone(self) -> None:
        """Once the machine is off."""
        if self._process is not None:
            self._process.wait(30)
            self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.gone()

    def clear(self) -> None:
        """As the firmware's menu does: its seeds are new, and what was sealed is lost."""
        for path in self.seeds.iterdir():
            path.unlink()


@pytest.fixture
def tpm(short_dir: Path) -> Iterator[Tpm]:
    if reason := why_not_tpm():
        pytest.skip(reason)
    made = Tpm(short_dir)
    made.start()
    yield made
    made.stop()


def test_tpm(kit: Kit, installed: Disk, switch_on: SwitchOn, tpm: Tpm, count: Count) -> None:
    """A secret that only this TPM opens: it serves over boots, a cleared TPM is told, the old one brings all back."""
    machine = switch_on(kit, installed.copy(), tpm=tpm.socket)
    assert right(machine.do("first_answer"))
    command(machine, "edge-agent", "seal", "--to", "tpm2")
    assert key_place(machine) == "tpm2"
    assert right(machine.do("infer"))
    machine.power_off()
    tpm.gone()

    tpm.start()
    machine.boot()
    assert right(machine.do("first_answer")), "the same TPM opens it at the next boot"
    machine.power_off()
    tpm.gone()

    seeds = {path: path.read_bytes() for path in tpm.seeds.iterdir()}
    tpm.clear()
    tpm.start()
    machine.boot()
    machine.wait_until("core has tried", lambda: restarts(machine) > 0)
    assert machine.do("states")[0] != "active"
    journal = command(machine, "journalctl", "--no-pager", "-u", CORE, "-b")["out"]
    assert "cannot open /etc/credstore.encrypted/device-secret" in journal, journal
    doctor = machine.do("run", command=["edge-agent", "doctor", "--json"])
    assert doctor["rc"] == 1 and "edge-agent seal --start-over" in doctor["out"], doctor
    machine.power_off()
    tpm.gone()

    for path, seed in seeds.items():
        path.write_bytes(seed)
    tpm.start()
    machine.boot()
    assert right(machine.do("first_answer")), "nothing was damaged"
    machine.power_off()
    count(boots=machine.boots, moved="host to tpm2", cleared=1)


def key_place(machine: Machine) -> str:
    place: str = machine.do("ask", method="GET", target="/v1/status")["json"]["key_place"]
    return place
