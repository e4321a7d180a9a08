"""Matrix products with lanes along K: a block of dot products at a time.

For few rows against B stored [N, K] (every element of B is used a few times, so transposing it
would cost more than the product) and for very few columns (a register tile would be mostly empty).
"""

from __future__ import annotations

from typing import Any

from pocktvm.schedule.emit import (
    Context,
    build,
    const,
    load,
    local,
    reduce_lanes,
    store,
    vectors,
)
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.gemm import Gemm
from pocktvm.schedule.loops import ceil_div, grid, tile_at, tiles, worth_threads, zero
from pocktvm.schedule.rule import Emitted, Pack, Task
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import T

Expr = Any


def dot_tile(task: Task, gemm: Gemm) -> tuple[int, int] | None:
    """(rows, columns) of a block of dot products; None where the form does not apply."""
    if gemm.transpose_a:
        return None
    contiguous = gemm.transpose_b or gemm.n == 1
    if not contiguous and (gemm.b_batched or gemm.n > task.target.isa.lanes):
        return None  # it would need a transposed copy of a large B
    budget = 16 if task.target.isa.vector_registers >= 32 else 8
    columns = min(gemm.n, 4)
    rows = min(gemm.m, max(1, budget // columns))
    return rows, min(gemm.n, max(columns, budget // rows), 8)


def emit_dot(task: Task, gemm: Gemm, pairs: tuple[tuple[int, int], ...]) -> Emitted:
    """The whole kernel; B is first laid out [N, K] where it is not."""
    tile = dot_tile(task, gemm)
    assert tile is not None
    rows, columns = tile
    ready = gemm.transpose_b or gemm.n == 1
    pack: dict[int, Pack] = {}
    copied = False
    if not ready and task.is_frozen(gemm.b):
        pack[task.node.inputs.index(gemm.b)] = Pack("panels", {"nr": gemm.k, "transpose": True})
    elif not ready:
        copied = True
    parallel = worth_threads(task.target.isa, gemm.flops)

    def body(ctx: Context) -> None:
        b = ctx.buffers[gemm.b]
        if copied:
            source, b = b, ctx.workspaces[0]
            target = Matrix(b, zero(), gemm.k)
            copy_transposed(Matrix(source, zero(), gemm.n), target, gemm.k, gemm.n, ctx.lanes)
        extents = (gemm.batch, ceil_div(gemm.n, columns), ceil_div(gemm.m, rows))
        if gemm.m > gemm.n:
            extents = (extents[0], extents[2], extents[1])
        for batch, p, q in grid(extents, parallel):
            i, j = (p, q) if gemm.m > gemm.n else (q, p)
            for row, mr in tile_at(i, gemm.m, rows):
                for column, nr in tile_at(j, gemm.n, columns):
                    _block(ctx, gemm, b, batch, row, mr, column, nr)

    workspaces = ((gemm.n * gemm.k, "float32"),) if copied else ()
    func = build(task, body, workspaces)
    return Emitted(func, workspaces, pairs, pack, gemm.flops)


def _block(
    ctx: Context, gemm: Gemm, b: Any, batch: Expr, row: Expr, mr: int, column: Expr, nr: int
) -> None:
    base_a = batch * (gemm.m * gemm.k) if gemm.a_batched else zero()
    base_b = batch * (gemm.n * gemm.k) if gemm.b_batched else zero()
    lanes = ctx.lanes
    acc = local(mr * nr * lanes)
    for i in range(mr * nr):
        store(acc, i * lanes, const(0.0, lanes), lanes)

    def multiply(into: Any, k: Expr, width: int) -> None:
        xs = [T.bind(ctx.load(gemm.a, base_a + (row + r) * gemm.k + k, width)) for r in range(mr)]
        ys = [T.bind(load(b, base_b + (column + c) * gemm.k + k, width)) for c in range(nr)]
        for r in range(mr):
            for c in range(nr):
                at = (r * nr + c) * lanes
                store(into, at, load(into, at, width) + xs[r] * ys[c], width)

    full = gemm.k // lanes * lanes
    for k, _ in tiles(full, lanes):
        multiply(acc, k, lanes)
    if gemm.k > full:  # narrower vectors add to a copy: the main loop's stay in registers
        tail = local(mr * nr * lanes)
        for i in range(mr * nr):
            store(tail, i * lanes, load(acc, i * lanes, lanes), lanes)
        for start, width in vectors(gemm.k - full, lanes):
            multiply(tail, full + start, width)
        acc = tail
    sums = local(mr * nr)
    for i in range(mr * nr):
        total = reduce_lanes(load(acc, i * lanes, lanes), lanes, lambda x, y: x + y)
        store(sums, i, total, 1)
    shape = ctx.task.shape(gemm.c)
    for r in range(mr):
        line = batch * gemm.m + row + r if gemm.batch > 1 else row + r
        for c, width in vectors(nr, min(lanes, 4)):
            value = T.bind(load(sums, r * nr + c, width))
            finish(ctx, {gemm.c: value}, Position(shape, line, column + c, width))
