"""Pooling and resizing kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import group_of
from schedule_harness import check_rule, host, typed, window_out

from pocktvm.ir.graph import Node
from pocktvm.schedule.rules.pool import Pool
from pocktvm.schedule.rules.resize import Resize

pytestmark = pytest.mark.build

# n, h, w, channels, pool, stride, padding (t,l,b,r), dilation
SHAPES = [
    (2, 8, 8, 32, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (1, 9, 11, 7, (2, 3), (2, 1), (0, 1, 1, 0), (1, 1)),
    (2, 7, 7, 13, (7, 7), (1, 1), (0, 0, 0, 0), (1, 1)),
    (1, 10, 9, 5, (3, 2), (1, 3), (1, 0, 2, 1), (2, 3)),
    (1, 5, 6, 16, (2, 2), (3, 3), (0, 0, 0, 0), (1, 1)),
]
LANES = [16, 4, 8, 1, 16]
CASES = list(zip(SHAPES, LANES, strict=True))


def geometry(shape):
    n, h, w, c, pool, stride, padding, dilation = shape
    out = window_out((h, w), pool, stride, padding, dilation)
    attrs = dict(pool=pool, strides=stride, padding=padding, dilation=dilation, layout="NHWC")
    return (n, h, w, c), (n, *out, c), attrs


@pytest.mark.parametrize("shape, lanes", CASES)
@pytest.mark.parametrize("kind", ["max", "avg", "avg_all"])
def test_pools(shape, lanes, kind):
    x, y, attrs = geometry(shape)
    op = f"{kind[:3]}_pool2d"
    if kind == "avg_all":
        attrs["count_include_pad"] = True
    check_rule(Node(op, ("x",), ("y",), attrs), typed(x=x, y=y), Pool(), host(lanes))
    inputs = ("dy", "x") if kind == "max" else ("dy",)
    node = Node(f"{op}_grad", inputs, ("dx",), attrs)
    # few distinct values: most windows have several maxima
    arrays = {"x": np.random.default_rng(1).integers(0, 3, x).astype(np.float32)}
    types = typed(dy=y, x=x, dx=x, z=x)
    if lanes == 16:
        node = group_of(node, Node("relu_grad", ("dx", "m"), ("z",)), outputs=("z",))
        types |= typed(m=x)
    check_rule(node, types, Pool(), host(lanes), arrays=arrays)


@pytest.mark.parametrize(
    "source, size, lanes",
    [((2, 5, 7), (10, 14), 16), ((1, 9, 4), (5, 11), 4), ((1, 6, 6), (1, 17), 8)],
)
@pytest.mark.parametrize("kind", ["nearest", "linear", "corners"])
def test_resizes(source, size, lanes, kind):
    x, y = (*source, 11), (source[0], *size, 11)
    method = "nearest" if kind == "nearest" else "linear"
    attrs = dict(method=method, align_corners=kind == "corners", layout="NHWC")
    check_rule(Node("resize2d", ("x",), ("y",), attrs), typed(x=x, y=y), Resize(), host(lanes))
    node = Node("resize2d_grad", ("dy",), ("dx",), attrs)
    check_rule(node, typed(dy=y, dx=x), Resize(), host(lanes))
