"""The weight gradient of a depthwise convolution: kh x kw sums a channel, kept in registers.

A task owns a part of the channels. It walks blocks of rows that fit the second-level cache; in each
it takes its channels a few vectors at a time, loads their sums, adds every pixel of the block, and
puts them back in its worker's scratch. Large kernels are summed a few kernel rows at a time, as
many as there are registers for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import Vectors, each_block
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import ceil_div, hands, workers
from pocktvm.schedule.weight_grad import PARTIAL_BYTES, WeightGrad, last
from pocktvm.schedule.window import Run, tiles
from pocktvm.tvm_api import T, tirx

Expr = Any
BLOCK_BYTES = 200 * 1024  # of x and dy in a block of rows
CODE_LIMIT = 600  # multiply-adds written out for a channel block


@dataclass(frozen=True)
class Tile:
    """`pixels` of a row written out x `vectors` channel vectors, `lines` kernel rows at a time."""

    pixels: int
    vectors: int
    lines: int


def choose_tile(grad: WeightGrad, isa: Isa) -> Tile:
    """As many kernel rows as there are registers for their sums; then vectors."""
    kh, kw = grad.dw_shape[:2]
    room = max(1, isa.vector_registers - 4)
    lines = max(1, min(kh, room // kw))
    pair = grad.dw_shape[3] % (2 * isa.lanes) == 0 and 2 * lines * kw <= room
    pair = pair and not isa.lane_fma
    return Tile(4, 2 if pair else 1, lines)


@dataclass(frozen=True)
class Plan:
    """The parts of the channels, and each worker's scratch."""

    grad: WeightGrad
    tile: Tile
    isa: Isa

    @cached_property
    def part(self) -> int:
        """Channels of a task."""
        channels, taps = self.grad.dw_shape[3], self.grad.dw_shape[0] * self.grad.dw_shape[1]
        block = self.tile.vectors * self.isa.lanes
        fit = max(1, PARTIAL_BYTES // (4 * taps) // block)
        blocks = ceil_div(channels, block)
        share = max(1, min(fit, blocks // (2 * self.isa.cores)))
        # A share that divides the blocks leaves no shorter last part, to be written out as well.
        share = max(s for s in range(1, share + 1) if blocks % s == 0)
        return min(channels, share * block)

    @cached_property
    def parts(self) -> int:
        """Parts of the channels: one task each."""
        return ceil_div(self.grad.dw_shape[3], self.part)

    @cached_property
    def workers(self) -> int:
        """Scratch areas: tasks that may run at once."""
        return hands(self.isa, 2 * self.grad.macs, self.parts)

    @cached_property
    def sums(self) -> int:
        """Elements of a task's sums."""
        return self.part * self.grad.dw_shape[0] * self.grad.dw_shape[1]

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """The sums of all workers."""
        return ((self.workers * self.sums, "float32"),)


def emit_depthwise_weight_grad(ctx: Context, plan: Plan) -> None:
    """The whole loop nest, epilogue included."""
    grad = plan.grad
    for worker, (f,) in workers((plan.parts,), plan.workers):
        first, sums0 = T.bind(f * plan.part), T.bind(worker * plan.sums)

        def task(width: int, first: Expr = first, sums0: Expr = sums0) -> None:
            _Part(ctx, grad, plan.tile, first, width, ctx.workspaces[0], sums0).emit()

        last(f, plan.parts, plan.part, grad.dw_shape[3], task)


@dataclass
class _Part:
    """`width` channels from `first`; their sums begin at `sums0`."""

    ctx: Context
    grad: WeightGrad
    tile: Tile
    first: Expr
    width: int
    sums: Any
    sums0: Expr

    def emit(self) -> None:
        """All blocks of rows, then the epilogue."""
        kh, kw = self.grad.dw_shape[:2]
        n, oh, ow, channels = self.grad.dy_shape
        step = self.grad.rows.step * self.grad.columns.step
        row_bytes = ow * channels * 4 * (1 + step)
        high = min(oh, max(1, BLOCK_BYTES // row_bytes))
        blocks = ceil_div(oh, high)
        with T.serial(0, kh * kw) as t:
            self.each(lambda c, v: self.clear(t, c, v))
        with T.serial(0, n * blocks) as b:
            image, row = T.bind(b // blocks), T.bind(b % blocks * high)
            end = T.bind(tirx.Min(row + high, tirx.const(oh, "int32")))
            for top in range(0, kh, self.tile.lines):
                lines = range(top, min(kh, top + self.tile.lines))
                self.each(lambda c, v, lines=lines: self.block(image, row, end, lines, c, v))
        with T.serial(0, kh * kw) as t:
            self.each(lambda c, v: self.finish(t, c, v))

    def each(self, body: Any) -> None:
        """`body(channel within the part, vectors)` over the part."""
        each_block(self.width, self.ctx.lanes, self.tile.vectors, body)

    def clear(self, t: Expr, c: Expr, vectors: Vectors) -> None:
        """Zero the sums of one tap."""
        for start, lanes in vectors:
            at = self.sums0 + t * self.width + c + start
            emit.store(self.sums, at, emit.const(0.0, lanes), lanes)

    def finish(self, t: Expr, c: Expr, vectors: Vectors) -> None:
        """Epilogue and stores of one tap."""
        for start, lanes in vectors:
            value = emit.load(self.sums, self.sums0 + t * self.width + c + start, lanes)
            at = Position(self.grad.dw_shape, t, self.first + c + start, lanes)
            finish(self.ctx, {self.grad.dw: value}, at)

    def block(
        self, n: Expr, row: Expr, end: Expr, lines: Sequence[int], c: Expr, vectors: Vectors
    ) -> None:
        """Add rows [row, end) of dy to the sums of some kernel rows of one channel block."""
        kw = self.grad.dw_shape[1]
        width = vectors[-1][0] + vectors[-1][1]
        slots = {ky * kw + kx: i for i, (ky, kx) in
                 enumerate((ky, kx) for ky in lines for kx in range(kw))}  # fmt: skip
        acc = emit.local(len(slots) * width)

        def move(save: bool) -> None:
            for tap, slot in slots.items():
                for start, lanes in vectors:
                    a = slot * width + start
                    b = self.sums0 + tap * self.width + c + start
                    if save:
                        emit.store(self.sums, b, emit.load(acc, a, lanes), lanes)
                    else:
                        emit.store(acc, a, emit.load(self.sums, b, lanes), lanes)

        move(save=False)
        runs = tiles(self.grad.columns, self.tile.pixels)
        rows = self.grad.rows
        cases = [(a, b, [k for k in taps if k in lines]) for a, b, taps in rows.cases()]
        cost = len(vectors) * sum(len(p) for run in runs for p in run.pixels)
        if cost * sum(len(taps) for *_, taps in rows.cases()) <= CODE_LIMIT:
            for start, stop, taps in cases:
                lo = tirx.Max(row, tirx.const(start, "int32"))
                hi = tirx.Min(end, tirx.const(stop, "int32"))
                with T.serial(lo, hi) as y:
                    self.line(n, y, taps, c, vectors, runs, acc, slots)
        else:
            with T.serial(row, end) as y:
                for ky in lines:
                    source = rows.source(y, ky)
                    with T.If(tirx.And(source >= 0, source < rows.src)), T.Then():
                        self.line(n, y, [ky], c, vectors, runs, acc, slots)
        move(save=True)

    def line(
        self, n: Expr, y: Expr, taps: Sequence[int], c: Expr, vectors: Vectors,
        runs: Sequence[Run], acc: Any, slots: dict[int, int],
    ) -> None:  # fmt: skip
        """Add the products of one row of dy with its taps' rows of x."""
        for run in runs:
            if run.count == 1:
                self.pixels(n, y, tirx.const(run.start, "int32"), taps, c, vectors, run, acc, slots)
            else:
                with T.serial(0, run.count) as t:
                    x = T.bind(t * run.width + run.start)
                    self.pixels(n, y, x, taps, c, vectors, run, acc, slots)

    def pixels(
        self, n: Expr, y: Expr, x: Expr, taps: Sequence[int], c: Expr, vectors: Vectors,
        run: Run, acc: Any, slots: dict[int, int],
    ) -> None:  # fmt: skip
        """A few pixels of dy, every tap of some kernel rows."""
        grad, columns = self.grad, self.grad.columns
        _, h, w, channels = grad.x_shape
        _, oh, ow, _ = grad.dy_shape
        kw, width = grad.dw_shape[1], vectors[-1][0] + vectors[-1][1]
        meets: dict[int, list[tuple[int, int]]] = {}
        for kx in range(kw):
            for r in run.pixels[kx]:
                meets.setdefault(columns.source(r, kx), []).append((r, kx))
        d0 = T.bind(((n * oh + y) * ow + x) * channels + self.first + c)
        for ky in taps:
            line = (n * h + grad.rows.source(y, ky)) * w + x * columns.step
            x0 = T.bind(line * channels + self.first + c)
            for start, lanes in vectors:
                for column in sorted(meets):
                    value = self.ctx.load(grad.x, x0 + (column * channels + start), lanes)
                    for r, kx in meets[column]:
                        dy = self.ctx.load(grad.dy, d0 + (r * channels + start), lanes)
                        at = slots[ky * kw + kx] * width + start
                        emit.store(acc, at, emit.load(acc, at, lanes) + value * dy, lanes)
