"""Depthwise kernels against the reference: every border, stride, tail and vector width."""

from __future__ import annotations

import pytest
from graphs import group_of
from schedule_harness import check_rule, host, typed, window_out

from pocktvm.ir.graph import Node
from pocktvm.schedule.rules.depthwise import DepthwiseConv, DepthwiseInputGrad, DepthwiseWeightGrad

pytestmark = pytest.mark.build

# n, h, w, channels, kernel, stride, padding (t,l,b,r), dilation
SHAPES = [
    (2, 8, 8, 32, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (1, 5, 35, 21, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (2, 12, 12, 19, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (1, 11, 10, 16, (5, 5), (2, 2), (2, 2, 2, 2), (1, 1)),
    (2, 7, 7, 13, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)),
    (1, 1, 1, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (2, 10, 9, 8, (3, 2), (3, 1), (0, 1, 2, 0), (1, 2)),
    (1, 6, 7, 24, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
]
TARGETS = [(16, False), (8, False), (4, True), (1, False)]
CASES = [(s, TARGETS[i % 4]) for i, s in enumerate(SHAPES)]
CASES += [(SHAPES[2], TARGETS[0])]


def geometry(shape):
    n, h, w, c, kernel, stride, padding, dilation = shape
    out = window_out((h, w), kernel, stride, padding, dilation)
    attrs = dict(strides=stride, padding=padding, dilation=dilation, groups=c, layout="NHWC")
    return (n, h, w, c), (*kernel, 1, c), (n, *out, c), attrs


@pytest.mark.parametrize("shape, isa", CASES)
def test_forward(shape, isa):
    x, w, y, attrs = geometry(shape)
    types = typed(x=x, w=w, y=y, b=(y[-1],), t=y, z=y)
    node = Node("conv2d", ("x", "w"), ("y",), attrs)
    if shape[0] == 2:
        epilogue = Node("add", ("y", "b"), ("t",)), Node("relu6", ("t",), ("z",))
        node = group_of(node, *epilogue, outputs=("z",))
    check_rule(node, types, DepthwiseConv(), host(*isa))


@pytest.mark.parametrize("shape, isa", CASES)
def test_input_gradient(shape, isa):
    x, w, y, attrs = geometry(shape)
    types = typed(dy=y, w=w, x=x, dx=x, z=x)
    node = Node("conv2d_input_grad", ("dy", "w"), ("dx",), attrs)
    if shape[0] == 2:
        node = group_of(node, Node("relu6_grad", ("dx", "x"), ("z",)), outputs=("z",))
    check_rule(node, types, DepthwiseInputGrad(), host(*isa))


@pytest.mark.parametrize("shape, isa", CASES)
def test_weight_gradient(shape, isa):
    x, w, y, attrs = geometry(shape)
    types = typed(x=x, dy=y, dw=w, w=w, z=w)
    node = Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs)
    if shape[0] == 2:
        node = group_of(node, Node("subtract", ("w", "dw"), ("z",)), outputs=("z",))
    check_rule(node, types, DepthwiseWeightGrad(), host(*isa))
