"""What reading a cold model costs beside the least that it must: DESIGN's row "cold minus warm".

A cold model is decrypted from its blob into sealed memory; a warm one is there already. So the difference is one
``Store.read``. It is compared, in the same process and interleaved, with the sum of the two things that nobody can
avoid: the AEAD primitive over the same bytes (64 KiB at a time, hot buffers), and copying as many bytes from the page
cache into a fresh memory file (the faster of ``sendfile`` and read/write). The budget is a ratio of at most 1.3.

    python benchmarks/store.py [--json] [--size-mb N] [--rounds N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from agent.store.document import BlobRef
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from agent.store.stream import CHUNK_BYTES, SEALED_CHUNK_BYTES

BUDGET = 1.3
#: From MobileNetV2 as int8 (4) and fp32 (14) up. Below, a fixed cost of 0.1 to 0.2 ms a read shows.
SIZES_MB = (4, 14, 64, 256)
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="reading a cold blob beside the cipher and one copy")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--size-mb", type=int, action="append", help=f"blob size in MiB (default {SIZES_MB})")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    options = parser.parse_args()
    sizes = options.size_mb or list(SIZES_MB)
    with tempfile.TemporaryDirectory(prefix="edge-agent-bench-") as folder:
        rows = [measure(Path(folder) / str(size), size * MIB, options.rounds) for size in sizes]
    report = {"benchmark": "store", "row": "cold minus warm", "budget_ratio": BUDGET, "sizes": rows}
    report["load_average"] = os.getloadavg()[0]
    report["within_budget"] = all(row["ratio"] <= BUDGET for row in rows)
    print(json.dumps(report, indent=2) if options.json else table(report))


def measure(folder: Path, size: int, rounds: int) -> dict[str, float]:
    """One size: medians in ms over interleaved rounds, after one round that warms page cache and allocator."""
    folder.mkdir()
    data = os.urandom(MIB) * (size // MIB)
    (folder / "plain").write_bytes(data)
    with Store(folder / "store", DeviceKeys(folder / "keys"), 4 * size + (64 << 20)) as store:
        began = time.perf_counter()
        ref = store.add_blob("bench", "1.0.0", "model.onnx", [data], size)
        add_ms = 1000 * (time.perf_counter() - began)
        assert ref.sha256 == hashlib.sha256(data).hexdigest()
        del data
        copied = os.open(folder / "plain", os.O_RDONLY)
        decipher, copy = deciphering(size), faster(copy_by_sendfile, copy_by_read_write, copied)
        parts: dict[str, Callable[[], None]] = {
            "read": reading(store, ref),
            # Timed as one piece: on a busy machine a longer piece is interrupted more often than two short ones.
            "least": lambda: (decipher(), copy(copied), None)[-1],
            "aead": decipher,
            "copy": lambda: copy(copied),
        }
        # Small sizes get more rounds: their samples are short, and a busy machine's noise is not.
        times = interleaved(parts, rounds * max(1, 64 * MIB // size))
        os.close(copied)
    (folder / "plain").unlink()
    return {
        "size_mb": size // MIB,
        "rounds": rounds,
        "read_ms": round(times["read"], 3),
        "least_ms": round(times["least"], 3),
        "aead_ms": round(times["aead"], 3),
        "copy_ms": round(times["copy"], 3),
        "ratio": round(times["read"] / times["least"], 3),
        "add_mb_s": round(size / MIB / add_ms * 1000, 1),
    }


def faster(one: Callable[[int], None], other: Callable[[int], None], source: int) -> Callable[[int], None]:
    """Whichever copies ``source`` in less time."""
    times = interleaved({"one": lambda: one(source), "other": lambda: other(source)}, 7)
    return one if times["one"] <= times["other"] else other


def interleaved(parts: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each part; every round runs every part once, so that drift hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):  # the first only warms up
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            if turn:
                samples[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in samples.items()}


def reading(store: Store, ref: BlobRef) -> Callable[[], None]:
    """What a cold model costs before its runtime sees it."""

    def read() -> None:
        store.read(ref).close()

    return read


def deciphering(size: int) -> Callable[[], None]:
    """The primitive over ``size`` bytes of real ciphertext in memory, into a buffer that is used again."""
    cipher = ChaCha20Poly1305(os.urandom(32))
    count = size // CHUNK_BYTES
    nonces = [index.to_bytes(12, "big") for index in range(count)]
    block = os.urandom(CHUNK_BYTES)
    sealed = memoryview(b"".join(cipher.encrypt(nonce, block, None) for nonce in nonces))
    out = bytearray(CHUNK_BYTES)
    into = getattr(cipher, "decrypt_into", None)

    def decipher() -> None:
        for index, nonce in enumerate(nonces):
            chunk = sealed[index * SEALED_CHUNK_BYTES : (index + 1) * SEALED_CHUNK_BYTES]
            if into:
                into(nonce, chunk, None, out)
            else:
                cipher.decrypt(nonce, chunk, None)

    return decipher


def copy_by_sendfile(source: int) -> None:
    target = os.memfd_create("bench", os.MFD_CLOEXEC)
    offset = 0
    while count := os.sendfile(target, source, offset, 1 << 30):
        offset += count
    os.close(target)


def copy_by_read_write(source: int) -> None:
    target = os.memfd_create("bench", os.MFD_CLOEXEC)
    buffer = memoryview(bytearray(256 << 10))
    offset = 0
    while count := os.preadv(source, [buffer], offset):
        os.write(target, buffer[:count])
        offset += count
    os.close(target)


def table(report: dict) -> str:
    """The report for people."""
    lines = ["size MB   read ms   both ms = aead ms + copy ms   ratio (budget 1.3)   add MB/s"]
    lines += [
        f"{row['size_mb']:7d} {row['read_ms']:9.2f} {row['least_ms']:9.2f} {row['aead_ms']:9.2f} {row['copy_ms']:9.2f}"
        f" {row['ratio']:7.2f}"
        f" {row['add_mb_s']:21.0f}"
        for row in report["sizes"]
    ]
    return "\n".join([*lines, "within budget" if report["within_budget"] else "OVER BUDGET"])


if __name__ == "__main__":
    main()
