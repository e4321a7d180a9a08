"""The weight gradient of a 3x3 convolution by Winograd: 2.25 (m = 2) or 4 times fewer products.

    dw = G^T [ sum over tiles (B^T x B) * (A dy A^T) ] G

the transpose of the forward form. In the transformed domain every plane is one matrix product
X^T [channels x tiles] @ Y [tiles x outputs]. Tiles are taken in blocks: both sides of a block are
transformed, all threads multiply its planes, and the sums stay in the planes of U until the last
block; then each (input, output) pair's t^2 sums become nine values and meet the epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.emit import Context, const
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import balanced, ceil_div, grid, tile_at, tiles, worth_threads
from pocktvm.schedule.patches import Patches, Read, each_vector
from pocktvm.schedule.weight_grad import WeightGrad, choose_tile
from pocktvm.schedule.winograd_transforms import INPUT, OUTPUT_GRAD, WEIGHT_GRAD, both_ways
from pocktvm.tvm_api import T, tirx

Expr = Any
PAD = 16  # floats between planes, or they would all fall on the same cache sets
LEAST_TILES = 64  # of a block: how often a sum is loaded and stored
UNROLL = 4  # tiles written out in the products


@dataclass(frozen=True)
class WinogradWeightGrad:
    """One weight gradient and how it is cut."""

    grad: WeightGrad
    top: int
    left: int
    m: int
    isa: Isa

    @property
    def t(self) -> int:
        """Edge of an input tile."""
        return self.m + 2

    @property
    def across(self) -> tuple[int, int]:
        """Tiles along rows and columns of an image."""
        _, oh, ow, _ = self.grad.dy_shape
        return ceil_div(oh, self.m), ceil_div(ow, self.m)

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return self.grad.dy_shape[0] * math.prod(self.across)

    @property
    def parallel(self) -> bool:
        """Is it worth the threads?"""
        return worth_threads(self.isa, self.grad.macs / 2)

    @cached_property
    def register_tile(self) -> tuple[int, int]:
        """(input channels, output channels) of the products' register tile."""
        tile = choose_tile(self.grad, self.isa)
        return tile.mr, tile.nr

    @cached_property
    def block(self) -> int:
        """Tiles of a block: what fits the second-level caches, but enough to be worth the sums."""
        values = self.t**2 * (self.grad.depth + self.grad.width)
        cores = self.isa.cores if self.parallel else 1
        fit = cores * self.isa.l2_bytes // 2 // (4 * values)
        return balanced(self.tiles, max(LEAST_TILES, fit))

    @property
    def blocks(self) -> int:
        """Blocks of all tiles."""
        return ceil_div(self.tiles, self.block)

    @property
    def planes(self) -> tuple[int, int, int]:
        """Elements from one plane to the next, of X, Y and U."""
        c, o = self.grad.depth, self.grad.width
        return self.block * c + PAD, self.block * o + PAD, c * o + PAD

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """X, Y of a block and the sums U."""
        return tuple((self.t**2 * plane, "float32") for plane in self.planes)


def emit_winograd_weight_grad(ctx: Context, conv: WinogradWeightGrad) -> None:
    """The whole kernel, epilogue included."""
    planes, panels = conv.t**2, ceil_div(conv.grad.width, conv.register_tile[1])
    for block in _loop(conv.blocks):
        part = _Block(ctx, conv, block)
        for i in part.each():
            part.transform_x(i)
            part.transform_dy(i)
        for plane, panel in grid((planes, panels), conv.parallel):
            part.multiply(plane, panel)
    for (row,) in grid((conv.grad.depth,), conv.parallel):
        _finish_row(ctx, conv, row)


def _loop(count: int) -> Iterator[Expr]:
    if count == 1:
        yield tirx.const(0, "int32")
        return
    with T.serial(0, count) as i:
        yield i


