"""The TFLite runtime, by whichever of its packages is installed: this file also runs where no other runtime is."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from agent.base.clock import SystemClock
from agent.base.errors import DamagedError, DeadlineError, PeerError, UnsupportedError
from agent.bundles.manifest import TensorSpec
from agent.bundles.tflite_signature import read_signature
from agent.infer.engine import Engine, EngineLimits
from agent.infer.runtimes import tflite
from agent.infer.runtimes.base import LoadOptions, load_runtime
from agent.infer.runtimes.probe import Runtimes
from agent.infer.shelf import Option, Served, Shelf
from agent.infer.tensors import InferRequest, Tensor
from agent.infer.trial import Entrant, Surroundings, Trial, TrialPlan
from agent.selection.measurements import measurement_key
from agent.store.memory import hold
from tests import tflite_models as made
from tests.tflite_models import Graph, Op, T, Table

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [name for name in ("ai_edge_litert", "tflite_runtime") if find_spec(name)]
pytestmark = pytest.mark.skipif(not PACKAGES, reason="no TFLite package here: pip install 'edge-agent[litert]'")

X = np.arange(48, dtype=np.float32).reshape(3, 16)
SLOW = 5.0  # a p95 in ms that keeps a model off the event loop


def plaintext(data):
    """The model as the store hands it out: sealed, read-only, without a name."""
    return hold([memoryview(data)], len(data))


def load(data, threads=1, provider="cpu"):
    with plaintext(data) as model:  # closed once it is loaded
        return load_runtime("tflite").load(model.fd, LoadOptions(provider, threads))


def ask(session, **inputs):
    return session.run(inputs, [spec.name for spec in session.outputs])


def described(specs):
    return {spec.name: (spec.datatype, spec.shape) for spec in specs}


def descriptors():
    return len(os.listdir("/proc/self/fd"))


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", ["serving_default", "another", None])
def test_names_come_from_the_signature_else_from_the_tensors(signature):
    session = load(made.linear(signature=signature))
    names = ("x", "y") if signature else ("x:0", "y:0")
    assert described(session.inputs) == {names[0]: ("FP32", (-1, 16))}
    assert described(session.outputs) == {names[1]: ("FP32", (-1, 4))}
    assert session.provider == "cpu"
    np.testing.assert_allclose(ask(session, **{names[0]: X})[0], X @ made.weights_of(), rtol=1e-4)
    session.close()


def test_the_file_and_the_runtime_tell_the_same_signature():
    for data in (made.linear(), made.linear(signature=None), made.passing(made.STRING), made.gather()):
        with plaintext(data) as model:
            told = read_signature(model.fd, model.size)
        session = load(data)
        assert described(told.inputs) == described(session.inputs)
        assert described(told.outputs) == described(session.outputs)
        session.close()


def test_a_signature_of_a_later_graph_is_served():
    def graph(weights):
        return Graph(
            [
                T("x", made.FLOAT32, (1, 16), (-1, 16)),
                made.constant("w", weights),
                T("y", made.FLOAT32, (1, 4), (-1, 4)),
            ],
            [0],
            [2],
            [Op(made.FULLY_CONNECTED, [0, 1, -1], [2], (8, Table({})))],
        )

    first, second = (np.ascontiguousarray(made.weights_of(seed).T) for seed in (1, 2))
    data = made.model([graph(first), graph(second)], [("serving_default", {"x": 0}, {"y": 2}, 1)])
    session = load(data)
    for count in (1, 3, 1):
        np.testing.assert_allclose(ask(session, x=X[:count])[0], X[:count] @ second.T, rtol=1e-4)
    session.close()


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (made.unknown_operator(), DamagedError, "Nonesuch"),
        (made.linear()[:-100], DamagedError, "cannot load model"),
        (made.linear()[:200], DamagedError, "cannot load model"),
        (b"not a model at all" * 9, DamagedError, "cannot load model"),
        (made.passing(made.COMPLEX64), UnsupportedError, "complex"),
        (made.passing(made.INT4), UnsupportedError, "datatype|int4"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_leaves_nothing_open(data, kind, reason):
    load_runtime("tflite")
    before = descriptors()
    with pytest.raises(kind, match=reason):
        load(data)
    assert descriptors() == before


def test_another_provider_is_refused():
    with pytest.raises(UnsupportedError, match="provider edgetpu"):
        load(made.linear(), provider="edgetpu")


def test_loading_many_times_keeps_nothing():
    """Leaked interpreters or descriptors would show: each has weights of a megabyte."""
    data = made.linear(features=16, classes=16_000)

    def rss_mb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    for count in range(60):
        if count == 10:
            before, files = rss_mb(), descriptors()
        session = load(data)
        ask(session, x=X)
        session.close()
    assert descriptors() == files
    assert rss_mb() - before < 20


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", ["serving_default", None])
def test_each_run_may_have_another_shape_and_answers_are_copies(signature):
    session = load(made.linear(signature=signature))
    name = session.inputs[0].name
    first = ask(session, **{name: X[:1]})[0]
    kept = first.copy()
    for count in (3, 0, 2, 1):
        seen = ask(session, **{name: X[:count] * 2})[0]
        np.testing.assert_allclose(seen, X[:count] * 2 @ made.weights_of(), rtol=1e-4)
    np.testing.assert_array_equal(first, kept)
    session.close()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (made.FLOAT32, np.array([1.5, np.nan, -np.inf], "f4")), (made.FLOAT16, np.array([1.5, -2], "f2")),
        (made.FLOAT64, np.array([1e300, -2])), (made.INT64, np.array([-(1 << 63), 1])),
        (made.INT32, np.array([-(1 << 31), 7], "i4")), (made.INT16, np.array([-(1 << 15), 7], "i2")),
        (made.INT8, np.array([-128, 7], "i1")), (made.UINT8, np.array([255, 7], "u1")),
        (made.UINT32, np.array([(1 << 32) - 1, 7], "u4")), (made.UINT64, np.array([(1 << 64) - 1, 7], "u8")),
        (made.BOOL, np.array([True, False])),
    ],
)  # fmt: skip
def test_every_datatype_goes_in_and_comes_out(kind, values):
    session = load(made.passing(kind))
    for array in (values, values[:0], values[::-1]):
        seen = ask(session, x=array)[0]
        assert seen.dtype == values.dtype
        np.testing.assert_array_equal(seen, array)
    session.close()


def test_bfloat16_travels_as_its_16_bits():
    data, bits = made.passing(made.BFLOAT16), np.array([0x3FC0, 0xC000, 0x7FC0], "<u2")  # 1.5, -2, not a number
    if PACKAGES[0] == "tflite_runtime":
        with pytest.raises(UnsupportedError, match="datatype"):
            load(data)
        return
    session = load(data)
    assert session.inputs[0].datatype == session.outputs[0].datatype == "BF16"
    seen = ask(session, x=bits)[0]
    assert seen.dtype == np.dtype("<u2")
    np.testing.assert_array_equal(seen, bits)
    session.close()


def test_strings_are_bytes_of_any_content():
    session = load(made.passing(made.STRING))
    assert session.inputs[0].datatype == "BYTES"
    texts = np.array([b"", "käse".encode(), b"\xff\x00x", b"y" * 5000], dtype=object)
    assert list(ask(session, x=texts)[0]) == list(texts)
    assert ask(session, x=texts[:0])[0].shape == (0,)
    session.close()


def test_quantized_inputs_and_outputs_stay_quantized():
    session = load(made.quantized(scale=0.5, zero=3))
    assert session.inputs[0].datatype == session.outputs[0].datatype == "INT8"
    stored = np.array([3, 5, -7], "i1")  # 0.5 * (stored - 3), twice that, in steps of 1.0 around 3
    np.testing.assert_array_equal(ask(session, x=stored)[0], stored)
    session.close()


def test_a_run_that_fails_says_why_and_the_next_one_answers():
    session = load(made.gather())
    values = np.array([1, 2, 3, 4], "f4")
    for bad in ([9], [-1]):
        with pytest.raises(PeerError, match="gather index out of bounds"):
            ask(session, values=values, index=np.array(bad, "i4"))
        np.testing.assert_array_equal(ask(session, values=values, index=np.array([3, 0], "i4"))[0], [4, 1])
    session.close()


def test_after_a_failed_allocation_the_next_run_answers():
    """In a process of its own with little memory: tflite-runtime's interpreter would crash there if it were kept."""
    code = """
import resource, numpy as np
from agent.base.errors import TryLaterError
from agent.infer.runtimes import tflite
from agent.infer.runtimes.base import LoadOptions, load_runtime
from agent.store.memory import hold
from tests import tflite_models as made
for signature in ("serving_default", None):
    data = made.linear(signature=signature)
    with hold([memoryview(data)], len(data)) as model:
        session = load_runtime("tflite").load(model.fd, LoadOptions("cpu", 1))
    name, output = session.inputs[0].name, session.outputs[0].name
    small = np.ones((2, 16), np.float32)
    huge = np.broadcast_to(np.float32(1), (1 << 26, 16))
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, unlimited[1]))
    for _ in range(2):
        try:
            session.run({name: huge}, [output])
        except TryLaterError as error:
            print("short:", error)
        session.run({name: small}, [output])
    resource.setrlimit(resource.RLIMIT_DATA, unlimited)
    assert session.run({name: small[:1]}, [output])[0].shape == (1, 4)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("short: cannot run model: out of memory") == 4


def test_the_threads_are_those_that_were_asked_for():
    def threads():
        return len(os.listdir("/proc/self/task"))

    data = made.linear(features=512, classes=512)
    alone = load(data, threads=1)
    ask(alone, x=np.ones((64, 512), "f4"))
    before = threads()
    three = load(data, threads=3)
    ask(three, x=np.ones((64, 512), "f4"))
    assert threads() == before + 2
    three.close()
    alone.close()


# -- in the engine ----------------------------------------------------------------------------------------------------


def option(data, p95_ms=SLOW, variant="fp32", runtime="tflite", provider="cpu"):
    return Option(
        f"{variant}@{provider}", variant, runtime, provider, 1, 10.0, lambda: plaintext(data), p95_ms, digest=variant
    )


def served(model, *options):
    return Served(
        model,
        "1.0.0",
        (TensorSpec(name="x", datatype="FP32", shape=(-1, 16)),),
        (TensorSpec(name="y", datatype="FP32", shape=(-1, 4)),),
        options,
    )


def drive(story, *models, places=4):
    async def main():
        engine = Engine(EngineLimits(100.0, 64, places), load_runtime)
        engine.put(Shelf({(m.model, m.version): m for m in models}, {m.model: m.version for m in models}))
        try:
            return await asyncio.wait_for(story(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(main())


async def answer(engine, array, deadline=20.0):
    request = InferRequest((Tensor("x", "FP32", array),))
    result = engine.infer("m", None, request, time.monotonic() + deadline)
    return await result if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize("p95_ms", [SLOW, 0.01])
def test_requests_of_all_shapes_at_once_each_get_their_own_answer(p95_ms):
    """Runs that take milliseconds: two in one interpreter would meet, and mix their shapes or crash."""
    weights = made.weights_of(classes=30_000)
    batches = [np.random.default_rng(n).standard_normal((n % 5 + 1, 16)).astype(np.float32) for n in range(40)]

    async def story(engine):
        seen = await asyncio.gather(*(answer(engine, batch) for batch in batches))
        for batch, response in zip(batches, seen, strict=True):
            np.testing.assert_allclose(response.outputs[0].array, batch @ weights, rtol=1e-3, atol=1e-4)
            assert response.parameters["backend"] == "cpu"

    drive(story, served("m", option(made.linear(classes=30_000), p95_ms)))


def test_a_wrong_shape_is_told_before_the_runtime_sees_it():
    async def story(engine):
        with pytest.raises(PeerError, match=r"shape \[1, 15\], the model takes \[-1, 16\]"):
            await answer(engine, np.zeros((1, 15), "f4"))
        with pytest.raises(DeadlineError):
            await answer(engine, X, deadline=-1.0)
        await answer(engine, X)

    drive(story, served("m", option(made.linear())))


def test_a_variant_that_is_no_model_falls_back_to_the_next():
    async def story(engine):
        seen = await answer(engine, X)
        assert seen.parameters["degraded"] is True
        assert seen.parameters["variant"] == "spare"

    drive(story, served("m", option(b"rubbish" * 99, variant="int8"), option(made.linear(), variant="spare")))


# -- in the trial child -----------------------------------------------------------------------------------------------


def entrant(name, data):
    key = measurement_key(
        variant_digest=name, runtime="tflite", runtime_version="1", provider="cpu", threads=1, features={}
    )
    return Entrant(f"{name}@cpu", key, lambda: plaintext(data))


def tried(*entrants, **changes):
    defaults = {
        "memory_mb": 512, "headroom_mb": 2048, "round_s": 0.01, "least_rounds": 4, "most_rounds": 6,
        "load_timeout_s": 30, "check_timeout_s": 30, "run_timeout_s": 30,
    }  # fmt: skip
    plan = TrialPlan(**{**defaults, **changes})
    measured = Trial(entrants, plan, Surroundings(SystemClock())).run(lambda *_: ())
    return {m.candidate_id.partition("@")[0]: m for m in measured}


def golden(x, y):
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": x, "output/y": y})
    return stream.getvalue()


def test_candidates_are_tried_in_confined_children():
    x = np.random.default_rng(7).standard_normal((32, 16)).astype(np.float32)
    data = golden(x, x @ made.weights_of())
    seen = tried(
        entrant("right", made.linear()),
        entrant("wrong", made.linear(seed=1)),
        entrant("unknown", made.unknown_operator()),
        entrant("cut", made.linear()[:-64]),
        open_golden=lambda: plaintext(data),
        metric="cosine",
        threshold=0.99,
        passes=lambda value: value >= 0.99,
    )
    right = seen["right"]
    assert right.ok, right.reason
    assert right.agreement == pytest.approx(1.0, abs=1e-5)
    assert right.rounds == 4
    assert right.p50_ms > 0
    assert right.peak_mb > 0
    assert (seen["wrong"].failure, seen["unknown"].failure, seen["cut"].failure) == ("disagreement", "load", "load")
    assert "Nonesuch" in seen["unknown"].reason


def test_made_up_inputs_that_the_model_refuses_are_a_note():
    seen = tried(entrant("gather", made.gather()), shapes={"index": [2]})["gather"]
    assert seen.ok, seen.reason  # made-up indices are ones
    bent = tried(entrant("strings", made.passing(made.STRING)))["strings"]
    assert bent.ok, bent.reason


def test_a_model_that_wants_too_much_memory_is_rejected_for_that():
    big = made.linear(features=4096, classes=16_384)  # 256 MB of weights, and as much again when XNNPACK packs them
    seen = tried(entrant("big", big), memory_mb=64)["big"]
    assert seen.failure == "memory", seen.reason


def test_the_probe_tells_package_version_and_provider():
    state = Runtimes().state("tflite")
    assert state.usable, state.reason
    assert state.providers == ("cpu",)
    assert state.version.endswith(f"({PACKAGES[0].replace('_', '-')})")


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, agent.core.daemon, agent.infer.runtimes.probe, agent.infer.runtimes.base;"
        "print([m for m in sys.modules if m.split('.')[0] in ('numpy', 'ai_edge_litert', 'tflite_runtime')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_was_found_sound_once_is_not_looked_through_again(monkeypatch):
    looked_at = []
    monkeypatch.setattr(
        tflite, "read_signature", lambda *arguments: (looked_at.append(1), read_signature(*arguments))[1]
    )
    runtime = load_runtime("tflite")
    sound, cut = made.linear(), made.linear()[:-40]

    def load_it(data, identity):
        with plaintext(data) as model:
            runtime.load(model.fd, LoadOptions("cpu", identity=identity)).close()

    for identity in ("one", "one", "two", "", ""):
        load_it(sound, identity)
    assert len(looked_at) == 4  # who does not say which bytes they are gets them looked through each time
    for _ in range(2):  # and what is not sound stays so
        with pytest.raises(DamagedError):
            load_it(cut, "three")
