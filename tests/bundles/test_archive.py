"""A bundle travels as one file: written the same every time, read as a stream, and anything else refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.base.errors import NotFoundError, PeerError, TooLargeError
from agent.bundles import archive
from agent.bundles.manifest import FileRef, Golden, Manifest, TensorSpec, Variant, parse_manifest
from agent.bundles.ustar import decode_header, encode_header

FP32, INT8, GOLDEN = os.urandom(700_001), b"int8 weights" * 100, b"golden"


def ref(name: str, content: bytes) -> FileRef:
    return FileRef(name=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def a_manifest(**changes: object) -> Manifest:
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))
    fields: dict[str, object] = {
        "format": "edge-model/1", "name": "digits", "version": "1.0.0", "inputs": (spec,), "outputs": (spec,),
        "variants": (
            Variant(id="fp32", runtime="onnx", precision="fp32", file=ref("fp32.onnx", FP32)),
            Variant(id="int8", runtime="onnx", precision="int8", file=ref("int8.onnx", INT8)),
        ),
        "golden": Golden(file=ref("golden.npz", GOLDEN), metric="top1", threshold=0.9),
    }  # fmt: skip
    return Manifest.model_validate({**fields, **changes})


FILES = {"fp32.onnx": FP32, "int8.onnx": INT8, "golden.npz": GOLDEN}


def packed(manifest: Manifest | None = None, files: dict[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    archive.write(manifest or a_manifest(), files or FILES, out)
    return out.getvalue()


def drained(data: bytes) -> dict[str, bytes]:
    reader = archive.read(io.BytesIO(data))
    return {found.name: b"".join(chunks) for found, chunks in reader.files()}


def plain_tar(members: list[tuple[str, bytes]], end: bytes = bytes(1024)) -> bytes:
    """A tar by hand, so that it can also say what our writer never would."""
    parts = [encode_header(n, len(c)) + c + bytes(-len(c) % 512) for n, c in members]
    return b"".join(parts) + end


def members() -> list[tuple[str, bytes]]:
    return [("model.json", a_manifest().to_json()), *FILES.items()]


def resealed(header: bytes) -> bytes:
    """A header with its checksum made right again after tampering."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def test_what_was_packed_comes_out_and_two_packers_agree() -> None:
    data = packed()
    assert drained(data) == FILES
    assert archive.read(io.BytesIO(data)).read_manifest() == a_manifest()
    assert data == packed()


def test_any_tar_program_can_open_it_and_make_one(tmp_path: Path) -> None:
    (tmp_path / "a.edgemodel").write_bytes(packed())
    folder = tmp_path / "out"
    folder.mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "a.edgemodel", "-C", folder], check=True)
    assert {path.name for path in folder.iterdir()} == {"model.json", *FILES}
    names = ["model.json", "golden.npz", "fp32.onnx", "int8.onnx"]
    made = subprocess.run(["tar", "-cf", "-", "-C", folder, *names], check=True, capture_output=True).stdout
    assert drained(made) == FILES  # In another order, padded to GNU tar's record size.
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:  # Adds fractional dates.
        for name in names:
            tar.add(folder / name, arcname=name)
    assert b"mtime=" in out.getvalue()
    assert drained(out.getvalue()) == FILES


def test_a_directory_streams_through_a_pipe_in_small_pieces(tmp_path: Path) -> None:
    for name, content in members():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README").write_text("not part of the bundle")
    reading, writing = os.pipe()

    def send() -> None:
        with os.fdopen(writing, "wb") as sink:
            archive.stream_directory(tmp_path, sink)

    sender = threading.Thread(target=send)
    sender.start()
    with os.fdopen(reading, "rb", buffering=0) as source:
        reader = archive.read(source)
        manifest = reader.read_manifest()
        got = {found.name: b"".join(chunks) for found, chunks in reader.files()}
    sender.join()
    assert manifest == archive.pack_directory(tmp_path)[0]
    assert got == FILES


