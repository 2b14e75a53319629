"""Names of ARM cores by implementer and part number, and which of them are the small ones of a pair.

The numbers are the MIDR_EL1 fields that the kernel prints as ``CPU implementer`` and ``CPU part`` (Arm architecture
reference manuals; Linux ``arch/arm64/include/asm/cputype.h``); the names are spelt as ``lscpu`` prints them.
"""

from __future__ import annotations

_ARM = """
    810 ARM810, 920 ARM920, 922 ARM922, 926 ARM926, 940 ARM940, 946 ARM946, 966 ARM966, a20 ARM1020, a22 ARM1022,
    a26 ARM1026, b02 ARM11 MPCore, b36 ARM1136, b56 ARM1156, b76 ARM1176,
    c05 Cortex-A5, c07 Cortex-A7, c08 Cortex-A8, c09 Cortex-A9, c0d Cortex-A17, c0e Cortex-A17, c0f Cortex-A15,
    c14 Cortex-R4, c15 Cortex-R5, c17 Cortex-R7, c18 Cortex-R8, d13 Cortex-R52, d14 Cortex-R52+, d15 Cortex-R82,
    d01 Cortex-A32, d02 Cortex-A34, d03 Cortex-A53, d04 Cortex-A35, d05 Cortex-A55, d06 Cortex-A65, d07 Cortex-A57,
    d08 Cortex-A72, d09 Cortex-A73, d0a Cortex-A75, d0b Cortex-A76, d0c Neoverse-N1, d0d Cortex-A77,
    d0e Cortex-A76AE, d40 Neoverse-V1, d41 Cortex-A78, d42 Cortex-A78AE, d43 Cortex-A65AE, d44 Cortex-X1,
    d46 Cortex-A510, d47 Cortex-A710, d48 Cortex-X2, d49 Neoverse-N2, d4a Neoverse-E1, d4b Cortex-A78C,
    d4c Cortex-X1C, d4d Cortex-A715, d4e Cortex-X3, d4f Neoverse-V2, d80 Cortex-A520, d81 Cortex-A720,
    d82 Cortex-X4, d83 Neoverse-V3AE, d84 Neoverse-V3, d85 Cortex-X925, d87 Cortex-A725, d88 Cortex-A520AE,
    d89 Cortex-A720AE, d8a C1-Nano, d8b C1-Pro, d8c C1-Ultra, d8e Neoverse-N3, d8f Cortex-A320, d90 C1-Premium
"""
_BROADCOM = "00f Brahma-B15, 100 Brahma-B53, 516 ThunderX2"
_CAVIUM = """
    0a0 ThunderX, 0a1 ThunderX-88XX, 0a2 ThunderX-81XX, 0a3 ThunderX-83XX, 0af ThunderX2-99xx, 0b0 OcteonTX2,
    0b1 OcteonTX2-98XX, 0b2 OcteonTX2-96XX, 0b3 OcteonTX2-95XX, 0b8 ThunderX3-T110
"""
_QUALCOMM = """
    001 Oryon, 00f Scorpion, 02d Scorpion, 04d Krait, 06f Krait, 201 Kryo, 205 Kryo, 211 Kryo, 800 Falkor-V1/Kryo,
    801 Kryo-V2, 802 Kryo-3XX-Gold, 803 Kryo-3XX-Silver, 804 Kryo-4XX-Gold, 805 Kryo-4XX-Silver, c00 Falkor, c01 Saphira
"""
_APPLE = """
    020 Icestorm-A14, 021 Firestorm-A14, 022 Icestorm-M1, 023 Firestorm-M1, 024 Icestorm-M1-Pro, 025 Firestorm-M1-Pro,
    028 Icestorm-M1-Max, 029 Firestorm-M1-Max, 030 Blizzard-A15, 031 Avalanche-A15, 032 Blizzard-M2, 033 Avalanche-M2
"""

_BY_IMPLEMENTER: dict[int, str] = {
    0x41: _ARM,
    0x42: _BROADCOM,
    0x43: _CAVIUM,
    0x46: "001 A64FX",
    0x48: "d01 Kunpeng-920, d40 Cortex-A76",
    0x4E: "000 Denver, 003 Denver 2, 004 Carmel",
    0x50: "000 X-Gene",
    0x51: _QUALCOMM,
    0x53: "001 exynos-m1, 002 exynos-m3, 003 exynos-m4, 004 exynos-m5",
    0x56: "131 Feroceon-88FR131, 581 PJ4/PJ4b, 584 PJ4B-MP",
    0x61: _APPLE,
    0x66: "526 FA526, 626 FA626",
    0x70: "660 FTC660, 661 FTC661, 662 FTC662, 663 FTC663",
    0xC0: "ac3 Ampere-1, ac4 Ampere-1a",
}

#: Parts of cores older than ARMv7 (no NEON): ARM8 to ARM11.
ARMV6_PARTS = frozenset({0xB02, 0xB36, 0xB56, 0xB76})

#: In-order cores that Arm, Qualcomm and Apple pair with faster ones: the small side where kinds are mixed.
LITTLE = frozenset({
    "Cortex-A5", "Cortex-A7", "Cortex-A32", "Cortex-A34", "Cortex-A35", "Cortex-A53", "Cortex-A55", "Cortex-A320",
    "Cortex-A510", "Cortex-A520", "Cortex-A520AE", "C1-Nano", "Kryo-3XX-Silver", "Kryo-4XX-Silver",
    "Icestorm-A14", "Icestorm-M1", "Icestorm-M1-Pro", "Icestorm-M1-Max", "Blizzard-A15", "Blizzard-M2",
})  # fmt: skip


def core_name(implementer: int, part: int) -> str | None:
    """The core's name, or None for a number that is not in the table."""
    for row in _BY_IMPLEMENTER.get(implementer, "").split(","):
        number, _, name = row.strip().partition(" ")
        if name and int(number, 16) == part:
            return name
    return None
