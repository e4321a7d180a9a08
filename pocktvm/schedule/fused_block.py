"""An inverted residual block a row at a time: expand, depthwise, project, all in cache.

    for every row of the result:
        expand the rows of x that its window newly reaches   -> a ring of kernel-height rows
        depthwise over the ring                              -> one row
        project that row                                     -> y, with the residual

The ring and the row are a worker's scratch and stay in its second-level cache; each expanded row is
computed once for a part of an image. A part is a whole image where the batch feeds all cores
evenly, else images are cut so that it does; a part's first rows are then expanded twice.

The three operators are those of the matmul and depthwise rules, on sub-tasks whose intermediate
values lie in scratch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pocktvm.ir.graph import Node
from pocktvm.ir.target import Isa
from pocktvm.schedule.depthwise import Depthwise, Row
from pocktvm.schedule.depthwise import Tile as DepthwiseTile
from pocktvm.schedule.emit import Context, load, store
from pocktvm.schedule.gemm import Gemm, pointwise
from pocktvm.schedule.gemm_tile import Tile, register_tile
from pocktvm.schedule.loops import ceil_div, hands, tiles, workers, worth_threads, zero
from pocktvm.schedule.rule import Task
from pocktvm.schedule.window import Axis
from pocktvm.schedule.window import tiles as column_tiles
from pocktvm.tvm_api import T, tirx

Expr = Any


@dataclass
class Placed(Context):
    """A context in which some values lie in a worker's scratch, from `base` on."""

    base: dict[str, Expr]

    def load(self, name: str, index: Expr, width: int) -> Expr:
        """Elements of an argument, or of a value in scratch."""
        return load(self.buffers[name], self._at(name, index), width)

    def store(self, name: str, index: Expr, value: Expr, width: int) -> None:
        """Write elements of an argument, or of a value in scratch."""
        store(self.buffers[name], self._at(name, index), value, width)

    def _at(self, name: str, index: Expr) -> Expr:
        return index + self.base[name] if name in self.base else index


