"""The real units, started by a real systemd, with the real core in their sandbox.

The container boots from this machine's own ``/usr`` with fresh ``/etc`` and ``/var`` in memory, so that it needs
neither an image nor a network, and takes seconds. What happens inside is in ``booted.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agent.cli.credstore import file_system
from agent.infer.landlock import abi_version
from tests import onnx_models, tflite_models
from tests.systemd.booted import TPM

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
PLACES = {
    ".service": "/etc/systemd/system/{name}",
    ".socket": "/etc/systemd/system/{name}",
    ".target": "/etc/systemd/system/{name}",
    ".path": "/etc/systemd/system/{name}",
    ".slice": "/etc/systemd/system/{name}",
    ".sysusers": "/etc/sysusers.d/edge-agent.conf",
    ".tmpfiles": "/etc/tmpfiles.d/edge-agent.conf",
}
AGENT = """#!/opt/edge-agent/current/bin/python
import sys
from agent.cli.device import main
sys.exit(main())
"""
STORY = """[Unit]
Wants=edge-agent.target
After=edge-agent.target edge-agent-core.service
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /opt/edge-agent/out/booted.py {story}
ExecStopPost=systemctl --no-block poweroff
"""
#: nspawn's own filter is older than Landlock, and keeps containers from locking memory.
FILTER = "landlock_create_ruleset landlock_add_rule landlock_restrict_self @memlock"

pytestmark = pytest.mark.slow


def _why_not() -> str:
    if os.geteuid() != 0:
        return "booting a container needs root"
    if not shutil.which("systemd-nspawn"):
        return "systemd-nspawn is not installed (package systemd-container)"
    if not Path("/usr/lib/systemd/systemd").exists() and not Path("/lib/systemd/systemd").exists():
        return "no systemd to boot"
    if "/site-packages" not in sysconfig.get_paths()["purelib"] or sys.prefix == sys.base_prefix:
        return "the packages are not in a virtual environment"
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    ).stdout.split() if Path("/usr/bin/python3").exists() else []  # fmt: skip
    if version != [str(part) for part in sys.version_info[:2]]:
        return f"the packages are for Python {sys.version_info[0]}.{sys.version_info[1]}, not for /usr/bin/python3"
    return ""


@pytest.fixture
def boot(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Boot, let the story of that name happen, power off; what it saw."""
    if reason := _why_not():
        pytest.skip(reason)
    installed, out = tmp_path / "opt", tmp_path / "opt" / "out"
    _install(installed)
    (out / "linear.onnx").write_bytes(onnx_models.linear())
    (out / "lite.tflite").write_bytes(tflite_models.linear())
    shutil.copy(Path(__file__).with_name("booted.py"), out)
    # Core runs as another user there: whatever our umask is, it must be able to read its program.
    subprocess.run(["chmod", "-R", "a+rX", str(installed)], check=True)

    def start(story: str, *options: str) -> dict[str, Any]:
        (tmp_path / "story.service").write_text(STORY.format(story=story))
        console = _boot(tmp_path, *options)
        result = out / "result.json"
        if not result.exists():
            if "systemd" not in console[:4000] or "Welcome to" not in console:
                pytest.skip(f"systemd-nspawn cannot boot here: {console[-300:]}")
            pytest.fail(f"the story did not come to its end:\n{console}")
        seen: dict[str, Any] = json.loads(result.read_text())
        return seen

    return start


def _install(prefix: Path) -> None:
    """An environment as in /opt/edge-agent: the system's Python, this checkout's agent, the packages that we run on."""
    library = prefix / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for folder in (library, prefix / "bin", prefix / "packages/site-packages", prefix / "out"):
        folder.mkdir(parents=True)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (prefix / "bin/python").symlink_to("/usr/bin/python3")
    (prefix / "bin/edge-agent").write_text(AGENT)
    (prefix / "bin/edge-agent").chmod(0o755)
    # A path file and no link: hooks of an editable install in there must not lead back to the checkout.
    (library / "story.pth").write_text("/opt/edge-agent/src\n/opt/edge-agent/packages/site-packages\n")
    (prefix / "current").symlink_to(".")
    shutil.copytree(ROOT / "agent", prefix / "src/agent", ignore=shutil.ignore_patterns("__pycache__"))


