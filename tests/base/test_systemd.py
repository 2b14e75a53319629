"""The service manager's handover: parsed without a process, then taken by real ones."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base import systemd
from agent.base.errors import ConfigError
from agent.base.systemd import Handover, PassedDescriptor, parse_environment

SERVICE = [sys.executable, "-m", "tests.base.activated"]
ROOT = Path(__file__).resolve().parents[2]

# Binds what its arguments say, puts it at 3, 4, ... and becomes the service: what PID 1 does between fork and exec.
MANAGER = """
import os, socket, sys
kind, *paths = sys.argv[1:]
listeners = []
for path in paths:
    if kind == "inet":
        listener = socket.create_server(("127.0.0.1", 0))
    elif kind == "file":
        listener = open(path, "w")
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
        listener.bind(path)
        if kind == "stream":
            listener.listen()
    listeners.append(listener)
spare = [os.dup(listener.fileno()) for listener in listeners]
spare = [os.dup2(fd, 100 + index) for index, fd in enumerate(spare)]
for index, fd in enumerate(spare):
    os.dup2(fd, 3 + index, inheritable=True)
    os.close(fd)
os.closerange(3 + len(spare), 100)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["WATCHDOG_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(spare))
os.execv(sys.executable, [sys.executable, "-m", "tests.base.activated"])
"""


@contextlib.contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The process of ``command``; however the test ends, it does not outlive it."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def start_under_manager(
    kind: str, names: str, *paths: Path, **environment: str
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, "-c", MANAGER, kind, *map(str, paths)]
    return started(*command, LISTEN_FDNAMES=names, **environment)


def ask(path: Path, process: subprocess.Popen[str] | None = None) -> dict[str, object]:
    """Connect as soon as the socket is bound; a process that ended before that is shown with its complaint."""
    deadline = time.monotonic() + 30
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                assert process is None or process.poll() is None, process.communicate() if process else ""
                assert time.monotonic() < deadline
                time.sleep(0.01)
                continue
            return json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))


# -- parsing ----------------------------------------------------------------------------------------------------------


def test_without_a_manager_there_is_nothing_to_take() -> None:
    assert parse_environment({"PATH": "/bin"}, 7) == Handover()


def test_everything_that_a_manager_hands_over() -> None:
    environment = {
        "NOTIFY_SOCKET": "@notify",
        "WATCHDOG_USEC": "60000000",
        "WATCHDOG_PID": "7",
        "LISTEN_PID": "7",
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "admin:infer",
        "CREDENTIALS_DIRECTORY": "/run/credentials/core",
    }
    assert parse_environment(environment, 7) == Handover(
        notify_address="\0notify",
        watchdog_s=60.0,
        descriptors=(PassedDescriptor(3, "admin"), PassedDescriptor(4, "infer")),
        credentials=Path("/run/credentials/core"),
    )


def test_what_is_addressed_to_another_process_is_not_ours() -> None:
    inherited = {"LISTEN_PID": "6", "LISTEN_FDS": "2", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "6"}
    assert parse_environment(inherited, 7) == Handover()


def test_an_old_manager_gives_no_names() -> None:
    passed = parse_environment({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, 7).descriptors
    assert passed == (PassedDescriptor(3, "unknown"),)


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"LISTEN_FDS": "two"}, "LISTEN_FDS='two' is not a number"),
        ({"LISTEN_FDS": "-1"}, "is not a number"),
        ({"LISTEN_FDS": ""}, "is not a number"),
        ({}, "is not a number"),
        ({"LISTEN_FDS": "99999"}, "more than"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "infer"}, "LISTEN_FDNAMES has 1 names"),
    ],
)
def test_a_malformed_handover_is_an_error_and_not_a_guess(environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_environment({"LISTEN_PID": "7", **environment}, 7)


@given(st.dictionaries(st.sampled_from([*systemd._TAKEN, "CREDENTIALS_DIRECTORY"]), st.text()))
def test_any_environment_is_parsed_or_refused(environment: dict[str, str]) -> None:
    try:
        handover = parse_environment(environment, 7)
    except ConfigError:
        return
    assert handover.watchdog_s is None or handover.watchdog_s > 0
    assert len(handover.descriptors) <= 64


def test_credentials_are_found_by_name_only(tmp_path: Path) -> None:
    (tmp_path / "device-secret").write_bytes(bytes(32))
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert systemd.credential_path(environment, "device-secret") == tmp_path / "device-secret"
    assert systemd.credential_path(environment, "another") is None
    assert systemd.credential_path({}, "device-secret") is None
    with pytest.raises(ValueError, match="not a credential's name"):
        systemd.credential_path(environment, "../device-secret")


# -- telling the manager ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_manager_hears_each_message(short_dir: Path, abstract: bool) -> None:
    address = f"@{short_dir}/notify" if abstract else f"{short_dir}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(10)
        manager.bind("\0" + address[1:] if abstract else address)
        notifier = systemd.Notifier(parse_environment({"NOTIFY_SOCKET": address}, 7).notify_address)
        before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert notifier.ready("20 models")
        assert notifier.alive()
        assert notifier.reloading()
        assert notifier.status("half\nMAINPID=1\n")
        assert notifier.stopping()
        assert manager.recv(4096) == b"READY=1\nSTATUS=20 models"
        assert manager.recv(4096) == b"WATCHDOG=1"
        first, second = manager.recv(4096).decode().split("\n")
        assert first == "RELOADING=1"
        stamp_us = int(second.removeprefix("MONOTONIC_USEC="))
        assert before_us <= stamp_us <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert manager.recv(4096) == b"STATUS=half MAINPID=1", "a status must not smuggle in an assignment"
        assert manager.recv(4096) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, "/nowhere/at/all", "\0ea-nobody-listens"])
def test_a_manager_that_is_not_there_does_no_harm(address: str | None) -> None:
    assert systemd.Notifier(address).ready() is False


# -- taking sockets ---------------------------------------------------------------------------------------------------


def test_sockets_are_taken_by_name_whatever_their_order_and_no_child_inherits_them(short_dir: Path) -> None:
    infer, admin, notify = short_dir / "infer.sock", short_dir / "admin.sock", short_dir / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(30)
        manager.bind(str(notify))
        with start_under_manager(
            "stream", "admin:infer", admin, infer,
            NOTIFY_SOCKET=str(notify), WATCHDOG_USEC="5000000", CREDENTIALS_DIRECTORY="/run/credentials/x",
        ) as process:  # fmt: skip
            first = ask(admin, process)
            second = ask(infer, process)
            assert process.wait(30) == 0
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving"
        assert manager.recv(4096) == b"STOPPING=1"
    assert (first["asked"], second["asked"]) == ("admin", "infer")
    assert first["names"] == ["admin", "infer"]
    assert first["blocking"] == [False, False]
    assert first["watchdog_s"] == 5.0
    assert first["credentials"] == "/run/credentials/x"
    grandchild = first["grandchild"]
    assert isinstance(grandchild, dict)
    assert not set(grandchild["env"]) & set(systemd._TAKEN)
    assert not [target for target in grandchild["fds"] if target.startswith("socket:")]


@pytest.mark.parametrize(
    ("kind", "names", "complaint"),
    [
        ("stream", "infer:infer", "'infer': it was passed twice"),
        ("stream", "infer:metrics", "'metrics': it is not a name that is served here"),
        ("datagram", "infer:admin", "not a listening Unix stream socket"),
        ("unheard", "infer:admin", "not a listening Unix stream socket"),
        ("inet", "infer:admin", "not a listening Unix stream socket"),
        ("file", "infer:admin", "it is no socket"),
    ],
)
def test_a_wrong_socket_unit_is_named(short_dir: Path, kind: str, names: str, complaint: str) -> None:
    with start_under_manager(kind, names, short_dir / "a", short_dir / "b") as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert complaint in stderr


def test_announced_descriptors_that_are_not_there_are_an_error() -> None:
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "infer"}
    handover = parse_environment(environment, 7)
    closed = os.open("/dev/null", os.O_RDONLY)
    os.close(closed)
    with pytest.raises(ConfigError, match="'infer': Bad file descriptor"):
        systemd.adopt_sockets([PassedDescriptor(closed, handover.descriptors[0].name)], ("infer", "admin"))


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd-socket-activate is not installed")
def test_systemds_own_activation_starts_the_service_at_the_first_connection(short_dir: Path) -> None:
    infer, admin = short_dir / "infer.sock", short_dir / "admin.sock"
    command = ["systemd-socket-activate", "-l", str(infer), "-l", str(admin), "--fdname=infer:admin", *SERVICE]
    with started(*command) as process:
        report = ask(infer, process)
        assert process.wait(30) == 0
    assert report["asked"] == "infer"
    # It becomes the service by exec: the pid that it announced is the service's.
    assert report["pid"] == process.pid
    assert report["names"] == ["admin", "infer"]
