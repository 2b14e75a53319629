"""The published C2SP CCTV age vectors, fetched with npm: those kept here are theirs, and of the others none is opened.

Fetched once into ``.cache/cctv/``. Without npm or a registry the test is skipped; the vectors kept in
``tests/vectors/store/cctv-age.json`` run always (``test_age.py``).
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest

from agent.store import age, stream
from agent.store.age import AgeError, Identity

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, VERSION = "cctv-age", "0.2.0"
KEPT = json.loads((ROOT / "tests" / "vectors" / "store" / "cctv-age.json").read_text())["vectors"]
#: What the store does not read: text armour, passphrases, recipients of other kinds.
NOT_READ = re.compile(r"(armor|scrypt|hybrid)(_|$)")


@pytest.fixture(scope="module")
def published() -> dict[str, str]:
    """Every vector of the package by name, as base64."""
    folder = ROOT / ".cache" / "cctv"
    archive = folder / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"no npm to fetch {PACKAGE} {VERSION} with")
        folder.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(
            [npm, "pack", "--fetch-retries=0", "--fetch-timeout=20000", f"{PACKAGE}@{VERSION}"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if fetched.returncode or not archive.exists():
            said = (fetched.stderr.strip().splitlines() or ["it said nothing"])[-1]
            pytest.skip(f"npm cannot fetch {PACKAGE} {VERSION}: {said[:200]}")
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/index.js")
        assert member is not None
        text = member.read().decode()
    return dict(re.findall(r'var (\w+)_default = __toBinary\("([A-Za-z0-9+/=]+)"\)', text))


def parts(vector: str) -> tuple[dict[str, list[str]], bytes]:
    """Its keys, and the file."""
    head, _, body = base64.b64decode(vector).partition(b"\n\n")
    keys: dict[str, list[str]] = {}
    for line in head.decode().split("\n"):
        key, value = line.split(": ", 1)
        keys.setdefault(key, []).append(value)
    return keys, zlib.decompress(body) if keys.get("compressed") == ["zlib"] else body


def test_the_vectors_kept_here_are_the_published_ones_and_all_that_apply(
    published: dict[str, str],
) -> None:
    assert len(published) > 140
    assert published == {**published, **KEPT}
    assert {name for name in published if name not in KEPT and not NOT_READ.match(name)} == set()


def test_what_the_store_does_not_read_it_refuses(published: dict[str, str]) -> None:
    """Whatever keys are at hand: a passphrase beside a recipient above all, which must not open by the recipient."""
    tried = 0
    for name in sorted(set(published) - set(KEPT)):
        keys, data = parts(published[name])
        identities = [Identity.parse(text) for text in keys.get("identity", []) if text.startswith("AGE-SECRET-KEY-1")]
        # Armour may come first or last on the way: the vector is the text that a reader of files would get.
        with pytest.raises(AgeError):
            b"".join(stream.decrypt_file(identities, io.BytesIO(data).read))
        tried += bool(identities)
    assert tried >= 10
    keys, data = parts(published["scrypt_and_x25519"])
    with pytest.raises(AgeError, match="stands alone"):
        age.open_header(age.parse_header(data), [Identity.parse(text) for text in keys["identity"]])
