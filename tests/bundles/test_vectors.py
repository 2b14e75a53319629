"""What docs/spec/bundle.md says, pinned by files: one that every release must read and write, others none may take."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from agent.base.errors import PeerError
from agent.bundles import archive
from agent.bundles.agreement import load_golden

VECTORS = Path(__file__).parents[1] / "vectors" / "bundle"

REFUSED = {
    "cut-short": "ends inside", "digest-differs": "SHA-256 differs", "extra-file": "'more.txt' though",
    "file-missing": "golden.npz missing", "file-twice": "a second time", "folder-in-name": r"'\.\./fp32\.onnx' though",
    "link": "a symbolic link", "manifest-not-first": r"not with model\.json",
    "path-by-extended-header": "sets 'path'", "something-after-the-end": "follows its end",
    "unknown-field": "taks: Extra inputs",
}  # fmt: skip


def test_the_valid_bundle_is_read_and_written_to_the_byte() -> None:
    data = (VECTORS / "double.edgemodel").read_bytes()
    reader = archive.read(io.BytesIO(data))
    manifest = reader.read_manifest()
    files = {ref.name: b"".join(chunks) for ref, chunks in reader.files()}
    out = io.BytesIO()
    archive.write(manifest, files, out)
    assert out.getvalue() == data
    golden = load_golden(files["golden.npz"])
    np.testing.assert_array_equal(golden.outputs["y"], 2 * golden.inputs["x"])


@pytest.mark.parametrize("path", sorted(VECTORS.glob("refused-*.edgemodel")), ids=lambda path: path.stem)
def test_the_others_are_refused(path: Path) -> None:
    with path.open("rb") as stream, pytest.raises(PeerError, match=REFUSED[path.stem.removeprefix("refused-")]):
        for _ in archive.read(stream).files():
            pass


def test_each_refusal_has_its_file() -> None:
    assert {path.stem.removeprefix("refused-") for path in VECTORS.glob("refused-*")} == set(REFUSED)
