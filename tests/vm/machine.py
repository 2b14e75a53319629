"""One machine under QEMU, without any network: boot it, ask it to do something, cut its power.

Plain emulation, which works everywhere; ``EDGE_AGENT_VM_ACCEL=kvm`` uses the processor instead, where that is to be
trusted (nested it may hang). What the machine does is in ``inside.py``, which listens on a serial port of its own: one
JSON document a line, a request and its answer. No answer within its time is a failure, with the end of the console.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vm.disk import Disk, Server
from tests.vm.image import PORT, QEMU, Image

#: Emulated time is uneven: 15 to 44 seconds for one and the same boot, more on a busy machine.
BOOT_S = 300
CALL_S = 300
MEMORY_MB = 1024


class MachineError(Exception):
    """The machine did not do what it was asked to; the text has what it said last."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What machines are made of: the image, and the disk with what is to be installed."""

    image: Image
    artefacts: Path


class Machine:
    """``disk`` is the machine's own afterwards: what it wrote is there for the next boot. ``tpm``: swtpm's socket."""

    def __init__(self, kit: Kit, disk: Disk, *, tpm: Path | None = None) -> None:
        self.kit, self.disk, self._tpm = kit, disk, tpm
        self.boots = 0
        self.boot_s: list[float] = []
        self.said: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0
        self._left = ExitStack()

    @property
    def is_on(self) -> bool:
        """Whether it has power."""
        return self._process is not None

    # -- power ---------------------------------------------------------------------------------------------------------

    def boot(self) -> dict[str, Any]:
        """Switch on; what the machine says first, once it listens."""
        begin = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="ea-vm-"))
        self._left.callback(shutil.rmtree, self._folder)
        self._left.callback(Server(self.disk, self._folder / "disk").join)
        with socket.socket(socket.AF_UNIX) as listening, (self._folder / "qemu").open("wb") as said:
            listening.bind(str(self._folder / "port"))
            listening.listen(1)
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            listening.settimeout(30)
            try:
                self._port = self._left.enter_context(listening.accept()[0])
            except TimeoutError:
                raise MachineError(f"QEMU does not start: {self._last_words()}") from None
        self._received = b""
        self.said = self._line(BOOT_S)
        self.boots += 1
        self.boot_s.append(round(time.monotonic() - begin, 1))
        return self.said

    def cut(self, chance: random.Random, survives: float) -> int:
        """Pull the plug. How many blocks were lost that had been written and not flushed."""
        self._process_of().kill()
        self._gone()
        return self.disk.cut(chance, survives)

    def power_off(self) -> None:
        """As a person does who has the time."""
        self.tell("run", command=["systemctl", "--no-block", "poweroff"])
        self._ended(BOOT_S)

    def off(self) -> None:
        """Away with it, if it still runs; what it wrote remains."""
        if self._process is not None:
            self._process.kill()
            self._gone()

    def _ended(self, seconds: float) -> None:
        try:
            self._process_of().wait(seconds)
        except subprocess.TimeoutExpired:
            raise MachineError(f"it does not power off: {self._last_words()}") from None
        self._gone()
        self.disk.flush()

    def _gone(self) -> None:
        self._process_of().wait()
        self._process = None
        self._left.close()

    def _process_of(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise MachineError("the machine is off")
        return self._process

    # -- speech --------------------------------------------------------------------------------------------------------

    def do(self, name: str, *, timeout: float = CALL_S, **arguments: Any) -> Any:
        """Ask for something that ``inside.py`` knows, and wait for what comes of it."""
        return self.result(self.tell(name, **arguments), timeout)

    def tell(self, name: str, **arguments: Any) -> int:
        """Ask, and do not wait."""
        self._asked += 1
        line = json.dumps({"id": self._asked, "do": name, "with": arguments})
        self._port.sendall(line.encode() + b"\n")
        return self._asked

    def result(self, asked: int, timeout: float = CALL_S) -> Any:
        """What came of it. TimeoutError when nothing did in that time."""
        answer = self._line(timeout)
        if answer.get("id") != asked:
            raise MachineError(f"an answer to something else: {answer}")
        if "trouble" in answer:
            raise MachineError(f"{answer['trouble']}")
        return answer["result"]

    def came(self, seconds: float) -> bool:
        """Whether an answer begins within that time."""
        try:
            self._fill(time.monotonic() + seconds)
        except TimeoutError:
            return b"\n" in self._received
        return True

    def wait_until(self, what: str, holds: Callable[[], bool], seconds: float = CALL_S) -> float:
        """Look until it holds; the seconds that this took."""
        begin = time.monotonic()
        while not holds():
            if time.monotonic() > begin + seconds:
                raise MachineError(f"not within {seconds} s: {what}")
            time.sleep(0.5)
        return round(time.monotonic() - begin, 1)

    def _line(self, timeout: float) -> dict[str, Any]:
        try:
            self._fill(time.monotonic() + timeout)
        except TimeoutError:
            raise TimeoutError(f"no answer for {timeout} s: {self._last_words()}") from None
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fill(self, deadline: float) -> None:
        while b"\n" not in self._received:
            self._port.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._port.recv(1 << 16)
            if not data:
                raise MachineError(f"the machine is gone: {self._last_words()}")
            self._received += data

    def _last_words(self) -> str:
        texts = [(self._folder / name).read_bytes()[-1500:] for name in ("qemu", "console")
                 if (self._folder / name).exists()]  # fmt: skip
        return b"\n".join(texts).decode(errors="replace")

    # -- QEMU ----------------------------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        arch, folder = self.kit.image.arch, self._folder
        accel = os.environ.get("EDGE_AGENT_VM_ACCEL", "tcg,thread=multi")
        # "max" asks emulation for pointer authentication, which alone costs arm64 half of its speed.
        cpu = "host" if accel.startswith("kvm") else {"amd64": "max", "arm64": "cortex-a72"}[arch]
        console = {"amd64": "ttyS0", "arm64": "ttyAMA0"}[arch]
        command = [
            f"qemu-system-{QEMU[arch]}", "-machine", {"amd64": "q35", "arm64": "virt"}[arch], "-accel", accel,
            "-cpu", cpu, "-smp", "2", "-m", str(MEMORY_MB), "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-nic", "none", "-serial", f"file:{folder / 'console'}",
            "-kernel", str(self.kit.image.kernel), "-initrd", str(self.kit.image.ramdisk),
            # The kernel's check of the timer counts ticks while it spins, and panics where the host is busy.
            "-append", f"console={console} no_timer_check panic=-1 quiet systemd.show_status=yes",
            "-drive", f"if=none,id=root,format=raw,cache=writeback,file=nbd:unix:{folder / 'disk'}",
            "-device", "virtio-blk-pci,drive=root",
            "-drive", f"if=none,id=artefacts,format=raw,readonly=on,file={self.kit.artefacts}",
            "-device", "virtio-blk-pci,drive=artefacts",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=port,path={folder / 'port'}",
            "-device", f"virtserialport,chardev=port,name={PORT}",
            "-device", "virtio-rng-pci",
        ]  # fmt: skip
        if self._tpm is not None:
            model = {"amd64": "tpm-crb", "arm64": "tpm-tis-device"}[arch]
            command += ["-chardev", f"socket,id=tpm,path={self._tpm}", "-tpmdev", "emulator,id=tpm,chardev=tpm"]
            command += ["-device", f"{model},tpmdev=tpm"]
        return command
