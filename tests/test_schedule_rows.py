"""Softmax, normalisation, embeddings and data movement against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from schedule_harness import check_rule, host, typed

from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.rule import Task
from pocktvm.schedule.rules.embedding import Take, TakeGrad
from pocktvm.schedule.rules.movement import Movement
from pocktvm.schedule.rules.rows import RowOperators
from pocktvm.schedule.strided_copy import Box

pytestmark = pytest.mark.build

LANES = [16, 8, 4, 1]
SHAPES = [(5, 3, 64), (3, 37), (2, 1), (9, 131), (70, 768)]
rng = np.random.default_rng(3)


def floats(*shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("number, shape", enumerate(SHAPES))
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_softmax(op, number, shape):
    node = Node(op, ("x",), ("y",), {"axis": len(shape) - 1})
    arrays = {"x": 5 * floats(*shape)}
    isa = host(LANES[number % 4])
    check_rule(node, typed(x=shape, y=shape), RowOperators(), isa, arrays=arrays)


@pytest.mark.parametrize("number, shape", enumerate(SHAPES))
@pytest.mark.parametrize("op", ["softmax_grad", "log_softmax_grad"])
def test_softmax_grad(op, number, shape):
    node = Node(op, ("dy", "y"), ("dx",), {"axis": len(shape) - 1})
    y = rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)
    arrays = {"y": y if op == "softmax_grad" else np.log(y + 1e-9)}
    isa = host(LANES[number % 4])
    check_rule(node, typed(dy=shape, y=shape, dx=shape), RowOperators(), isa, arrays=arrays)


@pytest.mark.parametrize("number, shape", enumerate([s for s in SHAPES if s[-1] > 1]))
@pytest.mark.parametrize("axes", [1, 2])
def test_norms(number, shape, axes):
    axes = tuple(range(max(1, len(shape) - axes), len(shape)))
    rows, last = shape[: axes[0]], shape[axes[0] :]
    isa, attrs = host(LANES[number % 4]), {"axes": axes, "eps": 1e-5}
    types = typed(x=shape, y=shape, dx=shape, g=last, b=last, mean=rows, rstd=rows)
    rule = RowOperators()
    check_rule(Node("layer_norm", ("x", "g", "b"), ("y", "mean", "rstd"), attrs), types, rule, isa)
    check_rule(Node("rms_norm", ("x", "g"), ("y", "rstd"), attrs), types, rule, isa)
    arrays = {"rstd": rng.uniform(0.5, 2, rows).astype(np.float32)}
    for op, names in (
        ("layer_norm_grad", ("y", "x", "g", "mean", "rstd")),
        ("rms_norm_grad", ("y", "x", "g", "rstd")),
    ):
        check_rule(Node(op, names, ("dx",), attrs), types, rule, isa, arrays=arrays)


def test_other_axes_are_declined():
    node = Node("softmax", ("x",), ("y",), {"axis": 0})
    task = Task(node, typed(x=(3, 4), y=(3, 4)), {}, frozenset(), host(16))
    assert RowOperators().decline(task) == "axes [0] are not the last of [3, 4]"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("width", [1, 64, 301])
def test_take_and_its_gradient(axis, width):
    table = (11, width) if axis == 0 else (3, 11, width)
    y = (4, 5, width) if axis == 0 else (3, 4, 5, width)
    types = typed(table=table, y=y, d=table) | {"i": Value("i", (4, 5), "int32")}
    arrays = {"i": rng.integers(0, 11, (4, 5)).astype(np.int32)}
    attrs = {"axis": axis, "mode": "clip"}
    check_rule(
        Node("take", ("table", "i"), ("y",), attrs), types, Take(), host(16), arrays=arrays
    )
    for padding in (-1, 2):
        attrs = {"axis": axis, "padding_idx": padding}
        node = Node("take_grad", ("y", "i"), ("d",), attrs)
        check_rule(node, types, TakeGrad(), host(8), arrays=arrays)


def test_take_grad_in_parallel():
    types = typed(dy=(900, 700), d=(1000, 700)) | {"i": Value("i", (900,), "int32")}
    arrays = {"i": rng.integers(0, 40, 900).astype(np.int32)}
    check_rule(Node("take_grad", ("dy", "i"), ("d",), {"axis": 0}), types, TakeGrad(), host(16),
               arrays=arrays)  # fmt: skip


MOVES = [
    ("permute_dims", [(3, 5, 7)], (7, 3, 5), {"axes": (2, 0, 1)}),
    ("permute_dims", [(2, 3, 40, 40)], (2, 40, 40, 3), {"axes": (0, 2, 3, 1)}),
    ("permute_dims", [(2, 2, 37, 3)], (2, 37, 3, 2), {"axes": (0, 2, 3, 1)}),
    ("permute_dims", [(3, 200, 31)], (200, 31, 3), {"axes": (1, 2, 0)}),
    ("permute_dims", [(2, 9, 8, 24)], (2, 24, 9, 8), {"axes": (0, 3, 1, 2)}),
    ("permute_dims", [(2, 6, 4, 9)], (2, 4, 6, 9), {"axes": (0, 2, 1, 3)}),
    ("permute_dims", [(3, 3, 17, 21)], (21, 17, 3, 3), {"axes": (3, 2, 0, 1)}),
    ("permute_dims", [(700, 600)], (600, 700), {"axes": (1, 0)}),
    ("permute_dims", [(4, 1, 3)], (3, 1, 4), {}),
    ("broadcast_to", [(5, 1, 3)], (2, 5, 6, 3), {}),
    ("broadcast_to", [(5, 1)], (5, 70), {}),
    ("broadcast_to", [()], (4, 9), {}),
    ("concat", [(2, 3, 4), (2, 5, 4), (2, 1, 4)], (2, 9, 4), {"axis": 1}),
    ("concat", [(6, 2), (6, 3)], (6, 5), {"axis": 1}),
    ("concat", [(40, 500), (90, 500)], (130, 500), {"axis": 0}),
    (
        "strided_slice",
        [(9, 8, 7)],
        (4, 8, 3),
        {"begin": (1, 0, 6), "end": (9, 8, 0), "strides": (2, 1, -2)},
    ),
    ("strided_slice", [(6, 40)], (2, 40), {"begin": (2, 0), "end": (4, 40), "strides": (1, 1)}),
    (
        "strided_slice_grad",
        [(4, 8, 3)],
        (9, 8, 7),
        {"begin": (1, 0, 0), "end": (9, 8, 6), "strides": (2, 1, 2)},
    ),
    ("pad", [(2, 5, 6)], (2, 8, 5), {"pad_width": (0, 0, 1, 2, -1, 0), "value": 1.5}),
    ("pad", [(3, 5, 6)], (3, 9, 7), {"pad_width": (0, 0, 3, 1, 0, 1), "mode": "reflect"}),
    ("pad", [(3, 5, 6)], (3, 9, 6), {"pad_width": (0, 0, 3, 1, 1, -1), "mode": "edge"}),
]


@pytest.mark.parametrize("number, move", enumerate(MOVES))
def test_movement(number, move):
    op, shapes, out, attrs = move
    names = tuple(f"x{i}" for i in range(len(shapes)))
    types = typed(**dict(zip(names, shapes, strict=True)), y=out)
    check_rule(Node(op, names, ("y",), attrs), types, Movement(), host(LANES[number % 4]),
               tolerance=0)  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=lambda m: m[0])
def test_floats_move_as_bits_where_integers_have_the_wider_vectors(move):
    op, shapes, out, attrs = move
    names = tuple(f"x{i}" for i in range(len(shapes)))
    types = typed(**dict(zip(names, shapes, strict=True)), y=out)
    target = host(1)
    target = replace(target, isa=replace(target.isa, integer_vector_bytes=64))
    check_rule(Node(op, names, ("y",), attrs), types, Movement(), target, tolerance=0)


def test_bytes_move_too():
    types = {"x": Value("x", (3, 20), "bool"), "y": Value("y", (20, 3), "bool")}
    arrays = {"x": rng.integers(0, 2, (3, 20)).astype(bool)}
    node = Node("permute_dims", ("x",), ("y",), {"axes": (1, 0)})
    check_rule(node, types, Movement(), host(16), arrays=arrays)


def test_boxes_merge():
    box = Box((2, 1, 3, 4), (12, 12, 4, 1), (24, 9, 4, 1)).merged()
    assert box == Box((2, 12), (12, 1), (24, 1))
