"""Winograd convolution F(m x m, 3 x 3), for weights known at build time and for such that learn.

    y = A^T [ (G w G^T) * (B^T x B) ] A      (Lavin and Gray, 2015, arXiv 1509.09308)

A tile of t x t inputs, t = m + 2, gives m x m outputs; between the transforms stand t^2 matrix
products [tiles x channels] @ [channels x outputs], 2.25 (m = 2) or 4 (m = 4) times less work than
the direct sum. G w G^T is 1.8 or 4 times the weights' size; it is made at build time where it can
be, else first thing in the kernel (schedule/winograd_weights.py).

Tiles are taken in blocks. While the transformed weights fit the caches a block is one register
tile high and every worker has its own; larger ones are read once for many tiles, by all threads.
Borders: schedule/patches.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.dot import Dot, best_unroll, max_rows, tile_cycles
from pocktvm.schedule.emit import Context, const
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import balanced, ceil_div, grid, tile_at, tiles, workers, worth_threads
from pocktvm.schedule.patches import Patches, Read, each_vector
from pocktvm.schedule.winograd_transforms import INPUT, OUTPUT, both_ways
from pocktvm.schedule.winograd_weights import WeightTransform
from pocktvm.tvm_api import T, tirx

Expr = Any
OWN_BYTES = 2_500_000  # of transformed weights that are read again for every block
SHARED_TILES = 64  # of a block that all threads work on: 32 operations a byte of weights
PAD = 16  # floats between planes, or they would all fall on the same cache sets


@dataclass(frozen=True)
class Winograd:
    """One 3x3 convolution of stride 1 and how it is cut."""

    source: str
    weight: str
    result: str
    source_shape: tuple[int, ...]
    result_shape: tuple[int, ...]
    top: int  # zeros before the first row and column
    left: int
    m: int
    isa: Isa
    learned: tuple[int, ...] = ()  # HWIO of weights that learn; () where they are packed ahead
    swap: bool = False  # an input gradient: taps flipped, channel axes swapped

    @property
    def t(self) -> int:
        """Edge of an input tile."""
        return self.m + 2

    @property
    def depth(self) -> int:
        """Input channels."""
        return self.source_shape[3]

    @property
    def width(self) -> int:
        """Output channels."""
        return self.result_shape[3]

    @property
    def across(self) -> tuple[int, int]:
        """Tiles along rows and columns of an image."""
        _, oh, ow, _ = self.result_shape
        return ceil_div(oh, self.m), ceil_div(ow, self.m)

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return self.result_shape[0] * math.prod(self.across)

    @property
    def macs(self) -> int:
        """Multiply-adds of the direct sum, which is what the result is worth."""
        return 9 * math.prod(self.result_shape) * self.depth

    @property
    def weight_bytes(self) -> int:
        """Bytes of the transformed weights."""
        return 4 * self.t**2 * self.depth * self.width

    @cached_property
    def register_tile(self) -> tuple[int, int]:
        """(tiles, output channels) of the products' register tile."""
        lanes = self.isa.lanes
        best = (float("inf"), 1, lanes)
        count = len(emit.vectors(self.width, lanes))
        for v in range(1, min(count, 6) + 1):
            rows = min(max_rows(self.isa, v), self.tiles)
            if rows < 1:
                continue
            panels = [v] * (count // v) + ([count % v] if count % v else [])
            cycles = sum(tile_cycles(self.isa, rows, u) for u in panels) / rows
            best = min(best, (cycles, rows, v * lanes))
        return best[1], best[2]

    @property
    def parallel(self) -> bool:
        """Is it worth the threads?"""
        return worth_threads(self.isa, self.macs / 2)

    @cached_property
    def own(self) -> bool:
        """Does every worker take blocks of its own?"""
        rows, _ = self.register_tile
        return self.weight_bytes <= OWN_BYTES and self.tiles >= 2 * rows

    @cached_property
    def block(self) -> int:
        """How many tiles are transformed and multiplied together."""
        rows, _ = self.register_tile
        wish = ceil_div(12, rows) * rows if self.own else SHARED_TILES
        return balanced(self.tiles, wish)

    @property
    def blocks(self) -> int:
        """Blocks of all tiles."""
        return ceil_div(self.tiles, self.block)

    @property
    def workers(self) -> int:
        """Scratch areas: blocks that may be worked on at once."""
        return min(self.isa.cores, self.blocks) if self.own and self.parallel else 1

    @property
    def planes(self) -> tuple[int, int]:
        """Elements from one of the t^2 planes to the next, of inputs and of products."""
        return self.block * self.depth + PAD, self.block * self.width + PAD

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """Transformed inputs and products of all workers; transformed weights that learn."""
        sizes = [self.workers * self.t**2 * plane for plane in self.planes]
        sizes += [self.weight_bytes // 4] if self.learned else []
        return tuple((size, "float32") for size in sizes)

    @property
    def patches(self) -> Patches:
        """The overlapping input tiles."""
        return Patches(self.source, self.source_shape, self.t, self.m, self.across, self.top,
                       self.left)  # fmt: skip


def emit_winograd(ctx: Context, conv: Winograd) -> None:
    """The whole kernel, epilogue included."""
    v, p = (plane * conv.t**2 for plane in conv.planes)
    planes, panels = conv.t**2, ceil_div(conv.width, conv.register_tile[1])
    if conv.learned:
        WeightTransform(ctx, conv.weight, conv.learned, ctx.workspaces[2], conv.m,
                        conv.register_tile[1], conv.swap).emit(conv.parallel)  # fmt: skip
    if conv.own:
        for worker, (block,) in workers((conv.blocks,), conv.workers):
            part = _Block(ctx, conv, T.bind(block * conv.block), T.bind(worker * v),
                          T.bind(worker * p))  # fmt: skip
            for i in part.each(False):
                part.transform_input(i)
            for plane, panel in _nest(planes, panels):
                part.multiply(plane, panel)
            for i in part.each(False):
                part.transform_output(i)
        return
    with T.serial(0, conv.blocks) as block:
        part = _Block(ctx, conv, T.bind(block * conv.block), 0, 0)
        for i in part.each(conv.parallel):
            part.transform_input(i)
        for plane, panel in grid((planes, panels), conv.parallel):
            part.multiply(plane, panel)
        for i in part.each(conv.parallel):
            part.transform_output(i)


def _nest(planes: int, panels: int) -> Iterator[tuple[Expr, Expr]]:
    with T.serial(0, planes) as plane, T.serial(0, panels) as panel:
        yield plane, panel


@dataclass
class _Block:
    """Tiles [first, first + block), with its scratch at v0 (inputs) and p0 (products)."""

    ctx: Context
    conv: Winograd
    first: Expr
    v0: Expr
    p0: Expr

    def each(self, parallel: bool) -> Iterator[Expr]:
        """A loop over the tiles; the last block may have fewer."""
        count = tirx.Min(
            tirx.const(self.conv.block, "int32"), self.conv.tiles - self.first
        )
        whole = self.conv.tiles % self.conv.block == 0
        with (T.parallel if parallel else T.serial)(0, self.conv.block if whole else count) as i:
            yield i

    def transform_input(self, i: Expr) -> None:
        """B^T x B of one tile, every channel, to its row of the t^2 planes."""
        conv = self.conv

        def tile(c: Expr, lanes: int, read: Read) -> None:
            at = T.bind(self.v0 + i * conv.depth + c)

            def write(a: int, b: int, value: Expr) -> None:
                plane = (a * conv.t + b) * conv.planes[0]
                emit.store(self.ctx.workspaces[0], at + plane, value, lanes)

            both_ways(INPUT[conv.m], conv.t, read, write, lanes)

        conv.patches.visit(self.ctx, T.bind(self.first + i), tile)

    def multiply(self, plane: Expr, panel: Expr) -> None:
        """All tiles of the block times one panel of one plane of the weights."""
        conv, (mr, nr) = self.conv, self.conv.register_tile
        source = self.ctx.workspaces[2] if conv.learned else self.ctx.buffers[conv.weight]
        inputs = T.bind(self.v0 + plane * conv.planes[0])
        products = T.bind(self.p0 + plane * conv.planes[1])
        for column, width in tile_at(panel, conv.width, nr):
            weights = T.bind((plane * conv.width + column) * conv.depth)
            vectors = emit.vectors(width, self.ctx.lanes)
            for row, rows in tiles(conv.block, mr):
                acc = emit.local(rows * width)
                pieces = [(r * width + at, lanes) for r in range(rows) for at, lanes in vectors]
                for at, lanes in pieces:
                    emit.store(acc, at, const(0.0, lanes), lanes)
                dot = Dot(self.ctx, self.ctx.workspaces[0], source, acc,
                          vectors, width, [r * conv.depth for r in range(rows)],
                          best_unroll(conv.isa, 16))  # fmt: skip
                dot.emit(inputs + row * conv.depth, weights, conv.depth, range(rows))
                target = T.bind(products + row * conv.width + column)
                for at, lanes in pieces:
                    index = target + (at // width * conv.width + at % width)
                    emit.store(self.ctx.workspaces[1], index, emit.load(acc, at, lanes), lanes)

    def transform_output(self, i: Expr) -> None:
        """A^T p A of one tile, the epilogue, and the stores that lie inside the result."""
        conv, m = self.conv, self.conv.m
        _, oh, ow, _ = conv.result_shape
        n, ty, tx = conv.patches.place(T.bind(self.first + i))
        rows = T.bind(tirx.Min(tirx.const(m, "int32"), oh - ty * m))
        columns = T.bind(tirx.Min(tirx.const(m, "int32"), ow - tx * m))

        def block(c: Expr, lanes: int) -> None:
            result = emit.local(m * m * lanes)
            at = T.bind(self.p0 + i * conv.width + c)

            def read(a: int, b: int) -> Expr:
                plane = (a * conv.t + b) * conv.planes[1]
                return emit.load(self.ctx.workspaces[1], at + plane, lanes)

            def write(a: int, b: int, value: Expr) -> None:
                emit.store(result, (a * m + b) * lanes, value, lanes)

            both_ways(OUTPUT[m], conv.t, read, write, lanes)
            with T.serial(0, rows) as a, T.serial(0, columns) as b:
                value = T.bind(emit.load(result, (a * m + b) * lanes, lanes))
                pixel = T.bind((n * oh + ty * m + a) * ow + tx * m + b)
                at_pixel = Position(conv.result_shape, pixel, c, lanes)
                finish(self.ctx, {conv.result: value}, at_pixel)

        each_vector(self.ctx, conv.width, block)
