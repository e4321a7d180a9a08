"""The register tile of a matrix product: MR rows x NR columns of C held in registers.

A enters as one scalar a row, broadcast (or, with `fmla` by lane, four values of k as one vector and
a lane of it); B as vectors along N, from wherever its panel lies. Accumulators are a flat local
buffer with constant indices: LLVM keeps them in registers as long as MR * NR / lanes stays below
what the target has (7x16 on 16 registers spills and is 2 to 3 times slower).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.dot import tile_cycles
from pocktvm.schedule.emit import (
    Context,
    const,
    load,
    local,
    splat,
    store,
    vectors,
)
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.gemm import Gemm
from pocktvm.schedule.loops import balanced, ceil_div
from pocktvm.schedule.prefetch import Asker, prefetch_epilogue
from pocktvm.schedule.transpose import Matrix
from pocktvm.tvm_api import T, tirx

Expr = Any
ReadB = Callable[[Expr, int, int], Expr]  # (k, column within the panel, width) -> vector
UNROLL = 4  # of the k loop


def register_tile(isa: Isa, gemm: Gemm, packed: bool = True) -> tuple[int, int]:
    """(MR, NR) that fill the registers without spilling, shrunk to the problem.

    16 registers: 6 rows x 2 vectors; 32: 8 x 3, 6 x 4 or 12 x 2, whatever suits M and N (12 rows of
    A a power of two apart are more than a cache set holds: 12 % slower); NEON by lanes 7 x 3, or
    8 x 3 where A is read transposed (instructions per FMA 1.21 and 1.13; 6 x 4 spills).
    A B that is not `packed` prefers 3 vectors: the copy of its panel stays in the L2 at a depth
    where 4 would need two (K = 768, B transposed: 111 against 109 GFLOP/s; K = 288: 109, 102).
    """
    budget = 24 if isa.vector_registers >= 32 else 12
    if isa.lane_fma and not gemm.transpose_a:
        budget = 21
    vectors_n = ceil_div(gemm.n, isa.lanes)
    if isa.lane_fma or isa.vector_registers < 32:
        wide = (3, 2, 4) if isa.lane_fma else (2, 3)
        nv = next((v for v in wide if vectors_n % v == 0), wide[0])
    else:
        whole_rows = _writes_most(isa, gemm)
        widths = (3, 4, 2, 5, 6) if whole_rows else (3, 4, 2)
        cost = {v: _cycles(isa, gemm.m, vectors_n, budget // v, v) for v in widths}
        if whole_rows:
            cost[5], cost[6] = 0.99 * cost[5], 0.99 * cost[6]
        elif not packed:
            cost[3] *= 0.98
        nv = min(cost, key=lambda v: (cost[v], v))
    if gemm.m * nv < budget:  # few rows: more columns keep the pipeline full
        nv = min(max(nv, budget // gemm.m), 16)
    nv = balanced(vectors_n, nv)
    mr = max(1, min(gemm.m, budget // nv, 14))
    if gemm.m <= 20 * mr:
        mr = balanced(gemm.m, mr)
    return mr, nv * isa.lanes


def _writes_most(isa: Isa, gemm: Gemm) -> bool:
    """Is C beyond the caches and K so short that writing it takes long? Tiles of whole rows then
    write it in the order of memory (16 to 96 channels: 4x96 is 5 % faster than 8x48)."""
    return gemm.k <= 64 and 4 * gemm.m * gemm.n > isa.l2_bytes and not gemm.transpose_a


def tile_cost(isa: Isa, gemm: Gemm) -> float:
    """Cycles of one k over the whole of C, in the register tiles of `register_tile`."""
    mr, nr = register_tile(isa, gemm, False)
    return _cycles(isa, gemm.m, ceil_div(gemm.n, isa.lanes), mr, nr // isa.lanes)


def _cycles(isa: Isa, m: int, vectors_n: int, rows: int, v: int) -> float:
    """Cycles of one k over the whole of C, tails included (dot.tile_cycles)."""
    rows = min(rows, m)
    heights = [(rows, m // rows), (m % rows, 1)] if m % rows else [(rows, m // rows)]
    widths = [(v, vectors_n // v), (vectors_n % v, 1)] if vectors_n % v else [(v, vectors_n // v)]
    return sum(tile_cycles(isa, r, w) * i * j for r, i in heights for w, j in widths)


@dataclass
class Tile:
    """Emits tiles of one product. `batch` is the index expression of the batch entry; `source`
    is what stands for A, stored as A is, where that is not the operand itself."""

    ctx: Context
    gemm: Gemm
    batch: Expr
    source: Matrix | None = None

    def accumulators(self, rows: int, width: int) -> Any:
        """Zeroed registers for rows x width."""
        acc = local(rows * width)
        for r in range(rows):
            for c, w in vectors(width, self.ctx.lanes):
                store(acc, r * width + c, const(0.0, w), w)
        return acc

    def multiply(
        self, acc: Any, row: Expr, rows: int, width: int, k0: Expr, extent: int, read_b: ReadB,
        ahead: Asker | None = None,
    ) -> None:  # fmt: skip
        """acc += A[row : row + rows, k0 : k0 + extent] B[that k, the panel]; read_b counts k from
        k0. `ahead`: what to ask memory for meanwhile."""
        pieces = vectors(width, self.ctx.lanes)
        for k, unroll in self._steps(row, rows, extent):
            if ahead is not None and unroll == UNROLL:
                ahead.emit(row, k)
            broadcasts = self._broadcasts(row, rows, k0 + k, unroll)
            for u in range(unroll):
                columns = [(c, w, T.bind(read_b(k + u, c, w))) for c, w in pieces]
                for r in range(rows):
                    for c, w, b in columns:
                        i = r * width + c
                        store(acc, i, load(acc, i, w) + broadcasts(r, u, w) * b, w)

    def _steps(self, row: Expr, rows: int, extent: int) -> Iterator[tuple[Expr, int]]:
        """k_blocks, without those where all of these rows of A are zero."""
        gemm = self.gemm
        if gemm.causal != "a" or extent != gemm.k or extent % UNROLL:
            yield from k_blocks(extent, UNROLL)
            return
        first, stop = 0, extent // UNROLL
        if gemm.transpose_a:
            first = tirx.Min(stop, row // UNROLL)
        else:
            stop = tirx.Min(stop, (row + rows + UNROLL - 1) // UNROLL)
        with T.serial(first, stop) as i:
            yield i * UNROLL, UNROLL

    def wanted(self, row: Expr, rows: int, column: Expr) -> Iterator[None]:
        """Once: around what computes a tile of C, a branch where it may lie above the diagonal."""
        if self.gemm.causal != "result":
            yield
            return
        with T.If(column < row + rows), T.Then():
            yield

    def _broadcasts(
        self, row: Expr, rows: int, k: Expr, unroll: int
    ) -> Callable[[int, int, int], Expr]:
        """(row, step, width) -> the element of A in every lane."""
        gemm, ctx, a = self.gemm, self.ctx, self._operand()

        def read(index: Expr, width: int) -> Expr:  # a context may read an operand elsewhere
            if self.source is None:
                return ctx.load(gemm.a, index, width)
            return load(a.buffer, index, width)

        by_lane = ctx.task.target.isa.lane_fma and ctx.lanes == 4
        if by_lane and not gemm.transpose_a and unroll == 4:

            def from_k(r: int, u: int, w: int) -> Expr:
                values = read(a.index(row + r, k), 4)
                return tirx.Shuffle([values], [u] * w)

            return from_k
        fours = rows // 4 * 4 if by_lane and gemm.transpose_a else 0
        cache: dict[tuple[int, int], Expr] = {}

        def scalar(r: int, u: int, w: int) -> Expr:
            if r < fours:
                four = read(a.index(k + u, row + r // 4 * 4), 4)
                return tirx.Shuffle([four], [r % 4] * w)
            if (r, u) not in cache:
                at = a.index(k + u, row + r) if gemm.transpose_a else a.index(row + r, k + u)
                cache[r, u] = T.bind(read(at, 1))
            return splat(cache[r, u], w)

        return scalar

    def _operand(self) -> Matrix:
        """A as it is stored."""
        if self.source is not None:
            return self.source
        gemm = self.gemm
        start = self.batch * (gemm.m * gemm.k) if gemm.a_batched else 0
        buffer = self.ctx.buffers[gemm.a]
        return Matrix(buffer, start, gemm.m if gemm.transpose_a else gemm.k)

    def position(self, row: Expr, column: Expr, width: int) -> Position:
        """Where C[row, column] lies in the anchor's output."""
        shape = self.ctx.task.shape(self.gemm.c)
        if self.gemm.batch > 1:
            row = self.batch * self.gemm.m + row
        return Position(shape, row, column, width)

    def prefetch(
        self, row: Expr, rows: int, column: Expr, width: int, streamed: Sequence[str] = ()
    ) -> None:
        """Ask for what the epilogue of a tile will touch, but for what is `streamed`."""
        for r in range(rows):
            at = self.position(row + r, column, width)
            prefetch_epilogue(self.ctx, self.gemm.c, at, streamed)

    def finish(self, acc: Any, row: Expr, rows: int, column: Expr, width: int) -> None:
        """The epilogue on registers: unrolled when light, else a loop over rows of a copy."""
        pieces = vectors(width, self.ctx.lanes)
        if rows == 1 or epilogue_cost(self.ctx.task.node.body) * rows * len(pieces) <= 150:
            for r in range(rows):
                self.finish_row(acc, r * width, row + r, column, pieces)
            return
        staged = local(rows * width)
        for r in range(rows):
            for c, w in pieces:
                store(staged, r * width + c, load(acc, r * width + c, w), w)
        with T.serial(0, rows) as r:
            self.finish_row(staged, r * width, row + r, column, pieces)

    def finish_row(
        self, acc: Any, at: Expr, row: Expr, column: Expr, pieces: Sequence[tuple[int, int]]
    ) -> None:
        """The epilogue of one row of C, from `at` in a buffer."""
        for c, w in pieces:
            place = self.position(row, column + c, w)
            finish(self.ctx, {self.gemm.c: T.bind(load(acc, at + c, w))}, place)


def k_blocks(extent: int, unroll: int) -> Iterator[tuple[Expr, int]]:
    """(start, steps) inside emitted loops: `unroll` steps at a time, then the rest."""
    full = extent // unroll
    if full == 1:
        yield tirx.const(0, "int32"), unroll
    elif full:
        with T.serial(0, full) as i:
            yield i * unroll, unroll
    if extent % unroll:
        yield tirx.const(full * unroll, "int32"), extent % unroll


LIGHT = frozenset(
    "add subtract multiply maximum minimum relu relu6 relu_grad relu6_grad clip copy negative "
    "square where greater less abs reshape pack_mask apply_mask".split()
)


def epilogue_cost(body: Sequence[Any]) -> int:
    """Roughly how many instructions a vector the elementwise nodes take."""
    return 1 + sum(1 if node.op in LIGHT else 12 for node in body)
