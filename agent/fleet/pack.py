"""Packing: a folder, or an fp32 model with data, becomes one ``.edgemodel`` file.

Invariants: the file appears whole or not at all; what is in it was read back from what was written into it (digests are
those of the files packed); every variant has the signature that the manifest tells apps. Operator's side only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agent.base.errors import NotFoundError, PeerError, UnsupportedError
from agent.base.files import fsync_directory, read_bounded, temporary_name
from agent.bundles import archive, bare
from agent.bundles.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRef, Manifest, Variant, parse_manifest
from agent.bundles.onnx_signature import Signature
from agent.bundles.signature import differences
from agent.bundles.tflite_signature import TfliteSignature

#: Told how far the work is: what is being done, parts done, parts in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Packed:
    """What came of packing. ``size`` in bytes; ``left_out`` maps a variant's id to the reason."""

    file: Path
    size: int
    manifest: Manifest
    left_out: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """The same for ``--json``."""
        golden = self.manifest.golden
        return {
            "file": str(self.file),
            "name": self.manifest.name,
            "version": self.manifest.version,
            "size": self.size,
            "golden": None if golden is None else {"metric": golden.metric, "threshold": golden.threshold},
            "variants": [
                {
                    "id": variant.id,
                    "precision": variant.precision,
                    "size": variant.file.size,
                    "quality": None if variant.quality is None else variant.quality.model_dump(),
                    "agreement": variant.parameters.get("agreement"),
                    "accuracy": variant.parameters.get("accuracy"),
                }
                for variant in self.manifest.variants
            ],
            "left_out": dict(self.left_out),
        }


def pack_folder(folder: Path, out: Path | None = None) -> Packed:
    """Pack the folder's ``model.json`` and the files that it names into ``out`` (default: NAME-VERSION.edgemodel).

    Digests and sizes that ``model.json`` leaves out are filled in, those that it states are verified. Raises PeerError
    and OSError.
    """
    manifest = _completed_manifest(folder)
    paths = {ref.name: folder / ref.name for ref in manifest.files()}
    for variant in manifest.variants:
        check_signature(manifest, variant, signature_of(paths[variant.file.name]))
    return write_bundle(manifest, paths, out)


def write_bundle(
    manifest: Manifest, files: Mapping[str, Path | bytes], out: Path | None, left_out: Mapping[str, str] | None = None
) -> Packed:
    """Write the bundle beside ``out`` and move it there. PeerError for files that differ from the manifest, OSError."""
    path = out if out is not None else Path(f"{manifest.name}-{manifest.version}.edgemodel")
    with _replacing(path) as stream:
        archive.write(manifest, files, stream)
    return Packed(path, path.stat().st_size, manifest, left_out or {})


def signature_of(path: Path) -> Signature | TfliteSignature:
    """The signature of an ONNX or TFLite file on disk. PeerError, UnsupportedError with the file's name, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return bare.signature_of(descriptor)
    except (PeerError, UnsupportedError) as error:
        raise type(error)(str(error).replace("model file", path.name, 1), hint=error.hint) from error
    finally:
        os.close(descriptor)


def check_signature(manifest: Manifest, variant: Variant, signature: Signature | TfliteSignature) -> None:
    """PeerError unless the variant is for the runtime that it names and takes and gives what the manifest says."""
    runtime = "tflite" if isinstance(signature, TfliteSignature) else "onnx"
    problems = differences(signature, manifest.inputs, manifest.outputs)
    if runtime != variant.runtime:
        problems.insert(0, f"its file is {runtime}, not {variant.runtime}")
    if problems:
        raise PeerError(
            f"cannot pack {manifest.name}: variant {variant.id} does not fit the manifest: {'; '.join(problems)}"
        )


def file_ref(path: Path, name: str | None = None) -> FileRef:
    """Name, digest and size of a file. PeerError where the name does not fit a bundle, OSError."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return FileRef(name=name or path.name, sha256=digest.hexdigest(), size=size)


def _completed_manifest(folder: Path) -> Manifest:
    """``model.json`` with the digests that a person leaves to the machine."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise NotFoundError(
            f"cannot pack {folder}: it has no {MANIFEST_NAME}", hint="docs/reference/manifest.md shows one"
        )
    data = read_bounded(path, MAX_MANIFEST_BYTES + 1)
    try:
        document = json.loads(data)
    except ValueError as error:
        raise PeerError(f"cannot pack {folder}: {MANIFEST_NAME}: {error}") from error
    for holder in _file_holders(document):
        entry = holder["file"]
        if isinstance(entry, str):
            entry = holder["file"] = {"name": entry}
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and not {"sha256", "size"} <= set(entry):
            _fill_in(entry, folder)
    return parse_manifest(json.dumps(document).encode())


def _file_holders(document: Any) -> Iterator[dict[str, Any]]:
    """The objects of a manifest, not yet checked, that name a file."""
    if not isinstance(document, dict):
        return
    variants = document.get("variants")
    for holder in [*(variants if isinstance(variants, list) else []), document.get("golden")]:
        if isinstance(holder, dict) and "file" in holder:
            yield holder


def _fill_in(entry: dict[str, Any], folder: Path) -> None:
    path = folder / Path(entry["name"]).name
    if path.name != entry["name"] or not path.is_file():
        raise NotFoundError(f"cannot pack {folder}: {entry['name']!r} is not a file in it")
    found = file_ref(path, name="file")  # The name is checked with the manifest, which words the problem.
    entry.setdefault("sha256", found.sha256)
    entry.setdefault("size", found.size)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when the block ends well, and is gone when it does not."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    fsync_directory(path.absolute().parent)


@contextlib.contextmanager
def scratch_folder(out: Path | None) -> Iterator[Path]:
    """A folder for intermediate files, beside the result, where there is room for it; removed at the end."""
    beside = (out if out is not None else Path("x")).absolute().parent
    with tempfile.TemporaryDirectory(prefix=".edge-fleet-", dir=beside) as folder:
        yield Path(folder)
