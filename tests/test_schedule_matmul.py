"""Matrix products against the reference: every storage of A and B, tails, vector widths, forms."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from schedule_harness import check_rule, host

from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.gemm import Gemm, describe
from pocktvm.schedule.gemm_tiled import longest_share
from pocktvm.schedule.gemm_walk import walks
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Task, defaults
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.tvm_api import IRModule, compile_module, tvm_target

pytestmark = pytest.mark.build

SIZES = [(1, 1, 1), (13, 37, 29), (1, 64, 40), (50, 1, 77), (97, 3, 33), (5, 130, 200)]
TARGETS = [(16, False), (8, False), (4, True), (4, False), (1, False)]
STORED = list(itertools.product((False, True), (False, True), (False, True)))
CASES = [
    (size, stored, TARGETS[(i + j) % 5])
    for i, size in enumerate(SIZES)
    for j, stored in enumerate(STORED)
]


def matmul(m, n, k, ta=False, tb=False, batch=(), batch_b=None):
    batch_b = batch if batch_b is None else batch_b
    shapes = {
        "a": (*batch, k, m) if ta else (*batch, m, k),
        "b": (*batch_b, n, k) if tb else (*batch_b, k, n),
        "c": (*(batch or batch_b), m, n),
    }
    node = Node("matmul", ("a", "b"), ("c",), {"transpose_a": ta, "transpose_b": tb})
    return node, {name: Value(name, shape) for name, shape in shapes.items()}


def with_epilogue(node, values):
    """y = relu(c + bias) kept, z = y + r written."""
    c = values["c"].shape
    values = values | {name: Value(name, c) for name in ("r", "t", "y", "z")}
    values["bias"] = Value("bias", c[-1:])
    body = (
        node,
        Node("add", ("c", "bias"), ("t",)),
        Node("gelu", ("t",), ("y",)),
        Node("add", ("y", "r"), ("z",)),
    )
    attrs = {"anchor": 0, "kind": "matmul"}
    return Node("group", ("a", "b", "bias", "r"), ("y", "z"), attrs, "", body), values


@pytest.mark.parametrize("size, stored, isa", CASES)
def test_sizes(size, stored, isa):
    ta, tb, frozen = stored
    node, values = with_epilogue(*matmul(*size, ta, tb))
    check_rule(node, values, Matmul(), host(*isa), frozen=("b",) if frozen else ())


@pytest.mark.parametrize("ta, tb", itertools.product((False, True), (False, True)))
@pytest.mark.parametrize("batch_a, batch_b", [((2, 3), (2, 3)), ((6,), ()), ((), (5,))])
def test_batches(ta, tb, batch_a, batch_b):
    node, values = matmul(33, 20, 18, ta, tb, batch_a, batch_b)
    check_rule(node, values, Matmul(), host(16))


@pytest.mark.parametrize(
    "size, ta, tb, knobs",
    [
        ((301, 70, 500), False, True, {}),  # partial sums, several chunks, two workers
        ((301, 70, 501), True, False, {"kc": 128}),
        ((40, 200, 300), False, False, {"form": "local", "kc": 100}),
        ((700, 80, 90), False, False, {"order": "rows", "mr": 7, "nr": 16}),
        ((700, 80, 90), False, False, {"order": "panels"}),
        ((130, 160, 97), False, False, {"form": "direct", "nr": 64}),  # a chunk a core
        ((700, 80, 90), False, True, {"form": "copied", "order": "rows"}),
        ((701, 800, 90), False, True, {"form": "copied", "order": "panels"}),
        ((700, 80, 90), False, False, {"form": "copied", "order": "rows", "nr": 48}),
        ((900, 3, 300), False, False, {}),  # dots against a transposed copy
        ((7, 900, 300), False, True, {}),
        ((7, 900, 300), False, True, {"form": "local"}),
    ],
)
def test_forms(size, ta, tb, knobs):
    node, values = with_epilogue(*matmul(*size, ta, tb))
    check_rule(node, values, Matmul(), host(16), **knobs)


@pytest.mark.parametrize("isa", TARGETS)
@pytest.mark.parametrize(
    "m, n, k, knobs",
    [
        (24, 144, 1501, {}),  # strips of blocks, and what is left of K
        (144, 24, 2048, {}),  # tiles of C^T on wide vectors
        (33, 17, 1501, {"kc": 64, "mr": 6}),
        (7, 90, 513, {"kc": 1024}),  # a block deeper than K
        (1, 3, 600, {}),
    ],
)
def test_a_walk_along_k(m, n, k, knobs, isa):
    node, values = with_epilogue(*matmul(m, n, k, True, False))
    target = host(*isa)
    task = Task(node, values, {}, frozenset(), target)
    assert Matmul().knobs(task)["form"].default == "walk"
    check_rule(node, values, Matmul(), target, **knobs)


def test_a_walk_is_for_long_sums_into_a_small_result():
    isa = host(16).isa
    gemm = Gemm("a", "b", "c", 24, 144, 8192, transpose_a=True)
    assert walks(isa, gemm)
    refused = ({"k": 100}, {"n": 4096}, {"transpose_a": False}, {"batch": 2}, {"causal": "a"})
    assert not any(walks(isa, dataclasses.replace(gemm, **changes)) for changes in refused)


def test_b_is_copied_whole_where_rows_of_a_large_result_are_walked_once():
    def form(m, n, k):
        node, values = matmul(m, n, k, False, True)
        return Matmul().knobs(Task(node, values, {}, frozenset(), host(16)))["form"].default

    assert host(16).isa.l2_bytes < 4 * 8192 * 144
    assert form(8192, 144, 24) == "copied"
    assert form(8192, 16, 24) == form(64, 144, 24) == form(8192, 2047, 2048) == "local"


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    "size, tb, knobs",
    [
        ((333, 70, 29), False, {}),  # rows outside, two panels
        ((333, 23, 18), False, {"mr": 12}),
        ((333, 23, 70), True, {}),  # one panel, copied
        ((333, 150, 30), True, {}),
        ((334, 150, 30), True, {"form": "copied", "order": "rows"}),
    ],
)
def test_rows_asked_for_ahead(size, tb, knobs, cores):
    """As where A and C are larger than the second-level cache: the end of memory included."""
    target = host(16)
    isa = dataclasses.replace(target.isa, l2_bytes=8192, cores=cores)
    node, values = with_epilogue(*matmul(*size, False, tb))
    check_rule(node, values, Matmul(), dataclasses.replace(target, isa=isa), **knobs)


@pytest.mark.parametrize("op", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"])
@pytest.mark.parametrize("isa", [(16, False), (4, True)])
def test_pointwise_convolution(op, isa):
    x, w, y = (2, 5, 7, 11), (1, 1, 11, 26), (2, 5, 7, 26)
    shapes = {
        "conv2d": (x, w, y),
        "conv2d_input_grad": (y, w, x),
        "conv2d_weight_grad": (x, y, w),
    }[op]
    values = {n: Value(n, s) for n, s in zip(("a", "b", "c"), shapes, strict=True)}
    attrs = dict(strides=(1, 1), padding=(0,) * 4, dilation=(1, 1), groups=1, layout="NHWC")
    check_rule(Node(op, ("a", "b"), ("c",), attrs), values, Matmul(), host(*isa))


def test_the_longest_share_is_of_consecutive_tasks():
    assert longest_share([2, 2, 1], 2) == 4
    assert longest_share([2, 2, 2, 1], 2) == 4
    assert longest_share([3], 4) == 3


def test_declines_say_why():
    node, values = matmul(4, 4, 4, False, False, (2, 3), (3,))
    reason = Matmul().decline(Task(node, values, {}, frozenset(), host(16)))
    assert reason == "batch axes [2, 3] and [3] broadcast"
    conv = Node("conv2d", ("a", "b"), ("c",), {"layout": "NHWC", "strides": (1, 1), "groups": 1})
    values = {n: Value(n, (3, 3, 4, 4)) for n in "abc"}
    assert "3x3" in describe(Task(conv, values, {}, frozenset(), host(16)))


def test_an_update_may_overwrite_its_weight_only():
    node, values = matmul(6, 6, 6)
    values |= {n: Value(n, (6, 6)) for n in ("w", "s", "n")} | {"lr": Value("lr", ())}
    body = (
        node,
        Node("multiply", ("c", "lr"), ("s",)),
        Node("subtract", ("w", "s"), ("n",)),
    )
    attrs = {"anchor": 0, "kind": "matmul"}
    group = Node("group", ("a", "b", "lr", "w"), ("n",), attrs, "", body)
    assert inplace_pairs(Task(group, values, {}, frozenset(), host(16))) == ((0, 3),)


def test_no_kernel_allocates():
    for size, ta, tb in (((300, 70, 500), False, True), ((30, 70, 900), True, False)):
        node, values = with_epilogue(*matmul(*size, ta, tb))
        task = Task(node, values, {}, frozenset(), host(16))
        rule = Matmul()
        func = rule.emit(task, defaults(rule.knobs(task))).func
        module = compile_module(IRModule({"main": func}), tvm_target(task.target.tvm))
        assert "BackendAllocWorkspace" not in module.mod.inspect_source("ll")
