"""The weight gradient of a convolution: dw[tap] = x[pixels of the tap]^T @ dy, without im2col.

Borders are loop bounds: tap (ky, kx) sums over the output rows and columns that meet a real pixel.
A task owns one tap, one panel of output channels and one chunk of input channels, and walks all
pixels in blocks: dy's panel of a block is copied to its stack (contiguous, in the first-level
cache), x's values are read as broadcasts of consecutive channels, and the sums stay on the stack
until the last block. Sums never cross tasks: the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.spatial import outer
from pocktvm.schedule.window import Axis
from pocktvm.tvm_api import T, tirx

Expr = Any
PARTIAL_BYTES = 24 * 1024  # of a task's sums on its stack
PANEL_BYTES = 32 * 1024  # of a block of dy on a task's stack


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
    """The tile with the fewest cycles by the port model of schedule/direct.py."""
    widths, best = len(emit.vectors(grad.width, isa.lanes)), (float("inf"), 0, 1, 1)
    for v in range(1, min(widths, 6) + 1):
        limit = (isa.vector_registers - v - 2) // v
        if limit < 1:
            continue
        mr = -(-grad.depth // -(-grad.depth // min(limit, grad.depth)))
        if isa.lane_fma and mr > 4:
            mr = max(4, min(limit, -(-mr // 4) * 4) // 4 * 4)
        heights = _pieces(grad.depth, mr)
        panels = _pieces(widths, v)
        cycles = sum(
            max(p * u / 2, ((p / 4 if isa.lane_fma else p) + u) / 2, 4)
            for p in heights
            for u in panels
        )
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
        """Blocks of about `pixels`."""
        n, oh, ow, _ = grad.dy_shape
        if oh * ow <= pixels:
            images = max(d for d in range(1, max(1, pixels // (oh * ow)) + 1) if n % d == 0)
            return cls(n // images, images, oh, 1)
        rows = -(-oh // -(-oh // max(1, pixels // ow)))
        return cls(n * -(-oh // rows), 1, rows, -(-oh // rows))


def emit_weight_grad(ctx: Context, grad: WeightGrad, tile: Tile) -> None:
    """The whole loop nest, epilogue included."""
    taps = grad.dw_shape[0] * grad.dw_shape[1]
    panels = -(-grad.width // tile.nr)
    fit = max(1, PARTIAL_BYTES // (4 * tile.nr) // tile.mr) * tile.mr
    chunk = min(fit, grad.depth)
    chunks = -(-grad.depth // chunk)
    with outer(ctx.task, grad.groups * panels * chunks * taps, 2 * grad.macs) as f:
        tap = T.bind(f % taps)
        part = T.bind(f // taps % chunks)
        panel = T.bind(f // (taps * chunks) % panels)
        group = T.bind(f // (taps * chunks * panels))

        def sized(deep: int) -> None:
            def task(width: int) -> None:
                _Task(ctx, grad, tile, tap, group, panel, T.bind(part * chunk), deep, width).emit()

            last(panel, panels, tile.nr, grad.width, task)

        last(part, chunks, chunk, grad.depth, sized)


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


@dataclass
class _Task:
    """One tap, one panel of `width` output channels, `deep` input channels from `first`."""

    ctx: Context
    grad: WeightGrad
    tile: Tile
    tap: Expr
    group: Expr
    panel: Expr
    first: Expr
    deep: int
    width: int

    def emit(self) -> None:
        """All blocks, then the epilogue."""
        grad = self.grad
        kw = grad.dw_shape[1]
        blocks = Blocks.of(grad, self.tile.block)
        self.ky, self.kx = T.bind(self.tap // kw), T.bind(self.tap % kw)
        self.row_span, self.column_span = grad.rows.outputs(self.ky), grad.columns.outputs(self.kx)
        self.vectors = emit.vectors(self.width, self.ctx.lanes)
        self.column0 = T.bind(self.group * grad.width + self.panel * self.tile.nr)
        self.sums = emit.local(self.deep * self.width) if blocks.count > 1 else None
        pixels = blocks.images * blocks.rows * grad.dy_shape[2]
        small = pixels * self.width * 4 <= PANEL_BYTES
        self.packed = (
            emit.local(pixels * self.width) if small and self.deep >= 2 * self.tile.mr else None
        )
        if blocks.count == 1:
            zero = tirx.const(0, "int32")
            self.block(blocks, zero, zero)
            return
        with T.serial(0, self.deep) as i:
            for start, lanes in self.vectors:
                emit.store(self.sums, i * self.width + start, emit.const(0.0, lanes), lanes)
        with T.serial(0, blocks.count) as b:
            n = T.bind(b // blocks.per_image * blocks.images)
            self.block(blocks, n, T.bind(b % blocks.per_image * blocks.rows))
        with T.serial(0, self.deep) as i:
            for start, lanes in self.vectors:
                self.finish(i, start, lanes, emit.load(self.sums, i * self.width + start, lanes))

    def finish(self, i: Expr, start: int, lanes: int, value: Expr) -> None:
        """Epilogue and store of one vector of dw."""
        grad = self.grad
        at = Position(grad.dw_shape, self.tap * grad.depth + self.first + i,
                      self.column0 + start, lanes)  # fmt: skip
        finish(self.ctx, {grad.dw: value}, at)

    def block(self, blocks: Blocks, n: Expr, row: Expr) -> None:
        """Add one block of pixels to the sums of all channels of the chunk."""
        oh = self.grad.dy_shape[1]
        end = tirx.Min(row + blocks.rows, tirx.const(oh, "int32"))
        if self.packed is not None:
            self.pack(blocks, n, row, T.bind(end))
        span = (
            T.bind(tirx.Max(row, self.row_span[0])),
            T.bind(tirx.Min(end, self.row_span[1])),
        )
        mr, tail = self.tile.mr, self.deep % self.tile.mr
        full = self.deep // mr
        if full:
            with T.serial(0, full) as t:
                self.panel_tile(blocks, n, row, span, T.bind(t * mr), mr)
        if tail:
            at = tirx.const(full * mr, "int32")
            self.panel_tile(blocks, n, row, span, at, tail)

    def pack(self, blocks: Blocks, n: Expr, row: Expr, end: Expr) -> None:
        """Copy dy's panel of the block to the stack."""
        _, oh, ow, o = self.grad.dy_shape
        with T.serial(0, blocks.images) as b, T.serial(0, (end - row) * ow) as p:
            source = ((n + b) * oh + row) * ow + p
            target = (b * (blocks.rows * ow) + p) * self.width
            for start, lanes in self.vectors:
                at = source * o + self.column0 + start
                emit.store(self.packed, target + start, self.ctx.load(self.grad.dy, at, lanes),
                           lanes)  # fmt: skip

    def panel_tile(
        self, blocks: Blocks, n: Expr, row: Expr, span: tuple[Expr, Expr], i: Expr, mr: int
    ) -> None:
        """One register tile over the pixels of the block."""
        grad = self.grad
        _, h, w, c = grad.x_shape
        _, oh, ow, o = grad.dy_shape
        acc = emit.local(mr * self.width)
        for r in range(mr):
            for start, lanes in self.vectors:
                value = (
                    emit.const(0.0, lanes) if self.sums is None
                    else emit.load(self.sums, (i + r) * self.width + start, lanes)
                )  # fmt: skip
                emit.store(acc, r * self.width + start, value, lanes)
        with T.serial(0, blocks.images) as b, T.serial(*span) as y:
            line = (n + b) * h + grad.rows.source(y, self.ky)
            x0 = T.bind(
                (line * w + grad.columns.source(0, self.kx)) * c
                + (self.group * grad.depth + self.first + i)
            )
            if self.packed is not None:
                d0 = T.bind(((b * blocks.rows + y - row) * ow) * self.width)
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
                    emit.store(self.sums, (i + r) * self.width + start, value, lanes)

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
