"""What is not as it should be with a store, decided from values.

Pure. Levels are those of the daemon's health checks: a ``note`` is worth knowing, a ``warning`` wants mending, an
``error`` means that something does not work now.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from agent.store.document import CatalogDocument
from agent.store.keys import FILE_NEXT, DeviceSecret


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: a short code, how bad, what, and what mends it (may be empty)."""

    code: str
    level: Literal["note", "warning", "error"]
    text: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What ``diagnose`` judges: the secret in use, all that there are, folder modes by path, names of foreign files.

    ``slow``: what took the disk too long, in words.
    """

    document: CatalogDocument
    secret: DeviceSecret
    secrets: Iterable[DeviceSecret]
    notes: Iterable[str]
    modes: Mapping[str, int]
    foreign: Iterable[str]
    unreached_bytes: int
    slow: Iterable[str] = ()


def diagnose(seen: Snapshot) -> tuple[Finding, ...]:
    """All findings, none for a store in order."""
    return (*_about_keys(seen), *_about_catalog(seen), *_about_files(seen))


def _about_keys(seen: Snapshot) -> Iterable[Finding]:
    if seen.secret.weak:
        yield Finding(
            "key-weak",
            "note",
            "the device secret is a file on the same disk: who takes the disk can read the models",
            "as a service: edge-agent seal; elsewhere give core a credential 'device-secret', then rotate the key",
        )
    secrets = list(seen.secrets)
    if any(secret.name == FILE_NEXT for secret in secrets):
        yield Finding(
            "key-rotation", "warning", "a key rotation was cut off", "run 'edge-agent store rotate-key' to finish it"
        )
    elif others := [secret for secret in secrets if secret.key_id != seen.secret.key_id]:
        names = ", ".join(f"{secret.source} '{secret.name}'" for secret in others)
        yield Finding(
            "key-spare",
            "note",
            f"besides the secret in use ({seen.secret.source} '{seen.secret.name}') there is {names}",
            "run 'edge-agent store rotate-key' to move to a new one, or remove the old one after a rotation",
        )


def _about_catalog(seen: Snapshot) -> Iterable[Finding]:
    for note in seen.notes:
        yield Finding("catalog", "warning", note, "the next change writes it anew; check the disk")
    for name, model in seen.document.models.items():
        for version, entry in model.versions.items():
            for part in entry.damaged:
                yield Finding(
                    "blob-damaged",
                    "error" if version == model.active else "warning",
                    f"{name} {version}: {part} is damaged",
                    f"remove and add {name} again; 'edge-agent store verify' tells whether it is whole again",
                )


def _about_files(seen: Snapshot) -> Iterable[Finding]:
    for path, mode in seen.modes.items():
        if stat.S_IMODE(mode) & 0o077:
            yield Finding("mode", "warning", f"{path} has mode {stat.S_IMODE(mode):04o}", f"chmod go-rwx {path}")
    foreign = list(seen.foreign)
    if foreign:
        shown = ", ".join(foreign[:3]) + (" …" if len(foreign) > 3 else "")
        yield Finding("foreign", "warning", f"files that the store did not make: {shown}", "move them away")
    for text in seen.slow:
        yield Finding(
            "disk-slow",
            "warning",
            f"the disk is slow: {text}",
            "see what else uses the disk; a card or flash that has become slow is worn: replace it",
        )
    if seen.unreached_bytes:
        yield Finding(
            "unreached", "note", f"{seen.unreached_bytes} bytes that no version needs", "run 'edge-agent store gc'"
        )
