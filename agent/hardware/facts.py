"""What detection knows about a machine: plain frozen values, no behaviour.

``None`` means unknown, never "no": a file that is absent, unreadable or nonsensical leaves its value unknown and, where
something was wrong with it, a line in ``notes``. Sizes are in MiB, temperatures in degrees Celsius.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

#: The CPU features that a bundle may require, in the order in which they are printed.
FEATURES = (
    "neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "aes", "avx2", "avx512_vnni", "avx_vnni", "amx_int8",
)  # fmt: skip

_NO_FEATURES: Mapping[str, bool | None] = MappingProxyType(dict.fromkeys(FEATURES))


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device that can run models. ``usable``: its driver is there too; ``detail``: where it was seen."""

    kind: str
    usable: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TripPoint:
    """A temperature at which the kernel acts: ``passive`` throttles, ``hot`` warns, ``critical`` switches off."""

    kind: str
    celsius: float


@dataclass(frozen=True, slots=True)
class ThermalZone:
    """One sensor of ``sys/class/thermal``. ``celsius`` is unknown for a sensor that is off or shows a constant."""

    name: str
    celsius: float | None
    trips: tuple[TripPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class SwapArea:
    """A swap area in use. ``kind``: ``zram`` (memory), ``disk`` or ``file`` (both end on a medium that can be read)."""

    path: str
    kind: str
    size_mb: int


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that holds the agent's state."""

    path: str
    total_mb: int
    free_mb: int


@dataclass(frozen=True, slots=True)
class Tpm:
    """A TPM chip: its major version (1 or 2) and whether its resource-managed node is there."""

    version: int | None
    usable: bool | None


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine. The first block are the keys that every part of the agent may rely on; the rest is extra."""

    board: str | None = None
    soc: str | None = None
    arch: str | None = None
    user_bits: int | None = None
    cores_online: int | None = None
    core_types: tuple[tuple[str, int], ...] | None = None
    big_cores: tuple[int, ...] | None = None
    features: Mapping[str, bool | None] = field(default_factory=lambda: _NO_FEATURES)
    mem_total_mb: int | None = None
    mem_available_mb: int | None = None
    mem_limit_mb: int | None = None
    cpu_limit: float | None = None
    accelerators: tuple[Accelerator, ...] = ()
    throttled_now: bool | None = None
    supported: bool = False
    emulated: bool = False

    online_cpus: tuple[int, ...] | None = None
    #: Online CPUs that this process may run on: cpuset, and on the live machine the scheduler's affinity.
    usable_cpus: tuple[int, ...] | None = None
    #: Names of the kinds of core that the big cores are of (all cores, where there is one kind).
    big_core_types: tuple[str, ...] | None = None
    #: The CPU's marketing name where the kernel prints one (x86).
    cpu_model: str | None = None
    max_mhz: int | None = None
    governor: str | None = None
    compatible: tuple[str, ...] = ()
    model: str | None = None
    page_size: int | None = None
    thermal_zones: tuple[ThermalZone, ...] = ()
    power_mode: str | None = None
    disk: Disk | None = None
    tpm: Tpm | None = None
    kernel: str | None = None
    os: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    swap: tuple[SwapArea, ...] | None = None
    cgroup_version: str | None = None
    live: bool = False
    notes: tuple[str, ...] = ()
