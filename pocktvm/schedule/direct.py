"""Direct convolution as implicit GEMM: the loop nest of the forward and of the input gradient.

Both are sums over taps of `source[pixel of tap] @ weights[tap]`; they differ in which source pixel
a tap meets (schedule/window.py) and in how the weights are laid out. The register tile is
pixels x output channels: each weight vector is loaded once for all pixels of the tile, each source
value is one broadcast (or one lane) for all its vectors.

- A tile's pixels are neighbours in a row, of one image or of several: small maps fill their tile
  with images, so that all pixels of a tile always see the same kernel rows. Which rows those are is
  a loop bound; which columns is known at build time, and border tiles are written out.
- Where the border columns would be too much code (large or dilated kernels), each is a tile of its
  own, with loop bounds as well.
- One parallel loop runs over row units x channel panels: panels innermost while the weights fit in
  the second-level cache, rows innermost when they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.dot import Dot, best_unroll, max_rows, tile_cycles, written
from pocktvm.schedule.emit import Context
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.loops import balanced, ceil_div
from pocktvm.schedule.prefetch import prefetch_epilogue
from pocktvm.schedule.spatial import outer
from pocktvm.schedule.window import Axis, Run, tiles
from pocktvm.tvm_api import T, tirx

Expr = Any
CODE_LIMIT = 1500  # multiply-adds written out: about a second of LLVM
# Source channels below which a border tile's inner pixels get a loop of their own: one tap alone
# is too short a sum there, and all taps of all pixels in one block spill (23 of 314 on NEON).
SHALLOW = 4


@dataclass(frozen=True)
class Direct:
    """One convolution to emit. Shapes are NHWC and whole; `depth`, `width` are one group's."""

    source: str  # the value read
    result: str  # the anchor's output
    source_shape: tuple[int, ...]
    result_shape: tuple[int, ...]
    kernel: tuple[int, int]
    groups: int
    phases: tuple[tuple[Axis, Axis], ...]

    @property
    def depth(self) -> int:
        """Channels summed over, of one group."""
        return self.source_shape[3] // self.groups

    @property
    def width(self) -> int:
        """Channels computed, of one group."""
        return self.result_shape[3] // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds, borders counted whole."""
        n, _, _, c = self.result_shape
        return sum(
            n * rows.out * columns.out * rows.taps * columns.taps * self.depth * c
            for rows, columns in self.phases
        )


@dataclass(frozen=True)
class Weights:
    """Where a weight vector is: row (tap, channel) of panel j of group g."""

    buffer: Any
    packed: bool  # [group][panel][tap][depth][panel width], else [tap][depth][groups * width]

    def at(self, conv: Direct, group: Expr, panel: Expr, nr: int, width: int) -> tuple[Expr, int]:
        """(index of row 0, elements between rows)."""
        if self.packed:
            taps = conv.kernel[0] * conv.kernel[1]
            return (group * conv.width + panel * nr) * (taps * conv.depth), width
        return group * conv.width + panel * nr, conv.groups * conv.width


@dataclass(frozen=True)
class Tile:
    """The register tile: `images` x `pixels` of a row x `nr` channels; k unrolled by `unroll`."""

    pixels: int
    images: int
    nr: int
    unroll: int = 4
    panels_outer: bool = False


