"""What happens inside the machine: listens on a serial port as root, does what it is asked, answers in JSON.

Needs nothing but the standard library of the system's Python. The stories are outside, in the tests; here are only the
things that a story is made of.
"""

from __future__ import annotations

import array
import http.client
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

INFER = "/run/edge-agent/infer.sock"
ADMIN = "/run/edge-agent/admin.sock"
UNITS = ("edge-agent-core.service", "edge-agent-link.service", "edge-agent-infer.socket", "edge-agent-admin.socket")
HERE = Path(__file__).parent
INPUT = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}


def run(command: list[str], within: float = 240) -> dict[str, object]:
    begin = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=within)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return {"rc": done.returncode, "out": out, "err": err, "s": round(time.monotonic() - begin, 2)}


# -- speaking to the agent --------------------------------------------------------------------------------------------


def ask(
    method: str, target: str, body: object = None, *, path: str = ADMIN, file: str = "", timeout: float = 240
) -> dict[str, object]:
    """One request on a connection of its own; ``file`` goes along as a descriptor."""
    begin = time.monotonic()
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: edge\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(path)
        extra: list[tuple[int, int, array.array[int]]] = []
        descriptor = os.open(file, os.O_RDONLY) if file else -1
        if file:
            extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        connection.sendmsg([head.encode() + data], extra)
        if file:
            os.close(descriptor)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        text = answer.read()
    return {"status": answer.status, "json": json.loads(text) if text else None, "s": time.monotonic() - begin}


def infer(model: str = "linear", timeout: float = 240) -> dict[str, object]:
    """What the model says to a row of ones, and which version of it said so."""
    answer = ask("POST", f"/v2/models/{model}/infer", INPUT, path=INFER, timeout=timeout)
    document = answer["json"]
    if answer["status"] != 200:
        return {"status": answer["status"], "error": document, "s": answer["s"]}
    return {"status": 200, "y": document["outputs"][0]["data"], "version": document["model_version"], "s": answer["s"]}


def add(file: str) -> dict[str, object]:
    body = {"name": "linear", "file_name": file, "accept_slower": True}
    return ask("POST", "/v1/models", body, file=str(HERE / file))


# -- the service ------------------------------------------------------------------------------------------------------


def show(unit: str, names: list[str]) -> dict[str, str]:
    text = str(run(["systemctl", "show", "-p", ",".join(names), unit])["out"])
    return dict(line.split("=", 1) for line in text.splitlines())


def pid_of(unit: str) -> int:
    return int(show(unit, ["MainPID"])["MainPID"])


def states() -> list[str]:
    return str(run(["systemctl", "is-active", *UNITS])["out"]).split()


def send(unit: str, number: int) -> int:
    """A signal to the main process; its pid."""
    pid = pid_of(unit)
    os.kill(pid, number)
    return pid


def write(path: str, text: str) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def files() -> list[str]:
    """Everything on this machine that is the agent's, by name; folders of its own with what is in them."""
    places = ("/etc", "/opt", "/usr", "/run", "/var", "/home", "/root", "/srv", "/tmp")
    found = run(["find", *places, "-xdev", "-name", "*edge*agent*", "-not", "-name", "*edge-agent-test*"])
    others = ("/var/lib/dpkg/", str(HERE), "/var/log/")
    return sorted(line for line in str(found["out"]).split() if not any(part in line for part in others))


def state() -> dict[str, int]:
    """The encrypted files with their sizes."""
    found = Path("/var/lib/edge-agent/store").rglob("*.age")
    return {str(path): path.stat().st_size for path in sorted(found) if path.is_file()}


# -- updates ----------------------------------------------------------------------------------------------------------


def deliver(stick: str) -> None:
    """Bring what is on the artefacts' disk as a stick; it goes on by itself."""
    silent = subprocess.DEVNULL
    subprocess.Popen(["edge-agent", "deliver", str(HERE / stick)], stdin=silent, stdout=silent, stderr=silent)


