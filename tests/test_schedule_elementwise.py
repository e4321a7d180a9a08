"""Every elementwise operator as a kernel, against the reference, broadcasting and in groups."""

from __future__ import annotations

import numpy as np
import pytest
from schedule_harness import check_rule, host

from pocktvm.ir.graph import Node, Value
from pocktvm.ir.ops import BINARY, ELEMENTWISE, GRADIENTS, UNARY
from pocktvm.schedule.elementwise_ops import OPS
from pocktvm.schedule.rules.elementwise import Elementwise

pytestmark = pytest.mark.build

ATTRS = {
    "clip": {"min": -0.5, "max": 1.0},
    "clip_grad": {"min": -0.5},
    "leakyrelu": {"alpha": 0.1},
    "leakyrelu_grad": {"alpha": 0.1},
    "elu": {"alpha": 0.7},
    "elu_grad": {"alpha": 0.7},
    "softplus": {"beta": 2.0, "threshold": 3.0},
    "softplus_grad": {"beta": 2.0, "threshold": 3.0},
    "astype": {"dtype": "int32"},
}
POSITIVE = {"log", "sqrt", "rsqrt", "power"}
BOOLEAN = {"logical_and", "logical_or", "logical_not"}
COMPARES = {"equal", "not_equal", "less", "less_equal", "greater", "greater_equal"}
SHAPE = (3, 37)


def operands(op: str, shapes: list[tuple[int, ...]]):
    rng = np.random.default_rng(0)
    arrays = {}
    for number, shape in enumerate(shapes):
        array = rng.standard_normal(shape).astype(np.float32) * 2
        if op in POSITIVE or (op in {"divide", "floor_divide", "mod"} and number == 1):
            array = np.abs(array) + 0.1
        if op in COMPARES:
            array = np.round(array)
        if op in BOOLEAN or (op == "where" and number == 0):
            array = array > 0
        arrays[f"a{number}"] = array
    return arrays


def count(op: str) -> int:
    return 1 if op in UNARY else 2 if op in BINARY | GRADIENTS else 3


@pytest.mark.parametrize("op", sorted(ELEMENTWISE))
def test_operator(op):
    arrays = operands(op, [SHAPE] * count(op))
    values = {n: Value(n, a.shape, str(a.dtype)) for n, a in arrays.items()}
    boolean = op in COMPARES | BOOLEAN
    dtype = "bool" if boolean else "int32" if op == "astype" else "float32"
    values["y"] = Value("y", SHAPE, dtype)
    node = Node(op, tuple(arrays), ("y",), ATTRS.get(op, {}))
    check_rule(node, values, Elementwise(), host(16), arrays=arrays, tolerance=1e-5)


def test_every_operator_of_the_vocabulary_has_an_expression():
    assert set(OPS) >= ELEMENTWISE


@pytest.mark.parametrize("lanes", [1, 4, 8])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 37), (37,)), ((2, 3, 37), (3, 1)), ((2, 3, 37), ()), ((5000,), (5000,))]
)
def test_broadcasting_operands_and_a_mask_used_twice(lanes, shapes):
    arrays = operands("add", list(shapes))
    values = {n: Value(n, a.shape) for n, a in arrays.items()}
    shape = shapes[0]
    for name, dtype in (("s", "float32"), ("m", "bool"), ("f", "float32"), ("y", "float32")):
        values[name] = Value(name, shape, dtype)
    body = (
        Node("add", ("a0", "a1"), ("s",)),
        Node("greater", ("s", "a1"), ("m",)),
        Node("astype", ("m",), ("f",), {"dtype": "float32"}),
        Node("multiply", ("f", "s"), ("y",)),
    )
    attrs = {"anchor": None, "kind": "elementwise"}
    node = Node("group", ("a0", "a1"), ("m", "y"), attrs, "", body)
    check_rule(node, values, Elementwise(), host(lanes), arrays=arrays)
