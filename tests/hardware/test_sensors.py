"""Readings that change: heat, throttling, power rails, energy counters, pressure; unknown where nothing tells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.hardware.heat import read_throttle_word
from agent.hardware.sensors import Energy, headroom, joules_between, read_energy, read_power, read_sensors
from agent.hardware.tree import Tree
from tests.hardware.sysroot import build, meminfo

ZONE = "sys/class/thermal/thermal_zone0"
HWMON = "sys/class/hwmon"


def rail(number: int, channel: int, label: str, millivolts: int, milliamperes: int) -> dict[str, str]:
    path = f"{HWMON}/hwmon{number}"
    return {
        f"{path}/name": "ina3221\n",
        f"{path}/in{channel}_label": f"{label}\n",
        f"{path}/in{channel}_input": f"{millivolts}\n",
        f"{path}/curr{channel}_input": f"{milliamperes}\n",
    }


def test_a_machine_without_sensors_tells_nothing(tmp_path: Path) -> None:
    readings = read_sensors(tmp_path)
    assert readings.zones == ()
    values = (
        readings.hottest_c,
        readings.headroom_c,
        readings.throttled_now,
        readings.power_watts,
        readings.memory_some_avg10,
        readings.memory_full_avg10,
        readings.mem_available_mb,
    )
    assert values == (None,) * 7


def test_headroom_is_the_way_to_the_nearest_trip_point_that_acts(tmp_path: Path) -> None:
    files = {
        f"{ZONE}/type": "cpu-thermal\n",
        f"{ZONE}/temp": "70000\n",
        f"{ZONE}/trip_point_0_type": "active\n",
        f"{ZONE}/trip_point_0_temp": "60000\n",
        f"{ZONE}/trip_point_1_type": "passive\n",
        f"{ZONE}/trip_point_1_temp": "85000\n",
        f"{ZONE}/trip_point_2_type": "critical\n",
        f"{ZONE}/trip_point_2_temp": "garbage\n",
        "sys/class/thermal/thermal_zone1/type": "gpu\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",
        "sys/class/thermal/cooling_device0/type": "fan\n",
    }
    readings = read_sensors(build(tmp_path, files))
    assert readings.hottest_c == 70.0
    assert readings.headroom_c == pytest.approx(15.0)
    assert [zone.name for zone in readings.zones] == ["cpu-thermal", "gpu"]
    assert headroom(()) is None


def test_memory_pressure_and_what_is_available(tmp_path: Path) -> None:
    pressure = "some avg10=12.50 avg60=3.00 avg300=1.00 total=99\nfull avg10=4.25 avg60=0.00 avg300=0.00 total=9\n"
    readings = read_sensors(
        build(tmp_path, {"proc/pressure/memory": pressure, "proc/meminfo": meminfo(2_000_000, 524_288)})
    )
    assert (readings.memory_some_avg10, readings.memory_full_avg10, readings.mem_available_mb) == (12.5, 4.25, 512)


def test_the_input_rail_is_the_whole_and_the_others_are_its_parts(tmp_path: Path) -> None:
    files = rail(0, 1, "VDD_IN", 5000, 1200) | rail(0, 2, "VDD_CPU_GPU_CV", 5000, 400) | rail(0, 3, "NC", 0, 0)
    assert read_power(Tree(build(tmp_path, files))) == pytest.approx(6.0)


def test_without_an_input_rail_the_rails_add_up(tmp_path: Path) -> None:
    files = (
        rail(3, 1, "VDD_GPU_SOC", 19000, 200) | rail(3, 2, "VDD_CPU_CV", 19000, 100) | rail(4, 1, "VIN_SYS", 5000, 500)
    )
    assert read_power(Tree(build(tmp_path, files))) == pytest.approx(3.8 + 1.9 + 2.5)


def test_a_rail_that_cannot_be_read_is_no_zero(tmp_path: Path) -> None:
    files = rail(0, 1, "VDD_IN", 5000, 1200) | {f"{HWMON}/hwmon0/curr1_input": "error\n"}
    assert read_power(Tree(build(tmp_path, files))) is None
    assert read_power(Tree(build(tmp_path / "other", {f"{HWMON}/hwmon0/name": "coretemp\n"}))) is None


def test_energy_counters_wrap(tmp_path: Path) -> None:
    path = "sys/class/powercap/intel-rapl:0"
    files = {f"{path}/energy_uj": "900000\n", f"{path}/max_energy_range_uj": "1000000\n", f"{path}:0/energy_uj": "5\n"}
    before = read_energy(Tree(build(tmp_path, files)))
    assert before == Energy(900_000, 1_000_000)
    after = Energy(400_000, 1_000_000)
    assert joules_between(before, after) == pytest.approx(0.5)
    assert joules_between(None, after) is None


def test_several_packages_count_together(tmp_path: Path) -> None:
    files = {
        f"sys/class/powercap/intel-rapl:{n}/{name}": value
        for n in (0, 1)
        for name, value in (("energy_uj", f"{n + 1}00\n"), ("max_energy_range_uj", "1000\n"))
    }
    assert read_energy(Tree(build(tmp_path, files))) is None  # two counters that wrap apart make no one counter


def test_the_throttle_word_of_a_recorded_pi_and_of_its_sysfs(tmp_path: Path) -> None:
    recorded = build(tmp_path / "a", {"cmd/vcgencmd_get_throttled.txt": "throttled=0xe0008\n"})
    assert read_throttle_word(Tree(recorded)) == 0xE0008
    sysfs = build(tmp_path / "b", {"sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n"})
    assert read_throttle_word(Tree(sysfs)) == 0x50000


def test_this_machines_sensors_can_be_read_at_any_time() -> None:
    first, second = read_sensors(), read_sensors()
    assert first.mem_available_mb is not None
    assert second.mem_available_mb is not None
    assert (first.memory_some_avg10 is None) == (not os.path.exists("/proc/pressure/memory"))
