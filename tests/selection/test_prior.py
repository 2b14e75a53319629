"""What is expected before anything ran: in the right order for each kind of machine, with a reason."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bundles.manifest import Policy
from agent.hardware.facts import Facts
from agent.hardware.probe import probe
from agent.hardware.profiles import FALLBACK, Profile, choose_profile, load_profiles, shipped_profiles_dir
from agent.selection.prior import int8_gain, rank_by_prior, to_try
from agent.selection.rules import Candidate, candidate_of

from .parts import CPU, CUDA, STATIC, TENSORRT, arm, facts, manifest, variant

USUAL = manifest()


def order(machine: Facts, profile: Profile = FALLBACK, providers: tuple[str, ...] = (CPU,)) -> list[str]:
    made = [candidate_of(variant, provider) for variant in USUAL.variants for provider in providers]
    return [prior.candidate.id.replace(f"@{CPU}", "") for prior in rank_by_prior(made, machine, profile)]


def test_int8_first_where_there_are_instructions_for_it() -> None:
    for features in ({"avx512_vnni": True}, {"avx_vnni": True}, {"amx_int8": True}):
        assert order(facts(features=features)) == ["int8-static", "int8-dynamic", "fp32", "fp16"]
    assert order(arm(features={"i8mm": True}))[0] == "int8-static"


def test_fp32_first_on_x86_without_vnni() -> None:
    assert order(facts()) == ["fp32", "fp16", "int8-static", "int8-dynamic"]


@pytest.mark.parametrize(
    ("core", "first"),
    [("Cortex-A53", "int8-static"), ("Cortex-A72", "int8-static"), ("Carmel", "fp32"), ("Cortex-A55", "fp32")],
)
def test_by_core(core: str, first: str) -> None:
    assert order(arm(core_types=((core, 4),)))[0] == first


def test_the_big_cores_decide_since_they_do_the_work() -> None:
    machine = arm(core_types=(("Cortex-A53", 4), ("Carmel", 2)), big_core_types=("Carmel",))
    assert order(machine)[0] == "fp32"


def test_with_nothing_known_the_exact_one_comes_first() -> None:
    machine = facts(features={"avx512_vnni": None, "avx_vnni": None, "amx_int8": None})
    assert order(machine) == ["fp32", "int8-static", "int8-dynamic", "fp16"]


def test_on_a_gpu_fp16_first_and_on_its_cpu_last() -> None:
    profile = Profile("j", "J", providers=(TENSORRT, CUDA, CPU), gpu_precisions=("fp16", "fp32", "int8"))
    ranked = order(arm(features={"dotprod": True}), profile, (TENSORRT, CUDA, CPU))
    assert ranked[0] == f"fp16@{TENSORRT}"
    assert ranked.index(f"fp16@{CUDA}") < ranked.index(f"fp32@{CUDA}") < ranked.index(f"int8-static@{CUDA}")
    assert ranked[-1] == "fp16"


def test_a_profile_knows_better_than_the_features() -> None:
    gain = Profile("odd", "Odd", int8_gain=0.4)
    assert order(facts(features={"avx512_vnni": True}), gain)[0] == "fp32"
    wish = Profile("odd", "Odd", cpu_precisions=("fp16", "fp32", "int8"))
    ranked = rank_by_prior([candidate_of(v, CPU) for v in USUAL.variants], facts(features={"avx_vnni": True}), wish)
    assert [prior.candidate.variant_id for prior in ranked] == ["fp16", "fp32", "int8-static", "int8-dynamic"]
    assert "the profile odd puts fp16 before it" in ranked[1].why


def test_a_profile_that_lists_the_cpu_first_keeps_the_accelerator_behind_it() -> None:
    profile = Profile("p", "P", providers=(CPU, CUDA))
    assert order(arm(), profile, (CUDA, CPU))[0] in ("fp32", "int8-static")


def test_every_expectation_has_a_reason() -> None:
    made = [candidate_of(variant, provider) for variant in USUAL.variants for provider in (TENSORRT, CUDA, CPU)]
    for prior in rank_by_prior(made, facts(), FALLBACK):
        assert prior.score > 0
        assert prior.why


@given(st.permutations([candidate_of(v, p) for v in USUAL.variants for p in (TENSORRT, CPU)]))
def test_the_order_of_the_input_does_not_matter(made: list[Candidate]) -> None:
    assert rank_by_prior(made, facts(), FALLBACK) == rank_by_prior(sorted(made, key=lambda c: c.id), facts(), FALLBACK)


# -- which to try -----------------------------------------------------------------------------------------------------


def tried(prefer: str, count: int, machine: Facts | None = None, *variants: dict[str, object]) -> list[str]:
    bundle = manifest(*variants)
    machine = machine or facts(features={"avx_vnni": True})
    priors = rank_by_prior([candidate_of(v, CPU) for v in bundle.variants], machine, FALLBACK)
    return [c.variant_id for c in to_try(Policy.model_validate({"prefer": prefer}), priors, count)]


def test_all_are_tried_where_there_is_room() -> None:
    assert sorted(tried("latency", 4)) == ["fp16", "fp32", "int8-dynamic", "int8-static"]


def test_the_exact_one_is_always_among_the_tried() -> None:
    """When the fast ones turn out to answer wrongly there must be something left."""
    many = [variant(f"int8-{index}", "int8", 4, STATIC) for index in range(6)]
    assert tried("latency", 3, None, *many, variant("fp32")) == ["int8-0", "int8-1", "fp32"]


def test_what_is_tried_depends_on_what_is_wanted() -> None:
    made = (
        variant("a", quality={"metric": "map50", "value": 0.6}, mb=50),
        variant("b", "int8", 12, STATIC, quality={"metric": "map50", "value": 0.5}),
        variant("c", "int8", 3, STATIC, quality={"metric": "map50", "value": 0.3}),
    )
    assert tried("accuracy", 1, None, *made) == ["a"]
    assert tried("memory", 1, None, *made) == ["c"]
    assert tried("latency", 2, None, *made) == ["c", "b"]


def test_the_next_lot_follows_when_none_of_the_first_may_run() -> None:
    """The fast ones are all below the wanted quality: the accurate one comes second, not never."""
    priors = rank_by_prior([candidate_of(v, CPU) for v in USUAL.variants], facts(features={"avx_vnni": True}), FALLBACK)
    first = to_try(Policy(), priors, 2)
    second = to_try(Policy(), priors, 2, [candidate.id for candidate in first])
    assert [c.variant_id for c in first] == ["int8-static", "int8-dynamic"]
    assert [c.variant_id for c in second] == ["fp32", "fp16"]
    assert to_try(Policy(), priors, 2, [prior.candidate.id for prior in priors]) == ()


def test_of_equal_expectations_the_smaller_file_comes_first() -> None:
    made = (variant("a-large", mb=28), variant("b-small", mb=8))
    assert tried("latency", 1, None, *made) == ["b-small"]


def test_the_cpu_is_among_the_tried_where_an_accelerator_is_preferred() -> None:
    profile = Profile("j", "J", providers=(TENSORRT, CUDA, CPU))
    made = [candidate_of(v, p) for v in USUAL.variants for p in (TENSORRT, CUDA, CPU)]
    chosen = to_try(Policy(), rank_by_prior(made, arm(), profile), 3)
    assert {c.provider for c in chosen} >= {TENSORRT, CPU}


# -- against what others measured -------------------------------------------------------------------------------------

#: Boards of the published table, by the words of its ``board`` column, with the recorded board of the same CPU.
PUBLISHED = {
    "Raspberry Pi 3": "rpi-3b-arm64",
    "Raspberry Pi 4": "rpi-4b-1gb",
    "Jetson AGX Xavier": "jetson-agx-xavier",
    "Jetson Orin Nano": "jetson-orin-nano-8gb-jp5",
}


def published_gain(rows: list[dict[str, str]], board: str) -> float:
    """How many times faster int8 ran than float on the CPU there: the median over networks and thread counts."""
    times: dict[tuple[str, ...], dict[bool, float]] = defaultdict(dict)
    for row in rows:
        if board in row["board"] and row["device"] in ("cpu", "") and row["engine"].startswith("ncnn"):
            kind = (row["board"], row["threads"], row["cluster"], row["model"])
            times[kind][row["precision"] == "int8"] = float(row["avg_ms"])
    gains = [pair[False] / pair[True] for pair in times.values() if len(pair) == 2]
    return median(gains) if gains else math.nan


@pytest.mark.parametrize("words", PUBLISHED)
def test_the_prior_points_the_way_that_published_figures_do(boards: Path, words: str) -> None:
    """Good for the order and not for the size: where others saw a clear gain or loss, no other one is expected."""
    with (boards / "priors.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    published = published_gain(rows, words)
    machine = probe(boards / PUBLISHED[words])
    profile = choose_profile(machine, load_profiles([shipped_profiles_dir()])[0])
    expected, why = int8_gain(machine, profile)
    assert not math.isnan(published), f"no figures for {words}"
    if published > 1.15:
        assert expected > 1, why
    if published < 0.85:
        assert expected < 1, why
    assert re.search(r"int8", why)
