"""What device tree and firmware say about the machine's identity and the accelerators that are part of it.

Raspberry Pi: the revision code is burnt into the board and decides; the model string lags behind it (a Zero 2 W calls
itself ``Zero 2``). Jetson: only the module's part number is reliable; the model string is that of a kit, a carrier or a
vendor. Sources: Raspberry Pi documentation, "Raspberry Pi revision codes"; NVIDIA Jetson Linux Developer Guide, "Jetson
modules and configurations"; ``compatible`` strings of Linux and Jetson Linux device trees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agent.hardware.parse import without_revision

#: Type field (bits 4-11) of a new-style revision code → name. Internal and prototype types are left out.
_PI_TYPES = {
    0x00: "Model A", 0x01: "Model B", 0x02: "Model A Plus", 0x03: "Model B Plus", 0x04: "2 Model B",
    0x06: "Compute Module", 0x08: "3 Model B", 0x09: "Zero", 0x0A: "Compute Module 3", 0x0C: "Zero W",
    0x0D: "3 Model B Plus", 0x0E: "3 Model A Plus", 0x10: "Compute Module 3 Plus", 0x11: "4 Model B",
    0x12: "Zero 2 W", 0x13: "400", 0x14: "Compute Module 4", 0x15: "Compute Module 4S", 0x17: "5 Model B",
    0x18: "Compute Module 5", 0x19: "500", 0x1A: "Compute Module 5 Lite",
}  # fmt: skip
_PI_OLD_CODES = {
    **dict.fromkeys((0x02, 0x03, 0x04, 0x05, 0x06, 0x0D, 0x0E, 0x0F), "Model B"),
    **dict.fromkeys((0x07, 0x08, 0x09), "Model A"),
    **dict.fromkeys((0x10, 0x13), "Model B Plus"),
    **dict.fromkeys((0x11, 0x14), "Compute Module"),
    **dict.fromkeys((0x12, 0x15), "Model A Plus"),
}
_PI_COMPATIBLE = {
    "2-model-b": 0x04, "3-model-b": 0x08, "model-zero": 0x09, "3-compute-module": 0x0A, "model-zero-w": 0x0C,
    "3-model-b-plus": 0x0D, "3-model-a-plus": 0x0E, "3-compute-module-plus": 0x10, "4-model-b": 0x11,
    "model-zero-2-w": 0x12, "model-zero-2": 0x12, "400": 0x13, "4-compute-module": 0x14, "4-compute-module-s": 0x15,
    "5-model-b": 0x17, "5-compute-module": 0x18, "500": 0x19,
}  # fmt: skip

#: Part number of a Jetson module (or of the kit that holds exactly one) → product. P3767 is two products by its SKU.
_JETSON_PARTS = {
    "p2180": "TX1", "p2371": "TX1",
    "p3310": "TX2", "p3489": "TX2", "p3636": "TX2", "p2771": "TX2",
    "p3448": "Nano", "p3450": "Nano", "p3541": "Nano", "p3542": "Nano",
    "p2888": "AGX Xavier", "p2972": "AGX Xavier",
    "p3668": "Xavier NX", "p3518": "Xavier NX",
    "p3701": "AGX Orin", "p3730": "AGX Orin",
    "p3767-0000": "Orin NX", "p3767-0001": "Orin NX", "p3767-0002": "Orin NX",
    "p3767-0003": "Orin Nano", "p3767-0004": "Orin Nano", "p3767-0005": "Orin Nano", "p3766": "Orin Nano",
    "p3834": "AGX Thor",
}  # fmt: skip
#: Words of compatible or model strings, in the order in which they are tried (``xavier nx`` before ``xavier``).
_JETSON_WORDS = (
    ("thor", "AGX Thor"), ("orin nano", "Orin Nano"), ("orin nx", "Orin NX"), ("agx orin", "AGX Orin"),
    ("orin jetson small", "AGX Orin"), ("orin jetson", "AGX Orin"), ("xavier nx", "Xavier NX"),
    ("agx xavier", "AGX Xavier"), ("jetson agx", "AGX Xavier"), ("jetson xavier", "AGX Xavier"),
    ("galen", "AGX Xavier"), ("tx2", "TX2"), ("quill", "TX2"), ("lanai", "TX2"), ("tx1", "TX1"), ("jetson cv", "TX1"),
    ("tk1", "TK1"), ("jetson nano", "Nano"),
)  # fmt: skip
_JETSON_DLA = frozenset({"Xavier NX", "AGX Xavier", "Orin NX", "AGX Orin"})
_PART = r"(?a)p(\d{4})-(\d{4})"


@dataclass(frozen=True, slots=True)
class SocAccelerator:
    """An accelerator that is part of the chip, and the names that show that its driver is loaded.

    ``where`` is a pattern of ``compatible`` entries; ``nodes`` are paths, of which one is enough; ``devfreq`` is a word
    in a name below ``sys/class/devfreq``. ``needs_dev``: without any ``dev`` folder recorded nothing is said of it.
    """

    kind: str
    where: str
    nodes: tuple[str, ...]
    devfreq: str = ""
    needs_dev: bool = False


SOC_ACCELERATORS = (
    SocAccelerator("rknpu", r"rockchip,rk(3566|3568|3576|3588)[a-z]?(-.*)?", ("sys/kernel/debug/rknpu",), "npu"),
    SocAccelerator("vsi-npu", r"fsl,imx8mp(-.*)?", ("dev/galcore",)),
    SocAccelerator("tidl", r"ti,(j722s|am67a|j721e)(-.*)?", ("dev/rpmsg_ctrl0", "dev/remoteproc0"), needs_dev=True),
)
JETSON_CUDA = ("dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvgpu", "dev/nvidia0")
JETSON_DLA = ("dev/nvhost-nvdla0", "dev/nvhost-ctrl-nvdla0")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the machine is. ``jetson``: the product after "NVIDIA Jetson", '' for an unknown one, None elsewhere."""

    board: str | None
    jetson: str | None = None


