"""Depthwise convolution (one filter a channel) and its gradients.

No element meets enough others for shared memory to pay: forward and input gradient are one thread
an element, neighbours along the channels; the weight gradient is a reduction over pixels for each
of a few outputs (gpu/fold.py).
"""

from __future__ import annotations

import math
from typing import Any

from pocktvm.schedule.emit import Context, build, const, load, local, store
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.gpu.conv import OPS, Geometry, geometry, offset, pixel, within
from pocktvm.schedule.gpu.fold import emit_fold, plan_fold
from pocktvm.schedule.gpu.launch import choose, threads
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.schedule.spatial import anchor_of, decline_spatial
from pocktvm.tvm_api import T

Expr = Any
UNROLLED = 49  # taps written out: their validity tests then share what they compute


class Depthwise(Knobless):
    """conv2d and its two gradients with groups = channels in = channels out."""

    name = "depthwise"

    def decline(self, task: Task) -> str | None:
        """Declines dense and grouped convolutions, other layouts and types."""
        reason = decline_spatial(task, *OPS)
        if reason is None:
            conv = geometry(task)
            if not conv.groups == conv.x[3] == conv.y[3]:
                return "not depthwise: groups, channels in and channels out differ"
        return reason

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """One thread an element, or a reduction."""
        conv = geometry(task)
        if anchor_of(task).op == "conv2d_weight_grad":
            return _weight_grad(task, conv)
        func = build(task, lambda ctx: _gather(ctx, conv))
        return Emitted(func, inplace=inplace_pairs(task), flops=2 * conv.macs)


def _gather(ctx: Context, conv: Geometry) -> None:
    """Forward and input gradient: the taps of one element."""
    node = anchor_of(ctx.task)
    forward = node.op == "conv2d"
    source, weight = node.inputs[:2]
    shape = conv.y if forward else conv.x
    other = conv.x if forward else conv.y
    for flat in threads(math.prod(shape)):
        row, c = T.bind(flat // shape[3]), T.bind(flat % shape[3])
        n, y, x = pixel(row, shape)
        acc = local(1)
        store(acc, 0, const(0.0), 1)
        taps = T.unroll if math.prod(conv.w[:2]) <= UNROLLED else T.serial
        with taps(0, conv.w[0]) as ky, taps(0, conv.w[1]) as kx:
            if forward:
                sy, sx = conv.source(y, x, ky, kx)
                there = within(sy, sx, other)
            else:
                there, sy, sx = conv.reader(y, x, ky, kx)
            value = choose(there, ctx.load(source, offset(n, sy, sx, c, other), 1), const(0.0))
            tap = ctx.load(weight, (ky * conv.w[1] + kx) * shape[3] + c, 1)
            store(acc, 0, load(acc, 0, 1) + value * tap, 1)
        total = T.bind(load(acc, 0, 1))
        finish(ctx, {node.outputs[0]: total}, Position(shape, row, c, 1))


def _weight_grad(task: Task, conv: Geometry) -> Emitted:
    node = anchor_of(task)
    x, dy = node.inputs[:2]
    channels, kw = conv.x[3], conv.w[1]
    pixels = math.prod(conv.y[:3])
    fold = plan_fold(task.target.isa, math.prod(conv.w[:2]) * channels, pixels, False)
    workspaces = fold.workspaces("float32")

    def body(ctx: Context) -> None:
        def product(output: Expr, at: Expr) -> Expr:
            tap, c = T.bind(output // channels), T.bind(output % channels)
            n, oy, ox = pixel(at, conv.y)
            iy, ix = conv.source(oy, ox, T.bind(tap // kw), T.bind(tap % kw))
            value = ctx.load(x, offset(n, iy, ix, c, conv.x), 1)
            value = choose(within(iy, ix, conv.x), value, const(0.0))
            return value * ctx.load(dy, at * channels + c, 1)

        def write(output: Expr, value: Expr) -> None:
            row, c = T.bind(output // channels), T.bind(output % channels)
            finish(ctx, {node.outputs[0]: value}, Position(conv.w, row, c, 1))

        partial = ctx.workspaces[0] if workspaces else None
        emit_fold(fold, product, lambda a, b: a + b, 0.0, write, partial)

    func = build(task, body, workspaces)
    return Emitted(func, workspaces, inplace_pairs(task), {}, 2 * conv.macs)


