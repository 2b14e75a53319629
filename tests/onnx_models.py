"""Small real ONNX models for tests, made with the onnx package; a few hundred bytes each unless told otherwise."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def model(nodes, inputs, outputs, initializers=(), opset=17):
    """Bytes of a checked model; opset 17 and IR 8 load on every supported ONNX Runtime."""
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(initializers))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return made.SerializeToString()


def tensor(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def linear(seed=0, features=16, classes=4):
    """x[n, features] -> y[n, classes], a matrix product; another seed, other weights."""
    weights = np.random.default_rng(seed).standard_normal((features, classes)).astype(np.float32)
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [tensor("x", ["n", features])],
        [tensor("y", ["n", classes])],
        [constant("w", weights)],
    )


def heavy(side=512, layers=4, seed=0, rows="n"):
    """x[n, side] -> y[n, side]: about ``layers * side * side`` multiplications a row, weights of 4 bytes each."""
    generator = np.random.default_rng(seed)
    weights = [generator.standard_normal((side, side)).astype(np.float32) / side**0.5 for _ in range(layers)]
    names = ["x", *(f"h{index}" for index in range(1, layers)), "y"]
    return model(
        [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)],
        [tensor("x", [rows, side])],
        [tensor("y", [rows, side])],
        [constant(f"w{index}", array) for index, array in enumerate(weights)],
    )


def chain(side=65536, steps=40, seed=0):
    """x[n, side] -> y[n, side]: a long row of additions and products, which some providers fuse into one pass."""
    generator = np.random.default_rng(seed)
    names = ["x", *(f"h{index}" for index in range(1, steps)), "y"]
    return model(
        [helper.make_node(("Mul", "Add")[i % 2], [names[i], f"c{i}"], [names[i + 1]]) for i in range(steps)],
        [tensor("x", ["n", side])],
        [tensor("y", ["n", side])],
        [constant(f"c{index}", generator.random(1, dtype=np.float32)) for index in range(steps)],
    )


def endless(rounds=1 << 62):
    """A loop of 2^62 rounds: loads at once, never answers; with fewer rounds it does."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
            helper.make_node("Add", ["state", "state"], ["state_out"]),
        ],
        "body",
        [tensor("round", [], TensorProto.INT64), tensor("go_on", [], TensorProto.BOOL), tensor("state", ["n", 16])],
        [tensor("go_on_out", [], TensorProto.BOOL), tensor("state_out", ["n", 16])],
    )
    return model(
        [
            helper.make_node("Loop", ["rounds", "yes", "x"], ["all"], body=body),
            helper.make_node("Slice", ["all", "zero", "four", "axis"], ["y"]),
        ],
        [tensor("x", ["n", 16])],
        [tensor("y", ["n", 4])],
        [
            constant("rounds", np.int64(rounds)),
            constant("yes", np.bool_(True)),
            constant("zero", np.array([0], np.int64)),
            constant("four", np.array([4], np.int64)),
            constant("axis", np.array([1], np.int64)),
        ],
    )


def greedy(gigabytes=64):
    """Asks for tens of gigabytes when it runs, then sums them up."""
    cells = gigabytes * (1 << 30) // 4
    return model(
        [
            helper.make_node("ConstantOfShape", ["big"], ["zeros"], value=constant("v", np.ones(1, np.float32))),
            helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=1),
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "sum"], ["y"]),
        ],
        [tensor("x", ["n", 16])],
        [tensor("y", ["n", 4])],
        [constant("big", np.array([cells], np.int64)), constant("w", np.ones((16, 4), np.float32))],
    )


def strings():
    """s[n] of BYTES -> t[n]: the same texts."""
    return model(
        [helper.make_node("Identity", ["s"], ["t"])],
        [tensor("s", ["n"], TensorProto.STRING)],
        [tensor("t", ["n"], TensorProto.STRING)],
    )


def two_in_two_out():
    """a[n, 3] FP32, flag[n] BOOL -> sum[n, 3], not_flag[n]."""
    return model(
        [helper.make_node("Add", ["a", "a"], ["sum"]), helper.make_node("Not", ["flag"], ["not_flag"])],
        [tensor("a", ["n", 3]), tensor("flag", ["n"], TensorProto.BOOL)],
        [tensor("sum", ["n", 3]), tensor("not_flag", ["n"], TensorProto.BOOL)],
    )


def picky():
    """x[n] -> y: a Gather that raises for most made-up inputs (index out of range)."""
    return model(
        [
            helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
            helper.make_node("Add", ["index", "far"], ["beyond"]),
            helper.make_node("Gather", ["table", "beyond"], ["y"]),
        ],
        [tensor("x", ["n"])],
        [tensor("y", ["n"])],
        [constant("far", np.array([1000], np.int64)), constant("table", np.ones(1005, np.float32))],
    )


