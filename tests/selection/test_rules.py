"""Which variants may be tried where, and every reason why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bundles.manifest import Manifest
from agent.hardware.facts import FEATURES, Accelerator, Facts
from agent.hardware.probe import probe
from agent.hardware.profiles import Profile, choose_profile, load_profiles, shipped_profiles_dir
from agent.selection.inventory import (
    PROVIDERS,
    InstalledRuntime,
    RuntimeInventory,
    assumed_inventory,
    install_hint,
)
from agent.selection.rules import Verdict, accepted, candidates, estimated_need_mb, memory_headroom_mb

from .parts import CPU, CUDA, DYNAMIC, INSTALLED, STATIC, TENSORRT, arm, facts, manifest, variant

JETSON_BUILD = RuntimeInventory({"onnx": InstalledRuntime("1.19.0", (TENSORRT, CUDA, CPU))})


def judge(
    bundle: Manifest, machine: Facts, inventory: RuntimeInventory = INSTALLED, providers: tuple[str, ...] = (CPU,),
    headroom: int | None = 4000, **more: Any,
) -> dict[str, Verdict]:  # fmt: skip
    verdicts = candidates(bundle, machine, providers, inventory, headroom, **more)
    return {verdict.candidate.id: verdict for verdict in verdicts}


def reasons(machine: Facts, inventory: RuntimeInventory = INSTALLED, **fields: Any) -> str:
    """Why a single variant with these requirements may not run; empty when it may."""
    (verdict,) = judge(manifest(variant("v", **fields)), machine, inventory).values()
    assert verdict.accepted == (not verdict.reasons)
    return "; ".join(verdict.reasons)


def test_an_undemanding_variant_runs_anywhere() -> None:
    assert reasons(facts()) == ""
    assert reasons(arm()) == ""


def test_every_reason_is_told_not_only_the_first() -> None:
    said = reasons(
        facts(mem_available_mb=20),
        mb=5000,
        requires={
            "arch": ["aarch64"],
            "all_features": ["dotprod", "i8mm"],
            "runtime_version": ">=1.30",
            "accelerator": "hailo",
        },
    )
    assert "needs aarch64, this is x86_64" in said
    assert "needs the CPU features dotprod, i8mm" in said
    assert "needs the accelerator hailo, which CPUExecutionProvider does not use" in said
    assert "this machine has no hailo" in said
    assert "needs onnx >=1.30, 1.23.2 is installed" in said
    assert "12530 MB of memory (estimated from a file of 5000 MB), 4000 MB may be used" in said


def test_unknown_is_not_false_but_a_note() -> None:
    machine = arm(features={"dotprod": None, "i8mm": False})
    (verdict,) = judge(manifest(variant("v", requires={"all_features": ["dotprod"]})), machine).values()
    assert verdict.accepted
    assert verdict.notes == ("needs dotprod, which detection cannot tell: the trial decides",)
    assert "needs one of the CPU features i8mm" in reasons(machine, requires={"any_features": ["i8mm"]})
    assert reasons(machine, requires={"any_features": ["i8mm", "dotprod"]}) == ""
    assert reasons(machine, requires={"all_features": ["a-feature-of-2031"]}) == ""


def test_other_spellings_of_an_architecture() -> None:
    assert reasons(arm(), requires={"arch": ["arm64"]}) == ""
    assert reasons(facts(), requires={"arch": ["amd64", "arm64"]}) == ""
    assert reasons(facts(arch=None), requires={"arch": ["aarch64"]}) == ""


def test_a_32_bit_userland_on_a_64_bit_kernel_is_a_32_bit_machine() -> None:
    machine = arm(user_bits=32)
    assert "the userland is 32-bit (armv7l) on a kernel of aarch64" in reasons(machine, requires={"arch": ["aarch64"]})
    assert reasons(machine, requires={"arch": ["armhf"]}) == ""
    inventory = assumed_inventory(machine, (CPU,))
    assert reasons(machine, inventory) == "the runtime onnx is not installed: it is not published for armv7l"


def test_a_runtime_that_is_missing_old_or_described_by_nonsense() -> None:
    assert reasons(facts(), RuntimeInventory()) == "the runtime onnx is not installed"
    assert reasons(facts(), requires={"runtime_version": ">=1.18,<2"}) == ""
    assert "needs onnx >=1.99" in reasons(facts(), requires={"runtime_version": ">=1.99"})
    assert "cannot be read: 'newest' is not" in reasons(facts(), requires={"runtime_version": "newest"})
    assert reasons(facts(), runtime="tflite") == "the runtime tflite is not installed"


def test_a_runtime_that_is_there_and_does_not_work_says_why() -> None:
    why = "tflite-runtime: it was built for numpy 1, numpy 2.4.6 is installed"
    inventory = RuntimeInventory(absent={"tflite": why, "onnx": ""}, broken=["tflite"])
    assert reasons(facts(), inventory, runtime="tflite") == f"the runtime tflite does not work here: {why}"
    assert reasons(facts(), inventory) == "the runtime onnx is not installed"


def test_tflite_runs_on_the_cpu_beside_onnx_and_alone_where_nothing_else_is_published() -> None:
    bundle = manifest(variant("fp32"), variant("lite", runtime="tflite"))
    both = judge(bundle, arm(), assumed_inventory(arm(), (CPU,)))
    assert {name: verdict.accepted for name, verdict in both.items()} == {f"fp32@{CPU}": True, "lite@cpu": True}
    machine = arm(arch="armv7l", user_bits=32)
    inventory = assumed_inventory(machine, (CPU,))
    alone = judge(bundle, machine, inventory)
    assert {name: verdict.accepted for name, verdict in alone.items()} == {f"fp32@{CPU}": False, "lite@cpu": True}
    assert alone["lite@cpu"].notes == ("assumes tflite 2.14.0 (tflite-runtime) with cpu",)
    newest = manifest(variant("lite", runtime="tflite", requires={"runtime_version": ">=2.15"}))
    refused = judge(newest, machine, inventory)["lite@cpu"]
    assert refused.reasons == ("needs tflite >=2.15, 2.14.0 (tflite-runtime) is assumed",)


def test_what_to_install_depends_on_the_machine() -> None:
    assert install_hint("onnx", facts()) == "pip install 'edge-agent[onnx]'"
    assert install_hint("tflite", arm()) == "pip install 'edge-agent[litert]'"
    for runtime in ("onnx", "tflite"):
        assert install_hint(runtime, arm(user_bits=32)) == "pip install 'edge-agent[tflite]'"


def test_memory_is_what_is_free_not_what_is_built_in() -> None:
    profile = Profile(id="p", title="P", memory_share=0.6)
    assert memory_headroom_mb(facts(mem_available_mb=302, mem_limit_mb=8000), profile) == 302
    assert memory_headroom_mb(facts(mem_available_mb=7000, mem_limit_mb=512), profile) == 307
    assert memory_headroom_mb(facts(mem_available_mb=None, mem_limit_mb=1000), profile) == 600
    assert memory_headroom_mb(facts(mem_available_mb=None, mem_limit_mb=None), profile) is None
    (verdict,) = judge(manifest(variant("v")), facts(), headroom=None).values()
    assert verdict.accepted
    assert "how much is free is not known" in verdict.notes[0]


def test_the_need_is_the_packers_figure_or_the_estimate_whichever_is_more() -> None:
    bundle = manifest(
        variant("small", requires={"min_memory_mb": 900}),
        variant("large", mb=1000, requires={"min_memory_mb": 10}),
        variant("half", "fp16", 1000),
    )
    assert estimated_need_mb(bundle.variant("small")) == 900
    assert estimated_need_mb(bundle.variant("large")) == 2530
    assert estimated_need_mb(bundle.variant("half")) > estimated_need_mb(bundle.variant("half"), on_cpu=False)
    asked = judge(bundle, facts(), headroom=800)[f"small@{CPU}"].reasons
    assert asked == ("needs about 900 MB of memory (as the manifest asks), 800 MB may be used",)


def test_a_jetson_with_its_own_build_gets_a_candidate_for_each_provider() -> None:
    machine = arm(accelerators=(Accelerator("cuda", True),))
    verdicts = judge(manifest(variant("fp16", "fp16")), machine, JETSON_BUILD, (TENSORRT, CUDA, CPU))
    assert [*verdicts] == [f"fp16@{TENSORRT}", f"fp16@{CUDA}", f"fp16@{CPU}"]
    assert all(verdict.accepted for verdict in verdicts.values())


def test_a_jetson_with_the_ordinary_build_is_told_what_it_lacks() -> None:
    machine = arm(accelerators=(Accelerator("cuda", True),))
    verdicts = judge(manifest(variant("fp16", "fp16")), machine, INSTALLED, (TENSORRT, CUDA, CPU))
    assert verdicts[f"fp16@{CUDA}"].reasons == (f"{CUDA} is not in the installed onnx 1.23.2",)
    assert [candidate.provider for candidate in accepted(verdicts.values())] == [CPU]


def test_presence_on_the_bus_is_not_usability() -> None:
    machine = arm(accelerators=(Accelerator("vsi-npu", False),))
    inventory = RuntimeInventory({"onnx": InstalledRuntime("1.20.0", ("VSINPUExecutionProvider", CPU))})
    verdicts = judge(manifest(variant("v", "int8")), machine, inventory)
    assert verdicts["v@VSINPUExecutionProvider"].reasons == ("the vsi-npu is there, its driver is not",)
    assert verdicts[f"v@{CPU}"].accepted


def test_an_accelerator_of_which_nobody_knows_whether_it_works_is_tried() -> None:
    machine = arm(accelerators=(Accelerator("cuda", None),))
    verdict = judge(manifest(variant("v")), machine, JETSON_BUILD)[f"v@{CUDA}"]
    assert verdict.accepted
    assert verdict.notes == ("whether the cuda works is not known: the trial decides",)


def test_a_variant_for_an_accelerator_is_judged_on_the_providers_that_use_it_only() -> None:
    machine = arm(accelerators=(Accelerator("cuda", True), Accelerator("dla", True)))
    bundle = manifest(variant("v", "int8", requires={"accelerator": "dla"}))
    assert [*judge(bundle, machine, JETSON_BUILD, (TENSORRT, CUDA, CPU))] == [f"v@{TENSORRT}"]


def test_a_provider_of_tomorrow_needs_a_line_in_a_profile_and_no_code() -> None:
    inventory = RuntimeInventory({"onnx": InstalledRuntime("2.0.0", ("QuantumExecutionProvider", CPU))})
    assert [*judge(manifest(variant("v")), arm(), inventory)] == [f"v@{CPU}"]
    named = judge(manifest(variant("v")), arm(), inventory, ("QuantumExecutionProvider", CPU))
    assert named["v@QuantumExecutionProvider"].accepted


def test_no_candidate_leaves_the_device() -> None:
    assert all("Azure" not in name for name in judge(manifest(), facts()))


def test_signed_qoperator_is_turned_down_on_x86_only() -> None:
    signed = {"technique": {"form": "QOperator", "activations": "int8"}, "precision": "int8"}
    assert "5 to 10 times slower on x86" in reasons(facts(), **signed)
    assert reasons(arm(), **signed) == ""
    unsigned = {"technique": {"form": "QOperator", "activations": "uint8"}, "precision": "int8"}
    assert reasons(facts(), **unsigned) == ""


def test_what_is_quarantined_is_not_tried() -> None:
    verdicts = judge(manifest(), facts(), quarantined={f"fp32@{CPU}": "crashed 3 times"})
    assert verdicts[f"fp32@{CPU}"].reasons == ("quarantined: crashed 3 times",)
    assert verdicts[f"int8-static@{CPU}"].accepted


def test_an_emulated_machine_runs_models_and_says_what_its_times_are_worth() -> None:
    (verdict,) = judge(manifest(variant("v")), arm(emulated=True)).values()
    assert verdict.accepted
    assert "emulated" in verdict.notes[0]


@given(st.data())
def test_learning_that_something_is_missing_never_admits_a_variant(data: st.DataObject) -> None:
    """Knowledge is monotonic: from unknown to absent, a rejection stays and an acceptance may go."""
    named = data.draw(st.lists(st.sampled_from(FEATURES), max_size=3))
    either = data.draw(st.lists(st.sampled_from(FEATURES), max_size=3))
    known = {name: data.draw(st.sampled_from([True, False, None])) for name in FEATURES}
    bundle = manifest(variant("v", requires={"all_features": named, "any_features": either}))
    less = {name: False if value is None else value for name, value in known.items()}
    (before,) = judge(bundle, facts(features=known)).values()
    (after,) = judge(bundle, facts(features=less)).values()
    assert before.accepted or not after.accepted
    assert after.accepted == (all(less[name] for name in named) and (not either or any(less[name] for name in either)))


def test_every_provider_that_a_shipped_profile_names_is_known() -> None:
    for profile in load_profiles([shipped_profiles_dir()])[0]:
        assert set(profile.providers) <= set(PROVIDERS), profile.id


# -- recorded boards --------------------------------------------------------------------------------------------------

BoardVerdicts = Callable[..., dict[str, Verdict]]


@pytest.fixture
def on_board(boards: Path) -> BoardVerdicts:
    """The verdicts for a manifest on a recorded board, with the runtimes that one would install there."""
    profiles, problems = load_profiles([shipped_profiles_dir()])
    assert not problems

    def verdicts(name: str, bundle: Manifest | None = None) -> dict[str, Verdict]:
        machine = probe(boards / name)
        profile = choose_profile(machine, profiles)
        inventory = assumed_inventory(machine, profile.providers)
        headroom = memory_headroom_mb(machine, profile)
        return judge(bundle or manifest(), machine, inventory, profile.providers, headroom)

    return verdicts


DEMANDING = manifest(
    variant("plain"),
    variant("dot", "int8", 4, STATIC, requires={"all_features": ["dotprod"]}),
    variant("vector", "int8", 4, STATIC, requires={"any_features": ["avx512_vnni", "avx_vnni", "amx_int8"]}),
    variant("arm", "int8", 4, DYNAMIC, requires={"arch": ["aarch64"]}),
    variant("gpu", "fp16", 7, requires={"accelerator": "cuda"}),
    variant("big", "fp32", 400),
)


@pytest.mark.parametrize(
    ("board", "run"),
    [
        ("rpi-3b-arm64", {"plain", "arm"}),
        ("rpi-5-8gb", {"plain", "dot", "arm", "big"}),
        ("rpi-4b-8gb-32bit-userland", set()),
        ("rpi-zero-2w-armhf", set()),
        ("rpi-zero-w-armv6", set()),
        ("neg-riscv-visionfive2", set()),
        ("jetson-agx-orin-32gb", {"plain", "dot", "arm", "gpu", "big"}),
        ("jetson-agx-xavier", {"plain", "arm", "gpu", "big"}),
        ("x86-haswell-no-vnni", {"plain", "big"}),
        ("x86-n100", {"plain", "vector", "big"}),
        ("x86-sapphire-rapids", {"plain", "vector", "big"}),
        ("hostile-rpi5-1.5gb-free-of-8", {"plain", "dot", "arm"}),
        ("hostile-cgroup2-512m-cpuset", {"plain", "arm"}),
        ("hostile-empty-cpuinfo", {"plain", "dot", "arm", "big"}),
    ],
)
def test_which_variants_run_on_which_board(on_board: BoardVerdicts, board: str, run: set[str]) -> None:
    verdicts = on_board(board, DEMANDING)
    assert {verdict.candidate.variant_id for verdict in verdicts.values() if verdict.accepted} == run
    assert all(verdict.reasons for verdict in verdicts.values() if not verdict.accepted)


def test_an_unsupported_machine_says_so_first(on_board: BoardVerdicts) -> None:
    assert all(
        verdict.reasons[0] == "this machine (armv6l) is not supported"
        for verdict in on_board("rpi-zero-w-armv6").values()
    )


def test_a_board_of_8_gb_with_302_mb_free_is_a_small_board(on_board: BoardVerdicts) -> None:
    (why,) = on_board("hostile-rpi5-1.5gb-free-of-8", DEMANDING)[f"big@{CPU}"].reasons
    assert why.endswith("302 MB may be used")


def test_what_is_assumed_of_a_board_is_said(on_board: BoardVerdicts) -> None:
    for verdict in on_board("rpi-3b-arm64").values():
        assert any(note.startswith("assumes onnx") for note in verdict.notes)


def test_every_recorded_board_gets_an_answer_for_every_variant(boards: Path, on_board: BoardVerdicts) -> None:
    for case in sorted(path.name for path in boards.iterdir() if (path / "expected.json").exists()):
        verdicts = on_board(case, DEMANDING)
        assert {verdict.candidate.variant_id for verdict in verdicts.values()} == {v.id for v in DEMANDING.variants}