def test_files_left_unread_are_verified_all_the_same() -> None:
    reader = archive.read(io.BytesIO(packed()))
    assert [found.name for found, _ in reader.files()] == list(FILES)
    wrong = bytearray(packed())
    wrong[wrong.index(b"int8 weights") + 700] ^= 1
    with pytest.raises(PeerError, match=r"int8\.onnx is not the file"):
        list(archive.read(io.BytesIO(bytes(wrong))).files())


def test_a_changed_file_never_comes_out_whole() -> None:
    wrong = bytearray(packed())
    wrong[wrong.rindex(GOLDEN)] ^= 1
    for found, chunks in archive.read(io.BytesIO(bytes(wrong))).files():
        if found.name == "golden.npz":
            with pytest.raises(PeerError, match="SHA-256"):
                next(chunks)
            break


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    class Zeros:
        """A source of one huge file, made as it is read."""

        def __init__(self, head: bytes, zeros: int, tail: bytes) -> None:
            self._parts = [io.BytesIO(head), zeros, io.BytesIO(tail)]

        def read(self, size: int) -> bytes:
            while self._parts:
                first = self._parts[0]
                if isinstance(first, int):
                    self._parts[0] = first - min(first, size)
                    data = bytes(min(first, size))
                else:
                    data = first.read(size)
                if data:
                    return data
                self._parts.pop(0)
            return b""

    size = 64 << 20
    digest = hashlib.sha256(bytes(size)).hexdigest()
    big = FileRef(name="big.onnx", sha256=digest, size=size)
    manifest = a_manifest(variants=(Variant(id="a", runtime="onnx", precision="fp32", file=big),), golden=None)
    head = plain_tar([("model.json", manifest.to_json())], end=b"") + encode_header("big.onnx", size)
    tracemalloc.start()
    count = sum(len(c) for _, chunks in archive.read(Zeros(head, size, bytes(1024))).files() for c in chunks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == size
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("starts with nothing", bytes(1024)),
        ("starts with 'fp32.onnx'", plain_tar(members()[1:] + members()[:1])),
        ("holds 'extra.onnx' though", plain_tar([*members(), ("extra.onnx", b"")])),
        ("holds 'int8.onnx' a second time", plain_tar([*members(), ("int8.onnx", INT8)])),
        ("holds 'model.json' though", plain_tar([*members(), members()[0]])),
        ("golden.npz missing", plain_tar(members()[:-1])),
        ("fp32.onnx, golden.npz, int8.onnx missing", plain_tar(members()[:1])),
        ("int8.onnx has 3 bytes, the manifest says 1200", plain_tar([*members()[:2], ("int8.onnx", b"abc")])),
        ("holds '../int8.onnx' though", plain_tar([*members()[:2], ("../int8.onnx", INT8)])),
        ("holds '/etc/passwd' though", plain_tar([*members()[:2], ("/etc/passwd", b"")])),
        ("holds './int8.onnx' though", plain_tar([*members()[:2], ("./int8.onnx", INT8)])),
        ("something follows its end", plain_tar(members()) + b"x"),
        ("something follows its end", plain_tar(members()) + plain_tar(members())),
        ("something follows its end", plain_tar(members()) + bytes(2 << 20)),
        ("malformed end mark", plain_tar(members(), end=bytes(512) + b"x" * 512)),
        ("ends inside the end mark", plain_tar(members(), end=bytes(512))),
        ("ends inside the next header", plain_tar(members(), end=b"")),
    ],
)
def test_a_bundle_that_is_not_what_its_manifest_says_is_refused(what: str, data: bytes) -> None:
    with pytest.raises(PeerError, match=what):
        drained(data)


@pytest.mark.parametrize(
    ("what", "kind"),
    [("a hard link", b"1"), ("a symbolic link", b"2"), ("a character device", b"3"), ("a block device", b"4"),
     ("a directory", b"5"), ("a FIFO", b"6"), ("a GNU long name", b"L"), ("a sparse file", b"S"),
     ("a global extended header", b"g"), ("an unknown kind", b"?")],
)  # fmt: skip
def test_nothing_but_regular_files_belongs_in_it(what: str, kind: bytes) -> None:
    header = encode_header("fp32.onnx", len(FP32))
    tampered = resealed(header[:156] + kind + header[157:])
    with pytest.raises(PeerError, match=what):
        drained(plain_tar(members()[:1], end=b"") + tampered)


