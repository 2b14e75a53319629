"""Looks for plaintext of a bundle in a folder: ``leaks.py BUNDLE FOLDER``. Exit status 1 when any is found.

Samples of 24 bytes are taken from all over each file of the bundle and searched for in every byte of every file of the
folder. To show that the search can find something, the same samples are searched for in the bundle itself.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

LENGTH, COUNT = 24, 400


def samples(bundle: Path) -> dict[str, list[bytes]]:
    """Random pieces of each file, none of them monotonous."""
    from agent.bundles.archive import read

    chosen: dict[str, list[bytes]] = {}
    generator = random.Random(1)
    with bundle.open("rb") as stream:
        for ref, chunks in read(stream).files():
            data = b"".join(chunks)
            pieces = (data[at : at + LENGTH] for at in (generator.randrange(len(data) - LENGTH) for _ in range(COUNT)))
            chosen[ref.name] = [piece for piece in pieces if len(set(piece)) > 8]
    return chosen


def found(pieces: list[bytes], haystacks: list[bytes]) -> int:
    return sum(any(piece in hay for hay in haystacks) for piece in pieces)


def main() -> int:
    bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
    files = [path for path in folder.rglob("*") if path.is_file()]
    stored, plain = [path.read_bytes() for path in files], [bundle.read_bytes()]
    leaks = 0
    for name, pieces in samples(bundle).items():
        there = found(pieces, stored)
        leaks += there
        print(
            f"{name:<22}{len(pieces)} samples: {found(pieces, plain)} found in the bundle, {there} in the state folder"
        )
    size = sum(map(len, stored))
    print(f"searched {len(files)} files, {size / 1e6:.1f} MB: " + ("LEAKS" if leaks else "nothing lies in the clear"))
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
