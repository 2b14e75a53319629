"""The same code measures agreement at packing and on the device; what cannot be compared is said, NaN never passes."""

from __future__ import annotations

import io
import math
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from agent.base.errors import PeerError, TooLargeError
from agent.bundles.agreement import DisagreementError, agreement, examples, join, load_golden, passes, top1_accuracy
from agent.bundles.arrays import dump_arrays, load_arrays
from agent.bundles.manifest import FileRef, Golden, TensorSpec

LOGITS = np.array([[1.0, 2.0, 3.0], [9.0, 2.0, 3.0], [0.0, 5.0, 3.0], [1.0, 2.0, 8.0]], "f4")


def golden(metric: str, threshold: float) -> Golden:
    return Golden.model_validate({
        "file": FileRef(name="g.npz", sha256="0" * 64, size=1), "metric": metric, "threshold": threshold
    })  # fmt: skip


def spec(name: str, shape: tuple[int, ...], datatype: str = "FP32") -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape})


def test_top1_counts_equal_answers() -> None:
    other = LOGITS.copy()
    other[0] = other[0][::-1]
    assert agreement("top1", {"y": LOGITS}, {"y": LOGITS * 2}) == 1.0
    assert agreement("top1", {"y": LOGITS}, {"y": other}) == 0.75


def test_a_variant_that_answers_nan_never_passes() -> None:
    broken = LOGITS.copy()
    broken[:] = np.nan
    assert not passes(golden("top1", 0.1), agreement("top1", {"y": LOGITS}, {"y": broken}))
    assert not passes(golden("cosine", -2.0), agreement("cosine", {"y": LOGITS}, {"y": broken}))
    assert not passes(golden("max_abs", 1e9), agreement("max_abs", {"y": LOGITS}, {"y": broken}))
    broken[:] = np.inf
    assert agreement("top1", {"y": LOGITS}, {"y": broken}) == 0.0
    assert math.isnan(agreement("cosine", {"y": LOGITS}, {"y": broken}))
    assert agreement("max_abs", {"y": LOGITS}, {"y": broken}) == math.inf


def test_cosine_and_max_abs_measure_what_their_names_say() -> None:
    assert agreement("cosine", {"y": LOGITS}, {"y": LOGITS * 3}) == pytest.approx(1.0)
    assert agreement("cosine", {"y": LOGITS}, {"y": -LOGITS}) == pytest.approx(-1.0)
    assert agreement("cosine", {"y": LOGITS * 0}, {"y": LOGITS * 0}) == 1.0
    assert agreement("cosine", {"y": LOGITS}, {"y": LOGITS * 0}) == 0.0
    assert agreement("max_abs", {"y": LOGITS}, {"y": LOGITS + 0.5}) == pytest.approx(0.5)
    masked = np.where(LOGITS > 8, -np.inf, LOGITS)
    assert agreement("max_abs", {"y": masked}, {"y": masked}) == 0.0


def test_the_worst_output_counts() -> None:
    both = {"a": LOGITS, "b": LOGITS}
    assert agreement("cosine", both, {"a": LOGITS, "b": -LOGITS}) == pytest.approx(-1.0)
    assert agreement("max_abs", both, {"a": LOGITS, "b": LOGITS + 2}) == pytest.approx(2.0)


def test_labels_and_texts_are_compared_by_equality() -> None:
    labels = np.array([3, 1, 2, 2])
    assert agreement("top1", {"label": labels}, {"label": np.array([3, 1, 2, 0])}) == 0.75
    words = np.array([b"cat", b"dog"], object)
    assert agreement("top1", {"w": words}, {"w": np.array([b"cat", b"cow"], object)}) == 0.5
    assert agreement("max_abs", {"w": words}, {"w": np.array([b"cat", b"cow"], object)}) == math.inf


def test_what_cannot_be_compared_is_a_disagreement_with_its_reason() -> None:
    with pytest.raises(DisagreementError, match=r"output 'y': missing"):
        agreement("top1", {"y": LOGITS}, {"z": LOGITS})
    with pytest.raises(DisagreementError, match=r"shape \[4, 2\], the reference has \[4, 3\]"):
        agreement("top1", {"y": LOGITS}, {"y": LOGITS[:, :2]})
    with pytest.raises(DisagreementError, match="object with float32"):
        agreement("cosine", {"y": LOGITS}, {"y": LOGITS.astype(object)})
    with pytest.raises(DisagreementError, match="from example to example"):
        join([{"boxes": np.zeros((1, 3))}, {"boxes": np.zeros((1, 4))}])
    with pytest.raises(PeerError, match="two classes"):
        agreement("top1", {"price": np.zeros((4, 1), "f4")}, {"price": np.ones((4, 1), "f4")})


