"""What core lets go of once it is built, and what it must not have loaded at all."""

from __future__ import annotations

import subprocess
import sys

from agent.core.memory import code_mappings

MAPS = """\
556e1a0c2000-556e1a0c3000 r-xp 00001000 fe:00 1442                       /usr/bin/python3.11
7f2a5c000000-7f2a5c021000 rw-p 00000000 00:00 0
7f2a61000000-7f2a61100000 r-xp 00000000 00:00 0
7f2a62000000-7f2a62100000 r--p 00000000 fe:00 99                         /usr/lib/with a space/libcrypto.so.3
7f2a62100000-7f2a62200000 r-xp 00100000 fe:00 99                         /usr/lib/with a space/libcrypto.so.3
7f2a62200000-7f2a62210000 rw-p 00200000 fe:00 99                         /usr/lib/with a space/libcrypto.so.3
7f2a63000000-7f2a63001000 rwxp 00000000 fe:00 77                         /usr/lib/patched.so
7f2a64000000-7f2a64001000 r-xs 00000000 00:01 5                          /memfd:code (deleted)
7f2a65000000-7f2a65001000 r-xp 00000000 fe:00 78                         /usr/lib/replaced.so (deleted)
7ffc5d5f2000-7ffc5d5f4000 r-xp 00000000 00:00 0                          [vdso]
"""


def require_works(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_code_that_stands_unchanged_in_a_file_is_let_go_of():
    assert code_mappings(MAPS) == [(0x556E1A0C2000, 0x556E1A0C3000), (0x7F2A62100000, 0x7F2A62200000)]


def test_everything_still_works_after_it_was_let_go_of():
    script = (
        "import hashlib, re\n"
        "from pathlib import Path\n"
        "from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305\n"
        "from agent.core.memory import settle\n"
        "def code():\n"
        "    mapped = re.findall(r'r-xp .* (/.*)\\n(?:.*\\n)*?Rss: +(\\d+) kB', Path('/proc/self/smaps').read_text())\n"
        "    return sum(int(size) for _, size in mapped)\n"
        "def work():\n"
        "    cipher = ChaCha20Poly1305(bytes(32))\n"
        "    return hashlib.sha256(cipher.encrypt(bytes(12), b'x' * 100000, None)).hexdigest()\n"
        "before = work()\n"
        "held = code()\n"
        "settle()\n"
        "assert code() < held, (code(), held)\n"
        "settle()\n"
        "assert work() == before\n"
    )
    require_works(script)


def test_what_is_to_stay_is_passed_over_by_collections_and_goes_all_the_same_when_nobody_wants_it_any_more():
    script = (
        "import gc\n"
        "from agent.core.memory import spare\n"
        "def made():\n"
        "    return [{'of': [number]} for number in range(50_000)]\n"
        "kept = made()\n"
        "spare()\n"
        "first = gc.get_freeze_count()\n"
        "assert first > 100_000 and len(gc.get_objects()) < 10_000, (first, len(gc.get_objects()))\n"
        "for _ in range(5):\n"
        "    kept = made()\n"
        "    spare()\n"
        "assert gc.get_freeze_count() < first + 1_000, (gc.get_freeze_count(), first)\n"
    )
    require_works(script)


def test_a_start_imports_neither_runtimes_nor_what_tries_models_nor_the_client():
    script = "import sys, agent.cli.device, agent.core.daemon; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "agent.store.store" in loaded
    assert not loaded & {
        "numpy", "onnxruntime", "psutil", "email", "zipfile", "difflib", "shutil",
        "agent.infer.trial", "agent.infer.runtimes.onnx", "agent.operations.choosing", "agent.selection.choice",
        "agent.bundles.archive", "agent.bundles.bare", "agent.client", "agent.fleet",
    }  # fmt: skip
