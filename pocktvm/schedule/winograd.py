"""Winograd convolution F(m x m, 3 x 3) for weights known at build time.

    y = A^T [ (G w G^T) * (B^T x B) ] A      (Lavin and Gray, 2015, arXiv 1509.09308)

A tile of t x t inputs, t = m + 2, gives m x m outputs; between the transforms stand t^2 matrix
products [tiles x channels] @ [channels x outputs], 2.25 (m = 2) or 4 (m = 4) times less work than
the direct sum. G w G^T is made at build time and is 1.8 or 4 times the weights' size.

Tiles are taken in blocks. While the transformed weights fit the caches a block is one register
tile high and every worker has its own; larger ones are read once for many tiles, by all threads.
Borders: a tile that reaches over the edge is first copied to the stack with zeros around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import each_block
from pocktvm.schedule.dot import Dot, best_unroll, max_rows, tile_cycles
from pocktvm.schedule.emit import Context, const
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import grid, tile_at, tiles, workers, worth_threads
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
        return -(-oh // self.m), -(-ow // self.m)

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
        """Of the transformed weights."""
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
        """Tiles of a block."""
        rows, _ = self.register_tile
        wish = -(-12 // rows) * rows if self.own else SHARED_TILES
        return -(-self.tiles // -(-self.tiles // wish))

    @property
    def blocks(self) -> int:
        """Blocks of all tiles."""
        return -(-self.tiles // self.block)

    @property
    def workers(self) -> int:
        """Scratch areas."""
        return min(self.isa.cores, self.blocks) if self.own and self.parallel else 1

    @property
    def planes(self) -> tuple[int, int]:
        """Elements from one of the t^2 planes to the next, of inputs and of products."""
        return self.block * self.depth + PAD, self.block * self.width + PAD

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """Transformed inputs and products, of all workers."""
        return tuple((self.workers * self.t**2 * plane, "float32") for plane in self.planes)


def emit_winograd(ctx: Context, conv: Winograd) -> None:
    """The whole kernel, epilogue included."""
    v, p = (plane * conv.t**2 for plane in conv.planes)
    planes, panels = conv.t**2, -(-conv.width // conv.register_tile[1])
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

    def place(self, i: Expr) -> tuple[Expr, Expr, Expr]:
        """(image, tile row, tile column) of tile i."""
        down, across = self.conv.across
        g = T.bind(self.first + i)
        return T.bind(g // (down * across)), T.bind(g // across % down), T.bind(g % across)

    def transform_input(self, i: Expr) -> None:
        """B^T x B of one tile, every channel, to its row of the t^2 planes."""
        conv, t = self.conv, self.conv.t
        _, h, w, c = conv.source_shape
        n, ty, tx = self.place(i)
        y, x = T.bind(ty * conv.m - conv.top), T.bind(tx * conv.m - conv.left)
        corner = T.bind(((n * h + y) * w + x) * c)

        def inside(at: Expr, lanes: int) -> None:
            self.scatter(i, at, lanes, lambda a, b: self.ctx.load(
                conv.source, corner + ((a * w + b) * c + at), lanes))  # fmt: skip

        def border(at: Expr, lanes: int) -> None:
            copy = emit.local(t * t * lanes)
            with T.serial(0, t) as a, T.serial(0, t) as b:
                rows = tirx.And(y + a >= 0, y + a < h)
                with T.If(tirx.And(rows, tirx.And(x + b >= 0, x + b < w))):
                    with T.Then():
                        value = self.ctx.load(
                            conv.source, corner + ((a * w + b) * c + at), lanes
                        )
                        emit.store(copy, (a * t + b) * lanes, value, lanes)
                    with T.Else():
                        emit.store(copy, (a * t + b) * lanes, const(0.0, lanes), lanes)
            self.scatter(i, at, lanes, lambda a, b: emit.load(copy, (a * t + b) * lanes, lanes))

        rows = tirx.And(y >= 0, y + t <= h)
        with T.If(tirx.And(rows, tirx.And(x >= 0, x + t <= w))):
            with T.Then():
                self.channels(conv.depth, inside)
            with T.Else():
                self.channels(conv.depth, border)

    def scatter(self, i: Expr, c: Expr, lanes: int, read: Callable[[int, int], Expr]) -> None:
        """Transform what `read(row, column)` gives and store it to the planes."""
        conv, t = self.conv, self.conv.t
        transform = _input4 if conv.m == 4 else _input2
        middle = emit.local(t * t * lanes)
        for b in range(t):
            for a, value in enumerate(transform([read(a, b) for a in range(t)], lanes)):
                emit.store(middle, (a * t + b) * lanes, value, lanes)
        at = T.bind(self.v0 + i * conv.depth + c)
        for a in range(t):
            row = [emit.load(middle, (a * t + b) * lanes, lanes) for b in range(t)]
            for b, value in enumerate(transform(row, lanes)):
                plane = (a * t + b) * conv.planes[0]
                emit.store(self.ctx.workspaces[0], at + plane, value, lanes)

    def multiply(self, plane: Expr, panel: Expr) -> None:
        """All tiles of the block times one panel of one plane of the weights."""
        conv, (mr, nr) = self.conv, self.conv.register_tile
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
                dot = Dot(self.ctx, self.ctx.workspaces[0], self.ctx.buffers[conv.weight], acc,
                          vectors, width, [r * conv.depth for r in range(rows)],
                          best_unroll(conv.isa, 16))  # fmt: skip
                dot.emit(inputs + row * conv.depth, weights, conv.depth, range(rows))
                target = T.bind(products + row * conv.width + column)
                for at, lanes in pieces:
                    index = target + (at // width * conv.width + at % width)
                    emit.store(self.ctx.workspaces[1], index, emit.load(acc, at, lanes), lanes)

    def transform_output(self, i: Expr) -> None:
        """A^T p A of one tile, the epilogue, and the stores that lie inside the result."""
        conv, t, m = self.conv, self.conv.t, self.conv.m
        _, oh, ow, _ = conv.result_shape
        n, ty, tx = self.place(i)
        rows = T.bind(tirx.Min(tirx.const(m, "int32"), oh - ty * m))
        columns = T.bind(tirx.Min(tirx.const(m, "int32"), ow - tx * m))
        transform = _output4 if m == 4 else _output2

        def block(c: Expr, lanes: int) -> None:
            middle, result = emit.local(m * t * lanes), emit.local(m * m * lanes)
            at = T.bind(self.p0 + i * conv.width + c)
            for b in range(t):
                column = [
                    emit.load(self.ctx.workspaces[1], at + (a * t + b) * conv.planes[1], lanes)
                    for a in range(t)
                ]
                for a, value in enumerate(transform(column, lanes)):
                    emit.store(middle, (a * t + b) * lanes, value, lanes)
            for a in range(m):
                row = [emit.load(middle, (a * t + b) * lanes, lanes) for b in range(t)]
                for b, value in enumerate(transform(row, lanes)):
                    emit.store(result, (a * m + b) * lanes, value, lanes)
            with T.serial(0, rows) as a, T.serial(0, columns) as b:
                value = T.bind(emit.load(result, (a * m + b) * lanes, lanes))
                pixel = T.bind((n * oh + ty * m + a) * ow + tx * m + b)
                at_pixel = Position(conv.result_shape, pixel, c, lanes)
                finish(self.ctx, {conv.result: value}, at_pixel)

        self.channels(conv.width, block)

    def channels(self, count: int, body: Callable[[Expr, int], None]) -> None:
        """A loop over channel vectors."""

        def pieces(c: Expr, vectors: Sequence[tuple[int, int]]) -> None:
            for start, lanes in vectors:
                body(c + start, lanes)

        each_block(count, self.ctx.lanes, 1, pieces)


def _input2(d: list[Expr], lanes: int) -> list[Expr]:
    d = [T.bind(v) for v in d]
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output2(d: list[Expr], lanes: int) -> list[Expr]:
    d = [T.bind(v) for v in d]
    return [d[0] + d[1] + d[2], d[1] - d[2] - d[3]]


def _input4(d: list[Expr], lanes: int) -> list[Expr]:
    d = [T.bind(v) for v in d]
    two, four, five = (const(v, lanes) for v in (2.0, 4.0, 5.0))
    a, b = T.bind(d[4] - four * d[2]), T.bind(d[3] - four * d[1])
    c, e = T.bind(d[4] - d[2]), T.bind(two * (d[3] - d[1]))
    return [
        four * d[0] - five * d[2] + d[4], a + b, a - b, c + e, c - e,
        four * d[1] - five * d[3] + d[5],
    ]  # fmt: skip


def _output4(d: list[Expr], lanes: int) -> list[Expr]:
    d = [T.bind(v) for v in d]
    two, four, eight = (const(v, lanes) for v in (2.0, 4.0, 8.0))
    a, b = T.bind(d[1] + d[2]), T.bind(d[1] - d[2])
    c, e = T.bind(d[3] + d[4]), T.bind(d[3] - d[4])
    return [d[0] + a + c, b + two * e, a + four * c, b + eight * e + d[5]]