@dataclass(frozen=True)
class Block:
    """A task taken apart. `expand` is None where the depthwise reads the block's input."""

    task: Task
    expand: Task | None
    depthwise: Task
    project: Task
    conv: Depthwise
    tile: DepthwiseTile

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Rows and columns of the depthwise window."""
        return self.conv.phases[0]

    @property
    def isa(self) -> Isa:
        """Facts of the target's instruction set."""
        return self.task.target.isa

    @property
    def flops(self) -> int:
        """Multiplications and additions of all three, borders counted whole."""
        parts = [g.flops for g in (self.product(self.expand), self.product(self.project)) if g]
        return 2 * self.conv.macs + sum(parts)

    @staticmethod
    def product(task: Task | None) -> Gemm | None:
        """The whole matrix product of a part."""
        if task is None:
            return None
        gemm = pointwise(task, anchor_node(task))
        assert isinstance(gemm, Gemm), gemm
        return gemm

    def row_product(self, task: Task | None, pixels: int) -> Gemm | None:
        """The product of one row of the image."""
        gemm = self.product(task)
        return replace(gemm, m=pixels) if gemm else None

    @cached_property
    def ring(self) -> int:
        """Expanded rows kept: the height of the window."""
        rows = self.axes[0]
        return min(rows.src, (rows.taps - 1) * rows.dilation + 1)

    @cached_property
    def ring_row(self) -> int:
        """Elements from one row of the ring to the next: a line more than a row holds, since rows a
        power of two apart share their cache sets."""
        _, _, width, channels = self.conv.source_shape
        return width * channels + 16

    @cached_property
    def scratch(self) -> int:
        """float32 values that a worker keeps: the ring, and a row of the depthwise result."""
        _, _, width, channels = self.conv.result_shape
        return (self.ring * self.ring_row if self.expand else 0) + width * channels

    @cached_property
    def parts(self) -> int:
        """Bands of rows that an image is cut into, for as many tasks as cores."""
        images, rows = self.conv.result_shape[:2]
        if not worth_threads(self.isa, self.flops) or images >= 4 * self.isa.cores:
            return 1
        wanted = self.isa.cores // math.gcd(images, self.isa.cores)
        return max(1, min(wanted, rows * self.axes[0].step // (4 * self.ring)))

    @cached_property
    def part_rows(self) -> int:
        """Rows of the result in a part."""
        return ceil_div(self.conv.result_shape[1], self.parts)

    @cached_property
    def workers(self) -> int:
        """Scratch areas: parts that may run at once."""
        return hands(self.isa, self.flops, self.conv.result_shape[0] * self.parts)

    def emit(self, ctx: Context) -> None:
        """Write the whole loop nest: images, parts of them, rows."""
        images, height = self.conv.result_shape[:2]
        parts = ceil_div(height, self.part_rows)
        for worker, (n, part) in workers((images, parts), self.workers):
            base = T.bind(worker * self.scratch)
            first = T.bind(part * self.part_rows)
            stop = first + self.part_rows
            if height % self.part_rows:
                stop = tirx.Min(stop, tirx.const(height, "int32"))
            with T.serial(0, stop - first) as i:
                _BlockRow(ctx, self, base, n, T.bind(first + i), first).emit()


@dataclass
class _BlockRow:
    """Row `q` of image `n`, in the part that begins at `first`; scratch from `base`."""

    ctx: Context
    block: Block
    base: Expr
    n: Expr
    q: Expr
    first: Expr

    def emit(self) -> None:
        """Expand what is new, then depthwise, then project."""
        block = self.block
        ctx = self._context(block.depthwise)
        if block.expand is not None:
            self._expand(block.expand)
        rows, columns = block.axes
        runs = column_tiles(columns, block.tile.pixels)
        _RingRow(ctx, block.conv, block.tile, self.n, self.q, rows, columns, runs, block).emit()
        self._project()

    def _context(self, task: Task, ring_line: Expr | None = None) -> Placed:
        """The buffers of a part, the intermediate values in scratch."""
        block, buffers, base = self.block, dict(self.ctx.buffers), {}
        result = self.base
        if block.expand is not None:
            expanded = block.expand.node.outputs[0]
            buffers[expanded] = self.ctx.workspaces[0]
            base[expanded] = self.base if ring_line is None else self.base + ring_line
            result = self.base + block.ring * block.ring_row
        row = block.depthwise.node.outputs[0]
        buffers[row], base[row] = self.ctx.workspaces[0], result
        return Placed(task, buffers, [], base)

    def _expand(self, task: Task) -> None:
        """The source rows of this window that no earlier row of the part reached."""
        block, rows = self.block, self.block.axes[0]
        top = rows.source(self.q, 0)
        reach = (rows.taps - 1) * rows.dilation + 1
        lo = tirx.Select(self.q > self.first, tirx.Max(top, top - rows.step + reach), top)
        lo = tirx.Max(lo, zero())
        hi = tirx.Min(top + reach, tirx.const(rows.src, "int32"))
        with T.serial(0, tirx.Max(hi - lo, zero())) as i:
            y = T.bind(lo + i)
            ctx = self._context(task, T.bind(y % block.ring * block.ring_row))
            _, height, width, _ = block.conv.source_shape
            gemm = block.row_product(task, width)
            assert gemm is not None
            self._multiply(ctx, gemm, T.bind((self.n * height + y) * width), zero())

    def _project(self) -> None:
        block = self.block
        _, height, width, _ = block.conv.result_shape
        gemm = block.row_product(block.project, width)
        assert gemm is not None
        line = T.bind((self.n * height + self.q) * width)
        self._multiply(self._context(block.project), gemm, zero(), line)

    def _multiply(self, ctx: Context, gemm: Gemm, source: Expr, result: Expr) -> None:
        """One row of pixels times a packed matrix; both lie from a row of their own."""
        mr, nr = register_tile(self.block.isa, gemm)
        tile = Tile(ctx, gemm, zero())
        for column, width in tiles(gemm.n, min(nr, gemm.n)):

            def read(k: Expr, c: int, w: int, column: Expr = column, width: int = width) -> Expr:
                return ctx.load(gemm.b, column * gemm.k + k * width + c, w)

            for row, rows in tiles(gemm.m, min(mr, gemm.m)):
                acc = tile.accumulators(rows, width)
                tile.multiply(acc, source + row, rows, width, zero(), gemm.k, read)
                tile.finish(acc, result + row, rows, column, width)


@dataclass
class _RingRow(Row):
    """A depthwise row whose source is the ring, or the input, and whose result is in scratch."""

    block_: Block
    ahead = False  # both lie in a worker's scratch, in the caches

    def source_line(self, ty: Any) -> Expr:
        """The ring's row, or the input's."""
        if self.block_.expand is None:
            return super().source_line(ty)
        return self.rows.source(self.q, ty) % self.block_.ring * self.block_.ring_row

    def result_line(self) -> Expr:
        """The result is one row."""
        return zero()


def take_apart(task: Task) -> tuple[Task | None, Task, Task]:
    """(expand or None, depthwise, project) as tasks on their own."""
    parts = [part_task(task, part) for part in task.node.body]
    return (parts[0] if len(parts) == 3 else None), parts[-2], parts[-1]


def part_task(task: Task, node: Node) -> Task:
    """A part of a block as a task: literals are no inputs."""
    inputs = tuple(name for name in node.inputs if name not in task.literals)
    frozen = frozenset(i for i, name in enumerate(inputs) if task.is_frozen(name))
    return replace(task, node=replace(node, inputs=inputs), frozen=frozen)


def anchor_node(task: Task) -> Node:
    """The operator a part was built around."""
    node = task.anchor
    assert node is not None
    return node


def traffic_bytes(task: Task) -> int:
    """Bytes of the intermediate values that the block does not write."""
    values = (task.values[part.outputs[0]] for part in task.node.body[:-1])
    return sum(math.prod(value.shape) * 4 for value in values)
