"""Convolution kernels against the reference: every border, stride, tail and vector width."""

from __future__ import annotations

import dataclasses

import pytest
from graphs import group_of
from schedule_harness import check_rule, host, typed, window_out

from pocktvm.ir.graph import Node
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.conv import Conv
from pocktvm.schedule.rules.conv_input_grad import ConvInputGrad
from pocktvm.schedule.rules.conv_weight_grad import ConvWeightGrad, describe
from pocktvm.schedule.rules.winograd import WinogradConv, WinogradWeight
from pocktvm.schedule.weight_grad import Plan, choose_tile

pytestmark = pytest.mark.build

# n, h, w, cin, cout, kernel, stride, padding (t,l,b,r), dilation, groups
SHAPES = [
    (2, 8, 8, 16, 32, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (8, 4, 4, 5, 19, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (1, 17, 14, 3, 24, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),  # a stem
    (1, 21, 22, 3, 16, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1),
    (2, 13, 11, 7, 11, (5, 3), (3, 2), (2, 0, 1, 2), (1, 1), 1),
    (1, 1, 1, 6, 10, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (3, 9, 10, 4, 8, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1),
    (2, 7, 7, 12, 12, (3, 3), (2, 1), (1, 1, 1, 1), (1, 2), 3),
    (1, 8, 8, 6, 9, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    (1, 8, 12, 3, 40, (4, 4), (4, 4), (0, 0, 0, 0), (1, 1), 1),  # patches
    (1, 20, 40, 2, 4, (9, 9), (1, 1), (16, 16, 16, 16), (4, 4), 1),  # too many border cases
]
TARGETS = [(16, False), (8, False), (4, True), (1, False)]
CASES = [(s, TARGETS[(i + i // 4) % 4]) for i, s in enumerate(SHAPES)]
CASES += [(SHAPES[1], TARGETS[0]), (SHAPES[2], TARGETS[2])]


def geometry(shape):
    n, h, w, cin, cout, kernel, stride, padding, dilation, groups = shape
    out = window_out((h, w), kernel, stride, padding, dilation)
    attrs = dict(strides=stride, padding=padding, dilation=dilation, groups=groups, layout="NHWC")
    return (n, h, w, cin), (*kernel, cin // groups, cout), (n, *out, cout), attrs


@pytest.mark.parametrize("shape, isa", CASES)
def test_forward(shape, isa):
    x, w, y, attrs = geometry(shape)
    node = Node("conv2d", ("x", "w"), ("y",), attrs)
    frozen = ("w",) if shape[1] % 2 else ()
    check_rule(node, typed(x=x, w=w, y=y), Conv(), host(*isa), frozen=frozen)


@pytest.mark.parametrize("shape, isa", [CASES[1], CASES[2], CASES[7]])
def test_forward_with_epilogue(shape, isa):
    x, w, y, attrs = geometry(shape)
    c = (y[-1],)
    types = typed(x=x, w=w, b=c, r=y, y=y, t=y, u=y, z=y)
    node = group_of(
        Node("conv2d", ("x", "w"), ("y",), attrs),
        Node("add", ("y", "b"), ("t",)),
        Node("relu6", ("t",), ("u",)),
        Node("add", ("u", "r"), ("z",)),
        outputs=("u", "z"),
    )
    check_rule(node, types, Conv(), host(*isa), frozen=("w", "b"))


@pytest.mark.parametrize("shape, isa", CASES)
def test_input_gradient(shape, isa):
    x, w, y, attrs = geometry(shape)
    node = Node("conv2d_input_grad", ("dy", "w"), ("dx",), attrs)
    frozen = ("w",) if shape[1] % 2 else ()
    check_rule(node, typed(dy=y, w=w, dx=x), ConvInputGrad(), host(*isa), frozen=frozen)


@pytest.mark.parametrize("shape, isa", [CASES[1], CASES[4]])
def test_input_gradient_with_mask(shape, isa):
    x, w, y, attrs = geometry(shape)
    node = group_of(
        Node("conv2d_input_grad", ("dy", "w"), ("dx",), attrs),
        Node("relu_grad", ("dx", "a"), ("z",)),
        outputs=("z",),
    )
    check_rule(node, typed(dy=y, w=w, a=x, dx=x, z=x), ConvInputGrad(), host(*isa))


@pytest.mark.parametrize("shape, isa", CASES)
def test_weight_gradient(shape, isa):
    x, w, y, attrs = geometry(shape)
    node = Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs)
    block = {"block": 16} if shape[0] == 2 else {}
    check_rule(node, typed(x=x, dy=y, dw=w), ConvWeightGrad(), host(*isa), **block)


def update(x, w, dy, attrs):
    """w - lr dw as one kernel, and its types."""
    node = group_of(
        Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs),
        Node("multiply", ("dw", "lr"), ("t",)),
        Node("subtract", ("w", "t"), ("z",)),
        outputs=("z",),
    )
    return node, typed(x=x, dy=dy, dw=w, w=w, lr=(), t=w, z=w)


@pytest.mark.parametrize("isa", TARGETS)
@pytest.mark.parametrize("cores, block", [(1, 16), (2, 40), (3, 512)])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 33, 30, 3, 8, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
        (2, 61, 35, 1, 11, (5, 3), (3, 1), (2, 0, 1, 2), (1, 1), 1),
        (1, 25, 31, 1, 27, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ],
)
def test_weight_gradient_in_one_walk(shape, cores, block, isa):
    """As where dy is larger than the second-level cache and dw is not."""
    x, w, y, attrs = geometry(shape)
    node, types = Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs), typed(x=x, dy=y, dw=w)
    target = host(*isa)
    facts = dataclasses.replace(target.isa, l2_bytes=8192, cores=cores)
    target = dataclasses.replace(target, isa=facts)
    grad = describe(Task(node, types, {}, frozenset(), target))
    assert Plan(grad, choose_tile(grad, facts), facts).strips > 0
    check_rule(node, types, ConvWeightGrad(), target, block=block)


@pytest.mark.parametrize(
    "shape, isa, block", [(SHAPES[1], TARGETS[0], 16), (SHAPES[4], TARGETS[1], 64)]
)
def test_weight_gradient_with_update(shape, isa, block):
    x, w, y, attrs = geometry(shape)
    node, types = update(x, w, y, attrs)
    check_rule(node, types, ConvWeightGrad(), host(*isa), block=block)


WINOGRAD = [
    (4, 2, 12, 9, 32, 48, (1, 1, 1, 1), TARGETS[0]),
    (2, 1, 7, 5, 37, 33, (0, 2, 1, 1), TARGETS[1]),
    (4, 3, 4, 4, 34, 40, (1, 1, 1, 1), TARGETS[2]),
    (2, 2, 1, 3, 32, 32, (1, 1, 1, 1), TARGETS[0]),
    (4, 1, 45, 45, 32, 32, (1, 1, 1, 1), TARGETS[0]),
    (2, 2, 37, 23, 32, 50, (1, 1, 1, 1), TARGETS[2]),
    (2, 1, 9, 11, 33, 35, (1, 1, 0, 2), TARGETS[3]),
]


@pytest.fixture
def eager(monkeypatch):
    """Winograd for learning weights of any size of image."""
    monkeypatch.setattr("pocktvm.schedule.rules.winograd._gain", lambda *_: 1.0)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("m, n, h, w, cin, cout, padding, isa", WINOGRAD)
def test_winograd(m, n, h, w, cin, cout, padding, isa, frozen, eager):
    shape = (n, h, w, cin, cout, (3, 3), (1, 1), padding, (1, 1), 1)
    x, k, y, attrs = geometry(shape)
    types, known = typed(x=x, w=k, dy=y, y=y, z=y, dx=x), ("w",) if frozen else ()
    product = Node("conv2d", ("x", "w"), ("y",), attrs)
    node = group_of(product, Node("add", ("y", "dy"), ("z",)), outputs=("z",))
    check_rule(node, types, WinogradConv(), host(*isa), frozen=known, m=m, tolerance=1e-5)
    node = Node("conv2d_input_grad", ("dy", "w"), ("dx",), attrs)
    check_rule(node, types, WinogradConv(), host(*isa), frozen=known, m=m, tolerance=1e-5)


@pytest.mark.parametrize("m, n, h, w, cin, cout, padding, isa", WINOGRAD)
def test_winograd_weight_gradient_with_update(m, n, h, w, cin, cout, padding, isa, eager):
    shape = (n, h, w, cin, cout, (3, 3), (1, 1), padding, (1, 1), 1)
    x, k, y, attrs = geometry(shape)
    node, types = update(x, k, y, attrs)
    check_rule(node, types, WinogradWeight(), host(*isa), m=m, tolerance=1e-5)


def test_winograd_declines_and_says_why():
    x, k, y, attrs = geometry((1, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1))
    node = Node("conv2d", ("x", "w"), ("y",), attrs)
    task = Task(node, typed(x=x, w=k, y=y), {}, frozenset({1}), host(8))
    rule = WinogradConv()
    assert rule.decline(task) is None
    learning = dataclasses.replace(task, frozen=frozenset())
    assert "transforming" in rule.decline(learning)
    wide = typed(x=(4, 32, 32, 64), w=k, y=(4, 32, 32, 64))
    assert rule.decline(dataclasses.replace(learning, values=wide)) is None
    small = dataclasses.replace(task, target=task.target.within(64_000_000))
    assert "would grow" in rule.decline(small)
    strided = dataclasses.replace(node, attrs={**attrs, "strides": (2, 2)})
    assert "strides" in rule.decline(dataclasses.replace(task, node=strided))
    gradient = Node("conv2d_weight_grad", ("x", "y"), ("w",), attrs)
    task = dataclasses.replace(learning, node=gradient)
    assert "transforming" in WinogradWeight().decline(task)
    assert WinogradWeight().decline(dataclasses.replace(task, values=wide)) is None
