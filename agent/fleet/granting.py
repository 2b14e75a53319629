"""What a job needs to install a published version on one device: the keys of its files, sealed to that device.

Invariants: a device gets keys only of what it can use, as far as that is known; a revoked one gets none; a device that
has not said to whom they may be sealed is told to be so, rather than given a job that would fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.base.errors import RefusedError
from agent.bundles.manifest import Manifest, parse_manifest
from agent.fleet.books import Books
from agent.fleet.fit import usable_variants
from agent.fleet.publishing import grants_for
from agent.fleet.registry import Device
from agent.store.age import AgeError, Identity, Recipient


def install_arguments(
    books: Books, identity: Identity, name: str, version: str, device: Device, told: str | None = None
) -> dict[str, Any]:
    """``grants`` for ``model.install`` on that device. RefusedError, NotFoundError, DamagedError.

    ``told``: the device's grant key (``age1…``), as a person brings it of a device that was never online.
    """
    what = f"cannot give '{device.name}' {name} {version}"
    if device.revoked is not None:
        raise RefusedError(
            f"{what}: the device was revoked on {device.revoked}", hint="edge-fleet devices revoke NAME --undo"
        )
    word = books.words.word(device.name, "info")
    if word is None and told is None:
        raise RefusedError(
            f"{what}: the device has said nothing since its enrolment",
            hint="try again when it was online once, or give the key that it shows by --grant-key",
        )
    info = {} if word is None else word.payload
    recipient = _recipient(what, info if told is None else {"grant": [told]})
    parts = None
    release = books.releases.find(name, version)
    if release is not None:
        manifest = parse_manifest(release.manifest)
        parts = _parts(what, manifest, info)
    grants = grants_for(books, identity, name, version, device, recipient, parts)
    return {"grants": {part: grant.document() for part, grant in grants.items()}}


def _recipient(what: str, info: Mapping[str, Any]) -> bytes:
    """The device's grant key that is in use."""
    told = info.get("grant")
    if not isinstance(told, list) or not told:
        raise RefusedError(
            f"{what}: the device has not said to whom a grant may be sealed", hint="update its agent, or wait for it"
        )
    try:
        return Recipient.parse(str(told[0])).public
    except AgeError as error:
        raise RefusedError(f"{what}: {error}") from error


def _parts(what: str, manifest: Manifest, info: Mapping[str, Any]) -> list[str]:
    """The files of the variants that the device can run, and the golden set."""
    usable = usable_variants(manifest, info)
    chosen = [variant.file.name for variant in manifest.variants if usable is None or variant.id in usable]
    if not chosen:
        raise RefusedError(f"{what}: none of its variants can run there", hint="edge-fleet fit tells why")
    golden = [manifest.golden.file.name] if manifest.golden is not None else []
    return list(dict.fromkeys([*chosen, *golden]))
