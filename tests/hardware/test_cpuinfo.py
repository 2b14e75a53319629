"""What cpuinfo tells and what it does not: layouts, lines cut off, foreign architectures, arbitrary text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.hardware.cpuinfo import (
    MAX_CPU,
    arch_of,
    core_names,
    family_of,
    features_of,
    kinds_of,
    parse_cpuinfo,
)
from agent.hardware.facts import FEATURES
from tests.hardware.sysroot import A53, A55, A72, A76, V2, cpuinfo, x86

OLD_LAYOUT = """Processor\t: ARMv7 Processor rev 4 (v7l)
processor\t: 0
BogoMIPS\t: 1694.10

processor\t: 1
BogoMIPS\t: 1694.10

Features\t: swp half thumb fastmult vfp edsp thumbee neon vfpv3 tls vfpv4 idiva idivt
CPU implementer\t: 0x41
CPU architecture: 7
CPU part\t: 0xc0f
"""
SINGLE_CORE_LAYOUT = """Processor\t: ARMv7 Processor rev 2 (v7l)
BogoMIPS\t: 298.32
Features\t: swp half thumb fastmult vfp edsp neon vfpv3
CPU implementer\t: 0x41
CPU architecture: 7
CPU part\t: 0xc08

Hardware\t: Some board
Revision\t: 0000
"""


def features(text: str, arch: str = "aarch64") -> dict[str, bool | None]:
    return features_of(parse_cpuinfo(text), arch)


def test_a_feature_counts_only_when_every_core_has_it() -> None:
    both = features(cpuinfo([A55, A55, A76]))
    assert both["dotprod"] is True
    mixed = features(cpuinfo([A53, A53, A76]))
    assert mixed["dotprod"] is False
    assert mixed["neon"] is True
    assert mixed["avx2"] is False


def test_old_kernels_name_what_all_cores_share_once() -> None:
    info = parse_cpuinfo(OLD_LAYOUT)
    assert sorted(info.cpus) == [0, 1]
    assert set(core_names(kinds_of(info, None)).values()) == {"Cortex-A15"}
    assert arch_of(info) == "armv7l"
    assert features_of(info, "armv7l")["neon"] is True


def test_old_kernels_for_one_core_number_none() -> None:
    info = parse_cpuinfo(SINGLE_CORE_LAYOUT)
    assert core_names(kinds_of(info, (0,))) == {0: "Cortex-A8"}
    assert features_of(info, "armv7l")["neon"] is True


@pytest.mark.parametrize("keep", range(0, len(cpuinfo([A76] * 3)), 7))
def test_cutting_the_file_anywhere_never_turns_has_into_has_not(keep: int) -> None:
    for ending in ("", "\n"):  # somebody may have closed the cut line
        found = features(cpuinfo([A76] * 3)[:keep] + ending)
        single_block = keep < len(cpuinfo([A76])) and ending
        if not single_block:  # with one block there is nothing to compare a closed line with
            assert found["dotprod"] in {True, None}
            assert found["neon"] in {True, None}
        kinds = set(core_names(kinds_of(parse_cpuinfo(cpuinfo([A76] * 3)[:keep]), None)).values())
        assert kinds <= {"Cortex-A76"}


def test_a_damaged_line_is_left_out_and_the_others_count() -> None:
    text = cpuinfo([A76, A76])
    damaged = text.replace("asimddp", "asi\x00\x00dp", 1)
    assert features(damaged)["dotprod"] is True
    assert features(cpuinfo([A76]).replace("asimd", "as\ufffdimd"))["dotprod"] is None


@pytest.mark.parametrize("line", ["", "none of these", "@@@@", "asimddp", "0x41"])
def test_a_line_that_no_kernel_wrote_tells_nothing(line: str) -> None:
    text = f"processor\t: 0\nFeatures\t: {line}\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"
    assert features(text)["dotprod"] is None


def test_another_architectures_cpuinfo_is_not_believed() -> None:
    found = features(x86("aes avx2"), "aarch64")
    assert found["dotprod"] is None
    assert found["aes"] is None
    assert found["avx2"] is False
    assert features(cpuinfo([A76]), "x86_64")["avx2"] is None
    assert features("isa\t: rv64imafdc\n", "riscv64")["neon"] is False


def test_x86_features_are_words_of_flags() -> None:
    found = features(x86("aes avx2 avx512_vnni"), "x86_64")
    assert found["avx512_vnni"] is True
    assert found["avx_vnni"] is False
    assert found["neon"] is False
    assert arch_of(parse_cpuinfo(x86("aes"))) == "x86_64"


def test_arm32_words_of_a_64_bit_core_seen_by_a_32_bit_kernel() -> None:
    text = (
        "processor\t: 0\nmodel name\t: ARMv7 Processor rev 4 (v7l)\n"
        "Features\t: half thumb fastmult vfp edsp neon vfpv3\n"
        "CPU implementer\t: 0x41\nCPU architecture: 7\nCPU part\t: 0xd03\n\n"
    )
    info = parse_cpuinfo(text)
    assert arch_of(info) == "armv7l"
    assert core_names(kinds_of(info, None)) == {0: "Cortex-A53"}


def test_an_armv6_core_is_not_called_armv7() -> None:
    text = (
        "processor\t: 0\nFeatures\t: half thumb fastmult vfp edsp java tls\nCPU implementer\t: 0x41\n"
        "CPU architecture: 7\nCPU part\t: 0xb76\n"
    )
    info = parse_cpuinfo(text)
    assert arch_of(info) == "armv6l"
    assert features_of(info, "armv6l")["neon"] is False


def test_only_online_cpus_are_counted_by_kind() -> None:
    info = parse_cpuinfo(cpuinfo([A53, A53, A72, A72]))
    assert core_names(kinds_of(info, (0, 3))) == {0: "Cortex-A53", 3: "Cortex-A72"}
    assert core_names(kinds_of(info, (7,))) == {}


def test_a_core_that_nobody_has_named_is_unknown() -> None:
    info = parse_cpuinfo(cpuinfo([(0x41, 0xFFF, V2[2])]))
    assert core_names(kinds_of(info, None)) == {0: None}


def test_processor_numbers_are_bounded() -> None:
    text = "processor\t: 99999999\nBogoMIPS\t: 1\n\nprocessor\t: -1\n\nprocessor\t: one\n\nprocessor\t: 3\n\n"
    assert set(parse_cpuinfo(text).cpus) == {3}
    assert max(parse_cpuinfo(f"processor\t: {MAX_CPU}\n\n").cpus) == MAX_CPU


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet=st.sampled_from(list("processor\t: 0123xFeatures CPU implementer part flags isa\n\0\ufffd")),
        max_size=600,
    )
    | st.text(max_size=300)
)
def test_no_text_can_break_it(text: str) -> None:
    info = parse_cpuinfo(text)
    assert len(info.cpus) <= MAX_CPU + 1
    arch_of(info)
    family_of(info)
    for arch in ("aarch64", "armv7l", "x86_64", "riscv64", None):
        found = features_of(info, arch)
        assert set(found) == set(FEATURES)
        assert all(value in {True, False, None} for value in found.values())
    core_names(kinds_of(info, (0, 1)))
