"""The weight gradient of a convolution: dw[tap] = x[pixels of the tap]^T @ dy, without im2col.

Borders are loop bounds: tap (ky, kx) sums over the output rows and columns that meet a real pixel.
A task owns one tap, one panel of output channels and one chunk of input channels, and walks all
pixels in blocks: dy's panel of a block is copied to its worker's scratch (contiguous, in the
first-level cache), x's values are read as broadcasts of consecutive channels, and the sums stay in
scratch until the last block. Sums never cross tasks, so they do not depend on the threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.dot import tile_cycles
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import balanced, ceil_div, hands, workers
from pocktvm.schedule.window import Axis
from pocktvm.tvm_api import T, tirx

Expr = Any
PARTIAL_BYTES = 24 * 1024  # of a task's sums
PANEL_BYTES = 32 * 1024  # of a task's block of dy


@dataclass(frozen=True)
class WeightGrad:
    """One weight gradient: x NHWC, dy NHWC, dw HWIO (I of one group)."""

    x: str
    dy: str
    dw: str
    x_shape: tuple[int, ...]
    dy_shape: tuple[int, ...]
    dw_shape: tuple[int, ...]
    groups: int
    rows: Axis
    columns: Axis

    @property
    def depth(self) -> int:
        """Input channels of one group."""
        return self.dw_shape[2]

    @property
    def width(self) -> int:
        """Output channels of one group."""
        return self.dw_shape[3] // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds, borders counted whole."""
        n, oh, ow, _ = self.dy_shape
        kh, kw, i, o = self.dw_shape
        return n * oh * ow * kh * kw * i * o


@dataclass(frozen=True)
class Tile:
    """Register tile `mr` input x `nr` output channels; `block` pixels are summed between loads."""

    mr: int
    nr: int
    block: int


