"""``edge-fleet pack``: a folder, or an fp32 model with data, becomes one file that devices take."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from agent.base.errors import PeerError
from agent.bundles.agreement import passes
from agent.bundles.manifest import GoldenMetric, Policy, Variant
from agent.cli.commands import Commands
from agent.cli.fleet_common import manual
from agent.cli.terminal import EXIT_USAGE, Progress, bar, megabytes, print_error, print_json, print_table
from agent.fleet.added import Added
from agent.fleet.pack import Packed, pack_folder
from agent.fleet.variants import VARIANTS, PackOptions, pack_model

PREFERENCES = get_args(Policy.model_fields["prefer"].annotation)
METRICS = get_args(GoldenMetric)
_EXAMPLES = """\
  edge-fleet pack detector/                                        a folder with a model.json
  edge-fleet pack detector.onnx --calibrate data.npz --golden golden.npz
  edge-fleet pack detector.onnx --golden golden.npz --add detector.tflite:int8-qat -o detector.edgemodel
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    pack = manual(
        commands,
        common,
        "pack",
        "make a .edgemodel from a folder, or from an fp32 model with data",
        about="SOURCE is a folder with a model.json, or an fp32 .onnx file of which the variants are made; for the "
        "second, install the extra [pack].",
        examples=_EXAMPLES,
    )
    pack.set_defaults(run=_pack, doing="pack")
    pack.add_argument("source", metavar="SOURCE", type=Path, help="folder with a model.json, or fp32 .onnx file")
    pack.add_argument("-o", "--out", metavar="FILE", type=Path, help="default: NAME-VERSION.edgemodel")
    model = pack.add_argument_group("for an .onnx file")
    model.add_argument("--calibrate", metavar="NPZ", type=Path, help="real inputs that set the ranges of int8-static")
    model.add_argument("--golden", metavar="NPZ", type=Path, help="real inputs to compare answers with; also 'label'")
    model.add_argument("--name", help="default: made from the file's name")
    model.add_argument("--version", help="semantic version, default 1.0.0")
    model.add_argument("--metric", choices=METRICS, help="how answers are compared (default top1)")
    model.add_argument("--threshold", type=_finite, metavar="X", help="least agreement (max_abs: largest difference)")
    model.add_argument("--prefer", choices=PREFERENCES, help="what the choice prefers (default latency)")
    model.add_argument("--min-quality", type=_finite, metavar="X", help="no variant below this quality is chosen")
    model.add_argument("--max-latency-ms", type=_finite, metavar="MS", help="no variant slower than this is chosen")
    model.add_argument("--variants", type=_variants, metavar="LIST", help=f"some of {','.join(VARIANTS)} (default all)")
    model.add_argument(
        "--add", type=_added, action="append", metavar="FILE[:ID]", help="a variant made elsewhere, .tflite or .onnx"
    )
    model.add_argument("--labels", metavar="FILE", type=Path, help="names of the classes, one a line")
    model.add_argument(
        "--trained-on",
        metavar="FILE",
        type=Path,
        action="append",
        help="its digest goes into the manifest; may be repeated",
    )
    for text in ("task", "description", "license"):
        model.add_argument(f"--{text}", help="free text for the manifest")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _variants(text: str) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    return wanted


def _added(text: str) -> Added:
    """``FILE`` or ``FILE:ID``; a file whose name has a colon is taken for what it is."""
    path, colon, name = text.rpartition(":")
    if not colon or Path(text).exists():
        return Added(Path(text))
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise argparse.ArgumentTypeError(f"{name!r} is no id: lower-case letters, digits, '.', '_' and '-'")
    return Added(Path(path), name)


_ONLY_FOR_MODELS = (
    "add", "calibrate", "golden", "name", "version", "metric", "threshold", "prefer", "min_quality", "max_latency_ms",
    "variants", "labels", "trained_on", "task", "description", "license",
)  # fmt: skip


def _pack(options: argparse.Namespace) -> int:
    if options.source.is_dir():
        extra = [name for name in _ONLY_FOR_MODELS if getattr(options, name) is not None]
        if extra:
            print_error(f"--{extra[0].replace('_', '-')} is for an .onnx file; for a folder, model.json says it")
            return EXIT_USAGE
        packed = pack_folder(options.source, options.out)
    else:
        with Progress() as line:
            packed = pack_model(_pack_options(options), lambda what, done, total: line.show(bar(what, done, total)))
    if options.json:
        print_json(packed.document())
    else:
        _print_packed(packed)
    return 0


def _pack_options(options: argparse.Namespace) -> PackOptions:
    policy = {name: getattr(options, name) for name in ("prefer", "min_quality", "max_latency_ms")}
    about: dict[str, Any] = {name: getattr(options, name) for name in ("task", "description", "license")}
    if options.labels is not None:
        about["labels"] = _labels(options.labels)
    given = {name: getattr(options, name) for name in ("name", "version", "metric", "threshold", "variants")}
    return PackOptions(
        model=options.source,
        calibrate=options.calibrate,
        golden=options.golden,
        out=options.out,
        add=tuple(options.add or ()),
        trained_on=tuple(options.trained_on or ()),
        command=_typed(options.typed),
        policy={name: value for name, value in policy.items() if value is not None},
        about={name: value for name, value in about.items() if value is not None},
        **{name: value for name, value in given.items() if value is not None},
    )


def _typed(arguments: Sequence[str]) -> str:
    """The command as it was typed, of paths only the names: where somebody keeps his files is nobody's business."""
    words = [Path(word).name if os.sep in word else word for word in arguments]
    return shlex.join(["edge-fleet", *words])[:4096]


def _labels(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise PeerError(f"cannot read {path}: it is not UTF-8 text") from error


def _print_packed(packed: Packed) -> None:
    manifest = packed.manifest
    print(f"packed {manifest.name} {manifest.version} into {packed.file} ({megabytes(packed.size)})")
    metric = manifest.golden.metric if manifest.golden else "quality"
    print_table(
        ("variant", "precision", "size", metric, "accuracy", ""),
        [_row(packed, variant) for variant in manifest.variants],
        right=(2, 3, 4),
    )
    for variant_id, reason in packed.left_out.items():
        print(f"left out: {variant_id}: {reason}")
    if manifest.golden is None:
        print("note: no golden set, so a device cannot tell a wrong variant from a right one; give --golden")


def _row(packed: Packed, variant: Variant) -> tuple[object, ...]:
    golden = packed.manifest.golden
    agreed, accuracy = variant.parameters.get("agreement"), variant.parameters.get("accuracy")
    if agreed is None and variant.quality is not None:
        agreed = variant.quality.value
    doubtful = golden is not None and isinstance(agreed, float) and not passes(golden, agreed)
    note = f"beyond {golden.threshold}: a device that measures the same rejects it" if golden and doubtful else ""
    return variant.id, variant.precision, megabytes(variant.file.size), _number(agreed), _number(accuracy), note


def _number(value: object) -> str:
    return f"{value:.5f}" if isinstance(value, float) else ""