def with_default():
    """x[n, 3] + shift[3] -> y; ``shift`` has a default (an initializer that is an input too): it may be left out."""
    return model(
        [helper.make_node("Add", ["x", "shift"], ["y"])],
        [tensor("x", ["n", 3]), tensor("shift", [3])],
        [tensor("y", ["n", 3])],
        [constant("shift", np.array([1, 2, 3], np.float32))],
    )


def scalar():
    """a[] + a[] -> b[]: no axis at all."""
    return model([helper.make_node("Add", ["a", "a"], ["b"])], [tensor("a", [])], [tensor("b", [])])


def identity(kind, opset=17):
    """x[n, m] -> y[n, m] of any ONNX datatype, in any opset."""
    return model(
        [helper.make_node("Identity", ["x"], ["y"])], [tensor("x", ["n", "m"], kind)], [tensor("y", ["n", "m"], kind)],
        opset=opset,
    )  # fmt: skip


def counting():
    """n[1] INT64 -> y[1]: a loop of n rounds, so that the input's value alone says how long it takes."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
            helper.make_node("Add", ["state", "one"], ["state_out"]),
        ],
        "body",
        [tensor("round", [], TensorProto.INT64), tensor("go_on", [], TensorProto.BOOL), tensor("state", [1])],
        [tensor("go_on_out", [], TensorProto.BOOL), tensor("state_out", [1])],
        [constant("one", np.ones(1, np.float32))],
    )
    return model(
        [
            helper.make_node("Squeeze", ["n"], ["rounds"]),
            helper.make_node("Loop", ["rounds", "yes", "start"], ["y"], body=body),
        ],
        [tensor("n", [1], TensorProto.INT64)],
        [tensor("y", [1])],
        [constant("yes", np.bool_(True)), constant("start", np.zeros(1, np.float32))],
    )


def filling():
    """n[1] INT64 -> y[1]: the sum of n ones, so that the input's value alone says how much memory it takes."""
    return model(
        [
            helper.make_node("ConstantOfShape", ["n"], ["ones"], value=constant("v", np.ones(1, np.float32))),
            helper.make_node("ReduceSum", ["ones"], ["y"], keepdims=1),
        ],
        [tensor("n", [1], TensorProto.INT64)],
        [tensor("y", [1])],
    )


def elsewhere(location):
    """x[n] -> y[16] UINT8: the bytes that lie at ``location``, which is no part of the file."""
    kept = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        kept.external_data.add(key=key, value=value)
    return model(
        [helper.make_node("Identity", ["w"], ["y"]), helper.make_node("Identity", ["x"], ["z"])],
        [tensor("x", ["n"])],
        [tensor("y", [16], TensorProto.UINT8), tensor("z", ["n"])],
        [kept],
    )


def _slowed(seed, rounds):
    """As ``linear``, with a loop beside it that changes nothing; ``rounds``: nodes and constants that say how long."""
    weights = np.random.default_rng(seed).standard_normal((16, 4)).astype(np.float32)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
            helper.make_node("Mul", ["state", "half"], ["state_out"]),
        ],
        "body",
        [tensor("round", [], TensorProto.INT64), tensor("go_on", [], TensorProto.BOOL), tensor("state", [1])],
        [tensor("go_on_out", [], TensorProto.BOOL), tensor("state_out", [1])],
        [constant("half", np.array([0.5], np.float32))],
    )
    nodes, constants = rounds
    return model(
        [
            *nodes,
            helper.make_node("Loop", ["rounds", "yes", "start"], ["rest"], body=body),
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Mul", ["rest", "zero"], ["nothing"]),
            helper.make_node("Add", ["product", "nothing"], ["y"]),
        ],
        [tensor("x", ["n", 16])],
        [tensor("y", ["n", 4])],
        [
            constant("w", weights),
            constant("yes", np.bool_(True)),
            constant("start", np.ones(1, np.float32)),
            constant("zero", np.zeros(1, np.float32)),
            *constants,
        ],
    )


def slow_at(seed=0):
    """As ``linear``, but what is largest in x says how many rounds of a loop it takes: as quick for small numbers."""
    most = helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0)
    return _slowed(seed, ([most, helper.make_node("Cast", ["most"], ["rounds"], to=TensorProto.INT64)], []))


def slow_always(seed=0, rounds=2000):
    """As ``linear``, with so many rounds of a loop."""
    return _slowed(seed, ([], [constant("rounds", np.int64(rounds))]))


def fails_at(seed=0, most=100):
    """As ``linear``, but it raises where a number in x is ``most`` or more."""
    weights = np.random.default_rng(seed).standard_normal((16, 4)).astype(np.float32)
    return model(
        [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["nothing"]),
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "nothing"], ["y"]),
        ],
        [tensor("x", ["n", 16])],
        [tensor("y", ["n", 4])],
        [constant("w", weights), constant("table", np.zeros(most, np.float32))],
    )
