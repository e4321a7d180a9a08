"""Transposed copies, and what kernels ask memory for ahead: equal numbers at every size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from schedule_harness import check_rule, host

from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.rule import Task, defaults
from pocktvm.schedule.rules.conv import Conv
from pocktvm.schedule.rules.conv_input_grad import ConvInputGrad
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import IRBuilder, IRModule, T, compile_module, tvm, tvm_target

pytestmark = pytest.mark.build


def small_caches(lanes: int, lane_fma: bool = False):
    """The host with caches so small that every value lies outside them."""
    target = host(lanes, lane_fma)
    isa = dataclasses.replace(target.isa, l1_bytes=256, l2_bytes=64)
    return dataclasses.replace(target, isa=isa)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_transposed_copies(lanes):
    """Whole blocks, tails of rows and columns, matrices smaller than a block, padded rows."""
    target = host(lanes)
    for rows, columns, pad in ((48, 32, 0), (16, 16, 5), (37, 29, 3), (50, 3, 0), (5, 64, 1)):
        with IRBuilder() as builder, T.prim_func():
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "target": tvm_target(target.tvm)})
            a = T.arg("a", T.Buffer((rows * (columns + pad),), "float32"))
            b = T.arg("b", T.Buffer((columns * (rows + pad),), "float32"))
            source, goal = Matrix(a, 0, columns + pad), Matrix(b, 0, rows + pad)
            copy_transposed(source, goal, rows, columns, lanes)
        x = np.random.default_rng(0).standard_normal((rows, columns + pad)).astype(np.float32)
        y = tvm.runtime.tensor(np.full(columns * (rows + pad), 7, np.float32))
        module = compile_module(IRModule({"main": builder.get()}), tvm_target(target.tvm))
        module["main"](tvm.runtime.tensor(x.ravel()), y)
        got = y.numpy().reshape(columns, rows + pad)
        np.testing.assert_array_equal(got[:, :rows], x[:, :columns].T)
        assert (got[:, rows:] == 7).all()  # nothing beyond the matrix is touched


def product(m, n, k, ta=False, tb=False):
    """relu(a @ b + residual)."""
    shapes = {"a": (k, m) if ta else (m, k), "b": (n, k) if tb else (k, n), "c": (m, n)}
    values = {name: Value(name, shape) for name, shape in shapes.items()}
    values |= {name: Value(name, (m, n)) for name in ("r", "t", "y")}
    body = (
        Node("matmul", ("a", "b"), ("c",), {"transpose_a": ta, "transpose_b": tb}),
        Node("add", ("c", "r"), ("t",)),
        Node("relu", ("t",), ("y",)),
    )
    attrs = {"anchor": 0, "kind": "matmul"}
    return Node("group", ("a", "b", "r"), ("y",), attrs, "", body), values


@pytest.mark.parametrize(
    "size, ta, tb, frozen, knobs",
    [
        ((61, 130, 97), False, False, False, {"form": "direct"}),
        ((61, 130, 97), False, False, True, {}),
        ((7, 33, 3), False, False, False, {"form": "direct"}),  # fewer values of k than a step
        ((61, 130, 97), False, True, False, {"form": "local", "kc": 1024}),
        ((61, 130, 97), False, True, False, {"form": "local", "kc": 64}),
        ((61, 130, 97), False, False, False, {"form": "local", "kc": 64}),
        ((300, 200, 120), False, True, False, {"form": "local", "kc": 64}),  # two workers
        ((61, 130, 97), True, False, False, {}),
    ],
)
@pytest.mark.parametrize("lanes", [16, 8])
def test_products_that_ask_ahead(size, ta, tb, frozen, knobs, lanes):
    node, values = product(*size, ta, tb)
    frozen_names = ("b",) if frozen else ()
    check_rule(node, values, Matmul(), small_caches(lanes), frozen=frozen_names, **knobs)


@pytest.mark.parametrize("op, rule", [("conv2d", Conv()), ("conv2d_input_grad", ConvInputGrad())])
def test_convolutions_that_ask_ahead(op, rule):
    x, w, y = (2, 9, 7, 11), (3, 3, 11, 37), (2, 5, 4, 37)
    first, result = (x, y) if op == "conv2d" else (y, x)
    values = {n: Value(n, s) for n, s in zip("abc", (first, w, result), strict=True)}
    values |= {name: Value(name, result) for name in ("r", "t")}
    attrs = dict(strides=(2, 2), padding=(1,) * 4, dilation=(1, 1), groups=1, layout="NHWC")
    body = (Node(op, ("a", "b"), ("c",), attrs), Node("add", ("c", "r"), ("t",)))
    node = Node("group", ("a", "b", "r"), ("t",), {"anchor": 0, "kind": op}, "", body)
    check_rule(node, values, rule, small_caches(16), frozen=("b",))


@pytest.mark.parametrize(
    "target, asks", [(small_caches(16), True), (small_caches(4, True), False), (host(16), False)]
)
def test_only_what_leaves_the_caches_is_asked_for(target, asks):
    """Not on short vectors, where it was not measured; not for values that stay in the cache."""
    node, values = product(61, 64, 32)
    task, rule = Task(node, values, {}, frozenset(), target), Matmul()
    func = rule.emit(task, {**defaults(rule.knobs(task)), "form": "direct"}).func
    assert ("llvm.prefetch" in str(func)) == asks
