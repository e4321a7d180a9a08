"""Reductions by blocks of threads: many values for each of some outputs.

A block holds `outs` neighbouring outputs and `slices` threads for each. Where neighbours in memory
are neighbouring outputs (a bias gradient), threads run along the outputs; where they are one
output's values (a row), along the slices. A long reduction of few outputs is cut into parts, added
by a second launch. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import const, load, local, store
from pocktvm.schedule.gpu.launch import (
    BLOCK,
    barrier,
    blocks,
    power_of_two,
    shared,
    strided_fold,
    threads,
    tree,
)
from pocktvm.schedule.loops import ceil_div
from pocktvm.tvm_api import T, tirx

Expr = Any
MAX_PARTS = 64
SHARE = 8  # values a thread should at least have


@dataclass(frozen=True)
class Fold:
    """How `outputs` reductions of `depth` values each are dealt out."""

    outputs: int
    depth: int
    outs: int
    slices: int
    parts: int
    along_depth: bool

    @property
    def part_depth(self) -> int:
        """Values that one part folds."""
        return ceil_div(self.depth, self.parts)

    def workspaces(self, dtype: str) -> tuple[tuple[int, str], ...]:
        """(elements, dtype) of the parts' results; none where there is one part."""
        return ((self.parts * self.outputs, dtype),) if self.parts > 1 else ()


def plan_fold(isa: Isa, outputs: int, depth: int, along_depth: bool) -> Fold:
    """Threads and parts for `outputs` folds of `depth` values each.

    `along_depth`: neighbours in memory belong to one output, so that neighbouring threads share it;
    otherwise they take neighbouring outputs.
    """
    if along_depth:
        slices = power_of_two(ceil_div(depth, 4), 1, BLOCK)
        outs = BLOCK // slices
    else:
        outs = power_of_two(outputs, 1, 32)
        slices = min(BLOCK // outs, power_of_two(ceil_div(depth, 2), 1, BLOCK))
    count = ceil_div(outputs, outs)
    parts = min(ceil_div(2 * isa.cores, count), depth // (slices * SHARE), MAX_PARTS)
    return Fold(outputs, depth, outs, slices, max(1, parts), along_depth)


def emit_fold(
    fold: Fold,
    value: Callable[[Expr, Expr], Expr],
    combine: Callable[[Expr, Expr], Expr],
    first: float,
    finish: Callable[[Expr, Expr], None],
    partial: Any = None,
    dtype: str = "float32",
) -> None:
    """value(output, index) combined over all indices, then finish(output, result)."""
    count = ceil_div(fold.outputs, fold.outs)
    for block, thread in blocks(count * fold.parts, fold.outs * fold.slices):
        chunk, part = T.bind(block // fold.parts), T.bind(block % fold.parts)
        if fold.along_depth:
            slice_, out = T.bind(thread % fold.slices), T.bind(thread // fold.slices)
        else:
            slice_, out = T.bind(thread // fold.outs), T.bind(thread % fold.outs)
        output = T.bind(chunk * fold.outs + out)
        start = T.bind(part * fold.part_depth)
        stop = T.bind(tirx.Min(start + fold.part_depth, tirx.const(fold.depth, "int32")))
        if fold.outputs % fold.outs:  # threads beyond the last output have nothing to fold
            stop = T.bind(tirx.Select(output < fold.outputs, stop, start))

        def own_value(index: Expr, output: Expr = output) -> Expr:
            return value(output, index)

        own = strided_fold(start + slice_, stop, fold.slices, own_value, combine, first, dtype)
        scratch = shared(fold.outs * fold.slices, dtype)
        at = T.bind(slice_ * fold.outs + out)
        store(scratch, at, own, 1)
        barrier()
        tree(scratch, at, fold.slices, fold.outs, combine)
        with T.If(tirx.And(slice_.equal(0), output < fold.outputs)), T.Then():
            result = T.bind(load(scratch, at, 1))
            if fold.parts > 1:
                store(partial, part * fold.outputs + output, result, 1)
            else:
                finish(output, result)
    if fold.parts > 1:
        _add_parts(fold, combine, first, finish, partial, dtype)


def _add_parts(
    fold: Fold,
    combine: Callable[[Expr, Expr], Expr],
    first: float,
    finish: Callable[[Expr, Expr], None],
    partial: Any,
    dtype: str,
) -> None:
    for output in threads(fold.outputs):
        acc = local(1, dtype)
        store(acc, 0, const(first, 1, dtype), 1)
        with T.serial(0, fold.parts) as part:
            other = load(partial, part * fold.outputs + output, 1)
            store(acc, 0, combine(load(acc, 0, 1), other), 1)
        finish(output, T.bind(load(acc, 0, 1)))
