"""The catalog document, format ``edge-catalog/1``: what is installed, and where its blobs are.

Pure. An unknown field is an error: an older agent must not drop what a newer one wrote. One exception: an agent that
adds fields which may be dropped says so in ``readable_from``, so that the agent before can take over again when an
update is taken back. What selection and trials put in (``choice``, ``measurements``, ``quarantine``) is theirs and
opaque here. Numbers that are not finite become null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, model_validator

from agent.base.errors import PeerError
from agent.bundles.manifest import Manifest, Name, SemVer, Sha256

FORMAT: Literal["edge-catalog/1"] = "edge-catalog/1"
#: What this agent reads as; a document that says ``readable_from`` up to it is read without what is unknown.
READER = 1
#: Some two thousand models with five variants each; a larger document is refused before it is parsed or written.
MAX_DOCUMENT_BYTES = 32 << 20
#: Former grant identities that are kept until the fleet has sealed to the present one.
MOST_IDENTITIES = 4

#: A file name inside a bundle, or a name of our own (prepared forms). It names no path.
Part = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,127}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlobRef(_Entry):
    """One encrypted file: ``payload`` names it (SHA-256 of the ciphertext), ``header`` the file with its wrapped key.

    ``size`` and ``sha256`` are the plaintext's; ``payload_size`` is the file's. All in bytes and hex. Model, version
    and part are bound into the header: with any of them changed it does not open.
    """

    payload: Sha256
    header: PlainName
    size: Annotated[int, Field(ge=0, le=1 << 40)]
    sha256: Sha256
    payload_size: Annotated[int, Field(ge=0, le=1 << 41)]
    model: Name
    version: SemVer
    part: Part


class VersionEntry(_Entry):
    """One version of a model. ``damaged`` names the parts whose blobs are known to be unreadable."""

    manifest: Manifest
    origin: Literal["unsigned", "signed"]
    added_at: str
    blobs: dict[Part, BlobRef] = Field(default_factory=dict)
    chosen: str | None = None
    choice: dict[str, JsonValue] | None = None
    measurements: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    quarantine: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    damaged: tuple[Part, ...] = ()


class ModelEntry(_Entry):
    """One model: which version answers, which one answered before."""

    active: SemVer | None = None
    previous: SemVer | None = None
    pinned: bool = False
    versions: dict[SemVer, VersionEntry] = Field(default_factory=dict)


class FleetEntry(_Entry):
    """What ties the device to its fleet; here because it must be as secret and as hard to swap as the models.

    ``identity`` is the seed of the signing key (hex), ``enrolment`` the signed envelope that enrolled it (base64).
    ``config`` is what the fleet has set over the configuration file, ``mark`` who asked for it, ``before`` what it was.
    """

    identity: Sha256 | None = None
    enrolment: str = ""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    before: dict[str, JsonValue] = Field(default_factory=dict)
    mark: str = ""
    state: Literal["default", "applied", "confirming", "reverted", "refused"] = "default"


class MarkEntry(_Entry):
    """The highest version of a role that was believed, and a digest of the keys that vouched for it."""

    version: Annotated[int, Field(ge=0)]
    keys: str


class StagedVersion(_Entry):
    """A version that a job is fetching: its manifest as it was verified, and the payload (SHA-256) of each file."""

    manifest: Manifest
    payloads: dict[Part, Sha256]


class DeliveryEntry(_Entry):
    """What the device knows of its operator's repository, begun anew where it is shipped with another ``root``.

    ``root`` is that root's digest; ``job_keys`` the table of keys that the repository brought, as it was published.
    ``staged`` is by the job that fetches. ``identities`` are former grant identities (hex) that the fleet may still
    seal to, the latest first.
    """

    root: Sha256 | None = None
    marks: dict[str, MarkEntry] = Field(default_factory=dict)
    job_keys: str = ""
    staged: dict[str, StagedVersion] = Field(default_factory=dict)
    identities: tuple[Sha256, ...] = ()


class CatalogDocument(_Entry):
    """All of it. ``generation`` and ``saved_at`` are set by the store at each commit."""

    format: Literal["edge-catalog/1"] = FORMAT
    generation: Annotated[int, Field(ge=0)] = 0
    saved_at: str = ""
    models: dict[Name, ModelEntry] = Field(default_factory=dict)
    fleet: FleetEntry = FleetEntry()
    delivery: DeliveryEntry = DeliveryEntry()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> CatalogDocument:
        _require_agreement(self.models)
        return self

    def find(self, model: str, version: str, part: str) -> BlobRef | None:
        """The blob of a part, if it is installed."""
        entry = self.models[model].versions.get(version) if model in self.models else None
        return entry.blobs.get(part) if entry else None

    def refs(self) -> Iterator[BlobRef]:
        """Every blob that the document reaches."""
        for model in self.models.values():
            for version in model.versions.values():
                yield from version.blobs.values()


class _Models(_Entry):
    """What is checked of a document when it is written, model by model."""

    models: dict[Name, ModelEntry]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> _Models:
        _require_agreement(self.models)
        return self


def _require_agreement(models: Mapping[str, ModelEntry]) -> None:
    for name, model in models.items():
        for pointed in (model.active, model.previous):
            if pointed is not None and pointed not in model.versions:
                raise ValueError(f"{name}: points to version {pointed}, which is not there")
        for version, entry in model.versions.items():
            _check_version(name, version, entry)


def _check_version(name: str, version: str, entry: VersionEntry) -> None:
    if entry.manifest.version != version:
        raise ValueError(f"{name} {version}: its manifest says version {entry.manifest.version}")
    for part, ref in entry.blobs.items():
        if (ref.model, ref.version, ref.part) != (name, version, part):
            raise ValueError(f"{name} {version}: blob of {part} belongs to {ref.model} {ref.version} {ref.part}")
    if unknown := set(entry.damaged) - set(entry.blobs):
        raise ValueError(f"{name} {version}: damaged part {min(unknown)} has no blob")


_HEAD = {"format", "generation", "saved_at"}
_UNUSED = {"fleet": FleetEntry(), "delivery": DeliveryEntry()}


@dataclass(frozen=True, slots=True)
class Encoded:
    """UTF-8 JSON of a document, the same of each of its models, and the document as a reader will have it."""

    data: bytes
    models: Mapping[str, str]
    document: CatalogDocument


def encode(document: CatalogDocument, before: Encoded | None = None) -> Encoded:
    """A document in writing. PeerError names what is wrong. Models that are written as in ``before`` are taken from it.

    One model at a time: the interpreter is held for as long as something is validated, and for a thousand models at
    once that are 0.2 s in which no request is answered.
    """
    texts, models = {}, {}
    for name, entry in document.models.items():
        if not isinstance(entry, ModelEntry):
            raise PeerError(f"cannot use catalog: models.{name}: no model")
        text = texts[name] = f"{json.dumps(name)}:{entry.model_dump_json()}"
        known = before.document.models.get(name) if before is not None and before.models.get(name) == text else None
        models[name] = known or _checked(text).models[name]
    # A device without a fleet writes what an agent that knows of none can read.
    unused = {name for name, empty in _UNUSED.items() if getattr(document, name) == empty}
    head, tail = document.model_dump_json(include=_HEAD), document.model_dump_json(exclude={*_HEAD, *unused, "models"})
    rest = f",{tail[1:]}" if tail != "{}" else "}"
    data = f'{head[:-1]},"models":{{{",".join(texts.values())}}}{rest}'.encode()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _too_large()
    return Encoded(data, texts, decode(f"{head[:-1]}{rest}".encode()).model_copy(update={"models": models}))


def _checked(text: str) -> _Models:
    try:
        return _Models.model_validate_json(f'{{"models":{{{text}}}}}')
    except ValidationError as error:
        raise PeerError(f"cannot use catalog: {_told(error)}") from error


def decode(data: bytes) -> CatalogDocument:
    """The document in ``data``. PeerError names the first wrong fields."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _too_large()
    try:
        return CatalogDocument.model_validate_json(data)
    except ValidationError as error:
        if (reduced := _reduced(data, error)) is not None:
            return reduced
        raise PeerError(f"cannot use catalog: {_told(error)}") from error


