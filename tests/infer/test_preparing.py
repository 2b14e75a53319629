"""Prepared forms: which are chosen, and how they are made in a confined child with the real runtime."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pytest

from agent.base.clock import SystemClock
from agent.base.errors import TryLaterError
from agent.infer import preparing, sandbox
from agent.infer.children import ChildError
from agent.infer.forms import ROUTES, Figures, choose_forms, choose_threads, needs_file
from agent.infer.landlock import abi_version
from agent.infer.preparing import prepared
from agent.infer.runtimes.base import PLAIN, LoadOptions, Route, load_runtime
from agent.infer.trial import Entrant, Surroundings, TrialPlan
from agent.selection.measurements import measurement_key
from agent.store.memory import hold
from tests import onnx_models

MB = 1 << 20
CPU = "CPUExecutionProvider"
QUICK, STEADY, ORT = Route("mapped", prepack=False), Route("mapped"), Route("ort")
needs_landlock = pytest.mark.skipif(abi_version() == 0, reason="without Landlock nothing is prepared")


# -- the choice -------------------------------------------------------------------------------------------------------


def figures(route, load_ms, first_ms, run_ms, own_mb=1.0, size_mb=10.0, *, shares=False):
    return Figures(
        route, load_ms / 1e3, first_ms / 1e3, run_ms / 1e3, int(own_mb * MB), int(size_mb * MB), shares=shares
    )


def chosen(*measured):
    return [one.name for one in choose_forms(measured)]


def test_what_answers_soonest_is_chosen_where_runs_are_equal():
    """MobileNetV2 in fp32."""
    assert chosen(
        figures(PLAIN, 13.5, 4.5, 4.1, 15),
        figures(ORT, 9.0, 4.5, 4.1, 14),
        figures(STEADY, 4.2, 4.9, 4.1, 5, shares=True),
        figures(QUICK, 2.0, 5.3, 4.2, 1, shares=True),
    ) == ["mapped-unpacked"]


def test_what_runs_slower_answers_first_only_where_it_gains_much_and_another_takes_over():
    """MiniLM in fp32: without prepacking the load is a quarter, and the run half as fast again."""
    assert chosen(
        figures(PLAIN, 99, 9.5, 8.7, 95),
        figures(ORT, 60, 9.5, 8.7, 95, 90),
        figures(STEADY, 29, 10, 8.7, 95, 90, shares=True),
        figures(QUICK, 6.9, 18, 14.6, 2, 90, shares=True),
    ) == ["mapped-unpacked", "ort"]  # behind, memory counts: it is loaded while another answers


def test_what_differs_by_noise_alone_is_not_loaded_twice():
    """Weights arranged alike run alike; a burst of something else fell on all runs of one form."""
    assert chosen(
        figures(PLAIN, 13.5, 4.5, 5.0, 15),
        figures(STEADY, 8.2, 4.9, 5.0, 5, shares=True),
        figures(QUICK, 2.0, 5.3, 4.9, 1, shares=True),
        figures(Route("ort", prepack=False), 8.0, 4.5, 4.1, 14),
    ) == ["mapped-unpacked"]


def test_what_runs_slower_and_gains_little_is_not_chosen():
    """MobileNetV2 in int8."""
    assert chosen(
        figures(PLAIN, 14.5, 2.1, 1.8, 6),
        figures(STEADY, 4.9, 2.1, 1.8, 4, shares=True),
        figures(QUICK, 3.4, 5.7, 5.0, 1, shares=True),
    ) == ["mapped"]


def test_nothing_is_kept_where_nothing_gains():
    alone = (figures(PLAIN, 1.0, 0.1, 0.05), figures(ORT, 0.95, 0.1, 0.05), figures(QUICK, 0.97, 0.1, 0.05))
    assert chosen(*alone) == ["plain"]
    assert not needs_file(choose_forms(alone))
    slow = (figures(PLAIN, 10, 1, 1), figures(QUICK, 9, 5, 5))
    assert chosen(*slow) == ["plain"]


def test_figures_survive_the_catalog_and_nonsense_does_not():
    one = figures(QUICK, 2, 5, 4, shares=True)
    assert Figures.from_json(one.to_json()) == one
    for change in ({"route": ["mapped", 1, 2]}, {"route": ["evil", True]}, {"load_s": None}, {"own": "x"}):
        with pytest.raises((KeyError, TypeError, ValueError, StopIteration)):
            Figures.from_json({**one.to_json(), **change})


def test_threads_are_had_only_where_they_gain():
    assert choose_threads({1: 0.0120, 2: 0.0120}) == 1  # 20 KB: ONNX Runtime makes nothing parallel
    assert choose_threads({1: 0.0542, 2: 0.0660, 4: 0.0641}) == 1
    assert choose_threads({1: 0.0102, 2: 0.0100}) == 1
    assert choose_threads({1: 14e-6, 2: 12e-6, 4: 11e-6}) == 1  # that close, the noise decides
    assert choose_threads({1: 7.8, 2: 5.9}) == 2
    assert choose_threads({1: 8.0, 2: 4.1, 4: 4.0}) == 2
    assert choose_threads({1: 8.0, 2: 4.3, 3: 3.2, 4: 2.4}) == 4


# -- the making -------------------------------------------------------------------------------------------------------


def entrant(data, runtime="onnx", provider=CPU, threads=1):
    key = measurement_key(
        variant_digest="x", runtime=runtime, runtime_version="1", provider=provider, threads=threads, features={}
    )
    return Entrant(f"x@{provider}", key, lambda: hold([memoryview(data)], len(data)))


def plan(**changes):
    defaults = {
        "memory_mb": 1024, "headroom_mb": 2048, "load_timeout_s": 60, "check_timeout_s": 120, "run_timeout_s": 60,
    }  # fmt: skip
    return TrialPlan(**{**defaults, **changes})


def making(data, around=None, threads=1, **changes):
    return prepared(entrant(data, threads=threads), plan(**changes), around or Surroundings(SystemClock()), seconds=0.5)


def deep(layers=64, side=128):
    """Many small layers: most of a load is the graph, which is optimized already in the prepared file."""
    return onnx_models.heavy(side=side, layers=layers)


def golden(data, count=4, wrong=0.0):
    session = load_runtime("onnx").load(os_file(data), LoadOptions(CPU))
    x = np.random.default_rng(5).standard_normal((count, 128)).astype(np.float32)
    y = session.run({"x": x}, ["y"])[0] + wrong
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": x, "output/y": y})
    return stream.getvalue()


def os_file(data):
    descriptor = os.memfd_create("x")
    os.write(descriptor, data)
    return descriptor


@needs_landlock
def test_a_model_is_prepared_and_each_route_of_its_file_answers_the_same():
    data = deep()
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    runtime = load_runtime("onnx")
    expected = runtime.load(os_file(data), LoadOptions(CPU)).run({"x": x}, ["y"])[0]
    with making(data) as found:
        assert found.plain.route == PLAIN
        assert found.forms, found.note
        assert (found.descriptor is not None) == needs_file(found.forms)
        if found.descriptor is None:  # on a device where nothing gains
            return
        with pytest.raises(PermissionError):
            os.pwrite(found.descriptor, b"x", 0)
        for route in ROUTES[1:]:
            session = runtime.load(found.descriptor, LoadOptions(CPU, route=route))
            np.testing.assert_allclose(session.run({"x": x}, ["y"])[0], expected, rtol=1e-4, atol=1e-5)
            session.close()
        descriptor = found.descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@needs_landlock
def test_a_model_that_gains_nothing_from_threads_gets_one_unless_requests_may_be_larger():
    with making(onnx_models.heavy(side=32, layers=4, rows=1), threads=4) as found:
        assert found.threads == 1
    with making(onnx_models.heavy(side=32, layers=4), threads=4) as found:
        assert found.threads is None
    with making(onnx_models.heavy(side=32, layers=4, rows=1)) as found:
        assert found.threads is None  # there is but one


@needs_landlock
def test_a_child_that_ends_over_the_threads_takes_no_form_with_it(monkeypatch):
    def end(child, *_):
        child.close()
        raise ChildError("hung", "took too long")

    monkeypatch.setattr(preparing, "_threads", end)
    with making(deep(), threads=4) as found:
        assert found.forms
        assert found.threads is None
        assert "threads could not be compared" in found.note or "nothing answers sooner" in found.note


@needs_landlock
def test_forms_that_disagree_with_the_golden_set_are_not_used():
    """The golden outputs are wrong here, so that every form is: the plain model stays, whatever was gained."""
    data = deep()
    for wrong, right in ((0.0, True), (5.0, False)):
        truth = golden(data, wrong=wrong)
        with making(
            data,
            open_golden=lambda truth=truth: hold([memoryview(truth)], len(truth)),
            metric="max_abs",
            threshold=0.01,
            passes=lambda value: value <= 0.01,
        ) as found:
            assert found.plain is not None
            if not right:
                assert not needs_file(found.forms)
                assert found.descriptor is None
                assert "max_abs" in found.note or "nothing answers sooner" in found.note


@needs_landlock
@pytest.mark.parametrize(
    ("data", "note"),
    [(b"no model" * 99, "cannot be prepared"), (onnx_models.endless(), "hung"), (deep()[:-5000], "cannot be prepared")],
)
def test_what_cannot_be_prepared_stays_plain_and_says_why(data, note):
    with making(data, check_timeout_s=3) as found:
        assert found.descriptor is None
        assert not found.forms
        assert note in found.note


@needs_landlock
def test_an_end_from_outside_ends_it():
    def stop():
        raise TryLaterError("cannot go on: the agent is stopping")

    before = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(TryLaterError, match="stopping"),
        making(deep(), Surroundings(SystemClock(), go_on=stop)),
    ):
        raise AssertionError
    assert len(os.listdir("/proc/self/fd")) == before


@needs_landlock
def test_a_runtime_without_other_forms_stays_plain():
    with prepared(replace(entrant(b"x", "tflite", "cpu")), plan(), Surroundings(SystemClock())) as found:
        assert found.note.startswith("cannot be prepared")


def test_without_landlock_a_child_that_writes_does_not_start(monkeypatch):
    monkeypatch.setattr(sandbox.landlock, "restrict", lambda *_: 0)
    for name in ("_prctl", "_set_limits", "_drop_capabilities"):
        monkeypatch.setattr(sandbox, name, lambda *_: None)
    monkeypatch.setattr(sandbox.seccomp, "restrict", lambda **_: pytest.fail("it was let go on"))
    with pytest.raises(sandbox.UnsupportedError, match="no Landlock"):
        sandbox.confine([], [], sandbox.Limits(1, 1, file_bytes=1))
