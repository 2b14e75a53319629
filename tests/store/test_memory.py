"""Plaintext in memory, and what big blobs and many threads cost."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.base.errors import DamagedError, TooLargeError, TryLaterError, UnsupportedError
from agent.store import memory
from agent.store.memory import hold
from agent.store.store import Store
from tests.store.conftest import install, plain

F_GET_SEALS = 1034


def test_what_is_held_cannot_be_changed_by_anybody() -> None:
    with hold([memoryview(b"abc"), memoryview(b"def")], 6) as plaintext:
        assert fcntl.fcntl(plaintext.fd, F_GET_SEALS) & 0xF == 0xF
        assert os.fstat(plaintext.fd).st_mode & 0o777 == 0o400
        again = os.open(plaintext.path, os.O_RDWR)  # the owner, or root, may still ask for more
        for change in (lambda: os.write(again, b"x"), lambda: os.ftruncate(again, 0), lambda: os.ftruncate(again, 9)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError):
            mmap.mmap(again, 6, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE | mmap.PROT_READ)
        os.close(again)
        with plaintext.view() as view:
            assert bytes(view) == b"abcdef"


def test_a_child_gets_it_by_descriptor_only() -> None:
    with hold([memoryview(b"abc")], 3) as plaintext:
        assert not os.get_inheritable(plaintext.fd)
        show = [sys.executable, "-c", f"print(open('/proc/self/fd/{plaintext.fd}').read())"]
        given = subprocess.run(show, pass_fds=[plaintext.fd], capture_output=True, text=True, check=True)
        assert given.stdout == "abc\n"
        assert subprocess.run(show, capture_output=True, check=False).returncode != 0


def test_an_empty_plaintext_is_held_too() -> None:
    with hold([], 0) as plaintext:
        assert plaintext.read_bytes(0) == b""


def test_reading_more_than_expected_is_refused() -> None:
    with hold([memoryview(b"abc")], 3) as plaintext, pytest.raises(TooLargeError):
        plaintext.read_bytes(2)


def test_a_failure_on_the_way_leaves_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))

    def pieces():
        yield memoryview(b"some plaintext")
        raise DamagedError("cannot go on: test")

    with pytest.raises(DamagedError):
        hold(pieces(), 100)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_forgotten_plaintext_warns_and_closes() -> None:
    plaintext = hold([memoryview(b"abc")], 3)
    fd = plaintext.fd
    with pytest.warns(ResourceWarning, match="unclosed"):
        del plaintext
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_kernel_that_knows_no_noexec_seal_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 6.3 the flag is EINVAL; the answer of such a kernel is given here by hand."""
    real = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & 0x8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    with hold([memoryview(b"abc")], 3) as plaintext:
        assert plaintext.read_bytes(3) == b"abc"


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSYS, UnsupportedError), (errno.EPERM, UnsupportedError), (errno.EMFILE, TryLaterError)],
)
def test_where_there_is_no_sealed_memory_it_says_so(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refuses(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuses)
        with pytest.raises(kind, match="cannot decrypt"):
            hold([memoryview(b"abc")], 3)
    if kind is UnsupportedError:
        with monkeypatch.context() as patch:
            patch.delattr(os, "memfd_create")
            with pytest.raises(UnsupportedError, match="memfd_create"):
                hold([memoryview(b"abc")], 3)
        with monkeypatch.context() as patch:
            patch.setattr(memory.fcntl, "fcntl", refuses)
            with pytest.raises((UnsupportedError, TryLaterError), match="sealed"):
                hold([memoryview(b"abc")], 3)


def test_short_of_descriptors_is_not_damage(store: Store) -> None:
    (ref,) = install(store, "digits", "1.0.0", {"m.onnx": b"weights" * 1000})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    refused, outcome = 0, ""
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, hard))
    fillers = list(iter(filler, None))
    try:
        while not outcome:  # with none left, with one, with two …: header, payload, memory
            try:
                store.read(ref).close()
                outcome = "read"
            except TryLaterError:
                refused += 1
                os.close(fillers.pop())
    finally:
        for descriptor in fillers:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused >= 2
    assert store.document.models["digits"].versions["1.0.0"].damaged == ()
    assert plain(store, ref) == b"weights" * 1000


def filler() -> int | None:
    try:
        return os.open("/dev/null", os.O_RDONLY)
    except OSError:
        return None


def test_many_threads_read_while_the_key_rotates_and_versions_go(store: Store) -> None:
    contents = {f"{index}.onnx": os.urandom(70_000 + index) for index in range(4)}
    refs = install(store, "digits", "1.0.0", contents)
    failures: list[BaseException] = []
    stop = threading.Event()
    reads = [0] * 4

    def reader(index: int) -> None:
        ref = refs[index]
        try:
            while not stop.is_set():
                assert plain(store, ref) == contents[ref.part]
                reads[index] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        store.rotate_key()
        install(store, "faces", f"1.0.{turn}", {"m.onnx": b"x" * 1000})
        store.gc()
        store.verify()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == [] and min(reads) > 0


STREAMED = """
import resource, sys
from pathlib import Path
from agent.store.keys import DeviceKeys
from agent.store.store import Store
MIB = 1 << 20
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def pieces(count):
    block = bytes(range(256)) * (MIB // 256)
    for _ in range(count):
        yield block
folder = Path(sys.argv[1])
with Store(folder / "store", DeviceKeys(folder / "keys"), 4096 * MIB) as store:
    store.read(store.add_blob("a", "1.0.0", "warm", pieces(1))).close()
    before = peak()
    ref = store.add_blob("a", "1.0.0", "m", pieces(int(sys.argv[2])), int(sys.argv[2]) * MIB)
    plaintext = store.read(ref)
    with open(plaintext.path, "rb") as file:
        file.seek(-MIB, 2)
        assert file.read() == next(pieces(1))
    plaintext.close()
    print(peak() - before)
"""


@pytest.mark.parametrize("size_mb", [96, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_large_blob_needs_no_memory_but_its_plaintext(tmp_path: Path, size_mb: int) -> None:
    """The process grows by buffers only: the plaintext is in the memory file, which is not mapped."""
    script = [sys.executable, "-c", STREAMED, str(tmp_path), str(size_mb)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) <= 8


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_who_cannot_be_inspected_reads_it_by_path() -> None:
    """The daemon's own state: no rights, and not dumpable, so that its /proc entries belong to root."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
            with hold([memoryview(b"abc")], 3) as plaintext:
                status = 0 if Path(plaintext.path).read_bytes() == b"abc" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
