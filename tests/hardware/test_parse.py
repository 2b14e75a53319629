"""Kernel text turned into values: the formats, and everything that is not the format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.hardware import boards, parse
from agent.hardware.cpuinfo import MAX_CPU

anything = st.text(max_size=200) | st.text(alphabet="0123456789-,:/ \n\tx.kBmax", max_size=80)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3\n", (0, 1, 2, 3)),
        ("0,2-4", (0, 2, 3, 4)),
        ("5", (5,)),
        ("", None),
        (None, None),
        ("3-1", None),
        ("0-", None),
        ("0-99999999", None),
        ("0-4294967295", None),
        ("a-b", None),
        ("0;1", None),
        ("٣", None),
    ],
)
def test_cpu_lists(text: str | None, cpus: tuple[int, ...] | None) -> None:
    assert parse.cpu_list(text) == cpus


def test_memory_available_on_old_kernels_is_the_sum_that_the_kernel_would_have_made() -> None:
    old = parse.meminfo("MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 20 kB\nCached: 30 kB\n")
    assert parse.available_kb(old) == 150
    assert parse.available_kb(parse.meminfo("MemTotal: 1000 kB\nMemFree: 100 kB\n")) is None
    assert parse.available_kb(parse.meminfo("MemTotal: 1000 kB\nMemAvailable: 5000 kB\n")) is None


def test_a_cut_number_of_meminfo_is_not_believed() -> None:
    assert parse.meminfo("MemTotal:  8258448 kB\nMemAvail") == {"MemTotal": 8258448}
    assert parse.meminfo("MemTotal:  825") == {}
    assert parse.meminfo("MemTotal: -5 kB\nMemTotal: many kB\nMemTotal: 7 MB\n") == {}


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("max", None),
        ("536870912\n", 536870912),
        ("9223372036854771712", None),  # v1's "no limit" with pages of 4 KiB
        ("9223372036854710272", None),  # … of 64 KiB
        ("-1", None),
        ("garbage", None),
        ("0", 0),
    ],
)
def test_memory_limits(text: str, limit: int | None) -> None:
    assert parse.memory_limit(text) == limit


def test_cpu_quotas() -> None:
    assert parse.cpu_quota("150000", "100000") == pytest.approx(1.5)
    assert parse.cpu_quota("max", "100000") is None
    assert parse.cpu_quota("-1", "100000") is None
    assert parse.cpu_quota("100000", "0") is None
    assert parse.cpu_quota("4611686018427387904", "1") is None


def test_own_groups_of_both_hierarchies() -> None:
    text = "9:memory:/docker/a:b\n4:cpu,cpuacct:/docker/c\n1:name=systemd:/x\n0::/user.slice\n"
    paths = parse.cgroup_paths(text)
    assert paths["memory"] == "docker/a:b"
    assert paths["cpu"] == "docker/c"
    assert paths[""] == "user.slice"
    assert parse.cgroup_paths("0::/../../etc\n1:memory:/gone (deleted)\nnonsense\n::\n") == {}


@pytest.mark.parametrize(
    ("text", "zone", "degrees"),
    [
        ("45200\n", "cpu-thermal", 45.2),
        ("-256000", "CV0-therm", None),
        ("2147483647", "tj-therm", None),
        ("garbage", "", None),
        ("", "", None),
        ("100000", "PMIC-Die", None),
        ("100000", "CPU-therm", 100.0),
        ("-5000", "outdoor", -5.0),
    ],
)
def test_temperatures(text: str, zone: str, degrees: float | None) -> None:
    assert parse.celsius(text, zone=zone) == degrees


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("throttled=0x0\n", False),
        ("throttled=0x50000", False),  # it was throttled once
        ("throttled=0x1", False),  # under-voltage alone
        ("throttled=0x2", True),
        ("throttled=0x50005", True),
        ("throttled=0x8", True),
        ("VCHI initialization failed", None),
        ("throttled=0xffffffffffffffff", None),
        ("", None),
    ],
)
def test_the_firmwares_throttle_word(text: str, now: bool | None) -> None:
    assert parse.throttled_now(parse.throttle_word(text)) is now


@pytest.mark.parametrize(
    ("compatible", "soc"),
    [
        (("raspberrypi,5-model-b", "brcm,bcm2712"), "bcm2712"),
        (("nvidia,p3768-0000+p3767-0003", "nvidia,tegra234", "nvidia,tegra23x"), "tegra234"),
        (("hardkernel,odroid-xu4", "samsung,exynos5800", "samsung,exynos5"), "exynos5800"),
        (("ti,am335x-bone-black", "ti,am335x-bone", "ti,am33xx"), "am33xx"),
        (("radxa,rock-5a", "rockchip,rk3588s"), "rk3588s"),
        (("nocomma",), None),
        ((), None),
    ],
)
def test_soc_is_the_last_entry_that_names_a_chip(compatible: tuple[str, ...], soc: str | None) -> None:
    assert parse.soc_of(compatible) == soc


def test_big_cores_by_capacity_then_by_kind_then_by_clock() -> None:
    four = range(4)
    assert parse.big_cores(four, {0: 400, 1: 400, 2: 1024, 3: 1020}, {}, (), {}) == (2, 3)
    assert parse.big_cores(four, dict.fromkeys(four, 1024), {}, (), {}) is None
    kinds = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert parse.big_cores(four, {}, kinds, (0, 1), {}) == (2, 3)
    # A little core may have the higher clock.
    assert parse.big_cores(four, {}, kinds, (0, 1), {0: 2000, 1: 2000, 2: 1800, 3: 1800}) == (2, 3)
    assert parse.big_cores(four, {}, kinds, (), {0: 1200, 1: 1200, 2: 1500, 3: 1500}) == (2, 3)
    assert parse.big_cores(four, {}, kinds, (), dict.fromkeys(four, 2035)) is None
    # Half a set of capacities says nothing.
    assert parse.big_cores(four, {0: 400}, kinds, (), {}) is None
    assert parse.big_cores(four, {}, {0: "a"}, (), {}) is None
    assert parse.big_cores((), {}, {}, (), {}) is None


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("a02082", "Raspberry Pi 3 Model B"),
        ("2a02082", "Raspberry Pi 3 Model B"),  # warranty bit of the new scheme
        ("902120", "Raspberry Pi Zero 2 W"),
        ("c04180", "Raspberry Pi Compute Module 5"),
        ("d04190", "Raspberry Pi 500"),
        ("c03130", "Raspberry Pi 400"),
        ("000e", "Raspberry Pi Model B"),
        ("1000010", "Raspberry Pi Model B Plus"),  # warranty bit of the old scheme
    ],
)
def test_a_revision_code_names_the_pi(code: str, name: str) -> None:
    found = boards.identify(None, (), revision=boards.parse_revision(code), old_hardware="BCM2835")
    assert found.board == name


def test_the_revision_code_decides_where_the_model_string_differs() -> None:
    zero = boards.identify("Raspberry Pi Zero 2 Rev 1.0", ("raspberrypi,model-zero-2-w",), revision=0x902120)
    assert zero.board == "Raspberry Pi Zero 2 W"
    unknown_type = boards.identify("Raspberry Pi 7 Model B Rev 2.0", ("raspberrypi,7-model-b",), revision=0xD04FF0)
    assert unknown_type.board == "Raspberry Pi 7 Model B"
    by_compatible = boards.identify(None, ("raspberrypi,4-model-b", "brcm,bcm2711"))
    assert by_compatible.board == "Raspberry Pi 4 Model B"


@pytest.mark.parametrize(
    ("model", "compatible", "board"),
    [
        ("NVIDIA Jetson Xavier NX Developer Kit", ("nvidia,p3449-0000+p3668-0000", "nvidia,tegra194"), "Xavier NX"),
        ("Someone's camera", ("nvidia,p3509-0000+p3767-0001", "nvidia,tegra234"), "Orin NX"),
        ("Box", ("nvidia,p3768-0000+p3767-0005-super", "nvidia,tegra234"), "Orin Nano"),
        ("NVIDIA Orin Jetson-Small Developer Kit", ("nvidia,tegra234",), "AGX Orin"),
        ("Jetson-AGX", ("nvidia,galen", "nvidia,tegra194"), "AGX Xavier"),
        ("quill", ("nvidia,quill", "nvidia,tegra186"), "TX2"),
        ("NVIDIA Jetson AGX Thor Developer Kit", ("nvidia,p3971-0089+p3834-0008", "nvidia,tegra264"), "AGX Thor"),
        ("NVIDIA Orin Nano Developer Kit", ("nvidia,p3768-0000+p3767-00",), "Orin Nano"),
    ],
)
def test_a_jetson_is_named_by_its_module(model: str, compatible: tuple[str, ...], board: str) -> None:
    found = boards.identify(model, compatible)
    assert found.board == f"NVIDIA Jetson {board}"
    assert found.jetson == board


def test_a_tegra_tablet_is_no_jetson() -> None:
    found = boards.identify("Google Pixel C", ("google,smaug", "nvidia,tegra210"))
    assert found.board == "Google Pixel C"
    assert found.jetson is None


def test_the_part_number_in_the_device_trees_file_name_helps_where_a_vendor_hides_it() -> None:
    hint = "/build/hardware/nvidia/platform/t23x/p3768/tegra234-p3767-0000-p3768-0000.dts"
    found = boards.identify("Vendor Jetson box", ("vendor,box", "nvidia,tegra234"), part_hint=hint)
    assert found.board == "NVIDIA Jetson Orin NX"


def test_names_of_other_machines_are_taken_as_they_are() -> None:
    assert boards.identify("Radxa ROCK 5B", ("radxa,rock-5b",)).board == "Radxa ROCK 5B"
    assert boards.identify(None, (), product_name="ADL-N").board == "ADL-N"
    assert boards.identify(None, ()).board is None


@settings(max_examples=300, deadline=None)
@given(anything)
def test_no_text_can_break_a_parser(text: str) -> None:
    cpus = parse.cpu_list(text)
    assert cpus is None or 0 < len(cpus) <= MAX_CPU + 1
    assert all(value >= 0 for value in parse.meminfo(text).values())
    limit = parse.memory_limit(text)
    assert limit is None or 0 <= limit < 1 << 60
    quota, _, period = text.partition(" ")
    share = parse.cpu_quota(quota, period)
    assert share is None or 0 < share <= MAX_CPU + 1
    assert all(".." not in path.split("/") for path in parse.cgroup_paths(text).values())
    degrees = parse.celsius(text)
    assert degrees is None or -60 <= degrees <= 200
    for parser in (parse.throttle_word, parse.l4t_release, parse.power_mode, parse.os_name, boards.parse_revision):
        parser(text)
    parse.pressure_avg10(text, "some")
    parse.soc_of(parse.device_tree_strings(text.encode("utf-8", "replace")))
    boards.identify(text, (text,), revision=None, old_hardware=text, old_model=text, part_hint=text, product_name=text)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_device_tree_strings_are_clean_whatever_the_bytes(data: bytes) -> None:
    for text in parse.device_tree_strings(data):
        assert text
        assert text == text.strip()
        assert text.isprintable()
        text.encode()
