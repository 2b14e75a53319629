"""A hostile model, played by a child that runs hostile Python inside the same confinement as a real trial."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.infer.landlock import abi_version
from agent.infer.seccomp import program_for

HOSTILE = Path(__file__).with_name("hostile")


@pytest.fixture
def attack(tmp_path):
    """Run one attack of ``hostile/attacks.py`` in a confined child; its answer says what the kernel said."""

    def run(name, **arguments):
        with hostile_child() as child:
            child.greet()
            return child.call(name, 20, **arguments)

    return run


def hostile_child(memory_mb=256, cpu_s=30):
    return ChildProcess(
        {"model": None, "golden": None},
        ChildLimits(memory_mb, start_s=20, cpu_s=cpu_s),
        module="tests.infer.hostile.attacks",
    )


needs_landlock = pytest.mark.skipif(abi_version() == 0, reason="this kernel has no Landlock (only seccomp holds here)")


@needs_landlock
def test_the_key_file_cannot_be_read(attack, tmp_path):
    secret = tmp_path / "device-secret"
    secret.write_bytes(b"x" * 32)
    assert secret.read_bytes() == b"x" * 32  # this very user may read it
    assert attack("read_file", path=str(secret)) == {"refused": "EACCES"}
    assert attack("list_folder", path=str(tmp_path)) == {"refused": "EACCES"}


@needs_landlock
def test_nothing_can_be_written_or_made(attack, tmp_path):
    assert attack("write_file", path=str(tmp_path / "new"))["refused"] in ("EACCES", "EFBIG")
    assert attack("write_file", path="/tmp/edge-agent-escape")["refused"] in ("EACCES", "EFBIG")
    assert not Path("/tmp/edge-agent-escape").exists()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK])
def test_no_socket_of_any_family_can_be_opened(attack, family):
    assert attack("open_socket", family=int(family)) == {"refused": "EPERM"}


def test_no_program_and_no_process_can_be_started(attack):
    assert attack("start_program") == {"refused": "EPERM"}
    assert attack("fork") == {"refused": "EPERM"}


def test_the_daemon_can_be_neither_attached_to_nor_read_nor_killed(attack):
    daemon = os.getpid()
    assert attack("ptrace", pid=daemon) == {"refused": "EPERM"}
    assert attack("read_memory", pid=daemon)["refused"] in ("EPERM", "EACCES")
    assert attack("signal", pid=daemon) == {"refused": "EPERM"}
    assert attack("environment", pid=daemon)["refused"] in ("EPERM", "EACCES", "ENOENT")


def test_threads_still_work_since_runtimes_need_them(attack):
    assert attack("thread") == {"done": 42}


def test_the_environment_of_the_daemon_is_not_inherited(attack, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/secret")
    assert "CREDENTIALS_DIRECTORY" not in attack("own_environment")["names"]


def test_no_descriptor_leaks_into_the_child(attack, tmp_path):
    with (tmp_path / "secret").open("w+b") as stream:
        os.set_inheritable(stream.fileno(), True)
        names = attack("open_descriptors")["targets"]
    assert not any("secret" in name for name in names), names


def test_eating_memory_ends_the_child_and_says_memory():
    with hostile_child(memory_mb=64) as child:
        child.greet()
        with pytest.raises(ChildError) as caught:
            child.call("eat_memory", 30)
    assert caught.value.kind == "memory"


def test_a_hang_ends_at_its_deadline_and_says_hung():
    with hostile_child() as child:
        child.greet()
        with pytest.raises(ChildError, match="no answer to 'hang' within 1 s") as caught:
            child.call("hang", 1)
    assert caught.value.kind == "hung"


def test_a_crash_names_its_signal():
    with hostile_child() as child:
        child.greet()
        with pytest.raises(ChildError, match="SIGSEGV") as caught:
            child.call("crash", 20)
    assert caught.value.kind == "crashed"


@pytest.mark.parametrize("what", ["garbage", "endless"])
def test_lies_on_the_control_socket_are_a_crash(what):
    with hostile_child() as child:
        child.greet()
        with pytest.raises(ChildError) as caught:
            child.call(what, 20)
    assert caught.value.kind == "crashed"


def test_the_filter_is_a_valid_program_for_every_architecture():
    for column, audit in ((0, 0xC000003E), (1, 0xC00000B7), (2, 0x40000028)):
        program = program_for(column, audit, 1234)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096  # BPF_MAXINSNS
        for index in range(0, len(program), 8):
            code, if_true, if_false = (
                int.from_bytes(program[index : index + 2], "little"),
                program[index + 2],
                program[index + 3],
            )
            if code & 0x07 == 0x05:  # every jump lands inside
                assert index // 8 + 1 + max(if_true, if_false) < len(program) // 8


def test_a_child_that_cannot_start_is_a_clear_error():
    nobody = {"model": None, "golden": None}
    child = ChildProcess(nobody, ChildLimits(64, start_s=20), module="tests.infer.no_such")
    with child, pytest.raises(ChildError, match="ModuleNotFoundError"):
        child.greet()