def _too_large() -> PeerError:
    return PeerError(f"cannot use catalog: more than {MAX_DOCUMENT_BYTES} bytes")


def _reduced(data: bytes, error: ValidationError) -> CatalogDocument | None:
    """The document without the fields that a later agent added; None where that one does not allow it."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    if any(problem["type"] != "extra_forbidden" for problem in problems):
        return None
    try:
        document = json.loads(data)
        oldest = document.get("readable_from")
        if type(oldest) is not int or not 1 <= oldest <= READER:
            return None
        for problem in problems:
            *path, name = problem["loc"]
            holder: Any = document
            for part in path:
                holder = holder[part]
            del holder[name]
        return CatalogDocument.model_validate_json(json.dumps(document))
    except (ValidationError, LookupError, TypeError, ValueError, RecursionError):
        return None


def _told(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)[:3]
    return "; ".join(f"{'.'.join(str(part) for part in p['loc']) or 'document'}: {p['msg']}" for p in problems)


def blank_ref(model: str, version: str, part: str) -> BlobRef:
    """A reference to nothing yet, of that identity. PeerError when a name is not one."""
    try:
        return BlobRef(
            payload="0" * 64, header="none", size=0, sha256="0" * 64, payload_size=0,
            model=model, version=version, part=part,
        )  # fmt: skip
    except ValidationError as error:
        raise PeerError(f"cannot name a blob: {_told(error)}") from error


def with_refs(document: CatalogDocument, renewed: dict[BlobRef, BlobRef]) -> CatalogDocument:
    """``document`` with each blob in ``renewed`` replaced."""

    def change(entry: VersionEntry) -> VersionEntry:
        blobs = {part: renewed.get(ref, ref) for part, ref in entry.blobs.items()}
        return entry.model_copy(update={"blobs": blobs})

    return _each_version(document, change)


def with_identity(document: CatalogDocument, secret: str) -> CatalogDocument:
    """``document`` with a former grant identity (hex) kept, where there is a fleet that may still seal to it."""
    known = document.delivery.identities
    if document.fleet == FleetEntry() or secret in known:
        return document
    kept = (secret, *known)[:MOST_IDENTITIES]
    return document.model_copy(update={"delivery": document.delivery.model_copy(update={"identities": kept})})


def marked(document: CatalogDocument, bad: frozenset[BlobRef], good: frozenset[BlobRef]) -> CatalogDocument:
    """``document`` with the parts of ``bad`` marked damaged and the marks of ``good`` taken away."""

    def change(entry: VersionEntry) -> VersionEntry:
        parts = [part for part, ref in entry.blobs.items() if ref in bad or (part in entry.damaged and ref not in good)]
        return entry.model_copy(update={"damaged": tuple(sorted(parts))})

    return _each_version(document, change)


def _each_version(document: CatalogDocument, change: Callable[[VersionEntry], VersionEntry]) -> CatalogDocument:
    models = {
        name: model.model_copy(
            update={"versions": {version: change(entry) for version, entry in model.versions.items()}}
        )
        for name, model in document.models.items()
    }
    return document.model_copy(update={"models": models})
