"""Both gradients of a depthwise convolution in one walk over the image.

    for every pixel p of dx, for every tap that reaches it from a pixel o of dy:
        dx[p] += w[tap] * dy[o]         in registers
        dw[tap] += x[p] * dy[o]         kept in scratch between tiles

A value of dy that is loaded for one serves the other, and x, which the mask of the activation in
front reads anyway, is read once and may give its memory to dx: 28 instead of 44 MB of traffic where
a stride-2 layer of MobileNetV2 sees 64x64 pixels. Sums of dy and of the masked dx over all pixels,
the gradients of the shifts on both sides, are taken on the way.

A task owns a band of rows and its own sums; bands are added up in order when all are done, so
neither depends on the threads. A tile is a few neighbouring pixels of dx, whatever the stride: the
taps of each are written out, borders included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.graph import Node
from pocktvm.schedule import emit
from pocktvm.schedule.depthwise import Vectors, channel_blocks, each_block
from pocktvm.schedule.depthwise_walk import Grads, Plan, Run, column_runs
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, evaluate, finish, store_outputs
from pocktvm.schedule.prefetch import prefetch_stream, worthwhile
from pocktvm.schedule.window import Axis
from pocktvm.tvm_api import T, tirx

Expr = Any
CODE_LIMIT = 1200  # taps written out, each two multiply-adds; beyond, kernel rows are a loop


@dataclass(frozen=True)
class Parts:
    """Contexts of the groups that were joined, by the value that each one's anchor computes."""

    whole: Context
    of: Mapping[str, Context]