def choose_tile(grad: WeightGrad, isa: Isa) -> Tile:
    """The tile with the fewest cycles (dot.tile_cycles)."""
    widths, best = len(emit.vectors(grad.width, isa.lanes)), (float("inf"), 0, 1, 1)
    for v in range(1, min(widths, 6) + 1):
        limit = (isa.vector_registers - v - 2) // v
        if limit < 1:
            continue
        mr = balanced(grad.depth, limit)
        if isa.lane_fma and mr > 4:
            mr = max(4, min(limit, ceil_div(mr, 4) * 4) // 4 * 4)
        heights = _pieces(grad.depth, mr)
        panels = _pieces(widths, v)
        cycles = sum(tile_cycles(isa, p, u) for p in heights for u in panels)
        best = min(best, (cycles, -mr * v, mr, v))
    mr, v = best[2:]
    nr = v * isa.lanes
    return Tile(mr, nr, max(16, min(256, isa.l1_bytes // 2 // (4 * nr))))


def _pieces(extent: int, size: int) -> list[int]:
    return [size] * (extent // size) + ([extent % size] if extent % size else [])


@dataclass(frozen=True)
class Blocks:
    """How the pixels of dy are walked: `images` whole ones, or `rows` of one image, at a time."""

    count: int
    images: int
    rows: int
    per_image: int

    @classmethod
    def of(cls, grad: WeightGrad, pixels: int) -> Blocks:
        """A cut into blocks of about `pixels` pixels: whole images, or rows of one."""
        n, oh, ow, _ = grad.dy_shape
        if oh * ow <= pixels:
            images = max(d for d in range(1, max(1, pixels // (oh * ow)) + 1) if n % d == 0)
            return cls(n // images, images, oh, 1)
        rows = balanced(oh, pixels // ow)
        per_image = ceil_div(oh, rows)
        return cls(n * per_image, 1, rows, per_image)


@dataclass(frozen=True)
class Plan:
    """The tasks of a weight gradient, and each worker's scratch."""

    grad: WeightGrad
    tile: Tile
    isa: Isa

    @cached_property
    def chunk(self) -> int:
        """Input channels of a task."""
        fit = max(1, PARTIAL_BYTES // (4 * self.tile.nr) // self.tile.mr) * self.tile.mr
        return min(fit, self.grad.depth)

    @cached_property
    def extents(self) -> tuple[int, int, int, int]:
        """How many groups, panels, chunks and taps the tasks are made of."""
        kh, kw, depth, _ = self.grad.dw_shape
        panels = ceil_div(self.grad.width, self.tile.nr)
        return self.grad.groups, panels, ceil_div(depth, self.chunk), kh * kw

    @cached_property
    def blocks(self) -> Blocks:
        """How a task walks the pixels."""
        return Blocks.of(self.grad, self.tile.block)

    @cached_property
    def workers(self) -> int:
        """Scratch areas: tasks that may run at once."""
        return hands(self.isa, 2 * self.grad.macs, math.prod(self.extents))

    @cached_property
    def strips(self) -> int:
        """Parts of the pixels that are walked once each, for all taps (weight_grad_walk.py): one a
        core. None where dy stays in the second-level cache from tap to tap, or the sums do not."""
        groups, _, chunks, taps = self.extents
        small = 4 * math.prod(self.grad.dw_shape) <= self.isa.l2_bytes // 8
        large = 4 * math.prod(self.grad.dy_shape) > self.isa.l2_bytes
        if groups > 1 or chunks > 1 or taps == 1 or not small or not large:
            return 0
        count = self.blocks.count
        return ceil_div(count, ceil_div(count, hands(self.isa, 2 * self.grad.macs, count)))

    @cached_property
    def sums(self) -> int:
        """Elements of a task's sums; none when one block holds every pixel."""
        if self.strips:
            return self.grad.depth * self.grad.width
        return self.chunk * min(self.tile.nr, self.grad.width) if self.blocks.count > 1 else 0

    @cached_property
    def panel(self) -> int:
        """Elements of a block of dy; none when it is read too seldom to be worth copying."""
        if self.strips:
            return 0  # the block of all channels is what lies in memory
        pixels = self.blocks.images * self.blocks.rows * self.grad.dy_shape[2]
        size = pixels * min(self.tile.nr, self.grad.width)
        return size if 4 * size <= PANEL_BYTES and self.chunk >= 2 * self.tile.mr else 0

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """Sums, then panels, of all workers; or the sums of all strips and taps."""
        if self.strips:
            return ((self.strips * self.extents[3] * self.sums, "float32"),)
        sizes = (self.sums, self.panel)
        return tuple((self.workers * size, "float32") for size in sizes if size)


def emit_weight_grad(ctx: Context, plan: Plan) -> None:
    """The whole loop nest, epilogue included."""
    grad, tile = plan.grad, plan.tile
    _, panels, chunks, _ = plan.extents
    for worker, (group, panel, part, tap) in workers(plan.extents, plan.workers):
        at = [T.bind(index) for index in (worker, group, panel, part, tap)]

        def sized(deep: int, at: Sequence[Expr] = at) -> None:
            def task(width: int) -> None:
                TapTask(ctx, plan, at, deep, width).emit()

            last(at[2], panels, tile.nr, grad.width, task)

        last(at[3], chunks, plan.chunk, grad.depth, sized)


def last(index: Expr, count: int, size: int, extent: int, body: Callable[[int], None]) -> None:
    """body(size), or body(what is left) for the last one of `count`."""
    left = extent - (count - 1) * size
    if left == size or count == 1:
        body(left)
        return
    with T.If(index < count - 1):
        with T.Then():
            body(size)
        with T.Else():
            body(left)


class TapTask:
    """One tap, one panel of `width` output channels, `deep` input channels from `first`."""

    def __init__(
        self, ctx: Context, plan: Plan, at: Sequence[Expr], deep: int, width: int,
        sums0: Expr | None = None,
    ) -> None:  # fmt: skip
        worker, self.group, panel, part, self.tap = at
        self.ctx, self.grad, self.tile, self.blocks = ctx, plan.grad, plan.tile, plan.blocks
        self.deep, self.width = deep, width
        kw = self.grad.dw_shape[1]
        self.ky, self.kx = T.bind(self.tap // kw), T.bind(self.tap % kw)
        self.row_span = self.grad.rows.outputs(self.ky)
        self.column_span = self.grad.columns.outputs(self.kx)
        self.vectors = emit.vectors(width, ctx.lanes)
        self.first = T.bind(part * plan.chunk)
        self.column0 = T.bind(self.group * self.grad.width + panel * self.tile.nr)
        scratch = iter(ctx.workspaces)
        self.sums = next(scratch) if plan.sums else None
        self.packed = next(scratch) if plan.panel else None
        self.sums0 = T.bind(worker * plan.sums if sums0 is None else sums0)
        self.packed0 = T.bind(worker * plan.panel)

    def emit(self) -> None:
        """All blocks, then the epilogue."""
        blocks, zero = self.blocks, tirx.const(0, "int32")
        if self.sums is None:
            self.block(zero, zero)
            return
        with T.serial(0, self.deep) as i:
            for start, lanes in self.vectors:
                emit.store(self.sums, self.sum_at(i, start), emit.const(0.0, lanes), lanes)
        with T.serial(0, blocks.count) as b:
            n = T.bind(b // blocks.per_image * blocks.images)
            self.block(n, T.bind(b % blocks.per_image * blocks.rows))
        with T.serial(0, self.deep) as i:
            for start, lanes in self.vectors:
                self.finish(i, start, lanes, emit.load(self.sums, self.sum_at(i, start), lanes))

    def sum_at(self, i: Expr, start: int) -> Expr:
        """Index of a vector of the sums."""
        return self.sums0 + i * self.width + start

    def finish(self, i: Expr, start: int, lanes: int, value: Expr) -> None:
        """Epilogue and store of one vector of dw."""
        grad = self.grad
        at = Position(grad.dw_shape, self.tap * grad.depth + self.first + i,
                      self.column0 + start, lanes)  # fmt: skip
        finish(self.ctx, {grad.dw: value}, at)

    def block(self, n: Expr, row: Expr) -> None:
        """Add one block of pixels to the sums of all channels of the chunk."""
        oh = self.grad.dy_shape[1]
        end = tirx.Min(row + self.blocks.rows, tirx.const(oh, "int32"))
        if self.packed is not None:
            self.pack(n, row, T.bind(end))
        span = (
            T.bind(tirx.Max(row, self.row_span[0])),
            T.bind(tirx.Min(end, self.row_span[1])),
        )
        mr, tail = self.tile.mr, self.deep % self.tile.mr
        full = self.deep // mr
        if full:
            with T.serial(0, full) as t:
                self.panel_tile(n, row, span, T.bind(t * mr), mr)
        if tail:
            at = tirx.const(full * mr, "int32")
            self.panel_tile(n, row, span, at, tail)

    def pack(self, n: Expr, row: Expr, end: Expr) -> None:
        """Copy dy's panel of the block to the stack."""
        _, oh, ow, o = self.grad.dy_shape
        with T.serial(0, self.blocks.images) as b, T.serial(0, (end - row) * ow) as p:
            source = ((n + b) * oh + row) * ow + p
            target = self.packed0 + (b * (self.blocks.rows * ow) + p) * self.width
            for start, lanes in self.vectors:
                at = source * o + self.column0 + start
                emit.store(self.packed, target + start, self.ctx.load(self.grad.dy, at, lanes),
                           lanes)  # fmt: skip

    def panel_tile(
        self, n: Expr, row: Expr, span: tuple[Expr, Expr], i: Expr, mr: int
    ) -> None:
        """One register tile over the pixels of the block."""
        grad, blocks = self.grad, self.blocks
        _, h, w, c = grad.x_shape
        _, oh, ow, o = grad.dy_shape
        acc = emit.local(mr * self.width)
        for r in range(mr):
            for start, lanes in self.vectors:
                value = (
                    emit.const(0.0, lanes) if self.sums is None
                    else emit.load(self.sums, self.sum_at(i + r, start), lanes)
                )  # fmt: skip
                emit.store(acc, r * self.width + start, value, lanes)
        with T.serial(0, blocks.images) as b, T.serial(*span) as y:
            line = (n + b) * h + grad.rows.source(y, self.ky)
            x0 = T.bind(
                (line * w + grad.columns.source(0, self.kx)) * c
                + (self.group * grad.depth + self.first + i)
            )
            if self.packed is not None:
                d0 = T.bind(self.packed0 + ((b * blocks.rows + y - row) * ow) * self.width)
                step = self.width
            else:
                d0 = T.bind((((n + b) * oh + y) * ow) * o + self.column0)
                step = o
            with T.serial(*self.column_span) as x:
                self.pixel(acc, x0 + x * (grad.columns.step * c), d0 + x * step, range(mr))
        for r in range(mr):
            for start, lanes in self.vectors:
                value = emit.load(acc, r * self.width + start, lanes)
                if self.sums is None:
                    self.finish(i + r, start, lanes, value)
                else:
                    emit.store(self.sums, self.sum_at(i + r, start), value, lanes)

    def pixel(self, acc: Any, x: Expr, d: Expr, rows: Sequence[int]) -> None:
        """acc += x[channels]^T dy[channels] of one pixel."""
        source = self.ctx.buffers[self.grad.x]
        dy = self.ctx.buffers[self.grad.dy] if self.packed is None else self.packed
        grads = [T.bind(emit.load(dy, d + start, lanes)) for start, lanes in self.vectors]
        fours = len(rows) // 4 if self.ctx.task.target.isa.lane_fma and self.ctx.lanes == 4 else 0
        lanes4 = [T.bind(emit.load(source, x + 4 * q, 4)) for q in range(fours)]
        for r in rows:
            scalar = None if r < 4 * fours else T.bind(emit.load(source, x + r, 1))
            for (start, lanes), grad in zip(self.vectors, grads, strict=True):
                if scalar is None:
                    lane = [r % 4] * lanes
                    value = tirx.Shuffle([lanes4[r // 4]], lane)
                else:
                    value = emit.splat(scalar, lanes)
                at = r * self.width + start
                emit.store(acc, at, emit.load(acc, at, lanes) + value * grad, lanes)
