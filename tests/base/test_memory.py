"""The bound to a process's growth, in processes of their own."""

from __future__ import annotations

import subprocess
import sys


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_resident_memory_follows_what_is_touched():
    """In a process that has freed nothing which the allocator could give again."""
    (grown,) = python(
        "from agent.base.memory import resident_mb\n"
        "before = resident_mb()\n"
        "hoard = bytearray(b'x') * (64 << 20)\n"
        "print(resident_mb() - before)\n"
    )
    assert 50 < float(grown) < 100


def test_growth_beyond_what_there_is_fails_instead_of_killing_and_the_process_goes_on():
    said = python(
        "from agent.base.memory import Fence\n"
        "Fence(limit_mb=200).move()\n"
        "try:\n    bytearray(1 << 30); print('got it')\n"
        "except MemoryError:\n    print('refused')\n"
        "small = bytearray(b'x') * (32 << 20); print(len(small))\n"
    )
    assert said == ["refused", str(32 << 20)]


def test_the_bound_follows_what_the_process_holds():
    said = python(
        "import time\n"
        "from agent.base.memory import Fence\n"
        "fence, hoard = Fence(), []\n"
        "for _ in range(4):\n"
        "    fence._next = 0.0; fence.move(); hoard.append(bytearray(b'x') * (48 << 20))\n"
        "print(len(hoard))\n"
    )
    assert said == ["4"]
