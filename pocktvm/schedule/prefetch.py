"""Ask for memory while registers are busy: what a tile's epilogue reads and writes, and the part
of a weight that is read next.

A step runs through far more memory than the caches hold, so a residual, a weight or its update
comes from main memory: 100 ns, the length of a whole tile of 64 values of k. Asked for before the
tile's sums it is there after them (1x1 convolutions to 256 channels with a residual: 80 to 105
GFLOP/s). What is larger than the second-level cache is asked for in the order of memory, some
thousand cycles ahead (a 1x1 convolution from 16 to 96 channels on 64x64 pixels: 70 to 92). Only for
processors with wide vectors: they are what it was measured on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import Context, prefetch
from pocktvm.schedule.expression import Position
from pocktvm.schedule.loops import ceil_div
from pocktvm.schedule.rule import Task
from pocktvm.tvm_api import T, tirx

Expr = Any
LINE = 16  # float32 values of a cache line


def gains(isa: Isa) -> bool:
    """Was asking ahead measured to pay on processors of this kind?"""
    return isa.lanes >= 8


def worthwhile(ctx: Context, name: str) -> bool:
    """May the value be outside the caches, on a processor that gains from knowing early?"""
    isa = ctx.task.target.isa
    return gains(isa) and 4 * ctx.task.values[name].size > isa.l2_bytes // 4


def streams(task: Task, name: str) -> bool:
    """Is the value larger than the second-level cache, on a processor that gains from knowing?"""
    isa = task.target.isa
    return gains(isa) and 4 * task.values[name].size > isa.l2_bytes


def prefetch_stream(ctx: Context, name: str, at: Expr, count: int) -> None:
    """The lines of `count` consecutive values from `at`, into the second-level cache: for what is
    read a row of an image later, piece by piece in the order of memory.

    A kernel that walks over pixels and channels in tiles touches a row in short pieces, which no
    prefetcher of a processor recognises: 9 instead of 20 GB/s. Lines on their way to the first
    level occupy its few miss buffers, which a loop needs itself; those to the second do not: with
    them, both gradients of a depthwise 3x3 of 144 channels on 32x32 pixels take 0.5 ms instead of
    1.6 from main memory, 0.85 with lines asked into the first level."""
    for value in range(0, count, LINE):
        prefetch(ctx.buffers[name], at + value, level=2)


def prefetch_lines(ctx: Context, name: str, at: Expr, count: int) -> None:
    """`count` lines from the value at `at` on, into the second-level cache; beyond the end, its
    last line."""
    last = tirx.const(ctx.task.values[name].size - 1, "int32")
    for i in range(count):
        prefetch(ctx.buffers[name], tirx.Min(at + i * LINE, last), level=2)


def prefetch_epilogue(
    ctx: Context, result: str, at: Position, streamed: Sequence[str] = ()
) -> None:
    """The lines of every operand and output of the epilogue under one vector of `at.width`
    values, a whole row of a tile; `result` is the anchor's output. `streamed`: those asked for
    already."""
    for name, write in _streams(ctx, result):
        if name in streamed:
            continue
        for column in range(0, at.width, LINE):
            prefetch(ctx.buffers[name], at.flat + column, write)


def _streams(ctx: Context, result: str) -> Iterator[tuple[str, bool]]:
    """(name, is it written) of every whole-sized value the epilogue reads or writes."""
    task = ctx.task
    anchor = task.anchor
    read = {name for part in task.node.body for name in part.inputs if part is not anchor}
    for name in (*task.node.inputs, *task.node.outputs):
        whole = task.shape(name) == task.shape(result) and name not in task.literals
        if whole and worthwhile(ctx, name) and (name in read or name in task.node.outputs):
            yield name, name in task.node.outputs


class Asker(Protocol):
    """What a register tile asks memory for while it multiplies."""

    def emit(self, row: Expr, k: Expr) -> None:
        """The share of one step: k of the tile that begins at `row`."""


def row_streams(ctx: Context, a: str, result: str, k: int, n: int) -> tuple[tuple[str, int], ...]:
    """(name, values of a row) of A[M, k] and of what the epilogue of `result` [M, n] reads and
    writes, as far as it is larger than the second-level cache."""
    names = [(a, k), *((name, n) for name, _ in _streams(ctx, result))]
    return tuple((name, width) for name, width in names if streams(ctx.task, name))


@dataclass(frozen=True)
class RowsAhead:
    """The next `height` rows of every stream, while a product works on all columns of these: asked
    for in the order of memory by `panels` tiles side by side, this one number `panel`, that take
    `steps` steps of `unroll` values of k each."""

    ctx: Context
    streams: tuple[tuple[str, int], ...]  # (name, values of a row)
    height: int
    panel: Expr
    panels: int
    steps: int
    unroll: int

    @property
    def names(self) -> tuple[str, ...]:
        """What is asked for."""
        return tuple(name for name, _ in self.streams)

    def emit(self, row: Expr, k: Expr) -> None:
        """The share of one step: k of the tile that begins at `row`."""
        step = T.bind(self.panel * self.steps + k // self.unroll)
        for name, width in self.streams:
            lines = ceil_div(self.height * width, LINE)
            share = ceil_div(lines, self.panels * self.steps)
            at = (row + self.height) * width + step * (share * LINE)
            prefetch_lines(self.ctx, name, at, share)


@dataclass(frozen=True)
class Ahead:
    """The panel of a weight that is read after this one: `rows` x `columns` values, `stride`
    apart, from `at`; asked for line by line while this one is multiplied, by `tiles` tiles of
    `height` rows that take `steps` steps of `unroll` values of k each."""

    buffer: Any
    at: Expr
    rows: int
    columns: int
    stride: int
    tiles: int
    height: int
    steps: int
    unroll: int

    def emit(self, row: Expr, k: Expr) -> None:
        """The share of one step: k of the tile that begins at `row`."""
        across = ceil_div(self.columns, LINE)
        total = self.rows * across
        share = ceil_div(total, self.tiles * self.steps)
        step = row // self.height * self.steps + k // self.unroll
        for i in range(share):
            line = T.bind(tirx.Min(step * share + i, tirx.const(total - 1, "int32")))
            at = line // across * self.stride + line % across * LINE
            prefetch(self.buffer, self.at + at)
