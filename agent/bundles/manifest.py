"""The manifest ``model.json``, format ``edge-model/1``.

An unknown field is an error within a format version, so that a misspelt requirement never silently holds. Texts are
bounded, numbers finite. ``Manifest.model_validate_json`` raises pydantic's ValidationError; ``parse_manifest`` wraps it
as a ``PeerError`` that names the field.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from agent.base.datatypes import Datatype
from agent.base.errors import PeerError

FORMAT = "edge-model/1"
MANIFEST_NAME = "model.json"
MAX_MANIFEST_BYTES = 1 << 20
#: What the eleven octal digits of a plain tar header can say.
MAX_FILE_BYTES = 8**11 - 1

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
#: SemVer 2.0.0, https://semver.org (numeric identifiers have no leading zeros).
SemVer = Annotated[
    str,
    StringConstraints(
        max_length=128,
        pattern=r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$",
    ),
]
#: Texts are shown on terminals and written into logs, which control characters would steer: a name of a tensor could
#: rewrite what stands above it.
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"
_PLAIN_LINES = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
Text = Annotated[str, StringConstraints(max_length=4096, pattern=_PLAIN_LINES)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=_PLAIN)]
Label = Annotated[str, StringConstraints(max_length=256, pattern=_PLAIN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _all_finite(values: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Numbers too large for a float, and what some writers call NaN, cannot be said in JSON again."""
    waiting: list[JsonValue] = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must hold finite numbers")
    return values


#: Whatever the packer wants to say beside the fields that have a meaning here.
FreeValues = Annotated[dict[str, JsonValue], AfterValidator(_all_finite)]

Runtime = Literal["onnx", "tflite"]
GoldenMetric = Literal["top1", "cosine", "max_abs"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "mixed"]


#: A list is judged up to its first wrong member: a megabyte of wrong ones would make a gigabyte of complaints.
_QUICK = FailFast()
_MAX_FIELDS = 64


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: object) -> object:
        """As for lists: each unknown field would be a complaint."""
        if isinstance(data, dict) and len(data) > _MAX_FIELDS:
            raise ValueError(f"must not have more than {_MAX_FIELDS} fields")
        return data


class TensorSpec(_Part):
    """One input or output. ``shape`` has -1 where an axis is free.

    A model file may leave even the number of axes open: then ``any_rank`` is true and ``shape`` is ``[-1]``, which
    clients read as "varies" and which nothing compares with.
    """

    name: ShortText
    datatype: Datatype
    shape: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(max_length=32), _QUICK]
    optional: bool = False
    any_rank: bool = False

    @model_validator(mode="after")
    def _unknown_rank_names_no_axes(self) -> TensorSpec:
        if self.any_rank and self.shape != (-1,):
            raise ValueError("any_rank goes with shape [-1]")
        return self


class Technique(_Part):
    """How a variant was compressed: quantized, pruned, distilled, low-rank, weight-shared …, with free parameters."""

    name: ShortText
    parameters: FreeValues = Field(default_factory=dict)


def _relative_file(path: str) -> str:
    """A plain file name inside the bundle: no directories, no dot files, and short enough for a plain tar header."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", path):
        raise ValueError("must be a plain file name of letters, digits, '.', '_' and '-'")
    return path


FileName = Annotated[str, AfterValidator(_relative_file)]


def is_tensor_name(name: str) -> bool:
    """Whether a manifest, and a client, may have it."""
    return 0 < len(name) <= 256 and re.match(_PLAIN, name) is not None and not name.endswith("\n")


class FileRef(_Part):
    """A file of the bundle with its plaintext digest and size in bytes."""

    name: FileName
    sha256: Sha256
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


class Requires(_Part):
    """What a variant needs. ``all_features``/``any_features`` use detection's words (``dotprod``, ``avx2`` …)."""

    arch: Annotated[tuple[ShortText, ...], _QUICK] = ()
    all_features: Annotated[tuple[ShortText, ...], _QUICK] = ()
    any_features: Annotated[tuple[ShortText, ...], _QUICK] = ()
    accelerator: ShortText | None = None
    min_memory_mb: Annotated[int, Field(ge=0)] = 0
    runtime_version: ShortText | None = None


class Quality(_Part):
    """The packer's measured quality; higher is better (``accuracy``, ``top1_agreement``, ``map50`` …)."""

    metric: ShortText
    value: Finite


class Variant(_Part):
    """One file of a version: runtime x precision x technique."""

    id: Name
    runtime: Runtime
    precision: Precision
    technique: Annotated[tuple[Technique, ...], _QUICK] = ()
    derived_from: Name | None = None
    file: FileRef
    requires: Requires = Requires()
    quality: Quality | None = None
    parameters: FreeValues = Field(default_factory=dict)


class Golden(_Part):
    """Real inputs and the reference model's outputs (an ``.npz``: ``input/NAME`` and ``output/NAME`` arrays).

    ``top1``: least share of equal arg-max along the last axis; ``cosine``: least mean cosine similarity;
    ``max_abs``: largest absolute difference allowed. The first axis of every array counts the examples.
    """

    file: FileRef
    metric: GoldenMetric
    threshold: Finite


class Cascade(_Part):
    """Two variants that answer together: ``first``, and where its confidence is below ``threshold``, ``then``.

    ``output`` (the first one where none is named) holds a score for each class along its last axis.
    """

    first: Name
    then: Name
    threshold: Annotated[Finite, Field(ge=0, le=1)]
    output: ShortText | None = None
    measure: Literal["max_softmax", "margin", "entropy"] = "max_softmax"