def _boot(tmp_path: Path, *options: str) -> str:
    binds = [f"--bind-ro={path}:{PLACES[path.suffix].format(name=path.name)}" for path in UNITS.iterdir()]
    binds += [
        f"--bind-ro={tmp_path / 'opt'}:/opt/edge-agent",
        f"--bind-ro={sysconfig.get_paths()['purelib']}:/opt/edge-agent/packages/site-packages",
        f"--bind={tmp_path / 'opt/out'}:/opt/edge-agent/out",
        f"--bind-ro={tmp_path / 'story.service'}:/etc/systemd/system/story.service",
        # It would ask for a key press at a first boot, which every boot of an empty /etc is.
        "--bind-ro=/dev/null:/etc/systemd/system/systemd-firstboot.service",
    ]
    command = [
        "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", f"--machine=ea-{os.getpid()}",
        "--register=no", "--keep-unit", "--private-network", f"--system-call-filter={FILTER}",
        *binds, *options, "--boot", "--", "--unit=story.service",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            console, _ = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            process.kill()
            console, _ = process.communicate()
    return console.decode(errors="replace")


def test_core_tries_stores_and_answers_inside_its_sandbox(boot: Callable[[str], dict[str, Any]]) -> None:
    seen = boot("serving")
    assert seen["ready"] == 200, seen["journal"]
    assert seen["added"]["rc"] == 0, (seen["added"], seen["journal"])
    status, answer = seen["answer"]
    assert status == 200, (answer, seen["journal"])
    assert answer["outputs"][0]["shape"] == [1, 4]
    # The trial child came through the same sandbox, confined on top of it: nothing was missing for that.
    findings = seen["doctor"]["json"]["findings"]
    levels = {finding["check"]: finding["level"] for finding in findings}
    assert "ok" in [finding["level"] for finding in findings if finding["check"] == "runtime"]
    if find_spec("ai_edge_litert") is not None:  # TFLite's threads, maps and reading of the processor's features
        assert seen["tflite added"]["rc"] == 0, (seen["tflite added"], seen["journal"])
        status, lite = seen["tflite answer"]
        assert status == 200, (lite, seen["journal"])
        assert lite["outputs"][0]["data"] == pytest.approx(answer["outputs"][0]["data"], rel=1e-4)
    assert (levels["landlock"] == "ok") == (abi_version() > 0)
    # Who may connect, and to what.
    assert seen["app infers"][0] == 200
    assert seen["app administers"] == "PermissionError"
    assert seen["stranger infers"] == "PermissionError"
    # A restart that nobody notices, a reload that holds at once, a stop that is clean.
    assert seen["answer during restart"][1]["outputs"] == answer["outputs"]
    assert seen["sockets kept"]
    assert seen["reload"]["rc"] == 0, seen["reload"]
    assert seen["app infers after denial"][0] == 403
    assert seen["root infers after denial"] == 200
    assert seen["result"].strip() == "success"
    # Nothing that another user could read, nothing of the runtime's own making.
    assert seen["uid"] != 0
    for path, mode, uid in seen["files"]:
        assert mode in {"0o600", "0o700", "0o400"}, path
        assert uid == seen["uid"], path
        assert ".cache" not in path


def test_a_sealed_secret_is_used_and_one_sealed_with_nothing_refused(boot: Callable[[str], dict[str, Any]]) -> None:
    seen = boot("sealed")
    if seen["seal"]["rc"]:
        pytest.skip(f"systemd-creds cannot seal here: {seen['seal']['err']}")
    assert seen["start"]["rc"] == 0, seen["journal"]
    assert seen["status"]["json"]["key_source"] == "credential"
    assert not [path for path, _, _ in seen["files"] if "device-secret" in path], "no copy of it on the disk"
    assert seen["start with nothing"]["rc"] != 0
    assert "sealed with an empty key" in seen["journal"]


def test_the_secret_moves_between_tpm_host_key_and_file_and_a_cleared_tpm_has_a_way_back(
    boot: Callable[..., dict[str, Any]],
) -> None:
    for tool in ("swtpm", "swtpm_ioctl"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (packages swtpm, swtpm-tools, tpm2-tools, libtss2-tcti-swtpm0)")
    # The service manager opens credentials before core's own namespace begins: it reaches the TPM of the container.
    seen = boot("moved", f"--setenv=SYSTEMD_TPM2_DEVICE={TPM}")
    assert seen["tpm"]["rc"] == 0, seen["tpm"]
    assert seen["added"]["rc"] == 0, (seen["added"], seen["journal"])
    if "TPM2 support not available" in str(seen["seal tpm2"]["err"]):
        pytest.skip(f"systemd-creds has no TPM libraries here: {seen['seal tpm2']['err']}")
    begun = seen["begun"]
    assert (begun["place"], begun["secrets beside the store"]) == ("file", ["device-secret"])
    assert seen["foreseen"]["json"]["done"] is False and seen["after the dry run"] == begun
    ways = (
        ("tpm2", "tpm2"), ("again", "tpm2"), ("host", "host"), ("file", "file"), ("tpm2 once more", "tpm2"),
        ("anew", "tpm2"),
    )  # fmt: skip
    for step, place in ways:
        assert seen[f"seal {step}"]["rc"] == 0, (step, seen[f"seal {step}"], seen["journal"])
        placed = seen[f"placed {step}"]
        assert (placed["start"], placed["place"], placed["answer"]) == (0, place, 200), (step, placed, seen["journal"])
        assert placed["payloads"] == begun["payloads"], "payloads are the same files"
        assert placed["credentials"] == ([] if place == "file" else ["device-secret"])
        assert placed["secrets beside the store"] == (["device-secret"] if place == "file" else [])
        assert placed["mode"] == "0o700"
    assert seen["seal tpm2"]["json"]["moves"] == seen["foreseen"]["json"]["moves"]
    assert seen["seal again"]["json"]["moves"] == []
    assert seen["refused"]["rc"] == 1 and "nothing is lost" in str(seen["refused"]["err"])
    # The TPM has forgotten: core does not start, and says why and what mends it.
    assert seen["start without"]["rc"] != 0
    assert "cannot open /etc/credstore.encrypted/device-secret" in seen["journal of the loss"]
    lost = [row for row in seen["doctor of the loss"]["json"]["findings"] if row["check"] == "credential"]
    assert lost[0]["level"] == "error" and "--start-over" in lost[0]["mend"], seen["doctor of the loss"]
    assert "--start-over" in str(seen["seal without"]["err"])
    # The way back: a store of its own, the old one aside, the same model added again.
    assert seen["start over"]["rc"] == 0, (seen["start over"], seen["journal"])
    assert (seen["after"]["start"], seen["after"]["place"]) == (0, "host")
    assert seen["after"]["credentials"] == ["device-secret", "lost-device-secret"]
    assert "store.lost" in seen["aside"] and "store" in seen["aside"]
    assert seen["added again"]["rc"] == 0 and seen["answer again"] == 200


def test_the_first_start_seals_the_secret_and_an_ordinary_user_is_told_what_he_may_not_see(
    boot: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("credstore", "systemd"):
        (tmp_path / name).mkdir(mode=0o700 if name == "credstore" else 0o755)
    if file_system(str(tmp_path), Path("/proc/self/mountinfo").read_text()) in ("tmpfs", "overlay"):
        pytest.skip(f"nothing on {tmp_path} would be there after a reboot, so that nothing is sealed")
    seen = boot(
        "first",
        f"--bind={tmp_path / 'credstore'}:/etc/credstore.encrypted",
        f"--bind={tmp_path / 'systemd'}:/var/lib/systemd",
    )
    if "cannot seal with host" in seen["words"]:
        pytest.skip(f"systemd-creds cannot seal here: {seen['words']}")
    assert seen["unit"].strip() == "success", seen["words"]
    assert seen["status"]["key_place"] == "host", (seen["words"], seen["journal"])
    assert (seen["mode"], seen["beside the store"]) == ("0o600", [])
    assert seen["again"]["rc"] == 0 and seen["as it was"]
    assert {row["level"] for row in seen["doctor"]["json"]["findings"]} <= {"ok", "note"}, seen["doctor"]["out"]
    told = {row["check"]: row for row in seen["doctor of a user"]["json"]["findings"]}
    assert seen["doctor of a user"]["rc"] == 0
    assert told["core"]["mend"] == told["credential"]["mend"] == "run doctor as root"
    assert {row["level"] for row in told.values()} <= {"ok", "note"}, told
