"""Trials of real models in real children."""

from __future__ import annotations

import io
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from agent.base.clock import SystemClock
from agent.infer.trial import Entrant, Surroundings, Trial, TrialPlan, apart
from agent.selection.measurements import measurement_key
from tests import onnx_models

CPU = "CPUExecutionProvider"
LIAR = "tests.infer.hostile.liar"


class Opened:
    """A model in a memfd, as the store would open it."""

    def __init__(self, data):
        self.fd = os.memfd_create("model", os.MFD_CLOEXEC)
        os.write(self.fd, data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)


def entrant(name, data, provider=CPU):
    key = measurement_key(
        variant_digest=name, runtime="onnx", runtime_version="1", provider=provider, threads=1, features={}
    )
    return Entrant(f"{name}@{provider}", key, lambda: Opened(data))


def plan(**changes):
    defaults = {
        "memory_mb": 512, "headroom_mb": 2048, "round_s": 0.01, "least_rounds": 4, "most_rounds": 6,
        "load_timeout_s": 30, "check_timeout_s": 30, "run_timeout_s": 30,
    }  # fmt: skip
    return TrialPlan(**{**defaults, **changes})


def run(*entrants, needed=lambda measured, done, most: (), around=None, **changes):
    trial = Trial(entrants, plan(**changes), around or Surroundings(SystemClock()))
    return {measurement.candidate_id.split("@")[0]: measurement for measurement in trial.run(needed)}


def golden(inputs, outputs):
    stream = io.BytesIO()
    np.savez(stream, **{f"input/{k}": v for k, v in inputs.items()}, **{f"output/{k}": v for k, v in outputs.items()})
    return stream.getvalue()


def answers(data, inputs):
    session = onnxruntime.InferenceSession(data)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_a_good_model_is_measured():
    seen = run(entrant("good", onnx_models.heavy()))["good"]
    assert seen.ok, seen.reason
    assert seen.rounds == 4
    assert 0 < seen.p50_ms <= seen.p95_ms
    assert seen.load_ms > 0
    assert 2 < seen.peak_mb < 200  # 4 MB of weights, and what the runtime makes of them


