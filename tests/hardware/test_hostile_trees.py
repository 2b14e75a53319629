"""Trees made to break detection or to reach out of it: it stays inside, stays quick, and says what was wrong."""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.hardware.document import describe, document
from agent.hardware.probe import probe
from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir
from agent.hardware.sensors import read_sensors
from agent.hardware.tree import Tree
from tests.hardware.sysroot import A53, A76, arm_board, build, cpuinfo

PROFILES, _ = load_profiles([shipped_profiles_dir()])
BOARD = arm_board("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712", cores=(A76,) * 4) | {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "45000\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "110000\n",
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x1e60\n",
    "sys/bus/pci/devices/0000:01:00.0/device": "0x2864\n",
    "cmd/vcgencmd_get_throttled.txt": "throttled=0x0\n",
    "etc/os-release": 'PRETTY_NAME="Debian"\n',
}


def whole(root: Path) -> str:
    """All that detection does with a tree, as text."""
    facts = probe(root)
    found = document(facts, choose_profile(facts, PROFILES))
    read_sensors(root)
    return json.dumps(found, allow_nan=False) + describe(found)


def test_links_out_of_the_root_lead_to_the_roots_own_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("The outside")
    root = build(tmp_path / "root", BOARD)
    for name in ("proc/device-tree/model", "cmd/uname_r.txt", "etc/os-release"):
        (root / name).unlink(missing_ok=True)
    (root / "proc/device-tree/model").symlink_to(secret)
    (root / "cmd/uname_r.txt").symlink_to("../../../../../../../../.." + str(secret))
    (root / "etc/os-release").symlink_to("/etc/passwd")
    (root / "sys/class/dmi").symlink_to(tmp_path)
    text = whole(root)
    assert "outside" not in text
    assert "root:" not in text
    assert Tree(root).read("etc/os-release") is None
    # What the link would have meant on the recorded machine is read.
    build(root, {"etc/passwd": 'PRETTY_NAME="Own"\n'})
    assert probe(root).os == "Own"


def test_dot_dot_in_a_link_stops_at_the_root(tmp_path: Path) -> None:
    root = build(tmp_path / "root", {"etc/x": "inside"})
    (tmp_path / "x").write_text("outside")
    (root / "y").symlink_to("../../../x")
    (root / "z").symlink_to("../../../etc/x")
    tree = Tree(root)
    assert tree.text("y") is None
    assert tree.text("z") == "inside"


def test_loops_of_links_end(tmp_path: Path) -> None:
    root = build(tmp_path, BOARD)
    (root / "proc/cpuinfo").unlink()
    (root / "proc/cpuinfo").symlink_to("other")
    (root / "proc/other").symlink_to("cpuinfo")
    (root / "sys/devices/system/loop").symlink_to("../system/loop/../loop")
    facts = probe(root)
    assert facts.board == "Raspberry Pi 5 Model B"
    assert facts.features["dotprod"] is None
    assert any(note.startswith("proc/cpuinfo: cannot be read") for note in facts.notes)


def test_a_folder_a_fifo_and_a_socket_in_place_of_files(tmp_path: Path) -> None:
    root = build(tmp_path, BOARD)
    for name in ("proc/cpuinfo", "proc/meminfo", "sys/devices/system/cpu/online"):
        (root / name).unlink()
    (root / "proc/cpuinfo").mkdir()
    os.mkfifo(root / "proc/meminfo")
    before = Path.cwd()
    os.chdir(root / "sys/devices/system/cpu")  # a socket's path is short
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("online")
    finally:
        os.chdir(before)
    with listener:
        facts = probe(root)
    assert (facts.mem_total_mb, facts.cores_online, facts.core_types) == (None, None, None)
    assert {note.split(":")[0] for note in facts.notes} == {
        "proc/cpuinfo",
        "proc/meminfo",
        "sys/devices/system/cpu/online",
    }


def test_files_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own folder, which others may not enter
        os.chmod(folder, 0o755)
        root = build(Path(folder) / "root", BOARD)
        (root / "proc/meminfo").chmod(0)
        (root / "sys/class/thermal").chmod(0)
        user = os.geteuid()
        if user == 0:  # root reads everything
            os.seteuid(65534)
        try:
            facts = probe(root)
        finally:
            os.seteuid(user)
            (root / "sys/class/thermal").chmod(0o755)
    assert facts.mem_total_mb is None
    assert facts.thermal_zones == ()
    assert {"proc/meminfo", "sys/class/thermal"} <= {note.split(":")[0] for note in facts.notes}


def test_a_hundred_megabytes_are_not_read(tmp_path: Path) -> None:
    root = build(tmp_path, BOARD)
    with (root / "proc/cpuinfo").open("ab") as stream:
        stream.truncate(100 << 20)  # sparse: a hole reads as NUL bytes
    with (root / "proc/device-tree/model").open("ab") as stream:
        stream.truncate(100 << 20)
    facts = probe(root)
    assert facts.core_types == (("Cortex-A76", 4),)
    assert facts.board == "Raspberry Pi 5 Model B"
    assert sum("longer than" in note for note in facts.notes) == 2


def test_thousands_of_processors_and_entries(tmp_path: Path) -> None:
    root = build(tmp_path, BOARD | {"proc/cpuinfo": cpuinfo([A76] * 4096)})
    for number in range(3000):
        (root / f"sys/class/thermal/thermal_zone{number + 1}").mkdir()
    facts = probe(root)
    assert facts.cores_online == 4
    assert facts.core_types == (("Cortex-A76", 4),)
    assert len(facts.thermal_zones) <= 64


def test_names_that_are_no_text_are_passed_over(tmp_path: Path) -> None:
    root = build(tmp_path, BOARD)
    os.mkdir(os.fsencode(root / "sys/class/thermal") + b"/thermal_zone\xff\xfe")
    os.mkdir(os.fsencode(root / "sys/bus/pci/devices") + b"/\x1b[31m")
    whole(root)


GARBAGE = [b"", b"\0" * 5000, b"\xff\xfe\x00garbage", b"-1\n", b"99999999999999999999999\n", "٣٤\n".encode(), b"\n\n\n"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_any_one_file(tmp_path: Path, garbage: bytes) -> None:
    for index, name in enumerate(BOARD):
        whole(build(tmp_path / str(index), BOARD | {name: garbage}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_trees_shot_to_pieces(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Files cut, mixed up, replaced by folders or links: an answer always, and never a lie about a feature."""
    chance = random.Random(seed)
    root = build(tmp_path_factory.mktemp("tree"), BOARD)
    for name in BOARD:
        path = root / name
        fate = chance.randrange(8)
        if fate == 0:
            path.write_bytes(path.read_bytes()[: chance.randrange(60)])
        elif fate == 1:
            path.write_bytes(chance.randbytes(chance.randrange(300)))
        elif fate == 2:
            path.unlink()
            path.symlink_to(chance.choice(list(BOARD)))
        elif fate == 3:
            path.unlink()
            path.mkdir()
    whole(root)
    features = probe(root).features
    assert features["i8mm"] is not True
    assert features["avx2"] in {False, None}


def test_a_cut_file_of_a_small_core_does_not_invent_dotprod(tmp_path: Path) -> None:
    text = cpuinfo([A53] * 4)
    facts = probe(build(tmp_path, BOARD | {"proc/cpuinfo": text[: len(text) // 2]}))
    assert facts.features["dotprod"] is False
    assert facts.features["neon"] is True
