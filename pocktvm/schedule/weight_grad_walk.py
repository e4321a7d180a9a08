"""The weight gradient of a convolution whose dw is small and whose images are large: a first layer.

All pixels are walked once, block by block in the order of memory, and every tap takes its sums
from a block before the next one, whose lines are asked for meanwhile; with a walk for every tap,
dy comes from memory as often as there are taps. The pixels are cut into strips, one a core, whose
sums are added up in order: by the target, not by how many threads run.
"""

from __future__ import annotations

from typing import Any

from pocktvm.schedule.emit import Context, const, load, store, vector_loop, vectors
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import ceil_div, grid, zero
from pocktvm.schedule.prefetch import LINE, prefetch_lines, streams
from pocktvm.schedule.weight_grad import Plan, TapTask
from pocktvm.tvm_api import T, tirx

Expr = Any


def emit_weight_grad_walk(ctx: Context, plan: Plan) -> None:
    """All strips, then their sum and the epilogue."""
    grad, blocks, taps = plan.grad, plan.blocks, plan.extents[3]
    size, per_strip = taps * plan.sums, ceil_div(plan.blocks.count, plan.strips)
    for (strip,) in grid((plan.strips,), plan.strips > 1):
        sums = T.bind(strip * size)
        for start, lanes in vector_loop(size, ctx.lanes):
            store(ctx.workspaces[0], sums + start, const(0.0, lanes), lanes)
        first = T.bind(strip * per_strip)
        with T.serial(0, tirx.Min(blocks.count - first, per_strip)) as i:
            block = T.bind(first + i)
            n = T.bind(block // blocks.per_image * blocks.images)
            row = T.bind(block % blocks.per_image * blocks.rows)
            with T.serial(0, taps) as tap:
                for panel, (_, width, offset) in enumerate(_panels(plan)):
                    at = [strip, zero(), tirx.const(panel, "int32"), zero(), tap]
                    sums0 = sums + offset + tap * (grad.depth * width)
                    TapTask(ctx, plan, at, grad.depth, width, sums0).block(n, row)
                _ask_ahead(ctx, plan, block, tap)
    _finish(ctx, plan, size)


def _ask_ahead(ctx: Context, plan: Plan, block: Expr, tap: Expr) -> None:
    """One tap's share of the lines of the next block, of x and of dy."""
    grad, blocks, taps = plan.grad, plan.blocks, plan.extents[3]
    for name, shape in ((grad.x, grad.x_shape), (grad.dy, grad.dy_shape)):
        if not streams(ctx.task, name):
            continue
        values = ceil_div(shape[0] * shape[1] * shape[2] * shape[3], blocks.count)
        share = ceil_div(ceil_div(values, LINE), taps)
        at = T.bind((block + 1) * values + tap * (share * LINE))
        prefetch_lines(ctx, name, at, share)


def _panels(plan: Plan) -> list[tuple[int, int, int]]:
    """(first output channel, how many, where the sums of its taps begin) of every panel."""
    width, nr = plan.grad.width, plan.tile.nr
    rows = plan.extents[3] * plan.grad.depth
    return [(start, min(nr, width - start), rows * start) for start in range(0, width, nr)]


def _finish(ctx: Context, plan: Plan, size: int) -> None:
    """The sum over strips and the epilogue of every row of dw."""
    grad, sums = plan.grad, ctx.workspaces[0]
    for start, width, offset in _panels(plan):
        with T.serial(0, size // grad.width) as row:
            for column, lanes in vectors(width, ctx.lanes):
                at = offset + row * width + column
                value = load(sums, at, lanes)
                for strip in range(1, plan.strips):
                    value = value + load(sums, strip * size + at, lanes)
                position = Position(grad.dw_shape, row, start + column, lanes)
                finish(ctx, {grad.dw: T.bind(value)}, position)
