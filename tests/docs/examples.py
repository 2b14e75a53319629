"""Examples in pages as a reader would try them: fenced blocks, and a device on which they are typed in order.

A block whose info string has the word ``run`` is run. In ``console`` blocks the lines after ``$ `` are commands, up to
the next one follows what they print; ``sh`` and ``python`` blocks are programs that must end well. What is printed is
compared line by line, without regard to order, numbers and spaces; ``varies`` leaves only table headings and errors to
be compared, for what differs from device to device. A line ``...`` stands for lines that the page leaves out.

``edge-agent core`` is not waited for: it (re)starts the daemon, as it would in a terminal of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.core.conftest import ROOT, Agent

_FENCE = re.compile(r"^( *)```(\w+)([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_DAEMON = "edge-agent core"
#: The reader's home as the pages show it.
HOME = "/home/ann"
#: What every device prints alike: headings of tables, errors with their hints.
_FIRM = re.compile(r"error: |hint: |[A-Z][A-Z0-9]+(  +[A-Z0-9]+)+$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent, language, words, body = match.groups()
        body = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(Block(language, tuple(words.split()), body, text.count("\n", 0, match.start()) + 1))
    return found


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that a test runs."""
    return [block for block in blocks(page) if "run" in block.words]


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Commands of a console block, each with the lines that the page says it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0] + "\n" + line, [])
        elif line.strip():
            found[-1][1].append(line)
    return found


def essence(line: str) -> str:
    """A line without what differs from run to run: numbers, digests, the width of columns."""
    line = re.sub(r"sha-[0-9a-f]{12}|\b[0-9a-f]{16}\b", "N", line)
    return " ".join(re.sub(r"\d+([.,:]\d+)*", "N", line).split())


class Reader(Agent):
    """Somebody at a fresh device with a clone of the project, who types what the page says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.clone = folder / "edge-agent"
        self.clone.mkdir()
        for name in ("deploy", "systemd", "hw_profiles"):
            (self.clone / name).symlink_to(ROOT / name)
        # Few rounds: the page is tried here, not the choice.
        self.config.write_text("[selection]\nmin_rounds = 4\nmax_rounds = 4\n")
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._shell = {**os.environ, "HOME": str(folder), "PATH": programs, "EDGE_AGENT_CONFIG": str(self.config)}

    @property
    def environment(self) -> dict[str, str]:
        return {**self._shell, "PYTHONPATH": str(ROOT)}

    def read(self, page: Path) -> None:
        """Try every runnable block of a page in order."""
        for block in runnable(page):
            where = f"{page.name}:{block.line}"
            if block.language == "console":
                for command, printed in commands(block):
                    self._type(command, printed, varies="varies" in block.words, where=where)
            else:
                program = ["bash", "-e"] if block.language == "sh" else [sys.executable]
                self._program(program, block.text, where)

    def _program(self, program: list[str], text: str, where: str) -> None:
        """A script as a whole; what it exports holds afterwards, too."""
        kept = self.folder / "exported"
        if program[0] == "bash":
            text += f"\nenv -0 > {kept}\n"
        done = self._run([*program, "-c", text] if program[0] == "bash" else [*program, "-"], text)
        assert done.returncode == 0, f"{where}: {done.stdout}"
        if kept.exists():
            pairs = (entry.partition("=") for entry in kept.read_text().split("\0") if entry)
            self._shell = {name: value for name, _, value in pairs if name not in ("PYTHONPATH", "SHLVL", "_", "PWD")}
            kept.unlink()

    def _type(self, command: str, printed: list[str], *, varies: bool, where: str) -> None:
        if command == _DAEMON:
            self._daemon()
            return
        done = self._run(["bash", "-c", command])
        fails = any(line.startswith("error: ") for line in printed)
        assert (done.returncode != 0) == fails, f"{where}: $ {command}\n{done.stdout}"
        seen = {essence(line.replace(str(self.folder), HOME)) for line in done.stdout.splitlines()}
        expected = [line for line in printed if line != "..." and (not varies or _FIRM.match(line))]
        missing = [line for line in expected if essence(line) not in seen]
        assert missing == [], f"{where}: $ {command}\nprinted:\n{done.stdout}"

    def _daemon(self) -> None:
        if self.process is not None:
            self.stop()
        self.state, self.run = (Path(self._shell[f"EDGE_AGENT_{name}_DIR"]) for name in ("STATE", "RUN"))
        self.start()

    def _run(self, command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=self.clone, input=text, text=True, timeout=180, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def missing_tools(page: Path) -> list[str]:
    """Programs that the page's commands need and this machine lacks."""
    text = "".join(block.text for block in runnable(page))
    return [name for name in ("curl", "python3", "bash") if re.search(rf"\b{name}\b", text) and not shutil.which(name)]