def extended(records: bytes) -> bytes:
    header = encode_header("pax", len(records))
    return resealed(header[:156] + b"x" + header[157:]) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    ("what", "records"),
    [("sets 'path'", b"18 path=../../x.x\n"), ("sets 'size'", b"12 size=999\n"), ("malformed", b"99 mtime=1\n"),
     ("malformed", b"mtime=1\n"), ("malformed", b"0 mtime=1\n"), ("sets 'GNU.sparse", b"22 GNU.sparse.major=1\n"),
     ("extended header of 9000 bytes", bytes(9000))],
)  # fmt: skip
def test_extended_headers_may_date_a_file_and_nothing_else(what: str, records: bytes) -> None:
    with pytest.raises(PeerError, match=what):
        drained(plain_tar(members()[:1], end=b"") + extended(records) + plain_tar(members()[1:]))


def test_extended_headers_do_not_pile_up() -> None:
    dated = extended(b"11 mtime=1\n")
    assert drained(plain_tar(members()[:1], end=b"") + dated + plain_tar(members()[1:])) == FILES
    with pytest.raises(PeerError, match="two extended headers"):
        drained(plain_tar(members()[:1], end=b"") + dated * 2 + plain_tar(members()[1:]))
    with pytest.raises(PeerError, match="malformed end mark"):
        drained(plain_tar(members(), end=b"") + dated + bytes(1024))


@pytest.mark.parametrize(
    ("what", "change"),
    [("checksum", lambda h: h[:100] + b"x" + h[101:]),
     ("not of the ustar format", lambda h: resealed(h[:257] + bytes(8) + h[265:])),
     ("not plain octal", lambda h: resealed(h[:124] + b"\x80" + bytes(10) + b"\x01" + h[136:])),
     ("not plain octal", lambda h: resealed(h[:124] + b"-0000000001\0" + h[136:])),
     ("goes on after its end", lambda h: resealed(h[:50] + b"x" + h[51:])),
     ("not plain", lambda h: resealed(b"\xff" + h[1:])),
     ("a folder", lambda h: resealed(h[:345] + b"etc" + h[348:])),
     ("link target", lambda h: resealed(h[:157] + b"x" + h[158:]))],
)  # fmt: skip
def test_a_header_with_a_second_meaning_is_refused(what: str, change: object) -> None:
    header = change(encode_header("fp32.onnx", len(FP32)))  # type: ignore[operator]
    with pytest.raises(PeerError, match=what):
        drained(plain_tar(members()[:1], end=b"") + header + FP32)


def test_hidden_bytes_between_files_are_refused() -> None:
    data = bytearray(plain_tar(members()))
    data[data.index(INT8) + len(INT8)] = 1
    with pytest.raises(PeerError, match="hidden bytes"):
        drained(bytes(data))


def test_a_huge_manifest_is_refused_unread() -> None:
    with pytest.raises(TooLargeError, match=r"model\.json has 2000000 bytes"):
        drained(encode_header("model.json", 2_000_000))


def test_a_manifest_that_no_reader_takes_is_not_packed() -> None:
    variant = a_manifest().variants[0].model_copy(update={"parameters": {"scales": [1] * 200_000}})
    with pytest.raises(TooLargeError, match=r"cannot pack digits: model\.json has"):
        packed(a_manifest(variants=(variant,), golden=None))


def test_a_device_number_that_no_other_reader_takes_is_refused() -> None:
    """Python's tarfile ends its listing there without a word; large numbers as GNU tar writes them are fine."""
    header = encode_header("model.json", 5)
    for field, holds in ((b"\x80\0\0\0\0\x7f\xff\xff", True), (b"       \0", True), (b"@000000\0", False)):
        blank = header[:108] + field + header[116:148] + b" " * 8 + header[156:]
        block = blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]
        if holds:
            assert decode_header(block).name == "model.json"
        else:
            with pytest.raises(PeerError, match="not plain octal"):
                decode_header(block)


