"""What the updater has others do: the installer makes environments, systemd tries them, restarts and counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.base.errors import RefusedError, TryLaterError
from agent.base.files import read_bounded
from agent.updater.ground import CURRENT, STEADY, Ground

CORE, LINK, TRY = "edge-agent-core.service", "edge-agent-link.service", "edge-agent-try.service"
TARGET = "edge-agent.target"
_DEVICE = f"/etc/systemd/system/{CORE}.d/50-device.conf"
_MAKE_S, _UNITS_S, _TRY_S, _CALL_S = 1800, 120, 400, 90
_NAME = re.compile(r"(?m)^staged: ([0-9][0-9A-Za-z.+]{0,63})$")
_EXTRAS = re.compile(r"(?m)^extras (.*)$")
_OWN_ONNX = re.compile(r"(?m)^system-site-packages yes (.+)$")


class Services(Protocol):
    """Whoever runs the agent."""

    def reload(self) -> None:
        """Unit files have changed."""
        ...

    def try_out(self, name: str) -> str:
        """Whether an environment works here: why not, empty when it does."""
        ...

    def restart(self) -> None:
        """Have core and link run what ``current`` leads to, without waiting for them. Raises TryLaterError."""
        ...

    def failures(self) -> int:
        """How often core had to be started again since ``restart``."""
        ...

    def last_words(self) -> str:
        """What core said last of why it does not start; empty where nobody knows."""
        ...

    def wait(self, seconds: float) -> bool:
        """Let time pass; whether somebody is there for whom to wait."""
        ...


@dataclass(frozen=True, slots=True)
class Installer:
    """``deploy/install.sh`` as it came with the version that can be relied on."""

    script: Path
    ground: Ground

    def make(self, wheels: Path) -> str:
        """An environment of these wheels beside those that are there, tried as far as the installer does; its name.

        RefusedError with the installer's last words.
        """
        runtime = runtime_of(self.ground)
        said = self._run("--offline", str(wheels), "--runtime", runtime, "--stage", limit_s=_MAKE_S)
        match = _NAME.search(said)
        if match is None:
            raise RefusedError(f"cannot install the release: the installer named no environment: {said[-500:]}")
        return match[1]

    def put_units(self, name: str, *, all_of_them: bool) -> None:
        """The units that belong to an environment; the updater's own only where all are meant. RefusedError."""
        self._run("--units", name, *([] if all_of_them else ["--keep-updater"]), limit_s=_UNITS_S)

    def _run(self, *arguments: str, limit_s: int) -> str:
        root = [] if self.ground.root == Path("/") else ["--root", str(self.ground.root)]
        try:
            done = subprocess.run(
                ["bash", str(self.script), *root, *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, errors="replace", timeout=limit_s, check=False,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RefusedError(f"cannot install the release: it took longer than {limit_s} s") from error
        if done.returncode:
            raise RefusedError(f"cannot install the release: {told(done.stdout)}")
        return done.stdout


def runtime_of(ground: Ground) -> str:
    """The runtimes of the environment in use, as the installer calls them: an update brings no other."""
    for name in (STEADY, CURRENT):
        try:
            stamp = read_bounded(ground.home / name / ".installed", 4096).decode("utf-8", "replace")
        except OSError:
            continue
        match = _EXTRAS.search(stamp)
        extras = set(match[1].split()) if match else set()
        onnx = "onnx" in extras or _OWN_ONNX.search(stamp) is not None
        found = [*(["onnx"] if onnx else []), *(["tflite"] if extras & {"litert", "tflite"} else [])]
        return ",".join(found) or "none"
    raise RefusedError(
        "cannot update the agent: it was not installed by deploy/install.sh", hint="install it by hand once"
    )


def told(output: str) -> str:
    """The reason in what a program said: its error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1][:1000]


class Systemd:
    """The running machine."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def reload(self) -> None:
        """See ``Services``."""
        self._call("daemon-reload")

    def try_out(self, name: str) -> str:
        """See ``Services``: in a unit with core's user and walls, and the devices that core may use."""
        self._ground.point("update/candidate", f"../{name}")
        dropin = Path(f"/run/systemd/system/{TRY}.d/50-device.conf")
        report = self._ground.own / "try.txt"
        report.unlink(missing_ok=True)
        dropin.parent.mkdir(parents=True, exist_ok=True)
        try:
            if Path(_DEVICE).is_file():
                shutil.copyfile(_DEVICE, dropin)
            self._call("daemon-reload")
            works = self._call("start", TRY, limit_s=_TRY_S, check=False) == 0
            if works:
                return ""
            return told(read_bounded(report, 64 << 10).decode("utf-8", "replace")) if report.exists() else "it ended"
        finally:
            shutil.rmtree(dropin.parent, ignore_errors=True)
            self._ground.point("update/candidate", None)

    def restart(self) -> None:
        """See ``Services``."""
        self._call("reset-failed", CORE, LINK, check=False)
        self._call("start", "--no-block", TARGET)  # what a release has brought new
        self._call("restart", "--no-block", CORE, LINK)

    def failures(self) -> int:
        """See ``Services``."""
        done = subprocess.run(
            ["systemctl", "show", "--property=NRestarts", "--value", CORE],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=_CALL_S, check=False,
        )  # fmt: skip
        text = done.stdout.strip()
        return int(text) if text.isdigit() else 0

    def last_words(self) -> str:
        """See ``Services``."""
        try:
            done = subprocess.run(
                ["journalctl", "--no-pager", "--output=cat", "--lines=40", f"--unit={CORE}", "_COMM=edge-agent"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace", timeout=_CALL_S,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return ""
        errors = [line for line in done.stdout.splitlines() if "rror" in line]
        return errors[-1].removeprefix("error: ")[:500] if errors else ""

    def wait(self, seconds: float) -> bool:
        """See ``Services``."""
        time.sleep(seconds)
        return True

    def _call(self, *words: str, limit_s: int = _CALL_S, check: bool = True) -> int:
        try:
            done = subprocess.run(
                ["systemctl", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, errors="replace", timeout=limit_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TryLaterError(f"cannot {words[0]} {' '.join(words[1:])}: no answer in {limit_s} s") from error
        if check and done.returncode:
            raise TryLaterError(f"cannot {' '.join(words)}: {told(done.stdout)}")
        return done.returncode


class Image:
    """A root folder in which nothing runs: environments are tried, nothing is restarted, nobody is waited for."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def reload(self) -> None:
        """See ``Services``."""

    def try_out(self, name: str) -> str:
        """See ``Services``: as the user whose core's folder is."""
        state = self._ground.state_dir
        status = state.stat()
        program = str(self._ground.home / name / "bin/python")
        done = subprocess.run(
            [program, "-I", "-m", "agent.core.proving", "--state-dir", str(state)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
            timeout=_TRY_S, check=False, cwd="/",
            user=status.st_uid if os.geteuid() == 0 else None, group=status.st_gid if os.geteuid() == 0 else None,
        )  # fmt: skip
        return told(done.stdout) if done.returncode else ""

    def restart(self) -> None:
        """See ``Services``."""

    def failures(self) -> int:
        """See ``Services``."""
        return 0

    def last_words(self) -> str:
        """See ``Services``."""
        return ""

    def wait(self, seconds: float) -> bool:
        """See ``Services``."""
        return False
