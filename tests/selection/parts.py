"""Manifests, facts and inventories in one line each, so that a test shows only what it is about."""

from __future__ import annotations

from typing import Any

from agent.bundles.manifest import Manifest
from agent.hardware.facts import FEATURES, Facts
from agent.selection.inventory import InstalledRuntime, RuntimeInventory

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
INSTALLED = RuntimeInventory({"onnx": InstalledRuntime("1.23.2", ("AzureExecutionProvider", CPU))})

STATIC = {"form": "QDQ", "ranges": "static"}
DYNAMIC = {"ranges": "dynamic"}


def variant(name: str, precision: str = "fp32", mb: float = 14, technique: Any = None, **fields: Any) -> dict[str, Any]:
    """A variant of the manifest; ``technique`` is the parameters of ``quantized``."""
    return {
        "id": name,
        "runtime": "onnx",
        "precision": precision,
        "technique": [{"name": "quantized", "parameters": technique}] if technique else [],
        "file": {
            "name": f"{name}.onnx",
            "sha256": name.encode().hex().ljust(64, "0")[:64],
            "size": int(mb * (1 << 20)),
        },
        **fields,
    }


def manifest(*variants: dict[str, Any], **fields: Any) -> Manifest:
    """A manifest of these variants; four usual ones when there are none."""
    usual = (
        variant("fp32"),
        variant("fp16", "fp16", 7),
        variant("int8-static", "int8", 4, STATIC),
        variant("int8-dynamic", "int8", 4, DYNAMIC),
    )
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64]}
    return Manifest.model_validate({
        "format": "edge-model/1", "name": "digits", "version": "1.0.0", "inputs": [tensor], "outputs": [tensor],
        "variants": variants or usual, **fields,
    })  # fmt: skip


def facts(**fields: Any) -> Facts:
    """A supported x86-64 machine with no feature but AVX2; ``features`` adds to that."""
    features = {**dict.fromkeys(FEATURES, False), "avx2": True, **fields.pop("features", {})}
    usual: dict[str, Any] = {
        "arch": "x86_64", "user_bits": 64, "supported": True, "mem_total_mb": 8192, "mem_available_mb": 6000,
        "mem_limit_mb": 8192,
    }  # fmt: skip
    return Facts(**{**usual, **fields}, features=features)


def arm(**fields: Any) -> Facts:
    """A supported 64-bit ARM machine with NEON; ``features`` adds to that."""
    features = {"avx2": False, "neon": True, **fields.pop("features", {})}
    return facts(**{"arch": "aarch64", **fields}, features=features)
