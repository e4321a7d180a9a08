"""The transforms of Winograd convolution F(m x m, 3 x 3), on vectors of channels.

    y  = A^T [ (G w G^T) * (B^T x B) ] A         forward; the input gradient is one as well
    dw = G^T [ (A dy A^T) * (B^T x B) ] G        the weight gradient: the same products transposed

Each one-dimensional transform is a function of a list of vectors; `both_ways` applies it to the
columns and then to the rows of a square. m is 2 or 4, a tile's edge t = m + 2. Points 0, 1, -1,
infinity, and 2, -2 for m = 4 (Lavin and Gray, 2015, arXiv 1509.09308).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T

Expr = Any
Transform = Callable[[Sequence[Expr], int], list[Expr]]


def both_ways(
    transform: Transform, edge: int, read: Callable[[int, int], Expr],
    write: Callable[[int, int, Expr], None], lanes: int,
) -> None:  # fmt: skip
    """Transform the edge x edge square that `read(row, column)` gives; `write(row, column, value)`
    takes the result."""
    middle: Any = None
    height = 0
    for b in range(edge):
        column = transform([T.bind(read(a, b)) for a in range(edge)], lanes)
        if middle is None:
            height = len(column)
            middle = emit.local(height * edge * lanes)
        for a, value in enumerate(column):
            emit.store(middle, (a * edge + b) * lanes, value, lanes)
    for a in range(height):
        row = [T.bind(emit.load(middle, (a * edge + b) * lanes, lanes)) for b in range(edge)]
        for b, value in enumerate(transform(row, lanes)):
            write(a, b, value)


def input_2(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """B^T x: 4 values of 4."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def output_2(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """A^T p: 2 values of 4."""
    return [d[0] + d[1] + d[2], d[1] - d[2] - d[3]]


def weight_2(w: Sequence[Expr], lanes: int) -> list[Expr]:
    """G w: 4 values of 3."""
    half = const(0.5, lanes)
    a, b = T.bind((w[0] + w[2]) * half), T.bind(w[1] * half)
    return [w[0], a + b, a - b, w[2]]


def output_grad_2(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """A dy: 4 values of 2."""
    return [d[0], d[0] + d[1], d[0] - d[1], const(0.0, lanes) - d[1]]


def weight_grad_2(u: Sequence[Expr], lanes: int) -> list[Expr]:
    """G^T u: 3 values of 4."""
    half = const(0.5, lanes)
    a, b = T.bind((u[1] + u[2]) * half), (u[1] - u[2]) * half
    return [u[0] + a, b, a + u[3]]


def input_4(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """B^T x: 6 values of 6."""
    two, four, five = (const(v, lanes) for v in (2.0, 4.0, 5.0))
    a, b = T.bind(d[4] - four * d[2]), T.bind(d[3] - four * d[1])
    c, e = T.bind(d[4] - d[2]), T.bind(two * (d[3] - d[1]))
    first, last = four * d[0] - five * d[2] + d[4], four * d[1] - five * d[3] + d[5]
    return [first, a + b, a - b, c + e, c - e, last]


def output_4(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """A^T p: 4 values of 6."""
    two, four, eight = (const(v, lanes) for v in (2.0, 4.0, 8.0))
    a, b = T.bind(d[1] + d[2]), T.bind(d[1] - d[2])
    c, e = T.bind(d[3] + d[4]), T.bind(d[3] - d[4])
    return [d[0] + a + c, b + two * e, a + four * c, b + eight * e + d[5]]


def weight_4(w: Sequence[Expr], lanes: int) -> list[Expr]:
    """G w: 6 values of 3."""
    quarter, sixth, twelfth, small = (const(v, lanes) for v in (1 / 4, 1 / 6, 1 / 12, 1 / 24))
    a, b = T.bind((w[0] + w[2]) * sixth), T.bind(w[1] * sixth)
    c, e = T.bind(w[0] * small + w[2] * sixth), T.bind(w[1] * twelfth)
    minus = T.bind(const(0.0, lanes) - a)
    return [w[0] * quarter, minus - b, b - a, c + e, c - e, w[2]]


def output_grad_4(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """A dy: 6 values of 4."""
    two, four, eight = (const(v, lanes) for v in (2.0, 4.0, 8.0))
    a, b = T.bind(d[0] + d[2]), T.bind(d[1] + d[3])
    c, e = T.bind(d[0] + four * d[2]), T.bind(two * d[1] + eight * d[3])
    return [d[0], a + b, a - b, c + e, c - e, d[3]]


def weight_grad_4(u: Sequence[Expr], lanes: int) -> list[Expr]:
    """G^T u: 3 values of 6."""
    quarter, sixth, twelfth, small = (const(v, lanes) for v in (1 / 4, 1 / 6, 1 / 12, 1 / 24))
    a, b = T.bind((u[1] + u[2]) * sixth), (u[2] - u[1]) * sixth
    c = T.bind(u[3] + u[4])
    return [
        u[0] * quarter - a + c * small,
        b + (u[3] - u[4]) * twelfth,
        c * sixth - a + u[5],
    ]


INPUT: dict[int, Transform] = {2: input_2, 4: input_4}
OUTPUT: dict[int, Transform] = {2: output_2, 4: output_4}
WEIGHT: dict[int, Transform] = {2: weight_2, 4: weight_4}
OUTPUT_GRAD: dict[int, Transform] = {2: output_grad_2, 4: output_grad_4}
WEIGHT_GRAD: dict[int, Transform] = {2: weight_grad_2, 4: weight_grad_4}
