"""Targets of the bundle side: manifest, tar headers, archive, bare ONNX files, arrays."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from agent.base.errors import PeerError, UnsupportedError
from agent.bundles import archive
from agent.bundles.manifest import MAX_MANIFEST_BYTES, FileRef, Manifest, parse_manifest
from agent.bundles.ustar import BLOCK, MAX_EXTENDED_BYTES, Header, check_extended, decode_header, encode_header, padding
from tests.fuzz.target import Memory, Shape, Target, many, nested

VECTORS = Path(__file__).parents[1] / "vectors" / "bundle"

# Manifest.


def holds_manifest(_data: bytes, manifest: Manifest) -> None:
    """Written and read again it is the same; what it names can be packed."""
    written = manifest.to_json()
    if len(written) > MAX_MANIFEST_BYTES:
        return  # indented, and so too long; packing it says so
    again = parse_manifest(written)
    assert again == manifest
    assert again.to_json() == manifest.to_json()
    for ref in manifest.files():
        assert decode_header(encode_header(ref.name, ref.size)) == Header(ref.name, ref.size)
    for variant in manifest.variants:
        assert manifest.variant(variant.id) == variant


def manifest_seeds() -> list[bytes]:
    """The smallest one, and one with every field."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    file = {"name": "m.onnx", "sha256": "0" * 64, "size": 3}
    small = {
        "format": "edge-model/1", "name": "m", "version": "1.0.0", "inputs": [tensor], "outputs": [tensor],
        "variants": [{"id": "fp32", "runtime": "onnx", "precision": "fp32", "file": file}],
    }  # fmt: skip
    full: dict[str, Any] = small | {
        "version": "1.2.3-rc.1+build.5", "task": "t", "description": "ü", "license": "MIT", "labels": ["a", "b"],
        "inputs": [tensor | {"optional": True}, {"name": "y", "datatype": "BYTES", "shape": [-1], "any_rank": True}],
        "golden": {"file": file | {"name": "g.npz"}, "metric": "top1", "threshold": 0.98},
        "policy": {
            "prefer": "energy", "min_quality": 0.5, "max_latency_ms": 20,
            "cascade": {"first": "int8", "then": "fp32", "threshold": 0.7},
        },
        "cache": {"ttl_s": 60, "max_mb": 1, "prewarm": True}, "batching": {"max_size": 8, "max_delay_us": 500},
    }  # fmt: skip
    full["variants"] = [
        small["variants"][0],  # type: ignore[index]
        {
            "id": "int8", "runtime": "tflite", "precision": "int8", "derived_from": "fp32",
            "file": file | {"name": "m.tflite"},
            "technique": [{"name": "quantized", "parameters": {"bits": 8, "per": [1.5, None, {"a": False}]}}],
            "requires": {"arch": ["aarch64"], "all_features": ["dotprod"], "any_features": ["neon"],
                         "accelerator": "cuda", "min_memory_mb": 64, "runtime_version": ">=1.18"},
            "quality": {"metric": "top1", "value": 0.99}, "parameters": {"a": 1e300, "b": -0.0, "c": 10**30},
        },
    ]  # fmt: skip
    return [json.dumps(document).encode() for document in (small, full)]


def _within(old: bytes, shape: Shape, seed: int = 1) -> Shape:
    """A manifest with something grown in place of ``old``."""
    head, tail = manifest_seeds()[seed].split(old)
    return lambda size: head + shape(size) + tail


_PARAMETERS = b'{"bits": 8, "per": [1.5, null, {"a": false}]}'
_OUTPUT = b'"outputs": [{"name": "x", "datatype": "FP32", "shape": ['
_INPUT = b'{"name": "x", "datatype": "FP32", "shape": []},'
MANIFEST_SHAPES = {
    "free parameters": _within(_PARAMETERS, many(b"1,", b'{"a":[', b"1]}")),
    "free keys": _within(_PARAMETERS, many(b'"%d":0,', b"{", b'"a":0}')),
    "depth": _within(_PARAMETERS, nested(b'{"a":', b"}", core=b"0")),
    "digits": _within(_PARAMETERS, many(b"1", b'{"a":', b"}")),
    "unknown fields": many(b'"%d":0,', b"{", b'"a":0}'),
    "labels": _within(b'["a", "b"]', many(b'"a",', b"[", b'"a"]')),
    "wrong labels": _within(b'["a", "b"]', many(b"1,", b"[", b"1]")),
    "shape": _within(
        b'"outputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]', many(b"1,", _OUTPUT, b"1]}]"), 0
    ),
    "inputs": _within(b'"inputs": [', many(_INPUT, b'"inputs": ['), 0),
    "variants": _within(b'"variants": [', many(b"{},", b'"variants": ['), 0),
}

# Tar headers.


def _with_sum(block: bytes) -> bytes:
    """A header block with its checksum made right, which mutation alone would hardly do."""
    block = block[:BLOCK].ljust(BLOCK, b"\0")
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def read_header(data: bytes) -> Header:
    return decode_header(_with_sum(data))


def holds_header(data: bytes, header: Header) -> None:
    """Python's tarfile reads the same name, size and kind."""
    info = tarfile.TarInfo.frombuf(_with_sum(data), "utf-8", "surrogateescape")
    assert info.size == header.size
    if header.extended:
        assert info.type == tarfile.XHDTYPE
        return
    assert info.isreg()
    assert info.name == header.name
    assert not info.linkname