def test_examples_go_through_one_by_one_whatever_the_models_first_axis() -> None:
    images = np.arange(3 * 2 * 2, dtype="f4").reshape(3, 2, 2)
    batched = list(examples({"x": images}, [spec("x", (-1, 2, 2))]))
    fixed = list(examples({"x": images}, [spec("x", (1, 2, 2))]))
    single = list(examples({"x": images}, [spec("x", (2, 2))]))
    assert [e["x"].shape for e in batched] == [e["x"].shape for e in fixed] == [(1, 2, 2)] * 3
    assert [e["x"].shape for e in single] == [(2, 2)] * 3
    for ran in (batched, fixed, single):
        np.testing.assert_array_equal(join(ran)["x"], images)
    with pytest.raises(PeerError, match=r"input 'x' is \[3, 2, 2\], the model takes \[-1, 3, 3\]"):
        list(examples({"x": images}, [spec("x", (-1, 3, 3))]))
    with pytest.raises(PeerError, match="no input 'z'"):
        list(examples({"z": images}, [spec("x", (-1, 2, 2))]))
    with pytest.raises(PeerError, match="input 'y' missing"):
        list(examples({"x": images}, [spec("x", (-1, 2, 2)), spec("y", (-1,))]))


def test_accuracy_is_told_where_labels_are_there() -> None:
    assert top1_accuracy({"y": LOGITS}, np.array([2, 0, 1, 0])) == 0.75
    assert top1_accuracy({"y": np.zeros((4, 1), "f4")}, np.array([2, 0, 1, 0])) is None


def test_a_golden_set_comes_back_from_a_descriptor_and_from_bytes() -> None:
    texts = np.array([b"a", b"", b"abc"], object)
    data = dump_arrays({"input/x": LOGITS[:3], "input/t": texts, "output/y": np.arange(3)})
    assert data == dump_arrays({"output/y": np.arange(3), "input/t": texts, "input/x": LOGITS[:3]})
    descriptor = os.memfd_create("golden")
    os.write(descriptor, data)
    for source in (descriptor, data):
        got = load_golden(source)
        assert got.count == 3
        np.testing.assert_array_equal(got.inputs["x"], LOGITS[:3])
        assert got.inputs["t"].tolist() == [b"a", b"", b"abc"]
        assert got.outputs["y"].tolist() == [0, 1, 2]
    os.close(descriptor)


def test_a_golden_set_without_outputs_or_with_uneven_examples_is_refused() -> None:
    with pytest.raises(PeerError, match="needs input/NAME and output/NAME"):
        load_golden(dump_arrays({"input/x": LOGITS}))
    with pytest.raises(PeerError, match=r"output/y has 3 of them, input/x has 4"):
        load_golden(dump_arrays({"input/x": LOGITS, "output/y": LOGITS[:3]}))
    with pytest.raises(PeerError, match="has 0"):
        load_golden(dump_arrays({"input/x": LOGITS[:0], "output/y": LOGITS[:0]}))


def npz(member: bytes, name: str = "input/x.npy") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, member)
    return out.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    raw = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("cannot read arrays", b"no zip at all"),
        ("cannot read arrays", npz(b"not numpy")),
        ("announces", npz(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", bytes(8)))),
        ("announces", npz(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}", bytes(8)))),
        ("another number", npz(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(8)))),
        ("Python objects", npz(npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n"))),
        ("records", npz(npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)))),
        ("version", npz(b"\x93NUMPY\x09\x00" + bytes(10))),
        ("cannot read arrays", npz(npy("{'descr': __import__('os'), 'fortran_order': False, 'shape': ()}"))),
        ("cannot read arrays", dump_arrays({"input/x": LOGITS})[:-30]),
    ],
)
def test_hostile_arrays_are_an_error_and_nothing_else(what: str, data: bytes) -> None:
    with pytest.raises(PeerError, match=what):
        load_arrays(data)


def test_arrays_that_swell_are_refused_before_they_do() -> None:
    bomb = dump_arrays({"input/x": np.zeros(50_000_000, "u1")})
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="50000128 bytes, 1000000 fit"):
        load_arrays(bomb, limit=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
