"""Hundreds of distinct models for the benchmarks, in minutes: a few are added by the agent, the others are their twins.

A twin has the graph of a model that was added, with all its weights changed, so that it loads and runs alike, takes the
same memory and gives other answers. It is encrypted, and prepared by the same runtime in the same way, into the store
of the same device; what is copied is what its trial and the comparison of forms would have found once more. Trials of
1,000 models take hours, at several seconds each; nothing that is measured afterwards depends on them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from device import VERSION, Device
from onnx import TensorProto, helper, numpy_helper

from agent.infer.runtimes.base import PLAIN, LoadOptions, load_runtime
from agent.operations.forms import PREFIX, records_of
from agent.store.document import BlobRef, CatalogDocument, ModelEntry, VersionEntry

_PROVIDER = "CPUExecutionProvider"
#: How far a twin's weights are from the model's, of their size.
_APART = 0.05


@dataclass(frozen=True, slots=True)
class Kind:
    """Models of one size: the ONNX graph that they share, and an input for it."""

    name: str
    model: onnx.ModelProto
    sample: np.ndarray


def dense(name: str, widths: tuple[int, ...]) -> Kind:
    """Layers of a plain network."""
    rng = np.random.default_rng(widths[1])
    nodes, weights, given = [], [], "x"
    for layer, (width, after) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(0, width**-0.5, (width, after)).astype(np.float32)
        weights += [
            numpy_helper.from_array(weight, f"w{layer}"),
            numpy_helper.from_array(rng.normal(0, 0.1, after).astype(np.float32), f"b{layer}"),
        ]
        last = layer == len(widths) - 2
        nodes.append(helper.make_node("Gemm", [given, f"w{layer}", f"b{layer}"], ["y" if last else f"sum{layer}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"sum{layer}"], [f"out{layer}"]))
            given = f"out{layer}"
    sample = rng.standard_normal((1, widths[0])).astype(np.float32)
    return Kind(name, _model(nodes, weights, list(sample.shape), [1, widths[-1]]), sample)


def convolutional(name: str, width: float, blocks: int, features: int, classes: int, side: int) -> Kind:
    """The beginning of a MobileNetV2, narrower, with its own head: what small cameras and microphones run."""
    import models  # noqa: PLC0415 - benchmarks/models.py

    rng = np.random.default_rng(features)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value.astype(np.float32), f"c{len(weights)}"))
        return weights[-1].name

    def convolve(
        given: str, inside: int, outside: int, size: int, stride: int, *, group: int = 1, clip: bool = True
    ) -> str:
        spread = (2.0 / (size * size * inside / group)) ** 0.5
        weight = constant(rng.normal(0, spread, (outside, inside // group, size, size)))
        output = f"t{len(nodes)}"
        options = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": [size // 2] * 4, "group": group}
        nodes.append(
            helper.make_node("Conv", [given, weight, constant(rng.normal(0, 0.1, outside))], [output], **options)
        )
        if not clip:
            return output
        limits = [constant(np.float32(0)), constant(np.float32(6))]
        nodes.append(helper.make_node("Clip", [output, *limits], [f"{output}c"]))
        return f"{output}c"

    channels = models._channels(32 * width)
    now = convolve("x", 3, channels, 3, 2)
    for expansion, wanted, repeats, stride in models.BLOCKS[:blocks]:
        for repeat in range(repeats):
            before, inside, outside = now, channels, models._channels(wanted * width)
            wide = inside * expansion
            step = stride if repeat == 0 else 1
            if expansion != 1:
                now = convolve(now, inside, wide, 1, 1)
            now = convolve(now, wide, wide, 3, step, group=wide)
            now = convolve(now, wide, outside, 1, 1, clip=False)
            if step == 1 and inside == outside:
                nodes.append(helper.make_node("Add", [before, now], [f"{now}s"]))
                now = f"{now}s"
            channels = outside
    now = convolve(now, channels, features, 1, 1)
    nodes.append(helper.make_node("GlobalAveragePool", [now], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], axis=1))
    head = constant(rng.normal(0, features**-0.5, (features, classes)))
    nodes.append(helper.make_node("Gemm", ["flat", head, constant(rng.normal(0, 0.1, classes))], ["y"]))
    sample = rng.standard_normal((1, 3, side, side)).astype(np.float32)
    return Kind(name, _model(nodes, weights, list(sample.shape), [1, classes]), sample)


def _model(nodes: list[Any], weights: list[Any], given: list[int], taken: list[int]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, taken)]
    graph = helper.make_graph(nodes, "model", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def changed(model: onnx.ModelProto, seed: int) -> bytes:
    """The file with other weights: each moved by a few percent. Limits of a Clip stay."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    rng = np.random.default_rng(seed)
    for tensor in twin.graph.initializer:
        if tensor.dims:
            value = numpy_helper.to_array(tensor)
            moved = value * (1 + _APART * rng.standard_normal(value.shape, np.float32))
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), tensor.name))
    return twin.SerializeToString()


