"""Fuzzes one target in this process, by atheris or by the loop of our own: ``python -m tests.fuzz.engine``.

Started by ``python -m tests.fuzz``, a process a target, since atheris ends the process that it runs in and a crash of
an extension module ends any. What was tried last lies in a file, so that a process that dies leaves its input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import sys
from pathlib import Path

#: Pure Python that does the reading for us: instrumented like our own, so that atheris sees its branches.
INSTRUMENTED = ["agent", "tomllib", "tomli", "zipfile"]
RSS_LIMIT_MB = 2048
#: Wall seconds for one input under atheris; machines may be busy.
TIMEOUT_S = 60
MOST_CORPUS = 4000


class LastInput:
    """The input that is being tried, in a file mapped into memory: written at the price of a copy."""

    def __init__(self, path: Path, most: int) -> None:
        path.write_bytes(bytes(4 + most))
        with path.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0)
        self._most = most

    def __call__(self, data: bytes) -> None:
        self._map[:4] = min(len(data), self._most).to_bytes(4, "little")
        self._map[4 : 4 + len(data)] = data

    @staticmethod
    def read(path: Path) -> bytes:
        """What a process that died tried last."""
        raw = path.read_bytes()
        return raw[4 : 4 + int.from_bytes(raw[:4], "little")]


def run_mutation(name: str, seconds: float, folder: Path, seed: int) -> int:
    """The loop of our own. 0, or 77 with the finding told on stderr and its input beside."""
    from tests.fuzz.mutation import Loop  # noqa: PLC0415
    from tests.fuzz.table import TARGETS  # noqa: PLC0415
    from tests.fuzz.target import FindingError  # noqa: PLC0415

    target = TARGETS[name]
    corpus = folder / "corpus"
    kept = [path.read_bytes() for path in sorted(corpus.iterdir())[:MOST_CORPUS]]
    last = folder / "last"
    loop = Loop(target, [*target.seeds(), *kept], seed, LastInput(last, target.most_bytes))
    try:
        result = loop.run(seconds)
    except FindingError as error:
        print(f"finding: {error}", file=sys.stderr)
        (folder / "finding").write_bytes(LastInput.read(last))
        return 77
    for data in loop.corpus:
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    told = {"executions": result.executions, "corpus": result.kept, "rss_mb": _peak_mb()}
    print("result " + json.dumps(told), file=sys.stderr)
    return 0


def run_atheris(name: str, seconds: float, folder: Path, seed: int) -> int:
    """libFuzzer with coverage of Python. Does not return: libFuzzer ends the process, with 0 or another status."""
    import atheris  # noqa: PLC0415

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.table import TARGETS  # noqa: PLC0415
        from tests.fuzz.target import check, check_memory  # noqa: PLC0415
    target = TARGETS[name]
    corpus = folder / "corpus"
    for data in target.seeds():
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    count = 0

    def test_one_input(data: bytes) -> None:
        nonlocal count
        count += 1
        (check_memory if count % 64 == 0 else check)(target, data)

    options = {
        "max_total_time": int(seconds),
        "max_len": target.most_bytes,
        "timeout": TIMEOUT_S,
        "rss_limit_mb": RSS_LIMIT_MB,
        "dict": target.words_file,
        "artifact_prefix": f"{folder}/artifact-",
        "print_final_stats": 1,
        "seed": seed,
    }
    atheris.Setup([sys.argv[0], str(corpus), *(f"-{key}={value}" for key, value in options.items())], test_one_input)
    atheris.Fuzz()
    return 0


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    """Arguments as ``python -m tests.fuzz`` gives them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("atheris", "mutation"))
    parser.add_argument("target")
    parser.add_argument("seconds", type=float)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    given = parser.parse_args()
    (given.folder / "corpus").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    run = run_atheris if given.engine == "atheris" else run_mutation
    return run(given.target, given.seconds, given.folder, given.seed)


if __name__ == "__main__":
    sys.exit(main())
