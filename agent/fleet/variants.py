"""``edge-fleet pack model.onnx``: makes the variants, measures how each agrees with the reference, writes the bundle.

The reference is the fp32 model's own answers to the golden inputs, or the outputs that the golden file brings. A
variant that cannot be made is left out with its reason, unless it was asked for by name; one that disagrees on this
machine stays in, marked, since int8 differs between processors and the device judges for itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from agent import __version__
from agent.base.errors import AgentError, PeerError, UnsupportedError
from agent.bundles.agreement import (
    INPUT,
    OUTPUT,
    DisagreementError,
    agreement,
    count_examples,
    examples,
    join,
    top1_accuracy,
)
from agent.bundles.arrays import dump_arrays, load_arrays
from agent.bundles.bare import name_from
from agent.bundles.manifest import (
    GoldenMetric,
    Manifest,
    Precision,
    Provenance,
    Quality,
    Source,
    Technique,
    TensorSpec,
    Variant,
    parse_manifest,
)
from agent.bundles.onnx_signature import Signature
from agent.bundles.tflite_signature import TfliteSignature
from agent.fleet import quantize
from agent.fleet.added import Added, answers, describe
from agent.fleet.pack import Packed, Progress, check_signature, file_ref, scratch_folder, signature_of, write_bundle

if TYPE_CHECKING:
    from numpy.typing import NDArray

VariantId = Literal["fp32", "fp16", "int8-static", "int8-dynamic"]
VARIANTS: tuple[VariantId, ...] = get_args(VariantId)
#: Least agreement where none is given. ``max_abs`` has none: its scale is the model's own.
DEFAULT_THRESHOLD = {"top1": 0.95, "cosine": 0.99}
#: Names under which a golden file may bring the right answers.
LABELS = ("label", "labels")
GOLDEN_NAME = "golden.npz"

_PRECISION: dict[VariantId, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8-static": "int8", "int8-dynamic": "int8"}
_TECHNIQUE: dict[VariantId, tuple[Technique, ...]] = {
    "fp32": (),
    "fp16": (Technique(name="quantized", parameters={"to": "fp16"}),),
    "int8-static": (
        Technique(
            name="quantized",
            parameters={
                "to": "int8", "form": "QDQ", "ranges": "static", "calibration": "MinMax",
                "per_channel": True, "activations": "uint8", "weights": "int8",
                "reduce_range": False,
            },
        ),
    ),
    "int8-dynamic": (
        Technique(name="quantized", parameters={"to": "int8", "ranges": "dynamic", "reduce_range": False}),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What the operator asks for. ``variants`` None means all that can be made; ``command`` is what was typed."""

    model: Path
    calibrate: Path | None = None
    golden: Path | None = None
    out: Path | None = None
    name: str | None = None
    version: str = "1.0.0"
    metric: GoldenMetric = "top1"
    threshold: float | None = None
    variants: tuple[VariantId, ...] | None = None
    add: tuple[Added, ...] = ()
    trained_on: tuple[Path, ...] = ()
    command: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Reference:
    """Golden inputs as feeds, the answers that they shall have, and labels where there are any."""

    feeds: Sequence[Mapping[str, NDArray[Any]]]
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None


def pack_model(options: PackOptions, progress: Progress) -> Packed:
    """Make the variants of ``options.model``, measure them, write the bundle. PeerError, UnsupportedError, OSError."""
    quantize.check_tools(options.model.name)
    signature = _fp32_signature(options.model)
    golden = _golden_head(options)
    with scratch_folder(options.out) as scratch:
        calibration = _feeds(options.calibrate, signature) if options.calibrate else ()
        made, left_out = _make_variants(options, scratch, calibration, progress)
        variants = [*_described(made), *map(describe, options.add)]
        reference = _reference(options, signature, progress)
        golden_file = None if reference is None else _golden_file(reference)
        manifest = _manifest(options, signature, variants, golden_file, golden)
        paths = [*made.values(), *(added.path for added in options.add)]
        files: dict[str, Path | bytes] = {v.file.name: path for v, path in zip(variants, paths, strict=True)}
        if golden_file is not None:
            files[GOLDEN_NAME] = golden_file
        rated = []
        for variant, path in zip(manifest.variants, paths, strict=True):
            try:
                check_signature(manifest, variant, signature_of(path))
                rated.append(variant if reference is None else _rated(variant, path, reference, options, progress))
            except UnsupportedError as error:  # an added one whose runtime is not installed here
                left_out[variant.id] = f"{error}{f' ({error.hint})' if error.hint else ''}"
            except AgentError as error:
                _leave_out(options, left_out, variant.id, str(error))
        manifest = manifest.model_copy(update={"variants": tuple(rated)})
        return write_bundle(parse_manifest(manifest.to_json()), files, options.out, left_out)


