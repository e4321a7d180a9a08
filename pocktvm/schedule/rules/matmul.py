"""Matrix products and 1x1 convolutions: register tiles over panels of B.

Three forms, by where B comes from:

- *packed*: B is a build-time constant, stored as panels [panel][K][NR];
- *direct*: B[K, N] is read in place, NR columns at a time;
- *local*: each worker copies its panel, K block by K block, to a workspace. For B
  stored transposed, for weight gradients (K counts pixels), for matrices beyond the caches.

and a fourth, *dot*: lanes run along K. For few rows against B[N, K], or very few columns.

Tasks are tiles of C, so sums never depend on the number of threads. Measured on one AVX2 core:
79-98 GFLOP/s on MobileNetV2's layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import Context, build, const, load, store, vectors
from pocktvm.schedule.gemm import Gemm, describe
from pocktvm.schedule.gemm_dot import dot_tile, emit_dot
from pocktvm.schedule.gemm_tile import UNROLL, Tile, register_tile
from pocktvm.schedule.inplace import inplace_pairs
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
from pocktvm.schedule.prefetch import Ahead, gains, worthwhile
from pocktvm.schedule.rule import Emitted, Knob, Pack, Task
from pocktvm.schedule.special import grouped
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import T, tirx

Expr = Any
SMALL_B = 160 * 1024  # bytes of B below which rows go outside: B stays in L2
PANEL_BYTES = 32 * 1024  # of a panel's block a worker copies, or an eighth of the L2
FEW_ROWS = 128  # for which B is copied transposed: in blocks of K of at most
SHORT = 256
PARTIAL_BYTES = 24 * 1024  # of a worker's partial sums when K takes several blocks


class Matmul:
    """matmul, and the 1x1 convolutions of NHWC tensors with their gradients."""

    name = "matmul"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, batch axes that broadcast, and non-float32."""
        gemm = describe(task)
        return gemm if isinstance(gemm, str) else None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """form, mr, nr, order (which loop is outside), kc (depth of a local block)."""
        gemm, isa = _describe(task), task.target.isa
        mr, nr = register_tile(isa, gemm, task.is_frozen(gemm.b))
        forms = _forms(task, gemm)
        return {
            "form": Knob(forms, _default_form(task, gemm, mr, nr, forms)),
            "mr": Knob(_around(mr, (2, 4, 6, 7, 8, 10, 12, 14), gemm.m), mr),
            "nr": Knob(_around(nr, tuple(isa.lanes * v for v in (1, 2, 3, 4)), gemm.n), nr),
            "order": Knob(("rows", "panels"), _default_order(gemm)),
            "kc": Knob((64, 128, 256, 512, 1024), _depth(gemm, nr, isa)),
        }

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """The loop nest of one form."""
        gemm = _describe(task)
        pairs = inplace_pairs(task)
        if knobs["form"] == "dot":
            return emit_dot(task, gemm, pairs)
        plan = self.plan(task, knobs)
        func = build(task, plan.emit, plan.workspaces)
        return Emitted(func, plan.workspaces, pairs, plan.packs(task), gemm.flops)

    def describe(self, task: Task) -> Gemm:
        """The product of a task it does not decline."""
        return _describe(task)

    def plan(self, task: Task, knobs: Mapping[str, Any], beside: int = 1) -> Tiled:
        """The tiles of any form but dot; `beside`: products that share the cores with this."""
        gemm, mr, nr = _describe(task), knobs["mr"], knobs["nr"]
        return Tiled(task, gemm, mr, nr, knobs["order"], knobs["kc"], knobs["form"], beside)


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
            if self.form == "packed":
                return ctx.load(gemm.b, base + column * gemm.k + k * width + c, w)
            return ctx.load(gemm.b, base + k * gemm.n + column + c, w)

        ahead = self._ahead(tile, column, zero(), gemm.k) if self.order == "panels" else None
        for _ in tile.wanted(row, rows, column):
            tile.prefetch(row, rows, column, width)
            acc = tile.accumulators(rows, width)
            tile.multiply(acc, row, rows, width, zero(), gemm.k, read, ahead)
            tile.finish(acc, row, rows, column, width)

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """The scratch of all workers."""
        return tuple((self.workers * size, "float32") for size in self.scratch)

    @property
    def scratch(self) -> tuple[int, ...]:
        """Elements a worker: a block of a panel, and the partial sums when K takes several."""
        if self.form != "local":
            return ()
        return (self.depth * self.nr, *([self.chunk * self.nr] if self.blocks > 1 else []))

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
        width = panel.width
        ahead = self._ahead(tile, column, zero(), self.gemm.k)
        for row, rows in chunk_tiles(chunk, self.gemm.m, self.chunk, self.mr):
            for _ in tile.wanted(row, rows, column):
                tile.prefetch(row, rows, column, width)
                acc = tile.accumulators(rows, width)
                tile.multiply(acc, row, rows, width, zero(), self.gemm.k, panel.load, ahead)
                tile.finish(acc, row, rows, column, width)

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


