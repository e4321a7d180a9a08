"""The transforms of Winograd convolution F(m x m, 3 x 3), on vectors of channels.

    y  = A^T [ (G w G^T) * (B^T x B) ] A         forward; the input gradient is one as well
    dw = G^T [ (A dy A^T) * (B^T x B) ] G        the weight gradient: the same products transposed

Each one-dimensional transform is a function of a list of vectors; `both_ways` applies it to the
columns and then to the rows of a square. m is 2 or 4, a tile's edge t = m + 2 (Lavin and Gray,
2015, arXiv 1509.09308). Points 0, 1, -1, infinity for m = 2. For m = 4 they are 0, s, -s, 2s, -2s,
infinity with s = 3/4: with s = 1 the sums err five times as much (choosing points: Barabasz and
others, 2018, arXiv 1803.10986), and the powers of 3/4 are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.emit import const
from pocktvm.tvm_api import T

Expr = Any
SPREAD = 3 / 4  # s
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
    """B^T x: 6 values of 6, the coefficients of the product of x - point over all other points."""
    s = SPREAD
    d1, d2, d3 = _scaled(d[1], lanes), _scaled(d[2], lanes), _scaled(d[3], lanes)
    a, b = T.bind(d[4] - d2(4 * s**2)), T.bind(d3(s) - d1(4 * s**3))
    c, e = T.bind(d[4] - d2(s**2)), T.bind(d3(2 * s) - d1(2 * s**3))
    first = _scaled(d[0], lanes)(4 * s**4) - d2(5 * s**2) + d[4]
    last = d1(4 * s**4) - d3(5 * s**2) + d[5]
    return [first, a + b, a - b, c + e, c - e, last]


def output_4(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """A^T p: 4 values of 6, the powers of the points."""
    s = SPREAD
    a, b = T.bind(d[1] + d[2]), T.bind(d[1] - d[2])
    c, e = T.bind(d[3] + d[4]), T.bind(d[3] - d[4])
    ta, tb, tc, te = (_scaled(v, lanes) for v in (a, b, c, e))
    return [
        d[0] + a + c,
        tb(s) + te(2 * s),
        ta(s**2) + tc(4 * s**2),
        tb(s**3) + te(8 * s**3) + d[5],
    ]


def weight_4(w: Sequence[Expr], lanes: int) -> list[Expr]:
    """G w: 6 values of 3."""
    s = SPREAD
    w0, w1, w2 = (_scaled(v, lanes) for v in w)
    a, b = T.bind(w0(s**-4 / 6) + w2(s**-2 / 6)), T.bind(w1(s**-3 / 6))
    c, e = T.bind(w0(s**-4 / 24) + w2(s**-2 / 6)), T.bind(w1(s**-3 / 12))
    minus = T.bind(const(0.0, lanes) - a)
    return [w0(s**-4 / 4), minus - b, b - a, c + e, c - e, w[2]]


def output_grad_4(d: Sequence[Expr], lanes: int) -> list[Expr]:
    """A dy: 6 values of 4."""
    s = SPREAD
    d1, d2, d3 = (_scaled(v, lanes) for v in d[1:])
    a, b = T.bind(d[0] + d2(s**2)), T.bind(d1(s) + d3(s**3))
    c, e = T.bind(d[0] + d2(4 * s**2)), T.bind(d1(2 * s) + d3(8 * s**3))
    return [d[0], a + b, a - b, c + e, c - e, d[3]]


def weight_grad_4(u: Sequence[Expr], lanes: int) -> list[Expr]:
    """G^T u: 3 values of 6."""
    s = SPREAD
    a, b = _scaled(T.bind(u[1] + u[2]), lanes), _scaled(T.bind(u[2] - u[1]), lanes)
    c, e = _scaled(T.bind(u[3] + u[4]), lanes), _scaled(T.bind(u[3] - u[4]), lanes)
    return [
        _scaled(u[0], lanes)(s**-4 / 4) - a(s**-4 / 6) + c(s**-4 / 24),
        b(s**-3 / 6) + e(s**-3 / 12),
        c(s**-2 / 6) - a(s**-2 / 6) + u[5],
    ]


def _scaled(value: Expr, lanes: int) -> Callable[[float], Expr]:
    return lambda factor: value * const(factor, lanes)


INPUT: dict[int, Transform] = {2: input_2, 4: input_4}
OUTPUT: dict[int, Transform] = {2: output_2, 4: output_4}
WEIGHT: dict[int, Transform] = {2: weight_2, 4: weight_4}
OUTPUT_GRAD: dict[int, Transform] = {2: output_grad_2, 4: output_grad_4}
WEIGHT_GRAD: dict[int, Transform] = {2: weight_grad_2, 4: weight_grad_4}