def stage(version: str, job: str) -> str:
    """How far the update to that version is: "" before its job is known, "fetching" before root knows of it."""
    note = Path("/opt/edge-agent/update/state.json")
    course = json.loads(note.read_text()) if note.exists() else {}
    if course.get("version") == version:
        return str(course["stage"])
    return "fetching" if ask("GET", f"/v1/jobs/{job}")["status"] == 200 else ""


# -- load -------------------------------------------------------------------------------------------------------------


class Clients:
    """Apps that ask all the time, each request on a connection of its own."""

    def __init__(self, count: int) -> None:
        self.answers, self.refused, self.failed = 0, 0, 0
        self.said: list[str] = []
        self.longest, self.gap = 0.0, 0.0
        self._last = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> dict[str, object]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return {
            "answers": self.answers, "refused": self.refused, "failed": self.failed, "said": self.said[:5],
            "longest_s": round(self.longest, 2), "gap_s": round(self.gap, 2),
        }  # fmt: skip

    def _ask(self) -> None:
        while not self._stop.is_set():
            begin = time.monotonic()
            said, refused = "", False
            try:
                answer = infer()
                said = "" if answer["status"] == 200 else f"{answer['status']} {answer['error']}"
            except (ConnectionRefusedError, FileNotFoundError) as error:
                said, refused = repr(error), True
            except (OSError, http.client.HTTPException) as error:
                said = repr(error)
            now = time.monotonic()
            with self._lock:
                self.answers += not said
                self.refused += refused
                self.failed += bool(said) and not refused
                if said:
                    self.said.append(said)
                self.longest = max(self.longest, now - begin)
                if not said:
                    self.gap, self._last = max(self.gap, now - self._last), now
            time.sleep(0.05)


clients: list[Clients] = []


def load(apps: int) -> None:
    clients.append(Clients(apps))


def unload() -> dict[str, object]:
    return clients.pop().stop()


def hog(unit: str, megabytes: int, score: int) -> dict[str, object]:
    """A process in the unit's control group that takes so much memory; how it ended, at most a minute later."""
    group = show(unit, ["ControlGroup"])["ControlGroup"]
    program = (
        "import sys, time\n"
        "open(sys.argv[1], 'w').write('0'); open('/proc/self/oom_score_adj', 'w').write(sys.argv[2])\n"
        "kept = [bytearray(b'x') * (1 << 20) for _ in range(int(sys.argv[3]))]\n"
        "time.sleep(60)"
    )
    procs = f"/sys/fs/cgroup{group}/cgroup.procs"
    done = run([sys.executable, "-c", program, procs, str(score), str(megabytes)])
    events = Path(f"/sys/fs/cgroup{group}/memory.events")
    return {"rc": done["rc"], "err": done["err"], "events": events.read_text().split() if events.exists() else []}


# -- the sandbox, from inside -----------------------------------------------------------------------------------------


#: Runs in the unit's namespaces as its user, and tries what it must not be able to do.
PROBE = r"""
import json, os, socket, sys
seen = {"uid": os.getuid(), "reached": [], "read": [], "written": [], "strangers": []}
for family, address in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("192.0.2.1", 443)),
                        (socket.AF_INET6, ("2001:db8::1", 443, 0, 0))):
    with socket.socket(family) as tried:
        tried.settimeout(2)
        try:
            tried.connect(address)
            seen["reached"].append(str(address))
        except OSError as error:
            seen.setdefault("network", []).append(type(error).__name__ + " " + str(error.errno))
seen["interfaces"] = sorted(name for _, name in socket.if_nameindex())
for path in sys.argv[1:]:
    try:
        names = os.listdir(path) if os.path.isdir(path) else [open(path, "rb").read(1)]
        seen["read"].append(path)
    except OSError:
        pass
for name in os.listdir("/proc"):
    if name.isdigit() and os.stat("/proc/" + name).st_uid != os.getuid():
        seen["strangers"].append(name)
skipped = ("/proc", "/sys/fs/cgroup")
for folder, folders, names in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
    if not os.access(folder, os.W_OK):
        continue
    path = os.path.join(folder, ".probe")
    try:
        open(path, "x").close()
        os.unlink(path)
        seen["written"].append(folder)
    except OSError:
        pass
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/power/state", "/dev/vda", "/dev/mem"):
    try:
        os.close(os.open(path, os.O_WRONLY))
        seen["written"].append(path)
    except OSError:
        pass
print(json.dumps(seen))
"""