def test_rounds_are_interleaved_and_the_slower_is_seen_slower():
    order = []
    around = Surroundings(SystemClock(), progress=lambda event: order.append(event.get("round")))
    seen = run(
        entrant("small", onnx_models.heavy(layers=2)), entrant("large", onnx_models.heavy(layers=16)), around=around
    )
    assert [number for number in order if number] == [1, 2, 3, 4]
    assert seen["small"].session == seen["large"].session
    ratios = [b / a for a, b in zip(seen["small"].round_ms, seen["large"].round_ms, strict=True)]
    assert sorted(ratios)[len(ratios) // 2] > 2


def test_who_is_out_of_the_race_runs_no_more_rounds():
    seen = run(
        entrant("kept", onnx_models.linear()),
        entrant("dropped", onnx_models.linear(1)),
        needed=lambda measured, done, most: [f"kept@{CPU}"],
    )
    assert seen["kept"].rounds == 6
    assert seen["dropped"].rounds == 4
    assert seen["dropped"].round_ms[4:] == (None, None)


@pytest.mark.parametrize(
    ("name", "data", "failure", "reason"),
    [
        ("garbage", b"no model at all" * 100, "load", "cannot load model"),
        ("endless", onnx_models.endless(), "hang", "no answer to 'check'"),
        ("greedy", onnx_models.greedy(), "memory", "memory|allocat"),
    ],
)
def test_a_bad_model_is_rejected_with_its_reason_and_the_good_one_is_measured(name, data, failure, reason):
    seen = run(entrant(name, data), entrant("good", onnx_models.linear()), check_timeout_s=4)
    assert not seen[name].ok
    assert seen[name].failure == failure
    assert re.search(reason, seen[name].reason), seen[name].reason
    assert seen["good"].ok
    assert seen["good"].rounds == 4


@pytest.mark.parametrize("location", ["../../../etc/passwd", "3", "*/_ORT_MEM_ADDR_/*"])
def test_a_model_that_keeps_tensors_elsewhere_never_reaches_the_runtime(location):
    seen = run(entrant("spy", onnx_models.elsewhere(location)))["spy"]
    assert seen.failure == "load"
    assert "is kept in another file" in seen.reason


def test_a_model_that_disagrees_with_the_golden_set_is_rejected():
    inputs = {"x": np.random.default_rng(3).standard_normal((40, 16)).astype(np.float32)}
    outputs = answers(onnx_models.linear(seed=0), inputs)
    seen = run(
        entrant("right", onnx_models.linear(seed=0)),
        entrant("wrong", onnx_models.linear(seed=5)),
        open_golden=lambda: Opened(golden(inputs, outputs)),
        metric="top1",
        threshold=0.9,
        passes=lambda value: value >= 0.9,
    )
    assert seen["right"].ok
    assert seen["right"].agreement == 1.0
    assert seen["wrong"].failure == "disagreement"
    assert "top1" in seen["wrong"].reason
    assert seen["wrong"].agreement < 0.9


def test_a_model_with_another_signature_than_the_manifests_is_rejected():
    seen = run(entrant("odd", onnx_models.linear()), departs=lambda inputs, outputs: "input 'x' is not in the manifest")
    assert seen["odd"].failure == "load"
    assert "not in the manifest" in seen["odd"].reason


def test_made_up_inputs_that_the_model_refuses_are_a_note_not_a_verdict():
    seen = run(entrant("picky", onnx_models.picky()), shapes={"x": [7]})["picky"]
    assert seen.ok
    if seen.notes:
        assert "made-up" in seen.notes[0]
        assert seen.p50_ms is None


def test_strings_and_several_inputs_are_made_up():
    seen = run(entrant("strings", onnx_models.strings()), entrant("two", onnx_models.two_in_two_out()))
    assert seen["strings"].ok, seen["strings"].reason
    assert seen["two"].ok, seen["two"].reason


def test_a_provider_that_the_runtime_lacks_is_a_load_failure():
    seen = run(entrant("good", onnx_models.linear(), provider="NoSuchExecutionProvider"))["good"]
    assert seen.failure == "load"
    assert "NoSuchExecutionProvider" in seen.reason


def test_children_that_do_not_fit_together_are_measured_one_after_the_other():
    seen = run(entrant("a", onnx_models.heavy()), entrant("b", onnx_models.heavy(seed=1)), headroom_mb=1)
    assert seen["a"].rounds == seen["b"].rounds == 4


def test_nothing_is_timed_while_throttled():
    waits = []
    states = iter([True, True, False] + [False] * 100)
    around = Surroundings(SystemClock(), throttled=lambda: next(states), wait=waits.append)
    seen = run(entrant("good", onnx_models.linear()), around=around)["good"]
    assert len(waits) == 2
    assert seen.rounds == 4
    spoiled = iter([False, True] * 200)
    around = Surroundings(SystemClock(), throttled=lambda: next(spoiled), wait=waits.append)
    seen = run(entrant("good", onnx_models.linear()), around=around)["good"]
    assert seen.rounds == 0  # each round met throttling, none counts


def test_runs_that_overlapped_a_request_do_not_count():
    times, began = [100.0, 50.0, 100.0, 25.0], [1.0, 1.1, 1.2, 1.5]
    assert apart(times, began, []) == times
    assert apart(times, began, [(1.05, 1.06)]) == [50.0, 100.0, 25.0]
    assert apart(times, began, [(1.14, 1.21)]) == [100.0, 25.0]
    assert apart(times, began, [(0.0, 0.5), (1.31, 1.49), (1.53, 9.0)]) == times
    assert apart(times, began, [(1.51, 1.511), (0.5, 1.01)]) == [50.0, 100.0]
    assert apart(times, began, [(0.0, 9.0)]) == []


def test_a_trial_asks_when_requests_ran_and_counts_what_was_apart():
    asked = []

    def spans(begin, end):
        asked.append((begin, end))
        return [(begin - 2, begin - 1)]

    seen = run(entrant("good", onnx_models.linear()), around=Surroundings(SystemClock(), spans=spans))["good"]
    assert seen.ok
    assert seen.rounds == len(asked) == 4
    assert seen.notes == ()
    now = time.perf_counter()
    assert all(0 < end - begin < now for begin, end in asked)


def test_where_requests_never_stop_all_runs_count_and_it_is_said():
    watched = []
    around = Surroundings(SystemClock(), spans=lambda begin, end: [(begin - 1, end + 1)], watch=watched.append)
    seen = run(entrant("good", onnx_models.linear()), around=around)["good"]
    assert seen.rounds == 4
    assert seen.notes == ("measured while requests ran",)
    assert watched == [True, False]


def test_who_is_there_to_be_compared_with_is_measured_whatever_it_answers():
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    data = onnx_models.linear(1)
    judged = {"open_golden": lambda: Opened(golden(inputs, answers(data, inputs))), "metric": "cosine"}
    judged |= {"threshold": 0.99, "passes": lambda value: value >= 0.99}
    other = replace(entrant("other", onnx_models.linear(2)), beside=True)
    seen = run(entrant("good", data), other, departs=lambda given, taken: "", **judged)
    assert seen["good"].agreement == pytest.approx(1.0)
    assert seen["other"].ok
    assert seen["other"].agreement < 0.9
    assert seen["other"].session == seen["good"].session
    assert seen["other"].rounds == 4
    (checked,) = Trial([entrant("good", data)], plan(**judged), Surroundings(SystemClock())).check()
    assert (checked.agreement, checked.rounds) == (pytest.approx(1.0), 0)


def test_children_run_when_nobody_else_wants_to():
    found, sessions = set(), set()
    autogroups = Path("/proc/self/autogroup").exists()

    def look(event):
        if event["stage"] == "measure":
            children = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()]
            found.update((os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)) for pid in children)
            sessions.update(Path(f"/proc/{pid}/autogroup").read_text().split()[-1] for pid in children if autogroups)

    run(entrant("good", onnx_models.linear()), around=Surroundings(SystemClock(), progress=look))
    assert found == {(os.SCHED_BATCH, 19)}
    assert sessions == ({"10"} if autogroups else set())