def header_seeds() -> list[bytes]:
    """As we write them, and as Python's tarfile does in GNU's way."""
    info = tarfile.TarInfo("file.onnx")
    info.size, info.uname = 700, "user"
    return [encode_header("model.json", 5), info.tobuf(tarfile.GNU_FORMAT)]


def read_records(data: bytes) -> bytes:
    check_extended(data)
    return data


def holds_records(data: bytes, _value: bytes) -> None:
    """tarfile, given these records before a plain file, still sees that file's own name and size."""
    out = io.BytesIO()
    extended = encode_header("x", len(data))
    out.write(_with_sum(extended[:156] + b"x" + extended[157:]) + data + bytes(padding(len(data))))
    out.write(encode_header("name", 3) + b"abc" + bytes(BLOCK - 3) + bytes(2 * BLOCK))
    out.seek(0)
    try:
        with tarfile.open(fileobj=out, mode="r:") as tar:
            members = [(info.name, info.size, info.isreg()) for info in tar]
    except (tarfile.TarError, ValueError):
        return  # a date or id that tarfile does not take; we never look at it
    assert members == [("name", 3, True)]


RECORDS = (
    b"30 mtime=1700000000.123456789\n",
    b"12 comment=\n",
    b"10 uid=12\n11 gid=345\n",
    b"25 LIBARCHIVE.xattr.a=bc\n",
)


# Archive.


class Dribble:
    """A source that gives at most so many bytes a read, as a pipe may."""

    def __init__(self, data: bytes, most: int) -> None:
        self._stream = io.BytesIO(data)
        self._most = most

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, self._most))


Contents = tuple[Manifest, list[tuple[FileRef, bytes]]]


def unpack(source: archive.Source) -> Contents:
    """The manifest and every file of a bundle, whole."""
    reader = archive.read(source)
    manifest = reader.read_manifest()
    return manifest, [(ref, b"".join(chunks)) for ref, chunks in reader.files()]


def mended(data: bytes) -> bytes:
    """The archive with the checksums of its headers made right, as far as headers can be found by their sizes."""
    out = bytearray(data)
    place = 0
    while place + BLOCK <= len(out) and any(out[place : place + BLOCK]):
        out[place : place + BLOCK] = _with_sum(bytes(out[place : place + BLOCK]))
        digits = bytes(out[place + 124 : place + 136]).strip(b"\0 ")
        size = int(digits, 8) if digits and set(digits) <= set(b"01234567") else 0
        place += BLOCK + size + padding(size)
    return bytes(out)


def read_archive(data: bytes) -> Contents:
    return unpack(io.BytesIO(mended(data)))


def holds_archive(data: bytes, contents: Contents) -> None:
    """However it comes in, the same; tarfile lists the same files; packed again it reads the same."""
    data = mended(data)
    for most in (7, 511, 4096):
        assert unpack(Dribble(data, most)) == contents
    manifest, files = contents
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        listed = {info.name: _content(tar, info) for info in tar}
    assert listed.pop("model.json") == _first_member(data)
    assert listed == {ref.name: content for ref, content in files}
    assert sorted(ref.name for ref, _ in files) == sorted(ref.name for ref in manifest.files())
    for ref, content in files:
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (ref.sha256, ref.size)
    out = io.BytesIO()
    archive.write(manifest, {ref.name: content for ref, content in files}, out)
    out.seek(0)
    back, again = unpack(out)
    assert back == manifest
    assert sorted((ref.name, content) for ref, content in again) == sorted(
        (ref.name, content) for ref, content in files
    )


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    assert info.isreg(), info.name
    stream = tar.extractfile(info)
    assert stream is not None
    return stream.read()


def _first_member(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        info = tar.next()
        assert info is not None
        return _content(tar, info)


def archive_seeds() -> list[bytes]:
    """The vectors that are small, and a bundle made by tarfile with dated members."""
    seeds = [path.read_bytes() for path in sorted(VECTORS.glob("*.edgemodel"))]
    contents = unpack(io.BytesIO((VECTORS / "double.edgemodel").read_bytes()))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("model.json", contents[0].to_json()), *((ref.name, data) for ref, data in contents[1])):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000.5
            tar.addfile(info, io.BytesIO(content))
    return [*seeds, out.getvalue()]


def _big_archive(size: int) -> bytes:
    document = json.loads(manifest_seeds()[0])
    content = bytes(size)
    document["variants"][0]["file"] |= {"sha256": hashlib.sha256(content).hexdigest(), "size": size}
    out = io.BytesIO()
    archive.write(parse_manifest(json.dumps(document).encode()), {"m.onnx": content}, out)
    return out.getvalue()


_REFUSED = (PeerError, UnsupportedError)
DOUBLE = VECTORS / "double.edgemodel"
TARGETS = (
    Target(
        "manifest", parse_manifest, holds_manifest, (PeerError,), manifest_seeds, "manifest", MANIFEST_SHAPES,
        most_bytes=8192, memory=Memory(2 << 20, 400),
    ),
    Target("tar-header", read_header, holds_header, (PeerError,), header_seeds, "tar-header", most_bytes=BLOCK),
    Target(
        "tar-records", read_records, holds_records, (PeerError,), lambda: RECORDS, "tar-records",
        {"records": many(b"10 uid=12\n"), "digits": many(b"1")}, grown=MAX_EXTENDED_BYTES,
    ),
    Target(
        "archive", read_archive, holds_archive, _REFUSED, archive_seeds, "archive",
        {"one file": _big_archive, "zeros after the end": lambda size: DOUBLE.read_bytes() + bytes(size)},
        most_bytes=16384, memory=Memory(4 << 20, 100),
    ),
)  # fmt: skip