def choose_tile(conv: Direct, isa: Isa) -> Tile:
    """The tile with the fewest cycles a pixel (dot.tile_cycles)."""
    batch = conv.result_shape[0]
    columns = max(columns.out for _, columns in conv.phases)
    lanes, best = isa.lanes, (float("inf"), 0, Tile(1, 1, isa.lanes))
    widths = emit.vectors(conv.width, lanes)
    for v in range(1, min(len(widths), 6) + 1):
        limit = max_rows(isa, v)
        if limit < 1:
            continue
        pixels, images = columns, 1
        if columns >= limit:
            pixels = balanced(columns, limit)
        else:
            images = max(d for d in range(1, max(1, limit // columns) + 1) if batch % d == 0)
        p = pixels * images
        panels = [v] * (len(widths) // v) + ([len(widths) % v] if len(widths) % v else [])
        cycles = sum(tile_cycles(isa, p, u) for u in panels) / p
        candidate = (cycles, -p * v, Tile(pixels, images, v * lanes))
        best = min(best, candidate, key=lambda c: c[:2])
    tile = best[2]
    weights = conv.kernel[0] * conv.kernel[1] * conv.depth * conv.width * 4
    unroll = best_unroll(isa, tile.pixels * tile.images * tile.nr // lanes)
    return Tile(tile.pixels, tile.images, tile.nr, unroll, weights > isa.l2_bytes // 2)


def emit_direct(ctx: Context, conv: Direct, weights: Weights, tile: Tile) -> None:
    """The whole loop nest, epilogue included."""
    n = conv.result_shape[0] // tile.images
    rows = max(axis.out for axis, _ in conv.phases)
    panels = ceil_div(conv.width, tile.nr)
    units = n * rows
    with outer(ctx.task, units * panels * conv.groups, 2 * conv.macs) as f:
        if tile.panels_outer:
            panel, unit = f // units, f % units
        else:
            unit, panel = f // (panels * conv.groups), f % (panels * conv.groups)
        group = panel // panels if conv.groups > 1 else tirx.const(0, "int32")
        panel = panel % panels if conv.groups > 1 else panel
        row = _Row(ctx, conv, weights, tile, T.bind(unit // rows * tile.images),
                   T.bind(unit % rows), T.bind(group), T.bind(panel))  # fmt: skip
        tail = conv.width % tile.nr
        if not tail:
            row.emit(tile.nr)
        elif panels == 1:
            row.emit(tail)
        else:
            with T.If(row.panel < panels - 1):
                with T.Then():
                    row.emit(tile.nr)
                with T.Else():
                    row.emit(tail)


@dataclass
class _Row:
    """One row unit of one panel: image n, row q of every phase, channels of a panel."""

    ctx: Context
    conv: Direct
    weights: Weights
    tile: Tile
    n: Expr
    q: Expr
    group: Expr
    panel: Expr

    def emit(self, width: int) -> None:
        """All phases of the row for a panel of `width` channels."""
        longest = max(axis.out for axis, _ in self.conv.phases)
        for rows, columns in self.conv.phases:
            if rows.out == longest:
                self.phase(rows, columns, width)
            else:
                with T.If(self.q < rows.out), T.Then():
                    self.phase(rows, columns, width)

    def phase(self, rows: Axis, columns: Axis, width: int) -> None:
        """Cover the row of one phase with tiles."""
        bounds = rows.bounds(self.q)
        vectors = emit.vectors(width, self.ctx.lanes)
        runs = tiles(columns, self.tile.pixels)
        if self.code(columns, runs) * len(self.conv.phases) > CODE_LIMIT:
            lo, hi = columns.interior
            for start, stop in [(0, lo), (hi, columns.out)] if hi else [(0, columns.out)]:
                if stop > start:
                    with T.serial(start, stop) as x:
                        one = Run(0, 1, 1, ((0,),) * columns.taps)
                        self.block(rows, columns, bounds, one, x, vectors, columns.bounds(x))
            runs = tiles(columns, self.tile.pixels, inside=True)
        for run in runs:
            if run.count == 1:
                at = tirx.const(run.start, "int32")
                self.block(rows, columns, bounds, run, at, vectors, None)
                continue
            with T.serial(0, run.count) as t:
                x = T.bind(t * run.width + run.start)
                self.block(rows, columns, bounds, run, x, vectors, None)

    def code(self, columns: Axis, runs: Sequence[Run]) -> int:
        """Multiply-adds written out for a row of one phase, whole and last panels together."""
        conv, total = self.conv, 0
        widths = {min(self.tile.nr, conv.width), conv.width % self.tile.nr}
        vectors = sum(len(emit.vectors(width, self.ctx.lanes)) for width in widths)
        for run in runs:
            taps = columns.taps if run.whole else 1  # of those, all are one sum
            rows = run.width if run.whole else sum(len(p) for p in run.pixels)
            total += rows * written(self.ctx, conv.depth * taps, self.tile.unroll)
        return total * self.tile.images * vectors

    def block(
        self, rows: Axis, columns: Axis, bounds: tuple[Expr, Expr], run: Run, x: Expr,
        vectors: Sequence[tuple[int, int]], span: tuple[Expr, Expr] | None,
    ) -> None:  # fmt: skip
        """One register tile: sum over kernel rows, columns and channels, then the epilogue.

        `span` bounds the column taps where they are not written out."""
        conv = self.conv
        _, h, w, c = conv.source_shape
        width = vectors[-1][0] + vectors[-1][1]
        keys = [(b, r) for b in range(self.tile.images) for r in range(run.width)]
        self.prefetch(rows, columns, keys, x, width)
        acc = emit.local(len(keys) * width)
        for i in range(len(keys)):
            for start, lanes in vectors:
                emit.store(acc, i * width + start, emit.const(0.0, lanes), lanes)
        origin, stride = self.weights.at(conv, self.group, self.panel, self.tile.nr, width)
        origin = T.bind(origin)
        offsets = [b * h * w * c + r * columns.step * c for b, r in keys]
        dot = Dot(self.ctx, self.ctx.buffers[conv.source], self.weights.buffer, acc, vectors,
                  stride, offsets, self.tile.unroll)  # fmt: skip
        kw, depth = conv.kernel[1], conv.depth
        everyone = range(len(keys))
        contiguous = (columns.kernel_step, columns.dilation, conv.groups) == (1, 1, 1)
        shallow = conv.depth < SHALLOW and contiguous and span is None
        inside = run.inside if run.whole or shallow else frozenset()

        def sums(line: Callable[[Expr, Expr], None]) -> None:
            with T.serial(*bounds) as ty:
                source = self.n * h + rows.source(self.q, ty)
                x0 = T.bind((source * w + columns.source(x, 0)) * c + self.group * depth)
                line(x0, T.bind(origin + rows.kernel(ty) * (kw * depth * stride)))

        def whole(x0: Expr, w0: Expr) -> None:
            pixels = [i for i, (_, r) in enumerate(keys) if r in inside]
            dot.emit(x0, w0, depth * columns.taps, pixels)

        def tap(x0: Expr, w0: Expr, tx: Any, pixels: Sequence[int]) -> None:
            dot.emit(x0 + tx * (columns.dilation * c),
                     w0 + columns.kernel(tx) * (depth * stride), depth, pixels)  # fmt: skip

        def every_tap(x0: Expr, w0: Expr) -> None:
            with T.serial(*(span or (0, columns.taps))) as tx:
                tap(x0, w0, tx, everyone)

        def border(x0: Expr, w0: Expr) -> None:
            for tx in range(columns.taps):
                seen = set(run.pixels[tx]) - inside
                tap(x0, w0, tx, [i for i, (_, r) in enumerate(keys) if r in seen])

        if rows.taps and columns.taps:
            if span is not None or (run.whole and not contiguous):
                sums(every_tap)
            else:
                if inside:
                    sums(whole)
                if not run.whole:
                    sums(border)
        self.finish(rows, columns, keys, x, acc, vectors)

    def prefetch(
        self, rows: Axis, columns: Axis, keys: Sequence[tuple[int, int]], x: Expr, width: int
    ) -> None:
        """Ask for what a tile's epilogue will touch."""
        column = self.group * self.conv.width + self.panel * self.tile.nr
        for b, r in keys:
            pixel = self.pixel(rows, columns, b, x + r)
            at = Position(self.conv.result_shape, pixel, column, width)
            prefetch_epilogue(self.ctx, self.conv.result, at)

    def pixel(self, rows: Axis, columns: Axis, image: int, x: Expr) -> Expr:
        """Which pixel of all images a tile's column is."""
        _, oh, ow, _ = self.conv.result_shape
        return ((self.n + image) * oh + rows.position(self.q)) * ow + columns.position(x)

    def finish(
        self, rows: Axis, columns: Axis, keys: Sequence[tuple[int, int]], x: Expr, acc: Any,
        vectors: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        """Epilogue and stores of a tile."""
        width = vectors[-1][0] + vectors[-1][1]
        c0 = T.bind(self.group * self.conv.width + self.panel * self.tile.nr)
        for i, (b, r) in enumerate(keys):
            row = T.bind(self.pixel(rows, columns, b, x + r))
            for start, lanes in vectors:
                value = emit.load(acc, i * width + start, lanes)
                at = Position(self.conv.result_shape, row, c0 + start, lanes)
                finish(self.ctx, {self.conv.result: value}, at)