def test_energy_is_shared_among_the_runs_of_a_round():
    total = iter(range(10_000))
    around = Surroundings(SystemClock(), energy_j=lambda: float(next(total)))
    seen = run(entrant("good", onnx_models.linear()), around=around)["good"]
    assert seen.energy_source == "measured"
    assert 0 < seen.joules < 1


def test_no_child_is_left_behind():
    before = set(os.listdir("/proc"))
    run(entrant("good", onnx_models.linear()), entrant("garbage", b"x" * 1000))
    ours = [pid for pid in set(os.listdir("/proc")) - before if pid.isdigit() and _parent(pid) == os.getpid()]
    assert ours == []


def _parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return int(stream.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def lie(**answers):
    """An entrant whose child answers these operations with these texts, and the others honestly."""
    return entrant("liar", json.dumps(answers).encode())


def test_the_liar_of_the_next_test_passes_when_it_does_not_lie():
    assert run(lie(), module=LIAR)["liar"].ok


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("load", "{}"),
        ("load", '{"load_ms": "soon", "provider": "CPUExecutionProvider", "inputs": [], "outputs": []}'),
        ("load", '{"load_ms": NaN, "provider": "CPUExecutionProvider", "inputs": [], "outputs": []}'),
        ("load", '{"load_ms": 1, "provider": {}, "inputs": [], "outputs": []}'),
        ("load", '{"load_ms": 1, "provider": "CPUExecutionProvider", "inputs": [7], "outputs": []}'),
        ("load", '{"load_ms": 1, "provider": "CPUExecutionProvider", "inputs": "x", "outputs": []}'),
        ("load", '{"load_ms": 1, "provider": "CPUExecutionProvider", "inputs": [{"name": 1}], "outputs": []}'),
        ("load", '{"load_ms": 1' + "0" * 400 + ', "provider": "x", "inputs": [], "outputs": []}'),
        ("load", "[" * 100_000),
        ("check", '{"agreement": "perfect"}'),
        ("check", '{"agreement": Infinity}'),
        ("check", '{"agreement": null, "disagrees": ["x"]}'),
        ("memory", "{}"),
        ("memory", '{"peak_mb": -5}'),
        ("memory", '{"peak_mb": 1e999}'),
        ("round", "{}"),
        ("round", '{"times": 3}'),
        ("round", '{"times": [1, null]}'),
        ("round", '{"times": [-1]}'),
        ("round", '{"times": [0]}'),
        ("round", '{"times": [NaN]}'),
        ("round", '{"times": [true]}'),
        ("round", '{"times": [' + "1," * 100_000 + "1]}"),
        ("round", '{"times": [1]}'),
        ("round", '{"times": [1], "began": "now"}'),
        ("round", '{"times": [1], "began": [NaN]}'),
        ("round", '{"times": [1], "began": [1, 2]}'),
        ("round", '{"times": [1], "began": [1], "note": {}}'),
        ("round", "null"),
    ],
)
def test_whatever_a_child_says_only_its_own_candidate_is_rejected(operation, answer):
    golden_set = {"open_golden": lambda: Opened(b""), "metric": "top1"} if operation == "check" else {}
    seen = run(lie(**{operation: answer}), module=LIAR, **golden_set)["liar"]
    assert not seen.ok
    assert seen.failure == "crash"
    assert seen.to_json()  # whatever was said, it can be written into the catalog


def test_what_a_child_says_cannot_steer_a_terminal():
    said = json.dumps({"error": "\x1b]0;owned\x07\nerror: all is well\r"})
    seen = run(lie(load=said), module=LIAR)["liar"]
    assert seen.failure == "load"
    assert seen.reason.isprintable()


@pytest.mark.parametrize("shape", [[1 << 30], [(1 << 31) - 1] * 2, [(1 << 31) - 1] * 32, [0] * 64])
def test_an_absurd_shape_for_made_up_inputs_is_no_crash_of_the_model(shape):
    seen = run(entrant("good", onnx_models.linear()), shapes={"x": shape})["good"]
    assert seen.failure not in ("crash", "hang"), seen.reason
