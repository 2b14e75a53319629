"""Whom this device obeys now, and who it is: ``trust.toml``, the enrolment in the catalog, and the identity key.

The identity is made once, at the first start with a ``trust.toml``, and is kept in the sealed catalog; the enrolment is
kept there as the signed envelope that it came in and is verified anew at each start against the key in ``trust.toml``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.base.config import LinkConfig
from agent.base.errors import AgentError, PeerError
from agent.store.document import CatalogDocument
from agent.store.store import Store
from agent.trust.allegiance import Allegiance, load, public_key, shipped_root, trusted_keys
from agent.trust.envelope import EnvelopeError, PublicKey, Signer, open_envelope
from agent.wire.messages import Enrolment, decode

_LOG = logging.getLogger("edge_agent.enrolment")


class Enroller:
    """``signer`` is the device's identity, None without a ``trust.toml``. For the event loop's thread."""

    def __init__(self, trust_file: Path, store: Store) -> None:
        self._file = trust_file
        self._store = store
        self._base: Allegiance | None = None
        #: As the file and the enrolment say, before the repository brought later keys.
        self._enrolled_as: Allegiance | None = None
        self.allegiance: Allegiance | None = None
        self.signer: Signer | None = None
        #: PEM of the certificate that the enrolment brought, for link.
        self.certificate = ""
        #: Why there is no fleet although somebody meant there to be one.
        self.problem: str = ""

    def read(self) -> None:
        """Look at the file and the catalog. A wrong file leaves the device without a fleet, and is told."""
        self.problem = self.certificate = ""
        try:
            self._base = self._enrolled_as = self.allegiance = load(self._file)
            if self._base is not None:
                self.signer = Signer(self._identity())
        except AgentError as error:
            self._base = self._enrolled_as = self.allegiance = None
            self.problem = str(error)
            _LOG.error("no fleet: %s", error)
        if self._base is None:
            return
        if self._base.device is None and (kept := self._store.document.fleet.enrolment):
            try:
                document = self._verified(base64.b64decode(kept))
                self._enrolled_as, self.certificate = self._enrolled(document), document.certificate
            except AgentError as error:  # enrolled under another key: the file was replaced, the device waits anew
                _LOG.warning("the enrolment no longer holds: %s", error)
        self.obey()

    def obey(self) -> None:
        """Obey the keys that the repository brought, where they are later than those of the enrolment."""
        known, delivery = self._enrolled_as, self._store.document.delivery
        self.allegiance = known
        if known is None or known.device is None or not delivery.job_keys:
            return
        from agent.trust.jobkeys import parse_table  # noqa: PLC0415 - most fleets publish none

        try:
            root, table = shipped_root(self._file), parse_table(delivery.job_keys.encode())
        except AgentError as error:
            _LOG.error("the repository's keys for jobs are passed over: %s", error)
            return
        is_ours = root is not None and hashlib.sha256(root).hexdigest() == delivery.root
        if is_ours and table.tenant == known.tenant and table.version > known.keys_version:
            self.allegiance = replace(known, keys=table.keys, keys_version=table.version)

    def accept(self, data: bytes, require_later: Callable[[str, str, int], None]) -> Enrolment:
        """Be enrolled by an envelope: durable when this returns. EnvelopeError, PeerError.

        ``require_later`` raises for a tenant, device and number for which the counters of jobs cannot be begun anew.
        """
        if self._base is None or self._base.device is not None:
            raise EnvelopeError("wrong_topic", "this device's trust.toml does not wait for an enrolment")
        document = self._verified(data)
        text = base64.b64encode(data).decode()
        if text == self._store.document.fleet.enrolment and self._enrolled_as is not self._base:
            return document
        known = self.allegiance.epoch if self.allegiance is not None else 0
        if document.epoch <= known:
            raise EnvelopeError(
                "old_epoch", f"it is enrolment {document.epoch}, the device has been enrolled as {known}"
            )
        require_later(document.tenant, document.device, document.epoch)
        allegiance = self._enrolled(document)

        def change(catalog: CatalogDocument) -> CatalogDocument:
            return catalog.model_copy(update={"fleet": catalog.fleet.model_copy(update={"enrolment": text})})

        self._store.commit(change)
        self._enrolled_as, self.certificate = allegiance, document.certificate
        self.obey()
        return document

    def _identity(self) -> bytes:
        """The seed of the identity key; made and committed when there is none."""
        seed = self._store.document.fleet.identity
        if seed is None:
            made = secrets.token_bytes(32).hex()

            def change(catalog: CatalogDocument) -> CatalogDocument:
                if catalog.fleet.identity is not None:
                    return catalog
                return catalog.model_copy(update={"fleet": catalog.fleet.model_copy(update={"identity": made})})

            seed = self._store.commit(change).fleet.identity
        return bytes.fromhex(seed or "")

    def _verified(self, data: bytes) -> Enrolment:
        assert self._base is not None
        assert self.signer is not None
        enroller = self._base.enroller
        keys: dict[str, PublicKey] = {} if enroller is None else {enroller.keyid: enroller}
        document = decode(open_envelope(data, Enrolment.KIND, keys).payload, Enrolment)
        if document.tenant != self._base.tenant:
            raise EnvelopeError("wrong_tenant", f"it is of tenant '{document.tenant}'")
        if document.identity != identity_text(self.signer):
            raise EnvelopeError("wrong_device", "it is for a device of another identity")
        if document.device == "claim":
            raise EnvelopeError("bad_message", "'claim' is no name of a device")
        return document

    def _enrolled(self, document: Enrolment) -> Allegiance:
        try:
            keys = trusted_keys([(key.name, key.public, key.classes) for key in document.keys])
        except (ValueError, binascii.Error) as error:
            raise PeerError(f"cannot be enrolled: {error}") from error
        version = document.keys_version or 0
        return Allegiance(document.tenant, document.device, document.epoch, keys, keys_version=version)


def identity_text(signer: Signer) -> str:
    """The public identity as it stands in messages: base64 of 32 bytes."""
    text = base64.b64encode(signer.public.raw).decode()
    public_key(text)  # the same reader that others use
    return text


def settings_state(allegiance: Allegiance | None, host: str) -> str:
    """What link is to do: ``off``, ``claim`` or ``enrolled``."""
    if allegiance is None or not host:
        return "off"
    return "enrolled" if allegiance.device is not None else "claim"


def settings_document(enroller: Enroller, config: LinkConfig, boot_nonce: str) -> dict[str, Any]:
    """What link is to do: see ``link_api``. ``version`` changes with whatever link must connect anew for."""
    allegiance = enroller.allegiance
    state = settings_state(allegiance, config.host)
    settings: dict[str, Any] = {
        "state": state,
        "tenant": allegiance.tenant if allegiance else "",
        "device": (allegiance.device or "") if allegiance else "",
        "epoch": allegiance.epoch if allegiance else 0,
        "keyid": enroller.signer.keyid if enroller.signer else "",
        "broker": _broker(config, claiming=state == "claim"),
        "outbox_mb": config.outbox_mb,
        "outbox_kib_s": config.outbox_kib_s,
        "splay_s": config.splay_s,
        "certificate": enroller.certificate or None,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return settings | {"boot_nonce": boot_nonce, "version": int(digest[:12], 16)}


def _broker(config: LinkConfig, *, claiming: bool) -> dict[str, Any]:
    """Where and as whom to connect; a device that is not enrolled has a door and a certificate of its own for that."""
    return {
        "host": (claiming and config.claim_host) or config.host,
        "port": (claiming and config.claim_port) or config.port,
        "tls": config.tls,
        "ca_file": config.ca_file,
        "cert_file": config.claim_cert_file if claiming else config.cert_file,
        "key_file": config.claim_key_file if claiming else config.key_file,
        "username": config.username,
        "password_file": config.password_file,
        "keepalive_s": config.keepalive_s,
    }


def describe(allegiance: Allegiance | None, signer: Signer | None) -> dict[str, Any]:
    """For ``status``: whom the device obeys, and who it is."""
    return {
        "tenant": allegiance.tenant if allegiance else None,
        "device": allegiance.device if allegiance else None,
        "epoch": allegiance.epoch if allegiance else 0,
        "keys_version": allegiance.keys_version if allegiance else 0,
        "keys": [
            {"name": key.name, "keyid": keyid, "classes": sorted(key.classes)}
            for keyid, key in sorted((allegiance.keys if allegiance else {}).items())
        ],
        "keyid": signer.keyid if signer else None,
        "identity": identity_text(signer) if signer else None,
    }