def emit_depthwise_grads(parts: Parts, plan: Plan) -> None:
    """The whole loop nest: all bands, then their sums through the epilogues."""
    grads, lines = plan.grads, plan.lines
    runs = column_runs(grads.columns, plan.pixels)
    loop = T.parallel if plan.bands > 1 else T.serial
    with loop(0, plan.bands) as band:
        base = T.bind(band * plan.sums)
        with T.serial(0, grads.slots) as slot:
            _each(parts, plan, lambda c, v: _clear(parts, plan, base, slot, c, v))
        last = tirx.Min((band + 1) * plan.band, tirx.const(lines, "int32"))
        with T.serial(band * plan.band, last) as f:
            high = max(axis.out for axis in grads.rows)
            n, q = T.bind(f // high), T.bind(f % high)
            for axis in grads.rows:
                row = _Row(parts, plan, runs, base, n, q, axis)
                if axis.out == high:
                    row.emit()
                else:
                    with T.If(q < axis.out), T.Then():
                        row.emit()
    _finish(parts, plan)


def _each(parts: Parts, plan: Plan, body: Callable[[Expr, Vectors], None]) -> None:
    each_block(plan.grads.dx_shape[3], parts.whole.lanes, plan.vectors, body)


def _clear(parts: Parts, plan: Plan, base: Expr, slot: Expr, c: Expr, vectors: Vectors) -> None:
    for start, lanes in vectors:
        at = base + slot * plan.grads.dx_shape[3] + c + start
        emit.store(parts.whole.workspaces[0], at, emit.const(0.0, lanes), lanes)


def _finish(parts: Parts, plan: Plan) -> None:
    """Every sum over all bands, in order, and its epilogue."""
    grads = plan.grads

    def write(name: str, slot: Expr, row: Expr) -> None:
        ctx = parts.of[name]
        shape, channels = ctx.task.shape(name), grads.dx_shape[3]

        def body(c: Expr, vectors: Vectors) -> None:
            for start, lanes in vectors:
                total: Expr = None
                for band in range(plan.bands):
                    at = band * plan.sums + slot * channels + c + start
                    value = emit.load(ctx.workspaces[0], at, lanes)
                    total = value if total is None else total + value
                finish(ctx, {name: T.bind(total)}, Position(shape, row, c + start, lanes))

        _each(parts, plan, body)

    zero = tirx.const(0, "int32")
    with T.serial(0, grads.taps) as tap:
        write(grads.dw, tap, tap)
    slot = grads.taps
    for name in (grads.dy_sum, grads.z_sum):
        if name:
            write(name, slot, zero)
            slot += 1


@dataclass
class _Row:
    """Row q of one phase of image n."""

    parts: Parts
    plan: Plan
    runs: Sequence[Run]
    base: Expr
    n: Expr
    q: Expr
    rows: Axis

    @property
    def grads(self) -> Grads:
        """Names and shapes of what is computed."""
        return self.plan.grads

    def emit(self) -> None:
        """Split the rows by the taps they see, or loop over kernel rows if that is much code."""
        cases = self.rows.cases()
        pairs = sum(len(reach) for run in self.runs for reach in run.pixels)
        blocks = channel_blocks(self.grads.dx_shape[3], self.parts.whole.lanes, self.plan.vectors)
        pairs *= sum(len(vectors) for *_, vectors in blocks)
        code = pairs * sum(len(taps) for *_, taps in cases) * len(self.grads.rows)
        if code <= CODE_LIMIT:
            self._chain(cases)
        else:
            self._cover(self.rows.bounds(self.q), None)

    def _chain(self, cases: Sequence[tuple[int, int, tuple[int, ...]]]) -> None:
        """if row < stop of the first case … else the others."""
        (_, stop, taps), rest = cases[0], cases[1:]
        if not rest:
            self._cover(None, taps)
            return
        with T.If(self.q < stop):
            with T.Then():
                self._cover(None, taps)
            with T.Else():
                self._chain(rest)

    def _cover(self, span: tuple[Expr, Expr] | None, taps: Sequence[int] | None) -> None:
        """All column tiles and channel blocks of the row."""
        for run in self.runs:
            if run.count == 1:
                self._channels(run, tirx.const(0, "int32"), span, taps)
            else:
                with T.serial(0, run.count) as t:
                    self._channels(run, t, span, taps)

    def _channels(self, run: Run, t: Expr, span: Any, taps: Any) -> None:
        _each(self.parts, self.plan, lambda c, v: self._block(run, t, c, v, span, taps))

    def _block(self, run: Run, t: Expr, c: Expr, vectors: Vectors, span: Any, taps: Any) -> None:
        """One register tile: all taps, then the epilogue of dx and its sum."""
        grads, whole = self.grads, self.parts.whole
        tile = _Tile(self, run, t, c, vectors)
        tile.prefetch()
        for r in range(run.width):
            for start, lanes in vectors:
                emit.store(tile.acc, tile.at(r, start), emit.const(0.0, lanes), lanes)
                x = whole.load(grads.x, tile.pixel(r, start).flat, lanes)
                emit.store(tile.x, tile.at(r, start), x, lanes)
        if span is not None:
            with T.serial(*span) as tap:
                tile.line(tap)
        for tap in taps or ():
            tile.line(tap)
        tile.finish()


class _Tile:
    """Pixels of dx in registers, from column `t` tiles into a run, channels from c."""

    def __init__(self, row: _Row, run: Run, t: Expr, c: Expr, vectors: Vectors) -> None:
        self.row, self.run, self.t, self.c, self.vectors = row, run, t, c, vectors
        self.grads, self.ctx = row.grads, row.parts.whole
        self.width = vectors[-1][0] + vectors[-1][1]
        self.acc, self.x = (emit.local(run.width * self.width) for _ in range(2))
        _, h, w, _ = self.grads.dx_shape
        line = (row.n * h + row.rows.position(row.q)) * w
        self.first = T.bind(line + t * run.width + run.start)
        stride = len(self.grads.columns)
        self.column0 = t * (run.width // stride) + run.start // stride  # of dy

    def at(self, r: int, start: int) -> int:
        """Where a pixel's vector lies in the registers."""
        return r * self.width + start

    def pixel(self, r: int, start: int) -> Position:
        """Where pixel `r` of the tile lies in dx, from channel `start` of its vectors on."""
        lanes = next(w for s, w in self.vectors if s == start)
        return Position(self.grads.dx_shape, self.first + r, self.c + start, lanes)

    def prefetch(self) -> None:
        """Ask for this tile's share of the rows of x and of dy that the next row number reads, as
        it lies in memory, whatever pixels and channels that are."""
        grads, row, width = self.grads, self.row, self.run.width
        channels, stride = grads.dx_shape[3], len(grads.columns)
        at = self.first + row.rows.every * grads.dx_shape[2]
        share = width * self.width
        if worthwhile(self.ctx, grads.x):
            prefetch_stream(self.ctx, grads.x, at * channels + self.c * width, share)
        last = row.rows is grads.rows[-1] and row.rows.taps
        if last and worthwhile(self.ctx, grads.dy):
            _, oh, ow, _ = grads.dy_shape
            below = row.rows.source(row.q, row.rows.taps - 1) + 1
            at = (row.n * oh + below) * ow + self.column0
            share = width // stride * self.width
            prefetch_stream(self.ctx, grads.dy, at * channels + self.c * (width // stride), share)

    def line(self, tap: Any) -> None:
        """One kernel row: every value of dy is loaded once and meets all its taps."""
        grads, row = self.grads, self.row
        _, oh, ow, channels = grads.dy_shape
        kw = grads.kernel[1]
        ky = row.rows.kernel(tap)
        source = (row.n * oh + row.rows.source(row.q, tap)) * ow
        d0 = T.bind((source + self.column0) * channels + self.c)
        w0 = T.bind(ky * (kw * channels) + self.c)
        for start, lanes in self.vectors:
            sums = self._load_sums(w0 + start, lanes)
            total: Expr = None
            for column, meets in self._meets():
                dy = T.bind(self.ctx.load(grads.dy, d0 + (column * channels + start), lanes))
                for r, kx in meets:
                    self._tap(r, kx, dy, w0, start, lanes, sums)
                    if grads.once is not None and kx == grads.once[1]:
                        total = dy if total is None else total + dy
            self._store_sums(sums, w0 + start, lanes)
            if grads.dy_sum and total is not None:
                self._sum_dy(ky, total, start, lanes)

    def _meets(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Columns of dy in order, each with the (pixel, kernel column) that it meets."""
        meets: dict[int, list[tuple[int, int]]] = {}
        for r, reach in enumerate(self.run.pixels):
            for kx, column in reach:
                meets.setdefault(column, []).append((r, kx))
        return sorted(meets.items())

    def _tap(
        self, r: int, kx: int, dy: Expr, w0: Expr, start: int, lanes: int, sums: Mapping[int, Any]
    ) -> None:
        grads, at = self.grads, self.at(r, start)
        weight = self.ctx.load(grads.weight, w0 + (kx * grads.dx_shape[3] + start), lanes)
        emit.store(self.acc, at, emit.load(self.acc, at, lanes) + dy * weight, lanes)
        total = emit.load(sums[kx], 0, lanes) + dy * emit.load(self.x, at, lanes)
        emit.store(sums[kx], 0, total, lanes)

    def _load_sums(self, at: Expr, lanes: int) -> dict[int, Any]:
        """This kernel row's sums of the weight gradient, by kernel column, in registers."""
        sums = {}
        for kx in sorted({kx for reach in self.run.pixels for kx, _ in reach}):
            sums[kx] = emit.local(lanes)
            value = emit.load(self._scratch, self._slot(kx, at), lanes)
            emit.store(sums[kx], 0, value, lanes)
        return sums

    def _store_sums(self, sums: Mapping[int, Any], at: Expr, lanes: int) -> None:
        for kx, value in sums.items():
            emit.store(self._scratch, self._slot(kx, at), emit.load(value, 0, lanes), lanes)

    @property
    def _scratch(self) -> Any:
        return self.ctx.workspaces[0]

    def _slot(self, slot: int, at: Expr) -> Expr:
        """Element of the band's scratch: sum number `slot` from `at`."""
        return self.row.base + (slot * self.grads.dx_shape[3] + at)

    def _sum_dy(self, ky: Any, total: Expr, start: int, lanes: int) -> None:
        """Add to the sum of dy, in the one kernel row that meets all of it."""
        assert self.grads.once is not None
        wanted = self.grads.once[0]
        if isinstance(ky, int):
            if ky == wanted:
                self._add(self.grads.taps, total, start, lanes)
            return
        total = T.bind(total)
        with T.If(ky == wanted), T.Then():
            self._add(self.grads.taps, total, start, lanes)

    def _add(self, slot: int, total: Expr, start: int, lanes: int) -> None:
        at = self._slot(slot, self.c + start)
        emit.store(self._scratch, at, emit.load(self._scratch, at, lanes) + total, lanes)

    def finish(self) -> None:
        """dx through its epilogue, and the sum of what comes out."""
        grads, ctx = self.grads, self.row.parts.of[self.grads.dx]
        following: Sequence[Node] = ctx.task.node.body[1:]
        for start, lanes in self.vectors:
            total: Expr = None
            for r in range(self.run.width):
                at = self.pixel(r, start)
                known = {grads.dx: emit.load(self.acc, self.at(r, start), lanes),
                         grads.x: emit.load(self.x, self.at(r, start), lanes)}  # fmt: skip
                values = evaluate(ctx, following, known, at)
                store_outputs(ctx, values, at)
                if grads.z_sum:
                    z = values[grads.z]
                    total = z if total is None else total + z
            if grads.z_sum:
                self._add(grads.taps + bool(grads.dy_sum), total, start, lanes)
