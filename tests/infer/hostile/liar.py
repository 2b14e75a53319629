"""A child that a hostile model has taken over: it answers what its "model" says, a JSON object by operation."""

from __future__ import annotations

import json
import os
import socket
import sys

HONEST = {
    "prepare": {"version": "1", "providers": ["CPUExecutionProvider"]},
    "load": {"load_ms": 1.0, "provider": "CPUExecutionProvider", "inputs": [], "outputs": []},
    "check": {"agreement": 1.0},
    "round": {"times": [1.0, 1.0, 1.0], "began": [1.0, 2.0, 3.0]},
    "memory": {"peak_mb": 10.0},
}


def main():
    start = json.loads(sys.argv[1])
    control = socket.socket(fileno=start["control"])
    lies = json.loads(os.pread(start["model"], 1 << 20, 0))
    control.sendall(b'{"hello": true}\n')
    for line in control.makefile("rb"):
        operation = json.loads(line)["op"]
        said = lies.get(operation) or json.dumps(HONEST[operation])
        control.sendall(said.encode() + b"\n")
