"""Profiles: the shipped ones are sound and sourced, a user's wins, a broken file is named and stops nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from agent.base.errors import ConfigError
from agent.hardware.facts import FEATURES, Facts
from agent.hardware.profiles import (
    FALLBACK,
    PRECISIONS,
    Match,
    Profile,
    choose_profile,
    load_profiles,
    memory_budget_mb,
    parse_profile,
    ram_class_mb,
    serving_cpus,
    shipped_profiles_dir,
    thread_count,
)

SHIPPED = shipped_profiles_dir()
FILES = sorted(SHIPPED.glob("*.toml"))
CHECKOUT = Path(__file__).resolve().parents[2]
MINIMAL = 'id = "mine"\ntitle = "Mine"\n[match]\ncompatible = ["vendor,board"]\n'
PI5 = Facts(
    board="Raspberry Pi 5 Model B",
    compatible=("raspberrypi,5-model-b", "brcm,bcm2712"),
    arch="aarch64",
    supported=True,
    features=dict.fromkeys(FEATURES, False) | {"dotprod": True},
)
FAMILIES = {
    "rpi-zero-2w", "rpi-3b", "rpi-4b", "rpi-5", "jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier",
    "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "rk3566", "rk3576", "rk3588", "imx8mp",
    "coral-dev-board", "am67a", "tda4vm", "odroid-n2", "odroid-xu4", "odroid-c4", "allwinner-h618", "genio-1200",
    "genio-700", "genio-350", "intel-n-series", "generic-i8mm", "generic-v8.2", "generic-a53", "generic-a72",
    "generic-a73", "generic-aarch64", "generic-armv7", "x86-amx", "x86-avx512vnni", "x86-avxvnni", "x86-avx2",
    "x86-sse-avx", "unsupported",
}  # fmt: skip


def profile_with(match: Match, **changes: object) -> Profile:
    return replace(Profile(id="p", title="P", match=match), **changes)  # type: ignore[arg-type]


def test_all_families_are_shipped() -> None:
    profiles, problems = load_profiles([SHIPPED])
    assert problems == []
    assert {profile.id for profile in profiles} >= FAMILIES
    assert {path.stem for path in FILES} == {profile.id for profile in profiles}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_value_has_its_source(path: Path) -> None:
    """Each setting or table stands under a comment that says where it is from; each note names its source."""
    comment, in_table = "", False
    for line in path.read_text().split("\n"):
        if line.startswith("#"):
            comment += line[1:]
            continue
        setting = re.match(r"(\w+) = ", line)
        table = re.fullmatch(r"\[(match|heat)\]", line)
        if table or (setting and not in_table and setting[1] not in {"id", "title"}):
            assert len(comment.split()) >= 2, f"{path.name}: {line}"
        in_table = in_table or line.startswith("[")
        comment = ""
    profile = parse_profile(path.read_bytes(), origin=path.name)
    assert all(note.source for note in profile.notes)
    assert set(profile.cpu_precisions) <= set(PRECISIONS)


def test_priors_order_the_precisions() -> None:
    for profile in load_profiles([SHIPPED])[0]:
        first = profile.cpu_precisions[0]
        assert first == ("int8" if profile.int8_gain > 1.05 else "fp32"), profile.id
        assert profile.cpu_precisions[-1] == "fp16", profile.id
        assert profile.fp16_cpu_penalty > 1, profile.id
        assert profile.providers[-1] == "CPUExecutionProvider", profile.id


def test_a_users_file_replaces_the_shipped_one_of_the_same_id(tmp_path: Path) -> None:
    (tmp_path / "pi.toml").write_text(
        'id = "rpi-5"\ntitle = "Ours"\nmemory_share = 0.3\n[match]\nmodel = ["Raspberry Pi 5*"]\n'
    )
    profiles, problems = load_profiles([SHIPPED, tmp_path])
    chosen = choose_profile(PI5, profiles)
    assert problems == []
    assert (chosen.id, chosen.title, chosen.memory_share) == ("rpi-5", "Ours", 0.3)
    assert chosen.origin == str(tmp_path / "pi.toml")


def test_a_users_file_of_another_id_wins_by_its_board_rule_but_not_by_features_alone(tmp_path: Path) -> None:
    by_soc = MINIMAL.replace("vendor,board", "brcm,bcm2712")
    (tmp_path / "mine.toml").write_text(by_soc)
    assert choose_profile(PI5, load_profiles([SHIPPED, tmp_path])[0]).id == "mine"
    (tmp_path / "mine.toml").write_text(
        'id = "mine"\ntitle = "Mine"\n[match]\narch = ["aarch64"]\nfeatures = ["dotprod"]\n'
    )
    assert choose_profile(PI5, load_profiles([SHIPPED, tmp_path])[0]).id == "rpi-5"
    unclaimed = replace(PI5, board="Box", compatible=("vendor,box",))
    assert choose_profile(unclaimed, load_profiles([SHIPPED, tmp_path])[0]).id == "mine"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('id = "a"\ntitle = \n', "line 2"),
        ('id = "a"\ntitle = "b"\n[match]\ncompatible = ["x\n', "line 4"),
        (MINIMAL.replace('id = "mine"', "id = 7"), "id: must be a text"),
        (MINIMAL.replace('"mine"', '"Not An Id"'), "id: must be lower case"),
        (MINIMAL.replace('id = "mine"\n', ""), "id: missing"),
        (MINIMAL.replace("[match]", "thraeds = 4\n[match]"), "thraeds: no such field"),
        (MINIMAL.replace("[match]", "threads = 0\n[match]"), "threads: must be a whole number from 1"),
        (MINIMAL.replace("[match]", "threads = true\n[match]"), "threads: must be a whole number"),
        (MINIMAL.replace("[match]", "memory_share = 1.5\n[match]"), "memory_share: must be a number from 0.05 to 0.95"),
        (MINIMAL.replace("[match]", "int8_gain = nan\n[match]"), "int8_gain: must be a number"),
        (MINIMAL.replace("[match]", 'cpu_precisions = ["int7"]\n[match]'), "cpu_precisions: must be of fp32"),
        (MINIMAL.replace("[match]", 'cpu_precisions = ["int8", "int8"]\n[match]'), "cpu_precisions: names one twice"),
        (MINIMAL + 'features = ["dotprodd"]\n', "match.features: must be of"),
        (MINIMAL + "compatibel = []\n", "match.compatibel: no such field"),
        ('id = "a"\ntitle = "b"\n', "match: missing"),
        ('id = "a"\ntitle = "b"\n[match]\norder = 1\n', "match: needs compatible"),
        ('id = "a"\ntitle = "b"\nmatch = 3\n', "match: must be a table"),
        (MINIMAL + '[[notes]]\ntext = "no source"\n', "notes[0].source: missing"),
        (MINIMAL + "[heat]\nthrottle_c = 500\n", "heat.throttle_c: must be a number from 30 to 150"),
        ("a = " + "[" * 5000, "profile"),
    ],
)
def test_a_broken_file_is_named_with_field_or_line_and_stops_nothing(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "broken.toml").write_text(text)
    (tmp_path / "sound.toml").write_text(MINIMAL)
    profiles, problems = load_profiles([SHIPPED, tmp_path])
    assert len(problems) == 1
    assert problems[0].startswith(f"cannot read profile {tmp_path / 'broken.toml'}: ")
    assert problem in problems[0]
    assert {"mine", "rpi-5"} <= {profile.id for profile in profiles}


def test_several_mistakes_are_told_at_once() -> None:
    text = MINIMAL.replace("[match]", 'threads = "four"\nwatts_load = -1\n[match]') + "x = 1\n"
    with pytest.raises(ConfigError) as caught:
        parse_profile(text.encode(), origin="my.toml")
    assert all(part in str(caught.value) for part in ("threads:", "watts_load:", "match.x:"))


def test_odd_things_in_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(MINIMAL)
    (tmp_path / "two.toml").write_text(MINIMAL)
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "latin1.toml").write_bytes(b'id = "a"\n# caf\xe9\n')
    (tmp_path / "huge.toml").write_text("#" * 100_000)
    (tmp_path / "gone.toml").symlink_to("nowhere")
    (tmp_path / "readme.txt").write_text("not a profile")
    profiles, problems = load_profiles([tmp_path, tmp_path / "missing"])
    assert [profile.id for profile in profiles] == ["mine"]
    told = {Path(problem.split(":")[0].removeprefix("cannot read profile ")).name: problem for problem in problems}
    assert set(told) == {"two.toml", "folder.toml", "pipe.toml", "latin1.toml", "huge.toml", "gone.toml"}
    assert "line 2: not UTF-8" in told["latin1.toml"]
    assert "id: mine is taken by" in told["two.toml"]


def test_a_users_broken_file_leaves_the_shipped_one_of_that_id_in_force(tmp_path: Path) -> None:
    (tmp_path / "rpi-5.toml").write_text('id = "rpi-5"\ntitle = 5\n')
    profiles, problems = load_profiles([SHIPPED, tmp_path])
    assert len(problems) == 1
    assert choose_profile(PI5, profiles).origin == str(SHIPPED / "rpi-5.toml")


def test_with_no_profile_at_all_the_agent_still_has_one() -> None:
    assert choose_profile(PI5, []) is FALLBACK
    assert load_profiles([]) == ([], [])


def test_the_most_specific_entry_of_compatible_wins() -> None:
    by_soc = profile_with(Match(compatible=("brcm,*",)), id="soc")
    by_board = profile_with(Match(compatible=("raspberrypi,5-*",)), id="board")
    exact = profile_with(Match(compatible=("raspberrypi,5-model-b",)), id="exact")
    by_name = profile_with(Match(model=("raspberry pi 5*",)), id="name")
    assert choose_profile(PI5, [by_soc, by_board, by_name]).id == "board"
    assert choose_profile(PI5, [by_soc, by_board, exact]).id == "exact"
    assert choose_profile(PI5, [by_name, by_soc]).id == "soc"
    assert choose_profile(replace(PI5, compatible=()), [by_name, by_soc]).id == "name"


def test_conditions_beside_a_board_rule_have_to_hold_and_unknown_does_not() -> None:
    picky = profile_with(Match(compatible=("raspberrypi,*",), features=("dotprod",), arch=("aarch64",)))
    assert choose_profile(PI5, [picky]) is picky
    unknown = replace(PI5, features=dict.fromkeys(FEATURES))
    assert choose_profile(unknown, [picky]) is FALLBACK
    absent = profile_with(Match(arch=("aarch64",), features_absent=("dotprod",)))
    assert choose_profile(unknown, [absent]) is FALLBACK
    assert choose_profile(replace(PI5, emulated=True), [profile_with(Match(arch=("*",), emulated=False))]) is FALLBACK


def test_what_is_unsupported_gets_that_profile_whatever_the_board() -> None:
    profiles, _ = load_profiles([SHIPPED])
    assert choose_profile(replace(PI5, supported=False), profiles).id == "unsupported"


def test_plan_follows_the_narrowest_limit() -> None:
    profile = profile_with(Match(), threads=4, memory_share=0.5, ram_classes_mb=(4096, 8192), ram_slack=0.25)
    facts = replace(
        PI5, usable_cpus=(0, 1, 2, 3, 4, 5), online_cpus=tuple(range(8)), big_cores=(4, 5, 6, 7),
        mem_total_mb=6451, mem_limit_mb=2048,
    )  # fmt: skip
    assert serving_cpus(facts, profile) == (4, 5)
    assert thread_count(facts, profile) == 2
    assert memory_budget_mb(facts, profile) == 1024
    assert ram_class_mb(facts, profile) == 8192
    assert thread_count(replace(facts, cpu_limit=1.5), profile) == 1
    assert thread_count(replace(facts, cpu_limit=0.2), profile) == 1
    # None of the CPUs that we have is a big one: all of them then.
    assert serving_cpus(replace(facts, usable_cpus=(0, 1)), profile) == (0, 1)
    assert serving_cpus(replace(facts, big_cores=None), profile) == (0, 1, 2, 3, 4, 5)
    assert thread_count(replace(facts, big_cores=None), profile) == 4
    nothing = Facts()
    assert serving_cpus(nothing, profile) is None
    assert thread_count(nothing, profile) == 1
    assert memory_budget_mb(nothing, profile) is None
    assert ram_class_mb(replace(facts, mem_total_mb=300), profile) is None


@pytest.mark.slow
def test_a_wheel_carries_the_profiles(tmp_path: Path) -> None:
    """Built from a copy of the checkout's own files, since a build leaves its traces in the source tree."""
    pytest.importorskip("pip")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(CHECKOUT, source, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and ("Could not find" in built.stderr or "Temporary failure" in built.stderr):
        pytest.skip("the build backend cannot be had here (no network)")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"agent/hw_profiles/{path.name}" for path in FILES} <= names


def test_the_example_of_the_guide_is_a_sound_profile() -> None:
    guide = (CHECKOUT / "docs" / "how-to" / "board-profile.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    profile = parse_profile(example.encode(), origin="guide")
    facts = Facts(compatible=("acme,gateway-2-rev-b", "vendor,soc"), arch="aarch64", supported=True)
    assert choose_profile(facts, [*load_profiles([SHIPPED])[0], profile]) is profile
    fields = set(re.findall(r"`(\w+)`", guide.split("## Fields")[1]))
    known = set(Profile.__dataclass_fields__) - {"match", "notes", "heat", "origin", "layer"}
    assert known <= fields
    assert set(Match.__dataclass_fields__) - {"supported"} <= fields