WHOLE = plain_tar([("model.json", a_manifest(golden=None, variants=a_manifest().variants[1:]).to_json()),
                   ("int8.onnx", INT8)])  # fmt: skip


@given(st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60, deadline=None)
def test_cut_anywhere_it_is_refused(length: int) -> None:
    with pytest.raises(PeerError):
        drained(WHOLE[:length])


@given(st.integers(0, len(WHOLE) - 1025), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_is_refused_or_harmless(position: int, flip: int) -> None:
    changed = WHOLE[:position] + bytes([WHOLE[position] ^ flip]) + WHOLE[position + 1 :]
    try:
        got = drained(changed)
    except PeerError:
        return
    assert got == {"int8.onnx": INT8}  # A flip inside a text of the manifest may go unseen: it is not signed here.


def test_packing_refuses_a_folder_that_differs_from_its_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no model\.json"):
        archive.pack_directory(tmp_path)
    for name, content in members():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "int8.onnx").write_bytes(b"y" + INT8[1:])
    with pytest.raises(PeerError, match=r"int8\.onnx is not the file"):
        archive.pack_directory(tmp_path)
    (tmp_path / "int8.onnx").write_bytes(INT8 + b"y")
    with pytest.raises(PeerError, match=r"int8\.onnx has 1201 bytes"):
        archive.read_directory(tmp_path)
    (tmp_path / "int8.onnx").unlink()
    with pytest.raises(NotFoundError, match=r"int8\.onnx missing"):
        archive.read_directory(tmp_path)
    os.mkfifo(tmp_path / "int8.onnx")
    with pytest.raises(PeerError, match="not a regular file"):
        archive.read_directory(tmp_path)


def test_a_file_that_two_variants_share_travels_once() -> None:
    first, second = a_manifest().variants
    twin = second.model_copy(update={"id": "twin", "requires": second.requires.model_copy(update={"arch": ("arm64",)})})
    manifest = a_manifest(variants=(first, second, twin))
    assert packed(manifest).count(b"int8 weights" * 100) == 1
    assert drained(packed(manifest)) == FILES


def test_a_manifest_survives_its_json() -> None:
    cascade = {"first": "int8", "then": "fp32", "threshold": 0.8, "measure": "margin"}
    manifest = a_manifest(labels=("a", "b"), policy={"prefer": "accuracy", "cascade": cascade})
    assert parse_manifest(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"first": "int4"}, "there is no variant int4"),
        ({"first": "fp32"}, "the same variant"),
        ({"output": "z"}, "there is no output z"),
        ({"threshold": 1.5}, "threshold"),
        ({"measure": "gut feeling"}, "measure"),
        ({"third": "x"}, "third"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused(change: dict[str, object], text: str) -> None:
    cascade = {"first": "int8", "then": "fp32", "threshold": 0.8} | change
    with pytest.raises(ValueError, match=text):
        a_manifest(policy={"cascade": cascade})


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x00", "\x9b", "\r"])
def test_texts_that_would_steer_a_terminal_are_refused(character: str) -> None:
    plain = {
        "format": "edge-model/1", "name": "m", "version": "1.0.0", "description": "two\nlines\tand a tab",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}],
        "variants": [
            {
                "id": "v", "runtime": "onnx", "precision": "fp32",
                "file": {"name": "v.onnx", "sha256": "0" * 64, "size": 1},
            }
        ],
    }  # fmt: skip
    parse_manifest(json.dumps(plain).encode())
    hostile = f"a{character}[2Jb"
    for change in (
        {"task": hostile}, {"license": hostile}, {"description": hostile}, {"labels": [hostile]},
        {"inputs": [{"name": hostile, "datatype": "FP32", "shape": [1]}]},
    ):  # fmt: skip
        with pytest.raises(PeerError, match=next(iter(change))):
            parse_manifest(json.dumps({**plain, **change}).encode())
