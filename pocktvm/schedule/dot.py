"""The innermost loop of convolutions: a register tile of rows of a source times weight vectors.

Each weight vector is loaded once for all rows; a row's value is broadcast, or, where the target
multiplies by one lane (isa.lane_fma), four of them are loaded as one vector and used in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule import emit
from pocktvm.schedule.emit import Context
from pocktvm.tvm_api import T, tirx

Expr = Any


def by_lane(ctx: Context) -> bool:
    """Does the target multiply by one lane of a vector?"""
    return ctx.task.target.isa.lane_fma and ctx.lanes == 4


def written(ctx: Context, count: int, unroll: int) -> int:
    """How many values of k are written out for a sum of `count`; the rest is a loop."""
    unroll = 4 if by_lane(ctx) else unroll
    return count if count // unroll <= 2 else unroll + count % unroll


def tile_cycles(isa: Isa, rows: int, vectors: int) -> float:
    """Cycles of one k of a register tile, by a simple port model: two loads and two multiply-adds
    a cycle, which take four; loads count a little even where they hide."""
    loads = (rows / 4 if isa.lane_fma else rows) + vectors
    return max(rows * vectors / 2, loads / 2, 4) + loads / 16


def max_rows(isa: Isa, vectors: int) -> int:
    """Rows whose accumulators, with `vectors` weights and the source values, fit registers."""
    if isa.lane_fma:  # one register a row holds four values of k
        return (isa.vector_registers - vectors - 1) // (vectors + 1)
    return (isa.vector_registers - vectors - 2) // vectors


def best_unroll(isa: Isa, accumulators: int) -> int:
    """Values of k written out. Sixteen short registers are too few: LLVM loads ahead and spills
    (ARMv7: 4.8 instructions a multiply-add instead of 2.4)."""
    if isa.vector_registers <= 16 and isa.lanes <= 4:
        return 1
    return 4 if accumulators <= 16 else 2


@dataclass
class Dot:
    """acc[row] += sum over k of source[row + k] * weights[k], on every vector of a panel."""

    ctx: Context
    source: Any
    weights: Any
    acc: Any
    vectors: Sequence[tuple[int, int]]  # of the panel
    stride: int  # elements between the weights of k and k + 1
    rows: Sequence[int]  # where each row begins, from the index given to `emit`
    unroll: int

    def emit(self, x: Expr, w: Expr, count: int, chosen: Sequence[int]) -> None:
        """A loop over `count` consecutive source values, for the chosen rows."""
        if not chosen:
            return
        lanes = by_lane(self.ctx)
        unroll = 4 if lanes else self.unroll
        step = self.by_lanes if lanes else self.by_scalars
        whole = count // unroll
        if whole <= 2:
            for k in range(whole):
                step(x + k * unroll, w + k * unroll * self.stride, chosen)
        else:
            with T.serial(0, whole) as k:
                step(x + k * unroll, w + k * (unroll * self.stride), chosen)
        for k in range(whole * unroll, count):
            self.one(x + k, w + k * self.stride, chosen)

    def by_scalars(self, x: Expr, w: Expr, chosen: Sequence[int]) -> None:
        """`unroll` values of k, each row's value broadcast."""
        for u in range(self.unroll):
            self.one(x + u, w + u * self.stride, chosen)

    def one(self, x: Expr, w: Expr, chosen: Sequence[int]) -> None:
        """Multiply and add at one value of k."""
        for i in chosen:
            value = emit.load(self.source, x + self.rows[i], 1)
            self.fma(i, w, lambda lanes, value=value: emit.splat(value, lanes))  # type: ignore[misc]

    def by_lanes(self, x: Expr, w: Expr, chosen: Sequence[int]) -> None:
        """Four values of k: each row's four in one register, multiplied by lane."""
        four = {i: T.bind(emit.load(self.source, x + self.rows[i], 4)) for i in chosen}
        for u in range(4):
            for i in chosen:
                self.fma(i, w + u * self.stride,
                         lambda lanes, a=four[i], u=u: tirx.Shuffle([a], [u] * lanes))  # type: ignore[misc] # fmt: skip

    def fma(self, i: int, w: Expr, value: Callable[[int], Expr]) -> None:
        """acc[i] += value * weights, on every vector of the panel."""
        base = i * (self.vectors[-1][0] + self.vectors[-1][1])
        for start, lanes in self.vectors:
            weight = emit.load(self.weights, w + start, lanes)
            total = emit.load(self.acc, base + start, lanes) + value(lanes) * weight
            emit.store(self.acc, base + start, total, lanes)