class Twins:
    """Puts models of a kind into a device's store: the first as the agent adds it, the others as twins of it."""

    def __init__(self, device: Device, kind: Kind, folder: Path) -> None:
        self._device = device
        self._kind = kind
        self._runtime = load_runtime("onnx")
        self._first = self._add_first(folder / f"{kind.name}.onnx")

    def _add_first(self, path: Path) -> VersionEntry:
        path.write_bytes(changed(self._kind.model, 0))
        return self._device.add(path, f"{path.stem.lower()}-first")

    @property
    def forms(self) -> list[str]:
        """What the agent chose to open it in."""
        record = records_of(self._first).get(str(self._first.chosen), {})
        return [
            "-".join(one["route"][:1] + ([] if one["route"][1] else ["unpacked"])) for one in record.get("forms", [])
        ]

    def make(self, name: str, data: bytes, *, prepare: bool = True) -> VersionEntry:
        """One twin's blobs, and its entry for the catalog. Without ``prepare`` it is opened as it came."""
        first, store = self._first, self._device.store
        manifest = first.manifest
        (variant,) = manifest.variants
        ref = store.add_blob(name, VERSION, f"{name}.onnx", [data], len(data))
        file = variant.file.model_copy(update={"name": f"{name}.onnx", "sha256": ref.sha256, "size": ref.size})
        twin = variant.model_copy(update={"file": file})
        candidate = str(first.chosen)
        blobs = {file.name: ref}
        choice = dict(first.choice or {})
        record = dict(records_of(first).get(candidate, {}))
        if record and not prepare:
            record = {}
        if record:
            record["key"] = self._device.form_key(twin, _PROVIDER)
            if record.get("part"):
                record["part"] = part = f"{PREFIX}{candidate}/{record['key'][:12]}"
                blobs[part] = self._prepared(name, part, data)
        choice["forms"] = {candidate: record} if record else {}
        measured = dict(first.measurements[candidate])
        measured["key"] = {**measured["key"], "variant_digest": ref.sha256}  # type: ignore[dict-item]
        return first.model_copy(
            update={
                "manifest": manifest.model_copy(update={"name": name, "version": VERSION, "variants": (twin,)}),
                "blobs": blobs,
                "choice": choice,
                "measurements": {candidate: measured},
            }
        )

    def _prepared(self, name: str, part: str, data: bytes) -> BlobRef:
        with _memory_file(data) as model, _memory_file(b"") as target:
            self._runtime.prepare(model, target, LoadOptions(_PROVIDER, self._device.threads, {}, PLAIN))
            return self._device.store.add_blob(name, VERSION, part, _pieces(target))


def commit(device: Device, entries: Mapping[str, VersionEntry]) -> None:
    """All of them into the catalog, active, in one generation."""

    def change(document: CatalogDocument) -> CatalogDocument:
        added = {
            name: ModelEntry(active=entry.manifest.version, versions={entry.manifest.version: entry})
            for name, entry in entries.items()
        }
        return document.model_copy(update={"models": {**document.models, **added}})

    device.store.commit(change)


class _memory_file:  # noqa: N801 - used as a function
    def __init__(self, data: bytes) -> None:
        self._descriptor = os.memfd_create("twin", os.MFD_CLOEXEC)
        os.write(self._descriptor, data)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _pieces(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(descriptor, 1 << 20, offset):
        yield piece
        offset += len(piece)
