"""What happens inside the booted container of ``test_boot``: runs as root under the system's Python, reports as JSON.

Each step writes what it saw under a name of its own; the test outside judges. Needs nothing but the standard library.
"""

from __future__ import annotations

import grp
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

OUT = Path("/opt/edge-agent/out")
INFER = "/run/edge-agent/infer.sock"
ADMIN = "/run/edge-agent/admin.sock"
APP_UID = 4711
AGENT = "/opt/edge-agent/current/bin/edge-agent"

seen: dict[str, object] = {}


class Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


def ask(path: str, target: str, body: object = None) -> tuple[int, object]:
    connection = Unix(path)
    connection.request("POST" if body else "GET", target, json.dumps(body) if body else None)
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text else None


def infer(model: str = "linear") -> tuple[int, object]:
    values = [1.0] * 16
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": values}
    return ask(INFER, f"/v2/models/{model}/infer", {"inputs": [tensor]})


def as_user(uid: int, group: str | None, action: Callable[[], object]) -> object:
    """What ``action`` gives when ``uid`` does it, with no group but ``group``; in a child, as rights do not return."""
    groups = [grp.getgrnam(group).gr_gid] if group else []
    read, write = os.pipe()
    if os.fork() == 0:
        os.setgroups(groups)
        os.setgid(uid)
        os.setuid(uid)
        try:
            result = action()
        except OSError as error:
            result = type(error).__name__
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        return json.loads(stream.read())


def run(*command: str, stdin: bytes = b"") -> dict[str, object]:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    return {"rc": done.returncode, "out": done.stdout.decode(), "err": done.stderr.decode()}


def agent(*arguments: str) -> dict[str, object]:
    answer = run(AGENT, *arguments, "--json")
    answer["json"] = json.loads(str(answer["out"])) if answer["out"] else None
    return answer


def inodes() -> list[int]:
    return [os.stat(path).st_ino for path in (INFER, ADMIN)]


def state_files() -> list[list[object]]:
    return [
        [str(path), oct(path.stat().st_mode & 0o777), path.stat().st_uid]
        for path in sorted(Path("/var/lib/edge-agent").rglob("*"))
    ]


def serving() -> None:
    """Without a credential: add, answer, restart, reload, rights."""
    seen["ready"] = ask(INFER, "/v2/health/ready")[0]
    seen["added"] = agent("models", "add", str(OUT / "linear.onnx"))
    seen["explained"] = agent("models", "explain", "linear")
    seen["answer"] = infer()
    seen["doctor"] = agent("doctor")
    seen["tflite added"] = agent("models", "add", str(OUT / "lite.tflite"))
    seen["tflite answer"] = infer("lite")
    app = "edge-agent-apps"
    seen["app infers"] = as_user(APP_UID, app, infer)
    seen["app administers"] = as_user(APP_UID, app, lambda: ask(ADMIN, "/v1/status"))
    seen["stranger infers"] = as_user(APP_UID, None, infer)
    before = inodes()
    # The answer is asked for while nobody is there to give it: the socket keeps the connection until core is back.
    run("systemctl", "restart", "--no-block", "edge-agent-core.service")
    seen["answer during restart"] = infer()
    seen["sockets kept"] = before == inodes()
    Path("/etc/edge-agent/config.toml").write_text('[access]\ndefault = "deny"\n')
    seen["reload"] = run("systemctl", "reload", "edge-agent-core.service")
    seen["app infers after denial"] = as_user(APP_UID, app, infer)
    seen["root infers after denial"] = infer()[0]
    seen["files"] = state_files()
    seen["stop"] = run("systemctl", "stop", "edge-agent-core.service")
    seen["result"] = run("systemctl", "show", "-P", "Result", "edge-agent-core.service")["out"]
    seen["uid"] = os.stat("/var/lib/edge-agent").st_uid


def sealed() -> None:
    """With a credential, then with one that protects nothing."""
    store = Path("/etc/credstore.encrypted")
    store.mkdir(mode=0o700, exist_ok=True)
    secret = os.urandom(32)
    run("systemctl", "stop", "edge-agent-core.service")
    subprocess.run(["rm", "-rf", "/var/lib/edge-agent"], check=True)
    seen["setup"] = run("systemd-creds", "setup")
    seal = ["systemd-creds", "encrypt", "--name=device-secret", "-", str(store / "device-secret")]
    seen["seal"] = run(*seal, "--with-key=host", stdin=secret)
    seen["start"] = run("systemctl", "restart", "edge-agent-core.service")
    seen["status"] = agent("status")
    seen["files"] = state_files()
    (store / "device-secret").unlink()
    seen["seal with nothing"] = run(*seal, "--with-key=tpm2-absent", stdin=secret)
    seen["start with nothing"] = run("systemctl", "restart", "edge-agent-core.service")


# -- moving the secret between TPM, host key and file -----------------------------------------------------------------

TPM = "swtpm:host=127.0.0.1,port=2331"
_TRANSIENT, _SESSIONS, _STARTUP = 0x80000000, 0x02000000, b"\0\0\x01\x44"