def _fp32_signature(model: Path) -> Signature:
    if not model.is_file():
        raise PeerError(f"cannot pack {model}: no such file")
    signature = signature_of(model)
    if isinstance(signature, TfliteSignature):
        raise PeerError(
            f"cannot pack {model.name}: variants are made from an ONNX model, this one is TFLite",
            hint="add it to an ONNX model with --add, or put it into a folder with a model.json: edge-fleet pack DIR",
        )
    if signature.precision != "fp32":
        raise PeerError(
            f"cannot pack {model.name}: it is {signature.precision} already; variants are made from an fp32 model",
            hint="to pack models made elsewhere, put them into a folder with a model.json: edge-fleet pack DIR",
        )
    return signature


def _golden_head(options: PackOptions) -> tuple[GoldenMetric, float]:
    threshold = options.threshold if options.threshold is not None else DEFAULT_THRESHOLD.get(options.metric)
    if threshold is None:
        raise PeerError(
            f"cannot pack {options.model.name}: metric {options.metric} has no usual threshold", hint="give --threshold"
        )
    return options.metric, threshold


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise PeerError(f"cannot read {path}: no such file")
    with path.open("rb") as stream:
        try:
            return load_arrays(stream.fileno())
        except PeerError as error:
            raise PeerError(f"cannot read {path}: {error}", hint=error.hint) from error


def _split(
    path: Path, signature: Signature
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], NDArray[Any] | None]:
    """Inputs (cast to what the model takes), outputs and labels of a data file."""
    arrays = _arrays(path)
    specs = {spec.name: spec for spec in signature.inputs}
    labels = next((arrays.pop(name) for name in LABELS if name in arrays and name not in specs), None)
    outputs = {name.removeprefix(OUTPUT): array for name, array in arrays.items() if name.startswith(OUTPUT)}
    inputs = {name.removeprefix(INPUT): array for name, array in arrays.items() if not name.startswith(OUTPUT)}
    unknown = sorted(set(inputs) - set(specs))
    if unknown:
        raise PeerError(
            f"cannot use {path}: the model has no input {unknown[0]!r}; its inputs are {', '.join(specs)}",
            hint="arrays are named NAME or input/NAME; 'label' holds the right answers",
        )
    return {name: _cast(array, specs[name], path) for name, array in inputs.items()}, outputs, labels


def _cast(array: NDArray[Any], spec: TensorSpec, path: Path) -> NDArray[Any]:
    """Whole numbers may stand for floats and wide floats for narrow ones: data files are often kept so."""
    import numpy as np  # noqa: PLC0415

    from agent.base.datatypes import NUMPY_NAME  # noqa: PLC0415

    wanted = np.dtype(NUMPY_NAME[spec.datatype])
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise PeerError(f"cannot use {path}: input {spec.name!r} is {array.dtype}, the model takes {spec.datatype}")
    return array.astype(wanted, copy=False)


def _feeds(path: Path, signature: Signature) -> list[dict[str, NDArray[Any]]]:
    inputs, _, _ = _split(path, signature)
    return list(examples(inputs, signature.inputs))


def _make_variants(
    options: PackOptions, scratch: Path, calibration: Sequence[Mapping[str, NDArray[Any]]], progress: Progress
) -> tuple[dict[VariantId, Path], dict[str, str]]:
    """The files that could be made, by variant id, and why the others could not."""
    wanted = options.variants or VARIANTS
    made: dict[VariantId, Path] = {}
    left_out: dict[str, str] = {}
    progress("preparing", 0, len(wanted))
    prepared = quantize.prepare(options.model, scratch / "prepared.onnx")
    for index, variant in enumerate(wanted):
        if variant == "int8-static" and not calibration:
            _leave_out(options, left_out, variant, "static quantization needs --calibrate DATA.npz")
            continue
        progress(f"making {variant}", index, len(wanted))
        path = scratch / f"{variant}.onnx"
        try:
            _make(variant, options.model, prepared, path, calibration, progress)
        except Exception as error:  # noqa: BLE001 - the tools raise whatever they stumble over; it becomes the reason.
            _leave_out(options, left_out, variant, quantize.first_line(error))
        else:
            made[variant] = path
    if not made:
        raise PeerError(f"cannot pack {options.model.name}: no variant could be made: {left_out}")
    return made, left_out


