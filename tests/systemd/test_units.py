"""The units, judged by systemd's own tools and against the code that they start. No systemd needs to run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.base.config import Config
from agent.base.paths import Paths
from agent.cli.credstore import FOLDER
from agent.store.seals import MARKS, read_marks
from agent.updater.ground import Ground
from tests.systemd.conftest import UNITS, Unit

CORE = "edge-agent-core.service"
SOCKETS = ("edge-agent-infer.socket", "edge-agent-admin.socket")
LINK = "edge-agent-link.service"
REBOOT = ("edge-agent-reboot.path", "edge-agent-reboot.service")
DEVICE = "edge-agent-device.service"
SEAL = "edge-agent-seal.service"
UPDATE = ("edge-agent-update.path", "edge-agent-update.service")
TRY = "edge-agent-try.service"
ALL = (CORE, LINK, *SOCKETS, *REBOOT, DEVICE, SEAL, *UPDATE, TRY, "edge-agent.target", "edgeagent.slice")
BUDGET = 0.6
LINK_BUDGET = 1.3
#: It is root, and writes below /etc and /opt.
UPDATER_BUDGET = 1.6

analyzed = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
Read = Callable[[str], Unit]


def verify(machine: Path) -> str:
    """Everything that ``systemd-analyze verify`` complains about; its exit status does not tell all of it."""
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--root={machine}", "--man=no", *ALL],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    _skip_without_its_folder(done.stdout)
    return done.stdout + (f"exit status {done.returncode}" if done.returncode else "")


def _skip_without_its_folder(output: str) -> None:
    if "Failed to create directory '/run/systemd" in output:
        pytest.skip("systemd-analyze wants to make /run/systemd, which takes root where systemd does not run")


def exposure(path: Path) -> tuple[float, str]:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if "unrecognized option" in done.stdout:
        pytest.skip("this systemd-analyze judges no files (it came with 250)")
    _skip_without_its_folder(done.stdout)
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1]), done.stdout


# -- by systemd's tools -----------------------------------------------------------------------------------------------


@analyzed
def test_systemd_finds_nothing_wrong(machine: Path) -> None:
    assert verify(machine) == ""


@analyzed
@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        (r"PrivateNetwork=yes", "PrivateNetwork=maybe", "maybe"),
        (r"StateDirectory=", "StateDirektory=", "StateDirektory"),
        (r"edge-agent-infer\.socket", "edge-agent-inference.socket", "edge-agent-inference.socket"),
        (r"bin/edge-agent core", "bin/edge-agend core", "edge-agend"),
    ],
)
def test_and_would_find_it_if_there_were(machine: Path, pattern: str, replacement: str, complaint: str) -> None:
    path = machine / "etc/systemd/system" / CORE
    text, changed = re.subn(pattern, replacement, path.read_text())
    assert changed
    path.write_text(text)
    assert complaint in verify(machine)


@analyzed
def test_core_is_exposed_no_more_than_agreed() -> None:
    level, table = exposure(UNITS / CORE)
    assert level <= BUDGET, table


@analyzed
@pytest.mark.parametrize(("name", "budget"), [(UPDATE[1], UPDATER_BUDGET), (TRY, BUDGET)])
def test_the_exposure_of_the_updater_and_of_its_trial_is_within_their_budgets(name: str, budget: float) -> None:
    level, table = exposure(UNITS / name)
    assert level <= budget, table


@analyzed
def test_the_exposure_of_link_is_within_its_budget(machine: Path) -> None:
    level, table = exposure(machine / "etc/systemd/system" / LINK)
    assert level <= LINK_BUDGET, table


@analyzed
def test_the_exposure_rises_when_a_wall_is_taken_down(machine: Path) -> None:
    path = machine / "etc/systemd/system" / CORE
    path.write_text(
        path.read_text().replace("PrivateNetwork=yes\n", "").replace("RestrictAddressFamilies=AF_UNIX\n", "")
    )
    assert exposure(path)[0] > BUDGET


# -- against the code -------------------------------------------------------------------------------------------------


def test_link_has_the_folder_and_the_user_that_core_knows(unit: Read) -> None:
    link = unit(LINK)
    assert link["User"] == [Config().sockets.link_user]
    assert [f"/var/lib/{name}" for name in link["StateDirectory"]] == [str(Paths().link_dir)]


def test_the_reboot_that_core_asks_for_is_seen(unit: Read) -> None:
    path, service = (unit(name) for name in REBOOT)
    assert path["PathExists"] == [str(Paths().state_dir / "reboot-requested")]
    assert service["ExecStart"][0].endswith(path["PathExists"][0]), "taken away before the machine goes down"


def test_the_update_that_core_asks_for_is_seen_and_one_under_way_again_after_a_power_cut(unit: Read) -> None:
    path, service = (unit(name) for name in UPDATE)
    ground = Ground(Path("/"))
    assert path["PathChanged"] == [str(Paths().update / "request.json")]
    assert Paths().update.parent == ground.state_dir
    assert path["PathExists"] == [str(ground.own / "pending")]
    assert "readlink -f /opt/edge-agent/steady" in service["ExecStart"][0], "never what is on probation"
    assert service["StartLimitIntervalSec"] == ["0"], "what is under way is brought to an end"
    assert UPDATE[0] in " ".join(unit("edge-agent.target")["Wants"]).split()


def test_the_updater_sees_no_key_and_no_network(unit: Read) -> None:
    service = unit(UPDATE[1])
    hidden = " ".join(service["InaccessiblePaths"]).replace("-/", "/").split()
    for path in (
        Paths().device_secret.parent,
        Paths().state_dir / "store",
        Paths().link_dir,
        "/etc/credstore.encrypted",
    ):
        assert str(path) in hidden
    assert not any(path.startswith("/var") for path in " ".join(service["ReadWritePaths"]).split())
    assert service["PrivateNetwork"] == ["yes"] and service["RestrictAddressFamilies"] == ["AF_UNIX"]


def test_a_release_is_tried_behind_cores_own_walls(unit: Read) -> None:
    """Whatever the trial may do, core may: and less, since it has nothing that it could write to."""
    core, trial = unit(CORE), unit(TRY)
    own = {
        "Description", "Type", "ExecStart", "StandardError", "TimeoutStartSec", "KillMode", "CPUWeight", "IOWeight",
        "Nice", "OOMScoreAdjust",
    }  # fmt: skip
    cores = {
        "Description", "Type", "ExecStart", "ExecStartPre", "ExecStopPost", "ExecReload", "Requires", "After", "PartOf",
        "NotifyAccess", "StartLimitIntervalSec", "StartLimitBurst", "Restart", "RestartSec", "TimeoutStartSec",
        "TimeoutStopSec", "KillMode", "WatchdogSec", "StateDirectory", "StateDirectoryMode", "CPUWeight", "IOWeight",
    }  # fmt: skip
    assert {key: value for key, value in trial.items() if key not in own} == {
        key: value for key, value in core.items() if key not in cores
    }


def test_sockets_have_the_names_and_places_that_core_knows(unit: Read) -> None:
    infer, admin = (unit(name) for name in SOCKETS)
    assert infer["FileDescriptorName"] == ["infer"]
    assert admin["FileDescriptorName"] == ["admin"]
    assert infer["ListenStream"] == [str(Paths().infer_socket)]
    assert admin["ListenStream"] == [str(Paths().admin_socket)]
    for socket in (infer, admin):
        assert socket["Service"] == [CORE]
        assert socket["SocketMode"] == ["0660"]
        assert socket["SocketUser"] == ["root"]


def test_every_account_that_a_unit_names_is_created(unit: Read) -> None:
    rows = [
        line.split() for line in (UNITS / "edge-agent.sysusers").read_text().splitlines() if line[:2] in ("u ", "g ")
    ]
    users = {name for kind, name, *_ in rows if kind == "u"}
    groups = {name for _, name, *_ in rows}  # a user brings a group of its name
    core, infer, admin = unit(CORE), *(unit(name) for name in SOCKETS)
    assert {*core["User"], Config().sockets.link_user} <= users
    assert {*core["Group"], *infer["SocketGroup"], *admin["SocketGroup"]} <= groups
    # The apps' group is nobody's own: being in it must give no right but to connect.
    assert not set(infer["SocketGroup"]) & users
    assert admin["SocketGroup"] == [Config().sockets.link_user]


def test_state_is_where_core_looks_and_the_run_folder_survives_core(unit: Read) -> None:
    core = unit(CORE)
    assert [f"/var/lib/{name}" for name in core["StateDirectory"]] == [str(Paths().state_dir)]
    assert core["StateDirectoryMode"] == ["0700"]
    assert "RuntimeDirectory" not in core
    assert f"d {Paths().run_dir} " in re.sub(" +", " ", (UNITS / "edge-agent.tmpfiles").read_text())
    assert str(Paths().state_dir) in core["NoExecPaths"][0].split()


def test_times_fit_together(unit: Read) -> None:
    core = unit(CORE)
    (stop,) = core["TimeoutStopSec"]
    assert int(stop) >= Config().server.drain_s + 10, "a drain must end before systemd kills"
    (interval,), (burst,), (pause,) = core["StartLimitIntervalSec"], core["StartLimitBurst"], core["RestartSec"]
    assert int(burst) * int(pause) > int(interval), "restarts at their own pace must never end for good"


def test_nothing_newer_than_systemd_252_is_needed(unit: Read) -> None:
    core = unit(CORE)
    assert core["Type"] == ["notify"]
    assert "@sandbox" not in " ".join(core["SystemCallFilter"])
    # Ids without a path: only then a missing credential is no error.
    assert core["LoadCredentialEncrypted"] == ["device-secret", "device-secret-next"]


# -- the credential's guard -------------------------------------------------------------------------------------------


def guard(unit: Read, store: Path) -> subprocess.CompletedProcess[str]:
    """Run the guard as systemd would, with ``store`` in place of /etc."""
    (line,) = unit(CORE)["ExecStartPre"]
    script = line.removeprefix("+/bin/sh -c ").strip("'").replace("$$", "$").replace("/etc/", f"{store}/")
    script = script.replace("/run/edge-agent/", f"{store}/")
    return subprocess.run(["/bin/sh", "-c", script], stderr=subprocess.PIPE, text=True, check=False)


def test_no_credential_at_all_lets_core_start(unit: Read, tmp_path: Path) -> None:
    assert guard(unit, tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["device-secret", "device-secret-next"])
def test_a_credential_sealed_with_an_empty_key_stops_the_start(unit: Read, tmp_path: Path, name: str) -> None:
    if not shutil.which("systemd-creds"):
        pytest.skip("systemd-creds is not installed")
    store = tmp_path / "credstore.encrypted"
    store.mkdir()
    sealed = subprocess.run(
        ["systemd-creds", "encrypt", "--with-key=tpm2-absent", f"--name={name}", "-", str(store / name)],
        input=os.urandom(32), stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if sealed.returncode:
        pytest.skip(f"systemd-creds will not seal with an empty key here: {sealed.stderr.decode().strip()}")
    refused = guard(unit, tmp_path)
    assert refused.returncode == 1
    assert f"cannot use {store / name}: it is sealed with an empty key" in refused.stderr
    assert not (tmp_path / MARKS).exists()
    (store / name).write_text("k6iUCUh0RJCQyvL8k8q1UyAAAAABAAAADAAAABAAAAA=")  # another type of key
    assert guard(unit, tmp_path).returncode == 0
    assert read_marks(tmp_path) == {name: "tpm2"}


def test_core_is_told_what_its_credentials_are_sealed_with(unit: Read, tmp_path: Path) -> None:
    store = tmp_path / "credstore.encrypted"
    store.mkdir()
    assert guard(unit, tmp_path).returncode == 0
    assert read_marks(tmp_path) == {}
    (store / "device-secret-next").write_text("DHzAexF2RZGc\nSwvqCLwg/iAAAAABAAAADAAAABAAAAA=")
    (store / "device-secret").write_text("Whxqht+dQJax1aZeCGLxmgAAAAABAAAADAAAABAAAAA=")
    assert guard(unit, tmp_path).returncode == 0
    assert read_marks(tmp_path) == {"device-secret": "host", "device-secret-next": "tpm2"}
    assert (tmp_path / MARKS).stat().st_mode & 0o777 == 0o644, "core may read it"


def test_the_first_start_seals_only_where_there_is_nothing_yet(unit: Read) -> None:
    seal = unit(SEAL)
    paths = Paths()
    for path in (paths.state_dir / "store" / "CURRENT", paths.device_secret, Path("/", FOLDER, "device-secret")):
        assert f"!{path}" in seal["ConditionPathExists"]
    assert seal["Before"] == [CORE]
    assert SEAL in " ".join(unit("edge-agent.target")["Wants"])
    assert f"d /{FOLDER} 0700 root root -" in re.sub(" +", " ", (UNITS / "edge-agent.tmpfiles").read_text())


# -- what the sandbox must leave possible -----------------------------------------------------------------------------


def test_onnx_runtime_works_where_memory_is_never_both_writable_and_executable() -> None:
    """MemoryDenyWriteExecute=, by the kernel's own switch of the same meaning (PR_SET_MDWE of prctl(2), Linux 6.3)."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    script = """
import ctypes, mmap, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    sys.exit(77)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except OSError:
    pass
else:
    sys.exit("the switch has no effect")
import numpy, onnx, onnxruntime
from onnx import TensorProto, helper
weights = numpy.random.default_rng(1).random((8, 3, 3, 3), dtype=numpy.float32)
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 30, 30])],
    [onnx.numpy_helper.from_array(weights, "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
assert session.run(None, {"x": numpy.ones((1, 3, 32, 32), numpy.float32)})[0].shape == (1, 8, 30, 30)
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE (it came with 6.3)")
    assert done.returncode == 0, done.stderr
