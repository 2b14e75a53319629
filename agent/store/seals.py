"""With what a systemd credential is sealed, told from its first bytes, and how core learns it.

Core can look at no credential file: they are root's. What the unit saw when it started core is in ``MARKS`` in the run
folder, which is root's too: of each credential its name and its first bytes in base64, in words.

Source: systemd 252 to 257, src/shared/creds-util.h: the first 16 bytes name the kind of key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from agent.base.files import read_bounded
from agent.store.keys import DeviceSecret

Seal = Literal["tpm2", "host", "empty", "other"]
#: In base64, as far as these bytes alone decide.
HEAD_CHARACTERS = 21
MARKS = "seals"

_KINDS: Mapping[str, Seal] = {
    "Whxqht+dQJax1aZeCGLxm": "host",
    "DHzAexF2RZGcSwvqCLwg/": "tpm2",
    "+vfrk0HjQSyhpDb5Wik2L": "tpm2",  # bound to a signed policy as well
    "k6iUCUh0RJCQyvL8k8q1U": "tpm2",  # the host key as well
    "r0lQqEkTTrGnOEYwT/MMB": "tpm2",  # both
    "BYRp2vb1QySABUnaD46i+": "empty",  # "tpm2-absent", from 256 on "null": anybody can open it
}
_MOST_BYTES = 65536


def kind_of(sealed: str) -> Seal:
    """With what a credential is sealed, from its text."""
    return _KINDS.get("".join(sealed.split())[:HEAD_CHARACTERS], "other")


def read_marks(run_dir: Path) -> Mapping[str, Seal]:
    """What the unit saw, by the credential's name; nothing where it is no service."""
    try:
        text = read_bounded(run_dir / MARKS, _MOST_BYTES).decode(errors="replace")
    except OSError:
        return {}
    words = text.split()
    # Of two files with one name systemd takes the first.
    return {name: kind_of(head) for name, head in reversed(list(zip(words[::2], words[1::2], strict=False)))}


def place_of(secret: DeviceSecret, marks: Mapping[str, Seal]) -> str:
    """Where a secret is: ``file``, or what seals it; ``credential`` where nobody told."""
    return "file" if secret.source == "file" else marks.get(secret.name, "credential")