def identify(
    model: str | None,
    compatible: Sequence[str],
    *,
    revision: int | None = None,
    old_hardware: str | None = None,
    old_model: str | None = None,
    part_hint: str | None = None,
    product_name: str | None = None,
) -> Identity:
    """The board's name. ``old_hardware``/``old_model`` are cpuinfo's, ``part_hint`` names a device tree's source file.

    Without a device tree the name is cpuinfo's on a Raspberry Pi, else DMI's.
    """
    device_tree = bool(model or compatible)
    name = model if device_tree else product_name
    if _is_pi(name or old_model, compatible, None if device_tree else old_hardware):
        return Identity(_pi_name(name or old_model, compatible, revision) or name)
    if _is_jetson(name or "", compatible):
        product = _jetson_product(compatible, name or "", part_hint)
        return Identity(f"NVIDIA Jetson {product}" if product else name, product or "")
    return Identity(name or product_name)


def parse_revision(text: str | None) -> int | None:
    """A revision code as cpuinfo prints it; 0000 says nothing."""
    found = re.fullmatch(r"[0-9a-fA-F]{4,8}", text or "")
    return int(found[0], 16) or None if found else None


def _is_pi(model: str | None, compatible: Iterable[str], hardware: str | None) -> bool:
    return (
        any(entry.startswith("raspberrypi,") for entry in compatible)
        or (model or "").startswith("Raspberry Pi")
        or re.fullmatch(r"BCM2[78][0-9]{2}", hardware or "") is not None
    )


def _pi_name(model: str | None, compatible: Iterable[str], revision: int | None) -> str | None:
    name = _pi_revision_name(revision)
    if name is None and model is not None and model.startswith("Raspberry Pi"):
        return without_revision(model)
    if name is None:
        keys = (entry.partition(",")[2] for entry in compatible if entry.startswith("raspberrypi,"))
        name = next((_PI_TYPES[_PI_COMPATIBLE[key]] for key in keys if key in _PI_COMPATIBLE), None)
    return f"Raspberry Pi {name}" if name else None


def _pi_revision_name(revision: int | None) -> str | None:
    if revision is None:
        return None
    if revision & (1 << 23):
        return _PI_TYPES.get(revision >> 4 & 0xFF)
    # Old codes are plain numbers; a warranty bit may stand above them.
    return _PI_OLD_CODES.get(revision & 0xFFFF)


def _is_jetson(model: str, compatible: Sequence[str]) -> bool:
    """A Tegra chip alone is not enough: tablets, a game console and cars have one too."""
    everything = " ".join((model, *compatible)).lower()
    if "nvidia" not in everything and "jetson" not in everything:
        return False
    return "jetson" in everything or bool(_product_by_part(everything) or _product_by_words((model,)))


def _jetson_product(compatible: Sequence[str], model: str, part_hint: str | None) -> str | None:
    hint = (part_hint or "").rpartition("/")[2]
    return (
        _product_by_part(" ".join(compatible))
        or _product_by_part(hint)
        or _product_by_words((model,))
        or _product_by_words(compatible)
    )


def _product_by_part(text: str) -> str | None:
    for number, sku in re.findall(_PART, text):
        product = _JETSON_PARTS.get(f"p{number}-{sku}") or _JETSON_PARTS.get(f"p{number}")
        if product:
            return product
    return None


def _product_by_words(texts: Iterable[str]) -> str | None:
    for text in texts:
        words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
        for needle, product in _JETSON_WORDS:
            if needle in words:
                return product
    return None


def jetson_has_dla(product: str) -> bool:
    """Whether the module has deep learning accelerators beside its GPU (Orin Nano, Nano, TX and Thor have none)."""
    return product in _JETSON_DLA