class ResourceManager(threading.Thread):
    """What the kernel does behind /dev/tpmrm0, and systemd counts on: nothing stays loaded of a caller that has ended.

    Each command comes on a connection of its own, and each caller begins with a Startup. One caller at a time.
    Commands are TPM 2.0's own (part 3: Startup, GetCapability, FlushContext).
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 2331))

    def run(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            with caller, socket.create_connection(("127.0.0.1", 2321)) as tpm:
                try:
                    while (command := receive(caller)) is not None:
                        if command[6:10] == _STARTUP:
                            for first in (_TRANSIENT, _SESSIONS):
                                self._flush(tpm, first)
                        caller.sendall(exchange(tpm, command))
                except OSError:
                    pass

    def _flush(self, tpm: socket.socket, first: int) -> None:
        answer = exchange(tpm, struct.pack(">HIIIII", 0x8001, 22, 0x17A, 1, first, 64))
        count = struct.unpack(">I", answer[15:19])[0]
        for handle in struct.unpack(f">{count}I", answer[19 : 19 + 4 * count]):
            exchange(tpm, struct.pack(">HIII", 0x8001, 14, 0x165, handle))


def receive(connection: socket.socket) -> bytes | None:
    """One command or answer: tag, length in all, the rest."""
    data = b""
    while len(data) < 6 or len(data) < struct.unpack(">I", data[2:6])[0]:
        part = connection.recv(4096)
        if not part:
            return None
        data += part
    return data


def exchange(tpm: socket.socket, command: bytes) -> bytes:
    tpm.sendall(command)
    answer = receive(tpm)
    if answer is None:
        raise ConnectionError
    return answer


def power_on_tpm(state: str) -> dict[str, object]:
    """A TPM in software. One with another ``state`` is a TPM that was cleared, or another machine's."""
    Path(state).mkdir(exist_ok=True)
    places = ("--server", "type=tcp,port=2321", "--ctrl", "type=tcp,port=2332")
    options = ("--flags", "not-need-init,startup-clear", "--daemon", "--pid", f"file={state}.pid")
    return run("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", *places, *options)


def payloads() -> dict[str, list[int]]:
    """Of each blob: which file, and when it was written."""
    found = {}
    for path in sorted(Path("/var/lib/edge-agent/store/blobs").iterdir()):
        if path.suffix != ".header":
            found[path.name] = [path.stat().st_ino, path.stat().st_mtime_ns]
    return found


def place(answer: bool = True) -> dict[str, object]:
    """How things are once the device has been restarted, as far as a container can be."""
    started = run("systemctl", "restart", "edge-agent-core.service")
    status = agent("status")["json"] or {}
    return {
        "start": started["rc"],
        "place": status.get("key_place"),
        "answer": infer()[0] if answer else None,
        "payloads": payloads(),
        "credentials": sorted(path.name for path in Path("/etc/credstore.encrypted").glob("*")),
        "secrets beside the store": sorted(path.name for path in Path("/var/lib/edge-agent/keys").glob("*")),
        "mode": oct(Path("/etc/credstore.encrypted").stat().st_mode & 0o777),
    }


def moved() -> None:
    """File to TPM to host key and back, then a TPM that has forgotten everything."""
    os.environ["SYSTEMD_TPM2_DEVICE"] = TPM
    seen["tpm"] = power_on_tpm("/run/tpm")
    ResourceManager().start()
    seen["added"] = agent("models", "add", str(OUT / "linear.onnx"))
    seen["begun"] = place()
    seen["foreseen"] = agent("seal", "--to", "tpm2", "--dry-run")
    seen["after the dry run"] = place()
    for step, options in (
        ("tpm2", ("--to", "tpm2")), ("again", ("--to", "tpm2")), ("host", ("--to", "host")),
        ("file", ("--to", "file")), ("tpm2 once more", ("--to", "tpm2")), ("anew", ("--to", "tpm2", "--rotate")),
    ):  # fmt: skip
        seen[f"seal {step}"] = agent("seal", *options)
        seen[f"placed {step}"] = place()
    seen["refused"] = run(AGENT, "seal", "--start-over")
    run("swtpm_ioctl", "--tcp", "127.0.0.1:2332", "-s")
    seen["other tpm"] = power_on_tpm("/run/other-tpm")
    seen["start without"] = run("systemctl", "restart", "edge-agent-core.service")
    seen["journal of the loss"] = run("journalctl", "--no-pager", "-u", "edge-agent-core.service")["out"]
    seen["doctor of the loss"] = agent("doctor")
    seen["seal without"] = run(AGENT, "seal", "--to", "host")
    seen["start over"] = agent("seal", "--start-over", "--to", "host")
    seen["after"] = place(answer=False)
    seen["aside"] = sorted(path.name for path in Path("/var/lib/edge-agent").iterdir())
    seen["added again"] = agent("models", "add", str(OUT / "linear.onnx"))
    seen["answer again"] = infer()[0]


def first() -> None:
    """What the first start has sealed, on folders that stay."""
    unit = "edge-agent-seal.service"
    seen["unit"] = run("systemctl", "show", "-P", "Result", unit)["out"]
    seen["words"] = run("journalctl", "--no-pager", "-u", unit)["out"]
    seen["status"] = agent("status")["json"]
    sealed_file = Path("/etc/credstore.encrypted/device-secret")
    seen["mode"] = oct(sealed_file.stat().st_mode & 0o777)
    before = sealed_file.read_bytes()
    seen["beside the store"] = [path for path, _, _ in state_files() if "device-secret" in str(path)]
    seen["again"] = run("systemctl", "start", unit)
    seen["as it was"] = sealed_file.read_bytes() == before
    seen["doctor"] = agent("doctor")
    seen["doctor of a user"] = as_user(APP_UID, None, lambda: agent("doctor"))


if __name__ == "__main__":
    try:
        {"serving": serving, "sealed": sealed, "moved": moved, "first": first}[sys.argv[1]]()
    finally:
        seen["journal"] = run("journalctl", "--no-pager", "-u", "edge-agent-core.service")["out"]
        (OUT / "result.json").write_text(json.dumps(seen, default=str))
