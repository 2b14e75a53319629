"""Accelerators, TPM and swap areas: what is on a bus or in the chip, and whether its driver is there too.

Presence is one thing, use another: a Hailo or Coral without its driver's node is listed and not usable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.hardware import boards
from agent.hardware.facts import Accelerator, SwapArea, Tpm
from agent.hardware.parse import hex_number, number
from agent.hardware.tree import Tree

_PCI = "sys/bus/pci/devices"
_USB = "sys/bus/usb/devices"
_HAILO_VENDOR = 0x1E60
_INTEL_VENDOR = 0x8086
_EDGETPU_PCI = (0x1AC1, 0x089A)
#: The same USB stick before and after the runtime has loaded its firmware.
_EDGETPU_USB = frozenset({(0x1A6E, 0x089A), (0x18D1, 0x9302)})
_DISPLAY_CLASS = 0x03
_MOST_DEVICES = 512


@dataclass(frozen=True, slots=True)
class BusDevice:
    """A device on a bus, by its numbers; ``kind`` is the PCI class byte where known."""

    address: str
    vendor: int
    product: int
    kind: int | None = None

    def __str__(self) -> str:
        return f"{self.address} {self.vendor:04x}:{self.product:04x}"


def accelerators(tree: Tree, compatible: Sequence[str], jetson: str | None) -> tuple[Accelerator, ...]:
    """All accelerators; ``jetson`` is the Jetson product, '' for an unknown one, None for other machines."""
    found: list[Accelerator] = []
    if jetson is not None:
        found.append(Accelerator("cuda", _if_captured(tree, _any_node(tree, boards.JETSON_CUDA)), "integrated GPU"))
        if boards.jetson_has_dla(jetson):
            usable = _if_captured(tree, _any_node(tree, boards.JETSON_DLA))
            found.append(Accelerator("dla", usable, "deep learning accelerator"))
    for soc in boards.SOC_ACCELERATORS:
        chip = next((entry for entry in compatible if re.fullmatch(soc.where, entry)), None)
        if chip:
            usable = _any_node(tree, soc.nodes)
            if soc.needs_dev:
                usable = _if_captured(tree, usable)
            elif not usable and soc.devfreq:
                usable = any(soc.devfreq in name.lower() for name in tree.names("sys/class/devfreq")) or usable
            found.append(Accelerator(soc.kind, usable, f"part of {chip}"))
    found.extend(_on_pci(tree))
    found.extend(_on_usb(tree))
    return tuple(found)


def _on_pci(tree: Tree) -> Iterator[Accelerator]:
    graphics = False
    for device in _pci_devices(tree):
        if device.vendor == _HAILO_VENDOR:
            yield Accelerator("hailo", _node_starting(tree, "hailo"), f"PCI {device}")
        elif (device.vendor, device.product) == _EDGETPU_PCI:
            yield Accelerator("edgetpu", _node_starting(tree, "apex_"), f"PCI {device}")
        elif device.vendor == _INTEL_VENDOR and device.kind == _DISPLAY_CLASS and not graphics:
            graphics = True
            node = any(name.startswith("renderD") for name in tree.names("dev/dri"))
            yield Accelerator("intel-igpu", _if_captured(tree, node), f"PCI {device}")


def _on_usb(tree: Tree) -> Iterator[Accelerator]:
    for name in tree.names(_USB, _MOST_DEVICES):
        if ":" in name:  # an interface of a device that is listed itself
            continue
        vendor = hex_number(tree.line(f"{_USB}/{name}/idVendor"), digits=4)
        product = hex_number(tree.line(f"{_USB}/{name}/idProduct"), digits=4)
        if (vendor, product) in _EDGETPU_USB:
            yield Accelerator("edgetpu", True, f"USB {name} {vendor:04x}:{product:04x}")


def _pci_devices(tree: Tree) -> Iterator[BusDevice]:
    for name in tree.names(_PCI, _MOST_DEVICES):
        vendor = hex_number(tree.line(f"{_PCI}/{name}/vendor"), digits=4)
        product = hex_number(tree.line(f"{_PCI}/{name}/device"), digits=4)
        if vendor is None or product is None:
            continue
        kind = hex_number(tree.line(f"{_PCI}/{name}/class"), digits=6)
        yield BusDevice(name, vendor, product, None if kind is None else kind >> 16)


def _if_captured(tree: Tree, usable: bool | None) -> bool | None:
    """For what is told by device nodes alone: a recording without any ``dev`` says nothing of them."""
    return usable if usable or tree.exists("dev") else None


def _any_node(tree: Tree, paths: Sequence[str]) -> bool | None:
    answers = [tree.exists(path) for path in paths]
    if any(answers):
        return True
    return None if None in answers else False


def _node_starting(tree: Tree, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tree.names("dev", 4096))


def tpm(tree: Tree) -> Tpm | None:
    """The first TPM chip; None when the kernel shows none."""
    chip = next((name for name in tree.names("sys/class/tpm") if name.startswith("tpm") and name[3:].isdigit()), None)
    if chip is None:
        return None
    version = number(tree.line(f"sys/class/tpm/{chip}/tpm_version_major"), most=9)
    return Tpm(version, tree.exists(f"dev/tpmrm{chip[3:]}"))


def swap(tree: Tree) -> tuple[SwapArea, ...] | None:
    """The swap areas in use (proc_swaps(5)); None when it cannot be told."""
    text = tree.text("proc/swaps", 1 << 16)
    if text is None or not text.startswith("Filename"):
        return None
    areas: list[SwapArea] = []
    for line in text.split("\n")[1:33]:
        words = line.split()
        size = number(words[2]) if len(words) >= 5 else None
        if size is None or not words[0].isprintable():
            continue
        kind = "zram" if "/zram" in words[0] else "file" if words[1] == "file" else "disk"
        areas.append(SwapArea(words[0], kind, size // 1024))
    return tuple(areas)