def _describe(task: Task) -> Gemm:
    gemm = describe(task)
    assert isinstance(gemm, Gemm), gemm
    return gemm


def _forms(task: Task, gemm: Gemm) -> tuple[str, ...]:
    forms = ["local"]
    if not gemm.transpose_b:
        forms.append("direct")
    if task.is_frozen(gemm.b) and not gemm.b_batched:
        forms.append("packed")
    if dot_tile(task, gemm) is not None and not grouped(task):  # its columns begin anywhere
        forms.append("dot")
    return tuple(forms)


def _default_form(task: Task, gemm: Gemm, mr: int, nr: int, forms: tuple[str, ...]) -> str:
    lanes, isa = task.target.isa.lanes, task.target.isa
    if "dot" in forms and gemm.k >= 4 * lanes:
        few_columns = gemm.n <= max(1, lanes // 4)
        few_rows = gemm.transpose_b and gemm.m < 32 and "packed" not in forms
        if few_columns or few_rows:
            return "dot"
    if "packed" in forms:
        return "packed"
    if "direct" not in forms:
        return "local"
    if gemm.transpose_a:
        return "local" if gemm.k >= 64 and gemm.m > 2 * mr else "direct"
    if gains(isa) and 4 * gemm.k * nr > isa.l2_bytes // 2 and gemm.m >= 8:
        return "local"  # a panel and the next one, asked for ahead, are more than the L2 holds
    if gemm.k > 4096 and gemm.m >= 8:  # blocks of K: faster or equal, and sums of sums are exacter
        return "local"
    # rows of B a power of two apart fall on the same cache sets: copy them once there is use for it
    # unless they are asked for ahead
    aliased = (gemm.n * 4) % 2048 == 0 and gemm.k * gemm.n * 4 > isa.l2_bytes // 4
    return "local" if aliased and gemm.m >= 8 * mr and not gains(isa) else "direct"


def _default_order(gemm: Gemm) -> str:
    if gemm.transpose_a:
        return "panels"
    return "rows" if gemm.k * gemm.n * 4 <= SMALL_B or gemm.batch > 1 else "panels"


def _depth(gemm: Gemm, nr: int, isa: Isa) -> int:
    """The depth of a block of K: all of it when it nearly fits, else a divisor near the limit."""
    k = gemm.k
    # sums in memory cost more than B from the L2
    most = max(8, max(PANEL_BYTES, isa.l2_bytes // 8) // (4 * nr))
    if gains(isa) and gemm.transpose_b and gemm.m <= FEW_ROWS:
        most = min(most, SHORT)  # 100 GFLOP/s instead of 88, for 64 rows and K = 512
    if k <= most * 5 // 4:
        return max(k, 1)
    for depth in range(most - most % 4, most // 2, -4):
        if k % depth == 0:
            return depth
    return most - most % 4


def _around(default: int, options: tuple[int, ...], limit: int) -> tuple[int, ...]:
    return tuple(sorted({default, *(o for o in options if o <= limit)}))
