"""What happens inside the booted container of ``test_boot``: runs as root under the system's Python, reports as JSON.

Each step writes what it saw under a name of its own; the test outside judges. Needs nothing but the standard library.
"""

from __future__ import annotations

import grp
import http.client
import json
import os
import socket
import subprocess
import sys
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


if __name__ == "__main__":
    try:
        {"serving": serving, "sealed": sealed}[sys.argv[1]]()
    finally:
        seen["journal"] = run("journalctl", "--no-pager", "-u", "edge-agent-core.service")["out"]
        (OUT / "result.json").write_text(json.dumps(seen, default=str))
