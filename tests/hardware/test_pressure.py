"""One look at memory, heat and power caps below a root; recorded states that follow one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.base.errors import NotFoundError
from agent.hardware.pressure import Strain, StrainGauge
from tests.hardware.sysroot import build, meminfo

ZONE = "sys/class/thermal/thermal_zone0"
COOLING = "sys/class/thermal/cooling_device"
GROUP = "sys/fs/cgroup/system.slice/edge.service"
PSI = "some avg10={some:.2f} avg60=0.00 avg300=0.00 total=1\nfull avg10={full:.2f} avg60=0.00 avg300=0.00 total=1\n"


def zone(degrees: float, *trips: tuple[str, int], number: int = 0) -> dict[str, str]:
    base = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{base}/type": "cpu-thermal\n", f"{base}/temp": f"{int(degrees * 1000)}\n"}
    for index, (kind, celsius) in enumerate(trips):
        files |= {f"{base}/trip_point_{index}_type": f"{kind}\n", f"{base}/trip_point_{index}_temp": f"{celsius}000\n"}
    return files


def look(root: Path, files: dict[str, str], now: float = 0.0, gauge: StrainGauge | None = None) -> Strain:
    return (gauge or StrainGauge(build(root, files)))(now)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert look(tmp_path, {}) == Strain()


def test_a_root_that_is_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        StrainGauge(tmp_path / "none")(0.0)


def test_heat_against_the_zones_own_trip_points(tmp_path: Path) -> None:
    """A lower passive point starts a regulator; the highest one is where it must throttle."""
    files = zone(80, ("passive", 70), ("passive", 85), ("hot", 90), ("critical", 105)) | zone(
        60, ("critical", 115), number=1
    )
    seen = look(tmp_path, files)
    assert (seen.throttle_c, seen.critical_c) == (5.0, 10.0)
    assert seen.hottest == "cpu-thermal 80 °C"


def test_a_zone_without_a_passive_point_counts_by_the_next_one_and_fans_do_not(tmp_path: Path) -> None:
    assert look(tmp_path / "a", zone(80, ("active", 60), ("critical", 100))).throttle_c == 20.0
    assert look(tmp_path / "b", zone(80, ("active", 60))).throttle_c is None


def test_cooling_devices_that_throttle_are_told_from_fans(tmp_path: Path) -> None:
    fan = {f"{COOLING}0/type": "pwm-fan\n", f"{COOLING}0/cur_state": "3\n"}
    assert look(tmp_path / "a", fan).throttled is None
    idle = fan | {f"{COOLING}1/type": "cpufreq-cpu0\n", f"{COOLING}1/cur_state": "0\n"}
    assert look(tmp_path / "b", idle).throttled is False
    assert look(tmp_path / "c", idle | {f"{COOLING}1/cur_state": "2\n"}).throttled is True


def test_the_firmwares_word(tmp_path: Path) -> None:
    assert look(tmp_path, {"cmd/vcgencmd_get_throttled.txt": "throttled=0x4\n"}).throttled is True


def test_memory_of_the_machine_and_of_the_own_control_group(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(4_000_000, 2_000_000),
        "proc/pressure/memory": PSI.format(some=1, full=0),
        "proc/self/cgroup": "0::/system.slice/edge.service\n",
        f"{GROUP}/memory.current": "900000000\n",
        f"{GROUP}/memory.max": "1000000000\n",
        f"{GROUP}/memory.stat": "anon 1\ninactive_file 50000000\n",
        f"{GROUP}/memory.events": "low 9\nhigh 2\nmax 3\noom 0\noom_kill 1\n",
        f"{GROUP}/memory.pressure": PSI.format(some=30, full=12),
    }
    seen = look(tmp_path, files)
    assert (seen.memory_some, seen.memory_full) == (30.0, 12.0)
    assert seen.available == pytest.approx(0.15)
    assert seen.available_mb == 143
    assert seen.events == 5
    low = look(tmp_path, files | {f"{GROUP}/memory.high": "920000000\n"})
    assert low.available == pytest.approx(70 / 920)


def test_caps_are_judged_by_what_was_allowed_before(tmp_path: Path) -> None:
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    files = {f"{policy}/cpuinfo_max_freq": "2000000\n", f"{policy}/scaling_max_freq": "1000000\n"}
    gauge = StrainGauge(build(tmp_path, files))
    assert gauge(0.0).capped == 1.0  # set so by the integrator, for all we know
    build(tmp_path, {f"{policy}/scaling_max_freq": "2000000\n"})
    assert gauge(5.0).capped == 1.0
    build(tmp_path, {f"{policy}/scaling_max_freq": "800000\n"})
    assert gauge(10.0).capped == pytest.approx(0.4)


def test_a_power_mode_with_fewer_watts_is_a_cap(tmp_path: Path) -> None:
    gauge = StrainGauge(build(tmp_path, {"cmd/nvpmodel_q.txt": "NV Power Mode: MODE_15W\n2\n"}))
    assert (gauge(0.0).capped, gauge(0.0).power_mode) == (1.0, "MODE_15W")
    build(tmp_path, {"cmd/nvpmodel_q.txt": "NV Power Mode: MODE_7W\n1\n"})
    assert gauge(5.0).capped == pytest.approx(7 / 15)


def test_recorded_states_follow_one_another(tmp_path: Path) -> None:
    for second, degrees in ((0, 50), (30, 84), (90.5, 60)):
        build(tmp_path / f"{second}", zone(degrees, ("passive", 85)))
    gauge = StrainGauge(tmp_path)
    seen = [gauge(1000.0 + now).throttle_c for now in (0, 29, 30, 90, 91, 5000)]
    assert seen == [35.0, 35.0, 1.0, 1.0, 25.0, 25.0]


def test_what_changes_is_seen_at_once_and_new_zones_after_a_while(tmp_path: Path) -> None:
    gauge = StrainGauge(build(tmp_path, zone(50, ("passive", 85))), again_s=60)
    assert gauge(0.0).throttle_c == 35.0
    build(tmp_path, zone(70, ("passive", 85)) | zone(84, ("passive", 85), number=1))
    assert gauge(5.0).throttle_c == 15.0
    assert gauge(60.0).throttle_c == 1.0


def test_nonsense_is_unknown(tmp_path: Path) -> None:
    files = {
        **dict.fromkeys(("proc/meminfo", "proc/pressure/memory", "proc/self/cgroup"), "rubbish\n"),
        f"{ZONE}/type": "x\n",
        f"{ZONE}/temp": "hot\n",
        f"{ZONE}/trip_point_0_type": "passive\n",
        f"{ZONE}/trip_point_0_temp": "85000\n",
        "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "fast\n",
        "sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw": "-1\n",
        f"{COOLING}0/type": "Processor\n",
        f"{COOLING}0/cur_state": "??\n",
    }
    assert look(tmp_path, files) == Strain()
