"""Loops over one row: reductions and passes that row kernels are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.emit import Context, const, load, local, reduce_lanes, splat, store, vectors
from pocktvm.tvm_api import T, tirx

Expr = Any
Combine = Callable[[Expr, Expr], Expr]
ACCUMULATORS = 4  # independent chains: an add has four cycles of latency, two issue a cycle


def reduce_row(
    ctx: Context,
    extent: int,
    value: Callable[[Expr, int], Expr],
    combine: Combine,
    start: float,
    end: Expr | None = None,
) -> Expr:
    """Combine value(i, width) over a row of `extent` into one scalar, in a fixed order.

    `end`: how many count; blocks behind it are not asked for, and of its own block `value` gives
    the neutral element behind it.
    """
    lanes = ctx.lanes
    chains = ACCUMULATORS
    while chains > 1 and extent < chains * lanes:
        chains //= 2
    block = chains * lanes
    full = extent // block
    total = local(1)
    store(total, 0, const(start), 1)
    if full:
        sums = local(block)
        for c in range(chains):
            store(sums, c * lanes, const(start, lanes), lanes)
        stop = full if end is None else tirx.Min(full, (end + block - 1) // block)
        with T.serial(0, stop) as i:
            for c in range(chains):
                at = c * lanes
                item = value(i * block + at, lanes)
                store(sums, at, combine(load(sums, at, lanes), item), lanes)
        for c in range(1, chains):
            store(sums, 0, combine(load(sums, 0, lanes), load(sums, c * lanes, lanes)), lanes)
        scalar = reduce_lanes(load(sums, 0, lanes), lanes, combine)
        store(total, 0, combine(load(total, 0, 1), scalar), 1)
    for offset, width in vectors(extent - full * block, lanes):
        item = value(tirx.const(full * block + offset, "int32"), width)
        scalar = reduce_lanes(T.bind(item), width, combine)
        store(total, 0, combine(load(total, 0, 1), scalar), 1)
    return T.bind(load(total, 0, 1))


def add(a: Expr, b: Expr) -> Expr:
    """a + b."""
    return a + b


def row_max(ctx: Context, buffer: Any, base: Expr, extent: int) -> Expr:
    """The largest element of a row."""
    return reduce_row(
        ctx, extent, lambda i, w: load(buffer, base + i, w), lambda a, b: tirx.Max(a, b), -3.4e38
    )


def row_sum_exp(ctx: Context, buffer: Any, base: Expr, extent: int, top: Expr) -> Expr:
    """sum_i e**(x_i - top) over a row."""
    return reduce_row(
        ctx, extent, lambda i, w: vm.exp(load(buffer, base + i, w) - splat(top, w), w), add, 0.0
    )
