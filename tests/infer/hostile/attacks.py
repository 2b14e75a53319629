"""What a model that got hold of the child could try, inside the confinement of a real trial."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
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


def fork():
    if os.fork() == 0:
        os._exit(0)


ATTACKS = {
    "read_file": lambda a: {"done": len(Path(a["path"]).read_bytes())},
    "list_folder": lambda a: {"done": os.listdir(a["path"])},
    "write_file": lambda a: {"done": Path(a["path"]).write_bytes(b"x")},
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
    "hang": lambda a: time.sleep(3600),
    "crash": lambda a: ctypes.string_at(0),
}


def main():
    start = json.loads(sys.argv[1])
    control = socket.socket(fileno=start["control"])
    confine(interpreter_folders(), [], Limits(start["data_bytes"], start["cpu_seconds"]))
    control.sendall(b'{"hello": true}\n')
    for line in control.makefile("rb"):
        request = json.loads(line)
        if request["op"] == "garbage":
            control.sendall(b"\x00\xff not json\n")
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
