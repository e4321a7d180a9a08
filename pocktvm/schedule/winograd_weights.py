"""G w G^T of weights that learn: transformed anew in every step, into a workspace.

The layout is that of `pack.winograd_panels`: [plane][panel][depth][panel width]. For the input
gradient taps are flipped and the two channel axes swapped: blocks are transposed on the stack, so
that reads and writes are both vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocktvm.schedule import emit
from pocktvm.schedule.emit import Context
from pocktvm.schedule.loops import ceil_div, grid, tile_at, tiles
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.schedule.winograd_transforms import WEIGHT, both_ways
from pocktvm.tvm_api import T

Expr = Any
ROWS = 16  # of the depth that a task takes


@dataclass(frozen=True)
class WeightTransform:
    """HWIO weights `source` to planes; panels of `nr` run over O, or over I with `swap`."""

    ctx: Context
    source: str
    shape: tuple[int, ...]  # HWIO
    target: Any
    m: int
    nr: int
    swap: bool

    @property
    def depth(self) -> int:
        """Extent of the axis that the products sum over."""
        return self.shape[3] if self.swap else self.shape[2]

    @property
    def width(self) -> int:
        """The axis of the panels."""
        return self.shape[2] if self.swap else self.shape[3]

    def emit(self, parallel: bool) -> None:
        """Write the transform of all weights, into all planes."""
        extents = (ceil_div(self.depth, ROWS), ceil_div(self.width, self.nr))
        for block, panel in grid(extents, parallel):
            for column, width in tile_at(panel, self.width, self.nr):
                for row, rows in tile_at(block, self.depth, ROWS):
                    self._block(T.bind(row), rows, T.bind(column), width)

    def _block(self, row: Expr, rows: int, column: Expr, width: int) -> None:
        pieces = emit.vectors(width, self.ctx.lanes)
        if not self.swap:
            with T.serial(0, rows) as r:
                for start, lanes in pieces:
                    index = (row + r) * self.shape[3] + column + start
                    self._transform(self.ctx.buffers[self.source], index,
                                    self.shape[2] * self.shape[3], row + r, column, start, lanes,
                                    width)  # fmt: skip
            return
        copy = emit.local(9 * rows * width)
        for tap, _ in tiles(9, 1):
            at = (tap * self.shape[2] + column) * self.shape[3] + row
            source = Matrix(self.ctx.buffers[self.source], T.bind(at), self.shape[3])
            target = Matrix(copy, T.bind(tap * (rows * width)), width)
            copy_transposed(source, target, width, rows, self.ctx.lanes)
        with T.serial(0, rows) as r:
            for start, lanes in pieces:
                self._transform(copy, r * width + start, rows * width, row + r, column, start,
                                lanes, width)  # fmt: skip

    def _transform(
        self, buffer: Any, index: Expr, tap: int, row: Expr, column: Expr, start: int, lanes: int,
        width: int,
    ) -> None:  # fmt: skip
        """One vector of all nine taps, `tap` elements apart in `buffer`."""
        index = T.bind(index)
        at = T.bind(column * self.depth + row * width + start)

        def read(a: int, b: int) -> Expr:
            number = 8 - (3 * a + b) if self.swap else 3 * a + b
            return emit.load(buffer, index + number * tap, lanes)

        def write(a: int, b: int, value: Expr) -> None:
            plane = (a * (self.m + 2) + b) * (self.depth * self.width)
            emit.store(self.target, at + plane, value, lanes)

        both_ways(WEIGHT[self.m], 3, read, write, lanes)


