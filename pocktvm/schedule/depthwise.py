"""Depthwise convolution: the loop nest of the forward and of the input gradient.

Each channel is its own filter, so lanes run along channels and a tile is pixels of a row x channel
vectors. The kernel does 2 kh kw operations a value read: what counts is that every row is read
while it is in the first-level cache and that no padded copy is made. Rows and columns are written
out by border case; where that is too much code, the kernel rows become a loop with bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pocktvm.schedule import emit
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.prefetch import prefetch_stream, streams
from pocktvm.schedule.spatial import outer
from pocktvm.schedule.window import Axis, Run, tiles
from pocktvm.tvm_api import T, tirx

Expr = Any
CODE_LIMIT = 900  # multiply-adds written out for one row
Vectors = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Depthwise:
    """One depthwise convolution, NHWC; `phases` as in schedule/direct.py."""

    source: str
    weight: str
    result: str
    source_shape: tuple[int, ...]
    result_shape: tuple[int, ...]
    kernel: tuple[int, int]
    phases: tuple[tuple[Axis, Axis], ...]

    @property
    def macs(self) -> int:
        """Multiply-adds, borders counted whole."""
        n, _, _, c = self.result_shape
        return sum(n * c * r.out * s.out * r.taps * s.taps for r, s in self.phases)


@dataclass(frozen=True)
class Tile:
    """`pixels` of a row x `vectors` channel vectors."""

    pixels: int
    vectors: int


def channel_blocks(channels: int, lanes: int, vectors: int) -> list[tuple[Expr, int, Vectors]]:
    """(first block, how many, its vectors): whole blocks, then the tail as one narrower block."""
    block = lanes * vectors
    full = channels // block
    blocks: list[tuple[Expr, int, Vectors]] = []
    if full:
        blocks.append((0, full, [(v * lanes, lanes) for v in range(vectors)]))
    if channels % block:
        blocks.append((full * block, 1, emit.vectors(channels % block, lanes)))
    return blocks


def each_block(
    channels: int, lanes: int, vectors: int, body: Callable[[Expr, Vectors], None]
) -> None:
    """Emit `body(first channel, vectors)` in loops that cover the channels."""
    for start, count, pieces in channel_blocks(channels, lanes, vectors):
        if count == 1:
            body(tirx.const(start, "int32"), pieces)
        else:
            with T.serial(0, count) as i:
                body(T.bind(i * (lanes * vectors) + start), pieces)


def emit_depthwise(ctx: Context, conv: Depthwise, tile: Tile) -> None:
    """The whole loop nest, epilogue included."""
    rows = max(axis.out for axis, _ in conv.phases)
    with outer(ctx.task, conv.result_shape[0] * rows, 2 * conv.macs) as f:
        n, q = T.bind(f // rows), T.bind(f % rows)
        for axis, columns in conv.phases:
            row = Row(ctx, conv, tile, n, q, axis, columns, tiles(columns, tile.pixels))
            if axis.out == rows:
                row.emit()
            else:
                with T.If(q < axis.out), T.Then():
                    row.emit()


@dataclass
class Row:
    """Row q of one phase of image n. `ahead`: the row may ask memory for the next one."""

    ctx: Context
    conv: Depthwise
    tile: Tile
    n: Expr
    q: Expr
    rows: Axis
    columns: Axis
    runs: list[Run]
    ahead: ClassVar[bool] = True

    def emit(self) -> None:
        """Split the rows by the taps they see; each case is written out if the code stays small."""
        cases = self.rows.cases()
        one = self._code()
        phases = len(self.conv.phases)
        if len({taps for *_, taps in cases}) * one * phases <= CODE_LIMIT:
            self.chain(cases)
            return
        lo, hi = self.rows.interior
        if one * phases > CODE_LIMIT or hi <= lo:
            self.bounded()
        elif (lo, hi) == (0, self.rows.out):
            self.cover(range(self.rows.taps))
        else:
            with T.If(tirx.And(self.q >= lo, self.q < hi)):
                with T.Then():
                    self.cover(range(self.rows.taps))
                with T.Else():
                    self.bounded()

    def chain(self, cases: Sequence[tuple[int, int, tuple[int, ...]]]) -> None:
        """if row < stop of the first case … else the others."""
        (_, stop, taps), rest = cases[0], cases[1:]
        if not rest:
            self.cover(taps)
            return
        with T.If(self.q < stop):
            with T.Then():
                self.cover(taps)
            with T.Else():
                self.chain(rest)

    def bounded(self) -> None:
        """The kernel rows as a loop."""
        self.cover(self.rows.bounds(self.q))

    def cover(self, taps: Any) -> None:
        """All column tiles and channel blocks of the row; `taps`: kernel rows, or their bounds."""
        span = taps if isinstance(taps, tuple) and taps and not isinstance(taps[0], int) else None
        listed = () if span else tuple(taps)
        for run in self.runs:
            if run.count == 1:
                self.channels(run, tirx.const(run.start, "int32"), listed, span)
            else:
                with T.serial(0, run.count) as t:
                    self.channels(run, T.bind(t * run.width + run.start), listed, span)

    def channels(self, run: Run, x: Expr, taps: Sequence[int], span: Any) -> None:
        """The channel loop of one column tile."""
        each_block(self.conv.result_shape[3], self.ctx.lanes, self.tile.vectors,
                   lambda c, vectors: self.block(run, x, c, vectors, taps, span))  # fmt: skip

    def block(
        self, run: Run, x: Expr, c: Expr, vectors: Vectors, taps: Sequence[int], span: Any
    ) -> None:
        """One register tile: all taps, then the epilogue."""
        width = vectors[-1][0] + vectors[-1][1]
        if self.ahead and len(self.conv.phases) == 1:
            self.prefetch(run, x, c, width)
        acc = emit.local(run.width * width)
        for r in range(run.width):
            for start, lanes in vectors:
                emit.store(acc, r * width + start, emit.const(0.0, lanes), lanes)
        if span:
            with T.serial(*span) as ty:
                self.line(run, x, c, vectors, ty, acc)
        for ty in taps:
            self.line(run, x, c, vectors, ty, acc)
        line = T.bind(self.result_line())
        for r in range(run.width):
            for start, lanes in vectors:
                at = Position(self.conv.result_shape, line + self.columns.position(x + r),
                              c + start, lanes)  # fmt: skip
                value = emit.load(acc, r * width + start, lanes)
                finish(self.ctx, {self.conv.result: value}, at)

    def prefetch(self, run: Run, x: Expr, c: Expr, width: int) -> None:
        """Ask for this tile's share, as it lies in memory, of the source rows that the next row
        reads first, and of the next row of the result."""
        _, _, w, channels = self.conv.source_shape
        rows, step, taps = self.rows, self.columns.step, self.rows.taps
        count, across = run.width * width, run.width * step
        for below in range(rows.step if streams(self.ctx.task, self.conv.source) else 0):
            line = self.source_line(taps - 1) + (below + 1) * w * channels
            prefetch_stream(self.ctx, self.conv.source,
                            line + x * (step * channels) + c * across, count * step)  # fmt: skip
        at = (self.result_line() + self.conv.result_shape[2] + x) * channels + c * run.width
        for name in self.ctx.task.node.outputs:
            if streams(self.ctx.task, name):
                prefetch_stream(self.ctx, name, at, count)

    def source_line(self, ty: Any) -> Expr:
        """Where the source row that kernel row `ty` meets begins."""
        _, h, w, channels = self.conv.source_shape
        return (self.n * h + self.rows.source(self.q, ty)) * (w * channels)

    def result_line(self) -> Expr:
        """Number of pixels ahead of the row in the result."""
        _, oh, ow, _ = self.conv.result_shape
        return (self.n * oh + self.rows.position(self.q)) * ow

    def line(self, run: Run, x: Expr, c: Expr, vectors: Vectors, ty: Any, acc: Any) -> None:
        """One kernel row: every source value is loaded once and meets all its taps."""
        channels = self.conv.source_shape[3]
        rows, columns, kw = self.rows, self.columns, self.conv.kernel[1]
        width = vectors[-1][0] + vectors[-1][1]
        meets: dict[int, list[tuple[int, int]]] = {}
        for tx in range(columns.taps):
            for r in run.pixels[tx]:
                meets.setdefault(columns.source(r, tx), []).append((r, tx))
        x0 = T.bind(self.source_line(ty) + x * (columns.step * channels) + c)
        w0 = T.bind(rows.kernel(ty) * (kw * channels) + c)
        for start, lanes in vectors:
            for column in sorted(meets):
                value = self.ctx.load(self.conv.source, x0 + (column * channels + start), lanes)
                for r, tx in meets[column]:
                    at = w0 + (columns.kernel(tx) * channels + start)
                    weight = self.ctx.load(self.conv.weight, at, lanes)
                    total = emit.load(acc, r * width + start, lanes) + value * weight
                    emit.store(acc, r * width + start, total, lanes)

    def _code(self) -> int:
        """Multiply-adds of one row with every kernel row written out."""
        per_row = sum(sum(len(p) for p in run.pixels) for run in self.runs)
        blocks = channel_blocks(self.conv.result_shape[3], self.ctx.lanes, self.tile.vectors)
        return per_row * self.rows.taps * sum(len(vectors) for *_, vectors in blocks)
