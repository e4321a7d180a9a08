"""Copies of a matrix with its axes swapped, in square blocks of shuffles.

A block is as wide as the target's vectors: every line of the source is read once, whole. Blocks of
four columns read it four times, and of 16 rows that lie a multiple of 2 KiB apart the cache has
dropped it by then (a trained 512x2048 weight: 6 cycles an element instead of 1).
"""

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


def copy_transposed(
    source: Matrix, target: Matrix, rows: int, columns: int, lanes: int = BLOCK
) -> None:
    """target[c, r] = source[r, c] for a rows x columns source; `lanes`: of the target's vectors."""
    size = lanes if lanes in (8, 16) and rows >= lanes <= columns else BLOCK
    for r, height in tiles(rows, LINE):  # whole lines of the target while they are in the cache
        for c, width in tiles(columns, size):
            for i in range(0, height, size):
                _piece(source, target, r + i, min(size, height - i), c, width, size)


def _piece(
    source: Matrix, target: Matrix, r: Expr, height: int, c: Expr, width: int, size: int
) -> None:
    if height == width == size:
        _block(source, target, r, c, size)
        return
    if size > BLOCK:
        for i in range(0, height, BLOCK):
            for j in range(0, width, BLOCK):
                sides = min(BLOCK, height - i), min(BLOCK, width - j)
                _piece(source, target, r + i, sides[0], c + j, sides[1], BLOCK)
        return
    for i in range(height):
        for j in range(width):
            value = load(source.buffer, source.index(r + i, c + j), 1)
            store(target.buffer, target.index(c + j, r + i), value, 1)


def _block(source: Matrix, target: Matrix, r: Expr, c: Expr, size: int) -> None:
    rows = [T.bind(load(source.buffer, source.index(r + i, c), size)) for i in range(size)]
    for j, column in enumerate(transposed(rows, size)):
        store(target.buffer, target.index(c + j, r), column, size)


def transposed(rows: list[Expr], size: int) -> list[Expr]:
    """The columns of `size` vectors of `size` values (a power of two): log2(size) rounds, each of
    which swaps the off-diagonal squares of every two rows `distance` apart."""
    if size == BLOCK:
        return [tirx.Shuffle(rows, [i * BLOCK + j for i in range(BLOCK)]) for j in range(BLOCK)]
    rows, distance = list(rows), 1
    while distance < size:
        upper = [j if not j & distance else size + j - distance for j in range(size)]
        lower = [j + distance if not j & distance else size + j for j in range(size)]
        for i in range(size):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                rows[i] = T.bind(tirx.Shuffle([a, b], upper))
                rows[i + distance] = T.bind(tirx.Shuffle([a, b], lower))
        distance *= 2
    return rows
