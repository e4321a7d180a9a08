"""Reductions against the reference: any axes, prologues and epilogues, tails, parts, types."""

from __future__ import annotations

import numpy as np
import pytest
from schedule_harness import check_rule, host

from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.reduction import analyse
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.reduce import Reduce

pytestmark = pytest.mark.build

CASES = [
    ((7, 5), (0,), False),
    ((37, 83), (0,), False),
    ((37, 83), (1,), True),
    ((4, 9, 11, 24), (1, 2), False),
    ((4, 9, 11, 24), (0, 1, 2), False),
    ((4, 9, 11, 24), (0, 1, 2), True),
    ((3, 5, 7, 11), (0, 2), True),
    ((3, 5, 7, 11), (1, 3), False),
    ((3, 5, 7, 1), (0,), False),
    ((6, 1, 33), (0, 1, 2), False),
    ((5, 64), (), False),
    ((1, 1), (0, 1), False),
    ((3, 129), (1,), False),
]
LANES = [16, 8, 4, 1]


def reduced(shape, axes, keep):
    if keep:
        return tuple(1 if i in axes else s for i, s in enumerate(shape))
    return tuple(s for i, s in enumerate(shape) if i not in axes)


@pytest.mark.parametrize("number, case", enumerate(CASES))
@pytest.mark.parametrize("op", ["sum", "mean", "max", "min", "prod"])
def test_axes(number, case, op):
    shape, axes, keep = case
    values = {"x": Value("x", shape), "y": Value("y", reduced(*case))}
    node = Node(op, ("x",), ("y",), {"axes": axes, "keepdims": keep})
    arrays = {"x": np.random.default_rng(1).uniform(0.9, 1.1, shape).astype(np.float32)}
    check_rule(node, values, Reduce(), host(LANES[number % 4]), arrays=arrays)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("case", [c for c in CASES if c[1]])
def test_prologue_and_epilogue(case, lanes):
    """y = relu(sum(gelu(x * v) * s) + b) - y0, v broadcast along all axes but one."""
    shape, axes, keep = case
    out = reduced(*case)
    kept_last = out[-1:] if out else ()
    shapes = dict(x=shape, v=shape[-1:], s=(), b=kept_last, o=out)
    values = {n: Value(n, tuple(s)) for n, s in shapes.items()}
    values |= {n: Value(n, shape) for n in "pqr"} | {n: Value(n, out) for n in "yutz"}
    body = (
        Node("multiply", ("x", "v"), ("p",)),
        Node("gelu", ("p",), ("q",)),
        Node("multiply", ("q", "s"), ("r",)),
        Node("sum", ("r",), ("y",), {"axes": axes, "keepdims": keep}),
        Node("add", ("y", "b"), ("u",)),
        Node("relu", ("u",), ("t",)),
        Node("subtract", ("t", "o"), ("z",)),
    )
    inputs = ("x", "v", "s", "b", "o")
    group = Node("group", inputs, ("y", "z"), {"anchor": 3, "kind": "sum"}, "", body)
    check_rule(group, values, Reduce(), host(lanes))


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((8192, 24), (0,)),
        ((400, 999), (0, 1)),
        ((2, 3000, 70), (1,)),
        ((500, 16, 40), (0, 2)),
        ((331, 1009), (0,)),  # a prime: no parts
        ((64, 5000), (1,)),
    ],
)
def test_large(shape, axes):
    """Long enough for parts and threads."""
    values = {"x": Value("x", shape), "y": Value("y", reduced(shape, axes, False))}
    node = Node("sum", ("x",), ("y",), {"axes": axes})
    check_rule(node, values, Reduce(), host(16))


def test_integers():
    values = {"x": Value("x", (9, 21), "int32"), "y": Value("y", (9,), "int32")}
    arrays = {"x": np.random.default_rng(0).integers(-99, 99, (9, 21)).astype(np.int32)}
    for op in ("sum", "max"):
        check_rule(
            Node(op, ("x",), ("y",), {"axes": (1,)}), values, Reduce(), host(8), arrays=arrays
        )


def test_parts_cut_the_outermost_reduced_axis():
    values = {"x": Value("x", (4, 6, 10, 8)), "y": Value("y", (8,))}
    node = Node("sum", ("x",), ("y",), {"axes": (0, 1, 2)})
    plan = analyse(Task(node, values, {}, frozenset(), host(16)), True)
    assert plan.shape == (8, 30, 8) and plan.parts == 8 and plan.count == 240
