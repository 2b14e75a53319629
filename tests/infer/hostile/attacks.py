"""What a model that got hold of the child could try, inside the confinement of a real trial."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import socket
import sys
import threading
import time
from pathlib import Path

from agent.infer.sandbox import Limits, confine, interpreter_folders

LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def thread():
    answer = []
    worker = threading.Thread(target=lambda: answer.append(42))
    worker.start()
    worker.join()
    return answer[0]


def descriptors():
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
    return targets


def eat_memory():
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1 << 20)) * 4)


def eat_shared_memory():
    hoard = []
    while True:
        hoard.append(mmap.mmap(-1, 16 << 20))
        for page in range(0, 16 << 20, 4096):
            hoard[-1][page] = 1


def eat_page_tables():
    """Read one byte of each 2 MiB of nothing: no page of its own, but a table of 4 KiB for each."""
    LIBC.mmap.restype = ctypes.c_void_p
    size, none = 4 << 30, 15  # MADV_NOHUGEPAGE
    while True:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        start = LIBC.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, flags, -1, ctypes.c_long(0))
        LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), none)
        for offset in range(0, size, 2 << 20):
            ctypes.string_at(start + offset, 1)


def many_threads():
    threading.stack_size(1 << 16)
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def after_the_answer(control):
    """Answer first, then go on: count until asked again."""
    counted = [0]

    def count():
        while True:
            counted[0] += 1

    threading.Thread(target=count, daemon=True).start()
    control.sendall(b'{"done": 0}\n')


def fork():
    if os.fork() == 0:
        os._exit(0)


def system_call(number, arguments):
    texts = [value.encode() if isinstance(value, str) else ctypes.c_long(value) for value in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *texts))


ATTACKS = {
    "system_call": lambda a: {"done": system_call(a["number"], a["arguments"])},
    "read_file": lambda a: {"done": len(Path(a["path"]).read_bytes())},
    "list_folder": lambda a: {"done": os.listdir(a["path"])},
    "write_file": lambda a: {"done": Path(a["path"]).write_bytes(b"x")},
    "write_given": lambda a: {"done": Path(f"/proc/self/fd/{a['descriptor']}").write_bytes(b"x" * a["bytes"])},
    "open_socket": lambda a: {
        "done": socket.socket(a["family"], socket.SOCK_RAW if a["family"] == 16 else socket.SOCK_STREAM)
    },
    "start_program": lambda a: {"done": os.execv("/bin/true", ["true"])},
    "fork": lambda a: {"done": fork()},
    "ptrace": lambda a: {"done": checked(LIBC.ptrace(16, a["pid"], None, None))},
    "read_memory": lambda a: {"done": os.open(f"/proc/{a['pid']}/mem", os.O_RDONLY)},
    "signal": lambda a: {"done": os.kill(a["pid"], 0)},
    "environment": lambda a: {"done": len(Path(f"/proc/{a['pid']}/environ").read_bytes())},
    "thread": lambda a: {"done": thread()},
    "own_environment": lambda a: {"names": sorted(os.environ)},
    "open_descriptors": lambda a: {"targets": descriptors()},
    "eat_memory": lambda a: eat_memory(),
    "eat_shared_memory": lambda a: eat_shared_memory(),
    "eat_page_tables": lambda a: eat_page_tables(),
    "many_threads": lambda a: many_threads(),
    "cpu_seconds": lambda a: {"done": time.process_time()},
    "hang": lambda a: time.sleep(3600),
    "crash": lambda a: ctypes.string_at(0),
}


def main():
    start = json.loads(sys.argv[1])
    control = socket.socket(fileno=start["control"])
    confine(interpreter_folders(), [], Limits(start["data_bytes"], start["cpu_seconds"], start["file_bytes"]))
    control.sendall(b'{"hello": true}\n')
    for line in control.makefile("rb"):
        request = json.loads(line)
        if request["op"] == "garbage":
            control.sendall(b"\x00\xff not json\n")
            continue
        if request["op"] == "nested":
            control.sendall(b"[" * 200_000 + b"\n")
            continue
        if request["op"] == "after_the_answer":
            after_the_answer(control)
            continue
        if request["op"] == "endless":
            with contextlib.suppress(OSError):
                while True:
                    control.sendall(b"x" * 65536)
            return
        try:
            answer = ATTACKS[request["op"]](request)
        except OSError as error:
            answer = {"refused": errno.errorcode[error.errno]}
        except MemoryError:
            answer = {"error": "out of memory", "memory": True}
        control.sendall(json.dumps(answer).encode() + b"\n")