def probe(unit: str, paths: list[str]) -> dict[str, object]:
    """What a process sees and may do that stands where the unit's main process stands."""
    pid = pid_of(unit)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    user = pwd.getpwnam(show(unit, ["User"])["User"])
    done = run([
        "nsenter", f"--target={pid}", "--mount", "--net", "--ipc", "--", "setpriv", f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
        "/usr/bin/python3", "-I", "-c", PROBE, *paths,
    ])  # fmt: skip
    if done["rc"] != 0:
        raise RuntimeError(str(done["err"]))
    names = ("Uid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Groups")
    lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    writable = [line[4] for line in lines if "rw" in line[5].split(",")]
    return {
        **json.loads(str(done["out"])),
        "writable mounts": writable,
        "status": {name: status[name].split() for name in names},
    }


# -- measures ---------------------------------------------------------------------------------------------------------


def idle(seconds: float) -> dict[str, object]:
    """RSS and the share of one core of both units, over so many seconds in which nobody asks for anything."""
    before = {unit: _used(unit) for unit in UNITS[:2]}
    time.sleep(seconds)
    found = {}
    for unit in UNITS[:2]:
        rss, cpu = _used(unit)
        found[unit] = {"rss_mb": round(rss, 1), "cpu_percent": round((cpu - before[unit][1]) / seconds * 100, 3)}
    return found


def _used(unit: str) -> tuple[float, float]:
    pid = pid_of(unit)
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return rss, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class First(threading.Thread):
    """The first answer after a boot: asked for as soon as there is a socket, so that its activation is what answers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.answer: dict[str, object] = {}

    def run(self) -> None:
        while not Path(INFER).exists():
            time.sleep(0.1)
        core = states()[0]
        try:
            answer = infer(timeout=600)
        except (OSError, http.client.HTTPException) as error:
            answer = {"error": repr(error)}
        self.answer = {**answer, "at_s": round(time.monotonic(), 2), "core_was": core}


first = First()


def first_answer() -> dict[str, object]:
    """That answer, with seconds since the kernel started."""
    first.join(600)
    reached = int(show("multi-user.target", ["ActiveEnterTimestampMonotonic"])["ActiveEnterTimestampMonotonic"]) / 1e6
    return {**first.answer, "multi_user_s": round(reached, 2)}


# -- the port ---------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., object]] = {call.__name__: call for call in (
    run, ask, infer, add, show, pid_of, states, send, write, files, state, deliver, stage, load, unload, hog, probe,
    idle, first_answer,
)}  # fmt: skip


def main(path: str) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if Path("/opt/edge-agent/current").exists():
        first.start()
    while not Path(path).exists():  # udev makes it
        time.sleep(0.1)
    port = os.open(path, os.O_RDWR)
    devices = sorted(os.listdir("/sys/class/net"))
    say(port, {"hello": os.uname().release, "devices": devices, "at_s": time.monotonic()})
    with os.fdopen(os.dup(port), "rb", buffering=0) as stream:
        received = b""
        while True:
            data = stream.read(1 << 16)
            if not data:  # nobody is at the other end now
                time.sleep(0.1)
                continue
            received += data
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                answer(port, json.loads(line))


def answer(port: int, request: dict[str, object]) -> None:
    try:
        result = CALLS[str(request["do"])](**request["with"])
    except Exception:
        say(port, {"id": request["id"], "trouble": traceback.format_exc()})
    else:
        say(port, {"id": request["id"], "result": result})


def say(port: int, document: dict[str, object]) -> None:
    data = json.dumps(document).encode() + b"\n"
    while data:
        data = data[os.write(port, data) :]


if __name__ == "__main__":
    main(sys.argv[1])
