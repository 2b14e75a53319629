"""A hostile model, played by a child that runs hostile Python inside the same confinement as a real trial."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import socket
import time
from pathlib import Path

import pytest

from agent.infer import seccomp
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


def hostile_child(memory_mb=256, cpu_s=30, given=None, file_bytes=0):
    return ChildProcess(
        {"model": None, "golden": None, "given": given},
        ChildLimits(memory_mb, start_s=20, cpu_s=cpu_s),
        module="tests.infer.hostile.attacks",
        file_bytes=file_bytes,
    )


needs_landlock = pytest.mark.skipif(abi_version() == 0, reason="this kernel has no Landlock (only seccomp holds here)")


@needs_landlock
def test_the_key_file_cannot_be_read(attack, tmp_path):
    secret = tmp_path / "device-secret"
    secret.write_bytes(b"x" * 32)
    assert secret.read_bytes() == b"x" * 32  # this very user may read it
    assert attack("read_file", path=str(secret)) == {"refused": "EACCES"}
    assert attack("list_folder", path=str(tmp_path)) == {"refused": "EACCES"}


def test_nothing_can_be_written_or_made(attack, tmp_path):
    assert attack("write_file", path=str(tmp_path / "new")) == {"refused": "EPERM"}
    assert attack("write_file", path="/tmp/edge-agent-escape") == {"refused": "EPERM"}
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


@pytest.fixture(scope="module")
def call():
    """Make a system call by its name in one confined child for all."""
    column = seccomp._machine()[0]
    with hostile_child() as child:
        child.greet()
        yield lambda name, *arguments: child.call(
            "system_call", 20, number=seccomp._NUMBERS[name][column], arguments=arguments
        )


THERE = [name for name in seccomp._DENIED if seccomp._NUMBERS[name][seccomp._machine()[0]] >= 0]


@pytest.mark.parametrize("name", THERE)
def test_what_a_runtime_never_needs_is_refused(call, name):
    assert call(name, -1, -1, -1, -1, -1, -1) == {"refused": "EPERM"}


def test_mode_times_and_attributes_of_a_file_it_may_not_open_stay(call, tmp_path):
    # Landlock does not look at these: without the filter the device secret would be opened to every user.
    secret = tmp_path / "secret"
    secret.write_bytes(b"device secret")
    secret.chmod(0o600)
    before = secret.stat()
    here = -100  # AT_FDCWD
    for name, *arguments in (
        ("fchmodat", here, str(secret), 0o666),
        ("fchownat", here, str(secret), 1, 1, 0),
        ("truncate", str(secret), 0),
        ("utimensat", here, str(secret), 0, 0),
        ("setxattr", str(secret), "user.x", "y", 1, 0),
        ("unlinkat", here, str(secret), 0),
    ):
        assert call(name, *arguments) == {"refused": "EPERM"}
    after = secret.stat()
    assert (after.st_mode, after.st_uid, after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode, before.st_uid, before.st_size, before.st_mtime_ns, before.st_ctime_ns,
    )  # fmt: skip


def test_no_file_is_made_or_cut_short_even_where_landlock_is_missing(call, tmp_path):
    there = tmp_path / "there"
    there.write_bytes(b"x")
    for flags in (os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_TMPFILE):
        assert call("openat", -100, str(there), flags, 0o600) == {"refused": "EPERM"}
    assert call("openat2", -100, str(there), "\0" * 24, 24) == {"refused": "ENOSYS"}
    assert there.read_bytes() == b"x"


@needs_landlock
def test_a_child_that_is_given_a_file_to_write_writes_that_one_within_bounds_and_no_other(tmp_path):
    there = tmp_path / "there"
    there.write_bytes(b"secret")
    there.chmod(0o666)
    number = seccomp._NUMBERS["openat"][seccomp._machine()[0]]
    sealed = os.memfd_create("model", os.MFD_ALLOW_SEALING)
    os.write(sealed, b"weights")
    fcntl.fcntl(sealed, 1033, 0xF)
    given = os.memfd_create("given")
    try:
        with hostile_child(given=given, file_bytes=5000) as child:
            child.greet()
            assert child.call("write_given", 20, descriptor=given, bytes=5000) == {"done": 5000}
            assert child.call("write_given", 20, descriptor=given, bytes=5001) == {"refused": "EFBIG"}
            for path in (str(tmp_path / "new"), "/tmp/edge-agent-escape", str(there)):
                assert child.call("write_file", 20, path=path) == {"refused": "EACCES"}
            assert child.call("read_file", 20, path=str(there)) == {"refused": "EACCES"}
            readable = os.path.realpath(socket.__file__)  # below a folder that it may read
            for flags in (
                os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_RDWR | os.O_TRUNC,
                os.O_RDWR | os.O_CREAT, os.O_TMPFILE | os.O_WRONLY, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY,
            ):  # fmt: skip
                answer = child.call("system_call", 20, number=number, arguments=[-100, readable, flags, 0o600])
                assert answer["refused"] in ("EPERM", "EACCES"), flags
        with hostile_child(given=sealed, file_bytes=5000) as child:
            child.greet()
            assert child.call("write_given", 20, descriptor=sealed, bytes=1)["refused"] in ("EPERM", "EACCES")
    finally:
        os.close(given)
        os.close(sealed)
    assert there.read_bytes() == b"secret"
    assert not Path("/tmp/edge-agent-escape").exists()
    assert os.path.getsize(socket.__file__) > 0


def test_the_daemon_is_neither_slowed_down_nor_signalled_by_way_of_a_descriptor(call):
    daemon = os.getpid()
    before = os.getpriority(os.PRIO_PROCESS, daemon)
    assert call("setpriority", 0, daemon, 19) == {"refused": "EPERM"}
    assert call("sched_setscheduler", daemon, 5, "\0\0\0\0") == {"refused": "EPERM"}
    assert call("sched_setaffinity", daemon, 8, "\x01" + "\0" * 7) == {"refused": "EPERM"}
    assert call("prlimit64", daemon, 7, "\0" * 16, 0) == {"refused": "EPERM"}
    for command in (8, 10, 15):  # F_SETOWN, F_SETSIG, F_SETOWN_EX: whoever writes to it signals its owner
        assert call("fcntl", 2, command, daemon) == {"refused": "EPERM"}
    assert call("ioctl", 2, 0x8901, "\0" * 8) == {"refused": "EPERM"}
    assert os.getpriority(os.PRIO_PROCESS, daemon) == before


def test_it_dies_with_the_daemon_and_leaves_no_core_dump(call):
    # A core_pattern that pipes to a program writes the dump whatever RLIMIT_CORE says.
    assert call("prctl", 3, 0, 0, 0, 0) == {"done": 0}  # PR_GET_DUMPABLE
    assert call("prctl", 4, 1, 0, 0, 0) == {"refused": "EPERM"}  # PR_SET_DUMPABLE
    assert call("prctl", 1, 0, 0, 0, 0) == {"refused": "EPERM"}  # PR_SET_PDEATHSIG


HEADERS = {0: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1: "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("column", HEADERS)
def test_call_numbers_are_the_kernels(column):
    path = Path(HEADERS[column])
    if not path.exists():
        pytest.skip("no kernel headers here (Debian: linux-libc-dev)")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    known = {name: int(number) for name, number in found}
    ours = {name: numbers[column] for name, numbers in seccomp._NUMBERS.items() if name in known}
    assert len(ours) > 100
    assert ours == {name: known[name] for name in ours}
    newer = {name for name, numbers in seccomp._NUMBERS.items() if numbers[column] >= 0 and name not in known}
    assert all(seccomp._NUMBERS[name][column] > 400 for name in newer)


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


@pytest.mark.parametrize("how", ["eat_memory", "eat_shared_memory", "eat_page_tables"])
def test_eating_memory_ends_the_child_and_says_memory(how):
    with hostile_child(memory_mb=64) as child:
        child.greet()
        with pytest.raises(ChildError) as caught:
            child.call(how, 30)
    assert caught.value.kind == "memory"


def test_a_crowd_of_threads_ends_the_child():
    with hostile_child(memory_mb=1024) as child:
        child.greet()
        with pytest.raises(ChildError, match="threads") as caught:
            child.call("many_threads", 30)
    assert caught.value.kind == "crashed"


def test_between_two_requests_it_does_not_run():
    with hostile_child() as child:
        child.greet()
        child.call("after_the_answer", 20)
        before = child.call("cpu_seconds", 20)["done"]
        time.sleep(1.0)
        assert child.call("cpu_seconds", 20)["done"] - before < 0.5


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


@pytest.mark.parametrize("what", ["garbage", "nested", "endless"])
def test_lies_on_the_control_socket_are_a_crash(what):
    with hostile_child() as child:
        child.greet()
        with pytest.raises(ChildError) as caught:
            child.call(what, 20)
    assert caught.value.kind == "crashed"


def test_the_filter_is_a_valid_program_for_every_architecture():
    architectures = ((0, 0xC000003E), (1, 0xC00000B7), (2, 0x40000028))
    for (column, audit), rewrites in itertools.product(architectures, (False, True)):
        program = program_for(column, audit, 1234, rewrites=rewrites)
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
