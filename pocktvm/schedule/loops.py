"""Loops that rules share: grids of independent tasks, tiles with tails.

All are generators used as `for …:` around emission: the body is emitted once per yield, inside the
loop that is open at that moment. A parallel region costs 5 to 12 us on two cores, so a kernel asks
`worth_threads` first; what a task computes never depends on how many threads run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.tvm_api import T, tirx

Expr = Any


def worth_threads(isa: Isa, flops: float) -> bool:
    """True when the work takes longer than about 50 us on one core."""
    return isa.cores > 1 and flops > 1.2e5 * isa.lanes


def hands(isa: Isa, flops: float, tasks: int) -> int:
    """How many of `tasks`, which do `flops` in all, run at once: 1 where threads do not pay."""
    return min(isa.cores, tasks) if worth_threads(isa, flops) else 1


def zero() -> Expr:
    """The index 0."""
    return tirx.const(0, "int32")


def grid(extents: Sequence[int], parallel: bool) -> Iterator[list[Expr]]:
    """One loop over the product of `extents`; yields the indices, the last one fastest."""
    total = math.prod(extents)
    if total == 1:
        yield [zero() for _ in extents]
        return
    with (T.parallel if parallel else T.serial)(0, total) as flat:
        yield unflatten(flat, extents)


def workers(extents: Sequence[int], count: int) -> Iterator[tuple[Expr, list[Expr]]]:
    """The same product of loops dealt out to `count` parallel workers, each with its own scratch
    memory; yields the worker's number and the indices."""
    total = math.prod(extents)
    if count == 1:
        for indices in grid(extents, False):
            yield zero(), indices
        return
    with T.parallel(0, count) as worker, T.serial(0, (total + count - 1 - worker) // count) as i:
        yield worker, unflatten(i * count + worker, extents)


def unflatten(flat: Expr, extents: Sequence[int]) -> list[Expr]:
    """The index on every axis of a flat row-major index."""
    indices: list[Expr] = []
    rest, left = flat, math.prod(extents)
    for extent in reversed(extents):
        left //= extent
        if extent == 1:
            indices.append(zero())
        elif left == 1:
            indices.append(rest)
        else:
            indices.append(rest % extent)
            rest = rest // extent
    return indices[::-1]


def tiles(extent: int, block: int) -> Iterator[tuple[Expr, int]]:
    """(start, size) of consecutive blocks covering [0, extent), the last one possibly smaller."""
    full = extent // block
    if full == 1:
        yield zero(), block
    elif full:
        with T.serial(0, full) as i:
            yield i * block, block
    if extent % block:
        yield tirx.const(full * block, "int32"), extent % block


def tile_at(index: Expr, extent: int, block: int) -> Iterator[tuple[Expr, int]]:
    """(start, size) of block number `index`: two branches where the last one is smaller."""
    full, tail = divmod(extent, block)
    if not tail:
        yield index * block, block
    elif not full:
        yield zero(), tail
    else:
        with T.If(index < full):
            with T.Then():
                yield index * block, block
            with T.Else():
                yield tirx.const(full * block, "int32"), tail


def chunk_tiles(chunk: Expr, extent: int, size: int, block: int) -> Iterator[tuple[Expr, int]]:
    """(start, size) of the blocks of chunk number `chunk`; chunks are `size` long, a multiple of
    `block` (or all of `extent`). The smaller last block is a branch of its own."""
    full, tail = divmod(extent, block)
    if size >= extent:
        yield from tiles(extent, block)
        return
    per_chunk = size // block
    if full:
        with T.serial(0, tirx.Min(per_chunk, full - chunk * per_chunk)) as i:
            yield (chunk * per_chunk + i) * block, block
    if tail:
        with T.If(chunk == full // per_chunk), T.Then():
            yield tirx.const(full * block, "int32"), tail


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def balanced(extent: int, block: int) -> int:
    """A block size at most `block` that leaves about equal pieces."""
    block = max(1, min(block, extent))
    return ceil_div(extent, ceil_div(extent, block))