@dataclass
class _Block:
    """Block number `number`: its tiles are [number * block, …), the last block may have fewer."""

    ctx: Context
    conv: WinogradWeightGrad
    number: Expr

    def __post_init__(self) -> None:
        conv = self.conv
        self.first = T.bind(self.number * conv.block)
        whole = conv.tiles % conv.block == 0
        left = tirx.Min(tirx.const(conv.block, "int32"), conv.tiles - self.first)
        self.count = tirx.const(conv.block, "int32") if whole else T.bind(left)
        grad = conv.grad
        self.x = Patches(grad.x, grad.x_shape, conv.t, conv.m, conv.across, conv.top, conv.left)
        self.dy = Patches(grad.dy, grad.dy_shape, conv.m, conv.m, conv.across)

    def each(self) -> Iterator[Expr]:
        """A loop over the tiles."""
        with (T.parallel if self.conv.parallel else T.serial)(0, self.count) as i:
            yield i

    def transform_x(self, i: Expr) -> None:
        """B^T x B of tile i, to [plane][tile][channel]."""

        def tile(c: Expr, lanes: int, read: Read) -> None:
            at = T.bind(i * self.conv.grad.depth + c)
            self._planes(INPUT[self.conv.m], self.conv.t, read, 0, at, lanes)

        self.x.visit(self.ctx, T.bind(self.first + i), tile)

    def transform_dy(self, i: Expr) -> None:
        """A dy A^T of tile i, to [plane][panel][tile][output]."""
        width, nr = self.conv.grad.width, self.conv.register_tile[1]

        def tile(c: Expr, lanes: int, read: Read) -> None:
            panel = T.bind(c // nr * nr)
            panel_width = tirx.Min(tirx.const(nr, "int32"), width - panel)
            at = T.bind(panel * self.conv.block + i * panel_width + (c - panel))
            self._planes(OUTPUT_GRAD[self.conv.m], self.conv.m, read, 1, at, lanes)

        self.dy.visit(self.ctx, T.bind(self.first + i), tile)

    def _planes(
        self, transform: Any, edge: int, read: Read, scratch: int, at: Expr, lanes: int
    ) -> None:
        def write(a: int, b: int, value: Expr) -> None:
            plane = (a * self.conv.t + b) * self.conv.planes[scratch]
            emit.store(self.ctx.workspaces[scratch], at + plane, value, lanes)

        both_ways(transform, edge, read, write, lanes)

    def multiply(self, plane: Expr, panel: Expr) -> None:
        """U[plane][:, panel] += X^T Y over the tiles of the block."""
        conv, (mr, nr) = self.conv, self.conv.register_tile
        px, py, pu = (T.bind(plane * size) for size in conv.planes)
        for column, width in tile_at(panel, conv.grad.width, nr):
            y = T.bind(py + column * conv.block)
            for row, rows in tiles(conv.grad.depth, mr):
                u = T.bind(pu + row * conv.grad.width + column)
                self._tile(T.bind(px + row), y, u, rows, width)

    def _tile(self, x: Expr, y: Expr, u: Expr, rows: int, width: int) -> None:
        ctx, stride = self.ctx, self.conv.grad.width
        sums = ctx.workspaces[2]
        acc = emit.local(rows * width)
        pieces = [(r, c, w) for r in range(rows) for c, w in emit.vectors(width, ctx.lanes)]
        for r, c, w in pieces:
            emit.store(acc, r * width + c, const(0.0, w), w)
        full = self.count // UNROLL
        with T.serial(0, full) as k:
            for step in range(UNROLL):
                self._product(acc, x, y, T.bind(k * UNROLL + step), rows, width)
        with T.serial(0, self.count - full * UNROLL) as k:
            self._product(acc, x, y, T.bind(full * UNROLL + k), rows, width)

        def put(add: bool) -> None:
            for r, c, w in pieces:
                value = emit.load(acc, r * width + c, w)
                at = u + r * stride + c
                emit.store(sums, at, value + emit.load(sums, at, w) if add else value, w)

        if self.conv.blocks == 1:
            put(False)
            return
        with T.If(self.number == 0):
            with T.Then():
                put(False)
            with T.Else():
                put(True)

    def _product(self, acc: Any, x: Expr, y: Expr, k: Expr, rows: int, width: int) -> None:
        """acc += x[tile k, rows]^T y[tile k, panel]."""
        ctx = self.ctx
        at = T.bind(x + k * self.conv.grad.depth)
        vectors = [
            (c, w, T.bind(emit.load(ctx.workspaces[1], y + k * width + c, w)))
            for c, w in emit.vectors(width, ctx.lanes)
        ]
        values = _broadcasts(ctx, ctx.workspaces[0], at, rows)
        for r in range(rows):
            for c, w, vector in vectors:
                i = r * width + c
                emit.store(acc, i, emit.load(acc, i, w) + values(r, w) * vector, w)


def _broadcasts(ctx: Context, source: Any, at: Expr, rows: int) -> Callable[[int, int], Expr]:
    """(r, lanes) -> source[at + r] in every lane; by lane where the target multiplies by one."""
    fours = rows // 4 if ctx.task.target.isa.lane_fma and ctx.lanes == 4 else 0
    quads = [T.bind(emit.load(source, at + 4 * q, 4)) for q in range(fours)]
    scalars = {r: T.bind(emit.load(source, at + r, 1)) for r in range(4 * fours, rows)}

    def value(r: int, lanes: int) -> Expr:
        if r < 4 * fours:
            return tirx.Shuffle([quads[r // 4]], [r % 4] * lanes)
        return emit.splat(scalars[r], lanes)

    return value


def _finish_row(ctx: Context, conv: WinogradWeightGrad, row: Expr) -> None:
    """G^T U G of one input channel, and the epilogue of its nine rows of dw."""
    grad, plane = conv.grad, conv.planes[2]

    def block(c: Expr, lanes: int) -> None:
        result = emit.local(9 * lanes)
        at = T.bind(row * grad.width + c)

        def read(a: int, b: int) -> Expr:
            return emit.load(ctx.workspaces[2], at + (a * conv.t + b) * plane, lanes)

        def write(a: int, b: int, value: Expr) -> None:
            emit.store(result, (3 * a + b) * lanes, value, lanes)

        both_ways(WEIGHT_GRAD[conv.m], conv.t, read, write, lanes)
        with T.serial(0, 9) as tap:
            value = T.bind(emit.load(result, tap * lanes, lanes))
            place = Position(grad.dw_shape, T.bind(tap * grad.depth + row), c, lanes)
            finish(ctx, {grad.dw: value}, place)

    each_vector(ctx, grad.width, block)
