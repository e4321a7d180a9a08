"""The register-tile forms of a matrix product: independent tasks, each some tiles of C.

Where B comes from: *packed* panels [panel][K][NR] of a constant; *direct*, read in place; *local*,
a panel copied K block by K block to a worker's scratch; *copied*, all of its panels in scratch
before the first task. Tasks are tiles of C, so sums never depend
on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.emit import Context, const, load, store, vectors
from pocktvm.schedule.gemm import Gemm
from pocktvm.schedule.gemm_tile import UNROLL, ReadB, Tile
from pocktvm.schedule.loops import (
    balanced,
    ceil_div,
    chunk_tiles,
    grid,
    tile_at,
    tiles,
    unflatten,
    workers,
    worth_threads,
    zero,
)
from pocktvm.schedule.prefetch import Ahead, RowsAhead, row_streams, worthwhile
from pocktvm.schedule.rule import Pack, Task
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import T, tirx

Expr = Any
COPY_COST = 32  # of an element of B, in operations of a product
PARTIAL_BYTES = 24 * 1024  # of a worker's partial sums when K takes several blocks


class Tiled:
    """The register-tile forms: `tasks` independent pieces of work, emitted by `tile`."""

    def __init__(
        self, task: Task, gemm: Gemm, mr: int, nr: int, order: str, kc: int, form: str,
        beside: int = 1,
    ) -> None:  # fmt: skip
        self.gemm, self.mr, self.nr = gemm, min(mr, gemm.m), min(nr, gemm.n)
        self.order, self.form, self.isa, self.beside = order, form, task.target.isa, beside
        self.parallel = worth_threads(self.isa, gemm.flops * beside)
        self.panels = ceil_div(gemm.n, self.nr)
        self.depth, self.blocks = min(kc, gemm.k), ceil_div(gemm.k, kc)
        most = gemm.m
        if form == "local" and self.blocks > 1:
            room = max(PARTIAL_BYTES, self.isa.l2_bytes // 4)  # fewer chunks copy B less often
            most = max(self.mr, room // (4 * self.nr))
        self.chunk = self._row_chunk(most)
        self.extents = (gemm.batch, self.panels, ceil_div(gemm.m, self.chunk))
        self.workers = min(self.isa.cores, math.prod(self.extents)) if self.parallel else 1

    @property
    def grid(self) -> tuple[int, ...]:
        """What the tasks count: batch, panels and chunks of rows; or batch and tiles of rows."""
        if self.form != "local" and self.order == "rows":
            return self.gemm.batch, ceil_div(self.gemm.m, self.mr)
        return self.extents

    @property
    def tasks(self) -> int:
        """How many independent pieces of work there are."""
        return math.prod(self.grid)

    def emit(self, ctx: Context) -> None:
        """All tasks; where each needs scratch, dealt out to workers."""
        if self.form == "local":
            for worker, (flat,) in workers((self.tasks,), self.workers):
                self.tile(ctx, flat, worker)
            return
        if self.form == "copied":
            self._copy_panels(ctx)
        if self.order == "rows":
            for (flat,) in grid((self.tasks,), self.parallel):
                self.tile(ctx, flat, zero())
            return
        for batch, p, c in self._panel_tasks():
            self._streamed(Tile(ctx, self.gemm, batch), p, c)

    def tile(self, ctx: Context, flat: Expr, worker: Expr) -> None:
        """Write task number `flat`, done by `worker`."""
        indices = unflatten(flat, self.grid)
        if self.form == "local":
            self._local(Tile(ctx, self.gemm, indices[0]), indices[1], indices[2], worker)
        else:
            self._streamed(Tile(ctx, self.gemm, indices[0]), *indices[1:])

    def packs(self, task: Task) -> dict[int, Pack]:
        """How a frozen B is stored."""
        if self.form != "packed":
            return {}
        layout = {"nr": self.nr, "transpose": self.gemm.transpose_b}
        return {task.node.inputs.index(self.gemm.b): Pack("panels", layout)}

    def _streamed(self, tile: Tile, first: Expr, chunk: Expr = None) -> None:
        """B read where it lies, packed or not; every tile runs over the whole of K."""
        gemm = self.gemm
        if chunk is None:
            for row, rows in tile_at(first, gemm.m, self.mr):
                for column, width in tiles(gemm.n, self.nr):
                    self._whole(tile, row, rows, column, width)
            return
        for column, width in tile_at(first, gemm.n, self.nr):
            for row, rows in chunk_tiles(chunk, gemm.m, self.chunk, self.mr):
                self._whole(tile, row, rows, column, width)

    def _panel_tasks(self) -> Iterator[tuple[Expr, Expr, Expr]]:
        """Batch entry, panel and chunk of rows of every task; one chunk a core, chunks outside,
        where that shares the work out more evenly: each core gets a run of consecutive tasks."""
        gemm, cores = self.gemm, self.isa.cores
        batch, panels, chunks = self.extents
        widths = [min(self.nr, gemm.n - p * self.nr) for p in range(panels)]
        heights = [min(self.chunk, gemm.m - c * self.chunk) for c in range(chunks)]
        share = ceil_div(ceil_div(gemm.m, self.mr), cores) * self.mr
        if self.parallel and batch == 1:
            longest = longest_share([w * h for w in widths for h in heights], cores)
            if share * gemm.n < 0.95 * longest:
                self.chunk = share
                for c, p in grid((ceil_div(gemm.m, share), panels), True):
                    yield zero(), p, c
                return
        for batch, p, c in grid(self.extents, self.parallel):
            yield batch, p, c

    def _row_chunk(self, most: int) -> int:
        """Rows a task takes, so that there are a few tasks a core."""
        tasks = self.panels * self.gemm.batch * self.beside
        wanted = ceil_div(4 * self.isa.cores, tasks) if self.parallel else 1
        tiles_m = ceil_div(self.gemm.m, self.mr)
        chunk = max(1, ceil_div(tiles_m, wanted)) * self.mr
        return balanced_multiple(self.gemm.m, min(chunk, most), self.mr)

    def _whole(self, tile: Tile, row: Expr, rows: int, column: Expr, width: int) -> None:
        gemm, ctx = self.gemm, tile.ctx
        base = tile.batch * (gemm.k * gemm.n) if gemm.b_batched else zero()

        def read(k: Expr, c: int, w: int) -> Expr:
            if self.form == "copied":
                return load(ctx.workspaces[0], column * gemm.k + k * width + c, w)
            if self.form == "packed":
                return ctx.load(gemm.b, base + column * gemm.k + k * width + c, w)
            return ctx.load(gemm.b, base + k * gemm.n + column + c, w)

        if self.order == "rows":
            self._all_of_k(tile, row, rows, column, width, read, self._rows_ahead(tile, column))
        else:
            ahead = self._ahead(tile, column, zero(), gemm.k)
            self._all_of_k(tile, row, rows, column, width, read, ahead)

    def _all_of_k(
        self, tile: Tile, row: Expr, rows: int, column: Expr, width: int, read: ReadB,
        ahead: Ahead | RowsAhead | None,
    ) -> None:  # fmt: skip
        """One tile of C, epilogue included."""
        streamed = ahead.names if isinstance(ahead, RowsAhead) else ()
        for _ in tile.wanted(row, rows, column):
            tile.prefetch(row, rows, column, width, streamed)
            acc = tile.accumulators(rows, width)
            tile.multiply(acc, row, rows, width, zero(), self.gemm.k, read, ahead)
            tile.finish(acc, row, rows, column, width)

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """The scratch of all workers, or the one copy of B."""
        if self.form == "copied":
            return ((self.gemm.k * self.gemm.n, "float32"),)
        return tuple((self.workers * size, "float32") for size in self.scratch)

    @property
    def scratch(self) -> tuple[int, ...]:
        """Elements a worker: a block of a panel, and the partial sums when K takes several."""
        if self.form != "local":
            return ()
        return (self.depth * self.nr, *([self.chunk * self.nr] if self.blocks > 1 else []))

    def _copy_panels(self, ctx: Context) -> None:
        """All of B to its panels in scratch, by all threads where that pays."""
        gemm, tile = self.gemm, Tile(ctx, self.gemm, zero())
        parallel = self.parallel and worth_threads(self.isa, COPY_COST * gemm.k * gemm.n)
        for (p,) in grid((self.panels,), parallel):
            for column, width in tile_at(p, gemm.n, self.nr):
                panel = Panel(ctx.workspaces[0], column * gemm.k, width)
                self._pack(tile, panel, column, zero(), gemm.k)

    def _local(self, tile: Tile, p: Expr, c: Expr, worker: Expr) -> None:
        """Every task packs its panel of B; one block of K, or several with partial sums."""
        gemm, ctx = self.gemm, tile.ctx
        at = worker * (self.depth * self.nr)
        for column, width in tile_at(p, gemm.n, self.nr):
            panel = Panel(ctx.workspaces[0], at, width)
            if self.blocks == 1:
                self._pack(tile, panel, column, zero(), gemm.k)
                self._one_block(tile, panel, c, column)
            else:
                base = worker * (self.chunk * self.nr)
                self._many_blocks(tile, panel, Panel(ctx.workspaces[1], base, width), c, column)

    def _one_block(self, tile: Tile, panel: Panel, chunk: Expr, column: Expr) -> None:
        rows_ahead = self._rows_ahead(tile, column) if self.panels == 1 else None
        ahead = rows_ahead or self._ahead(tile, column, zero(), self.gemm.k)
        for row, rows in chunk_tiles(chunk, self.gemm.m, self.chunk, self.mr):
            self._all_of_k(tile, row, rows, column, panel.width, panel.load, ahead)

    def _many_blocks(
        self, tile: Tile, panel: Panel, partial: Panel, chunk: Expr, column: Expr
    ) -> None:
        width, gemm = panel.width, self.gemm
        pieces = vectors(width, tile.ctx.lanes)
        start = chunk * self.chunk
        count = tirx.Min(self.chunk, gemm.m - start)
        with T.serial(0, count) as r:
            for c, w in pieces:
                partial.store(r, c, const(0.0, w), w)
        for k0, depth in tiles(gemm.k, self.depth):
            self._pack(tile, panel, column, k0, depth)
            ahead = self._ahead(tile, column, k0, depth)
            for row, rows in chunk_tiles(chunk, gemm.m, self.chunk, self.mr):
                acc = tile.accumulators(rows, width)
                tile.multiply(acc, row, rows, width, k0, depth, panel.load, ahead)
                for r in range(rows):
                    for c, w in pieces:
                        value = partial.load(row - start + r, c, w) + load(acc, r * width + c, w)
                        partial.store(row - start + r, c, value, w)
        with T.serial(0, count) as r:
            tile.finish_row(partial.buffer, partial.at + r * width, start + r, column, pieces)

    def _rows_ahead(self, tile: Tile, column: Expr) -> RowsAhead | None:
        """The next rows of A and of C, where a task takes all of C's columns."""
        gemm, steps = self.gemm, self.gemm.k // UNROLL
        if gemm.batch > 1 or gemm.transpose_a or not steps:
            return None
        found = row_streams(tile.ctx, gemm.a, gemm.c, gemm.k, gemm.n)
        panel = column // self.nr
        if not found:
            return None
        return RowsAhead(tile.ctx, found, self.mr, panel, self.panels, steps, UNROLL)

    def _ahead(self, tile: Tile, column: Expr, k0: Expr, depth: int) -> Ahead | None:
        """The block of B this worker reads after [k0 : k0 + depth] of the panel at `column`."""
        gemm = self.gemm
        steps = depth // UNROLL
        if gemm.b_batched or not steps or not worthwhile(tile.ctx, gemm.b):
            return None
        alone = self.form == "local" and self.extents[2] == 1
        after = column + (self.workers if alone else 1) * self.nr
        rows, columns, stride = depth, self.nr, gemm.n
        at = after
        if self.form == "packed":
            rows, columns, stride, at = 1, depth * self.nr, 0, after * gemm.k
        elif gemm.transpose_b:
            rows, columns, stride, at = self.nr, depth, gemm.k, after * gemm.k
        if depth < gemm.k:
            below = k0 + depth
            down = column * gemm.k + below if gemm.transpose_b else below * gemm.n + column
            at = tirx.Select(below < gemm.k, down, at)
        tiles_m = ceil_div(gemm.m, self.mr)
        return Ahead(tile.ctx.buffers[gemm.b], T.bind(at), rows, columns, stride, tiles_m,
                     self.mr, steps, UNROLL)  # fmt: skip

    def _pack(self, tile: Tile, panel: Panel, column: Expr, k0: Expr, depth: int) -> None:
        """panel[k][c] = B[k0 + k, column + c]."""
        gemm, ctx, width = self.gemm, tile.ctx, panel.width
        base = tile.batch * (gemm.k * gemm.n) if gemm.b_batched else zero()
        if gemm.transpose_b:
            source = Matrix(ctx.buffers[gemm.b], base + column * gemm.k + k0, gemm.k)
            copy_transposed(source, Matrix(panel.buffer, panel.at, width), width, depth,
                            ctx.lanes)  # fmt: skip
            return
        with T.serial(0, depth) as k:
            for c, w in vectors(width, ctx.lanes):
                value = ctx.load(gemm.b, base + (k0 + k) * gemm.n + column + c, w)
                panel.store(k, c, value, w)


@dataclass(frozen=True)
class Panel:
    """Rows of `width` values in a workspace."""

    buffer: Any
    at: Expr
    width: int

    def load(self, row: Expr, column: int, width: int) -> Expr:
        """A vector of one row."""
        return load(self.buffer, self.at + row * self.width + column, width)

    def store(self, row: Expr, column: int, value: Expr, width: int) -> None:
        """Write a vector of one row."""
        store(self.buffer, self.at + row * self.width + column, value, width)


def longest_share(costs: Sequence[int], cores: int) -> int:
    """The largest sum of `cores` runs of consecutive tasks, the way a parallel loop is cut."""
    run = ceil_div(len(costs), cores)
    return max(sum(costs[i : i + run]) for i in range(0, len(costs), run))


def balanced_multiple(extent: int, block: int, unit: int) -> int:
    """A multiple of `unit`, at most about `block`, that cuts `extent` into even pieces."""
    units = max(1, block // unit)
    size = balanced(ceil_div(extent, unit), units) * unit
    return extent if size >= extent else size
