"""What happens inside the booted machine of ``test_service``: runs as root under the system's Python, reports as JSON.

Each step writes what it saw under a name of its own; the test outside judges. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
AGENT = "/usr/local/bin/edge-agent"
UNITS = ("edge-agent-core.service", "edge-agent-link.service", "edge-agent-infer.socket", "edge-agent-admin.socket")
CORE, LINK = UNITS[:2]

seen: dict[str, object] = {}


def run(*command: object) -> dict[str, object]:
    begin = time.monotonic()
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False, stdin=subprocess.DEVNULL)
    out, err = done.stdout.decode(), done.stderr.decode()
    return {"rc": done.returncode, "out": out, "err": err, "s": round(time.monotonic() - begin, 1)}


def install(wheels: str, *options: str) -> dict[str, object]:
    return run("bash", HERE / "install.sh", "--offline", HERE / wheels, *options)


def uninstall(*options: str) -> dict[str, object]:
    return run("bash", HERE / "install.sh", "--uninstall", *options)


def agent(*arguments: str) -> dict[str, object]:
    answer = run(AGENT, *arguments, "--json")
    answer["json"] = json.loads(str(answer["out"])) if answer["out"] else None
    return answer


def infer() -> object:
    return agent("infer", "linear", "-i", f"x={HERE / 'x.json'}")["json"]


def states() -> list[str]:
    return str(run("systemctl", "is-active", *UNITS)["out"]).split()


def show(unit: str, *names: str) -> dict[str, str]:
    text = str(run("systemctl", "show", "-p", ",".join(names), unit)["out"])
    return dict(line.split("=", 1) for line in text.splitlines())


def files() -> list[str]:
    """Everything on this machine that is ours, by name; folders of ours with what is in them."""
    found = run("find", "/etc", "/opt", "/usr/lib", "/usr/local", "/run", "/var/lib", "-xdev", "-name", "*edge*agent*")
    others = ("/python", "/var/lib/dpkg", str(HERE))
    return sorted(line for line in str(found["out"]).split() if not any(part in line for part in others))


def state() -> dict[str, int]:
    return {
        str(path): path.stat().st_size
        for path in sorted(Path("/var/lib/edge-agent/store").rglob("*"))
        if path.is_file() and path.suffix == ".age"
    }


class Asking(threading.Thread):
    """Asks for answers all the time, each on a connection of its own, and counts those that fail."""

    def __init__(self, model: str = "linear") -> None:
        super().__init__(daemon=True)
        self.path = f"/v2/models/{model}/infer"
        self.answers, self.failures, self.longest = 0, [], 0.0
        self.done = threading.Event()

    def run(self) -> None:
        import http.client  # noqa: PLC0415
        import socket  # noqa: PLC0415

        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]})
        while not self.done.is_set():
            begin = time.monotonic()
            try:
                connection = http.client.HTTPConnection("localhost", timeout=60)
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(60)
                connection.sock.connect("/run/edge-agent/infer.sock")
                connection.request("POST", self.path, body, {"Connection": "close"})
                answer = connection.getresponse()
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {answer.read()[:200]!r}")
                connection.close()
            except OSError as error:
                self.failures.append(repr(error))
            self.answers += 1
            self.longest = max(self.longest, time.monotonic() - begin)
            time.sleep(0.02)


def service() -> None:
    """Install, use, again, upgrade, an upgrade that cannot run, uninstall, install again, purge."""
    run("rm", "-rf", "/var/lib/edge-agent", "/var/lib/edge-agent-link")  # the machine that we are made of may have some
    seen["before"] = files()
    seen["install"] = install("wheels-0.1.0")
    seen["states"] = states()
    seen["core"] = show(CORE, "User", "Slice", "CPUWeight", "MemoryMax", "MemoryHigh", "DropInPaths", "NRestarts")
    seen["link"] = show(LINK, "User", "Slice", "CPUWeight", "MemoryMax", "NRestarts")
    seen["detect"] = agent("detect")
    seen["doctor"] = agent("doctor")
    seen["added"] = agent("models", "add", str(HERE / "linear.onnx"))
    seen["answer"] = infer()
    pid = show(CORE, "MainPID")
    seen["again"] = install("wheels-0.1.0")
    seen["left alone"] = pid == show(CORE, "MainPID")
    Path("/etc/edge-agent/config.toml").write_text("[log]\nlevel = 'debug'\n")
    before = state()
    asking = Asking()
    asking.start()
    seen["upgrade"] = install("wheels-0.1.1")
    asking.done.set()
    asking.join()
    seen["asked"] = [asking.answers, asking.failures, asking.longest]
    seen["version"] = agent("status")["json"]
    seen["answer after upgrade"] = infer()
    seen["state kept"] = before == state() and bool(before)
    seen["config kept"] = Path("/etc/edge-agent/config.toml").read_text()
    seen["bad upgrade"] = install("wheels-0.1.2")
    seen["version after bad upgrade"] = agent("status")["json"]
    seen["current"] = [os.readlink(f"/opt/edge-agent/{name}") for name in ("current", "previous")]
    seen["answer after bad upgrade"] = infer()
    damage()
    seen["uninstall"] = uninstall()
    seen["left"] = files()
    seen["state after uninstall"] = before == state()
    seen["uninstall again"] = uninstall()
    seen["installed again"] = install("wheels-0.1.1")
    seen["answer of what was kept"] = infer()
    seen["purge"] = uninstall("--purge")
    seen["left after purge"] = files()
    seen["users after purge"] = [line for line in Path("/etc/passwd").read_text().split() if "edge-agent" in line]


def package() -> None:
    """A package: installed, used, installed over itself, removed, installed again, purged."""
    run("rm", "-rf", "/var/lib/edge-agent", "/var/lib/edge-agent-link")
    deb = next((HERE / "deb").glob("*.deb"))
    seen["before"] = files()
    seen["install"] = run("dpkg", "-i", deb)
    seen["states"] = states()
    seen["detect"] = run("edge-agent", "detect")
    seen["doctor"] = run("edge-agent", "doctor", "--json")
    seen["added"] = package_agent("models", "add", str(HERE / "linear.tflite"))
    seen["answer"] = package_agent("infer", "linear", "-i", f"x={HERE / 'x.json'}")
    before = state()
    seen["again"] = run("dpkg", "-i", deb)
    seen["answer after upgrade"] = package_agent("infer", "linear", "-i", f"x={HERE / 'x.json'}")
    seen["script beside package"] = install("deb")
    seen["remove"] = run("dpkg", "-r", "edge-agent")
    seen["left"] = files()
    seen["state kept"] = before == state() and bool(before)
    seen["installed again"] = run("dpkg", "-i", deb)
    seen["answer of what was kept"] = package_agent("infer", "linear", "-i", f"x={HERE / 'x.json'}")
    seen["purge"] = run("dpkg", "-P", "edge-agent")
    seen["left after purge"] = files()
    seen["users after purge"] = [line for line in Path("/etc/passwd").read_text().split() if "edge-agent" in line]


def update() -> None:
    """A release by a job of the fleet, under a client; then one that dies where it is needed."""
    run("rm", "-rf", "/var/lib/edge-agent", "/var/lib/edge-agent-link")
    etc = Path("/etc/edge-agent")
    etc.mkdir(parents=True, exist_ok=True)
    for name in ("trust.toml", "root.json"):
        run("install", "-m", "644", HERE / name, etc)
    (etc / "config.toml").write_text("[update]\nsettle_s = 3\nwithin_s = 120\n[clock]\ntrust = 'always'\n")
    seen["install"] = install("wheels-0.3.0")
    seen["added"] = agent("models", "add", str(HERE / "m.edgemodel"))
    seen["answer"] = agent("infer", "m", "-i", f"x={HERE / 'x.json'}")["json"]
    asking = Asking("m")
    asking.start()
    seen["good"] = given("0.3.1", "j1")
    asking.done.set()
    asking.join()
    seen["asked"] = [asking.answers, asking.failures, asking.longest]
    seen["status after good"] = agent("status")["json"]
    seen["links after good"] = links()
    seen["doctor"] = agent("doctor")["json"]
    levels = ("ok", "note", "warning", "error")
    seen["doctor after good"] = max(levels.index(row["level"]) for row in seen["doctor"]["findings"])
    seen["bad"] = given("0.3.2", "j2")
    for _ in range(60):  # the job ends with root's word, and root goes on tidying up
        if not Path("/opt/edge-agent/update/pending").exists() and states() == ["active"] * 4:
            break
        time.sleep(1)
    seen["status after bad"] = agent("status")["json"]
    seen["links after bad"] = links()
    seen["states"] = states()
    seen["environments"] = sorted(path.parent.name for path in Path("/opt/edge-agent").glob("[0-9]*/pyvenv.cfg"))
    seen["answer after bad"] = agent("infer", "m", "-i", f"x={HERE / 'x.json'}")["json"]
    seen["security"] = run("systemd-analyze", "security", "--no-pager", "edge-agent-update.service")["out"]


def given(version: str, job_id: str) -> object:
    """Bring a release on a stick with its job, and wait for the job's end; core restarts meanwhile."""
    stick = Path("/run/stick")
    run("rm", "-rf", stick)
    run("cp", "-r", HERE / "site", stick)
    run("cp", HERE / f"job-{version}.json", stick / "job.json")
    seen[f"deliver {version}"] = agent("deliver", str(stick))
    last: object = None
    for _ in range(150):
        shown = agent("jobs", "show", job_id)["json"]
        if shown is not None:
            last = shown
            if shown["state"] in ("succeeded", "failed", "rejected", "cancelled"):
                break
        time.sleep(1)
    seen[f"updater {version}"] = run("journalctl", "--no-pager", "-o", "cat", "-u", "edge-agent-update.service")["out"]
    return last