class Policy(_Part):
    """What the choice prefers among the variants that answer rightly on this device.

    ``accept_slower``: the version is taken also where it is slower than the one that answered before.
    """

    prefer: Literal["latency", "accuracy", "energy", "memory"] = "latency"
    min_quality: Finite | None = None
    max_latency_ms: Annotated[Finite, Field(gt=0)] | None = None
    cascade: Cascade | None = None
    accept_slower: bool = False

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As the manifest's: an agent that does not know the field reads what does not say it."""
        said: dict[str, Any] = handler(self)
        if not self.accept_slower:
            said.pop("accept_slower", None)
        return said


class CachePolicy(_Part):
    """Result cache, opt-in: time to live in seconds, size in MB, whether to re-warm after activation."""

    ttl_s: Annotated[Finite, Field(gt=0)]
    max_mb: Annotated[Finite, Field(gt=0)] = 8.0
    prewarm: bool = False


class BatchingPolicy(_Part):
    """Micro-batching, opt-in."""

    max_size: Annotated[int, Field(ge=1, le=1024)]
    max_delay_us: Annotated[int, Field(ge=0, le=1_000_000)]


class Source(_Part):
    """A file that something was made from: its name and the SHA-256 of its content."""

    name: ShortText
    sha256: Sha256


class Provenance(_Part):
    """Where a version comes from: the model it was made of, the data it was trained and calibrated with, and how."""

    source_model: Source | None = None
    training_data: Annotated[tuple[Source, ...], Field(max_length=64), _QUICK] = ()
    calibration_data: Source | None = None
    command: Text = ""
    tool: ShortText | None = None


class Manifest(_Part):
    """A version of a model."""

    format: Literal["edge-model/1"]
    name: Name
    version: SemVer
    task: Text = ""
    description: Text = ""
    license: Text = ""
    labels: Annotated[tuple[Label, ...], _QUICK] = ()
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=256), _QUICK]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=256), _QUICK]
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=64), _QUICK]
    golden: Golden | None = None
    policy: Policy = Policy()
    cache: CachePolicy | None = None
    batching: BatchingPolicy | None = None
    provenance: Provenance | None = None
    requires_agent: ShortText | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """An agent that does not know these fields reads what one that knows them wrote of a model without them."""
        said: dict[str, Any] = handler(self)
        for name in ("provenance", "requires_agent"):
            if getattr(self, name) is None:
                said.pop(name, None)
        return said

    @model_validator(mode="after")
    def _names_are_unique(self) -> Manifest:
        _refuse_repeats("inputs", [spec.name for spec in self.inputs])
        _refuse_repeats("outputs", [spec.name for spec in self.outputs])
        ids = [variant.id for variant in self.variants]
        _refuse_repeats("variants", ids)
        for variant in self.variants:
            if variant.derived_from is not None and (
                variant.derived_from not in ids or variant.derived_from == variant.id
            ):
                raise ValueError(
                    f"variants: {variant.id} is derived from {variant.derived_from}, which is not another variant"
                )
        if self.policy.cascade is not None and (problem := cascade_problem(self, self.policy.cascade)):
            raise ValueError(f"policy.cascade: {problem}")
        refs = self.files()
        names = {ref.name for ref in refs}
        if len(names) != len(refs):
            raise ValueError("one file name stands for two contents")
        if MANIFEST_NAME in names:
            raise ValueError(f"{MANIFEST_NAME} is the manifest's own name")
        return self

    def files(self) -> tuple[FileRef, ...]:
        """Every file that the bundle must bring, once each: variants first, golden set last."""
        golden = (self.golden.file,) if self.golden else ()
        return tuple(dict.fromkeys((*(variant.file for variant in self.variants), *golden)))

    def to_json(self) -> bytes:
        """The manifest as ``model.json`` holds it: what equals a default is left out, so that it reads well."""
        return self.model_dump_json(indent=2, exclude_defaults=True).encode() + b"\n"

    def variant(self, variant_id: str) -> Variant:
        """The variant of that id; KeyError when there is none."""
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        raise KeyError(variant_id)


class CascadeWords(Protocol):
    """What a manifest and a configuration both say of a cascade."""

    @property
    def first(self) -> str: ...
    @property
    def then(self) -> str: ...
    @property
    def output(self) -> str | None: ...


def cascade_problem(manifest: Manifest, cascade: CascadeWords) -> str:
    """Why that cascade cannot be one of this model; empty where it can."""
    ids = [variant.id for variant in manifest.variants]
    for name in (cascade.first, cascade.then):
        if name not in ids:
            return f"there is no variant {name}"
    if cascade.first == cascade.then:
        return "first and then are the same variant"
    named = [spec for spec in manifest.outputs if cascade.output in (None, spec.name)]
    if not named:
        return f"there is no output {cascade.output}"
    if named[0].datatype not in ("FP16", "FP32", "FP64"):
        return f"output {named[0].name} is {named[0].datatype}, scores are floating-point numbers"
    return ""


def _refuse_repeats(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what}: {', '.join(repeated)} named more than once")


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in ``data`` (UTF-8 JSON). PeerError naming each wrong field, at most five."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise PeerError(f"cannot read manifest: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        lines = [f"{'.'.join(str(part) for part in p['loc']) or 'document'}: {p['msg']}" for p in problems[:5]]
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise PeerError(f"cannot read manifest: {'; '.join(lines)}{more}") from error
