"""A release's tar: wheels with plain names and nothing else, unpacked into an empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from agent.base.errors import PeerError, RefusedError
from agent.bundles.ustar import BLOCK, decode_header, padding
from agent.trust.releases import MAX_RELEASE_BYTES, MAX_WHEELS, is_wheel

_PIECE = 1 << 20


def unpack(tar: Path, folder: Path) -> list[str]:
    """The names of the wheels, in order. RefusedError for anything that is no plain tar of wheels; OSError."""
    names: list[str] = []
    total = 0
    with tar.open("rb") as source:
        while any(block := _exactly(source, BLOCK)):
            try:
                header = decode_header(block)
            except PeerError as error:
                raise RefusedError(str(error).replace("bundle", "release")) from error
            if header.extended or not is_wheel(header.name):
                raise RefusedError(f"cannot read release: {header.name!r} is no name of a wheel")
            total += header.size
            if header.name in names or len(names) >= MAX_WHEELS or total > MAX_RELEASE_BYTES:
                raise RefusedError(f"cannot read release: {header.name} is twice in it, or too much is")
            names.append(header.name)
            _copy(source, folder / header.name, header.size)
            _exactly(source, padding(header.size))
        if any(_exactly(source, BLOCK)) or source.read(1):
            raise RefusedError("cannot read release: something follows its end")
    if sum(name.startswith("edge_agent-") for name in names) != 1:
        raise RefusedError("cannot read release: the agent's own wheel must be in it once")
    return names


def _copy(source: BinaryIO, path: Path, size: int) -> None:
    left = size
    with path.open("xb") as out:
        while left:
            piece = _exactly(source, min(left, _PIECE))
            out.write(piece)
            left -= len(piece)


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise RefusedError("cannot read release: it ends too early")
    return data
