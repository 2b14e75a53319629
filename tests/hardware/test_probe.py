"""Whole machines: boards nobody recorded, containers with limits, accelerators with and without driver, this one."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from agent.base.errors import NotFoundError
from agent.hardware.auxv import is_own_x86, parse_vector, settle
from agent.hardware.cpuinfo import parse_cpuinfo
from agent.hardware.facts import FEATURES, Accelerator, Facts
from agent.hardware.probe import probe
from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir
from tests.hardware.sysroot import A53, A55, A72, A76, V2, arm_board, build, cpuinfo, meminfo, x86

PROFILES, _ = load_profiles([shipped_profiles_dir()])
CPUS = "sys/devices/system/cpu"


def profile_of(facts: Facts) -> str:
    return choose_profile(facts, PROFILES).id


def test_nothing_of_this_machine_leaks_into_an_empty_root(tmp_path: Path) -> None:
    facts = probe(tmp_path)
    assert facts == replace(Facts(), features=dict.fromkeys(FEATURES))
    assert profile_of(facts) == "unsupported"


def test_this_machine() -> None:
    facts = probe(None)
    assert facts.live
    assert facts.arch == os.uname().machine
    assert facts.kernel == os.uname().release
    assert facts.usable_cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert facts.page_size == os.sysconf("SC_PAGE_SIZE")
    assert facts.mem_total_mb is not None
    assert facts.mem_limit_mb is not None
    assert 0 < facts.mem_limit_mb <= facts.mem_total_mb
    assert not any("not those of this machine" in note for note in facts.notes)
    if facts.arch == "x86_64":
        assert facts.features["neon"] is False
        assert facts.features["avx2"] is not None
    assert profile_of(facts) != "fallback"


def test_a_missing_root_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        probe(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFoundError):
        probe(tmp_path / "file")


@pytest.mark.parametrize(
    ("model", "compatible", "cores", "board", "profile", "big"),
    [
        # Families, on boards that no recorded case shows.
        (
            "Raspberry Pi 3 Model B Plus Rev 1.3",
            ("raspberrypi,3-model-b-plus", "brcm,bcm2837"),
            (A53,) * 4,
            "Raspberry Pi 3 Model B Plus",
            "rpi-3b",
            None,
        ),
        (
            "Raspberry Pi Compute Module 5 Rev 1.0",
            ("raspberrypi,5-compute-module", "brcm,bcm2712"),
            (A76,) * 4,
            "Raspberry Pi Compute Module 5",
            "rpi-5",
            None,
        ),
        (
            "Raspberry Pi 2 Model B Rev 1.2",
            ("raspberrypi,2-model-b-rev2", "brcm,bcm2837"),
            (A53,) * 4,
            "Raspberry Pi 2 Model B",
            "generic-a53",
            None,
        ),
        (
            "Seeed reComputer",
            ("seeed,box", "nvidia,p3768-0000+p3767-0004", "nvidia,tegra234"),
            (A76,) * 6,
            "NVIDIA Jetson Orin Nano",
            "jetson-orin-nano",
            None,
        ),
        (
            "NVIDIA Jetson AGX Thor Developer Kit",
            ("nvidia,p3971-0089+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"),
            (V2,) * 14,
            "NVIDIA Jetson AGX Thor",
            "jetson-thor",
            None,
        ),
        (
            "Hardkernel ODROID-M1",
            ("hardkernel,rk3568-odroid-m1", "rockchip,rk3568"),
            (A55,) * 4,
            "Hardkernel ODROID-M1",
            "rk3566",
            None,
        ),
        (
            "Orange Pi 5",
            ("xunlong,orangepi-5", "rockchip,rk3588s"),
            (A55,) * 4 + (A76,) * 4,
            "Orange Pi 5",
            "rk3588",
            (4, 5, 6, 7),
        ),
        (
            "BeagleBone AI-64",
            ("beagle,j721e-beagleboneai64", "ti,j721e"),
            (A72,) * 2,
            "BeagleBone AI-64",
            "tda4vm",
            None,
        ),
        (
            "Google i.MX8MQ Phanbell",
            ("google,imx8mq-phanbell", "fsl,imx8mq"),
            (A53,) * 4,
            "Google i.MX8MQ Phanbell",
            "coral-dev-board",
            None,
        ),
        # No family's: by features and cores.
        (
            "NXP i.MX8MQ EVK",
            ("fsl,imx8mq-evk", "fsl,imx8mq"),
            (A53,) * 4,
            "NXP i.MX8MQ EVK",
            "generic-a53",
            None,
        ),
        (
            "FriendlyElec NanoPC-T4",
            ("friendlyarm,nanopc-t4", "rockchip,rk3399"),
            (A53,) * 4 + (A72,) * 2,
            "FriendlyElec NanoPC-T4",
            "generic-a72",
            (4, 5),
        ),
        (
            "Some phone",
            ("vendor,phone", "qcom,new"),
            (V2,) * 8,
            "Some phone",
            "generic-i8mm",
            None,
        ),
        (
            "Google Tomato",
            ("google,tomato", "mediatek,mt8195"),
            (A55,) * 4 + (A76,) * 4,
            "Google Tomato",
            "generic-v8.2",
            (4, 5, 6, 7),
        ),
    ],
)
def test_boards_by_principle(
    tmp_path: Path,
    model: str,
    compatible: tuple[str, ...],
    cores: tuple[tuple[int, int, str], ...],
    board: str,
    profile: str,
    big: tuple[int, ...] | None,
) -> None:
    facts = probe(build(tmp_path, arm_board(model, *compatible, cores=cores)))
    assert facts.board == board
    assert facts.big_cores == big
    assert profile_of(facts) == profile


def test_x86_profiles_go_from_the_widest_instruction_down(tmp_path: Path) -> None:
    ladder = [
        ("avx2 avx512_vnni avx_vnni amx_int8", "x86-amx"),
        ("avx2 avx512_vnni avx_vnni", "x86-avx512vnni"),
        ("avx2 avx_vnni", "x86-avxvnni"),
        ("avx2", "x86-avx2"),
        ("avx", "x86-sse-avx"),
    ]
    for index, (flags, profile) in enumerate(ladder):
        facts = probe(build(tmp_path / str(index), {"proc/cpuinfo": x86(flags), "cmd/uname_m.txt": "x86_64"}))
        assert profile_of(facts) == profile
    family = probe(build(tmp_path / "n", {"proc/cpuinfo": x86("avx2 avx_vnni", model="Intel(R) N150")}))
    assert profile_of(family) == "intel-n-series"


def test_a_translated_machine_says_so(tmp_path: Path) -> None:
    facts = probe(build(tmp_path, {"proc/cpuinfo": x86("aes avx2"), "cmd/uname_m.txt": "aarch64"}))
    assert facts.emulated
    assert facts.supported
    assert facts.features["dotprod"] is None
    assert facts.core_types is None
    assert profile_of(facts) == "generic-aarch64"


def test_features_unknown_choose_no_core_of_the_generic_ones(tmp_path: Path) -> None:
    text = cpuinfo([A53, A53]).replace("Features", "Fea")
    facts = probe(build(tmp_path, {"proc/cpuinfo": text, "cmd/uname_m.txt": "aarch64"}))
    assert facts.core_types == (("Cortex-A53", 2),)
    assert profile_of(facts) == "generic-aarch64"


def test_32_bit_arm_without_neon_is_unsupported(tmp_path: Path) -> None:
    features = "half thumb fastmult vfp edsp vfpv3 vfpv3d16"
    text = f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: 0xc09\n"
    facts = probe(build(tmp_path, {"proc/cpuinfo": text, "cmd/uname_m.txt": "armv7l"}))
    assert not facts.supported
    assert facts.user_bits == 32
    assert profile_of(facts) == "unsupported"


def test_one_unnamed_kind_of_core_makes_the_list_unknown_but_not_the_big_ones(tmp_path: Path) -> None:
    new = (0x41, 0xFFE, A76[2])
    files = arm_board("New board", "vendor,new", "vendor,soc", cores=(A55, A55, new, new))
    facts = probe(build(tmp_path, files))
    assert facts.core_types is None
    assert facts.big_cores == (2, 3)
    assert any("0xffe" in note for note in facts.notes)


def test_limits_of_every_group_on_the_path_count(tmp_path: Path) -> None:
    files = arm_board("Board", "vendor,board") | {
        "proc/self/cgroup": "0::/system.slice/agent.service\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu memory\n",
        "sys/fs/cgroup/system.slice/memory.max": "1073741824\n",
        "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
        "sys/fs/cgroup/system.slice/agent.service/memory.max": "2147483648\n",
        "sys/fs/cgroup/system.slice/agent.service/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/system.slice/agent.service/cpuset.cpus.effective": "0-2\n",
    }
    facts = probe(build(tmp_path, files))
    assert facts.mem_limit_mb == 1024
    assert facts.cpu_limit == pytest.approx(2.5)
    assert facts.cores_online == 4
    assert facts.usable_cpus == (0, 1, 2)
    assert facts.cgroup_version == "v2"


def test_old_hierarchies_apply_too(tmp_path: Path) -> None:
    files = arm_board("Board", "vendor,board") | {
        "proc/self/cgroup": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "268435456\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpuset/docker/abc/cpuset.cpus": "1\n",
    }
    facts = probe(build(tmp_path, files))
    assert facts.mem_limit_mb == 256
    assert facts.cpu_limit == pytest.approx(0.5)
    assert facts.usable_cpus == (1,)
    assert facts.cgroup_version == "v1"


def test_a_container_sees_its_own_group_at_the_top_of_the_mount(tmp_path: Path) -> None:
    files = arm_board("Board", "vendor,board") | {
        "proc/self/cgroup": "0::/../../elsewhere\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        "sys/fs/cgroup/memory.max": "134217728\n",
        "sys/fs/cgroup/cpu.max": "garbage\n",
        "sys/fs/cgroup/cpuset.cpus.effective": "0-3\n",
    }
    facts = probe(build(tmp_path, files))
    assert facts.mem_limit_mb == 128
    assert facts.cpu_limit is None
    assert any("cpu.max" in note for note in facts.notes)


def test_accelerators_are_usable_only_with_their_driver(tmp_path: Path) -> None:
    pci = "sys/bus/pci/devices"
    files = arm_board("Radxa ROCK 5B", "radxa,rock-5b", "rockchip,rk3588") | {
        f"{pci}/0000:01:00.0/vendor": "0x1e60\n",
        f"{pci}/0000:01:00.0/device": "0x2864\n",
        f"{pci}/0000:01:00.0/class": "0x0b4000\n",
        f"{pci}/0000:02:00.0/vendor": "0x1AC1\n",
        f"{pci}/0000:02:00.0/device": "0x089A\n",
        f"{pci}/0000:03:00.0/vendor": "0x8086\n",
        f"{pci}/0000:03:00.0/device": "0x1234\n",
        f"{pci}/0000:03:00.0/class": "0x020000\n",
        "sys/bus/usb/devices/1-1/idVendor": "18d1\n",
        "sys/bus/usb/devices/1-1/idProduct": "9302\n",
        "sys/bus/usb/devices/1-1:1.0/bInterfaceClass": "ff\n",
        "dev/hailo0": "",
    }
    found = {(a.kind, a.usable) for a in probe(build(tmp_path, files)).accelerators}
    assert found == {("rknpu", False), ("hailo", True), ("edgetpu", False), ("edgetpu", True)}
    (tmp_path / "sys/class/devfreq/fdab0000.npu").mkdir(parents=True)
    (tmp_path / "dev/apex_0").write_text("")
    now = probe(tmp_path).accelerators
    assert Accelerator("rknpu", True, "part of rockchip,rk3588") in now
    assert all(accelerator.usable for accelerator in now)


def test_an_integrated_gpu_is_listed_once(tmp_path: Path) -> None:
    pci = "sys/bus/pci/devices"
    files: dict[str, str | bytes] = {"proc/cpuinfo": x86("avx2"), "dev/dri/renderD128": ""}
    for slot in ("0000:00:02.0", "0000:03:00.0"):
        files |= {f"{pci}/{slot}/vendor": "0x8086", f"{pci}/{slot}/device": "0x46d1", f"{pci}/{slot}/class": "0x038000"}
    accelerators = probe(build(tmp_path, files)).accelerators
    assert [(a.kind, a.usable) for a in accelerators] == [("intel-igpu", True)]


def test_a_recording_without_device_nodes_leaves_a_jetsons_gpu_unknown(tmp_path: Path) -> None:
    files = arm_board("NVIDIA Jetson Nano", "nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,tegra210")
    assert [(a.kind, a.usable) for a in probe(build(tmp_path, files)).accelerators] == [("cuda", None)]
    (tmp_path / "dev").mkdir()
    assert [(a.kind, a.usable) for a in probe(tmp_path).accelerators] == [("cuda", False)]


def test_a_captured_tree_may_keep_the_kernels_links(tmp_path: Path) -> None:
    files = arm_board("ignored", "ignored,ignored")
    board = {name: content for name, content in files.items() if "device-tree" not in name} | {
        "sys/firmware/devicetree/base/model": "Radxa ROCK 5B\0",
        "sys/firmware/devicetree/base/compatible": "radxa,rock-5b\0rockchip,rk3588\0",
        "sys/devices/virtual/thermal/thermal_zone0/type": "soc-thermal\n",
        "sys/devices/virtual/thermal/thermal_zone0/temp": "41000\n",
        "proc/77/cgroup": "0::/\n",
    }
    build(tmp_path, board)
    (tmp_path / "proc/device-tree").symlink_to("/sys/firmware/devicetree/base")
    (tmp_path / "proc/self").symlink_to("77")
    (tmp_path / "sys/class/thermal").mkdir(parents=True)
    (tmp_path / "sys/class/thermal/thermal_zone0").symlink_to("../../devices/virtual/thermal/thermal_zone0")
    facts = probe(tmp_path)
    assert facts.board == "Radxa ROCK 5B"
    assert [(zone.name, zone.celsius) for zone in facts.thermal_zones] == [("soc-thermal", 41.0)]


def test_the_rest_of_what_detection_tells(tmp_path: Path) -> None:
    files = arm_board("NVIDIA Jetson Orin NX", "nvidia,p3768-0000+p3767-0000", "nvidia,tegra234", cores=(A76,) * 8) | {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "cmd/nvpmodel_q.txt": "NV Power Mode: MY_OWN_MODE\n9\n",
        "cmd/getconf_PAGE_SIZE.txt": "4096\n",
        "cmd/uname_r.txt": "5.15.148-tegra\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 1000000 0 5\n/swap file 2097148 0 -2\n",
        "sys/class/tpm/tpm0/tpm_version_major": "2\n",
        "dev/tpmrm0": "",
        "dev/nvhost-gpu": "",
        f"{CPUS}/cpu0/cpufreq/scaling_governor": "schedutil\n",
        f"{CPUS}/cpu0/cpufreq/cpuinfo_max_freq": "1984000\n",
    }
    facts = probe(build(tmp_path, files))
    assert (facts.l4t, facts.jetpack, facts.power_mode) == ("36.4.3", "6", "MY_OWN_MODE")
    assert (facts.os, facts.kernel, facts.page_size) == ("Ubuntu 22.04.5 LTS", "5.15.148-tegra", 4096)
    assert [(area.kind, area.size_mb) for area in facts.swap or ()] == [("zram", 976), ("file", 2047)]
    assert facts.tpm is not None
    assert (facts.tpm.version, facts.tpm.usable) == (2, True)
    assert [(a.kind, a.usable) for a in facts.accelerators] == [("cuda", True), ("dla", False)]
    assert (facts.governor, facts.max_mhz) == ("schedutil", 1984)
    assert facts.disk is None  # a recorded machine's disk is not among its files


def test_kernel_and_cpuinfo_agree_or_the_kernel_is_right() -> None:
    notes: list[str] = []
    features = dict.fromkeys(FEATURES, False) | {"dotprod": True, "fp16": True, "bf16": None}
    settled = settle({"dotprod": True, "fp16": False, "bf16": True, "sve": True}, features, notes.append)
    assert settled["dotprod"] is True
    assert settled["fp16"] is False
    assert settled["bf16"] is True
    assert settled["sve"] is False  # never raised against cpuinfo's word
    assert len(notes) == 1


def test_flags_of_another_cpu_are_found_out() -> None:
    info = parse_cpuinfo(x86("aes avx2"))
    own = sum(1 << bit for bit in (0, 4, 8, 15, 23, 24, 25, 26))
    assert is_own_x86(info, own)
    assert not is_own_x86(info, own & ~(1 << 26))
    assert parse_vector(b"\x10") == {}


def test_every_fact_is_frozen() -> None:
    facts = Facts()
    with pytest.raises(AttributeError):
        facts.board = "other"  # type: ignore[misc]
    assert {"board", "soc", "arch", "features", "notes"} <= {field.name for field in fields(facts)}


def test_memory_of_a_machine_with_little_left(tmp_path: Path) -> None:
    files = arm_board("Board", "vendor,board") | {"proc/meminfo": meminfo(8_258_448, 309_248)}
    facts = probe(build(tmp_path, files))
    assert (facts.mem_total_mb, facts.mem_available_mb, facts.mem_limit_mb) == (8064, 302, 8064)