def _make(
    variant: VariantId,
    model: Path,
    prepared: Path,
    out: Path,
    calibration: Sequence[Mapping[str, NDArray[Any]]],
    progress: Progress,
) -> None:
    if variant == "fp32":
        shutil.copyfile(model, out)
    elif variant == "fp16":
        quantize.make_fp16(model, out)
    elif variant == "int8-dynamic":
        quantize.make_int8_dynamic(prepared, out)
    else:
        quantize.make_int8_static(prepared, out, calibration, lambda n, m: progress("calibrating", n, m))


def _leave_out(options: PackOptions, left_out: dict[str, str], variant: str, reason: str) -> None:
    if options.variants is not None or variant == "fp32" or variant not in VARIANTS:
        raise PeerError(f"cannot pack {options.model.name}: variant {variant}: {reason}")
    left_out[variant] = reason


def _reference(options: PackOptions, signature: Signature, progress: Progress) -> _Reference | None:
    if options.golden is None:
        return None
    inputs, outputs, labels = _split(options.golden, signature)
    feeds = list(examples(inputs, signature.inputs))
    if not outputs:
        outputs = join(quantize.run_all(options.model, feeds, lambda n, m: progress("reference answers", n, m)))
    count_examples({**inputs, **outputs})
    return _Reference(feeds, inputs, outputs, labels)


def _golden_file(reference: _Reference) -> bytes:
    arrays = {INPUT + name: array for name, array in reference.inputs.items()}
    return dump_arrays({**arrays, **{OUTPUT + name: array for name, array in reference.outputs.items()}})


def _rated(variant: Variant, path: Path, reference: _Reference, options: PackOptions, progress: Progress) -> Variant:
    """The variant with its agreement (by the golden metric), quality (higher is better) and accuracy where known."""
    tell = partial(progress, f"measuring {variant.id}")
    try:
        outputs = join(answers(variant.runtime, path, reference.feeds, tell))
        agreed = agreement(options.metric, reference.outputs, outputs)
        # A distance cannot be a quality, of which more is better: then the direction of the answers stands for it.
        metric: GoldenMetric = "cosine" if options.metric == "max_abs" else options.metric
        quality = agreement(metric, reference.outputs, outputs)
    except DisagreementError as error:
        raise PeerError(f"cannot use {variant.id}: {error}") from error
    if not (math.isfinite(quality) and math.isfinite(agreed)):
        raise PeerError(f"cannot use {variant.id}: its answers are not finite")
    parameters: dict[str, Any] = {"agreement": agreed}
    if reference.labels is not None and (accuracy := top1_accuracy(outputs, reference.labels)) is not None:
        parameters["accuracy"] = accuracy
    name = {"top1": "top1_agreement", "cosine": "cosine"}[metric]
    return variant.model_copy(update={"quality": Quality(metric=name, value=quality), "parameters": parameters})


def _described(made: Mapping[VariantId, Path]) -> list[Variant]:
    return [
        Variant(
            id=variant,
            runtime="onnx",
            precision=_PRECISION[variant],
            technique=_TECHNIQUE[variant],
            derived_from="fp32" if variant != "fp32" and "fp32" in made else None,
            file=file_ref(path),
        )
        for variant, path in made.items()
    ]


def _provenance(options: PackOptions) -> Provenance:
    return Provenance(
        source_model=_source(options.model),
        training_data=tuple(_source(path) for path in options.trained_on),
        calibration_data=_source(options.calibrate) if options.calibrate else None,
        command=options.command,
        tool=f"edge-agent {__version__}",
    )


def _source(path: Path) -> Source:
    """A file's name and digest: what it holds stays where it is."""
    if not path.is_file():
        raise PeerError(f"cannot pack: {path}: no such file")
    return Source(name=path.name, sha256=file_ref(path, name="file").sha256)


def _manifest(
    options: PackOptions,
    signature: Signature,
    variants: Sequence[Variant],
    golden_file: bytes | None,
    golden: tuple[GoldenMetric, float],
) -> Manifest:
    """The manifest before anything is measured. PeerError names a field that does not fit."""
    document: dict[str, Any] = {
        "format": "edge-model/1",
        "name": options.name if options.name is not None else name_from(options.model.name),
        "version": options.version,
        "inputs": [spec.model_dump() for spec in signature.inputs],
        "outputs": [spec.model_dump() for spec in signature.outputs],
        "policy": dict(options.policy),
        "provenance": _provenance(options).model_dump(mode="json"),
        **options.about,
    }
    document["variants"] = [variant.model_dump(mode="json") for variant in variants]
    if golden_file is not None:
        digest = hashlib.sha256(golden_file).hexdigest()
        ref = {"name": GOLDEN_NAME, "sha256": digest, "size": len(golden_file)}
        document["golden"] = {"file": ref, "metric": golden[0], "threshold": golden[1]}
    return parse_manifest(json.dumps(document).encode())
