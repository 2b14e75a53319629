"""Thermal zones with their trip points, and the word with which a Raspberry Pi's firmware says that it holds back.

Trip points differ between published sources, so they are read from the kernel. Sources, in Linux' Documentation/:
driver-api/thermal/sysfs-api.rst; Raspberry Pi documentation, vcgencmd (get_throttled).
"""

from __future__ import annotations

import re

from agent.hardware.facts import ThermalZone, TripPoint
from agent.hardware.parse import celsius, throttle_word
from agent.hardware.tree import Tree

_ZONES = "sys/class/thermal"
_MOST_ZONES, _MOST_TRIPS = 64, 16
_SENSOR_OFF = "-256000"
#: Where the Raspberry Pi firmware driver shows its word (``soc:firmware`` below the SoC's node).
_PI_FIRMWARE = r"soc(@[0-9a-f]+)?(:firmware)?"
_TRIP = r"trip_point_(\d{1,2})_temp"


def read_zones(tree: Tree) -> tuple[ThermalZone, ...]:
    """Every thermal zone, with its trip points in ascending order."""
    names = [name for name in tree.names(_ZONES) if re.fullmatch(r"thermal_zone\d{1,4}", name)]
    return tuple(_zone(tree, f"{_ZONES}/{name}", name) for name in names[:_MOST_ZONES])


def _zone(tree: Tree, path: str, name: str) -> ThermalZone:
    kind = tree.line(f"{path}/type")
    label = kind[:64] if kind and kind.isprintable() else name
    text = tree.line(f"{path}/temp")
    degrees = celsius(text, zone=label)
    if degrees is None and text not in {None, _SENSOR_OFF, "100000"}:
        tree.note(f"{path}/temp: {(text or '')[:16]!a} is not a temperature")
    return ThermalZone(label, degrees, _trips(tree, path))


def _trips(tree: Tree, path: str) -> tuple[TripPoint, ...]:
    found: list[TripPoint] = []
    trips = [match for name in tree.names(path) if (match := re.fullmatch(_TRIP, name))]
    for match in trips[:_MOST_TRIPS]:
        kind = tree.line(f"{path}/trip_point_{match[1]}_type")
        degrees = celsius(tree.line(f"{path}/{match[0]}"))
        # A trip point of 0 or less is a disabled one.
        if degrees is not None and degrees > 0 and kind and kind.isprintable():
            found.append(TripPoint(kind[:32], degrees))
    return tuple(sorted(found, key=lambda trip: trip.celsius))


def read_throttle_word(tree: Tree) -> int | None:
    """The Raspberry Pi firmware's throttle word: a recorded answer, sysfs, or ``vcgencmd`` where it is installed."""
    recorded = tree.text("cmd/vcgencmd_get_throttled.txt") if not tree.live else None
    if recorded is not None:
        word = throttle_word(recorded)
        if word is None:
            tree.note("cmd/vcgencmd_get_throttled.txt: not a throttle word, ignored")
        return word
    for name in tree.names("sys/devices/platform"):
        if re.fullmatch(_PI_FIRMWARE, name):
            for path in (f"{name}/soc:firmware", name):
                word = throttle_word(tree.line(f"sys/devices/platform/{path}/get_throttled"))
                if word is not None:
                    return word
    return _ask_firmware() if tree.live and tree.exists("dev/vcio") else None


def _ask_firmware() -> int | None:
    import shutil  # noqa: PLC0415  a Raspberry Pi alone pays for these
    import subprocess  # noqa: PLC0415

    tool = shutil.which("vcgencmd")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=1, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return throttle_word(done.stdout) if done.returncode == 0 else None
