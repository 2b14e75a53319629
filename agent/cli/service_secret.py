"""Of an installed service: where its secret is, whether that can be opened, and who else could."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agent.cli.credstore import FOLDER, LOST_MEND, NAMES, has_tpm
from agent.cli.sealing import Sealed
from agent.cli.service import Machine
from agent.core.health import Finding
from agent.store.keys import CREDENTIAL_NEXT, NAME
from agent.store.seals import kind_of

_HOST_KEY = "var/lib/systemd/credential.secret"


def check_secret(machine: Machine) -> Iterator[Finding]:
    """The credentials; that a secret is in a file tells core, which has it."""
    root, opened = machine.root, machine.secrets()
    kinds = {}
    for name in NAMES:
        yield from _plain(root, name)
        try:
            kinds[name] = kind_of((root / FOLDER / name).read_text(errors="replace"))
        except FileNotFoundError:
            continue
        except PermissionError:
            yield Finding("credential", "note", f"could not look at /{FOLDER}", "run doctor as root")
            break
        yield from _one(name, opened.get(name, Sealed(kinds[name], "")))
    if NAME in kinds and CREDENTIAL_NEXT in kinds:
        yield Finding("credential", "warning", "moving the device secret was cut off", "edge-agent seal ends it")
    if kinds.get(NAME) == "host":
        yield from _host(root)
    elif kinds.get(NAME) == "tpm2" and opened.get(NAME) is not None and opened[NAME].key_id is not None:
        yield Finding("credential", "ok", "sealed by the TPM, and it opens")
    yield from _folder(root)


def _plain(root: Path, name: str) -> Iterator[Finding]:
    if os.path.lexists(root / "etc/credstore" / name):
        mend = "systemd-creds encrypt it into /etc/credstore.encrypted, then shred it"
        yield Finding("credential", "warning", f"/etc/credstore/{name} is not encrypted, and core ignores it", mend)


def _one(name: str, sealed: Sealed) -> Iterator[Finding]:
    shown = f"/{FOLDER}/{name}"
    if sealed.kind == "empty":
        mend = f"systemd-creds encrypt --name={name} --with-key=host, or rotate to a new secret"
        yield Finding("credential", "error", f"{shown} is sealed with an empty key, which anybody has", mend)
    elif sealed.key_id is None:
        mend = LOST_MEND if name == NAME else f"edge-agent seal; if core does not start, rm {shown}"
        yield Finding("credential", "error", sealed.reason or f"cannot open {shown}", mend)
    elif sealed.kind == "other":
        yield Finding("credential", "note", f"{shown} is sealed with something that is not known here", "")


def _host(root: Path) -> Iterator[Finding]:
    if has_tpm(root):
        text = "the secret is sealed by the key of this machine, and there is a TPM"
        yield Finding("credential", "note", text, "edge-agent seal --to tpm2")
    elif _one_disk(root):
        text = "sealed by the key of this machine, which is on the same disk: who takes the disk can read the models"
        yield Finding("credential", "note", text, "a TPM, or /var/lib/systemd on an encrypted disk")
    else:
        yield Finding("credential", "ok", "sealed by the key of this machine")


def _one_disk(root: Path) -> bool:
    try:
        return os.stat(root / _HOST_KEY).st_dev == os.stat(root / "var/lib/edge-agent").st_dev
    except OSError:
        return False


def _folder(root: Path) -> Iterator[Finding]:
    folder = root / FOLDER
    if folder.is_dir() and folder.stat().st_mode & 0o077:
        text = f"/{FOLDER} has mode {folder.stat().st_mode & 0o777:04o}"
        yield Finding("credential", "warning", text, f"chmod 0700 /{FOLDER}")