def links() -> list[str]:
    return [os.readlink(f"/opt/edge-agent/{name}") for name in ("current", "previous", "steady")]


def package_agent(*arguments: str) -> dict[str, object]:
    answer = run("/usr/bin/edge-agent", *arguments, "--json")
    answer["json"] = json.loads(str(answer["out"])) if answer["out"] else None
    return answer


def damage() -> None:
    """What doctor says of a service in which things are wrong."""
    run("systemctl", "disable", "edge-agent.target")
    run("chmod", "0666", "/run/edge-agent/infer.sock")
    path = Path("/etc/systemd/system/edge-agent-link.service")
    path.write_text(path.read_text() + "# mine\n")
    Path("/etc/systemd/system/edge-agent-core.service.d/50-device.conf").unlink()
    seen["doctor of damage"] = agent("doctor")
    # What the first start of a device from an image does.
    seen["device unit"] = run("systemctl", "start", "edge-agent-device.service")
    seen["drop-in"] = Path("/etc/systemd/system/edge-agent-core.service.d/50-device.conf").read_text()
    seen["limits"] = show(CORE, "MemoryMax")


if __name__ == "__main__":
    try:
        {"service": service, "package": package, "update": update}[sys.argv[1]]()
    finally:
        units = [option for unit in UNITS for option in ("-u", unit)]
        seen["journal"] = run("journalctl", "--no-pager", *units)["out"]
        (HERE / "out" / "result.json").write_text(json.dumps(seen, default=str))
