"""Copies of a matrix with its axes swapped, in 4x4 blocks of shuffles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.emit import load, store
from pocktvm.schedule.loops import tiles
from pocktvm.tvm_api import T, tirx

Expr = Any
BLOCK = 4
LINE = 16  # float32 values of a cache line


@dataclass(frozen=True)
class Matrix:
    """Rows `stride` apart in a flat buffer, the first at `at`."""

    buffer: Any
    at: Expr
    stride: int

    def index(self, row: Expr, column: Expr) -> Expr:
        """The flat index of an element."""
        return self.at + row * self.stride + column


def copy_transposed(source: Matrix, target: Matrix, rows: int, columns: int) -> None:
    """target[c, r] = source[r, c] for a rows x columns source."""
    for r, height in tiles(rows, LINE):  # whole lines of the target while they are in the cache
        for c, width in tiles(columns, BLOCK):
            for i in range(0, height, BLOCK):
                _piece(source, target, r + i, min(BLOCK, height - i), c, width)


def _piece(source: Matrix, target: Matrix, r: Expr, height: int, c: Expr, width: int) -> None:
    if height == width == BLOCK:
        _block(source, target, r, c)
        return
    for i in range(height):
        for j in range(width):
            value = load(source.buffer, source.index(r + i, c + j), 1)
            store(target.buffer, target.index(c + j, r + i), value, 1)


def _block(source: Matrix, target: Matrix, r: Expr, c: Expr) -> None:
    rows = [T.bind(load(source.buffer, source.index(r + i, c), BLOCK)) for i in range(BLOCK)]
    for j in range(BLOCK):
        column = tirx.Shuffle(rows, [i * BLOCK + j for i in range(BLOCK)])
        store(target.buffer, target.index(c + j, r), column, BLOCK)
