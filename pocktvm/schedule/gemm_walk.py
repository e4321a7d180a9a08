"""Products with a small C and a long sum, as the weight gradients of a network's first layers.

    C[M, N] = sum over k of A[k, M]^T B[k, N],   K in the thousands, C in the first-level cache

Both operands are walked once, in the order of memory: a block of some hundred k at a time, from
which every tile of C takes its sums while the lines of the next block are asked for. The form that
copies panels of B reads A again for every panel and B in pieces of a panel's width, which streams
half as fast from main memory as whole rows in order (24x144 from 8192 pixels: 0.55 ms instead of
1.0).

K is cut into strips, one a core, whose sums are added up in order: by the target, not by how many
threads run. Where lanes would stay empty along N but not along M, the tiles are those of C^T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import Context, const, load, store, vector_loop, vectors
from pocktvm.schedule.gemm import Gemm
from pocktvm.schedule.gemm_tile import UNROLL, Tile, tile_cost
from pocktvm.schedule.loops import ceil_div, grid, hands, tiles, zero
from pocktvm.schedule.prefetch import LINE, prefetch_lines, streams
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import T, tirx

Expr = Any


def walks(isa: Isa, gemm: Gemm) -> bool:
    """May the form apply: a plain A^T B whose C stays in the first-level cache?"""
    plain = gemm.transpose_a and not gemm.transpose_b and gemm.batch == 1 and not gemm.causal
    return plain and 4 * gemm.m * gemm.n <= isa.l1_bytes and gemm.k >= 512


def oriented(isa: Isa, gemm: Gemm) -> Gemm:
    """The product itself, or that of C^T where its tiles waste fewer lanes."""
    other = replace(gemm, a=gemm.b, b=gemm.a, m=gemm.n, n=gemm.m)
    return other if tile_cost(isa, other) < 0.95 * tile_cost(isa, gemm) else gemm


def walk_depth(isa: Isa, gemm: Gemm, nr: int) -> int:
    """The k of a block: the rows of A and a panel of B fill the first-level cache; a divisor of
    K's where there is one."""
    most = max(64, isa.l1_bytes // (4 * (gemm.m + nr))) // UNROLL * UNROLL
    return next((d for d in range(most, most // 2, -UNROLL) if gemm.k % d == 0), most)


@dataclass(frozen=True)
class Walk:
    """The tiles of one such product (`gemm` as oriented), and how its sum is cut."""

    gemm: Gemm
    whole: Gemm
    mr: int
    nr: int
    depth: int
    isa: Isa

    @classmethod
    def of(cls, gemm: Gemm, isa: Isa, mr: int, nr: int, depth: int) -> Walk:
        """The walk of a product with tiles of mr x nr."""
        inner = oriented(isa, gemm)
        return cls(inner, gemm, min(mr, inner.m), min(nr, inner.n), min(depth, gemm.k), isa)

    @property
    def swapped(self) -> bool:
        """Are the tiles those of C^T?"""
        return self.gemm is not self.whole

    @property
    def size(self) -> int:
        """Elements of C."""
        return self.gemm.m * self.gemm.n

    @cached_property
    def per_strip(self) -> int:
        """Whole blocks of a strip."""
        full = max(1, self.gemm.k // self.depth)
        return ceil_div(full, hands(self.isa, self.gemm.flops, full))

    @property
    def strips(self) -> int:
        """Independent parts of the sum."""
        return ceil_div(max(1, self.gemm.k // self.depth), self.per_strip)

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """The sums of every strip, and C where they are those of C^T."""
        return (((self.strips + self.swapped) * self.size, "float32"),)

    def emit(self, ctx: Context) -> None:
        """All strips, then their sum and the epilogue."""
        full, tail = divmod(self.gemm.k, self.depth)
        for (strip,) in grid((self.strips,), self.strips > 1):
            sums = T.bind(strip * self.size)
            self._clear(ctx, sums)
            first = T.bind(strip * self.per_strip)
            with T.serial(0, tirx.Min(full - first, self.per_strip)) as i:
                self._block(ctx, sums, T.bind((first + i) * self.depth), self.depth)
            if tail:
                with T.If(strip == self.strips - 1), T.Then():
                    self._block(ctx, sums, tirx.const(full * self.depth, "int32"), tail)
        self._finish(ctx)

    def _clear(self, ctx: Context, sums: Expr) -> None:
        for start, lanes in vector_loop(self.size, ctx.lanes):
            store(ctx.workspaces[0], sums + start, const(0.0, lanes), lanes)

    def _block(self, ctx: Context, sums: Expr, k0: Expr, depth: int) -> None:
        """sums += A[k0 : k0 + depth]^T B[k0 : k0 + depth]."""
        gemm, tile, buffer = self.gemm, Tile(ctx, self.gemm, zero()), ctx.workspaces[0]
        for column, width in tiles(gemm.n, self.nr):

            def read(k: Expr, c: int, w: int, column: Expr = column) -> Expr:
                return ctx.load(gemm.b, (k0 + k) * gemm.n + column + c, w)

            ahead = _Next(ctx, self, k0 + depth, column, depth)
            for row, rows in tiles(gemm.m, self.mr):
                acc = tile.accumulators(rows, width)
                tile.multiply(acc, row, rows, width, k0, depth, read, ahead)
                for r in range(rows):
                    for c, w in vectors(width, ctx.lanes):
                        at = sums + (row + r) * gemm.n + column + c
                        store(buffer, at, load(buffer, at, w) + load(acc, r * width + c, w), w)

    def _finish(self, ctx: Context) -> None:
        """The sum over strips, C's own order, and the epilogue."""
        buffer, gemm = ctx.workspaces[0], self.whole
        for start, lanes in vector_loop(self.size, ctx.lanes) if self.strips > 1 else ():
            total = load(buffer, start, lanes)
            for strip in range(1, self.strips):
                total = total + load(buffer, strip * self.size + start, lanes)
            store(buffer, start, total, lanes)
        at = 0
        if self.swapped:
            at = self.strips * self.size
            source = Matrix(buffer, zero(), gemm.m)
            copy_transposed(source, Matrix(buffer, at, gemm.n), gemm.n, gemm.m, ctx.lanes)
        tile = Tile(ctx, gemm, zero())
        for column, width in tiles(gemm.n, 4 * ctx.lanes):
            with T.serial(0, gemm.m) as r:
                pieces = vectors(width, ctx.lanes)
                tile.finish_row(buffer, at + r * gemm.n + column, r, column, pieces)


@dataclass(frozen=True)
class _Next:
    """The block of both operands from `k0` on, asked for in the order of memory while the panel
    at `column` of the block before, `depth` deep, is multiplied."""

    ctx: Context
    walk: Walk
    k0: Expr
    column: Expr
    depth: int

    def emit(self, row: Expr, k: Expr) -> None:
        """The share of one step: k of the tile that begins at `row`."""
        walk, gemm = self.walk, self.walk.gemm
        tiles_m, steps = ceil_div(gemm.m, walk.mr), self.depth // UNROLL
        tile = self.column // walk.nr * tiles_m + row // walk.mr
        step = T.bind(tile * steps + k // UNROLL)
        total = ceil_div(gemm.n, walk.nr) * tiles_m * steps
        for name, width in ((gemm.b, gemm.n), (gemm.a, gemm.m)):
            if streams(self.ctx.task, name):
                share = ceil_div(ceil_div(self.depth * width, LINE), total)
                at = self.k0 * width + step * (share * LINE)
                prefetch_lines(self.ctx, name, at, share)
