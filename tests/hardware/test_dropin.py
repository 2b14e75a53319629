"""What a drop-in for core says: what the accelerators of a machine need, its memory, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.hardware.dropin import Allowance, allowance, dropin, memory_limits
from agent.hardware.facts import Accelerator, Facts
from agent.hardware.profiles import Profile
from agent.hardware.tree import Tree
from tests.systemd.test_units import CORE, UNITS, analyzed, exposure

WITH_DROPIN = 1.0


def machine(root: Path, *nodes: str, groups: str = "") -> Tree:
    for node in ("null", "sda", "ttyS0", "mem", *nodes):
        path = root / "dev" / node
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "etc").mkdir()
    (root / "etc/group").write_text("".join(f"{name}:x:{number}:\n" for number, name in enumerate(groups.split())))
    return Tree(root)


def found(tree: Tree, *accelerators: Accelerator, memory: int | None = 8000) -> Allowance:
    facts = Facts(accelerators=accelerators, mem_total_mb=memory, supported=True)
    return allowance(facts, Profile(id="p", title="P", memory_share=0.5), tree)


def test_a_machine_without_accelerators_keeps_every_wall(tmp_path: Path) -> None:
    text = dropin(found(machine(tmp_path, groups="video render")))
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    assert settings == ["[Service]", "MemoryHigh=5616M", "MemoryMax=7488M"]


def test_a_jetson_gets_its_gpu_and_no_other_node(tmp_path: Path) -> None:
    nodes = ("nvhost-gpu", "nvhost-ctrl-gpu", "nvmap", "nvgpu/igpu0", "dri/renderD128", "dri/card0", "snd/pcm")
    allowed = found(
        machine(tmp_path, *nodes, groups="video render"), Accelerator("cuda", True), Accelerator("dla", True)
    )
    wanted = {"nvhost-gpu", "nvhost-ctrl-gpu", "nvmap", "nvgpu/igpu0", "dri/renderD128"}
    assert set(allowed.devices) == {f"/dev/{name}" for name in wanted}
    text = dropin(allowed)
    assert "SupplementaryGroups=video render\n" in text and "MemoryDenyWriteExecute=no\n" in text


def test_what_has_no_driver_opens_nothing(tmp_path: Path) -> None:
    tree = machine(tmp_path, "hailo0", "nvmap")
    for accelerator in (Accelerator("hailo", False), Accelerator("cuda", None), Accelerator("unheard-of", True)):
        assert found(tree, accelerator).devices == ()


def test_a_group_that_does_not_exist_would_stop_the_service(tmp_path: Path) -> None:
    coral = Accelerator("edgetpu", True, "PCI 0000:01:00.0 1ac1:089a")
    assert found(machine(tmp_path / "with", "apex_0", groups="apex"), coral).groups == ("apex",)
    assert found(machine(tmp_path / "without", "apex_0", groups="audio"), coral).groups == ()


def test_a_stick_is_allowed_by_class_for_its_number_changes(tmp_path: Path) -> None:
    text = dropin(found(machine(tmp_path, "apex_0"), Accelerator("edgetpu", True, "USB 1-1 18d1:9302")))
    assert "DeviceAllow=char-usb_device rw" in text and "apex" not in text
    assert "RestrictAddressFamilies=AF_NETLINK" in text


@pytest.mark.parametrize("total", [200, 512, 906, 3800, 7600, 64000])
def test_limits_leave_the_system_some_and_core_more_than_its_models(total: int) -> None:
    high, most = memory_limits(Facts(mem_total_mb=total), Profile(id="p", title="P", memory_share=0.6))
    if total <= 256:
        assert (high, most) == (None, None)
        return
    assert high is not None and most is not None
    assert 128 <= total - most <= 512
    assert most * 0.6 < high < most


def test_nothing_is_said_of_memory_that_nobody_knows(tmp_path: Path) -> None:
    assert "Memory" not in dropin(found(machine(tmp_path), memory=None)).replace("MemoryDeny", "")


@analyzed
@pytest.mark.parametrize(
    "accelerator",
    [Accelerator("cuda", True), Accelerator("hailo", True), Accelerator("edgetpu", True, "USB 1-1 1a6e:089a")],
    ids=lambda accelerator: accelerator.kind,
)
def test_a_device_drop_in_costs_no_more_than_agreed(tmp_path: Path, accelerator: Accelerator) -> None:
    text = dropin(found(machine(tmp_path, "nvmap", "hailo0", groups="video plugdev"), accelerator))
    unit = tmp_path / CORE
    unit.write_text((UNITS / CORE).read_text() + "\n" + text)
    level, table = exposure(unit)
    assert level <= WITH_DROPIN, table
